/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Snapshots that can't be mapped: block devices, files of sysfs and procfs, files that the process
 * may not map. And bytes that can't be read, mapped or not.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SNAPSHOT = 16 << 20 };

/* ---- snapshots ---- */

static struct pattern with_zeros(void)
{
	struct pattern pattern = PATTERN;
	pattern.zero_mask = 0x30;
	return pattern;
}

/* Its zero pages, a quarter, are holes. */
static int write_snapshot(uint64_t len)
{
	struct pattern pattern = with_zeros();
	uint8_t bytes[PAGE];
	int fd = SYS(memfd_create("snapshot", MFD_CLOEXEC));
	SYS(ftruncate(fd, len));
	for (uint64_t page = 0; page < len / PAGE; page++) {
		pattern_fill(&pattern, page, bytes);
		if (pattern_word(&pattern, page, 0) != 0)
			EQUAL("pwrite", pwrite(fd, bytes, PAGE, page * PAGE), PAGE);
	}
	return fd;
}

/* A device with the bytes of a file, which goes when it is closed. */
static int loop_device(int file)
{
	int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	if (control < 0)
		skip("/dev/loop-control: %s", strerror(errno));
	for (int tries = 0;; tries++) {
		char path[32];
		struct loop_info64 info = { .lo_flags = LO_FLAGS_AUTOCLEAR };
		int number = ioctl(control, LOOP_CTL_GET_FREE);
		if (number < 0)
			skip("LOOP_CTL_GET_FREE: %s", strerror(errno));
		snprintf(path, sizeof(path), "/dev/loop%d", number);
		int device = open(path, O_RDWR | O_CLOEXEC);
		if (device < 0)
			skip("%s: %s", path, strerror(errno));
		if (ioctl(device, LOOP_SET_FD, file)) {
			if (errno != EBUSY || tries == 100)
				skip("%s: %s", path, strerror(errno));
			close(device); /* another process has it */
			continue;
		}
		SYS(ioctl(device, LOOP_SET_STATUS64, &info));
		close(control);
		return device;
	}
}

static struct kvmfault_file_source *open_source(int fd, uint64_t len)
{
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	struct kvmfault_file_source *source;
	range.gpa = RAM_GPA;
	range.len = len;
	OK(kvmfault_file_source_new(fd, &range, 1, &source));
	return source;
}

/* By a process that may map little more than it has: less than the file. */
static struct kvmfault_file_source *open_source_unmapped(int fd, uint64_t len)
{
	struct rlimit before, little;
	unsigned long pages;
	FILE *file = fopen("/proc/self/statm", "r");
	CHECK(file && fscanf(file, "%lu", &pages) == 1, "/proc/self/statm");
	fclose(file);
	SYS(getrlimit(RLIMIT_AS, &before));
	little = before;
	little.rlim_cur = pages * PAGE + len / 2;
	SYS(setrlimit(RLIMIT_AS, &little));
	struct kvmfault_file_source *source = open_source(fd, len);
	SYS(setrlimit(RLIMIT_AS, &before));
	return source;
}

/* Descriptors of this process for the file that `fd` is of. */
static int descriptors_of(int fd)
{
	struct stat wanted, found;
	int count = 0;
	SYS(fstat(fd, &wanted));
	for (int other = 0; other < 1000; other++)
		count += !fstat(other, &found) && found.st_dev == wanted.st_dev && found.st_ino == wanted.st_ino;
	return count;
}

/* ---- guests ---- */

/* A guest reads all of a snapshot with the pattern, and so does the host. */
static void restore(struct kvmfault_file_source *file, enum backing backing, uint32_t readahead, bool holes)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct pattern pattern = with_zeros();
	struct machine m;
	struct ram ram;
	uint64_t list_gpa;
	ram_create(&ram, backing, backing == HUGETLB ? SNAPSHOT : SCALED(SNAPSHOT >> 20, 2) << 20);
	uint64_t pages = ram.len / PAGE;
	machine_create(&m, pages * sizeof(uint32_t));
	options.readahead = readahead;
	options.resolver = kvmfault_file_source_resolve;
	options.opaque = file;
	options.finalizer = kvmfault_file_source_finalize;
	machine_attach(&m, NULL, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	uint32_t *list = machine_share(&m, pages * sizeof(*list), &list_gpa);
	if (readahead > 1)
		list_sequential(list, pages);
	else
		list_shuffle(list, pages, 42);
	for (uint64_t i = 0; i < 2; i++) {
		struct vcpu *v = machine_add_vcpu(&m, i ? 0 : 3);
		vcpu_load_verify(v, RAM_GPA, list_gpa + pages / 2 * i * sizeof(*list), pages / 2, &pattern, READ_FIRST);
		vcpu_start_verify(v);
	}
	for (int i = 0; i < 2; i++)
		vcpu_join(m.vcpu[i]);
	UNTIL(kvmfault_pages_absent(m.library) == 0); /* the guest may be ahead of the counters */
	pattern_check(&pattern, ram.hva, 0, pages);
	if (backing != HUGETLB)
		EQUAL("holes installed as zeros", machine_settled_stats(&m).pages_zeroed, holes ? pages / 4 : 0);
	machine_destroy(&m);
	ram_destroy(&ram);
}

/* The file's system has mmap, but the process may map no more. */
static void process_may_not_map(void)
{
	int fd = write_snapshot(SNAPSHOT);
	struct kvmfault_file_source *source = open_source_unmapped(fd, SNAPSHOT);
	EQUAL("descriptors of the file: it is read", descriptors_of(fd), 2);
	restore(source, MEMFD, 1, true);
	EQUAL("descriptors of the file, when the source is gone", descriptors_of(fd), 1);
	restore(open_source_unmapped(fd, SNAPSHOT), ANON, 32, true);
	close(fd);
}

/*
 * Pages of 2 MiB are larger than what is read at a time otherwise. The snapshot's holes are small,
 * so it has none here.
 */
static void huge_pages(void)
{
	struct pattern pattern = with_zeros();
	uint8_t bytes[PAGE];
	int fd = SYS(memfd_create("snapshot", MFD_CLOEXEC));
	for (uint64_t page = 0; page < SNAPSHOT / PAGE; page++) {
		pattern_fill(&pattern, page, bytes);
		EQUAL("pwrite", pwrite(fd, bytes, PAGE, page * PAGE), PAGE);
	}
	restore(open_source_unmapped(fd, SNAPSHOT), HUGETLB, 1, false);
	close(fd);
}

/* Mapped as a file is; and read. Its position is the VMM's. */
static void block_device(void)
{
	int file = write_snapshot(SNAPSHOT), device = loop_device(file);
	SYS(lseek(device, 12345, SEEK_SET));
	struct kvmfault_file_source *source = open_source(device, SNAPSHOT);
	EQUAL("descriptors of the device: it is mapped", descriptors_of(device), 1);
	EQUAL("position", SYS(lseek(device, 0, SEEK_CUR)), 12345);
	restore(source, MEMFD, 1, false);
	source = open_source_unmapped(device, SNAPSHOT);
	EQUAL("descriptors of the device: it is read", descriptors_of(device), 2);
	restore(source, ANON, 32, false);
	struct kvmfault_file_range beyond = KVMFAULT_FILE_RANGE_INIT;
	beyond.len = SNAPSHOT + PAGE;
	REFUSED(kvmfault_file_source_new(device, &beyond, 1, &source), EINVAL, "the file has 0x1000000 bytes");
	close(device);
	close(file);
}

/* ---- files without mmap ---- */

/* The guest reads words of each page, and the host all of them. */
static void file_without_mmap(void)
{
	static const char *const paths[] = { "/sys/kernel/btf/vmlinux", "/proc/config.gz",
					     "/sys/firmware/acpi/tables/DSDT", "/sys/firmware/acpi/tables/SSDT1" };
	enum { MOST = 32, WORDS = 8 };
	static uint8_t bytes[MOST * PAGE];
	char tried[300] = "";
	unsigned served = 0;
	for (size_t i = 0; i < sizeof(paths) / sizeof(*paths); i++) {
		struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
		struct stat stat;
		struct machine m;
		struct ram ram;
		uint64_t gpa;
		int fd = open(paths[i], O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		SYS(fstat(fd, &stat));
		uint64_t len = (uint64_t)stat.st_size / PAGE * PAGE;
		if (len == 0 || (len <= MOST * PAGE && mmap(NULL, len, PROT_READ, MAP_SHARED, fd, 0) != MAP_FAILED)) {
			close(fd);
			continue;
		}
		len = len > MOST * PAGE ? MOST * PAGE : len;
		for (uint64_t n = 0; n < len; n += PAGE)
			EQUAL("pread", SYS(pread(fd, bytes + n, PAGE, n)), PAGE);
		machine_create(&m, len / PAGE * WORDS * sizeof(struct step) + PAGE);
		ram_create(&ram, MEMFD, len);
		options.readahead = i % 2 ? 1 : 8;
		options.resolver = kvmfault_file_source_resolve;
		options.opaque = open_source(fd, len);
		options.finalizer = kvmfault_file_source_finalize;
		bool is_read = descriptors_of(fd) == 2;
		close(fd);
		machine_attach(&m, NULL, &options);
		machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
		struct vcpu *v = machine_add_vcpu(&m, 3);
		struct step *steps = machine_share(&m, len / PAGE * WORDS * sizeof(*steps) + PAGE, &gpa);
		uint64_t count = 0;
		for (uint64_t at = 0; at < len; at += PAGE / WORDS)
			steps[count++] = (struct step){ READ64, RAM_GPA + at, 0, 0 };
		steps[count] = (struct step){ STOP, 0, 0, 0 };
		vcpu_load_script(v, gpa);
		vcpu_attach(v);
		EQUAL("stop", vcpu_run(v), 0);
		for (uint64_t n = 0; n < count; n++)
			CHECK(!memcmp(&steps[n].value, bytes + n * (PAGE / WORDS), 8), "%s: word at %#lx", paths[i],
			      n * (PAGE / WORDS));
		machine_settled_stats(&m);
		CHECK(!memcmp(ram.hva, bytes, len), "%s: what the host sees", paths[i]);
		vcpu_detach(v);
		machine_destroy(&m);
		ram_destroy(&ram);
		served += is_read;
		snprintf(tried + strlen(tried), sizeof(tried) - strlen(tried), "%s%s: %lu pages, %s",
			 *tried ? "; " : "", paths[i], len / PAGE, is_read ? "read" : "mapped");
	}
	if (!served)
		skip("no readable file of a page or more that can't be mapped (%s)", *tried ? tried : "none at all");
	note("%s", tried);
}

/* ---- bytes that can't be had ---- */

/* A resolver call by hand, for a page and a window, as a resolver of the VMM's own passes it on. */
static struct kvmfault_fault fault_at(uint64_t page, uint64_t window, uint64_t window_end)
{
	struct kvmfault_fault fault = { .size = sizeof(fault), .origin = KVMFAULT_ORIGIN_VCPU };
	fault.gpa = RAM_GPA + page * PAGE;
	fault.len = PAGE;
	fault.window_gpa = RAM_GPA + window * PAGE;
	fault.window_len = (window_end - window) * PAGE;
	return fault;
}

/*
 * All but the first two of eight pages can't be read any more: a fault in the first two is served
 * though its window has the others.
 */
static void cut_short(void)
{
	for (int is_read = 0; is_read < 2; is_read++) {
		struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
		struct machine m;
		struct ram ram;
		uint64_t gpa, len = 8 * PAGE;
		static uint8_t bytes[8 * PAGE];
		int fd = SYS(memfd_create("snapshot", MFD_CLOEXEC));
		memset(bytes, 0x5c, len);
		EQUAL("pwrite", pwrite(fd, bytes, len, 0), len);
		struct kvmfault_file_source *source;
		if (is_read) {
			/* Of a file that is too large to be mapped, and the rest is a hole. */
			SYS(ftruncate(fd, 64 << 20));
			source = open_source_unmapped(fd, 64 << 20);
			EQUAL("descriptors of the file: it is read", descriptors_of(fd), 2);
		} else {
			source = open_source(fd, len);
		}
		machine_create(&m, PAGE);
		ram_create(&ram, MEMFD, len);
		options.resolver = kvmfault_file_source_resolve;
		options.opaque = source;
		options.finalizer = kvmfault_file_source_finalize;
		machine_attach(&m, NULL, &options);
		machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
		struct step *steps = machine_share(&m, PAGE, &gpa);
		SYS(ftruncate(fd, 2 * PAGE));

		struct kvmfault_fault good = fault_at(1, 0, 8), bad = fault_at(2, 0, 8);
		EQUAL("a page that is there", kvmfault_file_source_resolve(source, m.library, &good),
		      KVMFAULT_RESOLVED);
		for (uint64_t page = 0; page < 8; page++)
			EQUAL("state", OK(kvmfault_pages_state(m.library, RAM_GPA + page * PAGE)),
			      page < 2 ? KVMFAULT_PAGE_PRESENT : KVMFAULT_PAGE_ABSENT);
		REFUSED(kvmfault_file_source_resolve(source, m.library, &bad), EIO, "gpa 0x40002000");
		EQUAL("state", OK(kvmfault_pages_state(m.library, bad.gpa)), KVMFAULT_PAGE_ABSENT);
		/* a vCPU that waits there waits until the page comes */
		if (test_mechanism() != KVMFAULT_MECHANISM_USERFAULTFD) {
			struct vcpu *v = machine_add_vcpu(&m, 3);
			steps[0] = (struct step){ READ64, bad.gpa, 0, 0 };
			steps[1] = (struct step){ STOP, 0, 7, 0 };
			vcpu_load_script(v, gpa);
			vcpu_attach(v);
			REFUSED(kvmfault_vcpu_run(v->handle), EIO, "gpa");
			EQUAL("pwrite", pwrite(fd, bytes, len, 0), len);
			EQUAL("stop, with the file as it was", vcpu_run(v), 7);
			EQUAL("word", steps[0].value, 0x5c5c5c5c5c5c5c5c);
			vcpu_detach(v);
		}
		machine_destroy(&m);
		ram_destroy(&ram);
		close(fd);
	}
}

/* What has no bytes at offsets is refused, and the message says what it is. */
static void no_offsets(void)
{
	int pipes[2], sockets[2], directory = SYS(open("/", O_RDONLY | O_CLOEXEC)),
				  null = SYS(open("/dev/null", O_RDONLY | O_CLOEXEC));
	SYS(pipe2(pipes, O_CLOEXEC));
	SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets));
	const struct {
		int fd;
		const char *words;
	} bad[] = { { pipes[0], "a pipe" },
		    { sockets[0], "a socket" },
		    { directory, "a directory" },
		    { null, "a character device" } };
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
		struct kvmfault_file_source *source;
		range.gpa = RAM_GPA;
		range.len = PAGE;
		REFUSED(kvmfault_file_source_new(bad[i].fd, &range, 1, &source), EINVAL, bad[i].words);
		CHECK(!source, "a handle after an error");
	}
}

static const struct test_case cases[] = {
	{ "process-may-not-map", process_may_not_map, true },
	{ "huge-pages", huge_pages, true },
	{ "block-device", block_device, true },
	{ "file-without-mmap", file_without_mmap, true },
	{ "cut-short", cut_short, true },
	{ "no-offsets", no_offsets, false },
};
TEST_MAIN(cases)
