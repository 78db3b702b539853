/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The guest of the examples (guest.S) as the VMM knows it: what it expects in its pages, and in which order it visits them.
 */
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stdint.h>

extern const uint8_t guest_start[], guest_end[];

#define GUEST_FACTOR 0x9e3779b97f4a7c15ul /* any odd number with many bits */
#define GUEST_DONE_PORT 0x10
#define GUEST_PAGE_WORDS 512

bool guest_is_zero_page(uint64_t page);
/* What word `w` of a page should be. */
uint64_t guest_word(uint64_t page, uint64_t w);
void guest_fill_page(uint64_t *words, uint64_t page);

/* The list of pages for the guest, each once; the shuffled one is the same in each run. */
void guest_write_order(uint32_t *order, uint64_t pages, bool shuffled);

#endif
