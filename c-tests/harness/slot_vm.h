/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VM with one slot under test, RAM_SLOT at RAM_GPA, and a resolver that checks on whose thread it
 * runs: for behaviour that must not depend on the mechanism.
 */
#ifndef SLOT_VM_H
#define SLOT_VM_H

#include "machine.h"

struct slot_vm {
	struct machine m;
	struct ram ram;
	struct source source;
	uint32_t *list;
	uint64_t list_gpa, pages;
	/* resolver calls on the thread of the vCPU that faulted; on another one */
	atomic_ulong here, elsewhere;
	atomic_ulong written;         /* bytes that the library wrote for the guest */
	_Atomic uint8_t *was_written; /* of each page */
};

/* Makes all but the slot. `abi` is kvmfault_vm_options.abi. */
void slot_vm_attach(struct slot_vm *s, enum backing backing, uint64_t len, int mechanism, const char *abi);
/* Makes the VM with the case's mechanism, and the slot; `flags` are further KVMFAULT_MEMSLOT_*. */
void slot_vm_create(struct slot_vm *s, enum backing backing, uint64_t len, uint32_t flags, uint32_t kvm_flags);
/*
 * A slot of `units` pages of the memory (4 KiB or 2 MiB), by kind: also of shared memory without a
 * file.
 */
enum memory_kind { OF_ANON, OF_MEMFD, OF_HUGETLB, OF_SHARED_ANON };
void slot_vm_create_of(struct slot_vm *s, enum memory_kind kind, uint64_t units, uint32_t flags);
void slot_vm_destroy(struct slot_vm *s);
/*
 * The resolver of each slot_vm. Fails the case if it isn't called on the thread of the vCPU that
 * faults, or on a thread of no vCPU.
 */
int slot_vm_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault);

/* Adds a vCPU, for the calling thread. */
struct vcpu *slot_vm_add_vcpu(struct slot_vm *s, int cpl);
/* The guest checks pages of the list. */
void slot_vm_visit(struct slot_vm *s, struct vcpu *v, uint64_t first, uint64_t count, int mode);
/* slot_vm_visit by a new vCPU on a thread of its own, to be joined with vcpu_join. */
void slot_vm_start_visit(struct slot_vm *s, struct vcpu *v, uint64_t first, uint64_t count, int mode);
/*
 * Prepares one step of guest/script.S; the steps lie on the vCPU's stack page, which that guest
 * doesn't use.
 */
struct step *slot_vm_step(struct slot_vm *s, struct vcpu *v, struct step step);
uint64_t slot_vm_read(struct slot_vm *s, struct vcpu *v, uint64_t address);
void slot_vm_write(struct slot_vm *s, struct vcpu *v, uint64_t address, uint64_t value);
/*
 * Waits until all pages are present. A reader thread wakes the threads that wait before it marks
 * the page present: the guest may be a moment ahead of it.
 */
void slot_vm_expect_all_present(struct slot_vm *s);
/* KVM's log of the slot, a bit a page. */
void slot_vm_dirty_log(struct slot_vm *s, uint64_t *log);

#endif
