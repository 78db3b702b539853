/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Snapshots that kvmfault_file_source_new must refuse, and what becomes of faults that a snapshot
 * can't serve.
 */
#define _GNU_SOURCE
#include "intact_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { FILE_PAGES = 8 };

static int snapshot(void)
{
	static uint8_t bytes[FILE_PAGES * PAGE];
	int fd = SYS(memfd_create("snapshot", MFD_CLOEXEC));
	memset(bytes, 0x5c, sizeof(bytes));
	EQUAL("written", SYS(write(fd, bytes, sizeof(bytes))), sizeof(bytes));
	return fd;
}

static struct kvmfault_file_range range_of(uint64_t gpa, uint64_t len, uint64_t offset)
{
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	range.gpa = gpa;
	range.len = len;
	range.offset = offset;
	return range;
}

static void refuse(int fd, const struct kvmfault_file_range *ranges, size_t count, int error, const char *words)
{
	struct kvmfault_file_source *source = (struct kvmfault_file_source *)1;
	REFUSED(kvmfault_file_source_new(fd, ranges, count, &source), error, words);
	CHECK(source == NULL, "the handle is %p after an error", (void *)source);
}

static void wrong_arguments(void)
{
	int fd = snapshot(), directory = SYS(open("/", O_RDONLY | O_CLOEXEC)), pipes[2];
	const struct kvmfault_file_range good = range_of(INTACT_VM_GPA, FILE_PAGES * PAGE, 0);
	struct kvmfault_file_source *source;
	SYS(pipe2(pipes, O_CLOEXEC));
	REFUSED(kvmfault_file_source_new(fd, &good, 1, NULL), EINVAL, "source");
	refuse(fd, NULL, 1, EINVAL, "ranges");
	refuse(fd, NULL, 0, EINVAL, "ranges");
	refuse(fd, &good, 0, EINVAL, "ranges");
	refuse(fd, &good, SIZE_MAX, EINVAL, "ranges");
	refuse(fd, &good, 4097, EINVAL, "ranges");
	refuse(closed_fd(), &good, 1, EBADF, "fd");
	refuse(-1, &good, 1, EBADF, "fd");
	refuse(INT_MIN, &good, 1, EBADF, "fd");
	refuse(directory, &good, 1, EINVAL, "fd");
	refuse(pipes[0], &good, 1, EINVAL, "fd");
	close(pipes[1]); /* opening its other end would wait for a writer now */
	refuse(pipes[0], &good, 1, EINVAL, "fd");
	refuse(SYS(open("/dev/null", O_RDONLY | O_CLOEXEC)), &good, 1, EINVAL, "fd");
	refuse(new_uffd(), &good, 1, EINVAL, "fd");
	OK(kvmfault_file_source_new(fd, &good, 1, &source));
	kvmfault_file_source_free(source);
}

static void wrong_ranges(void)
{
	const uint64_t len = FILE_PAGES * PAGE;
	const struct kvmfault_file_range bad[] = {
		range_of(INTACT_VM_GPA, 0, 0),
		range_of(INTACT_VM_GPA, len + PAGE, 0),
		range_of(INTACT_VM_GPA, len, PAGE),
		range_of(INTACT_VM_GPA, PAGE, len),
		range_of(INTACT_VM_GPA, PAGE, -PAGE),
		range_of(INTACT_VM_GPA, -PAGE, PAGE),
		range_of(INTACT_VM_GPA, -PAGE, 2 * PAGE),
		range_of(INTACT_VM_GPA + 1, PAGE, 0),
		range_of(INTACT_VM_GPA, PAGE + 1, 0),
		range_of(INTACT_VM_GPA, PAGE, 512),
		range_of(-PAGE, 2 * PAGE, 0),
	};
	int fd = snapshot();
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		refuse(fd, &bad[i], 1, EINVAL, "ranges");
		/* Not only the first is looked at. */
		struct kvmfault_file_range two[] = { range_of(0, PAGE, 0), bad[i] };
		refuse(fd, two, 2, EINVAL, "ranges");
	}
	struct kvmfault_file_range twice[] = { range_of(0, 2 * PAGE, 0), range_of(PAGE, PAGE, 4 * PAGE) };
	refuse(fd, twice, 2, EINVAL, "ranges");
}

static void wrong_sizes(void)
{
	int fd = snapshot();
	struct kvmfault_file_source *source;
	struct kvmfault_file_range range = range_of(INTACT_VM_GPA, PAGE, 0);
	for (const size_t *bad = (const size_t[]){ 1, 8, 4097, SIZE_MAX, 0 }; *bad; bad++) {
		range.size = *bad;
		refuse(fd, &range, 1, EINVAL, "size");
	}
	range.size = 0;
	refuse(fd, &range, 1, EINVAL, "size");

	/* An array of a newer program: its elements are as far apart as the first one says. */
	struct {
		struct kvmfault_file_range range;
		uint64_t more;
	} newer[2] = { { range_of(0, PAGE, 0), 0 }, { range_of(PAGE, PAGE, PAGE), 0 } };
	newer[0].range.size = newer[1].range.size = sizeof(newer[0]);
	OK(kvmfault_file_source_new(fd, &newer[0].range, 2, &source));
	kvmfault_file_source_free(source);
	newer[1].more = 1;
	refuse(fd, &newer[0].range, 2, E2BIG, "size");
	newer[1].more = 0;
	newer[1].range.size = sizeof(struct kvmfault_file_range); /* not the same array */
	refuse(fd, &newer[0].range, 2, EINVAL, "size");
}

/*
 * The guest wants a page that the snapshot doesn't have: its vCPU's loop says so, and goes on when
 * the page comes otherwise.
 */
static void a_page_that_is_not_in_it(void)
{
	struct intact_vm s;
	struct kvmfault_file_source *source;
	struct kvmfault_file_range range = range_of(INTACT_VM_GPA + 16 * PAGE, PAGE, 0);
	int fd = snapshot();
	OK(kvmfault_file_source_new(fd, &range, 1, &source));
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = kvmfault_file_source_resolve;
	options.opaque = source;
	options.finalizer = kvmfault_file_source_finalize;
	options.mechanism = test_mechanism();
	if (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD)
		skip("a vCPU that waits in userfaultfd waits until the page comes");
	intact_vm_create_with(&s, &options);

	REFUSED(intact_vm_read(&s, 20), ENXIO, "gpa");
	EQUAL("the page", OK(kvmfault_pages_state(s.machine.library, INTACT_VM_GPA + 20 * PAGE)), KVMFAULT_PAGE_ABSENT);
	REFUSED(kvmfault_pages_resolve(s.machine.library, INTACT_VM_GPA + 20 * PAGE, PAGE), ENXIO, "gpa");
	EQUAL("reading a page that is in it", intact_vm_read(&s, 16), KVMFAULT_PASS);
	EQUAL("what it has", s.script[0].value, 0x5c5c5c5c5c5c5c5c);
	OK(kvmfault_pages_zero(s.machine.library, INTACT_VM_GPA + 20 * PAGE, PAGE));
	EQUAL("reading the page that wasn't", intact_vm_read(&s, 20), KVMFAULT_PASS);
	EQUAL("what it has", s.script[0].value, 0);
	intact_vm_destroy(&s);
}

/* The file must not change; if it is cut short all the same, that is an I/O error and no SIGBUS. */
static void a_file_that_is_cut_short(void)
{
	struct intact_vm s;
	struct kvmfault_file_source *source;
	struct kvmfault_file_range range = range_of(INTACT_VM_GPA + 16 * PAGE, FILE_PAGES * PAGE, 0);
	int fd = snapshot();
	OK(kvmfault_file_source_new(fd, &range, 1, &source));
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = kvmfault_file_source_resolve;
	options.opaque = source;
	options.finalizer = kvmfault_file_source_finalize;
	intact_vm_create_with(&s, &options);
	SYS(ftruncate(fd, 2 * PAGE));
	REFUSED(kvmfault_pages_resolve(s.machine.library, INTACT_VM_GPA + 18 * PAGE, PAGE), EIO, "resolver");
	EQUAL("the page", OK(kvmfault_pages_state(s.machine.library, INTACT_VM_GPA + 18 * PAGE)), KVMFAULT_PAGE_ABSENT);
	OK(kvmfault_pages_resolve(s.machine.library, INTACT_VM_GPA + 17 * PAGE, PAGE));
	intact_vm_destroy(&s);
}

static const struct test_case cases[] = {
	{ "wrong-arguments", wrong_arguments, false },
	{ "wrong-ranges", wrong_ranges, false },
	{ "wrong-sizes", wrong_sizes, false },
	{ "a-page-that-is-not-in-it", a_page_that_is_not_in_it, true },
	{ "a-file-that-is-cut-short", a_file_that_is_cut_short, false },
};
TEST_MAIN(cases)
