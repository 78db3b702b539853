/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A VM whose memory is filled in the background, and a resolver that can be slow or fail for the fill alone. */
#ifndef FILL_VM_H
#define FILL_VM_H

#include "slot_vm.h"

#define PAGES SCALED(4096, 1024)

struct fill_vm {
	struct slot_vm s;
	atomic_ulong calls, pages;  /* of the fill */
	atomic_int answer;          /* to the fill, for pages whose number is 5 modulo 97; 0: they come as the others do */
	atomic_int us;              /* the fill's calls take so long */
	atomic_bool fill_held;      /* or don't return */
	atomic_bool held;           /* other calls don't return */
	atomic_uint holding;        /* so many of those are under way */
};

/* With the case's mechanism, and no readahead. */
void fill_vm_create(struct fill_vm *t, enum backing backing, uint64_t len);
/* Starts a fill; `options` may be NULL. */
struct kvmfault_fill *fill_vm_start(struct fill_vm *t, const struct kvmfault_fill_options *options);
/* The same, and waits until nothing is absent. */
void fill_vm_fill_all(struct fill_vm *t, const struct kvmfault_fill_options *options);

#endif
