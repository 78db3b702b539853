/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Memslots that kvmfault_memslot_set and kvmfault_memslot_prepare must refuse by themselves. */
#define _GNU_SOURCE
#include "spare_slot.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static void null_arguments(void)
{
	struct intact_vm s;
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	intact_vm_create(&s);
	struct kvmfault_memslot slot = spare_slot_on(map_memfd(SPARE_LEN));

	REFUSED(kvmfault_memslot_set(s.machine.library, NULL), EINVAL, "slot");
	REFUSED(kvmfault_memslot_prepare(s.machine.library, NULL, &region), EINVAL, "slot");
	REFUSED(kvmfault_memslot_prepare(s.machine.library, &slot, NULL), EINVAL, "region");
	slot.hva = NULL;
	spare_slot_refused(&s, &slot, EINVAL, "hva");
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* Unaligned, wrapping, beyond what there is. */
static void wrong_ranges(void)
{
	const struct {
		uint64_t gpa, len, hva_offset;
		const char *words;
	} cases[] = {
		{ SPARE_GPA + 1, SPARE_LEN, 0, "gpa" },
		{ SPARE_GPA + 2048, SPARE_LEN, 0, "gpa" },
		{ SPARE_GPA, 1, 0, "len" },
		{ SPARE_GPA, SPARE_LEN - 1, 0, "len" },
		{ SPARE_GPA, UINT64_MAX, 0, "len" },
		{ SPARE_GPA, SPARE_LEN, 1, "hva" },
		{ SPARE_GPA, SPARE_LEN - PAGE, 512, "hva" },
		{ -PAGE, SPARE_LEN, 0, "gpa" },
		{ -SPARE_LEN, SPARE_LEN, 0, "gpa" },
		{ 1ull << 52, SPARE_LEN, 0, "gpa" },
		{ (1ull << 52) - PAGE, SPARE_LEN, 0, "gpa" },
		{ SPARE_GPA, -SPARE_GPA, 0, "gpa" },
		{ SPARE_GPA, 1ull << 47, 0, "hva" },
		{ SPARE_GPA, SPARE_LEN, 1ull << 47, "hva" },
		{ SPARE_GPA, SPARE_LEN, -1ull << 47, "hva" },
	};
	struct intact_vm s;
	intact_vm_create(&s);
	uint8_t *memory = map_memfd(SPARE_LEN);
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct kvmfault_memslot slot = spare_slot_on(memory);
		slot.gpa = cases[i].gpa;
		slot.len = cases[i].len;
		slot.hva = (void *)((uintptr_t)memory + cases[i].hva_offset);
		spare_slot_refused(&s, &slot, EINVAL, cases[i].words);
		intact_vm_check(&s);
	}
	struct kvmfault_memslot slot = spare_slot_on(memory);
	spare_slot_accepted(&s, &slot);
	intact_vm_destroy(&s);
}

static void wrong_numbers(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	const struct kvmfault_memslot good = spare_slot_on(map_memfd(SPARE_LEN));
	struct kvmfault_memslot slot;
	int slots = SYS(ioctl(s.machine.vm, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS));
	int spaces = SYS(ioctl(s.machine.vm, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE));

	for (const uint32_t *bad = (const uint32_t[]){ slots, slots + 1, 0xffff, 0 }; *bad; bad++) {
		slot = good;
		slot.slot = *bad;
		spare_slot_refused(&s, &slot, EINVAL, "slot");
	}
	for (const uint32_t *bad = (const uint32_t[]){ spaces ? spaces : 1, 0x7fff, 0xffff, 0 }; *bad; bad++) {
		slot = good;
		slot.slot |= *bad << 16;
		spare_slot_refused(&s, &slot, EINVAL, "slot");
	}
	for (const int *bad = (const int[]){ -1, 4, INT_MAX, INT_MIN, 0 }; *bad; bad++) {
		slot = good;
		slot.memory = *bad;
		spare_slot_refused(&s, &slot, EINVAL, "memory");
	}
	for (int bit = 4; bit < 32; bit++) {
		slot = good;
		slot.flags = 1u << bit;
		spare_slot_refused(&s, &slot, EINVAL, "flags");
	}
	for (int bit = 2; bit < 32; bit++) {
		slot = good;
		slot.kvm_flags = 1u << bit;
		spare_slot_refused(&s, &slot, EINVAL, "kvm_flags");
	}
	for (int bit = 0; bit < 32; bit++) {
		slot = good;
		slot.reserved = 1u << bit;
		spare_slot_refused(&s, &slot, EINVAL, "reserved");
	}
	slot = good;
	slot.flags = KVMFAULT_MEMSLOT_KEEP; /* says how to delete */
	spare_slot_refused(&s, &slot, EINVAL, "KEEP");
	slot = good;
	slot.slot = slots - 1;
	spare_slot_accepted(&s, &slot);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void wrong_sizes(void)
{
	union {
		struct kvmfault_memslot slot;
		struct kvmfault_region region;
		uint8_t bytes[4096];
	} in, out;
	struct intact_vm s;
	intact_vm_create(&s);
	const struct kvmfault_memslot good = spare_slot_on(map_memfd(SPARE_LEN));
	struct kvmfault_region region = KVMFAULT_REGION_INIT;

	for (const size_t *bad = (const size_t[]){ 1, 7, 8, 4097, SIZE_MAX, 0 }; *bad; bad++) {
		struct kvmfault_memslot slot = good;
		slot.size = *bad;
		spare_slot_refused(&s, &slot, EINVAL, "slot.size");
		region.size = *bad;
		REFUSED(kvmfault_memslot_prepare(s.machine.library, &good, &region), EINVAL, "region.size");
	}
	struct kvmfault_memslot slot = good;
	slot.size = 0;
	spare_slot_refused(&s, &slot, EINVAL, "slot.size");

	/* Longer: only with nothing behind what is known. */
	for (size_t size = sizeof(good) + 1; size <= sizeof(good) + 9; size++) {
		memset(&in, 0, sizeof(in));
		in.slot = good;
		in.slot.size = size;
		spare_slot_accepted(&s, &in.slot);
		in.bytes[size - 1] = 0x80;
		spare_slot_refused(&s, &in.slot, E2BIG, "slot.size");
	}
	/*
	 * Shorter: the rest has its initial value; so a structure that ends after `hva` is a whole
	 * slot.
	 */
	slot = good;
	slot.size = offsetof(struct kvmfault_memslot, block_hva);
	slot.memory = slot.fd = slot.reserved = 0x7777777;
	spare_slot_accepted(&s, &slot);

	/* The result is written as far as the caller has room, and zero where we know nothing. */
	for (size_t size = sizeof(size_t) + 1; size < 256; size++) {
		memset(&out, 0xee, sizeof(out));
		out.region.size = size;
		if (!size_accepted(kvmfault_memslot_prepare(s.machine.library, &good, &out.region), size,
				   sizeof(region))) {
			CHECK(out.bytes[size] == 0xee && out.bytes[sizeof(size_t)] == 0xee,
			      "a refused size %zu, and something was written", size);
			continue;
		}
		slot = good;
		slot.len = 0;
		region.size = sizeof(region);
		OK(kvmfault_memslot_prepare(s.machine.library, &slot, &region));
		for (size_t i = size; i < sizeof(out); i++)
			CHECK(out.bytes[i] == 0xee, "with size %zu byte %zu was written", size, i);
		for (size_t i = sizeof(struct kvmfault_region); i < size; i++)
			CHECK(out.bytes[i] == 0, "with size %zu byte %zu is %#x, not 0", size, i, out.bytes[i]);
	}
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void wrong_blocks(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	uint8_t *memory = map_memfd(4 * SPARE_LEN);
	const struct {
		uint64_t offset, len;
	} cases[] = {
		{ PAGE, SPARE_LEN },     /* begins after the slot */
		{ 0, SPARE_LEN - PAGE }, /* ends before it */
		{ 1, 2 * SPARE_LEN },    /* unaligned */
		{ 0, SPARE_LEN + 1 },
		{ 0, -PAGE },                     /* wraps */
		{ 2 * SPARE_LEN, 2 * SPARE_LEN }, /* elsewhere */
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct kvmfault_memslot slot = spare_slot_on(memory);
		slot.block_hva = memory + cases[i].offset;
		slot.block_len = cases[i].len;
		spare_slot_refused(&s, &slot, EINVAL, cases[i].len % PAGE ? "len" : "block");
	}
	struct kvmfault_memslot slot = spare_slot_on(memory);
	slot.block_len = SPARE_LEN;
	spare_slot_refused(&s, &slot, EINVAL, "block_len");
	slot.block_hva = memory;
	slot.block_len = 0;
	spare_slot_refused(&s, &slot, EINVAL, "block_len");
	slot.block_len = 4 * SPARE_LEN;
	spare_slot_accepted(&s, &slot);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* Memory that isn't there, isn't usable, or isn't what it is said to be. */
static void wrong_memory(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	struct kvmfault_memslot slot;

	uint8_t *memory = map_memfd(SPARE_LEN);
	SYS(munmap(memory, SPARE_LEN));
	slot = spare_slot_on(memory);
	spare_slot_refused(&s, &slot, EFAULT, "hva");
	slot.hva = (void *)PAGE;
	spare_slot_refused(&s, &slot, EFAULT, "hva");

	for (uint64_t hole = 0; hole < SPARE_PAGES; hole += SPARE_PAGES / 2 - 1) {
		memory = map_memfd(SPARE_LEN);
		SYS(munmap(memory + hole * PAGE, PAGE));
		slot = spare_slot_on(memory);
		spare_slot_refused(&s, &slot, EFAULT, "hva");
		munmap(memory, SPARE_LEN);
	}
	static const int rights[] = { PROT_NONE, PROT_READ, PROT_READ | PROT_EXEC };
	for (size_t i = 0; i < sizeof(rights) / sizeof(*rights); i++) {
		memory = map_memfd(SPARE_LEN);
		SYS(mprotect(memory + 5 * PAGE, PAGE, rights[i]));
		slot = spare_slot_on(memory);
		spare_slot_refused(&s, &slot, EACCES, "hva");
		SYS(mprotect(memory, SPARE_LEN, PROT_READ | PROT_WRITE));
		spare_slot_accepted(&s, &slot);
	}

	/* Declared as another kind. */
	uint8_t *anon = map_anon(SPARE_LEN), *shared = map_memfd(SPARE_LEN);
	const struct {
		uint8_t *memory;
		int declared;
	} kinds[] = {
		{ anon, KVMFAULT_MEMORY_SHARED },
		{ anon, KVMFAULT_MEMORY_HUGETLB },
		{ shared, KVMFAULT_MEMORY_ANON },
		{ shared, KVMFAULT_MEMORY_HUGETLB },
	};
	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
		slot = spare_slot_on(kinds[i].memory);
		slot.memory = kinds[i].declared;
		slot.flags = KVMFAULT_MEMSLOT_VCPU_ONLY;
		spare_slot_refused(&s, &slot, EINVAL, "memory");
	}

	/* Two kinds in one slot. */
	CHECK(mmap(shared + SPARE_LEN / 2, SPARE_LEN / 2, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED,
	      "mmap: %s", strerror(errno));
	slot = spare_slot_on(shared);
	spare_slot_refused(&s, &slot, EINVAL, "hva");

	/* A file that is no memory. */
	int self = SYS(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
	memory = mmap(NULL, SPARE_LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE, self, 0);
	CHECK(memory != MAP_FAILED, "mmap: %s", strerror(errno));
	slot = spare_slot_on(memory);
	slot.len = 2 * PAGE;
	spare_slot_refused(&s, &slot, EINVAL, "hva");

	/* Private memory with something in it: absent it can't be. */
	slot = spare_slot_on(anon);
	slot.flags = KVMFAULT_MEMSLOT_VCPU_ONLY;
	anon[17 * PAGE] = 1;
	spare_slot_refused(&s, &slot, EEXIST, "hva");
	EQUAL("what was in it", anon[17 * PAGE], 1);
	SYS(madvise(anon, SPARE_LEN, MADV_DONTNEED));
	spare_slot_accepted(&s, &slot);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void wrong_hugetlb(void)
{
	struct intact_vm s;
	struct ram huge;
	intact_vm_create(&s);
	ram_create(&huge, HUGETLB, 2 * HUGE_PAGE);
	const struct kvmfault_memslot good = slot_on(&huge, SPARE_SLOT, SPARE_GPA);
	struct kvmfault_memslot slot = good;

	slot.memory = KVMFAULT_MEMORY_SHARED;
	spare_slot_refused(&s, &slot, EINVAL, "memory");
	slot.memory = KVMFAULT_MEMORY_ANON;
	spare_slot_refused(&s, &slot, EINVAL, "memory");
	slot = good;
	slot.gpa += PAGE;
	spare_slot_refused(&s, &slot, EINVAL, "gpa");
	slot = good;
	slot.len -= PAGE;
	spare_slot_refused(&s, &slot, EINVAL, "len");
	slot = good;
	slot.hva = huge.hva + PAGE;
	slot.len = HUGE_PAGE;
	spare_slot_refused(&s, &slot, EINVAL, "hva");
	spare_slot_accepted(&s, &good);

	/* The file is used by poison-trap only, and then it must be the right one. */
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	if (!(probe.mechanisms_hugetlb & 1 << KVMFAULT_MECHANISM_MEMSLOT_FLAG) &&
	    probe.mechanisms_hugetlb & 1 << KVMFAULT_MECHANISM_POISON_TRAP) {
		slot = good;
		slot.fd = closed_fd();
		spare_slot_refused(&s, &slot, EBADF, "fd");
		slot.fd = s.ram.fd;
		spare_slot_refused(&s, &slot, EINVAL, "fd");
		slot.fd = s.machine.vm;
		spare_slot_refused(&s, &slot, EINVAL, "fd");
		slot = good;
		slot.fd_offset = HUGE_PAGE; /* the second page twice, and the first never */
		spare_slot_refused(&s, &slot, EINVAL, "fd_offset");
		spare_slot_accepted(&s, &good);
	}
	intact_vm_check(&s);
	intact_vm_destroy(&s);
	ram_destroy(&huge);
}

static const struct test_case cases[] = {
	{ "null-arguments", null_arguments, false }, { "wrong-ranges", wrong_ranges, false },
	{ "wrong-numbers", wrong_numbers, false },   { "wrong-sizes", wrong_sizes, false },
	{ "wrong-blocks", wrong_blocks, false },     { "wrong-memory", wrong_memory, false },
	{ "wrong-hugetlb", wrong_hugetlb, false },
};
TEST_MAIN(cases)
