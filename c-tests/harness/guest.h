/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Guest programs (guest/ *.S) and what they are given: each vcpu_load_* sets a vCPU's registers so
 * that its next run executes one of them from the start.
 */
#ifndef GUEST_H
#define GUEST_H

#include "source.h"
#include "vcpu.h"

/* Copies the programs to low memory, for machine_create. */
void guest_copy_programs(uint8_t *low);

enum { READ_FIRST = 0, WRITE_FIRST = 1 };
/*
 * guest/verify.S: checks `count` pages of the list at guest address `list`, pages counted from
 * `gpa`.
 */
void vcpu_load_verify(struct vcpu *vcpu, uint64_t gpa, uint64_t list, uint64_t count, const struct pattern *pattern,
		      int mode);
/* Runs guest/verify.S, and fails the case with what the guest found if that is wrong. */
void vcpu_verify(struct vcpu *vcpu);
/*
 * vcpu_verify on a thread of its own, which attaches the vCPU meanwhile; to be joined with
 * vcpu_join.
 */
void vcpu_start_verify(struct vcpu *vcpu);
/*
 * For a loop of the case's own: fails the case if the value that the guest stopped with reports a
 * wrong word.
 */
void vcpu_check_verified(struct vcpu *vcpu, uint32_t stopped_with);
/* guest/touch.S */
void vcpu_load_touch(struct vcpu *vcpu, uint64_t gpa, uint64_t pages, uint64_t step);

/*
 * guest/walk.S: writes to `count` pages of the list at guest address `list`, and notes at `times`
 * how long each took.
 */
void vcpu_load_walk(struct vcpu *vcpu, uint64_t gpa, uint64_t list, uint64_t count, uint64_t times);

/* guest/script.S */
/* clang-format off */
enum {
	STOP, READ8, READ16, READ32, READ64, WRITE8, WRITE16, WRITE32, WRITE64,
	JUMP,     /* to the step at `address` */
	ADD64,    /* atomically; `value` becomes what was there */
	CALL,     /* the code at `address`, with `value` in %rax; `value` becomes %rax */
	COPY,     /* `more` bytes from guest address `value`, with a string instruction */
	READ128, WRITE128, /* `value` and `more`; an SSE instruction */
	FILL,     /* `more` words of 64 bits */
};
/* clang-format on */
struct step {
	uint64_t operation, address, value, more;
};
void vcpu_load_script(struct vcpu *vcpu, uint64_t first_step);

/* Lists of page numbers. */
void list_sequential(uint32_t *list, uint64_t count);
void list_shuffle(uint32_t *list, uint64_t count, uint64_t seed);

#endif
