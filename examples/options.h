/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the examples' command lines have in common.
 */
#ifndef OPTIONS_H
#define OPTIONS_H

#include <stdint.h>

struct mechanism {
	const char *name;
	int number; /* KVMFAULT_MECHANISM_* */
};
enum { MECHANISMS = 3 };
extern const struct mechanism mechanisms[MECHANISMS];

/* An option's number. The program ends with status 2 and a message where `text` is none, or is out of range. */
uint64_t option_number(const char *option, const char *text, uint64_t least, uint64_t most);

/* Which of the words in `choices` (separated by |) `text` is, counted from 0. The program ends likewise if it is none. */
int option_choice(const char *option, const char *text, const char *choices);

#endif
