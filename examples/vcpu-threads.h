/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The vCPUs of an example, each on a thread of its own. Together they visit all pages of the memory under test: each runs
 * the guest (guest.S) on its share of the list of pages.
 *
 * What a VMM does on its vCPU threads to use libkvmfault is in run_vcpu(), in vcpu-threads.c.
 */
#ifndef VCPU_THREADS_H
#define VCPU_THREADS_H

#include "tiny-vm.h"

#include <kvmfault.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct vcpu_threads {
	/* For the caller to read. */
	struct tiny_vm vm;
	unsigned count;
	uint64_t pages;
	uint64_t *ticks;     /* ticks of the guest's clock that each first touch took, in the order of the visits */
	atomic_uint running; /* vCPUs that have not finished yet */

	/* Private to vcpu-threads.c. */
	uint64_t order_address, ticks_address; /* where the guest sees the list of pages, and `ticks` */
	struct kvmfault_vm *memory;
	pthread_barrier_t start;
	struct vcpu_thread *threads;
};

/* Makes a VM that has all but its vCPUs and the memory under test. The guest will visit `pages` pages from TINY_VM_RAM on. */
void vcpu_threads_create(struct vcpu_threads *all, unsigned count, uint64_t pages, bool shuffled);

/* Creates the vCPUs, and a thread for each, which waits for vcpu_threads_start. The memory under test is in place by now. */
void vcpu_threads_prepare(struct vcpu_threads *all, int cpl, struct kvmfault_vm *memory);

/* Lets the guest run. */
void vcpu_threads_start(struct vcpu_threads *all);

/* Waits until every vCPU has finished. Returns whether the guest found every page as it should be. */
bool vcpu_threads_join(struct vcpu_threads *all);

void vcpu_threads_destroy(struct vcpu_threads *all);

#endif
