/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "clock.h"

#include <stdint.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

static double read_clock(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

double seconds_now(void)
{
	return read_clock(CLOCK_MONOTONIC);
}

double cpu_seconds_now(void)
{
	return read_clock(CLOCK_PROCESS_CPUTIME_ID);
}

struct moment {
	uint64_t ticks;
	double seconds;
};

/*
 * Reads both clocks at once: of several attempts, the one that took the least time is the most
 * exact.
 */
static struct moment read_clocks(void)
{
	struct moment best = { 0 };
	uint64_t least = UINT64_MAX;
	for (int i = 0; i < 50; i++) {
		uint64_t before = __rdtsc();
		double seconds = seconds_now();
		uint64_t took = __rdtsc() - before;
		if (took < least) {
			least = took;
			best = (struct moment){ .ticks = before + took / 2, .seconds = seconds };
		}
	}
	return best;
}

double ticks_per_microsecond(void)
{
	static double known;
	if (known == 0) {
		struct moment start = read_clocks();
		usleep(50000);
		struct moment end = read_clocks();
		known = (end.ticks - start.ticks) / ((end.seconds - start.seconds) * 1e6);
	}
	return known;
}
