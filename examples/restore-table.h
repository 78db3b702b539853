/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The rows of lazy-restore's comparison, and how they are shown: as a table and as JSON.
 */
#ifndef RESTORE_TABLE_H
#define RESTORE_TABLE_H

#include "options.h"
#include "restore-options.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum way {
	WAY_DEMAND_ZERO, /* memory of zeros, as in a new VM: the least that a first touch costs */
	WAY_READ_FIRST,  /* read the whole snapshot, then start the guest */
	WAY_LAZY,        /* start the guest, and fetch the pages that it touches */
};

struct row {
	enum way way;
	const struct mechanism *mechanism; /* with WAY_LAZY */
	unsigned readahead;                /* pages for one fault at most */
	int cpl;
};

struct result {
	struct row row;
	unsigned vcpus;
	uint64_t pages, faults, resolver_calls;
	double first_work;     /* seconds from the start of the restore to FIRST_WORK_PAGES */
	double seconds;        /* from the start of the restore until all pages are checked */
	double cpu_seconds;    /* CPU time of all threads of the VMM, with the guest's own */
	double p50_us, p99_us; /* of the first touches of pages, as the guest measured them */
	bool verified;
};

const char *row_name(const struct row *row);

void table_print_heading(const struct options *options);
void table_print_result(const struct result *result);
/* In place of a row: why a mechanism does not work on this machine. */
void table_print_reason(const struct mechanism *mechanism);

/* For write_json_list. */
void table_write_result(FILE *file, const void *results, size_t n);

#endif
