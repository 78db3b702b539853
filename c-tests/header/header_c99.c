/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The header as a program of strict C99 and of strict C++11 sees it (header_cxx11.cc includes this
 * file): every initialiser, in a definition and on the heap; the header included twice; and a
 * linked library of the version that the header names.
 */
#include <kvmfault.h>
#include <kvmfault.h>

#include <stdio.h>
#include <string.h>

static int failures;

#define CHECK(condition)                                                       \
	do {                                                                   \
		if (!(condition)) {                                            \
			printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			failures++;                                            \
		}                                                              \
	} while (0)

static int resolver(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	(void)vm;
	(void)fault;
	return KVMFAULT_PENDING;
}

static int all_zero(const void *from, size_t skip, size_t size)
{
	const unsigned char *bytes = (const unsigned char *)from;
	for (; skip < size; skip++)
		if (bytes[skip])
			return 0;
	return 1;
}

#define CHECK_ZERO_BUT_SIZE(s) CHECK((s).size == sizeof(s) && all_zero(&(s), sizeof((s).size), sizeof(s)))

int main(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	struct kvmfault_vcpu_options vcpu_options = KVMFAULT_VCPU_OPTIONS_INIT;
	struct kvmfault_memory_error_info error = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	struct kvmfault_vm *vm = NULL;
	char version[32];

	CHECK(options.size == sizeof(options) && options.kvm_fd == -1 && options.vm_fd == -1 && options.uffd == -1);
	options.kvm_fd = options.vm_fd = options.uffd = 0;
	CHECK_ZERO_BUT_SIZE(options);
	CHECK(slot.fd == -1);
	slot.fd = 0;
	CHECK_ZERO_BUT_SIZE(slot);
	CHECK(vcpu_options.fd == -1);
	vcpu_options.fd = 0;
	CHECK_ZERO_BUT_SIZE(vcpu_options);
	CHECK_ZERO_BUT_SIZE(region);
	CHECK_ZERO_BUT_SIZE(error);
	CHECK_ZERO_BUT_SIZE(probe);
	CHECK_ZERO_BUT_SIZE(stats);
	CHECK_ZERO_BUT_SIZE(range);
	CHECK(sizeof(probe.abi) == KVMFAULT_PROBE_ABI_LEN);
	CHECK(sizeof(stats.latency_us_log2) == KVMFAULT_LATENCY_BUCKETS * sizeof(uint64_t));

	CHECK(kvmfault_version_number() == KVMFAULT_VERSION_NUMBER);
	snprintf(version, sizeof(version), "%d.%d.%d", KVMFAULT_VERSION_MAJOR, KVMFAULT_VERSION_MINOR,
		 KVMFAULT_VERSION_PATCH);
	CHECK(strcmp(kvmfault_version(), version) == 0);

	/*
	 * A failing call needs no kernel, and shows that panics and thread-local messages are
	 * linked properly.
	 */
	CHECK(strcmp(kvmfault_last_error(), "") == 0);
	options.resolver = resolver;
	options.kvm_fd = -1;
	CHECK(kvmfault_vm_new(&options, &vm) < 0 && vm == NULL);
	CHECK(strstr(kvmfault_last_error(), "kvm_fd") != NULL);
	kvmfault_vm_free(NULL);
	(void)kvmfault_vm_close(NULL, 0);
	return failures != 0;
}
