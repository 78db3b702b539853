/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "restore-options.h"
#include "tiny-vm.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_VCPUS = 1024 };

static void usage(FILE *to)
{
	fprintf(to,
		"usage: lazy-restore [OPTION]...\n"
		"Restores a VM lazily from a snapshot file; the guest checks each page and times its first touch.\n"
		"  --mechanism NAME|all         memslot-flag, poison-trap, userfaultfd, or all that work here (default)\n"
		"  --vcpus N                    1 to %d (default 4)\n"
		"  --size MIB                   guest memory, 1 to %lu (default 256)\n"
		"  --order sequential|shuffled  in which the guest touches its pages (default shuffled)\n"
		"  --cpl 0|3|both               the guest's privilege level (default both)\n"
		"  --readahead N                pages a fault at most, 1 to 4096 (default 1)\n"
		"  --json FILE                  write the results there too\n"
		"Exit status: 0 if every page was right, 1 if not or if something failed, 2 for a wrong option.\n",
		MOST_VCPUS, TINY_VM_RAM_MAX >> 20);
}

void parse_options(int argc, char **argv, struct options *o)
{
	static const struct option known[] = {
		{ "mechanism", required_argument, NULL, 'm' }, { "vcpus", required_argument, NULL, 'v' },
		{ "size", required_argument, NULL, 's' },      { "order", required_argument, NULL, 'o' },
		{ "cpl", required_argument, NULL, 'c' },       { "readahead", required_argument, NULL, 'r' },
		{ "json", required_argument, NULL, 'j' },      { "help", no_argument, NULL, 'h' },
		{ 0 },
	};
	*o = (struct options){ .mechanism = "all", .vcpus = 4, .size = 256ul << 20, .shuffled = true, .cpl = -1, .readahead = 1 };
	for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
		switch (c) {
		case 'm':
			option_choice("mechanism", optarg, "memslot-flag|poison-trap|userfaultfd|all");
			o->mechanism = optarg;
			break;
		case 'v':
			o->vcpus = option_number("vcpus", optarg, 1, MOST_VCPUS);
			break;
		case 's':
			o->size = option_number("size", optarg, 1, TINY_VM_RAM_MAX >> 20) << 20;
			break;
		case 'o':
			o->shuffled = option_choice("order", optarg, "sequential|shuffled");
			break;
		case 'c':
			o->cpl = (const int[]){ 0, 3, -1 }[option_choice("cpl", optarg, "0|3|both")];
			break;
		case 'r':
			o->readahead = option_number("readahead", optarg, 1, 4096);
			break;
		case 'j':
			o->json = optarg;
			break;
		case 'h':
			usage(stdout);
			exit(0);
		default:
			usage(stderr);
			exit(2);
		}
	}
	if (optind < argc) {
		usage(stderr);
		exit(2);
	}
}

void print_heading(const struct options *o)
{
	printf("%u vCPUs, %llu MiB, %s, %u page%s a fault\n\n", o->vcpus, (unsigned long long)(o->size >> 20),
	       o->shuffled ? "shuffled" : "sequential", o->readahead, o->readahead == 1 ? "" : "s");
	printf("%-13s %3s %5s %7s %7s %8s %8s %8s %8s %8s %s\n", "mechanism", "cpl", "vcpus", "pages", "faults", "seconds",
	       "pages/s", "p50 us", "p99 us", "calls", "verified");
	fflush(stdout);
}

void print_result(const struct result *r)
{
	printf("%-13s %3d %5u %7llu %7llu %8.3f %8.0f %8.1f %8.1f %8llu %s\n", r->mechanism, r->cpl, r->vcpus,
	       (unsigned long long)r->pages, (unsigned long long)r->faults, r->seconds, r->pages / r->seconds, r->p50_us,
	       r->p99_us, (unsigned long long)r->resolver_calls, r->verified ? "yes" : "NO");
	fflush(stdout);
}

void write_json(const char *path, const struct result *results, size_t count)
{
	FILE *file = fopen(path, "w");
	if (!file)
		die(errno, "%s", path);
	fprintf(file, "[");
	for (const struct result *r = results; r < results + count; r++)
		fprintf(file,
			"%s\n  {\"mechanism\": \"%s\", \"cpl\": %d, \"vcpus\": %u, \"pages\": %llu, \"faults\": %llu, \"seconds\": %.6f, "
			"\"pages_per_second\": %.0f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"resolver_calls\": %llu, \"verified\": %s}",
			r == results ? "" : ",", r->mechanism, r->cpl, r->vcpus, (unsigned long long)r->pages,
			(unsigned long long)r->faults, r->seconds, r->pages / r->seconds, r->p50_us, r->p99_us,
			(unsigned long long)r->resolver_calls, r->verified ? "true" : "false");
	fprintf(file, "\n]\n");
	if (fclose(file))
		die(errno, "%s", path);
}
