/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "ram.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MFD_HUGETLB_2MB (MFD_HUGETLB | 21u << 26)

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
		skip("%lu huge pages of 2 MiB can't be had (%ld in " NR_HUGEPAGES "; raising it needs root)",
		     (unsigned long)n, pool);
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
		ram->hva = mmap(NULL, ram->len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
				0);
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
