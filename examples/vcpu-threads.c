/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "vcpu-threads.h"
#include "clock.h"
#include "guest.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>

struct vcpu_thread {
	struct tiny_vcpu tiny;
	struct vcpu_threads *all;
	pthread_t thread;
	int number;
	uint64_t first, end; /* its share of the list of pages */
	bool right;          /* the guest found every page as it should be */
};

void vcpu_threads_create(struct vcpu_threads *all, unsigned count, uint64_t pages, uint64_t run)
{
	*all = (struct vcpu_threads){ .count = count, .pages = pages, .running = count, .worked = ATOMIC_FLAG_INIT };
	tiny_vm_create(&all->vm, pages * (4 + 8), guest_start, guest_end - guest_start);
	uint32_t *order = tiny_vm_share(&all->vm, pages * 4, &all->order_address);
	all->ticks = tiny_vm_share(&all->vm, pages * 8, &all->ticks_address);
	guest_write_order(order, pages, run);
	all->threads = calloc(count, sizeof(*all->threads));
	if (!all->threads || pthread_barrier_init(&all->start, NULL, count + 1))
		die(0, "no memory for %u vCPUs", count);
}

/* Runs the guest with the library, until it needs the VMM. */
static void run_with_library(struct vcpu_thread *v, struct kvmfault_vcpu *handle)
{
	int ret;
	do {
		/*
		 * Instead of ioctl(fd, KVM_RUN). It serves page faults, and returns at any other
		 * exit.
		 */
		ret = kvmfault_vcpu_run(handle);
	} while (ret == KVMFAULT_INTERRUPTED); /* by a signal or a kick */
	if (ret < 0)
		die(0, "vCPU %d: %s", v->number, kvmfault_last_error());
	if (ret == KVMFAULT_MEMORY_ERROR)
		die(0, "vCPU %d: a page that it needs is lost", v->number);
}

/* Runs the guest with KVM alone, until it needs the VMM. */
static void run_with_kvm(struct vcpu_thread *v)
{
	while (ioctl(v->tiny.fd, KVM_RUN, 0))
		if (errno != EINTR)
			die(errno, "vCPU %d: KVM_RUN", v->number);
}

/* The guest has used a port for its result: 0 if all was right. */
static bool read_result(const struct vcpu_thread *v)
{
	const struct kvm_run *run = v->tiny.run;
	struct kvm_regs regs;

	if (*(const uint32_t *)((const uint8_t *)run + run->io.data_offset) == 0)
		return true;
	if (!ioctl(v->tiny.fd, KVM_GET_REGS, &regs))
		fprintf(stderr, "vCPU %d: the word at guest address %#llx is not %#llx\n", v->number, regs.rdi,
			regs.rdx);
	return false;
}

static void *run_vcpu(void *arg)
{
	struct vcpu_thread *v = arg;
	struct vcpu_threads *all = v->all;
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	struct kvmfault_vcpu *handle = NULL;

	pthread_barrier_wait(&all->start);
	/*
	 * On the thread that will run the vCPU: by default the library blocks SIGBUS in this
	 * thread, and lets it interrupt KVM_RUN only.
	 */
	options.fd = v->tiny.fd;
	options.run = v->tiny.run;
	if (all->memory && kvmfault_vcpu_new(all->memory, &options, &handle))
		die(0, "vCPU %d: %s", v->number, kvmfault_last_error());

	for (bool done = false; !done;) {
		if (handle)
			run_with_library(v, handle);
		else
			run_with_kvm(v);
		if (v->tiny.run->exit_reason != KVM_EXIT_IO)
			die(0, "vCPU %d: unexpected exit %u", v->number, v->tiny.run->exit_reason);
		/*
		 * The guest reports its first work. A short list may end before: then that is the
		 * first work.
		 */
		if (!atomic_flag_test_and_set(&all->worked))
			all->first_work = seconds_now();
		done = v->tiny.run->io.port == GUEST_DONE_PORT;
	}
	v->right = read_result(v);
	if (atomic_fetch_sub(&all->running, 1) == 1)
		all->finished = seconds_now();
	kvmfault_vcpu_free(handle);
	return NULL;
}

void vcpu_threads_prepare(struct vcpu_threads *all, int cpl, struct kvmfault_vm *memory, bool zero)
{
	all->memory = memory;
	for (unsigned i = 0; i < all->count; i++) {
		struct vcpu_thread *v = &all->threads[i];
		*v = (struct vcpu_thread){
			.all = all,
			.number = i,
			.first = all->pages * i / all->count,
			.end = all->pages * (i + 1) / all->count,
		};
		struct kvm_regs regs = {
			.rdi = TINY_VM_RAM,
			.rsi = all->order_address + v->first * 4,
			.rcx = v->end - v->first,
			.r8 = all->ticks_address + v->first * 8,
			.r9 = zero ? 0 : GUEST_FACTOR,
			/*
			 * Some KVMs emulate each instruction at CPL 0, which is slow. The host
			 * checks the rest.
			 */
			.r10 = cpl == 3 ? 1 : 73,
			.r14 = FIRST_WORK_PAGES,
		};
		tiny_vcpu_create(&all->vm, i, cpl, &regs, &v->tiny);
		int error = pthread_create(&v->thread, NULL, run_vcpu, v);
		if (error)
			die(error, "a thread for vCPU %u", i);
	}
}

void vcpu_threads_start(struct vcpu_threads *all)
{
	pthread_barrier_wait(&all->start);
}

/* The guest fills its part of `ticks` from the start: the first zero is where it is now. */
static uint64_t touched_by(const struct vcpu_thread *v)
{
	const volatile uint64_t *ticks = v->all->ticks;
	uint64_t low = v->first, high = v->end;
	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		if (ticks[middle] != 0)
			low = middle + 1;
		else
			high = middle;
	}
	return low - v->first;
}

uint64_t vcpu_threads_touched(const struct vcpu_threads *all)
{
	uint64_t touched = 0;
	for (unsigned i = 0; i < all->count; i++)
		touched += touched_by(&all->threads[i]);
	return touched;
}

bool vcpu_threads_join(struct vcpu_threads *all)
{
	bool right = true;
	for (unsigned i = 0; i < all->count; i++) {
		pthread_join(all->threads[i].thread, NULL);
		right &= all->threads[i].right;
	}
	return right;
}

void vcpu_threads_destroy(struct vcpu_threads *all)
{
	for (unsigned i = 0; i < all->count; i++)
		tiny_vcpu_destroy(&all->threads[i].tiny);
	free(all->threads);
	pthread_barrier_destroy(&all->start);
	tiny_vm_destroy(&all->vm);
}
