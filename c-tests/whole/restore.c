/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VM whose memory is absent gets each page once, with the right bytes: the guest checks each
 * page, then the host does.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <sys/mman.h>
#include <unistd.h>

enum { VCPUS = 4 };

struct plan {
	enum backing backing;
	uint64_t len;
	bool shuffled;
	int mode; /* READ_FIRST or WRITE_FIRST */
	uint32_t readahead;
	int snapshot; /* a file for the built-in source, or -1 for the test's own */
};

/*
 * Restores a VM of VCPUS vCPUs, each with its share of the list; even ones run at CPL 3 and odd
 * ones at CPL 0.
 */
static void restore(const struct plan *p)
{
	struct pattern pattern = PATTERN;
	struct machine m;
	struct ram ram;
	struct source source;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	uint64_t list_gpa;

	pattern.zero_mask = 0x30;
	/* Emulation is slow, and a quarter shows as much. */
	ram_create(&ram, p->backing, p->backing == HUGETLB ? p->len : SCALED(p->len >> 20, 4) << 20);
	uint64_t pages = ram.len / PAGE;
	machine_create(&m, pages * sizeof(uint32_t));
	source_create(&source, RAM_GPA, ram.len, pattern);
	source.window = p->readahead > 1;
	options.readahead = p->readahead;
	if (p->snapshot >= 0) {
		struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
		struct kvmfault_file_source *file;
		range.gpa = RAM_GPA;
		range.len = ram.len;
		OK(kvmfault_file_source_new(p->snapshot, &range, 1, &file));
		options.resolver = kvmfault_file_source_resolve;
		options.opaque = file;
		options.finalizer = kvmfault_file_source_finalize;
	}
	machine_attach(&m, &source, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	EQUAL("pages absent before", kvmfault_pages_absent(m.library), ram.len / ram.page);

	uint32_t *list = machine_share(&m, pages * sizeof(*list), &list_gpa);
	if (p->shuffled)
		list_shuffle(list, pages, 42);
	else
		list_sequential(list, pages);
	for (uint64_t i = 0; i < VCPUS; i++) {
		uint64_t first = pages * i / VCPUS, end = pages * (i + 1) / VCPUS;
		struct vcpu *v = machine_add_vcpu(&m, i % 2 ? 0 : 3);
		vcpu_load_verify(v, RAM_GPA, list_gpa + first * sizeof(*list), end - first, &pattern, p->mode);
		vcpu_start_verify(v);
	}
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(m.vcpu[i]);

	struct kvmfault_stats stats = machine_settled_stats(&m);
	UNTIL(kvmfault_pages_absent(m.library) == 0); /* the guest may be ahead of the counters */
	for (uint64_t page = 0; page < pages; page++) {
		const uint64_t *words = (const uint64_t *)(ram.hva + page * PAGE);
		for (unsigned w = 0; w < PAGE / 8; w++) {
			uint64_t expected = pattern_word(&pattern, page, w);
			if (p->mode == WRITE_FIRST && w == PAGE / 8 - 1)
				expected = ~expected;
			CHECK(words[w] == expected, "the host sees %#lx in word %u of page %lu, not %#lx", words[w], w,
			      page, expected);
		}
	}

	uint64_t units = ram.len / ram.page;
	EQUAL("pages that arrived", stats.pages_copied + stats.pages_zeroed + stats.pages_mapped, units);
	CHECK(stats.faults_vcpu + stats.ahead_asked >= stats.resolver_calls, "%lu faults, %lu resolver calls",
	      stats.faults_vcpu + stats.ahead_asked, stats.resolver_calls);
	EQUAL("outcome_failed", stats.outcome_failed, 0);
	if (p->readahead <= 1) {
		EQUAL("resolver calls", stats.resolver_calls, units);
		EQUAL("resolved faults", stats.outcome_resolved, units);
	} else {
		/* Neighbours come along, more and more of them, where there is an order. */
		uint64_t most = p->shuffled ? units : units / p->readahead + 8 * VCPUS;
		/*
		 * A window with a hole comes in two pieces: with userfaultfd the guest may fault on
		 * the second before the reader has come to it.
		 */
		if (p->snapshot >= 0 && test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD)
			most += units / 64;
		CHECK(stats.resolver_calls <= most, "%lu resolver calls for %lu pages, %u at a time",
		      stats.resolver_calls, units, p->readahead);
	}
	if (p->snapshot < 0) {
		EQUAL("calls counted by the resolver", source.total, stats.resolver_calls);
		for (uint64_t page = 0; page < pages && p->readahead <= 1; page++)
			EQUAL("calls for a page", source.calls[page], page * PAGE % ram.page == 0);
	} else if (p->readahead <= 1) {
		EQUAL("holes installed as zeros", stats.pages_zeroed, units / 4);
	}

	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
}

static void anon(void)
{
	restore(&(struct plan){ ANON, 16 << 20, true, READ_FIRST, 1, -1 });
}

static void anon_sequential(void)
{
	restore(&(struct plan){ ANON, 16 << 20, false, READ_FIRST, 1, -1 });
}

static void anon_written(void)
{
	restore(&(struct plan){ ANON, 16 << 20, true, WRITE_FIRST, 1, -1 });
}

static void memfd(void)
{
	restore(&(struct plan){ MEMFD, 16 << 20, true, READ_FIRST, 1, -1 });
}

static void memfd_sequential(void)
{
	restore(&(struct plan){ MEMFD, 16 << 20, false, READ_FIRST, 1, -1 });
}

static void memfd_written(void)
{
	restore(&(struct plan){ MEMFD, 16 << 20, true, WRITE_FIRST, 1, -1 });
}

static void hugetlb(void)
{
	restore(&(struct plan){ HUGETLB, 16 << 20, true, READ_FIRST, 1, -1 });
}

static void hugetlb_written(void)
{
	restore(&(struct plan){ HUGETLB, 16 << 20, true, WRITE_FIRST, 1, -1 });
}

static void with_readahead(void)
{
	restore(&(struct plan){ MEMFD, 16 << 20, false, READ_FIRST, 16, -1 });
	restore(&(struct plan){ ANON, 16 << 20, true, READ_FIRST, 64, -1 });
}

/* A snapshot with the pattern of restore(); its zero pages are holes. */
static int write_snapshot(uint64_t len)
{
	struct pattern pattern = PATTERN;
	uint8_t bytes[PAGE];
	int fd = SYS(memfd_create("snapshot", MFD_CLOEXEC));
	pattern.zero_mask = 0x30;
	SYS(ftruncate(fd, len));
	for (uint64_t page = 0; page < len / PAGE; page++) {
		pattern_fill(&pattern, page, bytes);
		if (pattern_word(&pattern, page, 0) != 0)
			EQUAL("pwrite", pwrite(fd, bytes, PAGE, page * PAGE), PAGE);
	}
	return fd;
}

static void file(void)
{
	int snapshot = write_snapshot(16 << 20);
	restore(&(struct plan){ MEMFD, 16 << 20, true, READ_FIRST, 1, snapshot });
	restore(&(struct plan){ ANON, 16 << 20, true, READ_FIRST, 1, snapshot });
}

static void file_readahead(void)
{
	int snapshot = write_snapshot(16 << 20);
	restore(&(struct plan){ MEMFD, 16 << 20, false, READ_FIRST, 32, snapshot });
	restore(&(struct plan){ ANON, 16 << 20, false, WRITE_FIRST, 32, snapshot });
}

/* Without a mechanism forced the library takes the best that serves the memory, and it works. */
static void automatic(void)
{
	restore(&(struct plan){ MEMFD, 4 << 20, true, READ_FIRST, 1, -1 });
	restore(&(struct plan){ ANON, 4 << 20, true, READ_FIRST, 1, -1 });
}

static const struct test_case cases[] = {
	{ "anon", anon, true },
	{ "anon-sequential", anon_sequential, true },
	{ "anon-written", anon_written, true },
	{ "memfd", memfd, true },
	{ "memfd-sequential", memfd_sequential, true },
	{ "memfd-written", memfd_written, true },
	{ "hugetlb", hugetlb, true },
	{ "hugetlb-written", hugetlb_written, true },
	{ "readahead", with_readahead, true },
	{ "file", file, true },
	{ "file-readahead", file_readahead, true },
	{ "automatic", automatic, false },
};
TEST_MAIN(cases)
