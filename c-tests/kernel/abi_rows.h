/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What each value of kvm.fault_abi promises to userspace, as the test expects it. Written from the
 * mails of the series and not from the patch, so that the two can disagree.
 */
#ifndef ABI_ROWS_H
#define ABI_ROWS_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * Of the capabilities that some ABI uses, or that share a number with one: on x86, mainline has 226
 * (masked PMU events), 231 (KVM_SET_USER_MEMORY_REGION2), 232 (memory fault info) and 236
 * (KVM_PRE_FAULT_MEMORY).
 */
static const int watched_caps[] = { 226, 227, 228, 229, 230, 231, 232, 236, 239, 240, 243 };
enum { WATCHED = sizeof(watched_caps) / sizeof(watched_caps[0]) };

enum enabling { PRESENCE, REASON_MASK, SWITCH, ANYTHING };
enum behaviour {
	REFUSED, /* no ioctl takes a flag */
	IGNORED, /* accepted, never exits */
	FAST,    /* exits where the host has no writable page */
	BITMAP,  /* exits where userspace's bitmap says so */
};

struct row {
	const char *name;
	enum behaviour behaviour;
	int caps[WATCHED]; /* in the order of watched_caps */
	enum enabling enabling;
	int enable_cap;            /* 0: none can be enabled */
	int info_cap, flag_cap;    /* presence only: enabling fails with EINVAL */
	uint32_t region1, region2; /* flag bits beyond mainline's that each ioctl takes */
	bool readonly;             /* together with KVM_MEM_READONLY */
	uint32_t exit_reason;
	/* memory_fault.flags of an access that failed in a slot with the flag */
	uint64_t read, write, exec;
	bool others_told;     /* a failure outside such slots is an exit, too */
	uint64_t other_write; /* ... and these are its flags for a write */
	int run_errno;
};

/* clang-format off */
static const struct row rows[] = {
	{ .name = "none", .behaviour = REFUSED,
	  .caps = { 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0 }, .run_errno = EFAULT },

	{ .name = "v2", .behaviour = FAST,
	  .caps = { 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0 },
	  .enabling = REASON_MASK, .enable_cap = 227, .flag_cap = 228,
	  .region1 = 1 << 2, .readonly = true,
	  .exit_reason = 38, .read = 2, .write = 2, .exec = 2, .others_told = true, .other_write = 1,
	  .run_errno = EPERM },

	{ .name = "v3", .behaviour = FAST,
	  .caps = { 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0 },
	  .enabling = SWITCH, .enable_cap = 227, .flag_cap = 228,
	  .region1 = 1 << 2, .readonly = true,
	  .exit_reason = 38, .read = 0, .write = 0, .exec = 0, .others_told = true, .other_write = 0,
	  .run_errno = EFAULT },

	{ .name = "v4", .behaviour = FAST,
	  .caps = { 1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0 },
	  .info_cap = 228, .flag_cap = 229,
	  .region1 = 1 << 2, .readonly = true,
	  .exit_reason = 38, .read = 0, .write = 1, .exec = 2, .others_told = true, .other_write = 1,
	  .run_errno = EFAULT },

	{ .name = "v7", .behaviour = FAST,
	  .caps = { 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0 },
	  .info_cap = 232, .flag_cap = 236,
	  .region1 = 1 << 3, .region2 = 1 << 3, .readonly = false,
	  .exit_reason = 39, .read = 1, .write = 2, .exec = 4, .others_told = true, .other_write = 2,
	  .run_errno = EFAULT },

	{ .name = "userfault", .behaviour = BITMAP,
	  .caps = { 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1 },
	  .info_cap = 232, .flag_cap = 243,
	  .region2 = 1 << 3, .readonly = true,
	  .exit_reason = 39, .read = 16, .write = 16, .exec = 16,
	  .run_errno = EFAULT },

	{ .name = "falsefriend", .behaviour = IGNORED,
	  .caps = { 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1 },
	  .enabling = ANYTHING, .enable_cap = 227, .info_cap = 228, .flag_cap = 236,
	  .region1 = 1 << 2 | 1 << 3, .region2 = 1 << 3, .readonly = true,
	  .run_errno = EFAULT },
};
/* clang-format on */

#endif
