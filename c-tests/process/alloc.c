/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Serving a fault allocates nothing, neither on the vCPU's thread nor on the library's reader
 * threads. This program has its own malloc, which counts calls; the library uses it as all of the
 * process does.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

/* ---- malloc: from an arena that only grows ---- */

#define ARENA (1ul << 30)
static atomic_ulong allocations; /* by all threads */
static _Atomic(uint8_t *) arena;
static atomic_ulong used;

static void *take(size_t size, size_t alignment)
{
	allocations++;
	if (!arena) {
		uint8_t *none = NULL;
		uint8_t *new =
			mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (new == MAP_FAILED)
			return NULL;
		if (!atomic_compare_exchange_strong(&arena, &none, new))
			munmap(new, ARENA);
	}
	if (alignment < 16)
		alignment = 16;
	/* The size is kept before the block, for realloc. */
	size_t at = atomic_fetch_add(&used, size + alignment + 16);
	if (size > ARENA || at + size + alignment + 16 > ARENA) {
		errno = ENOMEM;
		return NULL;
	}
	uintptr_t block = ((uintptr_t)arena + at + 16 + alignment - 1) / alignment * alignment;
	memcpy((void *)(block - 8), &size, 8);
	return (void *)block;
}

void *malloc(size_t size)
{
	return take(size, 16);
}

void free(void *block)
{
	(void)block;
}

void *calloc(size_t count, size_t size)
{
	size_t all;
	if (__builtin_mul_overflow(count, size, &all)) {
		errno = ENOMEM;
		return NULL;
	}
	return take(all, 16); /* fresh from mmap: zeros */
}

void *realloc(void *block, size_t size)
{
	size_t old = 0;
	void *new = take(size, 16);
	if (block)
		memcpy(&old, (uint8_t *)block - 8, 8);
	if (new &&old)
		memcpy(new, block, old < size ? old : size);
	return new;
}

void *memalign(size_t alignment, size_t size);
void *memalign(size_t alignment, size_t size)
{
	return take(size, alignment);
}

void *aligned_alloc(size_t alignment, size_t size)
{
	return take(size, alignment);
}

int posix_memalign(void **block, size_t alignment, size_t size)
{
	*block = take(size, alignment);
	return *block ? 0 : ENOMEM;
}

size_t malloc_usable_size(void *block);
size_t malloc_usable_size(void *block)
{
	size_t size = 0;
	if (block)
		memcpy(&size, (uint8_t *)block - 8, 8);
	return size;
}

/* ---- faults ---- */

enum { PAGES = 2048, WARM_UP = 64, VCPUS = 2 };

static pthread_barrier_t warm, measured, done;

static void *verify_twice(struct vcpu *v)
{
	vcpu_attach(v);
	vcpu_verify(v);
	pthread_barrier_wait(&warm);
	pthread_barrier_wait(&measured);
	vcpu_verify(v);
	pthread_barrier_wait(&done);
	return NULL;
}

static bool is_open(int fd)
{
	return fcntl(fd, F_GETFD) >= 0;
}

/*
 * vCPUs verify a few pages, and then, with the counter running, all: some alone, some in each
 * other's way.
 */
enum origin { CALLBACK, MAPPED_FILE, READ_FILE };

static void faults(enum backing backing, enum origin origin)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct machine m;
	struct ram ram;
	struct source source;
	uint64_t list_gpa;
	ram_create(&ram, backing, PAGES * PAGE);
	machine_create(&m, PAGES * sizeof(uint32_t));
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	if (origin != CALLBACK) {
		struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
		struct kvmfault_file_source *file;
		uint8_t bytes[PAGE];
		int snapshot = SYS(memfd_create("snapshot", MFD_CLOEXEC));
		for (uint64_t page = 0; page < PAGES; page++) {
			pattern_fill(&source.pattern, page, bytes);
			EQUAL("pwrite", pwrite(snapshot, bytes, PAGE, page * PAGE), PAGE);
		}
		range.gpa = RAM_GPA;
		range.len = ram.len;
		struct rlimit before, little;
		SYS(getrlimit(RLIMIT_AS, &before));
		if (origin == READ_FILE) {
			/* A process that may map no more than it has. */
			SYS(ftruncate(snapshot, 1ul << 30));
			little = before;
			little.rlim_cur = 2ul << 20;
			SYS(setrlimit(RLIMIT_AS, &little));
		}
		OK(kvmfault_file_source_new(snapshot, &range, 1, &file));
		SYS(setrlimit(RLIMIT_AS, &before));
		EQUAL("is the file mapped?", close(snapshot) == 0 && !is_open(snapshot + 1), origin == MAPPED_FILE);
		options.resolver = kvmfault_file_source_resolve;
		options.opaque = file;
		options.finalizer = kvmfault_file_source_finalize;
	}
	unsigned long before = allocations;
	machine_attach(&m, &source, &options);
	/* The library's allocations are counted at all. */
	CHECK(allocations > before, "kvmfault_vm_new allocated nothing: this program's malloc isn't the library's");
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	uint32_t *list = machine_share(&m, PAGES * sizeof(*list), &list_gpa);
	list_shuffle(list, PAGES, 9);

	pthread_barrier_init(&warm, NULL, VCPUS + 1);
	pthread_barrier_init(&measured, NULL, VCPUS + 1);
	pthread_barrier_init(&done, NULL, VCPUS + 1);
	for (int i = 0; i < VCPUS; i++) {
		struct vcpu *v = machine_add_vcpu(&m, i % 2 ? 0 : 3);
		vcpu_load_verify(v, RAM_GPA, list_gpa, WARM_UP, &source.pattern, READ_FIRST);
		vcpu_start(v, verify_twice, NULL);
	}
	pthread_barrier_wait(&warm);
	struct kvmfault_stats stats = machine_settled_stats(&m);
	uint64_t faults = stats.faults_vcpu;
	for (int i = 0; i < VCPUS; i++)
		vcpu_load_verify(m.vcpu[i], RAM_GPA, list_gpa, PAGES, &source.pattern, READ_FIRST);

	before = allocations;
	pthread_barrier_wait(&measured);
	pthread_barrier_wait(&done);
	unsigned long during = allocations - before;
	stats = machine_settled_stats(&m);
	note("%lu faults, %lu allocations", stats.faults_vcpu - faults, during);
	CHECK(stats.faults_vcpu - faults >= PAGES - WARM_UP, "only %lu faults", stats.faults_vcpu - faults);
	EQUAL("allocations while faults were served", during, 0);
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(m.vcpu[i]);
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
}

static void anon(void)
{
	faults(ANON, CALLBACK);
}

static void memfd(void)
{
	faults(MEMFD, CALLBACK);
}

static void file(void)
{
	faults(MEMFD, MAPPED_FILE);
}

/* Which can't be mapped: into a buffer that each thread has. */
static void read_file(void)
{
	faults(MEMFD, READ_FILE);
	faults(ANON, READ_FILE);
}

/* The counter counts: a test that can't fail proves nothing. */
static void counter_counts(void)
{
	unsigned long before = allocations;
	void *volatile block = malloc(10);
	block = realloc(block, 20);
	free(block);
	EQUAL("allocations", allocations - before, 2);
	before = allocations;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	CHECK(allocations > before, "kvmfault_probe allocated nothing: this program's malloc isn't the library's");
}

static const struct test_case cases[] = {
	{ "counter", counter_counts, false }, { "anon", anon, true }, { "memfd", memfd, true }, { "file", file, true },
	{ "read-file", read_file, true },
};
TEST_MAIN(cases)
