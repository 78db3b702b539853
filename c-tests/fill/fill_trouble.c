/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Background fill in trouble: stopped, freed, with resolvers that fail; what its callbacks report,
 * and what the VMM may call from them.
 */
#define _GNU_SOURCE
#include "fill_vm.h"

#include <errno.h>
#include <sched.h>
#include <string.h>

/* ---- trouble ---- */

/* Stopped half-way and started again, several times: nothing is lost, and nothing comes twice. */
static void stopped(void)
{
	struct fill_vm t;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	fill_vm_create(&t, MEMFD, PAGES * PAGE);
	t.us = 20000;
	options.batch = 8;
	for (int round = 0; round < 4; round++) {
		int64_t before = kvmfault_pages_absent(t.s.m.library);
		struct kvmfault_fill *fill = fill_vm_start(&t, &options);
		REFUSED(kvmfault_fill_wait(fill, 1), ETIMEDOUT, "absent");
		UNTIL(kvmfault_pages_absent(t.s.m.library) < before);
		OK(kvmfault_fill_stop(fill));
		REFUSED(kvmfault_fill_wait(fill, -1), ECANCELED, "stopped");
		if (round % 2 == 0)
			OK(kvmfault_fill_stop(fill));
		kvmfault_fill_free(fill);
		REFUSED(kvmfault_fill_wait(fill, 0), EBADF, "freed");
	}
	CHECK(kvmfault_pages_absent(t.s.m.library) > 0, "the fill was over before it was stopped");
	t.us = 0;
	fill_vm_fill_all(&t, NULL);
	pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, PAGES);
	EQUAL("pages that came", machine_stats(&t.s.m).pages_copied, PAGES);
	slot_vm_destroy(&t.s);
}

static atomic_uint finalized;

static void finalizer(void *opaque)
{
	(void)opaque;
	finalized++;
}

/*
 * Its handle is freed while it is at it, or the whole VM: the threads go when their call is over,
 * and the finalizer is called once.
 */
static void freed(void)
{
	for (int what = 0; what < 2; what++) {
		struct fill_vm t;
		struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
		fill_vm_create(&t, MEMFD, PAGES * PAGE);
		t.us = 100000;
		finalized = 0;
		options.threads = 3;
		options.batch = 8;
		options.finalizer = finalizer;
		struct kvmfault_fill *fill = fill_vm_start(&t, &options);
		UNTIL(t.calls >= 3);
		EQUAL("calls of the finalizer", finalized, 0);
		if (what == 0) {
			kvmfault_fill_free(fill);
		} else {
			kvmfault_vm_free(t.s.m.library);
			REFUSED(kvmfault_fill_wait(fill, 10000), ESHUTDOWN, "freed");
			kvmfault_fill_free(fill);
		}
		UNTIL(finalized == 1);
		if (what == 0) {
			t.us = 0;
			/* its threads are gone: another one may start */
			fill_vm_fill_all(&t, NULL);
			pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, PAGES);
			slot_vm_destroy(&t.s);
		}
	}
}

/*
 * Pages that the resolver fails for: the others come, the fill ends with the resolver's error, and
 * later it works.
 */
static void failing(void)
{
	struct fill_vm t;
	uint64_t bad = 0;
	fill_vm_create(&t, MEMFD, PAGES * PAGE);
	struct vcpu *v = slot_vm_add_vcpu(&t.s, 3);
	for (uint64_t page = 0; page < PAGES; page++)
		bad += page % 97 == 5;
	t.answer = -EREMOTEIO;
	struct kvmfault_fill *fill = fill_vm_start(&t, NULL);
	struct kvmfault_fill_progress progress = KVMFAULT_FILL_PROGRESS_INIT;
	REFUSED(kvmfault_fill_wait(fill, 60000), EREMOTEIO, "could not be fetched");
	OK(kvmfault_fill_status(fill, &progress));
	EQUAL("ended", progress.ended, 1);
	EQUAL("pages left", progress.pages_left, bad);
	CHECK(progress.failures >= bad, "%lu failures", progress.failures);
	EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), bad);
	kvmfault_fill_free(fill);
	/* a fault of the guest's own is another matter */
	slot_vm_visit(&t.s, v, 0, PAGES / 2, READ_FIRST);
	t.answer = 0;
	fill_vm_fill_all(&t, NULL);
	slot_vm_visit(&t.s, v, 0, PAGES, READ_FIRST);
	vcpu_detach(v);
	slot_vm_destroy(&t.s);
}

/*
 * The guest, a device and the fill want the last page at the same time, and the fill's call for it
 * fails.
 */
struct wanted {
	struct fill_vm t;
	atomic_bool seen;
};

static void *look_at_page_5(void *arg)
{
	struct wanted *w = arg;
	pattern_check(&w->t.s.source.pattern, w->t.s.ram.hva + 5 * PAGE, 5, 1);
	w->seen = true;
	return NULL;
}

/*
 * A thread that waits for a page when the fill's call for it fails calls the resolver itself, and
 * does not wait for the next fill.
 */
static void failing_while_wanted(void)
{
	struct wanted w = { .seen = false };
	struct fill_vm *t = &w.t;
	pthread_t device;
	fill_vm_create(t, MEMFD, PAGES * PAGE);
	struct vcpu *v = machine_add_vcpu(&t->s.m, 3);
	OK(kvmfault_pages_resolve(t->s.m.library, RAM_GPA, 5 * PAGE));
	OK(kvmfault_pages_resolve(t->s.m.library, RAM_GPA + 6 * PAGE, (PAGES - 6) * PAGE));
	struct kvmfault_stats before = machine_settled_stats(&t->s.m);
	t->answer = -EREMOTEIO;
	t->fill_held = true;
	struct kvmfault_fill *fill = fill_vm_start(t, NULL);
	UNTIL(t->calls == 1);
	slot_vm_start_visit(&t->s, v, 5, 1, READ_FIRST);
	CHECK(!pthread_create(&device, NULL, look_at_page_5, &w), "pthread_create");
	UNTIL(machine_stats(&t->s.m).faults_vcpu == 1 && machine_stats(&t->s.m).faults_host == before.faults_host + 1);
	/* Sleep in userfaultfd is known to the library when the reader has answered. */
	uint64_t readers = test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD ? 2 : 1;
	UNTIL(machine_stats(&t->s.m).outcome_waited >= before.outcome_waited + readers);
	t->fill_held = false;
	UNTIL(w.seen);
	pthread_join(device, NULL);
	vcpu_join(v);
	int ret = kvmfault_fill_wait(fill, 60000);
	/* With -EREMOTEIO the fill has tried the page again, before the others had it. */
	CHECK(ret == 0 || ret == -EREMOTEIO, "%d: %s", ret, kvmfault_last_error());
	UNTIL(kvmfault_pages_absent(t->s.m.library) == 0);
	kvmfault_fill_free(fill);
	slot_vm_destroy(&t->s);
}

/* A resolver that is dead: that is found out before all of a large memory was tried. */
static int dead(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)vm, (void)fault;
	++*(atomic_ulong *)opaque;
	return -ECONNRESET;
}

static void dead_resolver(void)
{
	struct machine m;
	struct ram ram;
	atomic_ulong calls = 0;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_fill_options fill_options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	ram_create(&ram, MEMFD, 1ul << 30);
	machine_create(&m, PAGE);
	options.resolver = dead;
	options.opaque = &calls;
	options.mechanism = KVMFAULT_MECHANISM_USERFAULTFD;
	machine_attach(&m, NULL, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	fill_options.threads = 4;
	OK(kvmfault_fill_start(m.library, &fill_options, &fill));
	REFUSED(kvmfault_fill_wait(fill, 30000), ECONNRESET, "could not be fetched");
	kvmfault_fill_free(fill);
	CHECK(calls < 20000, "%lu calls", calls);
	EQUAL("absent pages", kvmfault_pages_absent(m.library), ram.len / PAGE);
	machine_destroy(&m);
	ram_destroy(&ram);
}

/* A resolver that wants to be asked again, for a while. */
static void again(void)
{
	struct fill_vm t;
	fill_vm_create(&t, MEMFD, PAGES * PAGE);
	t.answer = KVMFAULT_RETRY;
	struct kvmfault_fill *fill = fill_vm_start(&t, NULL);
	REFUSED(kvmfault_fill_wait(fill, 500), ETIMEDOUT, "absent");
	t.answer = 0;
	OK(kvmfault_fill_wait(fill, 60000));
	kvmfault_fill_free(fill);
	pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, PAGES);
	slot_vm_destroy(&t.s);
}

/* Memory with lost pages stays armed: they can be had later. */
static void lost(void)
{
	struct fill_vm t;
	uint64_t bad = 0;
	fill_vm_create(&t, MEMFD, PAGES * PAGE);
	struct vcpu *v = slot_vm_add_vcpu(&t.s, 3);
	t.answer = KVMFAULT_LOST;
	fill_vm_fill_all(&t, NULL);
	for (uint64_t page = 0; page < PAGES; page++)
		bad += kvmfault_pages_state(t.s.m.library, RAM_GPA + page * PAGE) == KVMFAULT_PAGE_LOST;
	CHECK(bad > 0, "no page is lost");
	t.answer = 0;
	OK(kvmfault_pages_discard(t.s.m.library, RAM_GPA, PAGES * PAGE));
	fill_vm_fill_all(&t, NULL);
	slot_vm_visit(&t.s, v, 0, PAGES, READ_FIRST);
	vcpu_detach(v);
	slot_vm_destroy(&t.s);
}

/*
 * A resolver that only requests the pages, as a post-copy destination does; another thread installs
 * them.
 */
static void pending(void)
{
	struct machine m;
	struct ram ram;
	struct source source;
	struct later later;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_fill_options fill_options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	ram_create(&ram, MEMFD, 1024 * PAGE);
	machine_create(&m, PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	later_create(&later, &source, 1, 200);
	options.resolver = later_resolve;
	options.opaque = &later;
	machine_attach(&m, &source, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	fill_options.threads = 2;
	fill_options.batch = 1;
	OK(kvmfault_fill_start(m.library, &fill_options, &fill));
	OK(kvmfault_fill_wait(fill, 60000));
	kvmfault_fill_free(fill);
	later_stop(&later);
	EQUAL("calls", source.total, 1024);
	pattern_check(&source.pattern, ram.hva, 0, 1024);
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
}

/* Pages that become absent again during the fill are filled, too. */
static void discarded_meanwhile(void)
{
	struct fill_vm t;
	uint64_t seed = 3;
	fill_vm_create(&t, MEMFD, PAGES * PAGE);
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	options.threads = 2;
	for (unsigned round = 0; round < scaled(20); round++) {
		struct kvmfault_fill *fill = fill_vm_start(&t, &options);
		int ret = 0;
		for (int i = 0; i < 200 && ret != -EBUSY; i++) {
			ret = kvmfault_pages_discard(t.s.m.library, RAM_GPA + random_number(&seed) % PAGES * PAGE,
						     PAGE);
			CHECK(ret == 0 || ret == -EBUSY, "%d: %s", ret, kvmfault_last_error());
		}
		OK(kvmfault_fill_wait(fill, 60000));
		kvmfault_fill_free(fill);
		EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), 0);
		pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, PAGES);
		OK(kvmfault_memslot_set_fast_only(t.s.m.library, RAM_SLOT, 1));
		OK(kvmfault_pages_discard(t.s.m.library, RAM_GPA, PAGES * PAGE));
	}
	slot_vm_destroy(&t.s);
}

#define BEGINNINGS 4000

struct beginning {
	struct fill_vm t;
	atomic_ulong round, taken; /* rounds in which the page was discarded */
	atomic_bool over;
};

/* Never leaves the page alone. */
static void *look_all_the_time(struct vcpu *v)
{
	struct beginning *b = v->opaque;
	vcpu_attach(v);
	while (!b->over) {
		vcpu_load_verify(v, RAM_GPA, b->t.s.list_gpa, b->t.s.pages, &b->t.s.source.pattern, READ_FIRST);
		vcpu_verify(v);
	}
	vcpu_detach(v);
	return NULL;
}

static void *take_and_bring(void *arg)
{
	struct beginning *b = arg;
	for (unsigned long round = 1; round <= scaled(BEGINNINGS); round++) {
		int ret;
		while (b->round < round)
			;
		while ((ret = kvmfault_pages_discard(b->t.s.m.library, RAM_GPA, PAGE)) == -EBUSY)
			;
		OK(ret);
		OK(kvmfault_pages_resolve(b->t.s.m.library, RAM_GPA, PAGE));
		b->taken = round;
	}
	return NULL;
}

/*
 * Ordinary memory gets its fast path again, and pages go the moment they may: then everything must
 * be there that keeps the guest from the hole.
 */
static void discarded_as_it_begins(void)
{
	struct beginning b = { .round = 0 };
	pthread_t thread;
	fill_vm_create(&b.t, MEMFD, 256 * PAGE);
	fill_vm_fill_all(&b.t, NULL);
	memset(b.t.s.list, 0, b.t.s.pages * sizeof(*b.t.s.list)); /* that page, again and again */
	struct vcpu *v = machine_add_vcpu(&b.t.s.m, 3);
	vcpu_start(v, look_all_the_time, &b);
	CHECK(!pthread_create(&thread, NULL, take_and_bring, &b), "pthread_create");
	for (unsigned long round = 1; round <= scaled(BEGINNINGS); round++) {
		b.round = round;
		OK(kvmfault_memslot_set_fast_only(b.t.s.m.library, RAM_SLOT, 1));
		while (b.taken < round)
			sched_yield();
		struct kvmfault_fill *fill = fill_vm_start(&b.t, NULL);
		OK(kvmfault_fill_wait(fill, 60000));
		kvmfault_fill_free(fill);
	}
	pthread_join(thread, NULL);
	b.over = true;
	vcpu_join(v);
	pattern_check(&b.t.s.source.pattern, b.t.s.ram.hva, 0, 1);
	slot_vm_destroy(&b.t.s);
}

/* ---- what callbacks report, and what the VMM may call from them ---- */

struct reports {
	struct kvmfault_fill *_Atomic fill;
	bool tried;
	struct kvmfault_vm *vm;
	atomic_uint count, ended;
	uint64_t left;
	int wait, start, stop, state;
	struct kvmfault_fill_progress last;
};

static void report(void *opaque, const struct kvmfault_fill_progress *progress)
{
	struct reports *r = opaque;
	EQUAL("size", progress->size, sizeof(*progress));
	EQUAL("pages in all", progress->pages_total, PAGES);
	CHECK(progress->pages_left <= r->left, "%lu pages left, %lu before", progress->pages_left, r->left);
	EQUAL("reports after the end", r->ended, 0);
	r->left = progress->pages_left;
	r->last = *progress;
	r->count++;
	while (!r->fill)
		wait_a_little(); /* kvmfault_fill_start hasn't returned yet */
	if (!r->tried && (progress->pages_left < PAGES || progress->ended)) {
		r->tried = true;
		struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
		struct kvmfault_fill *other;
		r->wait = kvmfault_fill_wait(r->fill, 0);
		r->start = kvmfault_fill_start(r->vm, &options, &other);
		r->state = kvmfault_pages_state(r->vm, RAM_GPA);
	}
	r->ended = progress->ended; /* `r` may go now */
}

static void progress(void)
{
	struct fill_vm t;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct reports reports = { .left = PAGES };
	fill_vm_create(&t, MEMFD, PAGES * PAGE);
	options.progress = report;
	options.opaque = &reports;
	options.interval_ms = 20;
	options.bytes_per_second = 32 << 20;
	reports.vm = t.s.m.library;
	reports.fill = fill_vm_start(&t, &options);
	OK(kvmfault_fill_wait(reports.fill, 60000));
	UNTIL(reports.ended);
	CHECK(reports.count >= 5 && reports.count < 500, "%u reports", reports.count);
	EQUAL("pages left", reports.last.pages_left, 0);
	EQUAL("working set done", reports.last.working_set_done, 1);
	EQUAL("wait in the callback", reports.wait, -EDEADLK);
	EQUAL("start in the callback", reports.start, -EDEADLK);
	EQUAL("state in the callback", reports.state, KVMFAULT_PAGE_PRESENT);
	struct kvmfault_fill_progress status = KVMFAULT_FILL_PROGRESS_INIT;
	OK(kvmfault_fill_status(reports.fill, &status));
	EQUAL("ended", status.ended, 1);
	kvmfault_fill_free(reports.fill);
	slot_vm_destroy(&t.s);
}

static void wrong_arguments(void)
{
	struct fill_vm t;
	struct kvmfault_fill *fill = (void *)1;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	fill_vm_create(&t, MEMFD, PAGES * PAGE);
	finalized = 0;
#define WRONG(field, value, error, words)                                                 \
	do {                                                                              \
		struct kvmfault_fill_options wrong = KVMFAULT_FILL_OPTIONS_INIT;          \
		wrong.finalizer = finalizer;                                              \
		wrong.field = value;                                                      \
		REFUSED(kvmfault_fill_start(t.s.m.library, &wrong, &fill), error, words); \
		CHECK(!fill, "a handle after an error");                                  \
	} while (0)
	WRONG(size, 0, EINVAL, "options.size");
	WRONG(threads, 65, EINVAL, "threads");
	WRONG(threads, UINT32_MAX, EINVAL, "threads");
	WRONG(batch, 4097, EINVAL, "batch");
	WRONG(flags, 8, EINVAL, "flags");
	WRONG(flags, KVMFAULT_FILL_WORKING_SET_ONLY, EINVAL, "working_set_fd");
	WRONG(reserved, 1, EINVAL, "reserved");
	WRONG(working_set_fd, -2, EBADF, "working_set_fd");
	REFUSED(kvmfault_fill_start(t.s.m.library, NULL, &fill), EINVAL, "options");
	REFUSED(kvmfault_fill_start(t.s.m.library, &options, NULL), EINVAL, "fill");
	EQUAL("calls of the finalizer", finalized, 0);
	EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), PAGES);

	t.us = 100000;
	struct kvmfault_fill *one = fill_vm_start(&t, NULL);
	REFUSED(kvmfault_fill_start(t.s.m.library, &options, &fill), EBUSY, "under way");
	kvmfault_fill_free(one);
	slot_vm_destroy(&t.s);
}

/*
 * A vCPU is on its way to the resolver while all pages come: only then a VMM may put away what its
 * resolver reads from.
 */
static void overtaken(void)
{
	for (int stopped = 0; stopped <= 1; stopped++) {
		struct fill_vm t;
		fill_vm_create(&t, MEMFD, PAGES * PAGE);
		t.held = true;
		struct vcpu *v = machine_add_vcpu(&t.s.m, 3);
		slot_vm_start_visit(&t.s, v, 0, 1, READ_FIRST);
		UNTIL(t.holding == 1);
		OK(source_install(&t.s.source, t.s.m.library, RAM_GPA, PAGE));
		struct kvmfault_fill *fill = fill_vm_start(&t, NULL);
		UNTIL(kvmfault_pages_absent(t.s.m.library) == 0);
		EQUAL("the end while a resolver call is under way", kvmfault_fill_wait(fill, 200), -ETIMEDOUT);
		if (stopped) {
			OK(kvmfault_fill_stop(fill));
			EQUAL("after it was stopped", kvmfault_fill_wait(fill, 10000), -ECANCELED);
		}
		t.held = false;
		if (stopped)
			UNTIL(t.holding == 0);
		else
			OK(kvmfault_fill_wait(fill, 10000));
		EQUAL("calls under way", t.holding, 0);
		vcpu_join(v);
		kvmfault_fill_free(fill);
		slot_vm_destroy(&t.s);
	}
}

static const struct test_case cases[] = {
	{ "stopped", stopped, false },
	{ "freed", freed, false },
	{ "failing", failing, true },
	{ "failing-while-wanted", failing_while_wanted, true },
	{ "dead-resolver", dead_resolver, false },
	{ "again", again, false },
	{ "lost", lost, true },
	{ "pending", pending, true },
	{ "discarded-meanwhile", discarded_meanwhile, true },
	{ "discarded-as-it-begins", discarded_as_it_begins, true },
	{ "progress", progress, false },
	{ "wrong-arguments", wrong_arguments, false },
	{ "overtaken", overtaken, true },
};
TEST_MAIN(cases)
