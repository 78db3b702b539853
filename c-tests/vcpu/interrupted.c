/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KVMFAULT_INTERRUPTED is returned only for a kick (or a signal of the VMM's own), never more often
 * than there were kicks, and the guest goes on after each. SIGBUS by mask and by handler, the
 * library's loop and the VMM's own.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static bool by_handler;
static enum { RUN, OWN, OWN_RESUMES } loop;
static struct vcpu *the;
static atomic_bool started, stop;

static void attach(struct vcpu *v)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	uint32_t flags = loop == OWN_RESUMES ? KVMFAULT_VCPU_RESUMES : 0;
	the = v;
	if (by_handler) {
		vcpu_attach_by_handler(v, flags);
		return;
	}
	options.fd = v->fd;
	options.run = v->run;
	options.flags = flags;
	OK(kvmfault_vcpu_new(v->machine->library, &options, &v->handle));
}

static int run(struct vcpu *v)
{
	int ret;
	if (loop == RUN)
		return kvmfault_vcpu_run(v->handle);
	do {
		ret = loop == OWN_RESUMES ? kvmfault_vcpu_resume(v->handle) : KVMFAULT_HANDLED;
		if (ret == KVMFAULT_HANDLED)
			ret = kvmfault_vcpu_handle_exit(v->handle, ioctl(v->fd, KVM_RUN, 0));
	} while (ret == KVMFAULT_HANDLED);
	return ret;
}

static void each(void (*test)(void))
{
	for (int i = 0; i < 6; i++) {
		by_handler = i % 2;
		loop = i / 2;
		started = stop = false;
		test();
	}
}

/* ---- kicks ---- */

enum { KICKERS = 3, EACH = 4 };

static atomic_ulong surplus, interrupted, seen;
static atomic_uint go, done;

static void *count_interrupted(struct vcpu *v)
{
	attach(v);
	vcpu_load_script(v, resolver_vm.steps_gpa);
	started = true;
	while (!stop) {
		struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
		int ret = run(v);
		CHECK(ret == KVMFAULT_INTERRUPTED, "%s", vcpu_describe(v, ret));
		OK(kvmfault_vcpu_stats(v->handle, &stats));
		surplus += stats.kicks == seen;
		interrupted++;
		seen = stats.kicks;
	}
	vcpu_detach(v);
	return NULL;
}

static void *kick_in_bursts(void *unused)
{
	for (unsigned n = 0; !stop; done++) {
		while (go == n && !stop)
			sched_yield();
		n = go;
		for (int i = 0; i < EACH && !stop; i++)
			OK(kvmfault_vcpu_kick(the->handle));
	}
	return unused;
}

static void burst(void)
{
	pthread_t kicker[KICKERS];
	unsigned long bursts = SCALED(800, 50);
	surplus = interrupted = seen = go = done = 0;
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, 1, 3);
	/* Counts forever. */
	uint64_t *counter = (uint64_t *)(resolver_vm.steps + 64);
	resolver_vm.steps[0] = (struct step){ ADD64, resolver_vm.steps_gpa + 64 * sizeof(struct step), 1, 0 };
	resolver_vm.steps[1] = (struct step){ JUMP, resolver_vm.steps_gpa, 0, 0 };
	vcpu_start(resolver_vm.m.vcpu[0], count_interrupted, NULL);
	UNTIL(started);
	for (int i = 0; i < KICKERS; i++)
		CHECK(!pthread_create(&kicker[i], NULL, kick_in_bursts, NULL), "pthread_create");
	for (unsigned long n = 1; n <= bursts; n++) {
		done = 0;
		go++;
		while (done < KICKERS)
			sched_yield();
		double end = now() + 10;
		for (uint64_t before = __atomic_load_n(counter, __ATOMIC_RELAXED);
		     seen != n * KICKERS * EACH || __atomic_load_n(counter, __ATOMIC_RELAXED) == before; sched_yield())
			CHECK(now() < end,
			      "burst %lu: the guest stands still; %lu of %lu kicks seen, INTERRUPTED %lu times, %lu "
			      "without a kick",
			      n, (unsigned long)seen, n * KICKERS * EACH, (unsigned long)interrupted,
			      (unsigned long)surplus);
	}
	EQUAL("INTERRUPTED without a kick", surplus, 0);
	CHECK(interrupted <= bursts * KICKERS * EACH, "INTERRUPTED %lu times for %lu kicks", (unsigned long)interrupted,
	      bursts * KICKERS * EACH);
	stop = true;
	OK(kvmfault_vcpu_kick(the->handle));
	vcpu_join(the);
	for (int i = 0; i < KICKERS; i++)
		pthread_join(kicker[i], NULL);
	note("%s, loop %d: INTERRUPTED %lu times for %lu kicks", by_handler ? "by handler" : "by mask", loop,
	     (unsigned long)interrupted, (unsigned long)seen);
	resolver_vm_tear_down();
}

static void bursts(void)
{
	each(burst);
}

/* ---- news ---- */

static atomic_int failures;

static int fail_once(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	return failures++ ? source_install(&resolver_vm.source, vm, fault->gpa, fault->len) : -EIO;
}

/* A resolver's failure is reported once, also by a reader thread, and the next page comes. */
static void fail_and_go_on(void)
{
	uint32_t value;
	failures = 0;
	require_interruptible_sleep();
	resolver_vm_set_up(MEMFD, fail_once, 1, 3);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	attach(v);
	resolver_vm_load_read(v, 5);
	int ret = run(v);
	EQUAL("the failure", ret, -EIO);
	for (int page = 5; page < 12; page++) {
		ret = run(v);
		CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
		resolver_vm_check_read(v, page);
		EQUAL("immediate_exit", v->run->immediate_exit, 0);
		resolver_vm_load_read(v, page + 1);
	}
	vcpu_detach(v);
	resolver_vm_tear_down();
}

static void news(void)
{
	each(fail_and_go_on);
}

static atomic_int asked, leave;

/* The first call fails after the page has come by another way. */
static int fail_late(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	if (asked++)
		return source_install(&resolver_vm.source, vm, fault->gpa, fault->len);
	UNTIL(leave == 1);
	leave = 2;
	return -EIO;
}

static void *leave_and_come_back(struct vcpu *v)
{
	uint32_t value;
	attach(v);
	resolver_vm_load_read(v, 5);
	started = true;
	int ret = run(v);
	CHECK(ret == KVMFAULT_INTERRUPTED, "%s", vcpu_describe(v, ret));
	resolver_vm_install(5);
	leave = 1;
	UNTIL(leave == 2);
	usleep(20000); /* the reader is told; nothing shows when */
	while (!stop) {
		ret = run(v);
		CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
		resolver_vm_check_read(v, 5);
		resolver_vm_load_read(v, 5);
		stop = true;
	}
	vcpu_detach(v);
	return NULL;
}

/*
 * What becomes of a fault that the vCPU has left is no news, with a loop of the VMM's own either.
 */
static void late_failure(void)
{
	asked = leave = 0;
	require_interruptible_sleep();
	if (test_mechanism() != KVMFAULT_MECHANISM_USERFAULTFD)
		skip("the resolver is called on the vCPU's thread, which can't leave it");
	resolver_vm_set_up(MEMFD, fail_late, 1, 3);
	vcpu_start(resolver_vm.m.vcpu[0], leave_and_come_back, NULL);
	UNTIL(asked == 1);
	usleep(20000); /* the vCPU sleeps */
	OK(kvmfault_vcpu_kick(the->handle));
	vcpu_join(the);
	resolver_vm_tear_down();
}

static void old_news(void)
{
	each(late_failure);
}

/* ---- a VMM's own way ---- */

/*
 * A VMM that sets and clears immediate_exit itself is heard, and what it sets is its to take back.
 */
static void set_immediate_exit(void)
{
	uint32_t value;
	resolver_vm_set_up(MEMFD, fail_once, 1, 3);
	failures = 1;
	struct vcpu *v = resolver_vm.m.vcpu[0];
	attach(v);
	resolver_vm_load_read(v, 5);
	v->run->immediate_exit = 1;
	for (int i = 0; i < 3; i++) {
		int ret = run(v);
		CHECK(ret == KVMFAULT_INTERRUPTED, "%s", vcpu_describe(v, ret));
		OK(kvmfault_vcpu_kick(v->handle));
	}
	EQUAL("immediate_exit", v->run->immediate_exit & 1, 1);
	v->run->immediate_exit = 0;
	/* without _resume nothing looks between here and KVM_RUN */
	if (loop != OWN || !by_handler) {
		int ret = run(v);
		CHECK(ret == KVMFAULT_INTERRUPTED, "the last kick is lost: %s", vcpu_describe(v, ret));
	} else {
		v->run->immediate_exit = 0;
	}
	int ret = run(v);
	while (loop == OWN && by_handler && ret == KVMFAULT_INTERRUPTED)
		ret = run(v);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	resolver_vm_check_read(v, 5);
	vcpu_detach(v);
	resolver_vm_tear_down();
}

static void immediate_exit(void)
{
	each(set_immediate_exit);
}

/* ---- nudges ---- */

#define OTHER_GPA 0x90000000ul
enum { OTHER_SLOT = 2, COUNTER_STEP = 64, ASLEEP_AT = 5 };

static atomic_int awake;

static void *read_one_page(struct vcpu *v)
{
	uint32_t value;
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	attach(v);
	resolver_vm_load_read(v, ASLEEP_AT);
	int ret = run(v);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	resolver_vm_check_read(v, ASLEEP_AT);
	OK(kvmfault_vcpu_stats(v->handle, &stats));
	EQUAL("kicks of the vCPU that sleeps", stats.kicks, 0);
	awake++;
	vcpu_detach(v);
	return NULL;
}

static void *count_until_kicked(struct vcpu *v)
{
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	attach(v);
	vcpu_load_script(v, resolver_vm.steps_gpa + COUNTER_STEP * sizeof(struct step));
	started = true;
	int ret = run(v);
	CHECK(ret == KVMFAULT_INTERRUPTED && stop, "%s, and there was no kick", vcpu_describe(v, ret));
	OK(kvmfault_vcpu_stats(v->handle, &stats));
	EQUAL("kicks of the vCPU that counts", stats.kicks, 1);
	vcpu_detach(v);
	return NULL;
}

/*
 * A vCPU sleeps in the kernel, inside KVM_RUN, for a page that does not come. KVM waits for the
 * vCPU when a slot is set; the library makes it leave KVM_RUN for a moment, unseen by the guest and
 * the VMM.
 */
static void set_while_a_vcpu_sleeps(void)
{
	struct ram other;
	require_interruptible_sleep_in_slow_slots();
	awake = 0;
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, 2, 3);
	resolver_vm.calls = 0;
	OK(kvmfault_memslot_set_fast_only(resolver_vm.m.library, RAM_SLOT, 0));
	/* Counts forever. */
	uint64_t *counter = (uint64_t *)(resolver_vm.steps + COUNTER_STEP + 2);
	uint64_t counter_gpa = resolver_vm.steps_gpa + (COUNTER_STEP + 2) * sizeof(struct step);
	resolver_vm.steps[COUNTER_STEP] = (struct step){ ADD64, counter_gpa, 1, 0 };
	resolver_vm.steps[COUNTER_STEP + 1] =
		(struct step){ JUMP, resolver_vm.steps_gpa + COUNTER_STEP * sizeof(struct step), 0, 0 };
	vcpu_start(resolver_vm.m.vcpu[1], count_until_kicked, NULL);
	UNTIL(started && __atomic_load_n(counter, __ATOMIC_RELAXED) > 0);
	struct vcpu *counting = the;
	vcpu_start(resolver_vm.m.vcpu[0], read_one_page, NULL);
	UNTIL(resolver_vm.calls == 1);

	ram_create(&other, MEMFD, 4 * PAGE);
	for (int i = 0; i < 5; i++) {
		struct kvmfault_memslot gone = KVMFAULT_MEMSLOT_INIT;
		gone.slot = OTHER_SLOT;
		machine_set_slot(&resolver_vm.m, &other, OTHER_SLOT, OTHER_GPA);
		machine_set_slot(&resolver_vm.m, &other, OTHER_SLOT, 2 * OTHER_GPA); /* moved */
		OK(kvmfault_memslot_set(resolver_vm.m.library, &gone));
		OK(kvmfault_memslot_set_fast_only(resolver_vm.m.library, RAM_SLOT, 1));
		OK(kvmfault_memslot_set_fast_only(resolver_vm.m.library, RAM_SLOT, 0));
	}
	uint64_t before = __atomic_load_n(counter, __ATOMIC_RELAXED);
	UNTIL(__atomic_load_n(counter, __ATOMIC_RELAXED) > before);
	EQUAL("vCPUs that have the page", awake, 0);
	resolver_vm_install(ASLEEP_AT);
	vcpu_join(resolver_vm.m.vcpu[0]);
	stop = true;
	OK(kvmfault_vcpu_kick(counting->handle));
	vcpu_join(counting);
	ram_destroy(&other);
	resolver_vm_tear_down();
}

static void nudges(void)
{
	each(set_while_a_vcpu_sleeps);
}

static const struct test_case cases[] = {
	{ "bursts", bursts, true },     { "news", news, true },
	{ "old-news", old_news, true }, { "immediate-exit", immediate_exit, true },
	{ "nudges", nudges, true },
};
TEST_MAIN(cases)
