/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The vCPUs of an example, each on a thread of its own. Together they visit all pages of the memory
 * under test: each runs the guest (guest.S) on its share of the list of pages.
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

/*
 * The guest's first useful work: this many pages, checked. An assumed small request to the guest.
 */
enum { FIRST_WORK_PAGES = 64 };

struct vcpu_threads {
	/* For the caller to read. */
	struct tiny_vm vm;
	unsigned count;
	uint64_t pages;
	uint64_t *ticks;     /* ticks that each first touch took, in list order */
	atomic_uint running; /* vCPUs that have not finished yet */
	double first_work;   /* seconds_now() when the first vCPU had done its first useful work */
	double finished;     /* seconds_now() when the last vCPU finished */

	/* Private to vcpu-threads.c. */
	uint64_t order_address, ticks_address; /* guest addresses of the list and of `ticks` */
	struct kvmfault_vm *memory;            /* NULL: KVM alone serves the memory */
	pthread_barrier_t start;
	atomic_flag worked; /* `first_work` is set */
	struct vcpu_thread *threads;
};

/*
 * Makes a VM that has all but its vCPUs and the memory under test. The guest will visit `pages`
 * pages from TINY_VM_RAM on, `run` neighbours in a row (guest_write_order).
 */
void vcpu_threads_create(struct vcpu_threads *all, unsigned count, uint64_t pages, uint64_t run);

/*
 * Creates the vCPUs, and a thread for each, which waits for vcpu_threads_start. The memory under
 * test is in place. It belongs to `memory`, or is ordinary memory without the library if that is
 * NULL; the guest expects the pages of the snapshot there, or only zeros.
 */
void vcpu_threads_prepare(struct vcpu_threads *all, int cpl, struct kvmfault_vm *memory, bool zero);

/* Lets the guest run. */
void vcpu_threads_start(struct vcpu_threads *all);

/* How many pages the guest has touched so far. */
uint64_t vcpu_threads_touched(const struct vcpu_threads *all);

/* Waits until every vCPU has finished. Returns whether the guest found every page right. */
bool vcpu_threads_join(struct vcpu_threads *all);

void vcpu_threads_destroy(struct vcpu_threads *all);

#endif
