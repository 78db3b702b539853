/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Background fill: beside a running guest, within its limits, and what memory is when it has ended.
 */
#define _GNU_SOURCE
#include "fill_vm.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/* ---- what a fill installs ---- */

static void whole(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct fill_vm t;
		struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
		fill_vm_create(&t, backing, PAGES * PAGE);
		options.batch = 32;
		fill_vm_fill_all(&t, &options);
		EQUAL("calls", t.calls, PAGES / 32);
		pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, PAGES);
		struct vcpu *v = slot_vm_add_vcpu(&t.s, 3);
		slot_vm_visit(&t.s, v, 0, PAGES, READ_FIRST);
		EQUAL("faults", machine_stats(&t.s.m).outcome_resolved, 0);
		vcpu_detach(v);
		slot_vm_destroy(&t.s);
	}
}

static void huge(void)
{
	struct fill_vm t;
	fill_vm_create(&t, HUGETLB, 8 * HUGE_PAGE);
	fill_vm_fill_all(&t, NULL);
	pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, t.s.pages);
	struct vcpu *v = slot_vm_add_vcpu(&t.s, 3);
	slot_vm_visit(&t.s, v, 0, t.s.pages, WRITE_FIRST);
	vcpu_detach(v);
	slot_vm_destroy(&t.s);
}

/*
 * The guest runs meanwhile, in another order, and writes: every page comes once, and what was
 * written stays.
 */
static void beside_the_guest(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct fill_vm t;
		struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
		fill_vm_create(&t, backing, PAGES * PAGE);
		list_shuffle(t.s.list, PAGES, 11);
		options.threads = 2;
		options.bytes_per_second = 64 << 20;
		struct kvmfault_fill *fill = fill_vm_start(&t, &options);
		struct vcpu *v[4];
		for (int i = 0; i < 4; i++) {
			v[i] = machine_add_vcpu(&t.s.m, i % 2 ? 0 : 3);
			slot_vm_start_visit(&t.s, v[i], i * PAGES / 4, PAGES / 4, i < 2 ? READ_FIRST : WRITE_FIRST);
		}
		for (int i = 0; i < 4; i++)
			vcpu_join(v[i]);
		OK(kvmfault_fill_wait(fill, 60000));
		kvmfault_fill_free(fill);
		struct kvmfault_stats stats = machine_settled_stats(&t.s.m);
		EQUAL("pages that came", stats.pages_copied, PAGES);
		for (uint32_t n = 0; n < PAGES; n++) {
			uint32_t page = t.s.list[n];
			uint64_t last = pattern_word(&t.s.source.pattern, page, PAGE / 8 - 1);
			EQUAL("the last word of a page", *(uint64_t *)(t.s.ram.hva + (page + 1) * PAGE - 8),
			      n < PAGES / 2 ? last : ~last);
		}
		note("%lu pages by the guest's faults, %lu calls of the fill", (unsigned long)stats.outcome_resolved,
		     (unsigned long)t.calls);
		slot_vm_destroy(&t.s);
	}
}

/* What follows a fault of the guest's comes before what is at the beginning. */
static void near_faults_first(void)
{
	struct fill_vm t;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	fill_vm_create(&t, MEMFD, PAGES * PAGE);
	struct vcpu *v = slot_vm_add_vcpu(&t.s, 3);
	options.bytes_per_second = 512 << 10;
	options.batch = 16;
	slot_vm_visit(&t.s, v, PAGES / 2, 1, READ_FIRST);
	struct kvmfault_fill *fill = fill_vm_start(&t, &options);
	UNTIL(kvmfault_pages_absent(t.s.m.library) < (int64_t)PAGES - 100);
	OK(kvmfault_fill_stop(fill));
	EQUAL("a page behind the fault", kvmfault_pages_state(t.s.m.library, RAM_GPA + (PAGES / 2 + 80) * PAGE),
	      KVMFAULT_PAGE_PRESENT);
	EQUAL("the first page", kvmfault_pages_state(t.s.m.library, RAM_GPA), KVMFAULT_PAGE_ABSENT);
	REFUSED(kvmfault_fill_wait(fill, 10000), ECANCELED, "stopped");
	kvmfault_fill_free(fill);
	vcpu_detach(v);
	slot_vm_destroy(&t.s);
}

/* A limit holds for all threads together. */
static void limited(void)
{
	struct fill_vm t;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	fill_vm_create(&t, MEMFD, 8 << 20);
	options.threads = 4;
	options.bytes_per_second = 16 << 20;
	double begin = now();
	fill_vm_fill_all(&t, &options);
	double seconds = now() - begin;
	CHECK(seconds > 0.45, "8 MiB in %.2f s, at 16 MiB/s", seconds);
	note("8 MiB in %.2f s, at 16 MiB/s", seconds);
	slot_vm_destroy(&t.s);
}

/* ---- the end ---- */

/*
 * The memory is the VMM's own again: the resolver is not called for pages that the VMM drops. When
 * the VMM turns the fast path on again, all is as before.
 */
static void ordinary(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct fill_vm t;
		fill_vm_create(&t, backing, PAGES * PAGE);
		struct vcpu *v = slot_vm_add_vcpu(&t.s, 3);
		slot_vm_visit(&t.s, v, 0, 100, WRITE_FIRST);
		fill_vm_fill_all(&t, NULL);
		struct kvmfault_stats before = machine_settled_stats(&t.s.m);
		REFUSED(kvmfault_pages_discard(t.s.m.library, RAM_GPA, PAGE), EBUSY, "set_fast_only");
		for (int i = 0; i < 2; i++)
			SYS(madvise(t.s.ram.hva + (200 + i) * PAGE, PAGE,
				    backing == ANON ? MADV_DONTNEED : MADV_REMOVE));
		EQUAL("what the guest reads of a page that was dropped", slot_vm_read(&t.s, v, RAM_GPA + 200 * PAGE),
		      0);
		EQUAL("what the host reads of one", *(volatile uint64_t *)(t.s.ram.hva + 201 * PAGE), 0);
		slot_vm_write(&t.s, v, RAM_GPA + 200 * PAGE + 8, 77);
		EQUAL("what the guest wrote there", *(volatile uint64_t *)(t.s.ram.hva + 200 * PAGE + 8), 77);
		slot_vm_visit(&t.s, v, 300, PAGES - 300, READ_FIRST);
		struct kvmfault_stats after = machine_stats(&t.s.m);
		EQUAL("faults since", after.faults_vcpu + after.faults_host - before.faults_vcpu - before.faults_host,
		      0);

		OK(kvmfault_memslot_set_fast_only(t.s.m.library, RAM_SLOT, 1));
		OK(kvmfault_pages_discard(t.s.m.library, RAM_GPA + 500 * PAGE, 32 * PAGE));
		EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), 32);
		slot_vm_visit(&t.s, v, 500, 32, READ_FIRST);
		EQUAL("faults", machine_settled_stats(&t.s.m).outcome_resolved - after.outcome_resolved, 32);
		fill_vm_fill_all(&t, NULL);
		vcpu_detach(v);
		slot_vm_destroy(&t.s);
	}
}

/* With KVMFAULT_FILL_KEEP_ARMED nothing changes: a balloon goes on to work. */
static void kept_armed(void)
{
	struct fill_vm t;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	fill_vm_create(&t, MEMFD, PAGES * PAGE);
	struct vcpu *v = slot_vm_add_vcpu(&t.s, 3);
	options.flags = KVMFAULT_FILL_KEEP_ARMED;
	fill_vm_fill_all(&t, &options);
	OK(kvmfault_pages_discard(t.s.m.library, RAM_GPA + 500 * PAGE, 32 * PAGE));
	slot_vm_visit(&t.s, v, 500, 32, READ_FIRST);
	EQUAL("faults", machine_settled_stats(&t.s.m).outcome_resolved, 32);
	vcpu_detach(v);
	slot_vm_destroy(&t.s);
}

/*
 * A slot that is deleted and set anew on memory that a fill has completed: a VMM changes its memory
 * map at any time.
 */
static void slots_afterwards(void)
{
	struct fill_vm t;
	fill_vm_create(&t, MEMFD, PAGES * PAGE);
	struct vcpu *v = slot_vm_add_vcpu(&t.s, 3);
	fill_vm_fill_all(&t, NULL);
	struct kvmfault_memslot slot = slot_on(&t.s.ram, RAM_SLOT, RAM_GPA), gone = slot;
	gone.len = 0;
	gone.flags = KVMFAULT_MEMSLOT_KEEP;
	OK(kvmfault_memslot_set(t.s.m.library, &gone));
	OK(kvmfault_memslot_set(t.s.m.library, &slot));
	slot_vm_visit(&t.s, v, 0, PAGES, WRITE_FIRST);
	EQUAL("faults", machine_stats(&t.s.m).faults_vcpu, 0);
	REFUSED(kvmfault_pages_discard(t.s.m.library, RAM_GPA, PAGE), EBUSY, "fast path");
	OK(kvmfault_memslot_set_fast_only(t.s.m.library, RAM_SLOT, 1));
	OK(kvmfault_pages_discard(t.s.m.library, RAM_GPA, 8 * PAGE));
	slot_vm_visit(&t.s, v, 0, 8, READ_FIRST);
	EQUAL("faults", machine_settled_stats(&t.s.m).outcome_resolved, 8);
	vcpu_detach(v);
	slot_vm_destroy(&t.s);
}

static uint64_t huge_kib(const void *address)
{
	char line[256];
	uint64_t start, end, total = 0, kib;
	bool inside = false;
	FILE *file = fopen("/proc/self/smaps", "r");
	CHECK(file, "smaps");
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			inside = start <= (uint64_t)address && (uint64_t)address < end;
		else if (inside && (sscanf(line, "AnonHugePages: %lu", &kib) == 1 ||
				    sscanf(line, "ShmemPmdMapped: %lu", &kib) == 1))
			total += kib;
	}
	fclose(file);
	return total;
}

/* The guest reads all of its memory: the time of the fastest of some rounds. */
static double reading(struct slot_vm *s, struct vcpu *v)
{
	double best = 1e9;
	for (unsigned long round = 0; round < SCALED(10, 3); round++) {
		double begin = now();
		slot_vm_visit(s, v, 0, s->pages, READ_FIRST);
		best = now() - begin < best ? now() - begin : best;
	}
	return best;
}

/* Can memory like this be collapsed here at all? */
static bool can_collapse(enum backing backing)
{
	struct ram ram;
	ram_create(&ram, backing, 4 * HUGE_PAGE);
	madvise(ram.hva, ram.len, MADV_HUGEPAGE);
	memset(ram.hva, 1, ram.len);
	enum { COLLAPSE = 25 /* MADV_COLLAPSE */ };
	bool can = madvise((void *)round_up((uintptr_t)ram.hva, HUGE_PAGE), HUGE_PAGE, COLLAPSE) == 0;
	ram_destroy(&ram);
	return can;
}

/*
 * The guest then runs as fast as with memory that the library has never seen, in huge pages where
 * there are some to be had.
 */
static void full_speed(void)
{
	char figures[256] = "";
	const uint64_t len = SCALED(16, 8) << 20;
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct fill_vm t;
		struct slot_vm plain;
		fill_vm_create(&t, backing, len);
		madvise(t.s.ram.hva, t.s.ram.len, MADV_HUGEPAGE);
		struct vcpu *v = slot_vm_add_vcpu(&t.s, 3);
		slot_vm_visit(&t.s, v, 0, t.s.pages / 2, READ_FIRST);
		fill_vm_fill_all(&t, NULL);

		slot_vm_attach(&plain, backing, len, test_mechanism(), NULL);
		struct kvm_userspace_memory_region region = {
			.slot = RAM_SLOT,
			.guest_phys_addr = RAM_GPA,
			.memory_size = plain.ram.len,
			.userspace_addr = (uintptr_t)plain.ram.hva,
		};
		SYS(ioctl(plain.m.vm, KVM_SET_USER_MEMORY_REGION, &region));
		for (uint64_t page = 0; page < plain.pages; page++)
			pattern_fill(&plain.source.pattern, page, plain.ram.hva + page * PAGE);
		struct vcpu *w = slot_vm_add_vcpu(&plain, 3);

		/*
		 * In turns, until both had their luck on a busy machine: what is really slower
		 * stays so.
		 */
		double filled = 1e9, never = 1e9, end = now() + 15;
		for (int round = 0; round < 2 || (filled / never > 1.15 && (now() < end || round < 6)); round++) {
			double one = reading(&t.s, v), other = reading(&plain, w);
			filled = one < filled ? one : filled;
			never = other < never ? other : never;
		}
		pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, t.s.pages);
		uint64_t huge = huge_kib(t.s.ram.hva), all = t.s.ram.len / 1024;
		size_t length = strlen(figures);
		snprintf(figures + length, sizeof(figures) - length,
			 "%s%s: %.2f times as long, %lu of %lu KiB in huge pages", *figures ? "; " : "",
			 backing_name(backing), filled / never, huge, all);
		CHECK(filled / never < 1.25, "%s", figures);
		CHECK(huge >= all / 2 || !can_collapse(backing), "%s", figures);
		vcpu_detach(v);
		vcpu_detach(w);
		slot_vm_destroy(&t.s);
		slot_vm_destroy(&plain);
	}
	note("%s", figures);
}

static const struct test_case cases[] = {
	{ "whole", whole, true },
	{ "huge", huge, true },
	{ "beside-the-guest", beside_the_guest, true },
	{ "near-faults-first", near_faults_first, true },
	{ "limited", limited, false },
	{ "ordinary", ordinary, true },
	{ "kept-armed", kept_armed, true },
	{ "slots-afterwards", slots_afterwards, true },
	{ "full-speed", full_speed, true },
};
TEST_MAIN(cases)
