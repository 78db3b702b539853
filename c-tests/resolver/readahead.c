/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Readahead: the guest's pattern of access decides which pages are fetched together. Two counts
 * show it: calls of the resolver (too many: the pattern was not recognised) and pages that arrived
 * (too many: memory that the guest did not want).
 */
#define _GNU_SOURCE
#include "slot_vm.h"

#include <errno.h>
#include <unistd.h>

enum { MOST = 64 };
#define PAGES SCALED(4096, 1024)

struct ahead {
	struct slot_vm s;
	struct vcpu *v;
	bool less, slow;
	atomic_ulong calls, refused, prefetched, not_absent;
};

/* Installs the window; checks that it is what the header promises. */
static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct ahead *a = opaque;
	uint64_t end = fault->window_gpa + fault->window_len;
	CHECK(fault->window_gpa <= fault->gpa && fault->gpa + fault->len <= end && fault->window_len <= MOST * PAGE &&
		      fault->window_gpa >= RAM_GPA && end <= RAM_GPA + a->s.ram.len &&
		      (fault->window_gpa | end) % PAGE == 0,
	      "the window [%#lx, %#lx) does not suit the page %#lx", fault->window_gpa, end, fault->gpa);
	for (uint64_t gpa = fault->window_gpa; gpa < end; gpa += PAGE) {
		int expected = gpa == fault->gpa ? KVMFAULT_PAGE_RESOLVING : KVMFAULT_PAGE_ABSENT;
		a->not_absent += kvmfault_pages_state(vm, gpa) != expected;
	}
	a->calls++;
	a->prefetched += fault->origin == KVMFAULT_ORIGIN_PREFETCH;
	if (a->slow)
		usleep(1000);
	if (a->refused && (fault->window_len > fault->len || fault->origin == KVMFAULT_ORIGIN_PREFETCH)) {
		a->refused++;
		return -EIO;
	}
	int ret = source_install(&a->s.source, vm, a->less ? fault->gpa : fault->window_gpa,
				 a->less ? fault->len : fault->window_len);
	/*
	 * A vCPU that waits in the kernel goes on a moment before the library counts the page:
	 * another reader may have got its request.
	 */
	return ret == -EEXIST ? 0 : OK(ret);
}

/*
 * `readers`: 0 for the usual number. Two readers may serve a vCPU in turns, and what each reads
 * ahead is then a matter of luck.
 */
static void create(struct ahead *a, enum backing backing, uint64_t pages, int cpl, int readers)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct slot_vm *s = &a->s;
	*a = (struct ahead){ .less = false };
	ram_create(&s->ram, backing, pages * PAGE);
	s->pages = pages;
	machine_create(&s->m, pages * sizeof(uint32_t));
	source_create(&s->source, RAM_GPA, s->ram.len, PATTERN);
	s->list = machine_share(&s->m, pages * sizeof(uint32_t), &s->list_gpa);
	options.readahead = MOST;
	options.reader_threads = readers;
	options.resolver = resolve;
	options.opaque = a;
	machine_attach(&s->m, &s->source, &options);
	machine_set_slot(&s->m, &s->ram, RAM_SLOT, RAM_GPA);
	a->v = machine_add_vcpu(&s->m, cpl);
	vcpu_attach(a->v);
}

static struct kvmfault_stats finish(struct ahead *a)
{
	struct kvmfault_stats stats = machine_settled_stats(&a->s.m);
	vcpu_detach(a->v);
	machine_destroy(&a->s.m);
	ram_destroy(&a->s.ram);
	source_destroy(&a->s.source);
	EQUAL("pages of a window that weren't absent", a->not_absent, 0);
	EQUAL("resolver calls counted", stats.resolver_calls, a->calls);
	EQUAL("failed faults", stats.outcome_failed, 0);
	return stats;
}

/* The n-th page that the guest touches, of `count`. */
typedef uint32_t order(uint32_t n, uint32_t count);

static uint32_t ascending(uint32_t n, uint32_t count)
{
	(void)count;
	return n;
}

static uint32_t descending(uint32_t n, uint32_t count)
{
	return count - 1 - n;
}

static uint32_t every_seventh(uint32_t n, uint32_t count)
{
	(void)count;
	return 7 * n;
}

static uint32_t every_seventh_down(uint32_t n, uint32_t count)
{
	return 7 * (count - 1 - n);
}

/* What a copy does: from one half to the other. */
static uint32_t two_runs(uint32_t n, uint32_t count)
{
	return n / 2 + n % 2 * (count / 2);
}

static void walk(order *order, uint32_t count, unsigned long most_faults, unsigned long most_pages)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		for (int cpl = 0; cpl <= 3; cpl += 3) {
			struct ahead a;
			create(&a, backing, PAGES, cpl, 1);
			for (uint32_t n = 0; n < count; n++)
				a.s.list[n] = order(n, count);
			slot_vm_visit(&a.s, a.v, 0, count, READ_FIRST);
			struct kvmfault_stats stats = finish(&a);
			/* Faults that only had to be mapped are the mechanism's affair. */
			unsigned long faults = stats.outcome_resolved + stats.outcome_waited;
			/*
			 * A guest that waited in the kernel is a moment ahead of the library's
			 * counters.
			 */
			unsigned long more = test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD ? most_faults / 4 : 0;
			CHECK(faults <= most_faults + more, "%lu faults, %lu expected", faults, most_faults);
			CHECK(stats.pages_copied >= count && stats.pages_copied <= most_pages,
			      "%lu pages came for %u, %lu expected", stats.pages_copied, count, most_pages);
			/*
			 * A page may be requested twice: a vCPU that sleeps in the kernel goes on
			 * before the whole window is there.
			 */
			unsigned long asked = stats.ahead_asked + stats.resolver_calls - a.prefetched;
			CHECK(asked >= stats.pages_copied, "%lu pages asked for, %lu came", asked, stats.pages_copied);
			if (test_mechanism() != KVMFAULT_MECHANISM_USERFAULTFD)
				EQUAL("pages asked for", asked, stats.pages_copied);
			note("%lu faults and %lu pages for %u", faults, stats.pages_copied, count);
		}
	}
}

/* 1 page, then 4, 8, 16, 32: the rest 64 at a time. */
static void up(void)
{
	walk(ascending, PAGES, 5 + PAGES / MOST, PAGES);
}

static void down(void)
{
	walk(descending, PAGES, 5 + PAGES / MOST, PAGES);
}

/*
 * A strided run is fetched page by page while that takes little time: on a slow machine one page
 * ahead of each fault, elsewhere many.
 */
static void strided(void)
{
	walk(every_seventh, PAGES / 7, PAGES / 7 / 2 + 8, PAGES / 7 + MOST);
	walk(every_seventh_down, PAGES / 7, PAGES / 7 / 2 + 8, PAGES / 7 + MOST);
}

static void two_at_once(void)
{
	walk(two_runs, PAGES, 2 * (5 + PAGES / MOST), PAGES);
}

/*
 * Without a pattern only the faulting page is fetched. Some pages are next to each other by chance.
 */
static void shuffled(void)
{
	struct ahead a;
	create(&a, MEMFD, 16384, 3, 1);
	list_sequential(a.s.list, 16384);
	list_shuffle(a.s.list, 16384, 7);
	slot_vm_visit(&a.s, a.v, 0, PAGES, READ_FIRST);
	struct kvmfault_stats stats = finish(&a);
	CHECK(stats.pages_copied <= PAGES + PAGES / 20, "%lu pages came for %lu", stats.pages_copied, PAGES);
	note("%lu pages for %lu", stats.pages_copied, PAGES);
}

/*
 * A resolver that fails for all that isn't needed: the guest gets its pages all the same, and
 * nothing is lost.
 */
static void failing(void)
{
	order *const orders[] = { ascending, every_seventh };
	for (int i = 0; i < 2; i++) {
		struct ahead a;
		create(&a, MEMFD, PAGES, 3, 1);
		a.refused = 1;
		uint32_t count = i == 0 ? 512 : PAGES / 7;
		for (uint32_t n = 0; n < count; n++)
			a.s.list[n] = orders[i](n, count);
		slot_vm_visit(&a.s, a.v, 0, count, READ_FIRST);
		UNTIL(kvmfault_pages_absent(a.s.m.library) == (int64_t)PAGES - count);
		struct kvmfault_stats stats = finish(&a);
		EQUAL("pages that came", stats.pages_copied, count);
		EQUAL("pages that failed", stats.ahead_failed, stats.ahead_asked);
		CHECK(stats.ahead_failed > 0 && a.refused > 1, "nothing was refused");
	}
}

/* A resolver may install less than the window. */
static void less(void)
{
	struct ahead a;
	create(&a, ANON, 1024, 3, 1);
	a.less = true;
	list_sequential(a.s.list, 1024);
	slot_vm_visit(&a.s, a.v, 0, 1024, READ_FIRST);
	struct kvmfault_stats stats = finish(&a);
	EQUAL("resolver calls", stats.resolver_calls, 1024);
	EQUAL("pages that failed", stats.ahead_failed, 0);
}

/* The guest doesn't wait for many readahead calls, each of which takes long. */
static void slow(void)
{
	struct ahead a;
	create(&a, MEMFD, PAGES, 3, 1);
	a.slow = true;
	for (uint32_t n = 0; n < PAGES / 7; n++)
		a.s.list[n] = every_seventh(n, PAGES / 7);
	slot_vm_visit(&a.s, a.v, 0, PAGES / 7, READ_FIRST);
	struct kvmfault_stats stats = finish(&a);
	CHECK(a.prefetched <= stats.faults_vcpu, "%lu calls ahead in %lu faults", a.prefetched, stats.faults_vcpu);
	CHECK(a.prefetched > 0, "nothing was asked for ahead");
}

/* A host thread that reads memory from one end to the other, as a migration or a device does. */
static void host(void)
{
	struct ahead a;
	create(&a, MEMFD, PAGES, 3, 0);
	pattern_check(&a.s.source.pattern, a.s.ram.hva, 0, PAGES);
	struct kvmfault_stats stats = finish(&a);
	CHECK(stats.faults_host <= 5 + PAGES / MOST + 8, "%lu faults", stats.faults_host);
}

/* kvmfault_pages_resolve knows what it wants. */
static void prefetch(void)
{
	struct ahead a;
	create(&a, MEMFD, PAGES, 3, 1);
	OK(kvmfault_pages_resolve(a.s.m.library, RAM_GPA + 100 * PAGE, 500 * PAGE));
	EQUAL("absent pages", kvmfault_pages_absent(a.s.m.library), PAGES - 500);
	struct kvmfault_stats stats = finish(&a);
	EQUAL("resolver calls", stats.resolver_calls, (500 + MOST - 1) / MOST + 1); /* aligned */
}

static const struct test_case cases[] = {
	{ "up", up, true },
	{ "down", down, true },
	{ "strided", strided, true },
	{ "two-at-once", two_at_once, true },
	{ "shuffled", shuffled, true },
	{ "failing", failing, true },
	{ "less", less, true },
	{ "slow", slow, true },
	{ "host", host, true },
	{ "prefetch", prefetch, false },
};
TEST_MAIN(cases)
