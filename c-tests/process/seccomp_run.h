/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What is run under a filter: a guest's memory is restored lazily, in each way that the library
 * has, in the phases that seccomp_calls.h knows.
 */
#ifndef SECCOMP_RUN_H
#define SECCOMP_RUN_H

#include "machine.h"

enum { PAGES = 256 };

extern struct seccomp_run {
	struct machine machine;
	enum backing backing; /* MEMFD, unless the case says otherwise before seccomp_run_prepare */
	struct ram ram;
	struct source source;
	struct step *steps[2]; /* of each vCPU */
	uint64_t steps_gpa[2];
	bool host_waits; /* no thread of the host is served */
	bool by_handler; /* SIGBUS comes to a handler: seccomp_run_by_handler */
} seccomp_run;

void seccomp_run_by_handler(void);
/* What a VMM does before it has the library. */
void seccomp_run_prepare(void);
void seccomp_run_set_up(void);
void seccomp_run_guest(void);
void seccomp_run_end(void);

#endif
