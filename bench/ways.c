/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "ways.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

uint8_t source_bytes[MOST_BATCH * PAGE] __attribute__((aligned(4096)));

void run_plainly(struct vcpu *v)
{
	uint32_t value;
	while (ioctl(v->fd, KVM_RUN, 0) < 0)
		CHECK(errno == EINTR, "KVM_RUN: %s", strerror(errno));
	CHECK(vcpu_stopped(v, &value), "unexpected exit %u", v->run->exit_reason);
}

void set_plain_slot(struct job *job, void *address)
{
	struct kvm_userspace_memory_region region = {
		.slot = RAM_SLOT,
		.guest_phys_addr = RAM_GPA,
		.memory_size = job->ram.len,
		.userspace_addr = (uintptr_t)address,
	};
	SYS(ioctl(job->m.vm, KVM_SET_USER_MEMORY_REGION, &region));
}

void floor_begin(struct job *job)
{
	job->zeros = true;
	set_plain_slot(job, job->ram.hva);
}

void plain_run(struct job *job, struct vcpu *v)
{
	(void)job;
	run_plainly(v);
}

/* ---- the library ---- */

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	int ret = kvmfault_pages_install(vm, fault->window_gpa, source_bytes, fault->window_len);
	return ret < 0 ? ret : KVMFAULT_RESOLVED;
}

void library_begin(struct job *job)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.mechanism = job->way->number;
	options.resolver = resolve;
	options.readahead = job->way->batch;
	machine_attach(&job->m, NULL, &options);
	machine_set_slot(&job->m, &job->ram, RAM_SLOT, RAM_GPA);
}

void library_attach(struct job *job, struct vcpu *v)
{
	(void)job;
	vcpu_attach(v);
}

void library_run(struct job *job, struct vcpu *v)
{
	(void)job;
	vcpu_run(v);
	vcpu_detach(v);
}

void library_end(struct job *job)
{
	(void)job; /* machine_destroy frees it */
}
