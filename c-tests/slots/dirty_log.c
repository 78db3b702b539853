/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KVM_MEM_LOG_DIRTY_PAGES beside fast-only memory: what the guest writes is in the log, or the
 * library reports it.
 */
#define _GNU_SOURCE
#include "slot_vm.h"

#include <poll.h>
#include <stdio.h>
#include <string.h>

static bool is_dirty(const struct slot_vm *s, const uint64_t *log, uint64_t page)
{
	return log[page / 64] >> (page % 64) & 1 || s->was_written[page];
}

static void set_logging(struct slot_vm *s, bool on)
{
	struct kvmfault_memslot slot = slot_on(&s->ram, RAM_SLOT, RAM_GPA);
	slot.kvm_flags = on ? KVM_MEM_LOG_DIRTY_PAGES : 0;
	OK(kvmfault_memslot_set(s->m.library, &slot));
}

/*
 * What the guest writes is in the log (or reported by the library, where the library wrote), and
 * what it doesn't touch isn't. What it reads may be: without hardware help KVM logs a page when it
 * maps it writable.
 */
static void expect_logged(struct slot_vm *s, struct vcpu *v, uint64_t first, uint64_t count)
{
	uint64_t log[s->pages / 64];
	slot_vm_dirty_log(s, log);
	memset((void *)s->was_written, 0, s->pages);
	for (uint64_t page = first; page < first + count; page++) {
		if (page % 2)
			slot_vm_write(s, v, RAM_GPA + page * PAGE + 8, page);
		else
			EQUAL("a word", slot_vm_read(s, v, RAM_GPA + page * PAGE),
			      pattern_word(&s->source.pattern, page, 0));
	}
	slot_vm_dirty_log(s, log);
	for (uint64_t page = 0; page < s->pages; page++) {
		bool touched = page >= first && page < first + count;
		if (is_dirty(s, log, page) ? !touched : touched && page % 2)
			FAIL("page %lu of %s memory is %s the log (CPL %d, pages [%lu, +%lu))", page,
			     backing_name(s->ram.backing), touched ? "missing in" : "in", v->cpl, first, count);
	}
}

static void dirty_log(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		for (int cpl = 0; cpl <= 3; cpl += 3) {
			struct slot_vm s;
			slot_vm_create(&s, backing, 512 * PAGE, 0, KVM_MEM_LOG_DIRTY_PAGES);
			struct vcpu *v = slot_vm_add_vcpu(&s, cpl);
			expect_logged(&s, v, 0, 64);
			expect_logged(&s, v, 0, 128); /* pages that are present, and more */
			/*
			 * Turned off and on with absent pages about: by a VMM that begins to
			 * migrate.
			 */
			set_logging(&s, false);
			slot_vm_visit(&s, v, 128, 64, WRITE_FIRST);
			set_logging(&s, true);
			expect_logged(&s, v, 120, 128);
			OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 0));
			expect_logged(&s, v, 240, 64);
			OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 1));
			expect_logged(&s, v, 300, 64);
			set_logging(&s, false);
			OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 0));
			set_logging(&s, true);
			expect_logged(&s, v, 360, 64);
			vcpu_detach(v);
			slot_vm_destroy(&s);
		}
	}
}

static atomic_bool toggling;
static atomic_ulong toggles;

static void *toggle_logging(void *opaque)
{
	for (int on = 0; toggling; on = !on, toggles++) {
		set_logging(opaque, on);
		poll(NULL, 0, 2);
	}
	return NULL;
}

/* The log turned on and off while vCPUs write to absent pages: no byte is lost. */
static void dirty_log_toggled(void)
{
	struct slot_vm s;
	pthread_t thread;
	slot_vm_create(&s, MEMFD, 8ul << 20, 0, 0);
	list_shuffle(s.list, s.pages, 5);
	toggling = true;
	CHECK(!pthread_create(&thread, NULL, toggle_logging, &s), "pthread_create");
	for (uint64_t i = 0; i < 2; i++)
		slot_vm_start_visit(&s, machine_add_vcpu(&s.m, i ? 0 : 3), s.pages / 2 * i, s.pages / 2, WRITE_FIRST);
	vcpu_join(s.m.vcpu[0]);
	vcpu_join(s.m.vcpu[1]);
	toggling = false;
	pthread_join(thread, NULL);
	for (uint64_t page = 0; page < s.pages; page++) {
		const uint64_t *words = (const uint64_t *)(s.ram.hva + page * PAGE);
		EQUAL("the first word", words[0], pattern_word(&s.source.pattern, page, 0));
		EQUAL("the last word", words[511], ~pattern_word(&s.source.pattern, page, 511));
	}
	EQUAL("resolver calls", s.source.total, s.pages);
	note("%lu toggles", (unsigned long)toggles);
	slot_vm_destroy(&s);
}

static const struct test_case cases[] = {
	{ "logged", dirty_log, true },
	{ "toggled", dirty_log_toggled, true },
};
TEST_MAIN(cases)
