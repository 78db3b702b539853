/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Which of the flag's ABIs the kernel ought to have: as the test kernel was told (kernel/), or KVMFAULT_TEST_ABI says. */
#ifndef ABI_H
#define ABI_H

#include "harness.h"

struct abi {
	const char *parameter, *name; /* the test kernel's (see kernel/), the library's */
	int run_errno;                /* KVM_RUN's, at a fault */
	uint32_t flag, ioctl_version;
	bool bitmap, readonly;        /* can it be had together with KVM_MEM_READONLY, so that the guest can read? */
};
enum { ABIS = 5 };
extern const struct abi abis[ABIS];

/* What the test kernel was told to be, or "". */
const char *fault_abi(void);
/* The ABI that the library ought to find, or NULL. */
const struct abi *expected_abi(void);
/* The same; skips the case if there is none. */
const struct abi *require_flag(void);

#endif
