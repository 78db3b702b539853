/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "restore-table.h"
#include "vcpu-threads.h"

#include <kvmfault.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *row_name(const struct row *row)
{
	switch (row->way) {
	case WAY_DEMAND_ZERO:
		return "demand-zero";
	case WAY_READ_FIRST:
		return "read-first";
	default:
		return row->mechanism->name;
	}
}

/* ---- the table ---- */

void table_print_heading(const struct options *o)
{
	const char *order = "shuffled";
	char runs[48];
	if (o->run > 1) {
		snprintf(runs, sizeof(runs), "in runs of %llu pages", (unsigned long long)o->run);
		order = o->run < o->size / PAGE_SIZE ? runs : "from start to end";
	}
	printf("%u vCPU%s, %llu MiB of guest memory, touched %s.\n\n"
	       "  demand-zero  no snapshot, no library: the kernel supplies zeros. The floor for a first touch.\n"
	       "  read-first   no library: the whole snapshot is read before the guest starts.\n"
	       "  the others   the guest starts at once, and the library fetches each page at its first touch.\n\n"
	       "  readahead    pages fetched for one fault at most\n"
	       "  first work   until the guest has checked its first %d pages; total: until it has checked all\n"
	       "  p50, p99     how long the guest waits for the first touch of a page: median, and all but 1 %%\n"
	       "  cpu          CPU time for each page, of the whole program\n\n",
	       o->vcpus, o->vcpus == 1 ? "" : "s", (unsigned long long)(o->size >> 20), order, FIRST_WORK_PAGES);
	printf("%-12s %9s %3s %10s %8s %6s %7s %7s %7s %6s %s\n", "", "readahead", "cpl", "first work", "total",
	       "faults", "pages/s", "p50 us", "p99 us", "cpu us", "verified");
	fflush(stdout);
}

void table_print_result(const struct result *r)
{
	bool lazy = r->row.way == WAY_LAZY;
	char readahead[16] = "-", faults[24] = "-";
	if (lazy) {
		snprintf(readahead, sizeof(readahead), "%u", r->row.readahead);
		snprintf(faults, sizeof(faults), "%llu", (unsigned long long)r->faults);
	}
	printf("%-12s %9s %3d %7.1f ms %6.2f s %6s %7.0f %7.2f %7.1f %6.1f %s\n", row_name(&r->row), readahead,
	       r->row.cpl, r->first_work * 1e3, r->seconds, faults, r->pages / r->seconds, r->p50_us, r->p99_us,
	       r->cpu_seconds * 1e6 / r->pages, r->verified ? "yes" : "NO");
	fflush(stdout);
}

void table_print_reason(const struct mechanism *mechanism)
{
	/* The library explains all mechanisms, one a line: "  NAME   does not work: REASON". */
	char text[16384], *line = text;
	if (kvmfault_explain(-1, text, sizeof(text)) < 0)
		text[0] = 0;
	char *reason = NULL, *rest = NULL;
	while (!reason && (line = strtok_r(line, "\n", &rest))) {
		line += strspn(line, " ");
		if (!strncmp(line, mechanism->name, strlen(mechanism->name)))
			reason = strstr(line, ": ");
		line = NULL;
	}
	printf("%-12s does not work here: %s\n", mechanism->name, reason ? reason + 2 : "see target/examples/explain");
}

/* ---- for programs ---- */

void table_write_result(FILE *file, const void *results, size_t n)
{
	const struct result *r = (const struct result *)results + n;
	fprintf(file,
		"{\"mechanism\": \"%s\", \"readahead\": %u, \"cpl\": %d, \"vcpus\": %u, \"pages\": %llu, "
		"\"faults\": %llu, \"first_work_seconds\": %.6f, \"seconds\": %.6f, "
		"\"pages_per_second\": %.0f, \"p50_us\": %.2f, "
		"\"p99_us\": %.2f, \"cpu_seconds\": %.6f, \"resolver_calls\": %llu, \"verified\": %s}",
		row_name(&r->row), r->row.readahead, r->row.cpl, r->vcpus, (unsigned long long)r->pages,
		(unsigned long long)r->faults, r->first_work, r->seconds, r->pages / r->seconds, r->p50_us, r->p99_us,
		r->cpu_seconds, (unsigned long long)r->resolver_calls, r->verified ? "true" : "false");
}
