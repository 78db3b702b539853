/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What kvmfault_vm_new, kvmfault_probe and kvmfault_explain must refuse.
 */
#define _GNU_SOURCE
#include "intact_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_uint finalized;

static void finalizer(void *opaque)
{
	(void)opaque;
	finalized++;
}

/* Options that are right, for another handle on the intact VM. */
static struct kvmfault_vm_options good(const struct intact_vm *s)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.kvm_fd = s->machine.kvm;
	options.vm_fd = s->machine.vm;
	options.resolver = source_resolve;
	options.opaque = (void *)&s->source;
	options.finalizer = finalizer;
	return options;
}

/* kvmfault_vm_new fails, gives no handle, and leaves `opaque` to its owner. */
static void refuse(const struct kvmfault_vm_options *options, int error, const char *words)
{
	struct kvmfault_vm *vm = (struct kvmfault_vm *)1;
	REFUSED(kvmfault_vm_new(options, &vm), error, words);
	CHECK(vm == NULL, "the handle is %p after an error", (void *)vm);
	EQUAL("calls of the finalizer", finalized, 0);
}

static void accept(const struct kvmfault_vm_options *options)
{
	struct kvmfault_vm *vm;
	OK(kvmfault_vm_new(options, &vm));
	CHECK(vm != NULL, "no handle");
	kvmfault_vm_free(vm);
	/* The reader thread may be the last to go. */
	for (double end = now() + 5; now() < end && !finalized;)
		usleep(100);
	EQUAL("calls of the finalizer", finalized, 1);
	finalized = 0;
}

static void null_arguments(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	struct kvmfault_vm_options options = good(&s);

	refuse(NULL, EINVAL, "options");
	REFUSED(kvmfault_vm_new(&options, NULL), EINVAL, "vm");
	REFUSED(kvmfault_vm_new(NULL, NULL), EINVAL, "vm");
	options.resolver = NULL;
	refuse(&options, EINVAL, "resolver");
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void wrong_descriptors(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	int closed = closed_fd(), null = SYS(open("/dev/null", O_RDWR | O_CLOEXEC)), uffd = new_uffd();
	const struct {
		int kvm, vm, uffd, error;
		const char *words;
	} cases[] = {
		{ -1, s.machine.vm, -1, EBADF, "kvm_fd" },
		{ INT_MIN, s.machine.vm, -1, EBADF, "kvm_fd" },
		{ INT_MAX, s.machine.vm, -1, EBADF, "kvm_fd" },
		{ closed, s.machine.vm, -1, EBADF, "kvm_fd" },
		{ null, s.machine.vm, -1, EINVAL, "kvm_fd" },
		{ uffd, s.machine.vm, -1, EINVAL, "kvm_fd" },
		{ s.machine.vm, s.machine.vm, -1, EINVAL, "kvm_fd" },
		{ s.vcpu->fd, s.machine.vm, -1, EINVAL, "kvm_fd" },
		{ s.ram.fd, s.machine.vm, -1, EINVAL, "kvm_fd" },
		{ s.machine.kvm, -1, -1, EBADF, "vm_fd" },
		{ s.machine.kvm, closed, -1, EBADF, "vm_fd" },
		{ s.machine.kvm, null, -1, EINVAL, "vm_fd" },
		{ s.machine.kvm, uffd, -1, EINVAL, "vm_fd" },
		{ s.machine.kvm, s.machine.kvm, -1, EINVAL, "vm_fd" },
		{ s.machine.kvm, s.vcpu->fd, -1, EINVAL, "vm_fd" },
		{ s.machine.kvm, s.machine.vm, -2, EBADF, "uffd" },
		{ s.machine.kvm, s.machine.vm, closed, EBADF, "uffd" },
		{ s.machine.kvm, s.machine.vm, null, EINVAL, "uffd" },
		{ s.machine.kvm, s.machine.vm, s.machine.vm, EINVAL, "uffd" },
		{ s.machine.kvm, s.machine.vm, s.ram.fd, EINVAL, "uffd" },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct kvmfault_vm_options options = good(&s);
		options.kvm_fd = cases[i].kvm;
		options.vm_fd = cases[i].vm;
		options.uffd = cases[i].uffd;
		refuse(&options, cases[i].error, cases[i].words);
		intact_vm_check(&s);
	}
	intact_vm_destroy(&s);
}

/* One that is set up already, in a way that doesn't go with the library. */
static void unfit_userfaultfd(void)
{
	struct intact_vm s;
	static const uint64_t unfit[] = { UFFD_FEATURE_EVENT_FORK, UFFD_FEATURE_EVENT_REMAP, UFFD_FEATURE_EVENT_REMOVE,
					  UFFD_FEATURE_EVENT_UNMAP, UFFD_FEATURE_SIGBUS };
	intact_vm_create(&s);
	for (size_t i = 0; i < sizeof(unfit) / sizeof(*unfit); i++) {
		struct kvmfault_vm_options options = good(&s);
		struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM | unfit[i] };
		options.uffd = SYS(syscall(SYS_userfaultfd, O_CLOEXEC));
		SYS(ioctl(options.uffd, UFFDIO_API, &api));
		refuse(&options, EINVAL, "uffd");
		SYS(close(options.uffd));
	}
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void wrong_numbers(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	for (const int *bad = (const int[]){ -1, 4, INT_MAX, INT_MIN, 0 }; *bad; bad++) {
		struct kvmfault_vm_options options = good(&s);
		options.mechanism = *bad;
		refuse(&options, EINVAL, "mechanism");
	}
	for (const uint32_t *bad = (const uint32_t[]){ 65, 1000000, UINT32_MAX, 0 }; *bad; bad++) {
		struct kvmfault_vm_options options = good(&s);
		options.reader_threads = *bad;
		refuse(&options, EINVAL, "reader_threads");
	}
	for (const uint32_t *bad = (const uint32_t[]){ 4097, 8192, 1u << 31, UINT32_MAX, 0 }; *bad; bad++) {
		struct kvmfault_vm_options options = good(&s);
		options.readahead = *bad;
		refuse(&options, EINVAL, "readahead");
	}
	for (int bit = 3; bit < 64; bit++) {
		struct kvmfault_vm_options options = good(&s);
		options.flags = 1ull << bit;
		refuse(&options, EINVAL, "flags");
	}
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* Names of ABIs: unknown ones, and known ones that this kernel doesn't have. */
static void wrong_abi(void)
{
	static const char *const unknown[] = { "",          "v",    "v1",       "V2",     "v2 ",
					       "userfault", "auto", "%s%s%s%n", "v2\nv3", "\xff\xfe" };
	static const char *const known[] = { "v2", "v3", "v4", "v7", "userfault-v3" };
	struct intact_vm s;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	intact_vm_create(&s);
	struct kvmfault_vm_options options = good(&s);

	for (size_t i = 0; i < sizeof(unknown) / sizeof(*unknown); i++) {
		options.abi = unknown[i];
		refuse(&options, EINVAL, "abi");
	}
	char *endless = malloc(1 << 20);
	memset(endless, 'v', 1 << 20);
	endless[(1 << 20) - 1] = 0;
	options.abi = endless;
	refuse(&options, EINVAL, "abi");
	free(endless);

	OK(kvmfault_probe(-1, &probe));
	for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++) {
		options.abi = known[i];
		if (!strcmp(known[i], probe.abi))
			accept(&options);
		else
			refuse(&options, EOPNOTSUPP, known[i]);
		intact_vm_check(&s);
	}
	intact_vm_destroy(&s);
}

/* What the probe says doesn't work is refused with a reason, and what it says works is accepted. */
static void forced_mechanism(void)
{
	struct intact_vm s;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	intact_vm_create(&s);
	OK(kvmfault_probe(s.machine.kvm, &probe));
	for (int m = KVMFAULT_MECHANISM_MEMSLOT_FLAG; m <= KVMFAULT_MECHANISM_USERFAULTFD; m++) {
		struct kvmfault_vm_options options = good(&s);
		options.mechanism = m;
		if (probe.mechanisms_shared & 1u << m)
			accept(&options);
		else
			refuse(&options, EOPNOTSUPP, mechanism_name(m));
	}
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/*
 * An option structure of `size` bytes, of which those beyond what this header knows are zero,
 * except the last if `dirty`.
 */
static int new_with_size(const struct intact_vm *s, size_t stated, bool dirty)
{
	union {
		struct kvmfault_vm_options options;
		uint8_t bytes[8192];
	} u;
	struct kvmfault_vm *vm = (struct kvmfault_vm *)1;
	memset(&u, 0, sizeof(u));
	u.options = good(s);
	u.options.size = stated;
	if (dirty)
		u.bytes[stated - 1] = 1;
	int ret = kvmfault_vm_new(&u.options, &vm);
	CHECK((ret == 0) == (vm != NULL), "returned %d and a handle %p", ret, (void *)vm);
	kvmfault_vm_free(vm);
	return ret;
}

static void wrong_sizes(void)
{
	const size_t known = sizeof(struct kvmfault_vm_options);
	struct intact_vm s;
	intact_vm_create(&s);
	for (size_t size = 0; size <= sizeof(size_t); size++)
		REFUSED(new_with_size(&s, size, false), EINVAL, "options.size");
	for (const size_t *bad = (const size_t[]){ 4097, 1 << 20, SIZE_MAX / 2, SIZE_MAX, 0 }; *bad; bad++)
		REFUSED(new_with_size(&s, *bad, false), EINVAL, "options.size");
	/*
	 * Too short to hold a resolver, and so no options at all; what is cut off has its initial
	 * value.
	 */
	REFUSED(new_with_size(&s, offsetof(struct kvmfault_vm_options, vm_fd), false), EINVAL, "resolver");
	REFUSED(new_with_size(&s, offsetof(struct kvmfault_vm_options, resolver), false), EINVAL, "resolver");
	OK(new_with_size(&s, offsetof(struct kvmfault_vm_options, reader_threads), false));
	OK(new_with_size(&s, known, false));
	for (size_t size = known + 1; size <= known + 16; size++) {
		OK(new_with_size(&s, size, false));
		REFUSED(new_with_size(&s, size, true), E2BIG, "options.size");
	}
	OK(new_with_size(&s, 4096, false));
	REFUSED(new_with_size(&s, 4096, true), E2BIG, "options.size");
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void probe_and_explain(void)
{
	struct intact_vm s;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT, before;
	char text[64];
	intact_vm_create(&s);

	before = probe;
	REFUSED(kvmfault_probe(-1, NULL), EINVAL, "probe");
	REFUSED(kvmfault_probe(closed_fd(), &probe), EBADF, "kvm_fd");
	REFUSED(kvmfault_probe(-2, &probe), EBADF, "kvm_fd");
	REFUSED(kvmfault_probe(s.machine.vm, &probe), EINVAL, "kvm_fd");
	REFUSED(kvmfault_probe(s.ram.fd, &probe), EINVAL, "kvm_fd");
	CHECK(!memcmp(&probe, &before, sizeof(probe)), "a probe that failed has written its result");
	probe.size = 0;
	REFUSED(kvmfault_probe(-1, &probe), EINVAL, "probe.size");
	probe.size = SIZE_MAX;
	REFUSED(kvmfault_probe(-1, &probe), EINVAL, "probe.size");

	REFUSED(kvmfault_explain(-1, NULL, 1), EINVAL, "buf");
	REFUSED(kvmfault_explain(-1, NULL, SIZE_MAX), EINVAL, "buf");
	REFUSED(kvmfault_explain(closed_fd(), text, sizeof(text)), EBADF, "kvm_fd");
	REFUSED(kvmfault_explain(s.vcpu->fd, text, sizeof(text)), EINVAL, "kvm_fd");

	/* As snprintf: a buffer too small is no error, and nothing is written behind it. */
	long long length = OK(kvmfault_explain(-1, NULL, 0));
	memset(text, 'x', sizeof(text));
	EQUAL("length", OK(kvmfault_explain(-1, text, 10)), length);
	CHECK(strlen(text) == 9 && text[10] == 'x', "the text is \"%.*s\"", (int)sizeof(text), text);
	EQUAL("length", OK(kvmfault_explain(-1, text, 1)), length);
	CHECK(text[0] == 0 && text[1] != 0, "one byte has room for the terminating 0 only");
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/*
 * An output structure of an older program is filled up to its size; in a newer one, fields that the
 * library does not know are zero.
 */
static void probe_sizes(void)
{
	union {
		struct kvmfault_probe probe;
		uint8_t bytes[4096];
	} u;
	const size_t known = sizeof(struct kvmfault_probe);
	for (size_t size = sizeof(size_t) + 1; size <= sizeof(u); size += size < known + 8 ? 1 : 997) {
		memset(&u, 0xee, sizeof(u));
		u.probe.size = size;
		if (!size_accepted(kvmfault_probe(-1, &u.probe), size, known))
			continue;
		EQUAL("size after the call", u.probe.size, size);
		for (size_t i = size; i < sizeof(u); i++)
			CHECK(u.bytes[i] == 0xee, "with size %zu byte %zu was written", size, i);
		for (size_t i = known; i < size; i++)
			CHECK(u.bytes[i] == 0, "with size %zu byte %zu is %#x, not 0", size, i, u.bytes[i]);
	}
}

static void vm_functions(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	for (int bit = 1; bit < 64; bit++)
		REFUSED(kvmfault_vm_enable(s.machine.library, 1ull << bit), EINVAL, "caps");
	REFUSED(kvmfault_vm_enable(s.machine.library, UINT64_MAX), EINVAL, "caps");
	OK(kvmfault_vm_enable(s.machine.library, KVMFAULT_CAP_FAULT_EXITS));
	OK(kvmfault_vm_enable(s.machine.library, 0));
	REFUSED(kvmfault_vm_stats(s.machine.library, NULL), EINVAL, "stats");
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	stats.size = 8;
	REFUSED(kvmfault_vm_stats(s.machine.library, &stats), EINVAL, "stats.size");
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* The VMM may close its descriptors at any time; the library has its own. */
static void descriptors_are_duplicated(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	int kvm = s.machine.kvm, vm = s.machine.vm, vcpu = s.vcpu->fd;
	s.machine.kvm = SYS(fcntl(kvm, F_DUPFD_CLOEXEC, 100));
	s.machine.vm = SYS(fcntl(vm, F_DUPFD_CLOEXEC, 100));
	s.vcpu->fd = SYS(fcntl(vcpu, F_DUPFD_CLOEXEC, 100));
	close(kvm);
	close(vm);
	close(vcpu);
	/* The descriptors' numbers are reused for other files. */
	for (int i = 0; i < 16; i++)
		SYS(open("/dev/null", O_RDWR | O_CLOEXEC));
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static const struct test_case cases[] = {
	{ "null-arguments", null_arguments, false },
	{ "wrong-descriptors", wrong_descriptors, false },
	{ "unfit-userfaultfd", unfit_userfaultfd, false },
	{ "wrong-numbers", wrong_numbers, false },
	{ "wrong-abi", wrong_abi, false },
	{ "forced-mechanism", forced_mechanism, false },
	{ "wrong-sizes", wrong_sizes, false },
	{ "probe-and-explain", probe_and_explain, false },
	{ "probe-sizes", probe_sizes, false },
	{ "vm-functions", vm_functions, false },
	{ "descriptors-are-duplicated", descriptors_are_duplicated, false },
};
TEST_MAIN(cases)
