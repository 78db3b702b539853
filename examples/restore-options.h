/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The command line of lazy-restore.
 */
#ifndef RESTORE_OPTIONS_H
#define RESTORE_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

struct options {
	const char *mechanism; /* a name, or "all" */
	unsigned vcpus;
	uint64_t size;
	uint64_t run;       /* pages that the guest touches in a row (guest_write_order) */
	int cpl;            /* 0, 3, or -1 for both */
	unsigned readahead; /* 0: one row without and one with readahead */
	int64_t wrong_byte; /* offset in the snapshot, or -1 */
	const char *json;   /* a path, or NULL */
};

/* Reads the command line; ends the program for --help and for an error. */
void parse_options(int argc, char **argv, struct options *options);

#endif
