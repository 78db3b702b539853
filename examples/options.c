/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "options.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct mechanism mechanisms[MECHANISMS] = {
	{ "memslot-flag", KVMFAULT_MECHANISM_MEMSLOT_FLAG },
	{ "poison-trap", KVMFAULT_MECHANISM_POISON_TRAP },
	{ "userfaultfd", KVMFAULT_MECHANISM_USERFAULTFD },
};

uint64_t option_number(const char *option, const char *text, uint64_t least, uint64_t most)
{
	char *end;
	errno = 0;
	unsigned long long n = strtoull(text, &end, 10);
	if (errno || end == text || *end || *text == '-' || n < least || n > most) {
		fprintf(stderr, "%s: --%s takes a number from %llu to %llu, not \"%s\"\n",
			program_invocation_short_name, option, (unsigned long long)least, (unsigned long long)most,
			text);
		exit(2);
	}
	return n;
}

int option_choice(const char *option, const char *text, const char *choices)
{
	const char *word = choices;
	for (int n = 0;; n++) {
		size_t length = strcspn(word, "|");
		if (strlen(text) == length && !strncmp(word, text, length))
			return n;
		if (!word[length])
			break;
		word += length + 1;
	}
	fprintf(stderr, "%s: --%s takes %s, not \"%s\"\n", program_invocation_short_name, option, choices, text);
	exit(2);
}

int option_cpl(const char *text)
{
	return (const int[]){ 0, 3, -1 }[option_choice("cpl", text, "0|3|both")];
}

bool mechanism_is_wanted(const struct mechanism *mechanism, const char *asked_for, const struct kvmfault_probe *probe)
{
	/*
	 * One that is asked for by name is tried in any case: the error says why it does not
	 * work.
	 */
	if (!strcmp(asked_for, mechanism->name))
		return true;
	return !strcmp(asked_for, "all") && probe->mechanisms_shared & 1u << mechanism->number;
}
