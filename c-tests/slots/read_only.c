/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KVM_MEM_READONLY: a mechanism serves such a slot, or is refused with the reason; a guest never
 * exits endlessly.
 */
#define _GNU_SOURCE
#include "abi.h"
#include "slot_vm.h"

#include <errno.h>
#include <stdio.h>

/* Can the case's mechanism serve such memory? */
static bool is_able(void)
{
	return test_mechanism() != KVMFAULT_MECHANISM_MEMSLOT_FLAG || expected_abi()->readonly;
}

/* The guest writes there: an MMIO exit for the VMM, which lets it go on. */
static void expect_write_exit(struct slot_vm *s, struct vcpu *v, uint64_t gpa)
{
	slot_vm_step(s, v, (struct step){ WRITE64, gpa, 42, 0 });
	int ret = kvmfault_vcpu_run(v->handle);
	CHECK(ret == KVMFAULT_PASS && v->run->exit_reason == KVM_EXIT_MMIO && v->run->mmio.is_write, "%s",
	      vcpu_describe(v, ret));
	EQUAL("the address", v->run->mmio.phys_addr, gpa);
	vcpu_run(v);
}

/* The guest reads what the resolver installed; its writes are the VMM's, as MMIO exits. */
static void expect_read_only(struct slot_vm *s)
{
	struct vcpu *v = slot_vm_add_vcpu(s, 3);
	slot_vm_visit(s, v, 0, s->pages / 2, READ_FIRST);
	expect_write_exit(s, v, RAM_GPA + 16);                         /* present */
	expect_write_exit(s, v, RAM_GPA + (s->pages - 1) * PAGE + 16); /* absent */
	slot_vm_visit(s, v, 0, s->pages, READ_FIRST);
	vcpu_detach(v);
}

/* With READONLY a mechanism works or is refused with the reason; a guest never exits endlessly. */
static void read_only(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct slot_vm s;
		slot_vm_attach(&s, backing, 64 * PAGE, test_mechanism(), NULL);
		struct kvmfault_memslot slot = slot_on(&s.ram, RAM_SLOT, RAM_GPA);
		slot.kvm_flags = KVM_MEM_READONLY;
		if (!is_able()) {
			REFUSED(kvmfault_memslot_set(s.m.library, &slot), EOPNOTSUPP, "READONLY");
			EQUAL("the slot", kvmfault_memslot_mechanism(s.m.library, RAM_SLOT), -ENOENT);
			slot.kvm_flags = 0;
			OK(kvmfault_memslot_set(s.m.library, &slot)); /* the memory is as it was */
			slot_vm_visit(&s, slot_vm_add_vcpu(&s, 3), 0, s.pages, WRITE_FIRST);
		} else {
			OK(kvmfault_memslot_set(s.m.library, &slot));
			expect_read_only(&s);
		}
		slot_vm_destroy(&s);
	}
}

/*
 * Without a mechanism forced, a read-only slot gets one that can, beside a writable slot that has
 * the flag.
 */
static void read_only_automatic(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		const struct abi *abi = expected_abi();
		struct slot_vm s;
		struct ram other;
		slot_vm_attach(&s, backing, 64 * PAGE, KVMFAULT_MECHANISM_AUTO, NULL);
		struct kvmfault_memslot slot = slot_on(&s.ram, RAM_SLOT, RAM_GPA);
		slot.kvm_flags = KVM_MEM_READONLY;
		OK(kvmfault_memslot_set(s.m.library, &slot));
		ram_create(&other, backing, 64 * PAGE);
		slot = slot_on(&other, RAM_SLOT + 1, RAM_GPA + (1ul << 30));
		OK(kvmfault_memslot_set(s.m.library, &slot));
		int with = kvmfault_memslot_mechanism(s.m.library, RAM_SLOT);
		int without = kvmfault_memslot_mechanism(s.m.library, RAM_SLOT + 1);
		printf("%s: read-only by %s, writable by %s\n", backing_name(backing), mechanism_name(with),
		       mechanism_name(without));
		EQUAL("the read-only slot has the flag", with == KVMFAULT_MECHANISM_MEMSLOT_FLAG, abi && abi->readonly);
		EQUAL("the writable slot has the flag", without == KVMFAULT_MECHANISM_MEMSLOT_FLAG, abi != NULL);
		expect_read_only(&s);
		slot_vm_destroy(&s);
		ram_destroy(&other);
	}
}

/*
 * A read-only window of memory that is writable elsewhere, as QEMU's PAM regions are: where the
 * flag and READONLY exclude each other, the window has no flag, and is served all the same.
 */
static void read_only_window(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct slot_vm s;
		slot_vm_attach(&s, backing, 64 * PAGE, test_mechanism(), NULL);
		struct kvmfault_memslot slot = slot_on(&s.ram, RAM_SLOT, RAM_GPA);
		slot.block_hva = s.ram.hva;
		slot.block_len = s.ram.len;
		slot.len = 32 * PAGE;
		OK(kvmfault_memslot_set(s.m.library, &slot));
		slot.slot = RAM_SLOT + 1;
		slot.gpa += slot.len;
		slot.hva = s.ram.hva + slot.len;
		slot.kvm_flags = KVM_MEM_READONLY;
		OK(kvmfault_memslot_set(s.m.library, &slot));
		struct vcpu *v = slot_vm_add_vcpu(&s, 3);
		slot_vm_visit(&s, v, 0, 32, WRITE_FIRST);
		slot_vm_visit(&s, v, 32, 16, READ_FIRST);
		if (is_able())
			OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT + 1, 1));
		else
			REFUSED(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT + 1, 1), EOPNOTSUPP, "READONLY");
		expect_write_exit(&s, v, slot.gpa + 16);
		slot_vm_visit(&s, v, 32, 32, READ_FIRST);
		vcpu_detach(v);
		slot_vm_destroy(&s);
	}
}

static const struct test_case cases[] = {
	{ "slot", read_only, true },
	{ "automatic", read_only_automatic, false },
	{ "window", read_only_window, true },
};
TEST_MAIN(cases)
