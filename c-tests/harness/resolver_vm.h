/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The one VM of a case (`resolver_vm`) whose guests read single words, for tests of what a resolver
 * may answer and do; the resolver is the case's own.
 */
#ifndef RESOLVER_VM_H
#define RESOLVER_VM_H

#include "machine.h"

enum { RESOLVER_VM_PAGES = 64 };

struct resolver_vm {
	struct machine m;
	struct ram ram;
	struct source source;
	struct step *steps; /* 128 of them */
	uint64_t steps_gpa;
	atomic_uint calls, calls_for[RESOLVER_VM_PAGES]; /* of the resolver, if it counts them */
	atomic_int finished;                             /* vCPUs' threads */
};
extern struct resolver_vm resolver_vm;

void resolver_vm_set_up(enum backing backing, kvmfault_resolver resolver, int vcpus, int cpl);
/* resolver_vm_set_up with more options than a resolver; `opaque` becomes the resolver_vm. */
void resolver_vm_set_up_with(struct kvmfault_vm_options *options, enum backing backing, int vcpus, int cpl);
void resolver_vm_tear_down(void);

uint64_t resolver_vm_page_of(const struct kvmfault_fault *fault);
/* Installs a page, as a thread of the VMM's does. */
void resolver_vm_install(uint64_t page);
/* A resolver that counts, and answers KVMFAULT_PENDING. */
int resolver_vm_answer_pending(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault);

/* Loads a guest that reads the first word of a page and stops. */
void resolver_vm_load_read(struct vcpu *v, uint64_t page);
/* Checks that the guest has read the right word. */
void resolver_vm_check_read(const struct vcpu *v, uint64_t page);
/* Loads, runs and checks a read of one page, or of each page. */
void resolver_vm_read(struct vcpu *v, uint64_t page);
void resolver_vm_read_all(struct vcpu *v);
/* For vcpu_start: runs what is loaded. */
void *resolver_vm_run_to_stop(struct vcpu *v);

#endif
