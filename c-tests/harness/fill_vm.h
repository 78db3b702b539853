/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A slot_vm whose memory is filled in the background, with a resolver that can be slow or fail for
 * the fill alone.
 */
#ifndef FILL_VM_H
#define FILL_VM_H

#include "slot_vm.h"

#define PAGES SCALED(4096, 1024)

struct fill_vm {
	struct slot_vm s;
	atomic_ulong calls, pages; /* of the fill */
	/* to the fill, for pages whose number is 5 modulo 97; 0: they come as the others do */
	atomic_int answer;
	atomic_int us;         /* how long a call of the fill takes */
	atomic_bool fill_held; /* the fill's calls don't return */
	atomic_bool held;      /* other calls don't return */
	atomic_uint holding;   /* how many of those calls are under way */
};

/* With the case's mechanism, and no readahead. */
void fill_vm_create(struct fill_vm *t, enum backing backing, uint64_t len);
/* Starts a fill; `options` may be NULL. */
struct kvmfault_fill *fill_vm_start(struct fill_vm *t, const struct kvmfault_fill_options *options);
/* Starts a fill and waits until no page is absent. */
void fill_vm_fill_all(struct fill_vm *t, const struct kvmfault_fill_options *options);

#endif
