/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "guest.h"

#include <string.h>

bool guest_is_zero_page(uint64_t page)
{
	return (page & 0x70) == 0x70;
}

uint64_t guest_word(uint64_t page, uint64_t w)
{
	return guest_is_zero_page(page) ? 0 : (page + 1) * GUEST_FACTOR + w;
}

void guest_fill_page(uint64_t *words, uint64_t page)
{
	for (uint64_t w = 0; w < GUEST_PAGE_WORDS; w++)
		words[w] = guest_word(page, w);
}

bool guest_memory_is_right(const void *memory, uint64_t pages, bool zero)
{
	uint64_t expected[GUEST_PAGE_WORDS] = { 0 };
	const char *page_bytes = memory;

	for (uint64_t page = 0; page < pages; page++, page_bytes += sizeof(expected)) {
		if (!zero)
			guest_fill_page(expected, page);
		if (memcmp(page_bytes, expected, sizeof(expected)))
			return false;
	}
	return true;
}

static void swap_runs(uint32_t *one, uint32_t *other, uint64_t run)
{
	for (uint64_t i = 0; i < run; i++) {
		uint32_t page = one[i];
		one[i] = other[i];
		other[i] = page;
	}
}

void guest_write_order(uint32_t *order, uint64_t pages, uint64_t run)
{
	uint64_t random = 88172645463325252ull;
	for (uint64_t i = 0; i < pages; i++)
		order[i] = i;
	for (uint64_t runs = pages / run; runs > 1; runs--) {
		/* xorshift */
		random ^= random << 13, random ^= random >> 7, random ^= random << 17;
		uint64_t last = runs - 1, other = random % runs;
		if (other != last)
			swap_runs(order + last * run, order + other * run, run);
	}
}
