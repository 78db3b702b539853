/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The working set: recorded in one run of a guest, fetched first in the next; and files that are of
 * no use.
 */
#define _GNU_SOURCE
#include "slot_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES SCALED(8192, 2048)
#define TOUCHED (PAGES / 10)

struct run {
	struct slot_vm s;
	struct vcpu *v;
	atomic_ulong calls;
	uint64_t first_asked;
};

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct run *r = opaque;
	if (r->calls++ == 0)
		r->first_asked = fault->window_gpa;
	int ret = source_install(&r->s.source, vm, fault->window_gpa, fault->window_len);
	return ret == -EEXIST ? 0 : OK(ret);
}

static void create(struct run *r, enum backing backing, uint64_t pages, uint32_t readahead)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct slot_vm *s = &r->s;
	memset(r, 0, sizeof(*r));
	ram_create(&s->ram, backing, pages * PAGE);
	s->pages = pages;
	machine_create(&s->m, pages * sizeof(uint32_t));
	source_create(&s->source, RAM_GPA, s->ram.len, PATTERN);
	s->list = machine_share(&s->m, pages * sizeof(uint32_t), &s->list_gpa);
	list_sequential(s->list, pages);
	list_shuffle(s->list, pages, 23);
	options.resolver = resolve;
	options.opaque = r;
	options.readahead = readahead;
	machine_attach(&s->m, &s->source, &options);
	machine_set_slot(&s->m, &s->ram, RAM_SLOT, RAM_GPA);
	r->v = slot_vm_add_vcpu(s, 3);
}

static void destroy(struct run *r)
{
	vcpu_detach(r->v);
	slot_vm_destroy(&r->s);
}

static unsigned long faults(const struct run *r)
{
	struct kvmfault_stats stats = machine_settled_stats(&r->s.m);
	return stats.outcome_resolved + stats.outcome_waited;
}

static int new_file(void)
{
	return SYS(memfd_create("working-set", MFD_CLOEXEC));
}

/* Has a guest touch a tenth of its memory, and saves what it needed. */
static int record(enum backing backing, uint32_t readahead, double *seconds)
{
	struct run r;
	int fd = new_file();
	create(&r, backing, PAGES, readahead);
	OK(kvmfault_working_set_record(r.s.m.library, 1));
	double begin = now();
	slot_vm_visit(&r.s, r.v, 0, TOUCHED, READ_FIRST);
	*seconds = now() - begin;
	CHECK(faults(&r) >= TOUCHED * 9 / 10, "%lu faults", faults(&r));
	OK(kvmfault_working_set_save(r.s.m.library, fd));
	destroy(&r);
	return fd;
}

/* The goal that was published for this (REAP, ASPLOS 2021): 97 % fewer faults. */
static void replayed(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		double cold, warm;
		struct run r;
		struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
		struct kvmfault_fill *fill;
		int fd = record(backing, 0, &cold);
		off_t bytes = lseek(fd, 0, SEEK_END);
		create(&r, backing, PAGES, 0);
		options.working_set_fd = fd;
		options.flags = KVMFAULT_FILL_WORKING_SET_ONLY;
		double begin = now();
		OK(kvmfault_fill_start(r.s.m.library, &options, &fill));
		OK(kvmfault_fill_wait_working_set(fill, 60000));
		EQUAL("absent pages", kvmfault_pages_absent(r.s.m.library), PAGES - TOUCHED);
		slot_vm_visit(&r.s, r.v, 0, TOUCHED, READ_FIRST);
		warm = now() - begin;
		OK(kvmfault_fill_wait(fill, 60000));
		kvmfault_fill_free(fill);
		CHECK(faults(&r) <= TOUCHED * 3 / 100, "%lu faults after %lu", faults(&r), TOUCHED);
		EQUAL("pages that came", machine_stats(&r.s.m).pages_copied, TOUCHED + faults(&r));
		note("%s: %lu faults instead of %lu, done %.1f times sooner; %ld bytes", backing_name(backing),
		     faults(&r), TOUCHED, cold / warm, (long)bytes);
		/* And then all the rest, with the guest's memory as it should be. */
		options = (struct kvmfault_fill_options)KVMFAULT_FILL_OPTIONS_INIT;
		OK(kvmfault_fill_start(r.s.m.library, &options, &fill));
		OK(kvmfault_fill_wait(fill, 60000));
		kvmfault_fill_free(fill);
		pattern_check(&r.s.source.pattern, r.s.ram.hva, 0, PAGES);
		destroy(&r);
		close(fd);
	}
}

/* The whole fill begins with what was needed first, the guest runs meanwhile. */
static void first_of_all(void)
{
	double seconds;
	struct run r;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	int fd = record(MEMFD, 64, &seconds);
	create(&r, MEMFD, PAGES, 64);
	options.working_set_fd = fd;
	options.threads = 2;
	OK(kvmfault_fill_start(r.s.m.library, &options, &fill));
	slot_vm_visit(&r.s, r.v, 0, PAGES, WRITE_FIRST);
	OK(kvmfault_fill_wait(fill, 60000));
	OK(kvmfault_fill_wait_working_set(fill, 0));
	kvmfault_fill_free(fill);
	CHECK(r.first_asked != RAM_GPA, "the fill began at the beginning of memory");
	EQUAL("pages that came", machine_stats(&r.s.m).pages_copied, PAGES);
	destroy(&r);
	close(fd);
}

/* A file that is refused changes nothing: the restore goes on without. */
static void useless_files(void)
{
	double seconds;
	uint8_t bytes[65536];
	int pipes[2];
	struct run r;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	int fd = record(MEMFD, 0, &seconds), bad = new_file(), directory = SYS(open("/", O_RDONLY | O_DIRECTORY));
	ssize_t len = SYS(pread(fd, bytes, sizeof(bytes), 0));
	SYS(pipe(pipes));
	create(&r, MEMFD, PAGES, 0);
	options.flags = KVMFAULT_FILL_WORKING_SET_ONLY;
	options.working_set_fd = bad;
#define REFUSED_WITH(words)                                                                  \
	do {                                                                                 \
		REFUSED(kvmfault_fill_start(r.s.m.library, &options, &fill), EINVAL, words); \
		CHECK(!fill, "a handle after an error");                                     \
		EQUAL("absent pages", kvmfault_pages_absent(r.s.m.library), PAGES);          \
	} while (0)
	REFUSED_WITH("not a working set"); /* empty */
	for (ssize_t cut = 1; cut < len; cut += 1 + len / 50) {
		SYS(ftruncate(bad, 0));
		EQUAL("pwrite", pwrite(bad, bytes, cut, 0), cut);
		REFUSED_WITH("working_set_fd");
	}
	for (ssize_t at = 0; at < len; at += 1 + len / 100) {
		uint8_t wrong = bytes[at] ^ 0x10;
		EQUAL("pwrite", pwrite(bad, bytes, len, 0), len);
		EQUAL("pwrite", pwrite(bad, &wrong, 1, at), 1);
		REFUSED_WITH(at < 8 ? "not a working set" : at < 12 ? "version" : "checksum");
	}
	SYS(ftruncate(bad, 2ul << 30));
	REFUSED_WITH("no working set");
	/*
	 * No larger than one of this memory can be, so that a few bytes of guest don't cost a VMM
	 * what the file likes.
	 */
	SYS(ftruncate(bad, PAGES * 30 + 41));
	REFUSED_WITH("no working set");
	options.working_set_fd = directory;
	REFUSED_WITH("regular file");
	options.working_set_fd = pipes[0];
	REFUSED_WITH("regular file");
	close(pipes[0]);
	REFUSED(kvmfault_fill_start(r.s.m.library, &options, &fill), EBADF, "working_set_fd");
	destroy(&r);

	/* Of a VM with other memory. */
	create(&r, MEMFD, PAGES / 2, 0);
	options.working_set_fd = fd;
	REFUSED(kvmfault_fill_start(r.s.m.library, &options, &fill), EINVAL, "another VM");
	options = (struct kvmfault_fill_options)KVMFAULT_FILL_OPTIONS_INIT;
	OK(kvmfault_fill_start(r.s.m.library, &options, &fill));
	OK(kvmfault_fill_wait(fill, 60000));
	kvmfault_fill_free(fill);
	destroy(&r);
}

static off_t size_of(int fd)
{
	return SYS(lseek(fd, 0, SEEK_END));
}

static void recording(void)
{
	struct run r;
	int fd = new_file();
	create(&r, MEMFD, PAGES, 0);
	REFUSED(kvmfault_working_set_save(r.s.m.library, fd), ENODATA, "recorded");
	for (const int *wrong = (const int[]){ -1, 2, 1 << 30, 0 }; *wrong; wrong++)
		REFUSED(kvmfault_working_set_record(r.s.m.library, *wrong), EINVAL, "on");
	OK(kvmfault_working_set_record(r.s.m.library, 1));
	REFUSED(kvmfault_working_set_save(r.s.m.library, -1), EBADF, "fd");
	OK(kvmfault_working_set_save(r.s.m.library, fd));
	off_t empty = size_of(fd);
	slot_vm_visit(&r.s, r.v, 0, 100, READ_FIRST);
	machine_settled_stats(&r.s.m); /* the guest may be ahead of the counters */
	OK(kvmfault_working_set_save(r.s.m.library, fd));
	off_t some = size_of(fd);
	slot_vm_visit(&r.s, r.v, 100, 100, READ_FIRST);
	machine_settled_stats(&r.s.m);
	OK(kvmfault_working_set_save(r.s.m.library, fd));
	CHECK(empty < some && some < size_of(fd), "%ld, %ld and %ld bytes", (long)empty, (long)some, (long)size_of(fd));
	OK(kvmfault_working_set_record(r.s.m.library, 1)); /* anew */
	OK(kvmfault_working_set_save(r.s.m.library, fd));
	EQUAL("bytes", size_of(fd), empty);
	OK(kvmfault_working_set_record(r.s.m.library, 0));
	REFUSED(kvmfault_working_set_save(r.s.m.library, fd), ENODATA, "recorded");
	/* Pages of a fill are not part of the working set. */
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	OK(kvmfault_working_set_record(r.s.m.library, 1));
	OK(kvmfault_fill_start(r.s.m.library, &options, &fill));
	OK(kvmfault_fill_wait(fill, 60000));
	kvmfault_fill_free(fill);
	OK(kvmfault_working_set_save(r.s.m.library, fd));
	EQUAL("bytes", size_of(fd), empty);
	destroy(&r);
	close(fd);
}

static const struct test_case cases[] = {
	{ "replayed", replayed, true },
	{ "first-of-all", first_of_all, true },
	{ "useless-files", useless_files, false },
	{ "recording", recording, false },
};
TEST_MAIN(cases)
