/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Requested pages when the VMM starts over (a lost connection): a resolver call that is overtaken,
 * announcements that are withdrawn, and the states of a range in one call.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <semaphore.h>
#include <string.h>

/* ---- calls that the case lets go on ---- */

enum { MOST_CALLS = 8 };
static atomic_int begun, under_way, most_at_once, answer[MOST_CALLS];
static sem_t go_on[MOST_CALLS];
static atomic_int installed;

/* Installs the page before it returns, if the case says so. */
static int held_call(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	int number = begun++, now_in = ++under_way, ret;
	(void)opaque;
	if (now_in > most_at_once)
		most_at_once = now_in;
	CHECK(number < MOST_CALLS, "call %d", number);
	while (sem_wait(&go_on[number]))
		;
	ret = answer[number];
	if (ret == KVMFAULT_RESOLVED) {
		ret = source_install(&resolver_vm.source, vm, fault->gpa, fault->len);
		ret = ret == -EEXIST ? KVMFAULT_RESOLVED : ret;
	}
	under_way--;
	return ret;
}

static void held_set_up(int vcpus)
{
	begun = under_way = most_at_once = installed = 0;
	for (int i = 0; i < MOST_CALLS; i++) {
		answer[i] = KVMFAULT_RESOLVED;
		SYS(sem_init(&go_on[i], 0, 0));
	}
	resolver_vm_set_up(MEMFD, held_call, vcpus, 3);
}

static int state_of(uint64_t page)
{
	return OK(kvmfault_pages_state(resolver_vm.m.library, RAM_GPA + page * PAGE));
}

static void *install_page_5(void *arg)
{
	(void)arg;
	OK(kvmfault_pages_resolve(resolver_vm.m.library, RAM_GPA + 5 * PAGE, PAGE));
	installed++;
	return NULL;
}

/*
 * A vCPU that sleeps in userfaultfd may wake while the page is LOST, before the page is discarded:
 * its run returns a memory error, and the next run repeats the access. A vCPU whose own thread is
 * in the resolver's call can't wake then.
 */
static void *run_despite_loss(struct vcpu *v)
{
	uint32_t value;
	int ret;
	vcpu_attach(v);
	for (;;) {
		struct kvmfault_memory_error_info info = { .size = sizeof(info) };
		ret = kvmfault_vcpu_run(v->handle);
		if (ret == KVMFAULT_INTERRUPTED)
			continue;
		if (ret != KVMFAULT_MEMORY_ERROR || test_mechanism() != KVMFAULT_MECHANISM_USERFAULTFD)
			break;
		OK(kvmfault_vcpu_memory_error(v->handle, &info));
		CHECK(info.lost && info.gpa / PAGE == RAM_GPA / PAGE + 5, "%s", vcpu_describe(v, ret));
	}
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	return NULL;
}

/* How a page becomes absent again while a call for it is under way. */
static void push_and_discard(void)
{
	resolver_vm_install(5);
	OK(kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA + 5 * PAGE, PAGE));
}

static void lose_and_discard(void)
{
	OK(kvmfault_pages_lost(resolver_vm.m.library, RAM_GPA + 5 * PAGE, PAGE));
	OK(kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA + 5 * PAGE, PAGE));
}

static void withdraw(void)
{
	EQUAL("pages withdrawn", OK(kvmfault_pages_withdraw(resolver_vm.m.library, RAM_GPA, RESOLVER_VM_PAGES * PAGE)),
	      1);
}

static void push_discard_push(void)
{
	push_and_discard();
	resolver_vm_install(5);
}

/*
 * During a vCPU's call the page becomes absent, and other threads want it: they wait, there is no
 * second call. The first call answers late; whatever it answers, one of them calls the resolver
 * once more.
 */
static void overtaken(void (*go)(void), int late_answer)
{
	pthread_t others[2];
	held_set_up(1);
	answer[0] = late_answer;
	resolver_vm_load_read(resolver_vm.m.vcpu[0], 5);
	vcpu_start(resolver_vm.m.vcpu[0], go == lose_and_discard ? run_despite_loss : resolver_vm_run_to_stop, NULL);
	UNTIL(begun == 1);
	go();
	go(); /* marked already */
	EQUAL("state while the call is under way", state_of(5), KVMFAULT_PAGE_RESOLVING);
	for (int i = 0; i < 2; i++)
		CHECK(!pthread_create(&others[i], NULL, install_page_5, NULL), "pthread_create");
	struct timespec moment = { .tv_nsec = 20000000 };
	nanosleep(&moment, NULL); /* a second call would have begun */
	EQUAL("calls begun", begun, 1);
	sem_post(&go_on[0]);
	if (late_answer != KVMFAULT_RESOLVED) { /* else this call has installed it */
		UNTIL(begun == 2);
		EQUAL("state while the second call is under way", state_of(5), KVMFAULT_PAGE_RESOLVING);
		EQUAL("calls at once", under_way, 1);
	}
	for (int i = 1; i < MOST_CALLS; i++)
		sem_post(&go_on[i]);
	for (int i = 0; i < 2; i++)
		pthread_join(others[i], NULL);
	vcpu_join(resolver_vm.m.vcpu[0]);
	resolver_vm_check_read(resolver_vm.m.vcpu[0], 5);
	EQUAL("most calls at once for one page", most_at_once, 1);
	EQUAL("calls", begun, late_answer == KVMFAULT_RESOLVED ? 1 : 2);
	EQUAL("outcome_failed", machine_settled_stats(&resolver_vm.m).outcome_failed, 0);
	EQUAL("state", state_of(5), KVMFAULT_PAGE_PRESENT);
	resolver_vm_tear_down();
}

static void overtaken_by_discard(void)
{
	const int answers[] = { -EIO, KVMFAULT_LOST, KVMFAULT_RETRY, KVMFAULT_PENDING, KVMFAULT_RESOLVED };
	for (size_t i = 0; i < sizeof(answers) / sizeof(*answers); i++) {
		overtaken(push_and_discard, answers[i]);
		overtaken(lose_and_discard, answers[i]);
	}
}

static void overtaken_by_withdrawal(void)
{
	const int answers[] = { -EIO, KVMFAULT_LOST, KVMFAULT_RETRY, KVMFAULT_PENDING, KVMFAULT_RESOLVED };
	for (size_t i = 0; i < sizeof(answers) / sizeof(*answers); i++)
		overtaken(withdraw, answers[i]);
}

/*
 * A push installs the page again before the call returns: the page stays present, whatever the call
 * answers.
 */
static void overtaken_and_pushed(void)
{
	held_set_up(1);
	answer[0] = -EIO;
	resolver_vm_load_read(resolver_vm.m.vcpu[0], 5);
	vcpu_start(resolver_vm.m.vcpu[0], resolver_vm_run_to_stop, NULL);
	UNTIL(begun == 1);
	push_discard_push();
	EQUAL("state while the call is under way", state_of(5), KVMFAULT_PAGE_PRESENT);
	sem_post(&go_on[0]);
	vcpu_join(resolver_vm.m.vcpu[0]);
	resolver_vm_check_read(resolver_vm.m.vcpu[0], 5);
	EQUAL("state", state_of(5), KVMFAULT_PAGE_PRESENT);
	EQUAL("calls", begun, 1);
	resolver_vm_tear_down();
}

/* ---- announcements that are withdrawn ---- */

/*
 * vCPUs and a host thread wait for announced pages; the connection dies, and all pages are
 * requested anew.
 */
static void *read_from_the_host(void *arg)
{
	EQUAL("a host thread's word", *(uint64_t *)(resolver_vm.ram.hva + 9 * PAGE),
	      pattern_word(&resolver_vm.source.pattern, 9, 0));
	*(atomic_bool *)arg = true;
	return NULL;
}

static void withdrawn(void)
{
	enum { N = 4 };
	pthread_t host;
	atomic_bool done = false;
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, N, 3);
	resolver_vm_install(20);
	OK(kvmfault_pages_lost(resolver_vm.m.library, RAM_GPA + 21 * PAGE, PAGE));
	for (int i = 0; i < N; i++) {
		resolver_vm_load_read(resolver_vm.m.vcpu[i], i / 2); /* two wait for one page */
		vcpu_start(resolver_vm.m.vcpu[i], resolver_vm_run_to_stop, NULL);
	}
	CHECK(!pthread_create(&host, NULL, read_from_the_host, &done), "pthread_create");
	UNTIL(resolver_vm.calls == 3 && state_of(0) == 1 && state_of(1) == 1 && state_of(9) == 1);
	/* Each withdrawal makes the waiting threads request all of the pages anew. */
	for (unsigned round = 2; round < 5; round++) {
		struct kvmfault_vm *vm = resolver_vm.m.library;
		/*
		 * A call that is under way still makes its page RESOLVING, and is withdrawn, too.
		 */
		EQUAL("pages withdrawn", OK(kvmfault_pages_withdraw(vm, RAM_GPA, RESOLVER_VM_PAGES * PAGE)), 3);
		UNTIL(resolver_vm.calls_for[0] >= round && resolver_vm.calls_for[1] >= round &&
		      resolver_vm.calls_for[9] >= round);
		UNTIL(state_of(0) == 1 && state_of(1) == 1 && state_of(9) == 1);
	}
	EQUAL("state of one that is there", state_of(20), KVMFAULT_PAGE_PRESENT);
	EQUAL("state of a lost one", state_of(21), KVMFAULT_PAGE_LOST);
	EQUAL("state of a page that was not asked for", state_of(22), KVMFAULT_PAGE_ABSENT);
	resolver_vm_install(0);
	resolver_vm_install(1);
	resolver_vm_install(9);
	pthread_join(host, NULL);
	for (int i = 0; i < N; i++) {
		vcpu_join(resolver_vm.m.vcpu[i]);
		resolver_vm_check_read(resolver_vm.m.vcpu[i], i / 2);
	}
	EQUAL("pages withdrawn when none is announced",
	      OK(kvmfault_pages_withdraw(resolver_vm.m.library, RAM_GPA, RESOLVER_VM_PAGES * PAGE)), 0);
	resolver_vm_tear_down();
}

/* A fill, too, requests its announced pages anew. */
static int pending_until_told(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	resolver_vm.calls++;
	if (installed) {
		int ret = source_install(&resolver_vm.source, vm, fault->gpa, fault->len);
		return ret == -EEXIST ? KVMFAULT_RESOLVED : ret;
	}
	return KVMFAULT_PENDING;
}

static void withdrawn_from_fill(void)
{
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	installed = 0;
	resolver_vm_set_up(MEMFD, pending_until_told, 0, 3);
	options.threads = 2;
	options.batch = 1;
	OK(kvmfault_fill_start(resolver_vm.m.library, &options, &fill));
	UNTIL(resolver_vm.calls == RESOLVER_VM_PAGES);
	UNTIL(kvmfault_pages_withdraw(resolver_vm.m.library, RAM_GPA + 63 * PAGE, PAGE) == 1);
	UNTIL(resolver_vm.calls == RESOLVER_VM_PAGES + 1);
	installed = 1;
	UNTIL(kvmfault_pages_withdraw(resolver_vm.m.library, RAM_GPA, RESOLVER_VM_PAGES * PAGE) >= 0 &&
	      kvmfault_pages_absent(resolver_vm.m.library) == 0);
	OK(kvmfault_fill_wait(fill, 10000));
	kvmfault_fill_free(fill);
	resolver_vm_tear_down();
}

/* ---- the states of a range ---- */

static void states_at_a_glance(void)
{
	uint64_t words[2] = { 0, ~0ul };
	struct kvmfault_vm *vm;
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, 1, 3);
	vm = resolver_vm.m.library;
	for (int page = 10; page < 13; page++)
		resolver_vm_install(page);
	resolver_vm_install(63);
	OK(kvmfault_pages_lost(vm, RAM_GPA + 40 * PAGE, PAGE));
	resolver_vm_load_read(resolver_vm.m.vcpu[0], 7);
	vcpu_start(resolver_vm.m.vcpu[0], resolver_vm_run_to_stop, NULL);
	UNTIL(resolver_vm.calls == 1 && state_of(7) == KVMFAULT_PAGE_RESOLVING);
	const uint64_t there = 7ul << 10 | 1ul << 63, lost = 1ul << 40, coming = 1ul << 7;
	const struct {
		uint32_t states;
		uint64_t expected;
	} cases[] = {
		{ KVMFAULT_STATE_PRESENT, there },
		{ KVMFAULT_STATE_LOST, lost },
		{ KVMFAULT_STATE_RESOLVING, coming },
		{ KVMFAULT_STATE_ABSENT, ~(there | lost | coming) },
		{ KVMFAULT_STATE_ABSENT | KVMFAULT_STATE_RESOLVING, ~(there | lost) },
		{ KVMFAULT_STATE_PRESENT | KVMFAULT_STATE_LOST, there | lost },
		{ 15, ~0ul },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		words[0] = 0x5555;
		EQUAL("pages",
		      OK(kvmfault_pages_bitmap(vm, RAM_GPA, RESOLVER_VM_PAGES * PAGE, cases[i].states, words, 8)),
		      __builtin_popcountl(cases[i].expected));
		EQUAL("bitmap", words[0], cases[i].expected);
		EQUAL("what is behind it", words[1], ~0ul);
		/* A part of it, whose first page is bit 0; what is beyond the last is 0. */
		OK(kvmfault_pages_bitmap(vm, RAM_GPA + 5 * PAGE, 50 * PAGE, cases[i].states, words, 16));
		EQUAL("a part's bitmap", words[0], cases[i].expected >> 5 & ((1ul << 50) - 1));
		EQUAL("what is behind it", words[1], ~0ul);
		/* Not aligned. */
		OK(kvmfault_pages_bitmap(vm, RAM_GPA, RESOLVER_VM_PAGES * PAGE, cases[i].states, (char *)words + 3, 8));
		uint64_t word;
		memcpy(&word, (char *)words + 3, 8);
		EQUAL("bitmap at an odd address", word, cases[i].expected);
		words[1] = ~0ul;
	}
	REFUSED(kvmfault_pages_bitmap(vm, RAM_GPA, RESOLVER_VM_PAGES * PAGE, 1, words, 7), EINVAL, "size");
	REFUSED(kvmfault_pages_bitmap(vm, RAM_GPA, RESOLVER_VM_PAGES * PAGE, 1, NULL, 8), EINVAL, "bitmap");
	REFUSED(kvmfault_pages_bitmap(vm, RAM_GPA, RESOLVER_VM_PAGES * PAGE, 1, (void *)8, 8), EFAULT, "bitmap");
	REFUSED(kvmfault_pages_bitmap(vm, RAM_GPA, RESOLVER_VM_PAGES * PAGE, 0, words, 8), EINVAL, "states");
	REFUSED(kvmfault_pages_bitmap(vm, RAM_GPA, RESOLVER_VM_PAGES * PAGE, 16, words, 8), EINVAL, "states");
	REFUSED(kvmfault_pages_bitmap(vm, RAM_GPA, (RESOLVER_VM_PAGES + 1) * PAGE, 1, words, 16), EINVAL, "len");
	REFUSED(kvmfault_pages_bitmap(vm, NOWHERE_GPA, PAGE, 1, words, 8), ENOENT, "gpa");
	resolver_vm_install(7);
	vcpu_join(resolver_vm.m.vcpu[0]);
	resolver_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "overtaken", overtaken_by_discard, true },           { "overtaken-withdrawn", overtaken_by_withdrawal, true },
	{ "overtaken-pushed", overtaken_and_pushed, true },    { "withdrawn", withdrawn, true },
	{ "withdrawn-from-fill", withdrawn_from_fill, false }, { "states", states_at_a_glance, true },
};
TEST_MAIN(cases)
