/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Filters made from the list of system calls in seccomp_calls.h (docs/seccomp.md): of the listed
 * calls, of all but one, and one that notes each call that is made.
 */
#ifndef SECCOMP_FILTER_H
#define SECCOMP_FILTER_H

#include "harness.h"
#include "seccomp_calls.h"

#include <stdatomic.h>

/* When a call is made. */
enum { SET_UP = 1, RUNNING = 2, ENDING = 4 };
/* Which of them may be missing in a run: the C library, the kernel, the options or luck decide. */
enum { ALWAYS, SOMETIMES };

struct seccomp_call {
	const char *name;
	int number, when, certain;
};
#define SECCOMP_COUNT(name, when, certain) +1
enum { SECCOMP_CALLS_LISTED = 0 SECCOMP_CALLS(SECCOMP_COUNT), SECCOMP_NUMBERS = 600 };
extern const struct seccomp_call seccomp_calls[SECCOMP_CALLS_LISTED];

bool seccomp_is_listed(int number, int when);
/* All but the listed calls end the process; for the calling thread, and those that it starts. */
void seccomp_allow_listed(int when);
/* A call fails with EPERM, for all threads. */
void seccomp_refuse(int number);

/* From now on each call of this thread, and of those that it starts, is noted with the phase. */
void seccomp_note_all(void);
extern atomic_int seccomp_phase;
extern atomic_uchar seccomp_seen[SECCOMP_NUMBERS]; /* in which phases */

#endif
