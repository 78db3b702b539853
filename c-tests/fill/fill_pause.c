/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A fill that is paused, and goes on; and what ends it meanwhile. */
#define _GNU_SOURCE
#include "fill_vm.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

enum { THREADS = 3, BATCH = 8 };

static struct kvmfault_fill_progress status(const struct kvmfault_fill *fill)
{
	struct kvmfault_fill_progress progress = KVMFAULT_FILL_PROGRESS_INIT;
	OK(kvmfault_fill_status(fill, &progress));
	return progress;
}

static struct kvmfault_fill_options usual(void)
{
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	options.threads = THREADS;
	options.batch = BATCH;
	return options;
}

/*
 * A fill that is paused while each of its threads is in its first call, and those calls have ended.
 */
static struct kvmfault_fill *start_and_pause(struct fill_vm *t, const struct kvmfault_fill_options *options)
{
	t->fill_held = true;
	struct kvmfault_fill *fill = fill_vm_start(t, options);
	UNTIL(t->calls == THREADS);
	EQUAL("paused, before", status(fill).paused, 0);
	OK(kvmfault_fill_pause(fill));
	OK(kvmfault_fill_pause(fill));
	EQUAL("paused", status(fill).paused, 1);
	EQUAL("threads in calls", status(fill).threads_calling, THREADS);
	t->fill_held = false;
	UNTIL(status(fill).threads_calling == 0);
	EQUAL("calls", t->calls, THREADS);
	return fill;
}

/*
 * Calls that are under way end, and no other begins until it is resumed; the guest's own faults are
 * served.
 */
static void calls(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct fill_vm t;
		struct kvmfault_fill_options options = usual();
		fill_vm_create(&t, backing, PAGES * PAGE);
		struct vcpu *v = slot_vm_add_vcpu(&t.s, 3);
		struct kvmfault_fill *fill = start_and_pause(&t, &options);
		EQUAL("pages left", status(fill).pages_left, PAGES - THREADS * BATCH);
		slot_vm_visit(&t.s, v, PAGES / 2, 10, WRITE_FIRST);
		REFUSED(kvmfault_fill_wait(fill, 100), ETIMEDOUT, "absent");
		REFUSED(kvmfault_fill_wait(fill, 0), ETIMEDOUT, "absent");
		EQUAL("calls while it is paused", t.calls, THREADS);
		EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), PAGES - THREADS * BATCH - 10);
		OK(kvmfault_fill_resume(fill));
		OK(kvmfault_fill_resume(fill));
		OK(kvmfault_fill_wait(fill, 60000));
		EQUAL("paused, afterwards", status(fill).paused, 0);
		EQUAL("failures", status(fill).failures, 0);
		EQUAL("pages that came", machine_settled_stats(&t.s.m).pages_copied, PAGES);
		slot_vm_visit(&t.s, v, 0, PAGES / 2, READ_FIRST);
		kvmfault_fill_free(fill);
		vcpu_detach(v);
		slot_vm_destroy(&t.s);
	}
}

/* Other threads install all absent pages: the fill ends when it is resumed, and not before. */
static void overtaken(void)
{
	struct fill_vm t;
	struct kvmfault_fill_options options = usual();
	fill_vm_create(&t, MEMFD, PAGES * PAGE);
	struct kvmfault_fill *fill = start_and_pause(&t, &options);
	OK(kvmfault_pages_resolve(t.s.m.library, RAM_GPA, PAGES * PAGE));
	EQUAL("pages left", status(fill).pages_left, 0);
	REFUSED(kvmfault_fill_wait(fill, 100), ETIMEDOUT, "absent");
	OK(kvmfault_pages_discard(t.s.m.library, RAM_GPA, PAGE)); /* nothing has become ordinary */
	OK(kvmfault_fill_resume(fill));
	OK(kvmfault_fill_wait(fill, 60000));
	EQUAL("calls", t.calls, THREADS + 1);
	REFUSED(kvmfault_pages_discard(t.s.m.library, RAM_GPA, PAGE), EBUSY, "set_fast_only");
	kvmfault_fill_free(fill);
	slot_vm_destroy(&t.s);
}

/*
 * The resolver's source fails, and recovers while the fill is paused: the fill does not end.
 * Without the pauses, a page that fails three times in a row would end it.
 */
static void mended(void)
{
	struct fill_vm t;
	fill_vm_create(&t, MEMFD, PAGES * PAGE);
	OK(kvmfault_pages_resolve(t.s.m.library, RAM_GPA, 5 * PAGE));
	OK(kvmfault_pages_resolve(t.s.m.library, RAM_GPA + 6 * PAGE, (PAGES - 6) * PAGE));
	t.answer = -EREMOTEIO;
	t.fill_held = true;
	struct kvmfault_fill *fill = fill_vm_start(&t, NULL);
	for (unsigned long round = 1; round <= 10; round++) {
		UNTIL(t.calls == round || status(fill).ended);
		EQUAL("ended", status(fill).ended, 0);
		OK(kvmfault_fill_pause(fill));
		t.fill_held = false;
		UNTIL(status(fill).threads_calling == 0);
		EQUAL("failures", status(fill).failures, round);
		t.fill_held = true;
		if (round == 10)
			t.answer = 0;
		OK(kvmfault_fill_resume(fill));
	}
	t.fill_held = false;
	OK(kvmfault_fill_wait(fill, 60000));
	kvmfault_fill_free(fill);
	pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, PAGES);
	slot_vm_destroy(&t.s);
}

/* ---- the end, while it is paused ---- */

static atomic_uint finalized;

static void finalizer(void *opaque)
{
	(void)opaque;
	finalized++;
}

static struct kvmfault_fill *paused_with_finalizer(struct fill_vm *t)
{
	struct kvmfault_fill_options options = usual();
	fill_vm_create(t, MEMFD, PAGES * PAGE);
	options.finalizer = finalizer;
	options.interval_ms = 1000000; /* no thread wakes up by itself */
	finalized = 0;
	return start_and_pause(t, &options);
}

static void stopped(void)
{
	struct fill_vm t;
	struct kvmfault_fill *fill = paused_with_finalizer(&t);
	OK(kvmfault_fill_stop(fill));
	REFUSED(kvmfault_fill_wait(fill, 10000), ECANCELED, "stopped");
	UNTIL(finalized == 1);
	EQUAL("ended", status(fill).ended, 1);
	EQUAL("paused", status(fill).paused, 0);
	OK(kvmfault_fill_pause(fill));
	EQUAL("paused when it is over", status(fill).paused, 0);
	OK(kvmfault_fill_resume(fill));
	EQUAL("calls", t.calls, THREADS);
	kvmfault_fill_free(fill);
	fill_vm_fill_all(&t, NULL);
	slot_vm_destroy(&t.s);
}

static void freed(void)
{
	struct fill_vm t;
	kvmfault_fill_free(paused_with_finalizer(&t));
	UNTIL(finalized == 1);
	EQUAL("calls", t.calls, THREADS);
	fill_vm_fill_all(&t, NULL);
	slot_vm_destroy(&t.s);
}

static void vm_freed(void)
{
	struct fill_vm t;
	struct kvmfault_fill *fill = paused_with_finalizer(&t);
	slot_vm_destroy(&t.s);
	UNTIL(finalized == 1);
	REFUSED(kvmfault_fill_wait(fill, 10000), ESHUTDOWN, "freed");
	EQUAL("calls", t.calls, THREADS);
	kvmfault_fill_free(fill);
}

/* Closing waits for threads of the library that may call the VMM. */
static void vm_closed(void)
{
	struct fill_vm t;
	struct kvmfault_fill *fill = paused_with_finalizer(&t);
	OK(kvmfault_vm_close(t.s.m.library, 10000));
	UNTIL(finalized == 1);
	REFUSED(kvmfault_fill_wait(fill, 10000), ESHUTDOWN, "freed");
	kvmfault_fill_free(fill);
	t.s.m.library = NULL;
	slot_vm_destroy(&t.s);
}

/* ---- reports and the limit ---- */

struct reports {
	struct kvmfault_fill *_Atomic fill;
	unsigned count, paused;
	uint64_t left;
	atomic_bool ended;
};

/* Pauses the fill at the first report, and resumes it at the third with `paused`. */
static void report(void *opaque, const struct kvmfault_fill_progress *progress)
{
	struct reports *r = opaque;
	EQUAL("size", progress->size, sizeof(*progress));
	while (!r->fill)
		wait_a_little(); /* kvmfault_fill_start hasn't returned yet */
	if (progress->ended) {
		EQUAL("paused at the end", progress->paused, 0);
	} else if (r->count++ == 0) {
		OK(kvmfault_fill_pause(r->fill));
		r->left = progress->pages_left;
	} else if (progress->paused) {
		EQUAL("threads in calls", progress->threads_calling, 0);
		EQUAL("pages left", progress->pages_left, r->left);
		if (++r->paused == 3)
			OK(kvmfault_fill_resume(r->fill));
	}
	r->ended = progress->ended; /* `r` may go now */
}

static void reported(void)
{
	struct fill_vm t;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct reports reports = { .count = 0 };
	fill_vm_create(&t, MEMFD, 256 * PAGE);
	options.batch = 64;
	options.bytes_per_second = 1 << 20; /* so that there is a report before the end */
	options.progress = report;
	options.opaque = &reports;
	options.interval_ms = 5;
	reports.fill = fill_vm_start(&t, &options);
	OK(kvmfault_fill_wait(reports.fill, 60000));
	UNTIL(reports.ended);
	EQUAL("reports while it was paused", reports.paused, 3);
	CHECK(reports.left > 0, "it was over before its first report");
	kvmfault_fill_free(reports.fill);
	slot_vm_destroy(&t.s);
}

/* The time of a pause isn't saved up, nor what threads waited for when it began. */
static void limited(void)
{
	struct fill_vm t;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	const double rate = 16 << 20;
	fill_vm_create(&t, MEMFD, 8 << 20);
	options.threads = 8;
	options.batch = 64;
	options.bytes_per_second = rate;
	struct kvmfault_fill *fill = fill_vm_start(&t, &options);
	UNTIL(t.calls > 0);
	OK(kvmfault_fill_pause(fill));
	UNTIL(status(fill).threads_calling == 0);
	uint64_t left = status(fill).pages_left;
	usleep(300000);
	double begin = now();
	OK(kvmfault_fill_resume(fill));
	OK(kvmfault_fill_wait(fill, 60000));
	/* the first piece goes at once */
	double seconds = now() - begin, least = (left < 64 ? 0 : left - 64) * PAGE / rate;
	CHECK(seconds > 0.97 * least, "%lu pages in %.3f s, not %.3f", (unsigned long)left, seconds, least);
	note("%lu pages in %.3f s; the limit allows %.3f", (unsigned long)left, seconds, least);
	kvmfault_fill_free(fill);
	slot_vm_destroy(&t.s);
}

static const struct test_case cases[] = {
	{ "calls", calls, true },         { "overtaken", overtaken, true }, { "mended", mended, true },
	{ "stopped", stopped, true },     { "freed", freed, true },         { "vm-freed", vm_freed, true },
	{ "vm-closed", vm_closed, true }, { "reported", reported, false },  { "limited", limited, false },
};
TEST_MAIN(cases)
