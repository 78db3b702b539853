/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Memory for slots under test: private, shared (memfd), or of huge pages. */
#ifndef RAM_H
#define RAM_H

#include "harness.h"

#define PAGE 4096ul
#define HUGE_PAGE (2ul << 20)

static inline uint64_t round_up(uint64_t n, uint64_t to)
{
	return (n + to - 1) / to * to;
}

enum backing { ANON, MEMFD, HUGETLB };
struct ram {
	enum backing backing;
	uint8_t *hva;
	uint64_t len, page; /* bytes; of one of its pages, too */
	int fd;             /* -1 for ANON */
};
const char *backing_name(enum backing backing);
/*
 * Makes sure that `n` pages of 2 MiB are neither used nor reserved; skips the case if that fails.
 */
void huge_pages_provide(uint64_t n);
/* With HUGETLB it provides the huge pages itself. */
void ram_create(struct ram *ram, enum backing backing, uint64_t len);
void ram_destroy(struct ram *ram);
/*
 * Another mapping of the whole file, as another process has it; at a multiple of 2 MiB. Not for
 * ANON.
 */
uint8_t *ram_map_again(const struct ram *ram);

#endif
