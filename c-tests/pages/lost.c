/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pages that are lost: KVMFAULT_LOST and kvmfault_pages_lost, for vCPUs, for the host, and after a
 * discard.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int answer_lost(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	resolver_vm.calls++;
	if (resolver_vm_page_of(fault) == 9)
		return KVMFAULT_LOST;
	OK(source_install(&resolver_vm.source, vm, fault->gpa, fault->len));
	return KVMFAULT_RESOLVED;
}

static sigjmp_buf back;
static volatile sig_atomic_t bus_code;
static void *volatile bus_address;

static void on_bus(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	bus_code = info->si_code;
	bus_address = info->si_addr;
	siglongjmp(back, 1);
}

/* A thread of the host's that isn't a vCPU's. */
static void *touch_lost(void *page)
{
	struct sigaction action = { .sa_sigaction = on_bus, .sa_flags = SA_SIGINFO }, before;
	sigset_t bus;
	SYS(sigaction(SIGBUS, &action, &before));
	/* The vCPU's thread, which made this one, blocks it. */
	sigemptyset(&bus);
	sigaddset(&bus, SIGBUS);
	pthread_sigmask(SIG_UNBLOCK, &bus, NULL);
	if (sigsetjmp(back, 1) == 0) {
		uint8_t byte = *(volatile uint8_t *)page;
		FAIL("the host read %#x from a lost page", byte);
	}
	SYS(sigaction(SIGBUS, &before, NULL));
	return NULL;
}

static void expect_lost(struct vcpu *v, uint64_t page)
{
	struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	int ret = kvmfault_vcpu_run(v->handle);
	CHECK(ret == KVMFAULT_MEMORY_ERROR, "%s", vcpu_describe(v, ret));
	OK(kvmfault_vcpu_memory_error(v->handle, &info));
	EQUAL("gpa", info.gpa, RAM_GPA + page * PAGE);
	EQUAL("hva", (uint8_t *)info.hva - resolver_vm.ram.hva, page * PAGE);
	EQUAL("len", info.len, PAGE);
	EQUAL("lost", info.lost, 1);
	EQUAL("state", kvmfault_pages_state(resolver_vm.m.library, RAM_GPA + page * PAGE), KVMFAULT_PAGE_LOST);
}

static void lost(enum backing backing, int cpl)
{
	struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	resolver_vm_set_up(backing, answer_lost, 1, cpl);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	vcpu_attach(v);
	EQUAL("memory_error before there is one", kvmfault_vcpu_memory_error(v->handle, &info), -ENODATA);
	resolver_vm_read(v, 8);

	resolver_vm_load_read(v, 9);
	expect_lost(v, 9);
	EQUAL("calls", resolver_vm.calls, 2);
	/*
	 * With userfaultfd a marker makes the vCPU's access fail, which counts as a fault of its
	 * own.
	 */
	CHECK(machine_settled_stats(&resolver_vm.m).outcome_lost >= 1, "outcome_lost is 0");
	if (cpl == 0 && cpl0_is_emulated()) {
		/*
		 * KVM's emulator has its access answered in any case; it reads ones, as from where
		 * no device is.
		 */
		EQUAL("stop", vcpu_run(v), 0);
		EQUAL("what the guest read", resolver_vm.steps[0].value, -1);
	} else {
		/*
		 * The guest repeats the access, and it is still lost; the resolver isn't asked
		 * again.
		 */
		expect_lost(v, 9);
		resolver_vm_load_read(v, 9);
		expect_lost(v, 9);
	}
	EQUAL("calls", resolver_vm.calls, 2);
	/* Neighbours are not concerned, and others find the page lost, too. */
	resolver_vm_read(v, 10);
	REFUSED(kvmfault_pages_install(resolver_vm.m.library, RAM_GPA + 9 * PAGE, resolver_vm.ram.hva + 10 * PAGE,
				       PAGE),
		EHWPOISON, "lost");
	REFUSED(kvmfault_pages_resolve(resolver_vm.m.library, RAM_GPA + 9 * PAGE, PAGE), EHWPOISON, "lost");
	/* the guest may be ahead of the counters */
	UNTIL(kvmfault_pages_absent(resolver_vm.m.library) == RESOLVER_VM_PAGES - 3);

	/* A host thread gets SIGBUS at the address, a system call EFAULT. */
	pthread_t toucher;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	/* before Linux 6.6 it is SIGSEGV */
	if (probe.mechanisms_anon & 1u << KVMFAULT_MECHANISM_POISON_TRAP) {
		CHECK(!pthread_create(&toucher, NULL, touch_lost, resolver_vm.ram.hva + 9 * PAGE + 123),
		      "pthread_create");
		pthread_join(toucher, NULL);
		EQUAL("the address of SIGBUS", ((uintptr_t)bus_address & -PAGE) - (uintptr_t)resolver_vm.ram.hva,
		      9 * PAGE);
	}
	int fd = SYS(memfd_create("output", MFD_CLOEXEC));
	CHECK(write(fd, resolver_vm.ram.hva + 9 * PAGE, 8) == -1 && errno == EFAULT, "write(2) from a lost page: %s",
	      strerror(errno));

	/* A discard makes it absent again, and then it can come. */
	OK(kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA + 9 * PAGE, PAGE));
	EQUAL("state", kvmfault_pages_state(resolver_vm.m.library, RAM_GPA + 9 * PAGE), KVMFAULT_PAGE_ABSENT);
	resolver_vm_install(9);
	resolver_vm_read(v, 9);
	resolver_vm_tear_down();
}

static void lost_memfd(void)
{
	lost(MEMFD, 3);
}

static void lost_anon(void)
{
	lost(ANON, 3);
}

static void lost_cpl0(void)
{
	lost(MEMFD, 0);
}

static void *expect_lost_page_3(struct vcpu *v)
{
	vcpu_attach(v);
	expect_lost(v, 3);
	resolver_vm.finished++;
	return NULL;
}

/* A vCPU that waits for a pending page gets a memory error when the page is lost. */
static void lost_while_pending(void)
{
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, 2, 3);
	for (int i = 0; i < 2; i++) {
		resolver_vm_load_read(resolver_vm.m.vcpu[i], 3);
		vcpu_start(resolver_vm.m.vcpu[i], expect_lost_page_3, NULL);
	}
	UNTIL(resolver_vm.calls == 1);
	usleep(50000);
	EQUAL("vCPUs that have gone on", resolver_vm.finished, 0);
	OK(kvmfault_pages_lost(resolver_vm.m.library, RAM_GPA + 3 * PAGE, PAGE));
	UNTIL(resolver_vm.finished == 2);
	for (int i = 0; i < 2; i++)
		vcpu_join(resolver_vm.m.vcpu[i]);
	EQUAL("calls", resolver_vm.calls, 1);
	resolver_vm_tear_down();
}

static const int late_answers[] = {
	KVMFAULT_RESOLVED, KVMFAULT_PENDING, KVMFAULT_LOST, KVMFAULT_RETRY, -EIO, -EEXIST, 12345
};

/* Another thread marks the page lost while the resolver fetches it. */
static int answer_too_late(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	resolver_vm.calls++;
	OK(kvmfault_pages_lost(vm, fault->gpa, fault->len));
	return late_answers[resolver_vm_page_of(fault)];
}

/* The page is lost, whatever the resolver answers. */
static void lost_while_resolving(void)
{
	enum { N = sizeof(late_answers) / sizeof(*late_answers) };
	resolver_vm_set_up(MEMFD, answer_too_late, 1, 3);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	vcpu_attach(v);
	for (unsigned i = 0; i < N; i++) {
		resolver_vm_load_read(v, i);
		expect_lost(v, i);
		EQUAL("calls", resolver_vm.calls, i + 1);
		/*
		 * A reader thread may still be at it; for a page that is absent again it would ask
		 * again.
		 */
		machine_settled_stats(&resolver_vm.m);
		/* Before Linux 6.6 the address is known only while a single page is lost. */
		OK(kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA + i * PAGE, PAGE));
	}
	EQUAL("outcome_failed", machine_settled_stats(&resolver_vm.m).outcome_failed, 0);
	resolver_vm_tear_down();
}

/* Each access to a lost page fails, also when the VMM has dropped the marker. */
static void lost_and_dropped(void)
{
	pthread_t thread;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	if (!(probe.mechanisms_anon & 1u << KVMFAULT_MECHANISM_POISON_TRAP))
		skip("without UFFDIO_POISON the page is inaccessible, which doesn't go away");
	resolver_vm_set_up(MEMFD, answer_lost, 1, 3);
	OK(kvmfault_pages_lost(resolver_vm.m.library, RAM_GPA + 9 * PAGE, PAGE));
	SYS(madvise(resolver_vm.ram.hva + 9 * PAGE, PAGE, MADV_DONTNEED));
	CHECK(!pthread_create(&thread, NULL, touch_lost, resolver_vm.ram.hva + 9 * PAGE), "pthread_create");
	pthread_join(thread, NULL);
	EQUAL("resolver calls", resolver_vm.calls, 0);
	resolver_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "memfd", lost_memfd, true },
	{ "anon", lost_anon, true },
	{ "cpl0", lost_cpl0, true },
	{ "while-pending", lost_while_pending, true },
	{ "while-resolving", lost_while_resolving, true },
	{ "and-dropped", lost_and_dropped, true },
};
TEST_MAIN(cases)
