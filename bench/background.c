/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the library does before and beside the guest's own faults, poison-trap on shared memory:
 *
 *   fill how long the guest's faults take while a fill is under way, and without working set a
 *   guest that needs a tenth of its memory: when it is done, and how often it faulted, cold and
 *   with what was recorded before arming what a page costs when a slot is set, with one CPU and
 *   with all; and the memory that it takes
 *
 * All variants of a comparison are run in turn; ratios are medians of those within each turn.
 */
#define _GNU_SOURCE
#include "ways.h"

#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <x86intrin.h>

enum { ROUNDS = 7, PAGES = 65536, TOUCHED = PAGES / 10, BATCH = 64 };

static double ticks_per_us;
static FILE *json;

static void calibrate(void)
{
	double begin = now();
	uint64_t ticks = __rdtsc();
	while (now() < begin + 0.05)
		;
	ticks_per_us = (__rdtsc() - ticks) / ((now() - begin) * 1e6);
}

static int compare_numbers(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

/* Sorts them, and returns the median. */
static double median(double *numbers, int count)
{
	qsort(numbers, count, sizeof(*numbers), compare_numbers);
	return numbers[count / 2];
}

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	int ret = kvmfault_pages_install(vm, fault->window_gpa, source_bytes, fault->window_len);
	return ret < 0 && ret != -EEXIST ? ret : KVMFAULT_RESOLVED;
}

struct guest {
	struct machine m;
	struct ram ram;
	struct vcpu *v;
	uint32_t *list, *ticks;
	uint64_t list_gpa, ticks_gpa;
};

static void create(struct guest *g)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	ram_create(&g->ram, MEMFD, PAGES * PAGE);
	machine_create(&g->m, 2 * (PAGES * sizeof(uint32_t) + PAGE));
	g->list = machine_share(&g->m, PAGES * sizeof(uint32_t), &g->list_gpa);
	g->ticks = machine_share(&g->m, PAGES * sizeof(uint32_t), &g->ticks_gpa);
	list_sequential(g->list, PAGES);
	list_shuffle(g->list, PAGES, 42);
	options.mechanism = KVMFAULT_MECHANISM_POISON_TRAP;
	options.resolver = resolve;
	machine_attach(&g->m, NULL, &options);
	machine_set_slot(&g->m, &g->ram, RAM_SLOT, RAM_GPA);
	g->v = machine_add_vcpu(&g->m, 3);
	vcpu_attach(g->v);
}

static void destroy(struct guest *g)
{
	vcpu_detach(g->v);
	machine_destroy(&g->m);
	ram_destroy(&g->ram);
}

static double walk(struct guest *g, uint64_t count)
{
	vcpu_load_walk(g->v, RAM_GPA, g->list_gpa, count, g->ticks_gpa);
	double begin = now();
	vcpu_run(g->v);
	return now() - begin;
}

/* ---- fill ---- */

struct waits {
	double p50, p99;
	unsigned long faults;
};

/*
 * How long the guest waited for pages that weren't there: accesses of more than 10 us. (What is
 * there takes less than 6.)
 */
static struct waits waits(const struct guest *g, uint64_t count)
{
	static double us[PAGES];
	unsigned long n = 0;
	for (uint64_t i = 0; i < count; i++)
		if (g->ticks[i] / ticks_per_us > 10)
			us[n++] = g->ticks[i] / ticks_per_us;
	CHECK(n > 100, "%lu faults are too few", n);
	median(us, (int)n);
	return (struct waits){ us[n / 2], us[n * 99 / 100], n };
}

static void measure_fill(void)
{
	double p50[ROUNDS], p99[ROUNDS], alone[ROUNDS], rates[ROUNDS];
	unsigned long faults = 0;
	for (int r = 0; r < ROUNDS; r++) {
		struct guest g;
		struct waits without, with;
		struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
		struct kvmfault_fill *fill;
		create(&g);
		walk(&g, TOUCHED);
		without = waits(&g, TOUCHED);
		destroy(&g);

		create(&g);
		options.batch = BATCH;
		double begin = now();
		OK(kvmfault_fill_start(g.m.library, &options, &fill));
		walk(&g, TOUCHED);
		with = waits(&g, TOUCHED);
		rates[r] = (PAGES - kvmfault_pages_absent(g.m.library)) / (now() - begin) / 1000;
		kvmfault_fill_free(fill);
		destroy(&g);
		p50[r] = with.p50 / without.p50;
		p99[r] = with.p99 / without.p99;
		alone[r] = without.p99;
		faults = with.faults;
	}
	double m50 = median(p50, ROUNDS), m99 = median(p99, ROUNDS);
	printf("fill: the guest's faults take %.2f times as long (p50; %.2f to %.2f), %.2f times (p99, %.0f us "
	       "without; %.2f to %.2f)\n"
	       "      while %.0f thousand pages a second come; %lu faults\n",
	       m50, p50[0], p50[ROUNDS - 1], m99, median(alone, ROUNDS), p99[0], p99[ROUNDS - 1], median(rates, ROUNDS),
	       faults);
	fprintf(json,
		"{\"fill\": {\"p50_ratio\": %.3f, \"p99_ratio\": {\"min\": %.3f, \"median\": %.3f, \"max\": %.3f}},\n",
		m50, p99[0], m99, p99[ROUNDS - 1]);
}

/* ---- working set ---- */

static void measure_working_set(void)
{
	double sooner[ROUNDS];
	unsigned long cold_faults = 0, warm_faults = 0;
	int fd = SYS(memfd_create("working-set", MFD_CLOEXEC));
	for (int r = 0; r < ROUNDS; r++) {
		struct guest g;
		struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
		struct kvmfault_fill *fill;
		create(&g);
		OK(kvmfault_working_set_record(g.m.library, 1));
		double cold = walk(&g, TOUCHED);
		OK(kvmfault_working_set_save(g.m.library, fd));
		cold_faults = machine_stats(&g.m).faults_vcpu;
		destroy(&g);

		create(&g);
		options.working_set_fd = fd;
		options.flags = KVMFAULT_FILL_WORKING_SET_ONLY;
		double begin = now();
		OK(kvmfault_fill_start(g.m.library, &options, &fill));
		OK(kvmfault_fill_wait_working_set(fill, -1));
		walk(&g, TOUCHED);
		sooner[r] = cold / (now() - begin);
		warm_faults = machine_stats(&g.m).outcome_resolved;
		OK(kvmfault_fill_wait(fill, -1));
		kvmfault_fill_free(fill);
		destroy(&g);
	}
	double m = median(sooner, ROUNDS);
	printf("working set: %lu faults instead of %lu, done %.2f times sooner (%.2f to %.2f), the time for bringing "
	       "it included; %ld bytes\n",
	       warm_faults, cold_faults, m, sooner[0], sooner[ROUNDS - 1], (long)lseek(fd, 0, SEEK_END));
	fprintf(json,
		" \"working_set\": {\"faults_cold\": %lu, \"faults\": %lu, \"times_sooner\": {\"min\": %.3f, "
		"\"median\": %.3f, \"max\": %.3f}},\n",
		cold_faults, warm_faults, sooner[0], m, sooner[ROUNDS - 1]);
	close(fd);
}

/* ---- arming ---- */

static long kib_of(const char *name)
{
	char line[256];
	long kib = 0;
	size_t length = strlen(name);
	FILE *file = fopen("/proc/self/status", "r");
	CHECK(file, "/proc/self/status");
	while (fgets(line, sizeof(line), file))
		if (!strncmp(line, name, length))
			kib = atol(line + length);
	fclose(file);
	return kib;
}

/* Nanoseconds a page. */
static double arm(int cpus, double *bytes_a_page)
{
	enum { LEN = 2048 };
	cpu_set_t all, some;
	struct machine m;
	struct ram ram;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	uint64_t len = (uint64_t)LEN << 20;
	ram_create(&ram, MEMFD, len);
	machine_create(&m, 0);
	options.mechanism = KVMFAULT_MECHANISM_POISON_TRAP;
	options.resolver = resolve;
	machine_attach(&m, NULL, &options);
	SYS(sched_getaffinity(0, sizeof(all), &all));
	CPU_ZERO(&some);
	for (int cpu = 0, n = 0; cpu < CPU_SETSIZE && n < cpus; cpu++)
		if (CPU_ISSET(cpu, &all) && ++n)
			CPU_SET(cpu, &some);
	SYS(sched_setaffinity(0, sizeof(some), &some));
	long before = kib_of("VmRSS:") + kib_of("VmPTE:");
	double begin = now();
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	double seconds = now() - begin;
	*bytes_a_page = (kib_of("VmRSS:") + kib_of("VmPTE:") - before) * 1024.0 / (len / PAGE);
	SYS(sched_setaffinity(0, sizeof(all), &all));
	machine_destroy(&m);
	ram_destroy(&ram);
	return seconds * 1e9 / (len / PAGE);
}

static void measure_arming(void)
{
	cpu_set_t set;
	double one[ROUNDS], all[ROUNDS], ratios[ROUNDS], bytes = 0;
	SYS(sched_getaffinity(0, sizeof(set), &set));
	int cpus = CPU_COUNT(&set);
	for (int r = 0; r < ROUNDS; r++) {
		one[r] = arm(1, &bytes);
		all[r] = arm(cpus, &bytes);
		ratios[r] = one[r] / all[r];
	}
	double m1 = median(one, ROUNDS), mn = median(all, ROUNDS), m = median(ratios, ROUNDS);
	printf("arming: %.0f ns a page with 1 CPU, %.0f with %d: %.2f times as fast (%.2f to %.2f); %.1f bytes a page, "
	       "or %.1f GiB a TiB of 4 KiB pages\n",
	       m1, mn, cpus, m, ratios[0], ratios[ROUNDS - 1], bytes, bytes / 4);
	fprintf(json,
		" \"arming\": {\"cpus\": %d, \"ns_per_page_1_cpu\": %.1f, \"ns_per_page\": %.1f, \"times_as_fast\": "
		"%.3f, \"bytes_per_page\": %.2f}}\n",
		cpus, m1, mn, m, bytes);
}

int main(int argc, char **argv)
{
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	if (argc != 1 && (argc != 3 || strcmp(argv[1], "--json"))) {
		fprintf(stderr, "usage: background [--json FILE]\n");
		return 2;
	}
	OK(kvmfault_probe(-1, &probe));
	if (!(probe.mechanisms_shared & 1u << KVMFAULT_MECHANISM_POISON_TRAP))
		skip("poison-trap doesn't work here (Linux 6.6)");
	json = fopen(argc == 3 ? argv[2] : "/dev/null", "w");
	CHECK(json, "%s: %s", argv[2], strerror(errno));
	memset(source_bytes, 0xa5, sizeof(source_bytes));
	calibrate();
	measure_fill();
	measure_working_set();
	measure_arming();
	fclose(json);
	return 0;
}
