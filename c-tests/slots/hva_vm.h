/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VM whose resolver knows a page by its host address: the same memory may be in several slots.
 * There is one, `hva_vm`; a case sets the slots.
 */
#ifndef HVA_VM_H
#define HVA_VM_H

#include "machine.h"

#define OTHER_GPA 0x90000000ul
enum { OTHER_SLOT = 2, PAGES = 64 };

extern struct hva_vm {
	struct machine m;
	struct ram ram;
	struct source source;
	uint32_t *list; /* of page numbers, shuffled */
	struct step *steps;
	uint64_t list_gpa, steps_gpa;
	unsigned written_calls; /* of kvmfault_vm_options.written */
} hva_vm;

void hva_vm_set_up(enum backing backing, uint64_t pages);
void hva_vm_tear_down(void);
void hva_vm_delete_slot(uint32_t number, uint32_t flags);
/* A vCPU for the calling thread. */
struct vcpu *hva_vm_add_vcpu(int cpl);
/* The vCPU checks `count` pages of the list, which begin at `gpa`. */
void hva_vm_check_pages(struct vcpu *v, uint64_t gpa, uint64_t first, uint64_t count);

#endif
