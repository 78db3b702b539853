/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A machine whose guests read words, for tests of what a resolver may answer and do; the resolver is the case's. There is one, called `lab`. */
#ifndef LAB_H
#define LAB_H

#include "machine.h"

enum { LAB_PAGES = 64 };

struct lab {
	struct machine m;
	struct ram ram;
	struct source source;
	struct step *steps; /* 128 of them */
	uint64_t steps_gpa;
	atomic_uint calls, calls_for[LAB_PAGES]; /* of the resolver, as far as it counts them */
	atomic_int finished;                     /* vCPUs' threads */
};
extern struct lab lab;

void lab_set_up(enum backing backing, kvmfault_resolver resolver, int vcpus, int cpl);
/* With more options than a resolver. `opaque` is the lab. */
void lab_set_up_with(struct kvmfault_vm_options *options, enum backing backing, int vcpus, int cpl);
void lab_tear_down(void);

uint64_t lab_page_of(const struct kvmfault_fault *fault);
/* Brings a page, as another thread does. */
void lab_install(uint64_t page);
/* A resolver that counts, and answers KVMFAULT_PENDING. */
int lab_answer_pending(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault);

/* The vCPU is to read the first word of a page and stop. */
void lab_load_read(struct vcpu *v, uint64_t page);
/* It has read what it ought to. */
void lab_check_read(const struct vcpu *v, uint64_t page);
/* Both, and the run in between; of one page, or of all. */
void lab_read(struct vcpu *v, uint64_t page);
void lab_read_all(struct vcpu *v);
/* For vcpu_start: runs what is loaded. */
void *lab_run_to_stop(struct vcpu *v);

#endif
