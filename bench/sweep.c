/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The benchmark: how fast pages get to a guest that touches them for the first time, by each way
 * (ways.h), for each number of vCPUs, order of access, kind of memory, and with readahead or
 * without. All ways of a cell are run in turn, several times over, so that a noisy machine disturbs
 * all alike; what is compared are ratios within a turn.
 */
#define _GNU_SOURCE
#include "ways.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>
#include <x86intrin.h>

enum { BATCH = 64, MOST_REPETITIONS = 50 };

/* Those with BATCH have the batch of --batch. */
static struct way ways[] = {
	{ "floor", "none", 1, false, 0, floor_begin, plain_run, NULL, NULL },
	{ "plain-c", "userfaultfd", 1, false, 0, plain_begin, plain_run, NULL, plain_end },
	{ "plain-c", "userfaultfd", BATCH, false, 0, plain_begin, plain_run, NULL, plain_end },
	{ "plain-c-readers", "userfaultfd", 1, true, 0, plain_begin, plain_run, NULL, plain_end },
	{ "plain-c-readers", "userfaultfd", BATCH, true, 0, plain_begin, plain_run, NULL, plain_end },
	{ "hand-written", "poison-trap", 1, false, 0, trap_begin, trap_run, trap_attach, trap_end },
	{ "hand-written", "poison-trap", BATCH, false, 0, trap_begin, trap_run, trap_attach, trap_end },
#define LIBRARY(name, number, batch)                                                                               \
	{                                                                                                          \
		"libkvmfault", name, batch, false, number, library_begin, library_run, library_attach, library_end \
	}
	LIBRARY("memslot-flag", KVMFAULT_MECHANISM_MEMSLOT_FLAG, 1),
	LIBRARY("memslot-flag", KVMFAULT_MECHANISM_MEMSLOT_FLAG, BATCH),
	LIBRARY("poison-trap", KVMFAULT_MECHANISM_POISON_TRAP, 1),
	LIBRARY("poison-trap", KVMFAULT_MECHANISM_POISON_TRAP, BATCH),
	LIBRARY("userfaultfd", KVMFAULT_MECHANISM_USERFAULTFD, 1),
	LIBRARY("userfaultfd", KVMFAULT_MECHANISM_USERFAULTFD, BATCH),
};
enum { WAYS = sizeof(ways) / sizeof(*ways), FLOOR = 0, PLAIN_C = 1 };

enum order { SEQUENTIAL, STRIDED, SHUFFLED, ZIPF, ORDERS };
static const char *const order_names[ORDERS] = { "sequential", "strided", "shuffled", "zipf" };
enum { STRIDE = 4 };

static uint64_t pages = 8192;
static double ticks_per_us;

struct sample {
	double rate, p50, p99, p999, cpu; /* pages a second; us; us of CPU time a page */
};

/* ---- one run ---- */

/* The pages that the guest touches, in order; returns how many different ones. */
static uint64_t make_list(uint32_t *list, enum order order, uint64_t count, uint64_t unit)
{
	uint64_t different = count, seed = 42;
	list_sequential(list, count);
	if (order == SHUFFLED)
		list_shuffle(list, count, 42);
	if (order == ZIPF) {
		/*
		 * The n-th most popular of them with a probability proportional to 1/n; where they
		 * are has nothing to do with that.
		 */
		double *sum = malloc(count * sizeof(*sum)), total = 0;
		uint32_t *where = malloc(count * sizeof(*where));
		bool *seen = calloc(count, sizeof(*seen));
		CHECK(sum && where && seen, "no memory");
		list_sequential(where, count);
		list_shuffle(where, count, 7);
		for (uint64_t n = 0; n < count; n++)
			sum[n] = total += 1.0 / (n + 1);
		different = 0;
		for (uint64_t i = 0; i < count; i++) {
			double x = random_number(&seed) % (1ul << 52) / (double)(1ul << 52) * total;
			uint64_t low = 0, high = count - 1;
			while (low < high) {
				uint64_t middle = (low + high) / 2;
				if (sum[middle] < x)
					low = middle + 1;
				else
					high = middle;
			}
			list[i] = where[low];
			different += !seen[list[i]];
			seen[list[i]] = true;
		}
		free(sum);
		free(where);
		free(seen);
	}
	for (uint64_t i = 0; i < count; i++)
		list[i] *= unit / PAGE * (order == STRIDED ? STRIDE : 1);
	return different;
}

static pthread_barrier_t begin;
struct times {
	struct job *job;
	double start, end;
};

static void *run_vcpu(struct vcpu *v)
{
	struct times *times = v->opaque;
	const struct way *way = times->job->way;
	if (way->attach)
		way->attach(times->job, v);
	pthread_barrier_wait(&begin);
	times->start = now();
	way->run(times->job, v);
	times->end = now();
	return NULL;
}

static int compare_ticks(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

static double cpu_seconds(void)
{
	struct rusage u;
	getrusage(RUSAGE_SELF, &u);
	return u.ru_utime.tv_sec + u.ru_stime.tv_sec + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static struct sample run(const struct way *way, enum backing backing, unsigned vcpus, enum order order)
{
	struct job job = { .way = way, .vcpus = vcpus };
	struct times times[MOST_VCPUS];
	uint64_t list_gpa, times_gpa, count = backing == HUGETLB ? 64 : pages / vcpus * vcpus;
	uint64_t unit = backing == HUGETLB ? HUGE_PAGE : PAGE;
	ram_create(&job.ram, backing, count * unit * (order == STRIDED ? STRIDE : 1));
	machine_create(&job.m, 2 * (count * sizeof(uint32_t) + PAGE));
	uint32_t *list = machine_share(&job.m, count * sizeof(uint32_t), &list_gpa);
	uint32_t *ticks = machine_share(&job.m, count * sizeof(uint32_t), &times_gpa);
	uint64_t different = make_list(list, order, count, unit);
	way->begin(&job);
	pthread_barrier_init(&begin, NULL, vcpus);
	for (unsigned i = 0; i < vcpus; i++) {
		struct vcpu *v = machine_add_vcpu(&job.m, 3);
		uint64_t share = count / vcpus, first = i * share * sizeof(uint32_t);
		times[i].job = &job;
		vcpu_load_walk(v, RAM_GPA, list_gpa + first, share, times_gpa + first);
	}
	double cpu = cpu_seconds();
	for (unsigned i = 0; i < vcpus; i++)
		vcpu_start(job.m.vcpu[i], run_vcpu, &times[i]);
	/*
	 * From the first vCPU's start to the last one's end, as they see it: this thread may get to
	 * run late.
	 */
	double start = 0, end = 0;
	for (unsigned i = 0; i < vcpus; i++) {
		vcpu_join(job.m.vcpu[i]);
		start = i == 0 || times[i].start < start ? times[i].start : start;
		end = times[i].end > end ? times[i].end : end;
	}
	cpu = cpu_seconds() - cpu;

	/*
	 * The guest wrote one byte to each page that it touched; the rest is what was to be copied.
	 */
	for (uint64_t i = 0; i < count; i++) {
		const uint8_t *bytes = job.ram.hva + list[i] * PAGE;
		CHECK(bytes[0] == 0x5a && bytes[1] == (job.zeros ? 0 : 0xa5) && bytes[PAGE - 1] == bytes[1],
		      "%s: page %u has the wrong bytes", way->program, list[i]);
	}
	qsort(ticks, count, sizeof(*ticks), compare_ticks);
	struct sample sample = {
		.rate = different / (end - start),
		.p50 = ticks[count / 2] / ticks_per_us,
		.p99 = ticks[count * 99 / 100] / ticks_per_us,
		.p999 = ticks[count * 999 / 1000] / ticks_per_us,
		.cpu = cpu * 1e6 / different,
	};
	if (way->end)
		way->end(&job);
	machine_destroy(&job.m);
	ram_destroy(&job.ram);
	pthread_barrier_destroy(&begin);
	return sample;
}

/* ---- a cell: all ways, in turn ---- */

struct results {
	bool works[WAYS];
	struct sample samples[WAYS][MOST_REPETITIONS];
};

static int compare_numbers(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

/* Lowest, median and highest. */
struct spread {
	double low, middle, high;
};

static struct spread spread_of(double *numbers, int count)
{
	qsort(numbers, count, sizeof(*numbers), compare_numbers);
	return (struct spread){ numbers[0],
				count % 2 ? numbers[count / 2] : (numbers[count / 2 - 1] + numbers[count / 2]) / 2,
				numbers[count - 1] };
}

static struct spread rates(const struct results *r, int way, int repetitions)
{
	double numbers[MOST_REPETITIONS];
	for (int i = 0; i < repetitions; i++)
		numbers[i] = r->samples[way][i].rate;
	return spread_of(numbers, repetitions);
}

/* Of the rates of two ways within each turn. */
static struct spread ratios(const struct results *r, int way, int to, int repetitions)
{
	double numbers[MOST_REPETITIONS];
	for (int i = 0; i < repetitions; i++)
		numbers[i] = r->samples[way][i].rate / r->samples[to][i].rate;
	return spread_of(numbers, repetitions);
}

static double median(const struct results *r, int way, int repetitions, size_t field)
{
	double numbers[MOST_REPETITIONS];
	for (int i = 0; i < repetitions; i++)
		numbers[i] = *(const double *)((const char *)&r->samples[way][i] + field);
	return spread_of(numbers, repetitions).middle;
}

/* Another way with the same batch, or -1. */
static int same_batch(const struct results *r, int way, const char *program, const char *mechanism)
{
	for (int w = 0; w < WAYS; w++)
		if (r->works[w] && ways[w].batch == ways[way].batch && !strcmp(ways[w].program, program) &&
		    !strcmp(ways[w].mechanism, mechanism))
			return w;
	return -1;
}

static FILE *json, *csv;

static const char *readahead(int way)
{
	return ways[way].batch == 1 ? "off" : ways[way].number ? "adaptive" : "fixed";
}

static void print_ratio(const char *name, const struct results *r, int way, int to, int repetitions)
{
	if (to < 0 || !r->works[to]) {
		fprintf(json, ", \"%s\": null", name);
		fprintf(csv, ",");
		return;
	}
	struct spread s = ratios(r, way, to, repetitions);
	fprintf(json, ", \"%s\": %.3f, \"%s_range\": [%.3f, %.3f]", name, s.middle, name, s.low, s.high);
	fprintf(csv, ",%.3f", s.middle);
}

static void print_cell(const struct results *r, enum backing backing, unsigned vcpus, enum order order, int repetitions)
{
	static bool more;
	for (int w = 0; w < WAYS; w++) {
		if (!r->works[w])
			continue;
		struct spread rate = rates(r, w, repetitions);
		double p50 = median(r, w, repetitions, offsetof(struct sample, p50)),
		       p99 = median(r, w, repetitions, offsetof(struct sample, p99));
		double p999 = median(r, w, repetitions, offsetof(struct sample, p999)),
		       cpu = median(r, w, repetitions, offsetof(struct sample, cpu));
		printf("%-7s %5u %-10s %-15s %-12s %5u %8.0f %8.0f ..%8.0f %8.1f %8.1f %8.1f %7.1f %6.2f %6.2f\n",
		       backing_name(backing), vcpus, order_names[order], ways[w].program, ways[w].mechanism,
		       ways[w].batch, rate.middle, rate.low, rate.high, p50, p99, p999, cpu,
		       ratios(r, w, FLOOR, repetitions).middle, ratios(r, w, PLAIN_C, repetitions).middle);
		fprintf(json,
			"%s\n  {\"program\": \"%s\", \"mechanism\": \"%s\", \"vcpus\": %u, \"order\": \"%s\", "
			"\"memory\": \"%s\", \"readahead\": \"%s\", \"batch\": %u, "
			"\"pages_per_second\": {\"min\": %.0f, \"median\": %.0f, \"max\": %.0f}, \"p50_us\": %.2f, "
			"\"p99_us\": %.2f, \"p999_us\": %.2f, "
			"\"cpu_us_per_page\": %.2f",
			more ? "," : "[", ways[w].program, ways[w].mechanism, vcpus, order_names[order],
			backing_name(backing), readahead(w), ways[w].batch, rate.low, rate.middle, rate.high, p50, p99,
			p999, cpu);
		fprintf(csv, "%s,%s,%u,%s,%s,%s,%u,%.0f,%.0f,%.0f,%.2f,%.2f,%.2f,%.2f", ways[w].program,
			ways[w].mechanism, vcpus, order_names[order], backing_name(backing), readahead(w),
			ways[w].batch, rate.low, rate.middle, rate.high, p50, p99, p999, cpu);
		print_ratio("ratio_floor", r, w, FLOOR, repetitions);
		print_ratio("ratio_plain_c", r, w, PLAIN_C, repetitions);
		print_ratio("ratio_plain_c_same_batch", r, w, same_batch(r, w, "plain-c", "userfaultfd"), repetitions);
		print_ratio("ratio_plain_c_readers", r, w, same_batch(r, w, "plain-c-readers", "userfaultfd"),
			    repetitions);
		print_ratio("ratio_hand_written", r, w, same_batch(r, w, "hand-written", ways[w].mechanism),
			    repetitions);
		fprintf(json, "}");
		fprintf(csv, "\n");
		more = true;
	}
	fflush(stdout);
}

static bool has(uint32_t mechanisms, const struct way *way)
{
	if (!strcmp(way->program, "hand-written"))
		return mechanisms & 1u << KVMFAULT_MECHANISM_POISON_TRAP;
	return !way->number || mechanisms & 1u << way->number;
}

static void run_cell(const struct kvmfault_probe *probe, enum backing backing, unsigned vcpus, enum order order,
		     int repetitions)
{
	static struct results r;
	uint32_t mechanisms = backing == ANON    ? probe->mechanisms_anon
			      : backing == MEMFD ? probe->mechanisms_shared
						 : probe->mechanisms_hugetlb;
	for (int i = 0; i < repetitions; i++) {
		for (int w = 0; w < WAYS; w++) {
			/*
			 * Huge pages come alone, and the kernel can't map them twice for the
			 * program without a library.
			 */
			r.works[w] =
				has(mechanisms, &ways[w]) &&
				(backing != HUGETLB || (ways[w].batch == 1 && strcmp(ways[w].program, "hand-written")));
			if (!r.works[w])
				continue;
			if (isatty(2))
				fprintf(stderr, "\r%d of %d: %s, %u vCPUs, %s, %s %s %u    ", i + 1, repetitions,
					backing_name(backing), vcpus, order_names[order], ways[w].program,
					ways[w].mechanism, ways[w].batch);
			r.samples[w][i] = run(&ways[w], backing, vcpus, order);
		}
	}
	if (isatty(2))
		fprintf(stderr, "\r%*s\r", 100, "");
	print_cell(&r, backing, vcpus, order, repetitions);
}

/* ---- the rest ---- */

static void calibrate(void)
{
	double begin = now();
	uint64_t ticks = __rdtsc();
	while (now() < begin + 0.05)
		;
	ticks_per_us = (__rdtsc() - ticks) / ((now() - begin) * 1e6);
}

static FILE *create(const char *path)
{
	FILE *file = fopen(path, "w");
	if (!file) {
		fprintf(stderr, "sweep: %s: %s\n", path, strerror(errno));
		exit(2);
	}
	return file;
}

static void usage(FILE *to)
{
	fprintf(to,
		"usage: sweep [OPTION]...\n"
		"Pages a second that a guest touches for the first time, and how long it waits: without userfaultfd "
		"(floor), with plain userfaultfd in C,\n"
		"with poison-trap by hand, and with each mechanism of the library; a page a fault, and %d together.\n"
		"Medians of several turns, with the lowest and highest; ratios are the medians of those within each "
		"turn.\n"
		"Only a quiet machine tells much: where other programs want the CPUs, each sleep and wake-up has "
		"another price.\n"
		"  --pages N          in each run, up to 1000000 (default 8192)\n"
		"  --repetitions N    1 to %d (default 5)\n"
		"  --memory LIST      of anon, memfd, hugetlb (default all)\n"
		"  --vcpus LIST       of numbers up to 64 (default 1,2,8,32,64)\n"
		"  --order LIST       of sequential, strided, shuffled, zipf (default all; strided and zipf with 1 and "
		"2 vCPUs)\n"
		"  --batch N          pages together, 2 to %d (default %d)\n"
		"  --json FILE        a list of objects\n"
		"  --csv FILE\n",
		BATCH, MOST_REPETITIONS, MOST_BATCH, BATCH);
}

static long number(const char *option, const char *text, long most)
{
	char *end;
	long n = strtol(text, &end, 10);
	if (*end || n < 1 || n > most) {
		fprintf(stderr, "sweep: --%s takes a number from 1 to %ld, not \"%s\"\n", option, most, text);
		exit(2);
	}
	return n;
}

/* Is `word` in a list with commas? */
static bool listed(const char *list, const char *word)
{
	size_t length = strlen(word);
	for (const char *at = list; (at = strstr(at, word)); at += length)
		if ((at == list || at[-1] == ',') && (at[length] == 0 || at[length] == ','))
			return true;
	return false;
}

/* All words of a list are known, or the program ends. */
static void check_list(const char *option, const char *list, const char *known)
{
	char copy[256], *rest = copy;
	snprintf(copy, sizeof(copy), "%s", list);
	for (char *word; (word = strsep(&rest, ","));) {
		if (!listed(known, word)) {
			fprintf(stderr, "sweep: --%s takes a list of %s, not \"%s\"\n", option, known, word);
			exit(2);
		}
	}
}

int main(int argc, char **argv)
{
	static const struct option known[] = {
		{ "pages", required_argument, NULL, 'p' },  { "repetitions", required_argument, NULL, 'r' },
		{ "memory", required_argument, NULL, 'm' }, { "vcpus", required_argument, NULL, 'v' },
		{ "order", required_argument, NULL, 'o' },  { "json", required_argument, NULL, 'j' },
		{ "batch", required_argument, NULL, 'b' },  { "csv", required_argument, NULL, 'c' },
		{ "help", no_argument, NULL, 'h' },         { 0 },
	};
	static const char *const vcpu_counts[] = { "1", "2", "8", "32", "64" };
	const char *json_path = "/dev/null", *csv_path = "/dev/null", *memory = "anon,memfd,hugetlb",
		   *vcpus = "1,2,8,32,64", *orders = NULL;
	int repetitions = 5;
	for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
		switch (c) {
		case 'p':
			pages = number("pages", optarg, 1000000);
			break;
		case 'r':
			repetitions = (int)number("repetitions", optarg, MOST_REPETITIONS);
			break;
		case 'm':
			check_list("memory", memory = optarg, "anon,memfd,hugetlb");
			break;
		case 'v':
			check_list("vcpus", vcpus = optarg, "1,2,8,32,64");
			break;
		case 'o':
			check_list("order", orders = optarg, "sequential,strided,shuffled,zipf");
			break;
		case 'b':
			for (long w = 0, batch = number("batch", optarg, MOST_BATCH); w < WAYS; w++)
				if (ways[w].batch == BATCH)
					ways[w].batch = (unsigned)batch;
			break;
		case 'j':
			json_path = optarg;
			break;
		case 'c':
			csv_path = optarg;
			break;
		default:
			usage(c == 'h' ? stdout : stderr);
			return c == 'h' ? 0 : 2;
		}
	}
	if (optind < argc) {
		usage(stderr);
		return 2;
	}

	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	memset(source_bytes, 0xa5, sizeof(source_bytes));
	calibrate();
	json = create(json_path);
	csv = create(csv_path);
	fprintf(csv, "program,mechanism,vcpus,order,memory,readahead,batch,pages_per_second_min,pages_per_second_"
		     "median,pages_per_second_max,p50_us,p99_us,"
		     "p999_us,cpu_us_per_page,ratio_floor,ratio_plain_c,ratio_plain_c_same_batch,ratio_plain_c_readers,"
		     "ratio_hand_written\n");
	printf("%-7s %5s %-10s %-15s %-12s %5s %8s %18s %8s %8s %8s %7s %6s %6s\n", "memory", "vcpus", "order",
	       "program", "mechanism", "batch", "pages/s", "lowest .. highest", "p50 us", "p99 us", "p99.9 us",
	       "cpu us", "floor", "plain");
	for (int backing = ANON; backing <= HUGETLB; backing++) {
		for (int order = 0; order < ORDERS; order++) {
			for (size_t v = 0; v < sizeof(vcpu_counts) / sizeof(*vcpu_counts); v++) {
				long count = atol(vcpu_counts[v]);
				bool rare = order == STRIDED || order == ZIPF;
				if (!listed(memory, backing_name(backing)) || !listed(vcpus, vcpu_counts[v]) ||
				    (orders ? !listed(orders, order_names[order]) : rare && count > 2) ||
				    (backing == HUGETLB && (order != SEQUENTIAL || count > 8)))
					continue;
				run_cell(&probe, backing, (unsigned)count, order, repetitions);
			}
		}
	}
	fprintf(json, "\n]\n");
	fclose(json);
	fclose(csv);
	return 0;
}
