/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The resolver's contract: what each answer means for the vCPU, the page and the host; what may be called from it; and when the
 * last call has happened.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGES = 64 };

/* A machine whose guests read words; the resolver is the case's. */
struct lab {
	struct machine m;
	struct ram ram;
	struct source source;
	struct step *steps; /* 128 of them */
	uint64_t steps_gpa;
};

static struct lab lab;

static void set_up(enum backing backing, kvmfault_resolver resolver, int vcpus, int cpl)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolver;
	options.opaque = &lab;
	ram_create(&lab.ram, backing, PAGES * PAGE);
	machine_create(&lab.m, PAGE);
	source_create(&lab.source, RAM_GPA, lab.ram.len, PATTERN);
	machine_attach(&lab.m, NULL, &options);
	machine_set_slot(&lab.m, &lab.ram, RAM_SLOT, RAM_GPA);
	lab.steps = machine_share(&lab.m, PAGE, &lab.steps_gpa);
	for (int i = 0; i < vcpus; i++)
		machine_add_vcpu(&lab.m, cpl);
}

static void tear_down(void)
{
	machine_destroy(&lab.m);
	ram_destroy(&lab.ram);
	source_destroy(&lab.source);
}

/* vCPU `v` is to read the first word of a page and stop; its steps are number 2 * v and the next. */
static void load_read(struct vcpu *v, uint64_t page)
{
	struct step *steps = lab.steps + 2 * v->number;
	steps[0] = (struct step){ READ64, RAM_GPA + page * PAGE, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, lab.steps_gpa + 2 * v->number * sizeof(*steps));
}

static void check_read(const struct vcpu *v, uint64_t page)
{
	EQUAL("the word that the guest read", lab.steps[2 * v->number].value, pattern_word(&lab.source.pattern, page, 0));
}

static uint64_t page_of(const struct kvmfault_fault *fault)
{
	return (fault->gpa - RAM_GPA) / PAGE;
}

static void *run_to_stop(struct vcpu *v)
{
	vcpu_attach(v);
	vcpu_run(v);
	return NULL;
}

/* ---- PENDING ---- */

static atomic_uint calls;
static atomic_uint fault_seen[PAGES];

static int answer_pending(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm;
	calls++;
	fault_seen[page_of(fault)]++;
	return KVMFAULT_PENDING;
}

static void install(uint64_t page)
{
	OK(source_install(&lab.source, lab.m.library, RAM_GPA + page * PAGE, PAGE));
}

static atomic_int order[PAGES], finished;

static void *run_and_note(struct vcpu *v)
{
	vcpu_attach(v);
	vcpu_run(v);
	order[finished++] = v->number;
	return NULL;
}

/* Eight vCPUs wait for eight pages; these come from another thread, last first, and each wakes its vCPU and no other. */
static void pending_out_of_order(void)
{
	enum { N = 8 };
	set_up(MEMFD, answer_pending, N, 3);
	for (int i = 0; i < N; i++) {
		load_read(lab.m.vcpu[i], i);
		vcpu_start(lab.m.vcpu[i], run_and_note, NULL);
	}
	UNTIL(calls == N);
	for (int i = N - 1; i >= 0; i--) {
		EQUAL("vCPUs that have gone on", finished, N - 1 - i);
		EQUAL("state", kvmfault_pages_state(lab.m.library, RAM_GPA + i * PAGE), KVMFAULT_PAGE_RESOLVING);
		install(i);
		UNTIL(finished == N - i);
		EQUAL("the vCPU that went on", order[N - 1 - i], i);
	}
	for (int i = 0; i < N; i++) {
		vcpu_join(lab.m.vcpu[i]);
		check_read(lab.m.vcpu[i], i);
		EQUAL("calls for a page", fault_seen[i], 1);
	}
	EQUAL("outcome_failed", machine_settled_stats(&lab.m).outcome_failed, 0);
	tear_down();
}

/* Eight vCPUs wait for one page: one call, and all go on. */
static void pending_shared(void)
{
	enum { N = 8 };
	set_up(MEMFD, answer_pending, N, 3);
	for (int i = 0; i < N; i++) {
		load_read(lab.m.vcpu[i], 5);
		vcpu_start(lab.m.vcpu[i], run_to_stop, NULL);
	}
	UNTIL(calls == 1);
	usleep(100000); /* the others come, too */
	EQUAL("calls while the page is pending", calls, 1);
	install(5);
	for (int i = 0; i < N; i++) {
		vcpu_join(lab.m.vcpu[i]);
		check_read(lab.m.vcpu[i], 5);
	}
	EQUAL("calls in all", calls, 1);
	tear_down();
}

/* The page comes, or turns out to be lost, before the resolver that says PENDING has returned. */
static int pending_too_late(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	calls++;
	OK(source_install(&lab.source, vm, fault->gpa, fault->len));
	return KVMFAULT_PENDING;
}

static void pending_already_there(void)
{
	set_up(MEMFD, pending_too_late, 1, 3);
	struct vcpu *v = lab.m.vcpu[0];
	vcpu_attach(v);
	for (int page = 0; page < PAGES; page++) {
		load_read(v, page);
		EQUAL("stop", vcpu_run(v), 0);
		check_read(v, page);
	}
	EQUAL("calls", calls, PAGES);
	tear_down();
}

/* ---- RETRY ---- */

enum { TRIES = 5 };

static int answer_retry(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	calls++;
	if (++fault_seen[page_of(fault)] < TRIES)
		return KVMFAULT_RETRY;
	OK(source_install(&lab.source, vm, fault->gpa, fault->len));
	return KVMFAULT_RESOLVED;
}

static void retry(int cpl)
{
	set_up(MEMFD, answer_retry, 1, cpl);
	struct vcpu *v = lab.m.vcpu[0];
	vcpu_attach(v);
	for (int page = 0; page < PAGES; page++) {
		load_read(v, page);
		EQUAL("stop", vcpu_run(v), 0);
		check_read(v, page);
	}
	struct kvmfault_stats stats = machine_settled_stats(&lab.m);
	EQUAL("calls", calls, PAGES * TRIES);
	EQUAL("resolver_calls", stats.resolver_calls, PAGES * TRIES);
	EQUAL("outcome_retried", stats.outcome_retried, PAGES * (TRIES - 1));
	tear_down();
}

static void retry_cpl3(void)
{
	retry(3);
}

static void retry_cpl0(void)
{
	retry(0);
}

static int always_retry(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm, (void)fault;
	calls++;
	return KVMFAULT_RETRY;
}

/* Not for ever: in the end there is an error that names the page. (Takes some 20 s, asleep.) */
static void retry_ends(void)
{
	require_interruptible_sleep();
	set_up(MEMFD, always_retry, 1, 3);
	struct vcpu *v = lab.m.vcpu[0];
	vcpu_attach(v);
	load_read(v, 7);
	double began = now();
	REFUSED(kvmfault_vcpu_run(v->handle), ELOOP, test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD ? "retries" : "0x40007000");
	CHECK(calls > 100, "only %u tries", calls);
	CHECK(now() - began > 1, "%u tries in %.3f s: no pauses between", calls, now() - began);
	tear_down();
}

/* A kick ends the pause between tries. */
static void *run_once(struct vcpu *v)
{
	vcpu_attach(v);
	int ret = kvmfault_vcpu_run(v->handle);
	CHECK(ret == KVMFAULT_INTERRUPTED, "%s", vcpu_describe(v, ret));
	finished++;
	return NULL;
}

static void retry_kicked(void)
{
	require_interruptible_sleep();
	set_up(MEMFD, always_retry, 1, 3);
	load_read(lab.m.vcpu[0], 7);
	vcpu_start(lab.m.vcpu[0], run_once, NULL);
	UNTIL(calls > 20);
	OK(kvmfault_vcpu_kick(lab.m.vcpu[0]->handle));
	UNTIL(finished == 1);
	vcpu_join(lab.m.vcpu[0]);
	tear_down();
}

/* ---- LOST ---- */

static int answer_lost(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	calls++;
	if (page_of(fault) == 9)
		return KVMFAULT_LOST;
	OK(source_install(&lab.source, vm, fault->gpa, fault->len));
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
	EQUAL("hva", (uint8_t *)info.hva - lab.ram.hva, page * PAGE);
	EQUAL("len", info.len, PAGE);
	EQUAL("lost", info.lost, 1);
	EQUAL("state", kvmfault_pages_state(lab.m.library, RAM_GPA + page * PAGE), KVMFAULT_PAGE_LOST);
}

static void lost(enum backing backing, int cpl)
{
	struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	set_up(backing, answer_lost, 1, cpl);
	struct vcpu *v = lab.m.vcpu[0];
	vcpu_attach(v);
	EQUAL("memory_error before there is one", kvmfault_vcpu_memory_error(v->handle, &info), -ENODATA);
	load_read(v, 8);
	EQUAL("stop", vcpu_run(v), 0);
	check_read(v, 8);

	load_read(v, 9);
	expect_lost(v, 9);
	EQUAL("calls", calls, 2);
	/* With userfaultfd the vCPU is told by a marker, which counts as a fault of its own. */
	CHECK(machine_settled_stats(&lab.m).outcome_lost >= 1, "outcome_lost is 0");
	if (cpl == 0 && cpl0_is_emulated()) {
		/* KVM's emulator has its access answered in any case; it reads ones, as from where no device is. */
		EQUAL("stop", vcpu_run(v), 0);
		EQUAL("what the guest read", lab.steps[0].value, -1);
	} else {
		/* The guest repeats the access, and it is still lost; the resolver isn't asked again. */
		expect_lost(v, 9);
		load_read(v, 9);
		expect_lost(v, 9);
	}
	EQUAL("calls", calls, 2);
	/* Neighbours are not concerned, and others find the page lost, too. */
	load_read(v, 10);
	EQUAL("stop", vcpu_run(v), 0);
	check_read(v, 10);
	REFUSED(kvmfault_pages_install(lab.m.library, RAM_GPA + 9 * PAGE, lab.ram.hva + 10 * PAGE, PAGE), EHWPOISON, "lost");
	REFUSED(kvmfault_pages_resolve(lab.m.library, RAM_GPA + 9 * PAGE, PAGE), EHWPOISON, "lost");
	UNTIL(kvmfault_pages_absent(lab.m.library) == PAGES - 3); /* the guest may be ahead of the books */

	/* A host thread gets SIGBUS at the address, a system call EFAULT. */
	pthread_t toucher;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	if (probe.mechanisms_anon & 1u << KVMFAULT_MECHANISM_POISON_TRAP) { /* before Linux 6.6 it is SIGSEGV */
		CHECK(!pthread_create(&toucher, NULL, touch_lost, lab.ram.hva + 9 * PAGE + 123), "pthread_create");
		pthread_join(toucher, NULL);
		EQUAL("the address of SIGBUS", ((uintptr_t)bus_address & -PAGE) - (uintptr_t)lab.ram.hva, 9 * PAGE);
	}
	int fd = SYS(memfd_create("output", MFD_CLOEXEC));
	CHECK(write(fd, lab.ram.hva + 9 * PAGE, 8) == -1 && errno == EFAULT, "write(2) from a lost page: %s", strerror(errno));

	/* A discard makes it absent again, and then it can come. */
	OK(kvmfault_pages_discard(lab.m.library, RAM_GPA + 9 * PAGE, PAGE));
	EQUAL("state", kvmfault_pages_state(lab.m.library, RAM_GPA + 9 * PAGE), KVMFAULT_PAGE_ABSENT);
	install(9);
	load_read(v, 9);
	EQUAL("stop", vcpu_run(v), 0);
	check_read(v, 9);
	tear_down();
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
	finished++;
	return NULL;
}

/* A vCPU that waits for a pending page is told that it is lost. */
static void lost_while_pending(void)
{
	set_up(MEMFD, answer_pending, 2, 3);
	for (int i = 0; i < 2; i++) {
		load_read(lab.m.vcpu[i], 3);
		vcpu_start(lab.m.vcpu[i], expect_lost_page_3, NULL);
	}
	UNTIL(calls == 1);
	usleep(50000);
	EQUAL("vCPUs that have gone on", finished, 0);
	OK(kvmfault_pages_lost(lab.m.library, RAM_GPA + 3 * PAGE, PAGE));
	UNTIL(finished == 2);
	for (int i = 0; i < 2; i++)
		vcpu_join(lab.m.vcpu[i]);
	EQUAL("calls", calls, 1);
	tear_down();
}

/* ---- answers that are errors ---- */

static int answer;       /* the next; 0 for what is right */
static bool install_too; /* and before it, what is right */

static int answer_as_told(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	calls++;
	if (!answer || install_too)
		OK(source_install(&lab.source, vm, fault->gpa, fault->len));
	return answer;
}

static int answer_nothing(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	calls++;
	if (!answer)
		OK(source_install(&lab.source, vm, fault->gpa, fault->len));
	return KVMFAULT_RESOLVED;
}

/* The vCPU's loop returns `error`; after that the vCPU runs again, and the same access succeeds. */
static void bad_answer(kvmfault_resolver resolver, int given, int error, const char *words, int cpl)
{
	require_interruptible_sleep();
	if (cpl == 0 && test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD && cpl0_is_emulated())
		skip("a vCPU for which KVM's emulator waits in userfaultfd can't be interrupted, not even by an error");
	set_up(MEMFD, resolver, 1, cpl);
	struct vcpu *v = lab.m.vcpu[0];
	vcpu_attach(v);
	calls = 0;
	answer = given;
	load_read(v, 4);
	REFUSED(kvmfault_vcpu_run(v->handle), error, words);
	CHECK(strstr(kvmfault_last_error(), "0x40004000"), "the message doesn't name the page: %s", kvmfault_last_error());
	CHECK(calls >= 1, "the resolver wasn't called");
	answer = 0;
	EQUAL("stop", vcpu_run(v), 0);
	check_read(v, 4);
	tear_down();
}

static void error_cpl3(void)
{
	bad_answer(answer_as_told, -EIO, EIO, "Input/output error", 3);
}

static void error_cpl0(void)
{
	bad_answer(answer_as_told, -ENETDOWN, ENETDOWN, "Network is down", 0);
}

static void garbage(void)
{
	bad_answer(answer_as_told, 12345, EPROTO, "12345", 3);
	bad_answer(answer_as_told, -1000000, EPROTO, "-1000000", 3);
	bad_answer(answer_as_told, -2147483647 - 1, EPROTO, "-2147483648", 3);
}

static void installs_nothing(void)
{
	bad_answer(answer_nothing, 1, EPROTO, "installed nothing", 3);
}

static void installs_nothing_cpl0(void)
{
	bad_answer(answer_nothing, 1, EPROTO, "installed nothing", 0);
}

/* -EEXIST from a resolver means that somebody else was first: no error, as the page is there. */
static void eexist(void)
{
	answer = -EEXIST;
	install_too = true;
	set_up(MEMFD, answer_as_told, 1, 3);
	struct vcpu *v = lab.m.vcpu[0];
	vcpu_attach(v);
	for (int page = 0; page < PAGES; page++) {
		load_read(v, page);
		EQUAL("stop", vcpu_run(v), 0);
		check_read(v, page);
	}
	EQUAL("calls", calls, PAGES);
	EQUAL("outcome_failed", machine_settled_stats(&lab.m).outcome_failed, 0);
	tear_down();
}

/* But where the page isn't there, it is one. */
static void eexist_wrong(void)
{
	require_interruptible_sleep();
	bad_answer(answer_as_told, -EEXIST, EEXIST, "0x40004000", 3);
}

/* A resolver that installs more than it is asked for. */
static int answer_all(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)fault;
	calls++;
	OK(source_install(&lab.source, vm, RAM_GPA, PAGES * PAGE));
	return KVMFAULT_RESOLVED;
}

static void installs_more(void)
{
	set_up(ANON, answer_all, 1, 3);
	struct vcpu *v = lab.m.vcpu[0];
	vcpu_attach(v);
	for (int page = 0; page < PAGES; page++) {
		load_read(v, page);
		EQUAL("stop", vcpu_run(v), 0);
		check_read(v, page);
	}
	EQUAL("calls", calls, 1);
	tear_down();
}

/* ---- calls from a callback ---- */

static int call_everything(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	uint64_t other = RAM_GPA + 20 * PAGE, third = RAM_GPA + 21 * PAGE;
	struct vcpu *v = lab.m.vcpu[0];
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	struct kvmfault_memslot slot = slot_on(&lab.ram, 2, RAM_GPA);
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vcpu_options vcpu_options = KVMFAULT_VCPU_OPTIONS_INIT;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	struct kvmfault_vm *new_vm = NULL;
	struct kvmfault_vcpu *new_vcpu = NULL;
	CHECK(opaque == &lab && vm == lab.m.library, "the resolver's arguments are not the case's");
	calls++;
	if (page_of(fault) != 2) { /* the host's own accesses below */
		OK(source_install(&lab.source, vm, fault->gpa, fault->len));
		return KVMFAULT_RESOLVED;
	}

	/* What the fault says. */
	EQUAL("fault.size", fault->size, sizeof(*fault));
	EQUAL("fault.len", fault->len, PAGE);
	EQUAL("fault.hva", (uint8_t *)fault->hva - lab.ram.hva, 2 * PAGE);
	EQUAL("fault.slot", fault->slot, RAM_SLOT);
	EQUAL("fault.window_gpa", fault->window_gpa, fault->gpa);
	EQUAL("fault.window_len", fault->window_len, PAGE);
	EQUAL("fault.origin", fault->origin, KVMFAULT_ORIGIN_VCPU);
	EQUAL("fault.vcpu", fault->vcpu, 0);
	EQUAL("state of the page itself", kvmfault_pages_state(vm, fault->gpa), KVMFAULT_PAGE_RESOLVING);

	/* Allowed. */
	OK(kvmfault_pages_zero(vm, other, PAGE));
	OK(source_install(&lab.source, vm, third, PAGE));
	OK(kvmfault_pages_lost(vm, third + PAGE, PAGE));
	EQUAL("pages_map of what isn't in the page cache", kvmfault_pages_map(vm, third + 2 * PAGE, PAGE), -ENOENT);
	UNTIL(kvmfault_pages_absent(vm) == PAGES - 3); /* the guest may be ahead of the books */
	EQUAL("state", kvmfault_pages_state(vm, other), KVMFAULT_PAGE_PRESENT);
	OK(kvmfault_vm_stats(vm, &stats));
	OK(kvmfault_vcpu_stats(v->handle, &stats));
	OK(kvmfault_vcpu_kick(v->handle));
	OK(kvmfault_vm_mechanism(vm));
	OK(kvmfault_memslot_mechanism(vm, RAM_SLOT));
	CHECK(kvmfault_last_error() && kvmfault_version(), "a NULL string");

	/* Not allowed, and without effect. */
	options.kvm_fd = lab.m.kvm;
	options.vm_fd = lab.m.vm;
	options.resolver = call_everything;
	vcpu_options.fd = v->fd;
	slot.len = 0;
	REFUSED(kvmfault_pages_discard(vm, other, PAGE), EDEADLK, "kvmfault_pages_discard");
	REFUSED(kvmfault_pages_resolve(vm, third + 2 * PAGE, PAGE), EDEADLK, "kvmfault_pages_resolve");
	REFUSED(kvmfault_memslot_set(vm, &slot), EDEADLK, "kvmfault_memslot_set");
	REFUSED(kvmfault_memslot_prepare(vm, &slot, &region), EDEADLK, "kvmfault_memslot_prepare");
	REFUSED(kvmfault_memslot_set_fast_only(vm, RAM_SLOT, 0), EDEADLK, "kvmfault_memslot_set_fast_only");
	REFUSED(kvmfault_vm_enable(vm, 0), EDEADLK, "kvmfault_vm_enable");
	REFUSED(kvmfault_vm_new(&options, &new_vm), EDEADLK, "kvmfault_vm_new");
	REFUSED(kvmfault_vcpu_new(vm, &vcpu_options, &new_vcpu), EDEADLK, "kvmfault_vcpu_new");
	REFUSED(kvmfault_vcpu_run(v->handle), EDEADLK, "kvmfault_vcpu_run");
	REFUSED(kvmfault_vcpu_handle_exit(v->handle, 0), EDEADLK, "kvmfault_vcpu_handle_exit");
	REFUSED(kvmfault_vcpu_resume(v->handle), EDEADLK, "kvmfault_vcpu_resume");
	REFUSED(kvmfault_probe(-1, &probe), EDEADLK, "callback");
	REFUSED(kvmfault_explain(-1, NULL, 0), EDEADLK, "callback");
	EQUAL("state", kvmfault_pages_state(vm, other), KVMFAULT_PAGE_PRESENT);

	OK(source_install(&lab.source, vm, fault->gpa, fault->len));
	return KVMFAULT_RESOLVED;
}

static void callbacks(void)
{
	set_up(MEMFD, call_everything, 1, 3);
	struct vcpu *v = lab.m.vcpu[0];
	vcpu_attach(v);
	load_read(v, 2);
	int ret = kvmfault_vcpu_run(v->handle);
	/* The kick from inside. */
	CHECK(ret == KVMFAULT_INTERRUPTED, "%s", vcpu_describe(v, ret));
	EQUAL("stop", vcpu_run(v), 0);
	check_read(v, 2);
	EQUAL("calls", calls, 1);
	/* Outside of callbacks the same thread may call all of it. */
	OK(kvmfault_pages_discard(lab.m.library, RAM_GPA + 20 * PAGE, PAGE));
	OK(kvmfault_pages_resolve(lab.m.library, RAM_GPA + 20 * PAGE, PAGE));
	EQUAL("calls", calls, 2);
	tear_down();
}

/* ---- the end ---- */

static atomic_int finalized;
static atomic_bool let_go, left;

static void finalizer(void *opaque)
{
	CHECK(opaque == &lab, "the finalizer's argument is not the resolver's");
	/* After the last call, and not while it is under way. */
	CHECK(left, "the finalizer ran before the callback returned");
	finalized++;
}

static int answer_when_let_go(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	calls++;
	while (!let_go)
		usleep(1000);
	/* The VM is gone by now: an error, and nothing worse. */
	int ret = source_install(&lab.source, vm, fault->gpa, fault->len);
	CHECK(ret < 0, "installing in a VM that was freed succeeded");
	left = true;
	return ret;
}

static void set_up_with_finalizer(kvmfault_resolver resolver, int vcpus)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolver;
	options.opaque = &lab;
	options.finalizer = finalizer;
	ram_create(&lab.ram, MEMFD, PAGES * PAGE);
	machine_create(&lab.m, PAGE);
	source_create(&lab.source, RAM_GPA, lab.ram.len, PATTERN);
	machine_attach(&lab.m, NULL, &options);
	machine_set_slot(&lab.m, &lab.ram, RAM_SLOT, RAM_GPA);
	lab.steps = machine_share(&lab.m, PAGE, &lab.steps_gpa);
	for (int i = 0; i < vcpus; i++)
		machine_add_vcpu(&lab.m, 3);
}

static void *run_until_shutdown(struct vcpu *v)
{
	int ret;
	vcpu_attach(v);
	while ((ret = kvmfault_vcpu_run(v->handle)) == KVMFAULT_INTERRUPTED)
		;
	CHECK(ret == -ESHUTDOWN, "%s", vcpu_describe(v, ret));
	EQUAL("once more", kvmfault_vcpu_run(v->handle), -ESHUTDOWN);
	finished++;
	return NULL;
}

static void free_vm(void)
{
	double start = now();
	struct kvmfault_vm *vm = lab.m.library;
	lab.m.library = NULL;
	kvmfault_vm_free(vm);
	CHECK(now() - start < 5, "kvmfault_vm_free took %.1f s", now() - start);
	EQUAL("a call on the freed handle", kvmfault_pages_absent(vm), -EBADF);
	kvmfault_vm_free(vm); /* left alone */
}

/* The resolver never returns, as far as anybody can see: the VM can be freed all the same, and nothing waits. */
static void free_during_call(void)
{
	set_up_with_finalizer(answer_when_let_go, 1);
	load_read(lab.m.vcpu[0], 1);
	vcpu_start(lab.m.vcpu[0], run_until_shutdown, NULL);
	UNTIL(calls == 1);
	free_vm();
	usleep(100000);
	EQUAL("finalized while the resolver is still at it", finalized, 0);
	let_go = true;
	UNTIL(finished == 1);
	vcpu_join(lab.m.vcpu[0]);
	vcpu_detach(lab.m.vcpu[0]);
	UNTIL(finalized == 1);
	usleep(50000);
	EQUAL("finalized", finalized, 1);
	EQUAL("calls", calls, 1);
	tear_down();
}

/* vCPUs that wait for a page leave when the VM is freed. */
static void free_while_waiting(void)
{
	enum { N = 4 };
	left = true;
	set_up_with_finalizer(answer_pending, N);
	for (int i = 0; i < N; i++) {
		load_read(lab.m.vcpu[i], i / 2);
		vcpu_start(lab.m.vcpu[i], run_until_shutdown, NULL);
	}
	UNTIL(calls == N / 2);
	usleep(20000);
	free_vm();
	UNTIL(finished == N);
	for (int i = 0; i < N; i++) {
		vcpu_join(lab.m.vcpu[i]);
		vcpu_detach(lab.m.vcpu[i]);
	}
	UNTIL(finalized == 1);
	usleep(50000);
	EQUAL("finalized", finalized, 1);
	tear_down();
}

/* A VM that never ran: its finalizer runs, too; one that couldn't be made leaves `opaque` to the caller. */
static void free_unused(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vm *vm;
	left = true;
	set_up_with_finalizer(answer_pending, 0);
	free_vm();
	UNTIL(finalized == 1);
	options.kvm_fd = lab.m.kvm;
	options.vm_fd = lab.m.vm;
	options.mechanism = 99;
	options.resolver = answer_pending;
	options.opaque = &lab;
	options.finalizer = finalizer;
	REFUSED(kvmfault_vm_new(&options, &vm), EINVAL, "mechanism");
	usleep(20000);
	EQUAL("finalized", finalized, 1);
	tear_down();
}

static const struct test_case cases[] = {
	{ "pending-out-of-order", pending_out_of_order, true },
	{ "pending-shared", pending_shared, true },
	{ "pending-already-there", pending_already_there, true },
	{ "retry", retry_cpl3, true },
	{ "retry-cpl0", retry_cpl0, true },
	{ "retry-ends", retry_ends, true },
	{ "retry-kicked", retry_kicked, true },
	{ "lost", lost_memfd, true },
	{ "lost-anon", lost_anon, true },
	{ "lost-cpl0", lost_cpl0, true },
	{ "lost-while-pending", lost_while_pending, true },
	{ "error", error_cpl3, true },
	{ "error-cpl0", error_cpl0, true },
	{ "garbage", garbage, true },
	{ "installs-nothing", installs_nothing, true },
	{ "installs-nothing-cpl0", installs_nothing_cpl0, true },
	{ "eexist", eexist, true },
	{ "eexist-wrong", eexist_wrong, true },
	{ "installs-more", installs_more, true },
	{ "callbacks", callbacks, true },
	{ "free-during-call", free_during_call, true },
	{ "free-while-waiting", free_while_waiting, true },
	{ "free-unused", free_unused, true },
};
TEST_MAIN(cases)
