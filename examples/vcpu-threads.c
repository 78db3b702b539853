/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "vcpu-threads.h"
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
	bool right; /* the guest found every page as it should be */
};

void vcpu_threads_create(struct vcpu_threads *all, unsigned count, uint64_t pages, bool shuffled)
{
	*all = (struct vcpu_threads){ .count = count, .pages = pages, .running = count };
	tiny_vm_create(&all->vm, pages * (4 + 8), guest_start, guest_end - guest_start);
	uint32_t *order = tiny_vm_share(&all->vm, pages * 4, &all->order_address);
	all->ticks = tiny_vm_share(&all->vm, pages * 8, &all->ticks_address);
	guest_write_order(order, pages, shuffled);
	all->threads = calloc(count, sizeof(*all->threads));
	if (!all->threads || pthread_barrier_init(&all->start, NULL, count + 1))
		die(0, "no memory for %u vCPUs", count);
}

/* The guest has used the port for its result: 0 if all was right. */
static bool read_result(const struct vcpu_thread *v)
{
	const struct kvm_run *run = v->tiny.run;
	struct kvm_regs regs;

	if (*(const uint32_t *)((const uint8_t *)run + run->io.data_offset) == 0)
		return true;
	if (!ioctl(v->tiny.fd, KVM_GET_REGS, &regs))
		fprintf(stderr, "vCPU %d: the word at guest address %#llx is not %#llx\n", v->number, regs.rdi, regs.rdx);
	return false;
}

static void *run_vcpu(void *arg)
{
	struct vcpu_thread *v = arg;
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	struct kvmfault_vcpu *handle;

	/*
	 * On the thread that will run the vCPU: by default the library blocks SIGBUS in this thread, and lets it
	 * interrupt KVM_RUN only.
	 */
	options.fd = v->tiny.fd;
	options.run = v->tiny.run;
	if (kvmfault_vcpu_new(v->all->memory, &options, &handle))
		die(0, "vCPU %d: %s", v->number, kvmfault_last_error());
	pthread_barrier_wait(&v->all->start);

	for (;;) {
		/* Instead of ioctl(fd, KVM_RUN). It serves page faults, and returns at any other exit. */
		int ret = kvmfault_vcpu_run(handle);
		if (ret < 0)
			die(0, "vCPU %d: %s", v->number, kvmfault_last_error());
		if (ret == KVMFAULT_INTERRUPTED)
			continue; /* by a signal or a kick; a VMM would look for the reason */
		if (ret == KVMFAULT_MEMORY_ERROR)
			die(0, "vCPU %d: a page that it needs is lost", v->number);
		if (v->tiny.run->exit_reason == KVM_EXIT_IO && v->tiny.run->io.port == GUEST_DONE_PORT)
			break;
		die(0, "vCPU %d: unexpected exit %u", v->number, v->tiny.run->exit_reason);
	}
	v->right = read_result(v);
	kvmfault_vcpu_free(handle);
	v->all->running--;
	return NULL;
}

void vcpu_threads_prepare(struct vcpu_threads *all, int cpl, struct kvmfault_vm *memory)
{
	all->memory = memory;
	for (unsigned i = 0; i < all->count; i++) {
		struct vcpu_thread *v = &all->threads[i];
		uint64_t first = all->pages * i / all->count, end = all->pages * (i + 1) / all->count;
		struct kvm_regs regs = {
			.rdi = TINY_VM_RAM,
			.rsi = all->order_address + first * 4,
			.rcx = end - first,
			.r8 = all->ticks_address + first * 8,
			.r9 = GUEST_FACTOR,
			.r10 = cpl == 3 ? 1 : 73, /* some KVMs emulate each instruction at CPL 0; see guest.S */
		};
		*v = (struct vcpu_thread){ .all = all, .number = i };
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
