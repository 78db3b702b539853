/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A fill that can't be started: KVMFAULT_TEST_MOST_THREADS limits how many of its threads start. */
#define _GNU_SOURCE
#include "fill_vm.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static atomic_bool returned;
static atomic_uint calls, too_late, finalized;

static void progress(void *opaque, const struct kvmfault_fill_progress *p)
{
	(void)opaque, (void)p;
	calls++;
	too_late += returned;
}

static void finalizer(void *opaque)
{
	(void)opaque;
	finalized++;
}

/* After the error nothing is called: `opaque` is the caller's. */
static void half_started(void)
{
	struct fill_vm t;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill = (void *)1;
	setenv("KVMFAULT_TEST_MOST_THREADS", "2", 1); /* read at the first fill */
	fill_vm_create(&t, MEMFD, 64 * PAGE);
	options.threads = 4;
	options.progress = progress;
	options.finalizer = finalizer;
	options.interval_ms = 1;
	REFUSED(kvmfault_fill_start(t.s.m.library, &options, &fill), EAGAIN, "thread");
	returned = true;
	CHECK(!fill, "a handle after an error");
	usleep(300000);
	EQUAL("calls of the callback", calls, 0);
	EQUAL("of them after the error", too_late, 0);
	EQUAL("calls of the finalizer", finalized, 0);
	EQUAL("calls of the resolver", t.calls, 0);
	EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), 64);
	slot_vm_destroy(&t.s);
}

static const struct test_case cases[] = {
	{ "half-started", half_started, false },
};
TEST_MAIN(cases)
