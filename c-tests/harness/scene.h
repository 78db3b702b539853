/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VM with one slot under test, RAM_SLOT at RAM_GPA, and a resolver that knows on whose thread it runs: for what is to be the same with the
 * memslot flag and without.
 */
#ifndef SCENE_H
#define SCENE_H

#include "machine.h"

struct scene {
	struct machine m;
	struct ram ram;
	struct source source;
	uint32_t *list;
	uint64_t list_gpa, pages;
	atomic_ulong here, elsewhere; /* resolver calls on the thread of the vCPU that faulted; on another one */
	atomic_ulong written;         /* bytes that the library wrote for the guest */
	_Atomic uint8_t *was_written; /* of each page */
};

/* All but the slot. `abi` is kvmfault_vm_options.abi. */
void scene_attach(struct scene *s, enum backing backing, uint64_t len, int mechanism, const char *abi);
/* With the case's mechanism, and the slot; `flags` are more of KVMFAULT_MEMSLOT_*. */
void scene_create(struct scene *s, enum backing backing, uint64_t len, uint32_t flags, uint32_t kvm_flags);
void scene_destroy(struct scene *s);
/* The resolver of all scenes. Fails the case if it isn't called on the thread of the vCPU that faults, or on a thread of no vCPU. */
int scene_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault);

/* A vCPU for this thread. */
struct vcpu *scene_add_vcpu(struct scene *s, int cpl);
/* The guest checks pages of the list. */
void scene_visit(struct scene *s, struct vcpu *v, uint64_t first, uint64_t count, int mode);
/* The same by a new vCPU on a thread of its own, to be joined with vcpu_join. */
void scene_start_visit(struct scene *s, struct vcpu *v, uint64_t first, uint64_t count, int mode);
/* Prepares one step of guest/script.S; the steps lie on the vCPU's stack page, which that guest doesn't use. */
struct step *scene_step(struct scene *s, struct vcpu *v, struct step step);
uint64_t scene_read(struct scene *s, struct vcpu *v, uint64_t address);
void scene_write(struct scene *s, struct vcpu *v, uint64_t address, uint64_t value);
/* A reader thread wakes whoever waits before it notes that the page is present: the guest may be a moment ahead of it. */
void scene_expect_all_present(struct scene *s);
/* KVM's log of the slot, a bit a page. */
void scene_dirty_log(struct scene *s, uint64_t *log);

#endif
