/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Lazy restore, the example to start from: a VM runs at once, and its memory comes from a snapshot file page by page, as the
 * guest touches it. The guest checks every page and measures how long each first touch takes.
 *
 *   cc lazy-restore.c restore-options.c options.c vcpu-threads.c clock.c tiny-vm.c guest.c guest.S \
 *      $(pkg-config --cflags --libs kvmfault) -pthread -o lazy-restore
 *
 * What a VMM needs of libkvmfault is in restore() here, and in run_vcpu() of vcpu-threads.c.
 */
#define _GNU_SOURCE
#include "clock.h"
#include "guest.h"
#include "restore-options.h"
#include "vcpu-threads.h"

#include <errno.h>
#include <fcntl.h>
#include <kvmfault.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define RAM_SLOT 1

/* ---- the snapshot ---- */

/* Writes what guest.S expects; the zero pages become holes of the file. The file has no name, and goes with its descriptor. */
static int write_snapshot(uint64_t size)
{
	const char *directory = getenv("TMPDIR");
	char path[4096];
	snprintf(path, sizeof(path), "%s/lazy-restore-XXXXXX", directory ? directory : "/var/tmp");
	int fd = mkostemp(path, O_CLOEXEC);
	if (fd < 0)
		die(errno, "%s can't be created (TMPDIR says where)", path);
	unlink(path);
	if (ftruncate(fd, size))
		die(errno, "a snapshot of %lu MiB", (unsigned long)(size >> 20));
	for (uint64_t page = 0; page < size / PAGE_SIZE; page++) {
		uint64_t words[GUEST_PAGE_WORDS];
		guest_fill_page(words, page);
		if (!guest_is_zero_page(page) && pwrite(fd, words, PAGE_SIZE, page * PAGE_SIZE) != PAGE_SIZE)
			die(errno, "writing the snapshot (TMPDIR names a directory with more room)");
	}
	return fd;
}

/* ---- one restore ---- */

struct progress {
	const struct kvmfault_vm *memory;
	uint64_t pages;
	atomic_bool done;
};

/* A line that is written over, on a terminal. */
static void *show_progress(void *arg)
{
	struct progress *p = arg;
	while (!p->done) {
		uint64_t present = p->pages - kvmfault_pages_absent(p->memory);
		fprintf(stderr, "\r%3d %% of %llu pages", (int)(present * 100 / p->pages), (unsigned long long)p->pages);
		usleep(50000);
	}
	fprintf(stderr, "\r%*s\r", 40, "");
	return NULL;
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return (x > y) - (x < y);
}

/* The host's own look: is all of the memory what the snapshot says? */
static bool equals_snapshot(const uint8_t *ram, int snapshot, uint64_t size)
{
	uint8_t *file = mmap(NULL, size, PROT_READ, MAP_SHARED, snapshot, 0);
	if (file == MAP_FAILED)
		die(errno, "mapping the snapshot");
	bool equal = !memcmp(ram, file, size);
	munmap(file, size);
	return equal;
}

static void restore(const struct options *o, const struct mechanism *mechanism, int cpl, int snapshot, struct result *result)
{
	uint64_t pages = o->size / PAGE_SIZE;
	struct vcpu_threads vcpus;
	vcpu_threads_create(&vcpus, o->vcpus, pages, o->shuffled);

	/* The resolver: the library's own, on a snapshot file. A VMM that gets pages from elsewhere has a function of its own here. */
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	struct kvmfault_file_source *source;
	range.gpa = TINY_VM_RAM;
	range.len = o->size;
	if (kvmfault_file_source_new(snapshot, &range, 1, &source))
		die(0, "the snapshot: %s", kvmfault_last_error());

	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vm *memory;
	options.kvm_fd = vcpus.vm.kvm;
	options.vm_fd = vcpus.vm.vm;
	options.mechanism = mechanism->number; /* usually KVMFAULT_MECHANISM_AUTO */
	options.readahead = o->readahead;
	options.resolver = kvmfault_file_source_resolve;
	options.opaque = source;
	options.finalizer = kvmfault_file_source_finalize;
	if (kvmfault_vm_new(&options, &memory))
		die(0, "%s: %s", mechanism->name, kvmfault_last_error());

	/* Shared memory suits all mechanisms, and may be touched by the VMM at any time. It is empty, and stays so until touched. */
	int fd = memfd_create("guest memory", MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, o->size))
		die(errno, "a memfd for the guest's memory");
	uint8_t *ram = mmap(NULL, o->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (ram == MAP_FAILED)
		die(errno, "%lu MiB of guest memory", (unsigned long)(o->size >> 20));
	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	slot.slot = RAM_SLOT;
	slot.gpa = TINY_VM_RAM;
	slot.len = o->size;
	slot.hva = ram;
	if (kvmfault_memslot_set(memory, &slot))
		die(0, "%s: %s", mechanism->name, kvmfault_last_error());

	vcpu_threads_prepare(&vcpus, cpl, memory);
	pthread_t progress_thread;
	struct progress progress = { .memory = memory, .pages = pages };
	bool terminal = isatty(2) && !pthread_create(&progress_thread, NULL, show_progress, &progress);
	vcpu_threads_start(&vcpus);
	double began = seconds_now();
	result->verified = vcpu_threads_join(&vcpus);
	result->seconds = seconds_now() - began;
	progress.done = true;
	if (terminal)
		pthread_join(progress_thread, NULL);

	/* The library may still be booking the last page: with userfaultfd the kernel lets a vCPU go on the moment its page is there. */
	for (int i = 0; i < 1000 && kvmfault_pages_absent(memory) > 0; i++)
		usleep(1000);
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	if (kvmfault_vm_stats(memory, &stats))
		die(0, "%s", kvmfault_last_error());
	qsort(vcpus.ticks, pages, sizeof(*vcpus.ticks), compare);
	double microsecond = ticks_per_microsecond();
	result->mechanism = mechanism->name;
	result->cpl = cpl;
	result->vcpus = o->vcpus;
	result->pages = pages;
	result->faults = stats.faults_vcpu;
	result->resolver_calls = stats.resolver_calls;
	result->p50_us = vcpus.ticks[(pages - 1) / 2] / microsecond;
	result->p99_us = vcpus.ticks[(pages - 1) * 99 / 100] / microsecond;
	result->verified &= kvmfault_pages_absent(memory) == 0 && equals_snapshot(ram, snapshot, o->size);

	kvmfault_vm_free(memory); /* the guest has stopped */
	vcpu_threads_destroy(&vcpus);
	munmap(ram, o->size);
	close(fd);
}

int main(int argc, char **argv)
{
	struct options o;
	parse_options(argc, argv, &o);

	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	if (kvmfault_probe(-1, &probe))
		die(0, "lazy-restore: %s", kvmfault_last_error());

	struct result results[MECHANISMS * 2];
	size_t count = 0;
	bool all_right = true;
	int snapshot = write_snapshot(o.size);
	print_heading(&o);
	for (int m = 0; m < MECHANISMS; m++) {
		bool chosen = !strcmp(o.mechanism, mechanisms[m].name);
		bool works = probe.mechanisms_shared & 1u << mechanisms[m].number;
		/* One that was asked for is tried in any case: the error says why it doesn't work. */
		if (!chosen && !(works && !strcmp(o.mechanism, "all")))
			continue;
		for (int cpl = 3; cpl >= 0; cpl -= 3) {
			if (o.cpl != -1 && o.cpl != cpl)
				continue;
			struct result *r = &results[count++];
			restore(&o, &mechanisms[m], cpl, snapshot, r);
			print_result(r);
			all_right &= r->verified;
		}
	}
	if (!count)
		die(0, "lazy-restore: no mechanism works here; `explain` says why");
	if (o.json)
		write_json(o.json, results, count);
	return all_right ? 0 : 1;
}
