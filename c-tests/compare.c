/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A benchmark, and no test: pages a second that a guest can touch for the first time, one page a fault,
 *
 *   floor        without userfaultfd: KVM's own demand-zero fault; nothing can be faster
 *   plain-c      with userfaultfd as VMMs use it today: one reader thread, written in C, right here
 *   memslot-flag, poison-trap, userfaultfd   with the library's mechanisms, as far as they work here
 *
 * The same guest (guest/touch.S at CPL 3), the same memory, the same bytes to copy in each. All are run in turn, several times
 * over, so that a noisy machine disturbs all alike; what is compared are ratios within a turn.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum way { FLOOR, PLAIN_C, MEMSLOT_FLAG, POISON_TRAP, USERFAULTFD, WAYS };
static const char *const way_names[WAYS] = { "floor", "plain-c", "memslot-flag", "poison-trap", "userfaultfd" };
static const int mechanism_of[WAYS] = {
	[MEMSLOT_FLAG] = KVMFAULT_MECHANISM_MEMSLOT_FLAG,
	[POISON_TRAP] = KVMFAULT_MECHANISM_POISON_TRAP,
	[USERFAULTFD] = KVMFAULT_MECHANISM_USERFAULTFD,
};
static const int vcpu_counts[] = { 1, 2, 8 };
static const enum backing backings[] = { ANON, MEMFD };
enum { COUNTS = 3, BACKINGS = 2, MOST_REPETITIONS = 100, MOST_REQUIREMENTS = 16 };

static uint8_t source_page[PAGE] __attribute__((aligned(4096))); /* what is copied into each page */
static uint64_t pages = 8192;

static struct {
	double rate[MOST_REPETITIONS]; /* pages a second */
	bool works;
	double median, low, high, ratio; /* ratio: median of those to plain-c in the same turn */
} results[BACKINGS][COUNTS][WAYS];

/* ---- userfaultfd in plain C ---- */

struct reader {
	int uffd, stop; /* stop: the reading end of a pipe, for its hangup */
	pthread_t thread;
};

static void *read_faults(void *arg)
{
	struct reader *r = arg;
	struct pollfd fds[2] = { { .fd = r->uffd, .events = POLLIN }, { .fd = r->stop, .events = POLLIN } };
	struct uffd_msg message;
	for (;;) {
		if (poll(fds, 2, -1) < 0 || fds[1].revents)
			return NULL;
		while (read(r->uffd, &message, sizeof(message)) == sizeof(message)) {
			struct uffdio_copy copy = {
				.dst = message.arg.pagefault.address & -PAGE,
				.src = (uintptr_t)source_page,
				.len = PAGE,
			};
			while (ioctl(r->uffd, UFFDIO_COPY, &copy)) {
				/* Two vCPUs wanted it: the second message finds the page there. */
				struct uffdio_range range = { copy.dst, PAGE };
				if (errno == EEXIST) {
					SYS(ioctl(r->uffd, UFFDIO_WAKE, &range));
					break;
				}
				CHECK(errno == EAGAIN, "UFFDIO_COPY: %s", strerror(errno));
			}
		}
	}
}

static int open_userfaultfd(void)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0) {
		int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
		fd = device < 0 ? -1 : ioctl(device, _IO(0xAA, 0x00), O_CLOEXEC | O_NONBLOCK);
		close(device);
	}
	CHECK(fd >= 0, "userfaultfd: %s (as root, or vm.unprivileged_userfaultfd=1, or permission for /dev/userfaultfd)",
	      strerror(errno));
	return fd;
}

static void start_reader(struct reader *r, const struct ram *ram, int stop)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = {
		.range = { (uintptr_t)ram->hva, ram->len },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	r->uffd = open_userfaultfd();
	r->stop = stop;
	SYS(ioctl(r->uffd, UFFDIO_API, &api));
	SYS(ioctl(r->uffd, UFFDIO_REGISTER, &reg));
	CHECK(!pthread_create(&r->thread, NULL, read_faults, r), "pthread_create");
}

/* ---- one run ---- */

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	int ret = kvmfault_pages_install(vm, fault->gpa, source_page, PAGE);
	return ret < 0 ? ret : KVMFAULT_RESOLVED;
}

static pthread_barrier_t begin;
struct times {
	double start, end;
};

static void *run_vcpu(struct vcpu *v)
{
	struct times *times = v->opaque;
	uint32_t value;
	if (v->machine->library)
		vcpu_attach(v);
	pthread_barrier_wait(&begin);
	times->start = now();
	if (v->machine->library) {
		vcpu_run(v);
	} else {
		while (ioctl(v->fd, KVM_RUN, 0) < 0)
			CHECK(errno == EINTR, "KVM_RUN: %s", strerror(errno));
		CHECK(vcpu_stopped(v, &value), "unexpected exit %u", v->run->exit_reason);
	}
	times->end = now();
	if (v->machine->library)
		vcpu_detach(v);
	return NULL;
}

/* Pages a second. */
static double run(enum way way, enum backing backing, int vcpus)
{
	struct machine m;
	struct ram ram;
	struct reader reader;
	int stop[2];
	uint64_t share = pages / vcpus;
	ram_create(&ram, backing, pages * PAGE);
	machine_create(&m, 0);
	if (mechanism_of[way]) {
		struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
		options.mechanism = mechanism_of[way];
		options.resolver = resolve;
		machine_attach(&m, NULL, &options);
		machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	} else {
		struct kvm_userspace_memory_region region = {
			.slot = RAM_SLOT,
			.guest_phys_addr = RAM_GPA,
			.memory_size = ram.len,
			.userspace_addr = (uintptr_t)ram.hva,
		};
		SYS(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &region));
	}
	if (way == PLAIN_C) {
		SYS(pipe2(stop, O_CLOEXEC));
		start_reader(&reader, &ram, stop[0]);
	}
	struct times times[MOST_VCPUS];
	pthread_barrier_init(&begin, NULL, vcpus);
	for (int i = 0; i < vcpus; i++) {
		struct vcpu *v = machine_add_vcpu(&m, 3);
		vcpu_load_touch(v, RAM_GPA + i * share * PAGE, share, PAGE);
		vcpu_start(v, run_vcpu, &times[i]);
	}
	/* From the first vCPU's start to the last one's end, as they see it: this thread may get to run late. */
	double start = 0, end = 0;
	for (int i = 0; i < vcpus; i++) {
		vcpu_join(m.vcpu[i]);
		start = i == 0 || times[i].start < start ? times[i].start : start;
		end = times[i].end > end ? times[i].end : end;
	}
	double seconds = end - start;

	/* The guest wrote one byte to each page; the rest is what was to be copied. */
	for (uint64_t page = 0; page < share * vcpus; page++) {
		const uint8_t *bytes = ram.hva + page * PAGE;
		CHECK(bytes[0] == 0x5a && bytes[1] == (way == FLOOR ? 0 : 0xa5) && bytes[PAGE - 1] == bytes[1],
		      "%s: page %lu has the wrong bytes", way_names[way], page);
	}
	if (way == PLAIN_C) {
		close(stop[1]); /* a hangup, which poll reports */
		pthread_join(reader.thread, NULL);
		close(stop[0]);
		close(reader.uffd);
	}
	machine_destroy(&m);
	ram_destroy(&ram);
	pthread_barrier_destroy(&begin);
	return share * vcpus / seconds;
}

/* ---- results ---- */

static int compare_numbers(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

static double median(double *numbers, int count)
{
	qsort(numbers, count, sizeof(*numbers), compare_numbers);
	return count % 2 ? numbers[count / 2] : (numbers[count / 2 - 1] + numbers[count / 2]) / 2;
}

static void evaluate(int b, int c, int repetitions)
{
	double ratios[WAYS][MOST_REPETITIONS];
	for (int w = 0; w < WAYS; w++)
		for (int r = 0; r < repetitions && results[b][c][w].works; r++)
			ratios[w][r] = results[b][c][w].rate[r] / results[b][c][PLAIN_C].rate[r];
	for (int w = 0; w < WAYS; w++) {
		if (!results[b][c][w].works)
			continue;
		results[b][c][w].ratio = median(ratios[w], repetitions);
		results[b][c][w].median = median(results[b][c][w].rate, repetitions);
		results[b][c][w].low = results[b][c][w].rate[0];
		results[b][c][w].high = results[b][c][w].rate[repetitions - 1];
	}
}

/* Calls `print` for each line of the table. */
static void each_result(FILE *file, void (*print)(FILE *, const char *, int, const char *, double, double, double, double))
{
	for (int b = 0; b < BACKINGS; b++)
		for (int c = 0; c < COUNTS; c++)
			for (int w = 0; w < WAYS; w++)
				if (results[b][c][w].works)
					print(file, backing_name(backings[b]), vcpu_counts[c], way_names[w], results[b][c][w].median,
					      results[b][c][w].low, results[b][c][w].high, results[b][c][w].ratio);
}

static void print_line(FILE *file, const char *memory, int vcpus, const char *name, double rate, double low, double high,
		       double ratio)
{
	fprintf(file, "%-6s %5d  %-13s %9.0f  %9.0f ..%9.0f  %6.2f\n", memory, vcpus, name, rate, low, high, ratio);
}

static void print_json(FILE *file, const char *memory, int vcpus, const char *name, double rate, double low, double high,
		       double ratio)
{
	fprintf(file, "%s\n  {\"memory\": \"%s\", \"vcpus\": %d, \"way\": \"%s\", \"pages_per_second\": %.0f, \"lowest\": %.0f, "
		      "\"highest\": %.0f, \"ratio_to_plain_c\": %.3f}",
		ftell(file) > 1 ? "," : "", memory, vcpus, name, rate, low, high, ratio);
}

static void print_csv(FILE *file, const char *memory, int vcpus, const char *name, double rate, double low, double high,
		      double ratio)
{
	fprintf(file, "%s,%d,%s,%.0f,%.0f,%.0f,%.3f\n", memory, vcpus, name, rate, low, high, ratio);
}

static FILE *create(const char *path)
{
	FILE *file = fopen(path, "w");
	if (!file) {
		fprintf(stderr, "compare: %s: %s\n", path, strerror(errno));
		exit(2);
	}
	return file;
}

/* ---- options ---- */

static struct requirement {
	const char *name;
	double ratio;
} required[MOST_REQUIREMENTS];
static int required_count;

static int check_requirements(void)
{
	int failed = 0;
	for (int i = 0; i < required_count; i++) {
		double best = 0;
		for (int b = 0; b < BACKINGS; b++)
			for (int w = 0; w < WAYS; w++)
				if (!strcmp(way_names[w], required[i].name) && results[b][0][w].works && results[b][0][w].ratio > best)
					best = results[b][0][w].ratio;
		bool enough = best >= required[i].ratio;
		printf("%s: %s is %.2f times plain-c at 1 vCPU (required: %.2f)\n", enough ? "PASS" : "FAIL", required[i].name, best,
		       required[i].ratio);
		failed += !enough;
	}
	return failed;
}

static void usage(FILE *to)
{
	fprintf(to, "usage: compare [OPTION]...\n"
		    "Pages a second that a guest touches for the first time: without userfaultfd (floor), with plain userfaultfd\n"
		    "and one reader (plain-c), and with each mechanism of the library; one page a fault, at 1, 2 and 8 vCPUs.\n"
		    "Medians of several runs, with the lowest and highest; the ratio is the median of those within each turn.\n"
		    "Only a quiet machine tells much: where other programs want the CPUs, each sleep and wake-up has another price.\n"
		    "  --pages N          in each run, up to 1000000 (default 8192)\n"
		    "  --repetitions N    1 to 100 (default 7)\n"
		    "  --memory KIND      anon, memfd or both (default)\n"
		    "  --require WAY=X    exit with 1 if WAY's ratio to plain-c at 1 vCPU is below X (the better kind of memory counts)\n"
		    "  --json FILE        a list of objects\n"
		    "  --csv FILE\n");
}

static long number(const char *option, const char *text, long most)
{
	char *end;
	long n = strtol(text, &end, 10);
	if (*end || n < 1 || n > most) {
		fprintf(stderr, "compare: --%s takes a number from 1 to %ld, not \"%s\"\n", option, most, text);
		exit(2);
	}
	return n;
}

static void require(char *text)
{
	char *equals = strchr(text, '='), *end = NULL;
	bool known = false;
	double ratio = equals ? strtod(equals + 1, &end) : 0;
	if (equals)
		*equals = 0;
	for (int w = 0; w < WAYS; w++)
		known |= !strcmp(way_names[w], text);
	if (!known || !end || *end || ratio <= 0 || required_count == MOST_REQUIREMENTS) {
		fprintf(stderr, "compare: --require takes WAY=NUMBER with one of the ways in the table, like poison-trap=2.0\n");
		exit(2);
	}
	required[required_count++] = (struct requirement){ text, ratio };
}

int main(int argc, char **argv)
{
	static const struct option known[] = {
		{ "pages", required_argument, NULL, 'p' },   { "repetitions", required_argument, NULL, 'r' },
		{ "memory", required_argument, NULL, 'm' },  { "require", required_argument, NULL, 'q' },
		{ "json", required_argument, NULL, 'j' },    { "csv", required_argument, NULL, 'c' },
		{ "help", no_argument, NULL, 'h' },          { 0 },
	};
	const char *json = NULL, *csv = NULL, *memory = "both";
	int repetitions = 7;
	for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
		switch (c) {
		case 'p':
			pages = number("pages", optarg, 1000000);
			break;
		case 'r':
			repetitions = (int)number("repetitions", optarg, MOST_REPETITIONS);
			break;
		case 'm':
			memory = optarg;
			if (!strcmp(memory, "anon") || !strcmp(memory, "memfd") || !strcmp(memory, "both"))
				break;
			fprintf(stderr, "compare: --memory takes anon, memfd or both, not \"%s\"\n", memory);
			return 2;
		case 'q':
			require(optarg);
			break;
		case 'j':
			json = optarg;
			break;
		case 'c':
			csv = optarg;
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
	memset(source_page, 0xa5, PAGE);
	for (int r = 0; r < repetitions; r++) {
		for (int b = 0; b < BACKINGS; b++) {
			if (strcmp(memory, "both") && strcmp(memory, backing_name(backings[b])))
				continue;
			for (int c = 0; c < COUNTS; c++) {
				for (int w = 0; w < WAYS; w++) {
					uint32_t works = backings[b] == ANON ? probe.mechanisms_anon : probe.mechanisms_shared;
					if (mechanism_of[w] && !(works & 1u << mechanism_of[w]))
						continue;
					if (isatty(2))
						fprintf(stderr, "\r%d of %d: %s, %d vCPUs, %-13s", r + 1, repetitions,
							backing_name(backings[b]), vcpu_counts[c], way_names[w]);
					results[b][c][w].works = true;
					results[b][c][w].rate[r] = run(w, backings[b], vcpu_counts[c]);
				}
			}
		}
	}
	if (isatty(2))
		fprintf(stderr, "\r%*s\r", 60, "");
	for (int b = 0; b < BACKINGS; b++)
		for (int c = 0; c < COUNTS; c++)
			evaluate(b, c, repetitions);

	printf("%-6s %5s  %-13s %9s  %20s  %6s\n", "memory", "vcpus", "way", "pages/s", "lowest .. highest", "ratio");
	each_result(stdout, print_line);
	if (json) {
		FILE *file = create(json);
		fprintf(file, "[");
		each_result(file, print_json);
		fprintf(file, "\n]\n");
		fclose(file);
	}
	if (csv) {
		FILE *file = create(csv);
		fprintf(file, "memory,vcpus,way,pages_per_second,lowest,highest,ratio_to_plain_c\n");
		each_result(file, print_csv);
		fclose(file);
	}
	return check_requirements() ? 1 : 0;
}
