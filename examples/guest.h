/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the host knows about the guest of the examples (guest.S): the content that it expects in its
 * pages, and the order in which it visits them.
 */
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stdint.h>

extern const uint8_t guest_start[], guest_end[];

#define GUEST_FACTOR 0x9e3779b97f4a7c15ul /* any odd number with many bits */
#define GUEST_DONE_PORT 0x10
#define GUEST_REPORT_PORT 0x11
#define GUEST_PAGE_WORDS 512

/* Whether a page of the snapshot is all zero. */
bool guest_is_zero_page(uint64_t page);
/* What word `w` of a page of the snapshot should be. */
uint64_t guest_word(uint64_t page, uint64_t w);
/* Writes a page of the snapshot to `words`. */
void guest_fill_page(uint64_t *words, uint64_t page);

/* Whether each word of guest memory is what it should be: zero, or as in the snapshot. */
bool guest_memory_is_right(const void *memory, uint64_t pages, bool zero);

/*
 * Writes the list of pages for the guest: each page once, `run` neighbours in a row, the runs in
 * a random order that is the same each time. A run of one page gives a shuffled list, and a run
 * of all pages a sequential one.
 */
void guest_write_order(uint32_t *order, uint64_t pages, uint64_t run);

#endif
