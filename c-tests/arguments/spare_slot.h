/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A slot beside the one of an intact_vm, to be wrong in one place: both ways to set it refuse it,
 * and when it is right again they accept it.
 */
#ifndef SPARE_SLOT_H
#define SPARE_SLOT_H

#include "intact_vm.h"

enum { SPARE_SLOT = 7, SPARE_PAGES = 64 };
#define SPARE_GPA (INTACT_VM_GPA + 2 * INTACT_VM_LEN) /* not a neighbour */
#define SPARE_LEN (SPARE_PAGES * PAGE)

/* A slot that is right, to be made wrong in one place. */
struct kvmfault_memslot spare_slot_on(void *memory);
/* Both ways to set the slot refuse it, and leave no trace: neither slot nor pages nor result. */
void spare_slot_refused(struct intact_vm *s, const struct kvmfault_memslot *slot, int error, const char *words);
/* The slot is accepted when it is right: refusals have left nothing behind. Deletes it again. */
void spare_slot_accepted(struct intact_vm *s, const struct kvmfault_memslot *slot);

#endif
