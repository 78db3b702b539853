/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A resolver that fetches pages over a socket, and survives the loss of the server. page-source.c
 * explains how it works.
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
	uint64_t gpa;     /* guest address of the server's page 0 */
	uint64_t pages;
	bool push; /* ask the server to send pages without a request, too */

	/* Counters, for the VMM to read. */
	atomic_ulong asked, received, connections, withdrawn;
	/*
	 * Longest time from the loss of a connection to the first page of the next one, in
	 * seconds.
	 */
	_Atomic double gap;

	/* Private to page-source.c. */
	struct kvmfault_vm *vm;
	pthread_t receiver;
	pthread_mutex_t lock; /* for `fd` and `stops`, and to send whole requests */
	int fd;               /* or -1 */
	bool stops;
};

/* For kvmfault_vm_options.resolver; `opaque` is the source. */
int page_source_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault);

/* Call before kvmfault_vm_new. */
void page_source_init(struct page_source *source);
/*
 * Call when the memslot is set, before a vCPU runs. Starts a thread that connects and receives
 * pages.
 */
void page_source_start(struct page_source *source, struct kvmfault_vm *vm);
/* Call before kvmfault_vm_free. When it returns, no more pages are installed. */
void page_source_stop(struct page_source *source);

#endif
