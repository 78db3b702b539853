/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Shared memory that isn't empty when its slot is set, though all its pages are absent: it was
 * preallocated, or used before. No guest or thread sees the old bytes; what the resolver installs
 * replaces them, unless the VMM declares them to be the guest's.
 */
#define _GNU_SOURCE
#include "slot_vm.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

enum { STALE = 0xee, PAGES = 512, HUGE_PAGES = 6 };

static uint64_t length_of(enum backing backing)
{
	return backing == HUGETLB ? HUGE_PAGES * HUGE_PAGE : PAGES * PAGE;
}

/* Of four pages one is a hole, two are mapped, and one is in the page cache only. */
static void populate(const struct ram *ram)
{
	for (uint64_t at = 0; at < ram->len; at += ram->page) {
		unsigned kind = at / ram->page % 4;
		if (kind != 0)
			memset(ram->hva + at, STALE, ram->page);
		if (kind == 2)
			SYS(madvise(ram->hva + at, ram->page, MADV_DONTNEED));
	}
}

static void create(struct slot_vm *s, enum backing backing)
{
	slot_vm_attach(s, backing, length_of(backing), test_mechanism(), NULL);
	populate(&s->ram);
	machine_set_slot(&s->m, &s->ram, RAM_SLOT, RAM_GPA);
	EQUAL("pages absent before", kvmfault_pages_absent(s->m.library), s->ram.len / s->ram.page);
}

/*
 * Guests at both privilege levels and a thread of the VMM's, each with pages that no other has
 * touched.
 */
static void seen(enum backing backing)
{
	struct slot_vm s;
	create(&s, backing);
	uint64_t units = s.ram.len / s.ram.page, third = units / 3 * (s.ram.page / PAGE);
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	slot_vm_visit(&s, v, 0, third, READ_FIRST);
	vcpu_detach(v);
	v = slot_vm_add_vcpu(&s, 0);
	slot_vm_visit(&s, v, third, third, READ_FIRST);
	vcpu_detach(v);
	pattern_check(&s.source.pattern, s.ram.hva + 2 * third * PAGE, 2 * third, s.pages - 2 * third);
	pattern_check(&s.source.pattern, s.ram.hva, 0, s.pages);
	slot_vm_expect_all_present(&s);
	EQUAL("resolver calls", s.source.total, units);
	struct kvmfault_stats stats = machine_settled_stats(&s.m);
	EQUAL("pages copied", stats.pages_copied, units);
	CHECK(stats.retries_exist >= units / 2, "only %lu of %lu pages had something in their place",
	      stats.retries_exist, units);
	slot_vm_destroy(&s);
}

static void seen_memfd(void)
{
	seen(MEMFD);
}

static void seen_hugetlb(void)
{
	seen(HUGETLB);
}

/* Pages from the VMM's stream, in one piece and across present ones; and zeros. */
static void pushed(void)
{
	struct slot_vm s;
	create(&s, MEMFD);
	uint64_t half = s.pages / 2;
	OK(source_install(&s.source, s.m.library, RAM_GPA, half * PAGE));
	REFUSED(source_install(&s.source, s.m.library, RAM_GPA, half * PAGE), EEXIST, "present");
	OK(kvmfault_pages_zero(s.m.library, RAM_GPA + half * PAGE, half * PAGE));
	struct kvmfault_stats stats = machine_stats(&s.m);
	EQUAL("pages copied", stats.pages_copied, half);
	EQUAL("pages of zeros", stats.pages_zeroed, half);
	EQUAL("pages absent", kvmfault_pages_absent(s.m.library), 0);
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	slot_vm_visit(&s, v, 0, half, READ_FIRST);
	for (uint64_t page = half; page < s.pages; page++) {
		for (unsigned word = 0; word < PAGE / 8; word++)
			EQUAL("a word of zeros", ((uint64_t *)(s.ram.hva + page * PAGE))[word], 0);
		if (page % 16 < 4)
			EQUAL("a word of zeros, for the guest", slot_vm_read(&s, v, RAM_GPA + page * PAGE + 8), 0);
	}
	EQUAL("resolver calls", s.source.total, 0);
	vcpu_detach(v);
	slot_vm_destroy(&s);
}

/*
 * Streams overlap with each other and with guests that write to each page as soon as it is there:
 * what a guest has written must stay.
 */
enum { STREAMS = 2, ROUNDS = 20 };
static struct slot_vm raced_vm;
static atomic_bool raced_over;

static void *stream(void *seed)
{
	struct slot_vm *s = &raced_vm;
	uint64_t state = (uintptr_t)seed;
	while (!raced_over) {
		uint64_t first = random_number(&state) % s->pages, count = 1 + random_number(&state) % 8;
		if (first + count > s->pages)
			count = s->pages - first;
		int ret = source_install(&s->source, s->m.library, RAM_GPA + first * PAGE, count * PAGE);
		if (ret != -EEXIST)
			OK(ret);
	}
	return NULL;
}

static void raced(void)
{
	for (unsigned long round = 0; round < SCALED(ROUNDS, 2); round++) {
		struct slot_vm *s = &raced_vm;
		pthread_t streams[STREAMS];
		struct vcpu *v[2];
		create(s, MEMFD);
		raced_over = false;
		for (uintptr_t i = 0; i < STREAMS; i++)
			EQUAL("pthread_create", pthread_create(&streams[i], NULL, stream, (void *)(2 * round + i + 1)),
			      0);
		for (int i = 0; i < 2; i++) {
			v[i] = machine_add_vcpu(&s->m, i ? 0 : 3);
			slot_vm_start_visit(s, v[i], i * s->pages / 2, s->pages / 2, WRITE_FIRST);
		}
		for (int i = 0; i < 2; i++)
			vcpu_join(v[i]);
		raced_over = true;
		for (int i = 0; i < STREAMS; i++)
			pthread_join(streams[i], NULL);
		for (uint64_t page = 0; page < s->pages; page++) {
			const uint64_t *words = (uint64_t *)(s->ram.hva + page * PAGE);
			EQUAL("what the guest wrote", words[511], ~pattern_word(&s->source.pattern, page, 511));
			EQUAL("what it found", words[510], pattern_word(&s->source.pattern, page, 510));
		}
		slot_vm_destroy(s);
	}
}

/* Fill and readahead install the memory in windows. */
static void filled(void)
{
	struct slot_vm s;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	create(&s, MEMFD);
	s.source.window = true;
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	slot_vm_visit(&s, v, 0, 64, READ_FIRST);
	OK(kvmfault_fill_start(s.m.library, &options, &fill));
	slot_vm_visit(&s, v, 64, s.pages - 64, READ_FIRST);
	OK(kvmfault_fill_wait(fill, 10000));
	kvmfault_fill_free(fill);
	vcpu_detach(v);
	pattern_check(&s.source.pattern, s.ram.hva, 0, s.pages);
	slot_vm_destroy(&s);
}

/* The bytes are the right ones, put there before the slot was set: the resolver shows them. */
static int show(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	int ret = kvmfault_pages_map(vm, fault->gpa, fault->len);
	return ret == 0 || ret == -EEXIST ? KVMFAULT_RESOLVED : ret;
}

static void shown(void)
{
	struct machine m;
	struct ram ram;
	struct pattern pattern = PATTERN;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	uint64_t list_gpa;
	ram_create(&ram, MEMFD, PAGES * PAGE);
	for (uint64_t page = 0; page < PAGES; page++)
		pattern_fill(&pattern, page, ram.hva + page * PAGE);
	machine_create(&m, PAGES * sizeof(uint32_t));
	options.resolver = show;
	machine_attach(&m, NULL, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	list_shuffle(machine_share(&m, PAGES * sizeof(uint32_t), &list_gpa), PAGES, 3);
	struct vcpu *v = machine_add_vcpu(&m, 3);
	vcpu_attach(v);
	vcpu_load_verify(v, RAM_GPA, list_gpa, PAGES, &pattern, READ_FIRST);
	vcpu_verify(v);
	vcpu_detach(v);
	struct kvmfault_stats stats = machine_settled_stats(&m);
	EQUAL("resolver calls", stats.resolver_calls, PAGES);
	EQUAL("pages mapped", stats.pages_mapped, PAGES);
	machine_destroy(&m);
	ram_destroy(&ram);
}

/*
 * What is written to the file of absent pages, by another mapping and bit by bit, the guest sees
 * when the resolver says so and not before.
 */
static void written(enum backing backing)
{
	struct slot_vm s;
	slot_vm_create(&s, backing, length_of(backing), 0, 0);
	uint64_t units = s.ram.len / s.ram.page;
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	for (int round = 0; round < 2; round++) {
		unsigned long here = s.here, elsewhere = s.elsewhere;
		memset(ram_map_again(&s.ram), STALE, s.ram.len);
		slot_vm_visit(&s, v, 0, s.pages, READ_FIRST);
		EQUAL("resolver calls", s.here - here + s.elsewhere - elsewhere, units);
		if (test_mechanism() != KVMFAULT_MECHANISM_USERFAULTFD)
			EQUAL("those on the vCPU's thread", s.here - here, units);
		slot_vm_expect_all_present(&s);
		OK(kvmfault_pages_discard(s.m.library, RAM_GPA, s.ram.len));
	}
	vcpu_detach(v);
	slot_vm_destroy(&s);
}

static void written_memfd(void)
{
	written(MEMFD);
}

static void written_hugetlb(void)
{
	written(HUGETLB);
}

/*
 * The kernel makes a huge page of it (khugepaged does that by itself), and for that drops page
 * tables of all mappings.
 */
static void collapsed(void)
{
	struct slot_vm s;
	create(&s, MEMFD);
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	slot_vm_visit(&s, v, 0, 1, READ_FIRST);
	OK(kvmfault_pages_lost(s.m.library, RAM_GPA + PAGE, PAGE));
	uint8_t *again = ram_map_again(&s.ram);
	for (uint64_t page = 1; page < s.pages; page++)
		memset(again + page * PAGE, STALE, PAGE); /* no holes */
	if (madvise(again, HUGE_PAGE, 25 /* MADV_COLLAPSE */) != 0)
		skip("MADV_COLLAPSE of shared memory: %s", strerror(errno));
	slot_vm_visit(&s, v, 2, s.pages - 2, READ_FIRST);
	REFUSED(kvmfault_pages_install(s.m.library, RAM_GPA + PAGE, again, PAGE), EHWPOISON, "lost");
	vcpu_detach(v);
	slot_vm_destroy(&s);
}

/*
 * Locked memory can't be hidden, and says so; what is locked as it comes, and what else a VMM
 * locks, is no trouble.
 */
static void locked(void)
{
	for (int backing = ANON; backing <= HUGETLB; backing++) {
		struct slot_vm s;
		slot_vm_attach(&s, backing, backing == HUGETLB ? 2 * HUGE_PAGE : 64 * PAGE, test_mechanism(), NULL);
		struct kvmfault_memslot slot = slot_on(&s.ram, RAM_SLOT, RAM_GPA);
		if (mlockall(MCL_CURRENT | MCL_FUTURE) != 0)
			skip("mlockall: %s (RLIMIT_MEMLOCK)", strerror(errno));
		if (backing != HUGETLB) { /* which mlock leaves alone */
			REFUSED(kvmfault_memslot_set(s.m.library, &slot), EEXIST, "munlock");
			SYS(munlock(s.ram.hva, s.ram.len));
		}
		if (backing == ANON)
			SYS(madvise(s.ram.hva, s.ram.len, MADV_DONTNEED));
		else
			memset(s.ram.hva, STALE, s.ram.len);
		OK(kvmfault_memslot_set(s.m.library, &slot));
		struct vcpu *v = slot_vm_add_vcpu(&s, 3);
		slot_vm_visit(&s, v, 0, s.pages, READ_FIRST);
		vcpu_detach(v);
		SYS(munlockall());
		slot_vm_destroy(&s);
	}
}

static void locked_on_fault(void)
{
	struct slot_vm s;
	slot_vm_attach(&s, MEMFD, 64 * PAGE, test_mechanism(), NULL);
	if (mlock2(s.ram.hva, s.ram.len, MLOCK_ONFAULT) != 0)
		skip("mlock2: %s (RLIMIT_MEMLOCK)", strerror(errno));
	machine_set_slot(&s.m, &s.ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	slot_vm_visit(&s, v, 0, s.pages, WRITE_FIRST);
	REFUSED(kvmfault_pages_discard(s.m.library, RAM_GPA, PAGE), EINVAL, "mlock");
	SYS(munlock(s.ram.hva, s.ram.len));
	OK(kvmfault_pages_discard(s.m.library, RAM_GPA, PAGE));
	slot_vm_visit(&s, v, 0, 1, READ_FIRST);
	vcpu_detach(v);
	slot_vm_destroy(&s);
}

/*
 * mlockall() once the slot is there: it gets all pages, and of what it locks the VMM knows only its
 * own mapping.
 */
static void locked_later(void)
{
	struct slot_vm s;
	slot_vm_create(&s, MEMFD, 64 * PAGE, 0, 0);
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	slot_vm_visit(&s, v, 0, s.pages / 2, READ_FIRST);
	if (mlockall(MCL_CURRENT) != 0)
		skip("mlockall: %s (RLIMIT_MEMLOCK)", strerror(errno));
	slot_vm_expect_all_present(&s);
	REFUSED(kvmfault_pages_discard(s.m.library, RAM_GPA, s.ram.len), EINVAL, "mlock");
	SYS(munlock(s.ram.hva, s.ram.len));
	OK(kvmfault_pages_discard(s.m.library, RAM_GPA, s.ram.len));
	unsigned long calls = s.source.total;
	slot_vm_visit(&s, v, 0, s.pages, READ_FIRST);
	EQUAL("resolver calls", s.source.total - calls, s.pages);
	vcpu_detach(v);
	SYS(munlockall());
	slot_vm_destroy(&s);
}

static const struct test_case cases[] = {
	{ "memfd", seen_memfd, true },
	{ "hugetlb", seen_hugetlb, true },
	{ "pushed", pushed, true },
	{ "raced", raced, true },
	{ "filled", filled, true },
	{ "shown", shown, true },
	{ "written-memfd", written_memfd, true },
	{ "written-hugetlb", written_hugetlb, true },
	{ "collapsed", collapsed, true },
	{ "locked", locked, true },
	{ "locked-on-fault", locked_on_fault, true },
	{ "locked-later", locked_later, true },
};
TEST_MAIN(cases)
