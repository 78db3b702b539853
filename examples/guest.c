/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "guest.h"

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

void guest_write_order(uint32_t *order, uint64_t pages, bool shuffled)
{
	uint64_t random = 88172645463325252ull;
	for (uint64_t i = 0; i < pages; i++)
		order[i] = i;
	for (uint64_t i = pages - 1; shuffled && i > 0; i--) {
		random ^= random << 13, random ^= random >> 7, random ^= random << 17; /* xorshift */
		uint64_t other = random % (i + 1);
		uint32_t swap = order[i];
		order[i] = order[other];
		order[other] = swap;
	}
}
