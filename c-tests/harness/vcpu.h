/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A machine's vCPUs: in long mode at CPL 0 or 3, attached to the library by the thread that runs
 * them, run until the guest stops.
 */
#ifndef VCPU_H
#define VCPU_H

#include "harness.h"

#include <linux/kvm.h>
#include <pthread.h>

struct machine;

#define STOP_PORT 0x10 /* a guest stops by writing to it */

struct vcpu {
	struct machine *machine;
	int number, cpl, fd;
	struct kvm_run *run;
	struct kvmfault_vcpu *handle; /* NULL until vcpu_attach */
	uint64_t stack;
	pthread_t thread;
	void *(*main)(struct vcpu *);
	void *opaque; /* the case's */
};
struct vcpu *machine_add_vcpu(struct machine *machine, int cpl);
/* kvmfault_vcpu_new with the usual options; on the thread that will run it. */
void vcpu_attach(struct vcpu *vcpu);
/*
 * vcpu_attach for a VMM with signal handlers: SIGBUS goes to kvmfault_vcpu_on_sigbus, and SIGUSR1
 * kicks. `flags` are KVMFAULT_VCPU_*. A SIGBUS that the library refuses ends the process (99).
 */
void vcpu_attach_by_handler(struct vcpu *vcpu, uint32_t flags);
void vcpu_detach(struct vcpu *vcpu);
/*
 * Runs until the guest stops, and returns the value that it stops with; anything else fails the
 * case.
 */
uint32_t vcpu_run(struct vcpu *vcpu);
/* After KVMFAULT_PASS: did the guest stop? */
bool vcpu_stopped(const struct vcpu *vcpu, uint32_t *value);
/* What a return value of run or handle_exit that wasn't expected means. */
const char *vcpu_describe(const struct vcpu *vcpu, int ret);
void vcpu_start(struct vcpu *vcpu, void *(*main)(struct vcpu *), void *opaque);
void vcpu_join(struct vcpu *vcpu);

#endif
