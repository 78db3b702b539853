/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memslots that kvmfault_memslot_set and kvmfault_memslot_prepare must refuse for what there is
 * already: another slot, another userfaultfd, a region of KVM, a mechanism, or nothing.
 */
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
		struct kvmfault_memslot slot = spare_slot_on(memory);
		slot.gpa = cases[i].gpa;
		slot.len = cases[i].len;
		spare_slot_refused(&s, &slot, EEXIST, "gpa");
	}
	/* Neighbours don't overlap. */
	struct kvmfault_memslot slot = spare_slot_on(memory);
	slot.gpa = INTACT_VM_GPA + INTACT_VM_LEN;
	spare_slot_accepted(&s, &slot);
	slot.gpa = INTACT_VM_GPA - slot.len;
	spare_slot_accepted(&s, &slot);

	/* In host memory, slots may share what they name as one block, and nothing else. */
	slot = spare_slot_on(s.ram.hva + INTACT_VM_LEN - PAGE);
	slot.len = 2 * PAGE;
	CHECK(mmap(s.ram.hva + INTACT_VM_LEN, PAGE, PROT_READ | PROT_WRITE,
		   MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != MAP_FAILED ||
		      errno == EEXIST,
	      "mmap behind the intact VM's memory: %s", strerror(errno));
	spare_slot_refused(&s, &slot, EINVAL, "hva");
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/*
 * Taken already: memory of another userfaultfd, guest memory that the VMM itself has given to KVM.
 */
static void taken_already(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	uint8_t *memory = map_memfd(SPARE_LEN);
	struct kvmfault_memslot slot = spare_slot_on(memory);
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register registration = { .range = { (uintptr_t)memory, SPARE_LEN },
						.mode = UFFDIO_REGISTER_MODE_MISSING };

	int uffd = new_uffd();
	SYS(ioctl(uffd, UFFDIO_API, &api));
	SYS(ioctl(uffd, UFFDIO_REGISTER, &registration));
	spare_slot_refused(&s, &slot, EBUSY, "userfaultfd");
	spare_slot_refused(&s, &slot, EBUSY, "userfaultfd"); /* its registration was left alone */
	close(uffd);
	spare_slot_accepted(&s, &slot);

	struct kvm_userspace_memory_region own = {
		.slot = SPARE_SLOT + 1,
		.guest_phys_addr = SPARE_GPA + SPARE_LEN / 2,
		.memory_size = SPARE_LEN,
		.userspace_addr = (uintptr_t)map_anon(SPARE_LEN),
	};
	SYS(ioctl(s.machine.vm, KVM_SET_USER_MEMORY_REGION, &own));
	REFUSED(kvmfault_memslot_set(s.machine.library, &slot), EEXIST, "KVM_SET_USER_MEMORY_REGION");
	REFUSED(kvmfault_memslot_mechanism(s.machine.library, slot.slot), ENOENT, "slot");
	REFUSED(kvmfault_pages_state(s.machine.library, SPARE_GPA), ENOENT, "gpa");
	memory[0] = 1; /* must not wait */
	own.memory_size = 0;
	SYS(ioctl(s.machine.vm, KVM_SET_USER_MEMORY_REGION, &own));
	spare_slot_accepted(&s, &slot);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* A live slot is to become something that KVM refuses: it stays what it was, with its pages. */
static void changes_that_fail(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	struct kvm_userspace_memory_region own = {
		.slot = SPARE_SLOT + 1,
		.guest_phys_addr = SPARE_GPA,
		.memory_size = SPARE_LEN,
		.userspace_addr = (uintptr_t)map_anon(SPARE_LEN),
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
	slot = spare_slot_on(map_memfd(SPARE_LEN)); /* other memory */
	slot.slot = RAM_SLOT;
	REFUSED(kvmfault_memslot_set(s.machine.library, &slot), EEXIST, "KVM_SET_USER_MEMORY_REGION");
	intact_vm_check(&s);

	/* Host threads still wait for absent pages, too. */
	unsigned page = s.next++;
	EQUAL("what a host thread reads", *(volatile uint64_t *)(s.ram.hva + page * PAGE),
	      pattern_word(&s.source.pattern, page, 0));
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
	struct kvmfault_memslot slot = spare_slot_on(map_anon(SPARE_LEN));
	spare_slot_refused(&s, &slot, EOPNOTSUPP, "poison-trap");
	slot.flags = KVMFAULT_MEMSLOT_VCPU_ONLY;
	spare_slot_accepted(&s, &slot);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void slots_that_are_not_there(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	struct kvmfault_memslot slot = spare_slot_on(NULL);
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
	{ "overlapping", overlapping, false },
	{ "taken-already", taken_already, false },
	{ "changes-that-fail", changes_that_fail, false },
	{ "forced-mechanism", forced_mechanism, false },
	{ "slots-that-are-not-there", slots_that_are_not_there, false },
};
TEST_MAIN(cases)
