/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What works on this machine, what does not, why, and what to do about it.
 *
 *   cc explain.c $(pkg-config --cflags --libs kvmfault) -o explain
 */
#include <kvmfault.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
	const char *name;
	int number;
} mechanisms[] = {
	{ "memslot-flag", KVMFAULT_MECHANISM_MEMSLOT_FLAG },
	{ "poison-trap", KVMFAULT_MECHANISM_POISON_TRAP },
	{ "userfaultfd", KVMFAULT_MECHANISM_USERFAULTFD },
};

/* The names of the mechanisms in a set of bits, as a JSON list. */
static void print_list(const char *key, uint32_t bits)
{
	const char *separator = "";
	printf("  \"%s\": [", key);
	for (size_t i = 0; i < sizeof(mechanisms) / sizeof(*mechanisms); i++) {
		if (bits & 1u << mechanisms[i].number) {
			printf("%s\"%s\"", separator, mechanisms[i].name);
			separator = ", ";
		}
	}
	printf("],\n");
}

static void print_json(const struct kvmfault_probe *probe)
{
	printf("{\n  \"version\": \"%s\",\n", kvmfault_version());
	print_list("anon", probe->mechanisms_anon);
	print_list("shared", probe->mechanisms_shared);
	print_list("hugetlb", probe->mechanisms_hugetlb);
	printf("  \"abi\": \"%s\",\n", probe->abi);
	printf("  \"uffd_features\": %llu,\n", (unsigned long long)probe->uffd_features);
	printf("  \"pre_fault_memory\": %s,\n", probe->pre_fault_memory ? "true" : "false");
	printf("  \"two_dimensional_paging\": %s\n}\n", probe->two_dimensional_paging ? "true" : "false");
}

/* Returns whether there was something to print. */
static bool print_text(void)
{
	/* -1: the library opens /dev/kvm itself. The first call only asks how long the text is. */
	int length = kvmfault_explain(-1, NULL, 0);
	if (length < 0)
		return false;
	char *text = malloc((size_t)length + 1);
	bool done = text && kvmfault_explain(-1, text, (size_t)length + 1) >= 0;
	if (done)
		fputs(text, stdout);
	free(text);
	return done;
}

int main(int argc, char **argv)
{
	bool json = argc == 2 && !strcmp(argv[1], "--json");
	if (argc > 1 && !json) {
		bool help = !strcmp(argv[1], "--help");
		fprintf(help ? stdout : stderr,
			"usage: explain [--json]\n"
			"Tells which of libkvmfault's mechanisms work on this machine, and why others don't.\n"
			"  --json  for programs\n"
			"Exit status: 0 if at least one works, 1 if none does, 2 for a wrong option.\n");
		return help ? 0 : 2;
	}

	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	if (kvmfault_probe(-1, &probe) < 0 || !(json || print_text())) {
		fprintf(stderr, "explain: %s\n", kvmfault_last_error());
		return 1;
	}
	if (json)
		print_json(&probe);
	return probe.mechanisms_anon | probe.mechanisms_shared | probe.mechanisms_hugetlb ? 0 : 1;
}
