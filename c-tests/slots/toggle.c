/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Fast-only turned on and off on a live slot, as post-copy does. */
#define _GNU_SOURCE
#include "slot_vm.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>

/*
 * With the fast path off, faults come by userfaultfd; with it on, to the vCPU. A page installed in
 * one way stays for the other.
 */
static void on_and_off(void)
{
	bool uffd = test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD;
	enum { STEP = 32, STEPS = 9 };
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct slot_vm s;
		slot_vm_create(&s, backing, (uint64_t)STEP * STEPS * PAGE, KVMFAULT_MEMSLOT_SLOW, 0);
		struct vcpu *v = slot_vm_add_vcpu(&s, 3);
		for (uint64_t step = 0; step < STEPS; step++) {
			bool on = step % 2;
			unsigned long here = s.here, elsewhere = s.elsewhere;
			OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, on));
			OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, on));
			slot_vm_visit(&s, v, step * STEP, STEP, step % 3 ? READ_FIRST : WRITE_FIRST);
			EQUAL("faults on the vCPU's thread", s.here - here, on && !uffd ? STEP : 0);
			EQUAL("faults on reader threads", s.elsewhere - elsewhere, on && !uffd ? 0 : STEP);
			/* Pages of the steps before, too: KVM may have forgotten them. */
			for (uint64_t page = 0; page < step * STEP; page++)
				EQUAL("a word of an earlier step", slot_vm_read(&s, v, RAM_GPA + page * PAGE),
				      pattern_word(&s.source.pattern, page, 0));
		}
		EQUAL("resolver calls", s.source.total, s.pages);
		REFUSED(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 2), EINVAL, "on");
		REFUSED(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT + 1, 1), ENOENT, "slot");
		vcpu_detach(v);
		slot_vm_destroy(&s);
	}
}

static atomic_bool toggling;
static atomic_ulong toggles;

static void *toggle(void *opaque)
{
	struct slot_vm *s = opaque;
	for (int on = 0; toggling; on = !on, toggles++) {
		OK(kvmfault_memslot_set_fast_only(s->m.library, RAM_SLOT, on));
		/* emulated machines need a while to get anything done in between */
		poll(NULL, 0, on ? 3 : 1);
	}
	return NULL;
}

/*
 * As a post-copy that begins and ends: another thread turns the flag on and off while vCPUs touch
 * absent pages.
 */
static void toggled(enum backing backing)
{
	enum { VCPUS = 3, MOST_ROUNDS = 40 };
	bool uffd = test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD;
	unsigned rounds = 0, enough = (unsigned)scaled(4);
	struct slot_vm s;
	pthread_t thread;
	slot_vm_create(&s, backing, 8ul << 20, 0, 0);
	list_shuffle(s.list, s.pages, 99);
	for (int i = 0; i < VCPUS; i++)
		machine_add_vcpu(&s.m, i % 2 ? 0 : 3);
	toggling = true;
	CHECK(!pthread_create(&thread, NULL, toggle, &s), "pthread_create");
	for (; rounds < MOST_ROUNDS && (rounds < enough || !s.elsewhere || (!uffd && !s.here)); rounds++) {
		for (uint64_t i = 0; i < VCPUS; i++) {
			uint64_t first = s.pages * i / VCPUS;
			slot_vm_start_visit(&s, s.m.vcpu[i], first, s.pages * (i + 1) / VCPUS - first, READ_FIRST);
		}
		for (int i = 0; i < VCPUS; i++)
			vcpu_join(s.m.vcpu[i]);
		slot_vm_expect_all_present(&s);
		EQUAL("resolver calls", s.source.total, s.pages * (rounds + 1));
		pattern_check(&s.source.pattern, s.ram.hva, 0, s.pages);
		OK(kvmfault_pages_discard(s.m.library, RAM_GPA, s.ram.len));
	}
	toggling = false;
	pthread_join(thread, NULL);
	note("%lu toggles, %u rounds, %lu faults on vCPU threads, %lu on reader threads", (unsigned long)toggles,
	     rounds, (unsigned long)s.here, (unsigned long)s.elsewhere);
	CHECK(uffd || s.here, "no fault came to a vCPU's thread");
	CHECK(s.elsewhere, "no fault came to a reader thread");
	slot_vm_destroy(&s);
}

static void toggled_anon(void)
{
	toggled(ANON);
}

static void toggled_memfd(void)
{
	toggled(MEMFD);
}

static const struct test_case cases[] = {
	{ "on-and-off", on_and_off, true },
	{ "anon", toggled_anon, true },
	{ "memfd", toggled_memfd, true },
};
TEST_MAIN(cases)
