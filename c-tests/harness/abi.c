/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "abi.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct abi abis[ABIS] = {
	{ "v2", "v2", EPERM, 1 << 2, 1, false, false },
	{ "v3", "v3", EFAULT, 1 << 2, 1, false, false },
	{ "v4", "v4", EFAULT, 1 << 2, 1, false, false },
	{ "v7", "v7", EFAULT, 1 << 3, 1, false, false },
	{ "userfault", "userfault-v3", EFAULT, 1 << 3, 2, true, true },
};

const char *fault_abi(void)
{
	static char text[64];
	FILE *file = fopen("/sys/module/kvm/parameters/fault_abi", "r");
	*text = 0;
	if (file) {
		if (fscanf(file, "%63s", text) != 1)
			*text = 0;
		fclose(file);
	}
	return text;
}

const struct abi *expected_abi(void)
{
	const char *told = getenv("KVMFAULT_TEST_ABI");
	for (const struct abi *abi = abis; abi < abis + ABIS; abi++)
		if (told ? !strcmp(told, abi->name) : !strcmp(fault_abi(), abi->parameter))
			return abi;
	return NULL;
}

const struct abi *require_flag(void)
{
	const struct abi *abi = expected_abi();
	if (!abi)
		skip("this kernel's KVM has no fast-only memslot flag");
	return abi;
}
