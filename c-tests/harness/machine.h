/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A small virtual machine for tests: ordinary low memory for page tables, code and lists; memory
 * under test; vCPUs in long mode at CPL 0 or 3; guests that check what they read (guest/ *.S).
 *
 * On KVMs without hardware virtualisation CPL 3 runs natively and CPL 0 is emulated instruction by
 * instruction. Both are paths that guests take through KVM, so most tests use both.
 */
#ifndef MACHINE_H
#define MACHINE_H

#include "guest.h"
#include "kvm_traits.h"
#include "ram.h"
#include "source.h"
#include "vcpu.h"

#define RAM_GPA 0x40000000ul      /* where test memory usually is */
#define GUEST_LIMIT 0x200000000ul /* the guest's page tables end here: 8 GiB */
#define NOWHERE_GPA 0x180000000ul /* reachable, and no memory is there */
#define RAM_SLOT 1
enum { MOST_VCPUS = 256 };

/* What is where in low memory. Guest-virtual addresses equal guest-physical ones. */
#define LOW_PAGE_TABLES 0x1000ul
#define LOW_CODE 0x10000ul
#define LOW_SHARED 0x20000ul

struct machine {
	int kvm, vm;
	uint8_t *low; /* guest address 0 */
	uint64_t low_len, low_used;
	struct kvmfault_vm *library;
	bool finalized; /* machine_destroy waits until the library is done with its VM */
	unsigned vcpus;
	struct vcpu *vcpu[MOST_VCPUS];
};
/* `shared`: how many bytes machine_share will be called for. */
void machine_create(struct machine *machine, uint64_t shared);
/* Frees the library's VM, waits for resolver calls that are under way, and frees the vCPUs. */
void machine_destroy(struct machine *machine);
/* Memory for host and guest, zeros; *gpa is its guest address. */
void *machine_share(struct machine *machine, uint64_t len, uint64_t *gpa);
/*
 * kvmfault_vm_new with the case's mechanism. `options` may be NULL; what is 0 there (mechanism,
 * resolver) has the usual value.
 */
void machine_attach(struct machine *machine, struct source *source, const struct kvmfault_vm_options *options);
/*
 * A slot on all of `ram`, ready for kvmfault_memslot_set. Private memory is declared as touched by
 * vCPUs only.
 */
struct kvmfault_memslot slot_on(const struct ram *ram, uint32_t slot, uint64_t gpa);
void machine_set_slot(struct machine *machine, const struct ram *ram, uint32_t slot, uint64_t gpa);
/* Makes the ioctl that kvmfault_memslot_prepare describes, as a VMM with ioctls of its own does. */
void machine_set_region(const struct machine *machine, const struct kvmfault_region *region);
struct kvmfault_stats machine_stats(const struct machine *machine);
/*
 * machine_stats when all faults have been counted. With userfaultfd the kernel lets a vCPU go on
 * the moment its page is there: the guest may be done with all of its memory while a reader thread
 * has yet to count the last page.
 */
struct kvmfault_stats machine_settled_stats(const struct machine *machine);

#endif
