/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kvmfault_vcpu_kick makes a vCPU's loop return KVMFAULT_INTERRUPTED, once, wherever the vCPU is:
 * no kick is lost, none is invented. Each kick comes at a random moment, and the next one only
 * after it was seen.
 *
 * Seen means within 100 ms, without the time for which a thread had no CPU; or within 5 s on a
 * machine that is declared slow by KVMFAULT_TEST_SCALE (an emulated CPU stands still without
 * knowing).
 *
 * By handler, one thing can add an INTERRUPTED: a kick that is seen before its signal is sent. The
 * library then waits 100 ms for the kicking thread; if that thread has no CPU for longer, the late
 * signal looks like one of the VMM's own.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { KICKS = 100000, PAGES = 256 };

/* What the vCPU is doing when it is kicked. */
enum what { RUNNING, WAITING, FAULTING };

static struct machine m;
static struct ram ram;
static struct source source;
static enum what what;
static bool by_handler;
static uint64_t list_gpa, steps_gpa;

static atomic_ulong interrupted; /* KVMFAULT_INTERRUPTED so far */
static atomic_ulong seen;        /* kicks among them */
static _Atomic double seen_at;   /* when the last of them came */
static atomic_int tid;
static atomic_bool stop;
static atomic_ulong sweeps; /* FAULTING: how often all pages were installed */

static int pending(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm, (void)fault;
	return KVMFAULT_PENDING;
}

/*
 * For how many seconds a thread was ready to run and had no CPU: the machine's fault, not the
 * library's.
 */
static double starved(int fd)
{
	char text[128] = "";
	unsigned long long ran, waited = 0;
	if (fd < 0 || pread(fd, text, sizeof(text) - 1, 0) <= 0 || sscanf(text, "%llu %llu", &ran, &waited) != 2)
		return 0;
	return waited * 1e-9;
}

static int open_schedstat(int thread)
{
	char path[64];
	snprintf(path, sizeof(path), "/proc/self/task/%d/schedstat", thread);
	return open(path, O_RDONLY | O_CLOEXEC);
}

static void load(struct vcpu *v)
{
	if (what == FAULTING)
		vcpu_load_verify(v, RAM_GPA, list_gpa, PAGES, &source.pattern, READ_FIRST);
	else
		vcpu_load_script(v, steps_gpa);
}

static void *vcpu_main(struct vcpu *v)
{
	uint32_t value;
	if (by_handler)
		vcpu_attach_by_handler(v, 0);
	else
		vcpu_attach(v);
	load(v);
	tid = (int)syscall(SYS_gettid);
	for (;;) {
		int ret = kvmfault_vcpu_run(v->handle);
		if (ret == KVMFAULT_INTERRUPTED) {
			struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
			interrupted++;
			OK(kvmfault_vcpu_stats(v->handle, &stats));
			if (stats.kicks != seen) {
				/* as soon as `seen` says so, the next kick may come */
				bool last = stop;
				seen_at = now();
				seen = stats.kicks;
				if (last)
					return NULL;
			}
			continue;
		}
		CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value) && value == 0 && what == FAULTING, "%s",
		      vcpu_describe(v, ret));
		sweeps++;
		OK(kvmfault_pages_discard(m.library, RAM_GPA, ram.len));
		load(v);
	}
}

/* A random time: mostly as long as an exit takes, sometimes as long as a fault takes. */
static void pass_time(uint64_t *seed)
{
	uint64_t n = random_number(seed);
	double until = now() + (n % 8 ? n / 8 % 20 : n / 8 % 200) * 1e-6;
	if (n % 3)
		while (now() < until)
			;
}

static unsigned long delayed; /* kicks after which an INTERRUPTED more is allowed */

static void kick(struct vcpu *v)
{
	double began = now();
	EQUAL("kvmfault_vcpu_kick", kvmfault_vcpu_kick(v->handle), 0);
	delayed += by_handler && now() - began > 0.05;
}

static void check_interrupted(unsigned long count)
{
	unsigned long times = interrupted;
	CHECK(times >= count && times <= count + delayed, "INTERRUPTED %lu times for %lu kicks, %lu of them delayed",
	      times, count, delayed);
}

static void kicks(enum what w, bool handler, unsigned long count)
{
	if (w != RUNNING)
		require_interruptible_sleep();
	uint64_t seed = 99;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	what = w;
	by_handler = handler;
	machine_create(&m, 4 * PAGE);
	ram_create(&ram, MEMFD, PAGES * PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	if (what == WAITING)
		options.resolver = pending;
	machine_attach(&m, &source, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	list_shuffle(machine_share(&m, PAGES * sizeof(uint32_t), &list_gpa), PAGES, 1);
	struct step *steps = machine_share(&m, PAGE, &steps_gpa);
	steps[0] = (struct step){ what == WAITING ? READ64 : JUMP, what == WAITING ? RAM_GPA : steps_gpa, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 1, 0 };
	struct vcpu *v = machine_add_vcpu(&m, 3);
	vcpu_start(v, vcpu_main, NULL);
	while (!tid)
		usleep(1000);

	int vcpu_stat = open_schedstat(tid), own_stat = open_schedstat((int)syscall(SYS_gettid));
	double slowest = 0, in_time = getenv("KVMFAULT_TEST_SCALE") ? 5 : 0.1;
	for (unsigned long n = 0; n < count; n++) {
		pass_time(&seed);
		unsigned long before = seen;
		EQUAL("kicks seen before a kick", before, n);
		check_interrupted(n);
		if (n == count - 1 && what == FAULTING)
			/* a few kicks are over before a slow machine has installed all pages */
			UNTIL(sweeps > 0);
		stop = n == count - 1;
		double waited = starved(vcpu_stat) + starved(own_stat);
		double sent = now();
		kick(v);
		while (seen == before) {
			CHECK(now() - sent < 10, "kick %lu of %lu was lost: nothing for 10 s", n, count);
			sched_yield();
		}
		double took = seen_at - sent;
		if (took > in_time) {
			double idle = starved(vcpu_stat) + starved(own_stat) - waited;
			CHECK(took - idle < in_time,
			      "kick %lu of %lu was seen after %.0f ms (of which %.0f without a CPU)", n, count,
			      took * 1e3, idle * 1e3);
		}
		slowest = took > slowest ? took : slowest;
	}
	vcpu_join(v);
	EQUAL("kicks seen in all", seen, count);
	check_interrupted(count);
	struct kvmfault_stats stats = machine_stats(&m);
	note("%lu kicks, INTERRUPTED %lu times, the slowest seen after %.1f ms; %lu faults, %lu of them left, %lu "
	     "sweeps",
	     count, interrupted, slowest * 1e3, stats.faults_vcpu, stats.outcome_interrupted, sweeps);
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
}

static void running(void)
{
	kicks(RUNNING, false, scaled(KICKS * 2 / 10));
}

static void waiting(void)
{
	kicks(WAITING, false, scaled(KICKS * 4 / 10));
}

static void faulting(void)
{
	kicks(FAULTING, false, scaled(KICKS * 4 / 10));
}

static void running_by_handler(void)
{
	kicks(RUNNING, true, scaled(KICKS * 2 / 10));
}

static void waiting_by_handler(void)
{
	kicks(WAITING, true, scaled(KICKS * 4 / 10));
}

static void faulting_by_handler(void)
{
	kicks(FAULTING, true, scaled(KICKS * 4 / 10));
}

static const struct test_case cases[] = {
	{ "running", running, true },
	{ "waiting", waiting, true },
	{ "faulting", faulting, true },
	{ "running-by-handler", running_by_handler, true },
	{ "waiting-by-handler", waiting_by_handler, true },
	{ "faulting-by-handler", faulting_by_handler, true },
};
TEST_MAIN(cases)
