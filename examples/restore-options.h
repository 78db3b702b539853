/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What lazy-restore is asked for, and how it shows what came out.
 */
#ifndef RESTORE_OPTIONS_H
#define RESTORE_OPTIONS_H

#include "options.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct options {
	const char *mechanism; /* a name, or "all" */
	unsigned vcpus;
	uint64_t size;
	bool shuffled;
	int cpl; /* 0, 3, or -1 for both */
	unsigned readahead;
	const char *json; /* a path, or NULL */
};

/* One line of the table. */
struct result {
	const char *mechanism;
	int cpl;
	unsigned vcpus;
	uint64_t pages, faults, resolver_calls;
	double seconds, p50_us, p99_us;
	bool verified;
};

/* Reads the command line; ends the program for --help and for what is wrong there. */
void parse_options(int argc, char **argv, struct options *options);

void print_heading(const struct options *options);
void print_result(const struct result *result);
void write_json(const char *path, const struct result *results, size_t count);

#endif
