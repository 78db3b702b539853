/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "spare_slot.h"

#include <errno.h>
#include <string.h>

struct kvmfault_memslot spare_slot_on(void *memory)
{
	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	slot.slot = SPARE_SLOT;
	slot.gpa = SPARE_GPA;
	slot.len = SPARE_LEN;
	slot.hva = memory;
	return slot;
}

void spare_slot_refused(struct intact_vm *s, const struct kvmfault_memslot *slot, int error, const char *words)
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

void spare_slot_accepted(struct intact_vm *s, const struct kvmfault_memslot *slot)
{
	struct kvmfault_memslot gone = KVMFAULT_MEMSLOT_INIT;
	gone.slot = slot->slot;
	OK(kvmfault_memslot_set(s->machine.library, slot));
	EQUAL("a new page", OK(kvmfault_pages_state(s->machine.library, slot->gpa)),
	      slot->flags & KVMFAULT_MEMSLOT_PRESENT ? KVMFAULT_PAGE_PRESENT : KVMFAULT_PAGE_ABSENT);
	OK(kvmfault_memslot_set(s->machine.library, &gone));
}
