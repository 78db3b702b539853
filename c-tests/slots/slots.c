/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memslots as VMMs set them: two on one piece of memory, windows of a larger block, deleted and
 * made anew, moved.
 */
#define _GNU_SOURCE
#include "hva_vm.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

static void one_range_twice(void)
{
	hva_vm_set_up(MEMFD, PAGES);
	machine_set_slot(&hva_vm.m, &hva_vm.ram, RAM_SLOT, RAM_GPA);
	machine_set_slot(&hva_vm.m, &hva_vm.ram, OTHER_SLOT, OTHER_GPA);
	/* the guest may be ahead of the counters */
	UNTIL(kvmfault_pages_absent(hva_vm.m.library) == PAGES);
	struct vcpu *v = hva_vm_add_vcpu(3);
	hva_vm_check_pages(v, RAM_GPA, 0, PAGES / 2);
	hva_vm_check_pages(v, OTHER_GPA, PAGES / 2, PAGES / 2);
	/* the guest may be ahead of the counters */
	UNTIL(kvmfault_pages_absent(hva_vm.m.library) == 0);
	hva_vm_check_pages(v, RAM_GPA, 0, PAGES);
	hva_vm_check_pages(v, OTHER_GPA, 0, PAGES);
	hva_vm_check_pages(hva_vm_add_vcpu(0), OTHER_GPA, 0, PAGES);
	EQUAL("resolver calls", hva_vm.source.total, PAGES);

	/*
	 * A discard through one slot is one for both; what the guest writes through one it sees
	 * through the other.
	 */
	OK(kvmfault_pages_discard(hva_vm.m.library, OTHER_GPA, 4 * PAGE));
	EQUAL("state through the other", kvmfault_pages_state(hva_vm.m.library, RAM_GPA + PAGE), KVMFAULT_PAGE_ABSENT);
	hva_vm.steps[0] = (struct step){ WRITE64, RAM_GPA + PAGE, 99, 0 };
	hva_vm.steps[1] = (struct step){ READ64, OTHER_GPA + PAGE, 0, 0 };
	hva_vm.steps[2] = (struct step){ READ64, OTHER_GPA + PAGE + 8, 0, 0 };
	hva_vm.steps[3] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, hva_vm.steps_gpa);
	EQUAL("stop", vcpu_run(v), 0);
	EQUAL("written here, read there", hva_vm.steps[1].value, 99);
	EQUAL("beside it", hva_vm.steps[2].value, pattern_word(&hva_vm.source.pattern, 1, 1));

	/* Without one of them the other goes on. */
	hva_vm_delete_slot(RAM_SLOT, 0);
	OK(kvmfault_pages_discard(hva_vm.m.library, OTHER_GPA, hva_vm.ram.len));
	hva_vm_check_pages(v, OTHER_GPA, 0, PAGES);
	EQUAL("state in the deleted slot", kvmfault_pages_state(hva_vm.m.library, RAM_GPA), -ENOENT);
	hva_vm_tear_down();
}

/* One memory in both of KVM's address spaces, as for system management mode. */
static void address_spaces(void)
{
	hva_vm_set_up(MEMFD, PAGES);
	if (ioctl(hva_vm.m.vm, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE) < 2)
		skip("KVM_CAP_MULTI_ADDRESS_SPACE is below 2 here");
	machine_set_slot(&hva_vm.m, &hva_vm.ram, RAM_SLOT, RAM_GPA);
	/* the same address: no overlap */
	machine_set_slot(&hva_vm.m, &hva_vm.ram, 1u << 16 | RAM_SLOT, RAM_GPA);
	/* the guest may be ahead of the counters */
	UNTIL(kvmfault_pages_absent(hva_vm.m.library) == PAGES);
	struct vcpu *v = hva_vm_add_vcpu(3);
	hva_vm_check_pages(v, RAM_GPA, 0, PAGES / 2);
	hva_vm_delete_slot(RAM_SLOT, 0);
	/* The guest may be ahead of the counters. */
	UNTIL(kvmfault_pages_state(hva_vm.m.library, RAM_GPA + hva_vm.list[0] * PAGE) == KVMFAULT_PAGE_PRESENT);
	machine_set_slot(&hva_vm.m, &hva_vm.ram, RAM_SLOT, RAM_GPA);
	hva_vm_check_pages(v, RAM_GPA, 0, PAGES);
	EQUAL("resolver calls", hva_vm.source.total, PAGES);
	hva_vm_tear_down();
}

/* Two windows of one block in reverse order, and between them pages in no slot. */
static void windows(void)
{
	hva_vm_set_up(MEMFD, PAGES);
	struct kvmfault_memslot slot = slot_on(&hva_vm.ram, RAM_SLOT, RAM_GPA);
	slot.block_hva = hva_vm.ram.hva;
	slot.block_len = hva_vm.ram.len;
	slot.len = 16 * PAGE;
	slot.hva = hva_vm.ram.hva + 40 * PAGE;
	OK(kvmfault_memslot_set(hva_vm.m.library, &slot));
	slot.slot = OTHER_SLOT;
	slot.gpa = OTHER_GPA;
	slot.hva = hva_vm.ram.hva + 8 * PAGE;
	OK(kvmfault_memslot_set(hva_vm.m.library, &slot));
	struct vcpu *v = hva_vm_add_vcpu(3);
	list_sequential(hva_vm.list, PAGES);
	/* verify.S counts pages from the block's start, wherever that would be. */
	hva_vm_check_pages(v, RAM_GPA - 40 * PAGE, 40, 16);
	hva_vm_check_pages(v, OTHER_GPA - 8 * PAGE, 8, 16);
	EQUAL("resolver calls", hva_vm.source.total, 32);
	/* the guest may be ahead of the counters */
	UNTIL(kvmfault_pages_absent(hva_vm.m.library) == PAGES - 32);
	EQUAL("beyond a window", kvmfault_pages_state(hva_vm.m.library, RAM_GPA + 16 * PAGE), -ENOENT);
	REFUSED(kvmfault_pages_discard(hva_vm.m.library, RAM_GPA + 8 * PAGE, 16 * PAGE), EINVAL, "len");
	hva_vm_tear_down();
}

/* A slot is deleted and made anew in another shape, as QEMU does: with KEEP the states stay. */
static void kept(void)
{
	hva_vm_set_up(MEMFD, PAGES);
	struct kvmfault_memslot slot = slot_on(&hva_vm.ram, RAM_SLOT, RAM_GPA);
	slot.block_hva = hva_vm.ram.hva;
	slot.block_len = hva_vm.ram.len;
	OK(kvmfault_memslot_set(hva_vm.m.library, &slot));
	struct vcpu *v = hva_vm_add_vcpu(3);
	hva_vm_check_pages(v, RAM_GPA, 0, PAGES / 2);
	hva_vm_delete_slot(RAM_SLOT, KVMFAULT_MEMSLOT_KEEP);
	EQUAL("state without a slot", kvmfault_pages_state(hva_vm.m.library, RAM_GPA), -ENOENT);
	/* The two halves separately. */
	slot.len = hva_vm.ram.len / 2;
	OK(kvmfault_memslot_set(hva_vm.m.library, &slot));
	slot.slot = OTHER_SLOT;
	slot.gpa += slot.len;
	slot.hva = hva_vm.ram.hva + slot.len;
	OK(kvmfault_memslot_set(hva_vm.m.library, &slot));
	/* the guest may be ahead of the counters */
	UNTIL(kvmfault_pages_absent(hva_vm.m.library) == PAGES / 2);
	hva_vm_check_pages(v, RAM_GPA, 0, PAGES);
	EQUAL("resolver calls", hva_vm.source.total, PAGES);
	for (int page = 0; page < PAGES; page++)
		EQUAL("calls for a page", hva_vm.source.calls[page], 1);
	hva_vm_tear_down();
}

/*
 * Without KEEP the memory becomes ordinary: pages that came stay, the others read as zeros, and the
 * resolver is not called.
 */
static void forgotten(enum backing backing)
{
	static const uint8_t zeros[PAGE];
	hva_vm_set_up(backing, PAGES);
	machine_set_slot(&hva_vm.m, &hva_vm.ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = hva_vm_add_vcpu(3);
	hva_vm_check_pages(v, RAM_GPA, 0, PAGES / 2);
	hva_vm_delete_slot(RAM_SLOT, 0);
	for (unsigned i = 0; i < PAGES; i++) {
		if (i < PAGES / 2)
			pattern_check(&hva_vm.source.pattern, hva_vm.ram.hva + hva_vm.list[i] * PAGE, hva_vm.list[i],
				      1);
		else
			CHECK(!memcmp(hva_vm.ram.hva + hva_vm.list[i] * PAGE, zeros, PAGE), "page %u isn't zero",
			      hva_vm.list[i]);
	}
	EQUAL("resolver calls", hva_vm.source.total, PAGES / 2);
	/* the guest may be ahead of the counters */
	UNTIL(kvmfault_pages_absent(hva_vm.m.library) == 0);
	hva_vm_tear_down();
}

static void forgotten_memfd(void)
{
	forgotten(MEMFD);
}

static void forgotten_anon(void)
{
	forgotten(ANON);
}

/* A slot moves to another guest address. */
static void moved(void)
{
	hva_vm_set_up(MEMFD, PAGES);
	machine_set_slot(&hva_vm.m, &hva_vm.ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = hva_vm_add_vcpu(3);
	hva_vm_check_pages(v, RAM_GPA, 0, PAGES / 2);
	machine_set_slot(&hva_vm.m, &hva_vm.ram, RAM_SLOT, OTHER_GPA);
	hva_vm_check_pages(v, OTHER_GPA, 0, PAGES);
	EQUAL("resolver calls", hva_vm.source.total, PAGES);
	EQUAL("state at the old address", kvmfault_pages_state(hva_vm.m.library, RAM_GPA), -ENOENT);
	hva_vm.steps[0] = (struct step){ READ64, RAM_GPA, 0, 0 };
	hva_vm.steps[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, hva_vm.steps_gpa);
	int ret = kvmfault_vcpu_run(v->handle);
	CHECK(ret == KVMFAULT_PASS && v->run->exit_reason == KVM_EXIT_MMIO && v->run->mmio.phys_addr == RAM_GPA, "%s",
	      vcpu_describe(v, ret));
	hva_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "one-range-twice", one_range_twice, true },
	{ "address-spaces", address_spaces, true },
	{ "windows", windows, true },
	{ "kept", kept, true },
	{ "forgotten", forgotten_memfd, true },
	{ "forgotten-anon", forgotten_anon, true },
	{ "moved", moved, true },
};
TEST_MAIN(cases)
