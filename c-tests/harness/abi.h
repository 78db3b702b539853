/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Which of the flag's ABIs the kernel should have: the test kernel's parameter (c-tests/kernel), or
 * KVMFAULT_TEST_ABI.
 */
#ifndef ABI_H
#define ABI_H

#include "harness.h"

struct abi {
	const char *parameter, *name; /* the test kernel's (see kernel/), the library's */
	int run_errno;                /* KVM_RUN's, at a fault */
	uint32_t flag, ioctl_version;
	/* can it be had together with KVM_MEM_READONLY, so that the guest can read? */
	bool bitmap, readonly;
};
enum { ABIS = 5 };
extern const struct abi abis[ABIS];

/* The test kernel's parameter kvm.fault_abi, or "". */
const char *fault_abi(void);
/* The ABI that the library should find, or NULL. */
const struct abi *expected_abi(void);
/* The ABI that the library should find; skips the case if there is none. */
const struct abi *require_flag(void);

#endif
