/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A resolver that gets its pages over a socket, and survives the loss of the server. How it works is in page-source.c.
 */
#ifndef PAGE_SOURCE_H
#define PAGE_SOURCE_H

#include <kvmfault.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct page_source {
	/* Set by the VMM before kvmfault_vm_new. */
	const char *path; /* the server's socket */
	uint64_t gpa;     /* the memory that the server has, from its page 0 on */
	uint64_t pages;
	bool push; /* the server sends pages unasked, too */

	/* Counted. */
	atomic_ulong asked, received, connections, withdrawn;
	_Atomic double gap; /* seconds from the loss of a connection to the first page of the next, the longest */

	/* page-source.c's. */
	struct kvmfault_vm *vm;
	pthread_t receiver;
	pthread_mutex_t lock; /* the socket's, for sending */
	int fd;               /* or -1 */
	bool stops;
};

/* For kvmfault_vm_options.resolver; `opaque` is the source. */
int page_source_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault);

/* Before kvmfault_vm_new. */
void page_source_init(struct page_source *source);
/* When the memory's slot is set and before a vCPU runs: connects, and goes on to receive. */
void page_source_start(struct page_source *source, struct kvmfault_vm *vm);
/* Before kvmfault_vm_free: no page is installed any more when this returns. */
void page_source_stop(struct page_source *source);

#endif
