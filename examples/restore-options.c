/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "restore-options.h"
#include "options.h"
#include "tiny-vm.h"

#include <getopt.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

enum { MOST_VCPUS = 1024, RUN_PAGES = 64 };

static void usage(FILE *to)
{
	fprintf(to,
		"usage: lazy-restore [OPTION]...\n"
		"Restores a VM lazily from a snapshot file, and compares that with reading the whole file first.\n"
		"The guest checks every page, and measures how long it waits for the first touch of each.\n"
		"  --mechanism NAME|all   memslot-flag, poison-trap or userfaultfd: this one alone;\n"
		"                         all (default): a comparison of all that work here\n"
		"  --vcpus N              1 to %d (default: one for each CPU that this process may use)\n"
		"  --size MIB             guest memory, 1 to %lu (default 128)\n"
		"  --order ORDER          in which the guest touches its pages: sequential, shuffled, or runs\n"
		"                         (default): %d neighbours in a row, then a jump to elsewhere\n"
		"  --cpl 0|3|both         privilege level of the guest: 3 as a user program, 0 as a kernel\n"
		"                         (default both: all rows at 3, and each mechanism at 0 as well)\n"
		"  --readahead N          pages fetched for one fault at most, 1 to 4096, in all rows (default:\n"
		"                         a row with 1 and a row with 64; 1 if a mechanism is named)\n"
		"  --wrong-byte OFFSET    change this byte of the snapshot, to see that the checks notice it\n"
		"  --json FILE            write the results there too\n"
		"Exit status: 0 if every page was right, 1 if not or if something failed, 2 for a wrong option.\n",
		MOST_VCPUS, TINY_VM_RAM_MAX >> 20, RUN_PAGES);
}

/* The CPUs that this process may use, which may be fewer than the machine has. */
static unsigned count_cpus(void)
{
	cpu_set_t cpus;
	if (sched_getaffinity(0, sizeof(cpus), &cpus))
		return 1;
	return CPU_COUNT(&cpus) < MOST_VCPUS ? CPU_COUNT(&cpus) : MOST_VCPUS;
}

void parse_options(int argc, char **argv, struct options *o)
{
	static const struct option known[] = {
		{ "mechanism", required_argument, NULL, 'm' },
		{ "vcpus", required_argument, NULL, 'v' },
		{ "size", required_argument, NULL, 's' },
		{ "order", required_argument, NULL, 'o' },
		{ "cpl", required_argument, NULL, 'c' },
		{ "readahead", required_argument, NULL, 'r' },
		{ "wrong-byte", required_argument, NULL, 'w' },
		{ "json", required_argument, NULL, 'j' },
		{ "help", no_argument, NULL, 'h' },
		{ 0 },
	};
	enum { SEQUENTIAL, SHUFFLED, RUNS } order = RUNS;
	const char *wrong_byte = NULL;
	*o = (struct options){
		.mechanism = "all", .vcpus = count_cpus(), .size = 128ul << 20, .cpl = -1, .wrong_byte = -1
	};
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
			order = option_choice("order", optarg, "sequential|shuffled|runs");
			break;
		case 'c':
			o->cpl = option_cpl(optarg);
			break;
		case 'r':
			o->readahead = option_number("readahead", optarg, 1, 4096);
			break;
		case 'w':
			wrong_byte = optarg;
			break;
		case 'j':
			o->json = optarg;
			break;
		default:
			usage(c == 'h' ? stdout : stderr);
			exit(c == 'h' ? 0 : 2);
		}
	}
	if (optind < argc) {
		usage(stderr);
		exit(2);
	}
	/* These depend on the size, which may come later on the command line. */
	if (wrong_byte)
		o->wrong_byte = option_number("wrong-byte", wrong_byte, 0, o->size - 1);
	o->run = order == SEQUENTIAL ? o->size / PAGE_SIZE : order == SHUFFLED ? 1 : RUN_PAGES;
}
