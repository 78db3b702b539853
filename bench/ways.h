/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The ways by which a page gets to a guest that touches it for the first time. Each has the same
 * guest, the same memory and the same bytes.
 *
 *   floor          KVM's own demand-zero fault, without userfaultfd: nothing can be faster
 *   plain-c        userfaultfd as VMMs use it today: reader threads in plain C (plain.c)
 *   hand-written   poison-trap without any library: what its mechanism costs by itself (trap.c)
 *   libkvmfault    the library, with each mechanism
 */
#ifndef WAYS_H
#define WAYS_H

#include "../c-tests/harness/machine.h"

enum { MOST_BATCH = 512 };

struct job;

struct way {
	const char *program, *mechanism;
	unsigned batch; /* pages that one fault brings at most */
	bool many;      /* plain-c: a reader for each vCPU, not one for all */
	int number;     /* libkvmfault: KVMFAULT_MECHANISM_* */
	void (*begin)(struct job *);
	void (*run)(struct job *, struct vcpu *); /* on the vCPU's thread, until the guest stops */
	/* before; not measured. May be NULL, as the next */
	void (*attach)(struct job *, struct vcpu *);
	void (*end)(struct job *);
};

struct job {
	const struct way *way;
	struct machine m;
	struct ram ram;
	unsigned vcpus;
	bool zeros; /* nothing is copied */
	void *own;  /* the way's */
};

/* What each page holds, as many as are copied at once. */
extern uint8_t source_bytes[MOST_BATCH * PAGE];

/* Runs a vCPU that KVM_RUN alone serves. */
void run_plainly(struct vcpu *v);
/* Tells KVM of the memory, at this address. */
void set_plain_slot(struct job *job, void *address);

/* plain.c, trap.c */
int open_userfaultfd(void);
void register_memory(int uffd, const void *address, uint64_t len, uint64_t mode);
void plain_begin(struct job *);
void plain_end(struct job *);
void trap_begin(struct job *);
void trap_attach(struct job *, struct vcpu *);
void trap_run(struct job *, struct vcpu *);
void trap_end(struct job *);

/* ways.c */
void floor_begin(struct job *);
void plain_run(struct job *, struct vcpu *);
void library_begin(struct job *);
void library_attach(struct job *, struct vcpu *);
void library_run(struct job *, struct vcpu *);
void library_end(struct job *);

#endif
