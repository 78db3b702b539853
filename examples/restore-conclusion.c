/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "restore-conclusion.h"

#include <kvmfault.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* Differences below this are noise. */
#define NOTABLE 1.1

/* A row of the kind; at the privilege level of the first row, which has all kinds. */
static const struct result *find(const struct result *results, size_t count, enum way way, int mechanism,
				 bool readahead)
{
	for (const struct result *r = results; r < results + count; r++) {
		const struct row *row = &r->row;
		if (row->way != way || row->cpl != results->row.cpl)
			continue;
		if (way != WAY_LAZY || (row->mechanism->number == mechanism && (row->readahead > 1) == readahead))
			return r;
	}
	return NULL;
}

/* Two digits or more, with a fitting unit. The text lasts until the fourth call after this one. */
static const char *duration(double seconds)
{
	static char texts[4][32];
	static unsigned next;
	char *text = texts[next++ % 4];
	const char *unit = seconds < 1e-3 ? "us" : seconds < 1 ? "ms" : "s";
	double n = seconds < 1e-3 ? seconds * 1e6 : seconds < 1 ? seconds * 1e3 : seconds;
	snprintf(text, sizeof(texts[0]), "%.*f %s", n < 10 ? 1 : 0, n, unit);
	return text;
}

/* What lazy restore gains: the guest works sooner. */
static void print_gain(const struct result *first, const struct result *lazy)
{
	double sooner = first->first_work / lazy->first_work;
	printf("With lazy restore (%s) the guest had done its first useful work after %s;\n"
	       "when the whole snapshot was read first, after %s: ",
	       row_name(&lazy->row), duration(lazy->first_work), duration(first->first_work));
	if (sooner >= NOTABLE)
		printf("%.*f times sooner.\n", sooner < 10 ? 1 : 0, sooner);
	else
		printf("no gain, for so little memory is read fast.\n");
}

/* What it costs: many faults, each of which takes longer than a page of zeros. */
static void print_cost(const struct result *zero, const struct result *first, const struct result *lazy,
		       const struct result *ahead)
{
	printf("Every page then came with a fault of its own, for which the guest waited %s (median; %s for a\n"
	       "page of zeros without the library): all the memory took %s, against %s when read first.\n",
	       duration(lazy->p50_us * 1e-6), duration(zero->p50_us * 1e-6), duration(lazy->seconds),
	       duration(first->seconds));
	if (!ahead)
		return;
	if (lazy->seconds / ahead->seconds >= NOTABLE)
		printf("Readahead cut that to %s, with %llu faults instead of %llu.\n", duration(ahead->seconds),
		       (unsigned long long)ahead->faults, (unsigned long long)lazy->faults);
	else if (ahead->faults < lazy->faults / NOTABLE)
		printf("Readahead needed %llu faults instead of %llu, but no less time in this run (%s).\n",
		       (unsigned long long)ahead->faults, (unsigned long long)lazy->faults, duration(ahead->seconds));
	else
		printf("Readahead did not shorten that: it needs a guest that touches neighbours in a row.\n");
}

/* Whether faults on the vCPU's own thread are faster than a queue to another thread. */
static void print_comparison(const struct result *lazy, const struct result *queue)
{
	double own = lazy->pages / lazy->seconds, queued = queue->pages / queue->seconds;
	const char *name = row_name(&lazy->row);
	if (own / queued >= NOTABLE)
		printf("%s, which serves a fault on the vCPU's own thread, was %.1f times as fast as userfaultfd,\n"
		       "which passes it to another thread (%.0f and %.0f pages/s).\n",
		       name, own / queued, own, queued);
	else if (queued / own >= NOTABLE)
		printf("%s, which serves a fault on the vCPU's own thread, was slower than userfaultfd in this run\n"
		       "(%.0f and %.0f pages/s); `make bench` compares them more closely.\n",
		       name, own, queued);
	else
		printf("%s and userfaultfd were about equally fast in this run (%.0f and %.0f pages/s); `make bench`\n"
		       "compares them more closely.\n",
		       name, own, queued);
	printf("The guest waited %s and %s for a page (median), and a page cost %s and %s of CPU time.\n",
	       duration(lazy->p50_us * 1e-6), duration(queue->p50_us * 1e-6), duration(lazy->cpu_seconds / lazy->pages),
	       duration(queue->cpu_seconds / queue->pages));
}

/* Other programs on the same CPUs stretch all figures. */
static void print_caveat(void)
{
	double load;
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	if (getloadavg(&load, 1) == 1 && load > cpus + 1)
		printf("This machine is busy (load average %.1f on %ld CPUs): expect other figures when it is idle.\n",
		       load, cpus);
}

void conclusion_print(const struct result *results, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (!results[i].verified)
			return;
	const struct result *zero = find(results, count, WAY_DEMAND_ZERO, 0, false);
	const struct result *first = find(results, count, WAY_READ_FIRST, 0, false);
	/* The mechanism that `auto` takes: they are listed in the order of preference. */
	const struct result *lazy = NULL;
	for (int m = 0; m < MECHANISMS && !lazy; m++)
		lazy = find(results, count, WAY_LAZY, mechanisms[m].number, false);
	if (!zero || !first || !lazy)
		return;
	const struct result *ahead = find(results, count, WAY_LAZY, lazy->row.mechanism->number, true);
	const struct result *queue = find(results, count, WAY_LAZY, KVMFAULT_MECHANISM_USERFAULTFD, false);

	printf("\n");
	print_gain(first, lazy);
	print_cost(zero, first, lazy, ahead);
	if (queue && queue != lazy)
		print_comparison(lazy, queue);
	printf("The guest checked every page in every row, and the host checked all memory again.\n");
	print_caveat();
}
