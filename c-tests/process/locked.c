/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VMM that has called mlockall(MCL_FUTURE), or that may lock little: what the library maps for
 * itself is neither filled nor locked.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LEN = 8 << 20 };

/* KiB. */
static long status(const char *key)
{
	char line[256];
	long kib = -1;
	FILE *file = fopen("/proc/self/status", "r");
	CHECK(file, "/proc/self/status");
	while (fgets(line, sizeof(line), file))
		if (!strncmp(line, key, strlen(key)))
			sscanf(line + strlen(key), ": %ld", &kib);
	fclose(file);
	return kib;
}

static struct kvmfault_file_source *open_sparse(uint64_t len)
{
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	struct kvmfault_file_source *source;
	int fd = SYS(memfd_create("snapshot", MFD_CLOEXEC));
	SYS(ftruncate(fd, len));
	range.gpa = RAM_GPA;
	range.len = len;
	OK(kvmfault_file_source_new(fd, &range, 1, &source));
	close(fd);
	return source;
}

/* A guest's first fault, at a hole, in each kind of memory. */
static void fault_at_a_hole(void)
{
	static const enum backing backings[] = { ANON, MEMFD, HUGETLB };
	char figures[256] = "";
	SYS(mlockall(MCL_FUTURE));
	for (unsigned i = 0; i < 3; i++) {
		struct machine m;
		struct ram ram;
		struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
		machine_create(&m, PAGE);
		ram_create(&ram, backings[i], LEN);
		if (backings[i] != HUGETLB) {
			munlock(ram.hva, ram.len);
			madvise(ram.hva, ram.len, backings[i] == ANON ? MADV_DONTNEED : MADV_REMOVE);
		}
		/* Threads' stacks are the process's. */
		struct vcpu *v = machine_add_vcpu(&m, 3);
		uint64_t gpa;
		struct step *steps = machine_share(&m, PAGE, &gpa);
		options.resolver = kvmfault_file_source_resolve;
		options.opaque = open_sparse(LEN);
		options.finalizer = kvmfault_file_source_finalize;
		machine_attach(&m, NULL, &options);
		machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
		steps[0] = (struct step){ READ64, RAM_GPA + 8, 0, 77 };
		steps[1] = (struct step){ STOP, 0, 1, 0 };
		vcpu_load_script(v, gpa);
		vcpu_attach(v);
		long locked = status("VmLck"), before = status("VmRSS");
		double begin = now();
		vcpu_run(v);
		double seconds = now() - begin;
		locked = status("VmLck") - locked;
		EQUAL("what the guest reads", steps[0].value, 0);
		snprintf(figures + strlen(figures), sizeof(figures) - strlen(figures),
			 "%s%s: %.1f ms, %ld KiB more locked, %ld KiB more in use", i ? "; " : "",
			 backing_name(backings[i]), seconds * 1e3, locked, status("VmRSS") - before);
		CHECK(locked < 4096, "%s", figures);
		machine_destroy(&m);
		ram_destroy(&ram);
	}
	note("%s", figures);
}

/* A snapshot is opened, not read, and not locked. */
static void snapshot(void)
{
	SYS(mlockall(MCL_FUTURE));
	long locked = status("VmLck"), used = status("VmRSS");
	struct kvmfault_file_source *source = open_sparse(512ul << 20);
	locked = status("VmLck") - locked;
	used = status("VmRSS") - used;
	CHECK(locked < 1024 && used < 8192, "%ld KiB more locked, %ld KiB more in use", locked, used);
	kvmfault_file_source_free(source);
}

static const struct test_case cases[] = {
	{ "fault-at-a-hole", fault_at_a_hole, true },
	{ "snapshot", snapshot, false },
};
TEST_MAIN(cases)
