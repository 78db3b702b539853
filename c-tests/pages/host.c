/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The VMM itself touches absent shared memory: its threads load and store, its system calls read
 * and write, while vCPUs run. All of them get the right bytes, and each page is still fetched once.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <signal.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGES = 4096, VCPUS = 2, THREADS = 2 };

static struct machine m;
static struct ram ram;
static struct source source;
static uint64_t list_gpa;
static uint32_t *list;

static void set_up(uint64_t pages, struct kvmfault_vm_options *options)
{
	ram_create(&ram, MEMFD, pages * PAGE);
	machine_create(&m, pages * sizeof(uint32_t));
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	machine_attach(&m, &source, options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	list = machine_share(&m, pages * sizeof(*list), &list_gpa);
}

static void tear_down(void)
{
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
}

static void *verify(struct vcpu *v)
{
	vcpu_attach(v);
	vcpu_verify(v);
	return NULL;
}

static void check_each_page_once(uint64_t pages)
{
	struct kvmfault_stats stats = machine_settled_stats(&m);
	EQUAL("resolver calls", stats.resolver_calls, pages);
	for (uint64_t page = 0; page < pages; page++)
		EQUAL("calls for a page", source.calls[page], 1);
	EQUAL("outcome_failed", stats.outcome_failed, 0);
}

/* ---- loads and stores ---- */

static void *load_all(void *arg)
{
	uint64_t start = (uintptr_t)arg * PAGES / THREADS;
	for (uint64_t i = 0; i < PAGES; i++) {
		uint64_t page = (start + i * 7) % PAGES;
		pattern_check(&source.pattern, ram.hva + page * PAGE, page, 1);
	}
	return NULL;
}

/*
 * vCPUs verify all of the memory while host threads, numbered from 0, run `thread` on it. `first`
 * runs before, on page 0.
 */
static void verify_beside(void *(*host_thread)(void *), void (*first)(void))
{
	pthread_t threads[THREADS];
	set_up(PAGES, NULL);
	first();
	list_shuffle(list, PAGES, 3);
	for (int i = 0; i < VCPUS; i++) {
		struct vcpu *v = machine_add_vcpu(&m, i % 2 ? 0 : 3);
		vcpu_load_verify(v, RAM_GPA, list_gpa, PAGES, &source.pattern, READ_FIRST);
		vcpu_start(v, verify, NULL);
	}
	UNTIL(source.vcpu > 0);
	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&threads[i], NULL, host_thread, (void *)i), "pthread_create");
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(m.vcpu[i]);
	check_each_page_once(PAGES);
}

static void load_first(void)
{
	pattern_check(&source.pattern, ram.hva, 0, 1);
}

/* Several host threads use the same memory, in different orders. */
static void loads(void)
{
	verify_beside(load_all, load_first);
	printf("%lu calls for vCPUs, %lu for the host\n", source.vcpu, source.host);
	CHECK(source.host > 0 && source.vcpu > 0, "the host or the vCPUs never came first");
	tear_down();
}

static void *store_odd(void *arg)
{
	(void)arg;
	for (uint64_t page = 1; page < PAGES; page += 2) {
		volatile uint64_t *words = (uint64_t *)(ram.hva + page * PAGE);
		unsigned word = page * 37 % 512;
		words[word] = ~page; /* the first access to the page is this store */
		words[(word + 1) % 512] = page;
	}
	return NULL;
}

/*
 * Host threads write to pages that they never read; what they don't write is the snapshot's. vCPUs
 * have the other pages.
 */
static void stores(void)
{
	pthread_t thread;
	set_up(PAGES, NULL);
	for (uint32_t i = 0; i < PAGES / 2; i++)
		list[i] = 2 * i;
	for (int i = 0; i < VCPUS; i++) {
		struct vcpu *v = machine_add_vcpu(&m, i % 2 ? 0 : 3);
		vcpu_load_verify(v, RAM_GPA, list_gpa, PAGES / 2, &source.pattern, READ_FIRST);
		vcpu_start(v, verify, NULL);
	}
	CHECK(!pthread_create(&thread, NULL, store_odd, NULL), "pthread_create");
	pthread_join(thread, NULL);
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(m.vcpu[i]);
	check_each_page_once(PAGES);
	for (uint64_t page = 1; page < PAGES; page += 2) {
		const uint64_t *words = (uint64_t *)(ram.hva + page * PAGE);
		unsigned stored = page * 37 % 512;
		for (unsigned w = 0; w < 512; w++)
			EQUAL("a word of a page that the host wrote to", words[w],
			      w == stored               ? ~page
			      : w == (stored + 1) % 512 ? page
							: pattern_word(&source.pattern, page, w));
	}
	tear_down();
}

/* What the host stores into an absent page, the guest sees, and the other way round. */
static void shared_view(void)
{
	uint64_t steps_gpa;
	set_up(8, NULL);
	struct step *steps = machine_share(&m, PAGE, &steps_gpa);
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		struct vcpu *v = machine_add_vcpu(&m, cpl);
		uint64_t page = cpl ? 0 : 4;
		volatile uint64_t *words = (uint64_t *)(ram.hva + page * PAGE);
		words[0] = 4711;
		steps[0] = (struct step){ READ64, RAM_GPA + page * PAGE, 0, 0 };
		steps[1] = (struct step){ WRITE64, RAM_GPA + page * PAGE + 8, 815, 0 };
		steps[2] = (struct step){ WRITE64, RAM_GPA + (page + 1) * PAGE, 42, 0 };
		steps[3] = (struct step){ STOP, 0, 0, 0 };
		vcpu_load_script(v, steps_gpa);
		vcpu_attach(v);
		EQUAL("stop", vcpu_run(v), 0);
		EQUAL("what the guest read", steps[0].value, 4711);
		EQUAL("what the host reads in a page of its own", words[1], 815);
		EQUAL("what the host reads in a page of the guest's", words[512], 42);
		EQUAL("beside it", words[513], pattern_word(&source.pattern, page + 1, 1));
		vcpu_detach(v);
	}
	tear_down();
}

/* ---- system calls ---- */

static void system_calls(void)
{
	uint8_t bytes[3 * PAGE], before[3 * PAGE];
	int in = SYS(memfd_create("input", MFD_CLOEXEC)), out = SYS(memfd_create("output", MFD_CLOEXEC));
	set_up(512, NULL);
	/* A vCPU at the same time, on the same pages. */
	list_sequential(list, 256);
	struct vcpu *v = machine_add_vcpu(&m, 3);
	vcpu_load_verify(v, RAM_GPA, list_gpa, 256, &source.pattern, READ_FIRST);
	vcpu_start(v, verify, NULL);

	/* write(2) takes its bytes from absent memory: all of the first half, 5 bytes off pages. */
	for (uint64_t at = 5; at + 2 * PAGE < 256 * PAGE; at += 2 * PAGE) {
		EQUAL("pwrite from absent memory", pwrite(out, ram.hva + at, 2 * PAGE, at), 2 * PAGE);
		EQUAL("pread", pread(out, bytes, 2 * PAGE, at), 2 * PAGE);
		for (uint64_t i = 0; i < 2 * PAGE; i++) {
			uint64_t word = pattern_word(&source.pattern, (at + i) / PAGE, (at + i) % PAGE / 8);
			CHECK(bytes[i] == (uint8_t)(word >> (at + i) % 8 * 8), "byte %lu of the output is %#x", at + i,
			      bytes[i]);
		}
	}
	/*
	 * read(2) puts bytes into absent memory, from the middle of a page to the middle of the
	 * next but one.
	 */
	for (unsigned i = 0; i < sizeof(bytes); i++)
		bytes[i] = (uint8_t)(i * 31 + 7);
	EQUAL("pwrite", pwrite(in, bytes, 2 * PAGE, 0), 2 * PAGE);
	for (uint64_t page = 256; page + 3 <= 512; page += 4) {
		EQUAL("pread into absent memory", pread(in, ram.hva + page * PAGE + 100, 2 * PAGE, 0), 2 * PAGE);
		for (unsigned i = 0; i < 3; i++)
			pattern_fill(&source.pattern, page + i, before + i * PAGE);
		memcpy(before + 100, bytes, 2 * PAGE);
		CHECK(!memcmp(ram.hva + page * PAGE, before, 3 * PAGE), "read(2) into page %lu left other bytes there",
		      page);
		/* A thread that waited may be ahead of the counters. */
		UNTIL(kvmfault_pages_state(m.library, RAM_GPA + page * PAGE) == KVMFAULT_PAGE_PRESENT);
	}
	vcpu_join(v);
	struct kvmfault_stats stats = machine_settled_stats(&m);
	EQUAL("resolver calls", stats.resolver_calls, 256 + 64 * 3);
	CHECK(stats.faults_host >= 64 * 3, "only %lu host faults", stats.faults_host);
	tear_down();
}

/* ---- kvmfault_pages_resolve ---- */

static void *resolve_all(void *arg)
{
	(void)arg;
	for (uint64_t page = 0; page < PAGES; page += 64)
		OK(kvmfault_pages_resolve(m.library, RAM_GPA + page * PAGE, 64 * PAGE));
	EQUAL("absent after kvmfault_pages_resolve", kvmfault_pages_absent(m.library), 0);
	return NULL;
}

static void resolve_first(void)
{
	OK(kvmfault_pages_resolve(m.library, RAM_GPA, PAGE));
}

/* kvmfault_pages_resolve for pages on which vCPUs fault. */
static void prefetch(void)
{
	verify_beside(resolve_all, resolve_first);
	CHECK(source.prefetch > 0, "nothing was prefetched");
	pattern_check(&source.pattern, ram.hva, 0, PAGES);
	tear_down();
}

/* ---- LOST ---- */

static int pending(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm, (void)fault;
	source.total++;
	EQUAL("origin", fault->origin, KVMFAULT_ORIGIN_HOST);
	return KVMFAULT_PENDING;
}

static sigjmp_buf back;
static atomic_int got_bus, got_efault;

static void on_bus(int signal)
{
	(void)signal;
	siglongjmp(back, 1);
}

static void *wait_by_load(void *page)
{
	struct sigaction action = { .sa_handler = on_bus };
	SYS(sigaction(SIGBUS, &action, NULL));
	SYS(sigaction(SIGSEGV, &action, NULL)); /* before Linux 6.6 */
	if (sigsetjmp(back, 1) == 0)
		FAIL("the host read %#x from a lost page", *(volatile uint8_t *)page);
	got_bus++;
	return NULL;
}

static void *wait_by_call(void *page)
{
	int fd = SYS(memfd_create("output", MFD_CLOEXEC));
	CHECK(write(fd, page, 16) == -1 && errno == EFAULT, "write(2) from a lost page didn't fail with EFAULT");
	got_efault++;
	return NULL;
}

/*
 * A thread and a system call that wait for pages which are then given up; the memory beside is
 * unharmed.
 */
static void lost(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	pthread_t loader, caller;
	options.resolver = pending;
	set_up(8, &options);
	CHECK(!pthread_create(&loader, NULL, wait_by_load, ram.hva + 2 * PAGE + 5), "pthread_create");
	CHECK(!pthread_create(&caller, NULL, wait_by_call, ram.hva + 4 * PAGE + 5), "pthread_create");
	UNTIL(source.total == 2);
	usleep(20000);
	EQUAL("threads that went on before", got_bus + got_efault, 0);
	OK(kvmfault_pages_lost(m.library, RAM_GPA + 2 * PAGE, 3 * PAGE));
	UNTIL(got_bus == 1 && got_efault == 1);
	pthread_join(loader, NULL);
	pthread_join(caller, NULL);
	OK(source_install(&source, m.library, RAM_GPA + PAGE, PAGE));
	OK(source_install(&source, m.library, RAM_GPA + 5 * PAGE, PAGE));
	pattern_check(&source.pattern, ram.hva + PAGE, 1, 1);
	pattern_check(&source.pattern, ram.hva + 5 * PAGE, 5, 1);
	/* Absent again, and then the host gets them as if nothing had been. */
	OK(kvmfault_pages_discard(m.library, RAM_GPA + 2 * PAGE, 3 * PAGE));
	for (int page = 2; page < 5; page++)
		OK(source_install(&source, m.library, RAM_GPA + page * PAGE, PAGE));
	pattern_check(&source.pattern, ram.hva + 2 * PAGE, 2, 3);
	tear_down();
}

/* ---- a resolver that fails ---- */

static int fails_at_first(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	if (++source.total < 4)
		return -EIO;
	OK(source_install(&source, vm, fault->gpa, fault->len));
	return KVMFAULT_RESOLVED;
}

/* A host thread can get no error: it waits on, and the resolver is called again. */
static void failing(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = fails_at_first;
	set_up(8, &options);
	pattern_check(&source.pattern, ram.hva + 3 * PAGE, 3, 1);
	EQUAL("resolver calls", source.total, 4);
	tear_down();
}

static const struct test_case cases[] = {
	{ "loads", loads, true },
	{ "stores", stores, true },
	{ "shared-view", shared_view, true },
	{ "system-calls", system_calls, true },
	{ "prefetch", prefetch, true },
	{ "lost", lost, true },
	{ "failing", failing, true },
};
TEST_MAIN(cases)
