/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "ram.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MFD_HUGETLB_2MB (MFD_HUGETLB | 21u << 26)

/* ---- memory under test ---- */

/* Not /proc/sys/vm/nr_hugepages: that is of the default size, which may be 1 GiB. */
#define POOL "/sys/kernel/mm/hugepages/hugepages-2048kB/"
#define NR_HUGEPAGES POOL "nr_hugepages"
static long huge_pages_before = -1; /* until it is changed */

static long number_in(const char *path)
{
	long n = -1;
	FILE *file = fopen(path, "r");
	if (file && fscanf(file, "%ld", &n) != 1)
		n = -1;
	if (file)
		fclose(file);
	return n;
}

static void set_huge_pages(long n)
{
	FILE *file = fopen(NR_HUGEPAGES, "w");
	if (file) {
		fprintf(file, "%ld\n", n);
		fclose(file);
	}
}

static void put_huge_pages_back(void)
{
	set_huge_pages(huge_pages_before);
}

static long huge_pages_unused(void)
{
	return number_in(POOL "free_hugepages") - number_in(POOL "resv_hugepages");
}

void huge_pages_provide(uint64_t n)
{
	long missing = (long)n - huge_pages_unused();
	if (missing <= 0)
		return;
	long pool = number_in(NR_HUGEPAGES);
	if (huge_pages_before < 0) {
		huge_pages_before = pool;
		test_cleanup(put_huge_pages_back);
	}
	set_huge_pages(pool + missing);
	if (huge_pages_unused() < (long)n)
		skip("%lu huge pages of 2 MiB can't be had (%ld in " NR_HUGEPAGES "; raising it needs root)", (unsigned long)n, pool);
}

const char *backing_name(enum backing backing)
{
	return (const char *const[]){ "anon", "memfd", "hugetlb" }[backing];
}

/* At a multiple of 2 MiB, as VMMs do it: only so can the kernel use huge pages. */
static void *map_shared(int fd, uint64_t len)
{
	uint8_t *room = mmap(NULL, len + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(room != MAP_FAILED, "mmap: %s", strerror(errno));
	uint8_t *start = (uint8_t *)round_up((uintptr_t)room, HUGE_PAGE);
	uint8_t *mapped = mmap(start, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	if (mapped == MAP_FAILED) {
		munmap(room, len + HUGE_PAGE);
		return MAP_FAILED;
	}
	if (start > room)
		munmap(room, start - room);
	if (start + len < room + len + HUGE_PAGE)
		munmap(start + len, room + HUGE_PAGE - start);
	return mapped;
}

void ram_create(struct ram *ram, enum backing backing, uint64_t len)
{
	*ram = (struct ram){ .backing = backing, .page = backing == HUGETLB ? HUGE_PAGE : PAGE, .fd = -1 };
	ram->len = round_up(len, ram->page);
	if (backing == ANON) {
		ram->hva = mmap(NULL, ram->len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		CHECK(ram->hva != MAP_FAILED, "mmap: %s", strerror(errno));
		/* Transparent huge pages would turn one absent page into none of 512. */
		madvise(ram->hva, ram->len, MADV_NOHUGEPAGE);
		return;
	}
	ram->fd = SYS(memfd_create("test memory", MFD_CLOEXEC | (backing == HUGETLB ? MFD_HUGETLB_2MB : 0)));
	SYS(ftruncate(ram->fd, ram->len));
	if (backing == HUGETLB)
		huge_pages_provide(ram->len / HUGE_PAGE);
	ram->hva = map_shared(ram->fd, ram->len);
	CHECK(ram->hva != MAP_FAILED, "mmap: %s", strerror(errno));
}

void ram_destroy(struct ram *ram)
{
	munmap(ram->hva, ram->len);
	if (ram->fd >= 0)
		close(ram->fd);
}

uint8_t *ram_map_again(const struct ram *ram)
{
	uint8_t *mapped = map_shared(ram->fd, ram->len);
	CHECK(mapped != MAP_FAILED, "mmap: %s", strerror(errno));
	return mapped;
}

/* ---- what is in it ---- */

static bool is_zero(const struct pattern *p, uint64_t page)
{
	return p->zero_mask && (page & p->zero_mask) == p->zero_mask;
}

uint64_t pattern_word(const struct pattern *p, uint64_t page, unsigned word)
{
	return is_zero(p, page) ? 0 : (page + 1) * p->factor + word;
}

void pattern_fill(const struct pattern *p, uint64_t page, void *to)
{
	uint64_t *words = to;
	for (unsigned w = 0; w < PAGE / 8; w++)
		words[w] = pattern_word(p, page, w);
}

void pattern_check(const struct pattern *p, const void *memory, uint64_t first, uint64_t count)
{
	const uint64_t *words = memory;
	for (uint64_t page = first; page < first + count; page++)
		for (unsigned w = 0; w < PAGE / 8; w++, words++)
			CHECK(*words == pattern_word(p, page, w), "page %#lx word %u is %#lx, not %#lx", page, w, *words,
			      pattern_word(p, page, w));
}

void source_create(struct source *s, uint64_t gpa, uint64_t len, struct pattern pattern)
{
	memset(s, 0, sizeof(*s));
	s->pattern = pattern;
	s->gpa = gpa;
	s->pages = len / PAGE;
	s->calls = calloc(s->pages, sizeof(*s->calls));
	CHECK(s->calls, "no memory");
}

void source_destroy(struct source *s)
{
	free((void *)s->calls);
}

atomic_uint vms_going;

int source_install(const struct source *s, struct kvmfault_vm *vm, uint64_t gpa, uint64_t len)
{
	static _Thread_local uint8_t page[PAGE] __attribute__((aligned(PAGE)));
	uint8_t *bytes = page;
	if (len > PAGE) {
		bytes = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(bytes != MAP_FAILED, "mmap: %s", strerror(errno));
	}
	for (uint64_t at = 0; at < len; at += PAGE)
		pattern_fill(&s->pattern, (gpa - s->gpa + at) / PAGE, bytes + at);
	int ret = kvmfault_pages_install(vm, gpa, bytes, len);
	if (len > PAGE)
		munmap(bytes, len);
	return (ret == -EBADF || ret == -ESHUTDOWN) && vms_going ? 0 : ret;
}

int source_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct source *s = opaque;
	CHECK(fault->gpa >= s->gpa && fault->gpa + fault->len <= s->gpa + s->pages * PAGE && fault->gpa % fault->len == 0,
	      "the resolver is asked for [%#lx, +%#lx)", fault->gpa, fault->len);
	s->calls[(fault->gpa - s->gpa) / PAGE]++;
	s->total++;
	*(fault->origin == KVMFAULT_ORIGIN_VCPU ? &s->vcpu : fault->origin == KVMFAULT_ORIGIN_HOST ? &s->host : &s->prefetch) += 1;
	int ret = s->window ? source_install(s, vm, fault->window_gpa, fault->window_len) :
			      source_install(s, vm, fault->gpa, fault->len);
	/* With windows another vCPU may have been first: the library is to take that from a resolver. */
	if (!(s->window && ret == -EEXIST))
		OK(ret);
	return ret;
}

static void *later_main(void *arg)
{
	struct later *l = arg;
	uint64_t seed = 5;
	pthread_mutex_lock(&l->lock);
	for (;;) {
		while (l->head == l->tail && !l->stop)
			pthread_cond_wait(&l->news, &l->lock);
		if (l->head == l->tail)
			break;
		uint64_t gpa = l->queue[l->head++ % 4096];
		pthread_mutex_unlock(&l->lock);
		if (l->most_us)
			usleep(random_number(&seed) % l->most_us);
		OK(source_install(l->source, l->vm, gpa, PAGE));
		pthread_mutex_lock(&l->lock);
	}
	pthread_mutex_unlock(&l->lock);
	return NULL;
}

void later_create(struct later *l, struct source *source, unsigned every, unsigned most_us)
{
	memset(l, 0, sizeof(*l));
	l->source = source;
	l->every = every;
	l->most_us = most_us;
	pthread_mutex_init(&l->lock, NULL);
	pthread_cond_init(&l->news, NULL);
	CHECK(!pthread_create(&l->thread, NULL, later_main, l), "pthread_create");
}

void later_stop(struct later *l)
{
	pthread_mutex_lock(&l->lock);
	l->stop = true;
	pthread_cond_broadcast(&l->news);
	pthread_mutex_unlock(&l->lock);
	pthread_join(l->thread, NULL);
}

int later_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct later *l = opaque;
	uint64_t page = (fault->gpa - l->source->gpa) / PAGE;
	if (page % l->every)
		return source_resolve(l->source, vm, fault);
	l->source->calls[page]++;
	l->source->total++;
	pthread_mutex_lock(&l->lock);
	CHECK(l->tail - l->head < 4096, "too many pages are pending");
	l->vm = vm;
	l->queue[l->tail++ % 4096] = fault->gpa;
	pthread_cond_signal(&l->news);
	pthread_mutex_unlock(&l->lock);
	return KVMFAULT_PENDING;
}
