/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memslots that kvmfault_memslot_set and kvmfault_memslot_prepare must refuse.
 */
#define _GNU_SOURCE
#include "intact_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SPARE_SLOT = 7, SPARE_PAGES = 64 };
#define SPARE_GPA (INTACT_VM_GPA + 2 * INTACT_VM_LEN) /* not a neighbour */
#define SPARE_LEN (SPARE_PAGES * PAGE)

/* A slot that is right: to be spoiled in one place. */
static struct kvmfault_memslot spare_on(void *memory)
{
	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	slot.slot = SPARE_SLOT;
	slot.gpa = SPARE_GPA;
	slot.len = SPARE_LEN;
	slot.hva = memory;
	return slot;
}

/* Both ways refuse it, and leave no trace: neither slot nor pages nor result. */
static void refuse(struct intact_vm *s, const struct kvmfault_memslot *slot, int error, const char *words)
{
	struct kvmfault_region region = KVMFAULT_REGION_INIT, before = region;
	bool taken = kvmfault_memslot_mechanism(s->machine.library, slot->slot) >= 0;
	REFUSED(kvmfault_memslot_set(s->machine.library, slot), error, words);
	REFUSED(kvmfault_memslot_prepare(s->machine.library, slot, &region), error, words);
	CHECK(!memcmp(&region, &before, sizeof(region)), "a prepare that failed has filled in the region");
	if (!taken)
		REFUSED(kvmfault_memslot_mechanism(s->machine.library, slot->slot), ENOENT, "slot");
	REFUSED(kvmfault_pages_state(s->machine.library, SPARE_GPA), ENOENT, "gpa");
}

/* What was refused in one way is accepted when it is right: nothing of the tries is left. Ends without the slot. */
static void accept(struct intact_vm *s, const struct kvmfault_memslot *slot)
{
	struct kvmfault_memslot gone = KVMFAULT_MEMSLOT_INIT;
	gone.slot = slot->slot;
	OK(kvmfault_memslot_set(s->machine.library, slot));
	EQUAL("a new page", OK(kvmfault_pages_state(s->machine.library, slot->gpa)),
	      slot->flags & KVMFAULT_MEMSLOT_PRESENT ? KVMFAULT_PAGE_PRESENT : KVMFAULT_PAGE_ABSENT);
	OK(kvmfault_memslot_set(s->machine.library, &gone));
}

static void null_arguments(void)
{
	struct intact_vm s;
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	intact_vm_create(&s);
	struct kvmfault_memslot slot = spare_on(map_memfd(SPARE_LEN));

	REFUSED(kvmfault_memslot_set(s.machine.library, NULL), EINVAL, "slot");
	REFUSED(kvmfault_memslot_prepare(s.machine.library, NULL, &region), EINVAL, "slot");
	REFUSED(kvmfault_memslot_prepare(s.machine.library, &slot, NULL), EINVAL, "region");
	slot.hva = NULL;
	refuse(&s, &slot, EINVAL, "hva");
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
		struct kvmfault_memslot slot = spare_on(memory);
		slot.gpa = cases[i].gpa;
		slot.len = cases[i].len;
		slot.hva = (void *)((uintptr_t)memory + cases[i].hva_offset);
		refuse(&s, &slot, EINVAL, cases[i].words);
		intact_vm_check(&s);
	}
	struct kvmfault_memslot slot = spare_on(memory);
	accept(&s, &slot);
	intact_vm_destroy(&s);
}

static void wrong_numbers(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	const struct kvmfault_memslot good = spare_on(map_memfd(SPARE_LEN));
	struct kvmfault_memslot slot;
	int slots = SYS(ioctl(s.machine.vm, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS));
	int spaces = SYS(ioctl(s.machine.vm, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE));

	for (const uint32_t *bad = (const uint32_t[]){ slots, slots + 1, 0xffff, 0 }; *bad; bad++) {
		slot = good;
		slot.slot = *bad;
		refuse(&s, &slot, EINVAL, "slot");
	}
	for (const uint32_t *bad = (const uint32_t[]){ spaces ? spaces : 1, 0x7fff, 0xffff, 0 }; *bad; bad++) {
		slot = good;
		slot.slot |= *bad << 16;
		refuse(&s, &slot, EINVAL, "slot");
	}
	for (const int *bad = (const int[]){ -1, 4, INT_MAX, INT_MIN, 0 }; *bad; bad++) {
		slot = good;
		slot.memory = *bad;
		refuse(&s, &slot, EINVAL, "memory");
	}
	for (int bit = 4; bit < 32; bit++) {
		slot = good;
		slot.flags = 1u << bit;
		refuse(&s, &slot, EINVAL, "flags");
	}
	for (int bit = 2; bit < 32; bit++) {
		slot = good;
		slot.kvm_flags = 1u << bit;
		refuse(&s, &slot, EINVAL, "kvm_flags");
	}
	for (int bit = 0; bit < 32; bit++) {
		slot = good;
		slot.reserved = 1u << bit;
		refuse(&s, &slot, EINVAL, "reserved");
	}
	slot = good;
	slot.flags = KVMFAULT_MEMSLOT_KEEP; /* says how to delete */
	refuse(&s, &slot, EINVAL, "KEEP");
	slot = good;
	slot.slot = slots - 1;
	accept(&s, &slot);
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
	const struct kvmfault_memslot good = spare_on(map_memfd(SPARE_LEN));
	struct kvmfault_region region = KVMFAULT_REGION_INIT;

	for (const size_t *bad = (const size_t[]){ 1, 7, 8, 4097, SIZE_MAX, 0 }; *bad; bad++) {
		struct kvmfault_memslot slot = good;
		slot.size = *bad;
		refuse(&s, &slot, EINVAL, "slot.size");
		region.size = *bad;
		REFUSED(kvmfault_memslot_prepare(s.machine.library, &good, &region), EINVAL, "region.size");
	}
	struct kvmfault_memslot slot = good;
	slot.size = 0;
	refuse(&s, &slot, EINVAL, "slot.size");

	/* Longer: only with nothing behind what is known. */
	for (size_t size = sizeof(good) + 1; size <= sizeof(good) + 9; size++) {
		memset(&in, 0, sizeof(in));
		in.slot = good;
		in.slot.size = size;
		accept(&s, &in.slot);
		in.bytes[size - 1] = 0x80;
		refuse(&s, &in.slot, E2BIG, "slot.size");
	}
	/* Shorter: the rest has its initial value; so a structure that ends after `hva` is a whole slot. */
	slot = good;
	slot.size = offsetof(struct kvmfault_memslot, block_hva);
	slot.memory = slot.fd = slot.reserved = 0x7777777;
	accept(&s, &slot);

	/* The result is written as far as the caller has room, and zero where we know nothing. */
	for (size_t size = sizeof(size_t) + 1; size < 256; size++) {
		memset(&out, 0xee, sizeof(out));
		out.region.size = size;
		if (!size_accepted(kvmfault_memslot_prepare(s.machine.library, &good, &out.region), size, sizeof(region))) {
			CHECK(out.bytes[size] == 0xee && out.bytes[sizeof(size_t)] == 0xee, "a refused size %zu, and something was written", size);
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

static void overlapping(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	uint8_t *memory = map_memfd(2 * INTACT_VM_LEN);
	const struct {
		uint64_t gpa, len;
	} cases[] = {
		{ INTACT_VM_GPA, INTACT_VM_LEN },
		{ INTACT_VM_GPA, PAGE },
		{ INTACT_VM_GPA + INTACT_VM_LEN - PAGE, PAGE },
		{ INTACT_VM_GPA + INTACT_VM_LEN - PAGE, 2 * PAGE },
		{ INTACT_VM_GPA - PAGE, 2 * PAGE },
		{ INTACT_VM_GPA - PAGE, INTACT_VM_LEN + 2 * PAGE },
		{ INTACT_VM_GPA + 8 * PAGE, 8 * PAGE },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct kvmfault_memslot slot = spare_on(memory);
		slot.gpa = cases[i].gpa;
		slot.len = cases[i].len;
		refuse(&s, &slot, EEXIST, "gpa");
	}
	/* Neighbours don't overlap. */
	struct kvmfault_memslot slot = spare_on(memory);
	slot.gpa = INTACT_VM_GPA + INTACT_VM_LEN;
	accept(&s, &slot);
	slot.gpa = INTACT_VM_GPA - slot.len;
	accept(&s, &slot);

	/* In host memory, slots may share what they name as one block, and nothing else. */
	slot = spare_on(s.ram.hva + INTACT_VM_LEN - PAGE);
	slot.len = 2 * PAGE;
	CHECK(mmap(s.ram.hva + INTACT_VM_LEN, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != MAP_FAILED ||
	      errno == EEXIST, "mmap behind the subject's memory: %s", strerror(errno));
	refuse(&s, &slot, EINVAL, "hva");
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
		{ PAGE, SPARE_LEN },                 /* begins after the slot */
		{ 0, SPARE_LEN - PAGE },             /* ends before it */
		{ 1, 2 * SPARE_LEN },                /* unaligned */
		{ 0, SPARE_LEN + 1 },
		{ 0, -PAGE },                        /* wraps */
		{ 2 * SPARE_LEN, 2 * SPARE_LEN },    /* elsewhere */
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct kvmfault_memslot slot = spare_on(memory);
		slot.block_hva = memory + cases[i].offset;
		slot.block_len = cases[i].len;
		refuse(&s, &slot, EINVAL, cases[i].len % PAGE ? "len" : "block");
	}
	struct kvmfault_memslot slot = spare_on(memory);
	slot.block_len = SPARE_LEN;
	refuse(&s, &slot, EINVAL, "block_len");
	slot.block_hva = memory;
	slot.block_len = 0;
	refuse(&s, &slot, EINVAL, "block_len");
	slot.block_len = 4 * SPARE_LEN;
	accept(&s, &slot);
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
	slot = spare_on(memory);
	refuse(&s, &slot, EFAULT, "hva");
	slot.hva = (void *)PAGE;
	refuse(&s, &slot, EFAULT, "hva");

	for (uint64_t hole = 0; hole < SPARE_PAGES; hole += SPARE_PAGES / 2 - 1) {
		memory = map_memfd(SPARE_LEN);
		SYS(munmap(memory + hole * PAGE, PAGE));
		slot = spare_on(memory);
		refuse(&s, &slot, EFAULT, "hva");
		munmap(memory, SPARE_LEN);
	}
	static const int rights[] = { PROT_NONE, PROT_READ, PROT_READ | PROT_EXEC };
	for (size_t i = 0; i < sizeof(rights) / sizeof(*rights); i++) {
		memory = map_memfd(SPARE_LEN);
		SYS(mprotect(memory + 5 * PAGE, PAGE, rights[i]));
		slot = spare_on(memory);
		refuse(&s, &slot, EACCES, "hva");
		SYS(mprotect(memory, SPARE_LEN, PROT_READ | PROT_WRITE));
		accept(&s, &slot);
	}

	/* Declared as another kind. */
	uint8_t *anon = map_anon(SPARE_LEN), *shared = map_memfd(SPARE_LEN);
	const struct {
		uint8_t *memory;
		int declared;
	} kinds[] = {
		{ anon, KVMFAULT_MEMORY_SHARED }, { anon, KVMFAULT_MEMORY_HUGETLB },
		{ shared, KVMFAULT_MEMORY_ANON }, { shared, KVMFAULT_MEMORY_HUGETLB },
	};
	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
		slot = spare_on(kinds[i].memory);
		slot.memory = kinds[i].declared;
		slot.flags = KVMFAULT_MEMSLOT_VCPU_ONLY;
		refuse(&s, &slot, EINVAL, "memory");
	}

	/* Two kinds in one slot. */
	CHECK(mmap(shared + SPARE_LEN / 2, SPARE_LEN / 2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED,
	      "mmap: %s", strerror(errno));
	slot = spare_on(shared);
	refuse(&s, &slot, EINVAL, "hva");

	/* A file that is no memory. */
	int self = SYS(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
	memory = mmap(NULL, SPARE_LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE, self, 0);
	CHECK(memory != MAP_FAILED, "mmap: %s", strerror(errno));
	slot = spare_on(memory);
	slot.len = 2 * PAGE;
	refuse(&s, &slot, EINVAL, "hva");

	/* Private memory with something in it: absent it can't be. */
	slot = spare_on(anon);
	slot.flags = KVMFAULT_MEMSLOT_VCPU_ONLY;
	anon[17 * PAGE] = 1;
	refuse(&s, &slot, EEXIST, "hva");
	EQUAL("what was in it", anon[17 * PAGE], 1);
	SYS(madvise(anon, SPARE_LEN, MADV_DONTNEED));
	accept(&s, &slot);
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
	refuse(&s, &slot, EINVAL, "memory");
	slot.memory = KVMFAULT_MEMORY_ANON;
	refuse(&s, &slot, EINVAL, "memory");
	slot = good;
	slot.gpa += PAGE;
	refuse(&s, &slot, EINVAL, "gpa");
	slot = good;
	slot.len -= PAGE;
	refuse(&s, &slot, EINVAL, "len");
	slot = good;
	slot.hva = huge.hva + PAGE;
	slot.len = HUGE_PAGE;
	refuse(&s, &slot, EINVAL, "hva");
	accept(&s, &good);

	/* The file is used by poison-trap only, and then it must be the right one. */
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	if (!(probe.mechanisms_hugetlb & 1 << KVMFAULT_MECHANISM_MEMSLOT_FLAG) &&
	    probe.mechanisms_hugetlb & 1 << KVMFAULT_MECHANISM_POISON_TRAP) {
		slot = good;
		slot.fd = closed_fd();
		refuse(&s, &slot, EBADF, "fd");
		slot.fd = s.ram.fd;
		refuse(&s, &slot, EINVAL, "fd");
		slot.fd = s.machine.vm;
		refuse(&s, &slot, EINVAL, "fd");
		slot = good;
		slot.fd_offset = HUGE_PAGE; /* the second page twice, and the first never */
		refuse(&s, &slot, EINVAL, "fd_offset");
		accept(&s, &good);
	}
	intact_vm_check(&s);
	intact_vm_destroy(&s);
	ram_destroy(&huge);
}

/* Somebody else's business: memory of another userfaultfd, guest memory that KVM has from the VMM itself. */
static void taken_already(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	uint8_t *memory = map_memfd(SPARE_LEN);
	struct kvmfault_memslot slot = spare_on(memory);
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register registration = { .range = { (uintptr_t)memory, SPARE_LEN }, .mode = UFFDIO_REGISTER_MODE_MISSING };

	int uffd = new_uffd();
	SYS(ioctl(uffd, UFFDIO_API, &api));
	SYS(ioctl(uffd, UFFDIO_REGISTER, &registration));
	refuse(&s, &slot, EBUSY, "userfaultfd");
	refuse(&s, &slot, EBUSY, "userfaultfd"); /* its registration was left alone */
	close(uffd);
	accept(&s, &slot);

	struct kvm_userspace_memory_region own = {
		.slot = SPARE_SLOT + 1, .guest_phys_addr = SPARE_GPA + SPARE_LEN / 2, .memory_size = SPARE_LEN,
		.userspace_addr = (uintptr_t)map_anon(SPARE_LEN),
	};
	SYS(ioctl(s.machine.vm, KVM_SET_USER_MEMORY_REGION, &own));
	REFUSED(kvmfault_memslot_set(s.machine.library, &slot), EEXIST, "KVM_SET_USER_MEMORY_REGION");
	REFUSED(kvmfault_memslot_mechanism(s.machine.library, slot.slot), ENOENT, "slot");
	REFUSED(kvmfault_pages_state(s.machine.library, SPARE_GPA), ENOENT, "gpa");
	memory[0] = 1; /* must not wait for anybody */
	own.memory_size = 0;
	SYS(ioctl(s.machine.vm, KVM_SET_USER_MEMORY_REGION, &own));
	accept(&s, &slot);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* A live slot is to become something that KVM refuses: it stays what it was, with its pages. */
static void changes_that_fail(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	struct kvm_userspace_memory_region own = {
		.slot = SPARE_SLOT + 1, .guest_phys_addr = SPARE_GPA, .memory_size = SPARE_LEN, .userspace_addr = (uintptr_t)map_anon(SPARE_LEN),
	};
	SYS(ioctl(s.machine.vm, KVM_SET_USER_MEMORY_REGION, &own));
	const struct kvmfault_memslot as_it_is = slot_on(&s.ram, RAM_SLOT, INTACT_VM_GPA);
	struct kvmfault_memslot slot;

	slot = as_it_is; /* moved */
	slot.gpa = SPARE_GPA;
	REFUSED(kvmfault_memslot_set(s.machine.library, &slot), EEXIST, "KVM_SET_USER_MEMORY_REGION");
	intact_vm_check(&s);
	slot = as_it_is; /* a part of it, moved */
	slot.gpa = SPARE_GPA;
	slot.len = SPARE_LEN;
	slot.block_hva = s.ram.hva;
	slot.block_len = s.ram.len;
	REFUSED(kvmfault_memslot_set(s.machine.library, &slot), EEXIST, "KVM_SET_USER_MEMORY_REGION");
	intact_vm_check(&s);
	slot = spare_on(map_memfd(SPARE_LEN)); /* other memory */
	slot.slot = RAM_SLOT;
	REFUSED(kvmfault_memslot_set(s.machine.library, &slot), EEXIST, "KVM_SET_USER_MEMORY_REGION");
	intact_vm_check(&s);

	/* Host threads still wait for absent pages, too. */
	unsigned page = s.next++;
	EQUAL("what a host thread reads", *(volatile uint64_t *)(s.ram.hva + page * PAGE), pattern_word(&s.source.pattern, page, 0));
	intact_vm_learn(&s);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* A forced mechanism that can serve some memory, but not this. */
static void forced_mechanism(void)
{
	struct intact_vm s;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	if (!(probe.mechanisms_shared & 1 << KVMFAULT_MECHANISM_POISON_TRAP))
		skip("poison-trap doesn't work here");
	options.mechanism = KVMFAULT_MECHANISM_POISON_TRAP;
	intact_vm_create_with(&s, &options);
	struct kvmfault_memslot slot = spare_on(map_anon(SPARE_LEN));
	refuse(&s, &slot, EOPNOTSUPP, "poison-trap");
	slot.flags = KVMFAULT_MEMSLOT_VCPU_ONLY;
	accept(&s, &slot);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void slots_that_are_not_there(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	struct kvmfault_memslot slot = spare_on(NULL);
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	slot.len = 0;
	REFUSED(kvmfault_memslot_set(s.machine.library, &slot), ENOENT, "slot");
	REFUSED(kvmfault_memslot_prepare(s.machine.library, &slot, &region), ENOENT, "slot");
	slot.slot = RAM_SLOT | 1u << 16;
	REFUSED(kvmfault_memslot_set(s.machine.library, &slot), ENOENT, "slot");
	slot.slot = UINT32_MAX;
	REFUSED(kvmfault_memslot_set(s.machine.library, &slot), ENOENT, "slot");
	for (const uint32_t *bad = (const uint32_t[]){ SPARE_SLOT, RAM_SLOT | 1u << 16, UINT32_MAX, 0 }; *bad; bad++) {
		REFUSED(kvmfault_memslot_set_fast_only(s.machine.library, *bad, 1), ENOENT, "slot");
		REFUSED(kvmfault_memslot_set_fast_only(s.machine.library, *bad, 0), ENOENT, "slot");
		REFUSED(kvmfault_memslot_mechanism(s.machine.library, *bad), ENOENT, "slot");
	}
	for (const int *bad = (const int[]){ -1, 2, INT_MAX, INT_MIN, 0 }; *bad; bad++)
		REFUSED(kvmfault_memslot_set_fast_only(s.machine.library, RAM_SLOT, *bad), EINVAL, "on");
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static const struct test_case cases[] = {
	{ "null-arguments", null_arguments, false },
	{ "wrong-ranges", wrong_ranges, false },
	{ "wrong-numbers", wrong_numbers, false },
	{ "wrong-sizes", wrong_sizes, false },
	{ "overlapping", overlapping, false },
	{ "wrong-blocks", wrong_blocks, false },
	{ "wrong-memory", wrong_memory, false },
	{ "wrong-hugetlb", wrong_hugetlb, false },
	{ "taken-already", taken_already, false },
	{ "changes-that-fail", changes_that_fail, false },
	{ "forced-mechanism", forced_mechanism, false },
	{ "slots-that-are-not-there", slots_that_are_not_there, false },
};
TEST_MAIN(cases)
