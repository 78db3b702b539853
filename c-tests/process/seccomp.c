/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The system calls of docs/seccomp.md: a guest's memory is restored lazily under a filter made from
 * the list, in each phase; and each listed call is really made.
 */
#define _GNU_SOURCE
#include "seccomp_filter.h"
#include "seccomp_run.h"

#include <stdio.h>
#include <string.h>

/*
 * One filter for all phases; the next case has one for each phase, as a VMM that narrows its
 * filter.
 */
static void enforced(void)
{
	seccomp_run_prepare();
	seccomp_allow_listed(SET_UP | RUNNING | ENDING);
	seccomp_run_set_up();
	seccomp_run_guest();
	seccomp_run_end();
}

static void narrowed(void)
{
	seccomp_run_prepare();
	seccomp_run_set_up();
	seccomp_allow_listed(RUNNING | ENDING);
	seccomp_run_guest();
	seccomp_run_end();
}

static void enforced_anon(void)
{
	seccomp_run.backing = ANON;
	enforced();
}

static void listed(void)
{
	static char missing[2000];
	unsigned count = 0;
	seccomp_run_prepare();
	seccomp_note_all();
	seccomp_phase = SET_UP;
	seccomp_run_set_up();
	seccomp_phase = RUNNING;
	seccomp_run_guest();
	seccomp_phase = ENDING;
	seccomp_run_end();
	seccomp_phase = 0;
	for (int when = SET_UP; when <= ENDING; when *= 2)
		for (int number = 0; number < SECCOMP_NUMBERS; number++)
			/* Threads of the library may begin late, or be at it still. */
			if (seccomp_seen[number] & when &&
			    !seccomp_is_listed(number, when | (when == ENDING ? RUNNING : 0)))
				snprintf(missing + strlen(missing), sizeof(missing) - strlen(missing),
					 " %d in phase %d;", number, when);
	for (int n = 0; n < SECCOMP_CALLS_LISTED; n++) {
		count += seccomp_seen[seccomp_calls[n].number] != 0;
		if (seccomp_calls[n].certain == ALWAYS &&
		    !(seccomp_seen[seccomp_calls[n].number] & seccomp_calls[n].when))
			snprintf(missing + strlen(missing), sizeof(missing) - strlen(missing), " no %s;",
				 seccomp_calls[n].name);
	}
	CHECK(!*missing, "the list and what is called differ:%s", missing);
	note("%u of %u listed system calls were made", count, (unsigned)SECCOMP_CALLS_LISTED);
}

static const struct test_case cases[] = {
	{ "enforced", enforced, true },
	{ "enforced_anon", enforced_anon, true },
	{ "narrowed", narrowed, true },
	{ "listed", listed, true },
};
TEST_MAIN(cases)
