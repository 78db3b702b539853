/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Ranges, sources and states with which the functions on pages must refuse to work.
 */
#define _GNU_SOURCE
#include "intact_vm.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

static uint8_t bytes[4 * PAGE] __attribute__((aligned(PAGE)));

static int install(struct kvmfault_vm *vm, uint64_t gpa, uint64_t len)
{
	return kvmfault_pages_install(vm, gpa, bytes, len);
}

static int zero(struct kvmfault_vm *vm, uint64_t gpa, uint64_t len)
{
	return kvmfault_pages_zero(vm, gpa, len);
}

static int map(struct kvmfault_vm *vm, uint64_t gpa, uint64_t len)
{
	return kvmfault_pages_map(vm, gpa, len);
}

static int lost(struct kvmfault_vm *vm, uint64_t gpa, uint64_t len)
{
	return kvmfault_pages_lost(vm, gpa, len);
}

static int discard(struct kvmfault_vm *vm, uint64_t gpa, uint64_t len)
{
	return kvmfault_pages_discard(vm, gpa, len);
}

static int give_back(struct kvmfault_vm *vm, uint64_t gpa, uint64_t len)
{
	return kvmfault_pages_give_back(vm, gpa, len);
}

static int resolve(struct kvmfault_vm *vm, uint64_t gpa, uint64_t len)
{
	return kvmfault_pages_resolve(vm, gpa, len);
}

static int withdraw(struct kvmfault_vm *vm, uint64_t gpa, uint64_t len)
{
	return (int)kvmfault_pages_withdraw(vm, gpa, len);
}

/* With room for as many pages as there are, whatever the range. */
static int bitmap(struct kvmfault_vm *vm, uint64_t gpa, uint64_t len)
{
	static uint64_t words[INTACT_VM_LEN / PAGE / 64 + 1];
	return (int)kvmfault_pages_bitmap(vm, gpa, len, KVMFAULT_STATE_ABSENT, words, sizeof(words));
}

/* All that take a range. */
static int (*const functions[])(struct kvmfault_vm *, uint64_t,
				uint64_t) = { install, zero, map, lost, discard, give_back, resolve, withdraw, bitmap };
enum { FUNCTIONS = sizeof(functions) / sizeof(*functions) };

#define END (INTACT_VM_GPA + INTACT_VM_LEN)
#define FREE (INTACT_VM_GPA + 500 * PAGE) /* absent in every intact_vm */

static void wrong_ranges(void)
{
	const struct {
		uint64_t gpa, len;
		int error;
		const char *words;
	} cases[] = {
		{ FREE, 0, EINVAL, "len" },
		{ FREE, 1, EINVAL, "len" },
		{ FREE, PAGE + 1, EINVAL, "len" },
		{ FREE, PAGE - 1, EINVAL, "len" },
		{ FREE + 1, PAGE, EINVAL, "gpa" },
		{ FREE + PAGE / 2, PAGE, EINVAL, "gpa" },
		{ END, PAGE, ENOENT, "gpa" },
		{ INTACT_VM_GPA - PAGE, PAGE, ENOENT, "gpa" },
		{ INTACT_VM_GPA - PAGE, 2 * PAGE, ENOENT, "gpa" },
		{ 0, PAGE, ENOENT, "gpa" }, /* the VMM's own slot is none of the library's */
		{ -PAGE, PAGE, ENOENT, "gpa" },
		{ UINT64_MAX, PAGE, ENOENT, "gpa" },
		{ END - PAGE, 2 * PAGE, EINVAL, "len" },
		{ FREE, -FREE, EINVAL, "len" },
		{ FREE, -PAGE, EINVAL, "len" },
		{ FREE, 1ull << 63, EINVAL, "len" },
	};
	struct intact_vm s;
	intact_vm_create(&s);
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		for (int f = 0; f < FUNCTIONS; f++)
			REFUSED(functions[f](s.machine.library, cases[i].gpa, cases[i].len), cases[i].error,
				cases[i].words);
		intact_vm_check(&s);
	}
	for (const uint64_t *bad = (const uint64_t[]){ END, INTACT_VM_GPA - 1, UINT64_MAX, 1ull << 52, 0 }; *bad; bad++)
		REFUSED(kvmfault_pages_state(s.machine.library, *bad), ENOENT, "gpa");
	EQUAL("the last byte's page", OK(kvmfault_pages_state(s.machine.library, END - 1)), KVMFAULT_PAGE_ABSENT);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* Two slots side by side are still two slots. */
static void across_slots(void)
{
	struct intact_vm s;
	struct ram neighbour;
	intact_vm_create(&s);
	ram_create(&neighbour, MEMFD, 16 * PAGE);
	machine_set_slot(&s.machine, &neighbour, RAM_SLOT + 1, END);
	for (int f = 0; f < FUNCTIONS; f++)
		REFUSED(functions[f](s.machine.library, END - PAGE, 2 * PAGE), EINVAL, "len");
	EQUAL("the neighbour's page", OK(kvmfault_pages_state(s.machine.library, END)), KVMFAULT_PAGE_ABSENT);
	struct kvmfault_memslot slot = slot_on(&neighbour, RAM_SLOT + 1, END);
	slot.len = 0;
	OK(kvmfault_memslot_set(s.machine.library, &slot));
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* A source that can't be read, from the start or from the second page on. */
static void wrong_source(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	uint8_t *hole = map_anon(4 * PAGE);
	memset(hole, 0x11, 4 * PAGE);
	SYS(mprotect(hole + 2 * PAGE, PAGE, PROT_NONE));
	SYS(munmap(hole + 3 * PAGE, PAGE));

	REFUSED(kvmfault_pages_install(s.machine.library, FREE, NULL, PAGE), EINVAL, "src");
	REFUSED(kvmfault_pages_install(s.machine.library, FREE, NULL, 0), EINVAL, "src");
	REFUSED(kvmfault_pages_install(s.machine.library, FREE, (void *)-PAGE, 2 * PAGE), EINVAL, "src");
	REFUSED(kvmfault_pages_install(s.machine.library, FREE, (void *)-PAGE, PAGE), EINVAL, "src");
	REFUSED(kvmfault_pages_install(s.machine.library, FREE, (void *)1, PAGE), EFAULT, "src");
	REFUSED(kvmfault_pages_install(s.machine.library, FREE, (void *)(1ul << 47), PAGE), EFAULT, "src");
	REFUSED(kvmfault_pages_install(s.machine.library, FREE, hole + 2 * PAGE, PAGE), EFAULT, "src");
	REFUSED(kvmfault_pages_install(s.machine.library, FREE, hole + 3 * PAGE, PAGE), EFAULT, "src");
	/*
	 * A source in absent guest memory: copying from it would wait for a page, possibly forever.
	 */
	REFUSED(kvmfault_pages_install(s.machine.library, FREE, s.ram.hva + (FREE - INTACT_VM_GPA) + PAGE, PAGE),
		EFAULT, "src");
	REFUSED(kvmfault_pages_install(s.machine.library, FREE, s.ram.hva + (FREE - INTACT_VM_GPA) - 1, PAGE), EFAULT,
		"src");
	/* Reaches into the hole from the middle of a page: nothing of that page is installed. */
	REFUSED(kvmfault_pages_install(s.machine.library, FREE, hole + PAGE + 1, PAGE), EFAULT, "src");
	intact_vm_check(&s);

	/* What was installed before the hole stays. */
	REFUSED(kvmfault_pages_install(s.machine.library, FREE, hole, 4 * PAGE), EFAULT, "src");
	EQUAL("page 0", OK(kvmfault_pages_state(s.machine.library, FREE)), KVMFAULT_PAGE_PRESENT);
	EQUAL("page 1", OK(kvmfault_pages_state(s.machine.library, FREE + PAGE)), KVMFAULT_PAGE_PRESENT);
	EQUAL("page 2", OK(kvmfault_pages_state(s.machine.library, FREE + 2 * PAGE)), KVMFAULT_PAGE_ABSENT);
	EQUAL("page 3", OK(kvmfault_pages_state(s.machine.library, FREE + 3 * PAGE)), KVMFAULT_PAGE_ABSENT);
	intact_vm_learn(&s);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* PRESENT pages keep their bytes when an install has other ones. */
static void over_present_pages(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	struct kvmfault_vm *vm = s.machine.library;
	const uint64_t *first = (uint64_t *)s.ram.hva;

	memset(bytes, 0x77, sizeof(bytes));
	REFUSED(install(vm, INTACT_VM_GPA, PAGE), EEXIST, "present");
	REFUSED(install(vm, INTACT_VM_GPA, 2 * PAGE), EEXIST, "present");
	REFUSED(zero(vm, INTACT_VM_GPA, PAGE), EEXIST, "present");
	REFUSED(map(vm, INTACT_VM_GPA, PAGE), EEXIST, "present");
	REFUSED(lost(vm, INTACT_VM_GPA, 2 * PAGE), EEXIST, "present");
	OK(resolve(vm, INTACT_VM_GPA, 2 * PAGE));
	pattern_check(&s.source.pattern, first, 0, 2);
	intact_vm_check(&s);

	/* Half of it present: the rest is installed, and what was there stays. */
	OK(install(vm, FREE, PAGE));
	memset(bytes, 0x88, sizeof(bytes));
	OK(install(vm, FREE - PAGE, 3 * PAGE));
	EQUAL("the page before", s.ram.hva[FREE - PAGE - INTACT_VM_GPA], 0x88);
	EQUAL("the page that was there", s.ram.hva[FREE - INTACT_VM_GPA], 0x77);
	EQUAL("the page after", s.ram.hva[FREE + PAGE - INTACT_VM_GPA], 0x88);
	intact_vm_learn(&s);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void over_lost_pages(void)
{
	const uint64_t page = INTACT_VM_GPA + 3 * PAGE; /* see intact_vm_create */
	struct intact_vm s;
	intact_vm_create(&s);
	struct kvmfault_vm *vm = s.machine.library;
	EQUAL("the page", OK(kvmfault_pages_state(vm, page)), KVMFAULT_PAGE_LOST);
	REFUSED(install(vm, page, PAGE), EHWPOISON, "lost");
	REFUSED(zero(vm, page, PAGE), EHWPOISON, "lost");
	REFUSED(map(vm, page, PAGE), EHWPOISON, "lost");
	REFUSED(resolve(vm, page, PAGE), EHWPOISON, "lost");
	REFUSED(lost(vm, page, PAGE), EEXIST, "lost");
	EQUAL("what the vCPU gets", intact_vm_read(&s, 3), KVMFAULT_MEMORY_ERROR);
	intact_vm_check(&s);

	/* The way back. */
	OK(discard(vm, page, PAGE));
	EQUAL("the page", OK(kvmfault_pages_state(vm, page)), KVMFAULT_PAGE_ABSENT);
	intact_vm_learn(&s);
	EQUAL("what the vCPU gets", intact_vm_read(&s, 3), KVMFAULT_PASS);
	EQUAL("what it reads", s.script[0].value, pattern_word(&s.source.pattern, 3, 0));
	intact_vm_learn(&s);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* kvmfault_pages_map is for what is in the page cache. */
static void map_without_bytes(void)
{
	struct intact_vm s;
	struct ram private;
	intact_vm_create(&s);
	int ret = map(s.machine.library, FREE, PAGE);
	CHECK(ret == -ENOENT || ret == -EOPNOTSUPP, "returned %d: %s", ret, kvmfault_last_error());
	intact_vm_check(&s);

	ram_create(&private, ANON, 16 * PAGE);
	struct kvmfault_memslot slot = slot_on(&private, RAM_SLOT + 1, END);
	OK(kvmfault_memslot_set(s.machine.library, &slot));
	REFUSED(map(s.machine.library, END, PAGE), EINVAL, "private");
	EQUAL("its page", OK(kvmfault_pages_state(s.machine.library, END)), KVMFAULT_PAGE_ABSENT);
	slot.len = 0;
	OK(kvmfault_memslot_set(s.machine.library, &slot));
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* Pages of 2 MiB come as a whole. */
static void parts_of_huge_pages(void)
{
	struct intact_vm s;
	struct ram huge;
	const uint64_t gpa = INTACT_VM_GPA + 16 * HUGE_PAGE;
	intact_vm_create(&s);
	ram_create(&huge, HUGETLB, 2 * HUGE_PAGE);
	machine_set_slot(&s.machine, &huge, RAM_SLOT + 1, gpa);
	for (int f = 0; f < FUNCTIONS; f++) {
		REFUSED(functions[f](s.machine.library, gpa, PAGE), EINVAL, "len");
		REFUSED(functions[f](s.machine.library, gpa + PAGE, HUGE_PAGE), EINVAL, "gpa");
		REFUSED(functions[f](s.machine.library, gpa + HUGE_PAGE, 2 * HUGE_PAGE), EINVAL, "len");
	}
	EQUAL("its page", OK(kvmfault_pages_state(s.machine.library, gpa + HUGE_PAGE - 1)), KVMFAULT_PAGE_ABSENT);
	struct kvmfault_memslot slot = slot_on(&huge, RAM_SLOT + 1, gpa);
	slot.len = 0;
	OK(kvmfault_memslot_set(s.machine.library, &slot));
	intact_vm_check(&s);
	intact_vm_destroy(&s);
	ram_destroy(&huge);
}

static const struct test_case cases[] = {
	{ "wrong-ranges", wrong_ranges, true },
	{ "across-slots", across_slots, false },
	{ "wrong-source", wrong_source, true },
	{ "over-present-pages", over_present_pages, true },
	{ "over-lost-pages", over_lost_pages, true },
	{ "map-without-bytes", map_without_bytes, false },
	{ "parts-of-huge-pages", parts_of_huge_pages, false },
};
TEST_MAIN(cases)
