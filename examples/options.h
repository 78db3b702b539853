/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the command lines of the examples have in common.
 */
#ifndef OPTIONS_H
#define OPTIONS_H

#include <kvmfault.h>
#include <stdbool.h>
#include <stdint.h>

struct mechanism {
	const char *name;
	int number; /* KVMFAULT_MECHANISM_* */
};
enum { MECHANISMS = 3 };
extern const struct mechanism mechanisms[MECHANISMS];

/*
 * Whether `mechanism` is to be run, when the option --mechanism was `asked_for` (a name, or
 * "all").
 */
bool mechanism_is_wanted(const struct mechanism *mechanism, const char *asked_for, const struct kvmfault_probe *probe);

/*
 * The number that an option was given as `text`. Ends the program with status 2 and a message if it
 * is not a number, or out of range.
 */
uint64_t option_number(const char *option, const char *text, uint64_t least, uint64_t most);

/*
 * Which of the words in `choices` (separated by |) `text` is, counted from 0. Ends the program like
 * option_number if it is none of them.
 */
int option_choice(const char *option, const char *text, const char *choices);

/* The privilege level that --cpl asks for: 0, 3, or -1 for both. */
int option_cpl(const char *text);

#endif
