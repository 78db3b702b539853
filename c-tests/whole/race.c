/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Many vCPUs want the same pages at the same time: each page is fetched once, all vCPUs see its
 * bytes, and none is left waiting. Each round has other bytes, so that a page left over from the
 * round before is noticed.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <stdio.h>

/* EMULATED of the vCPUs are at CPL 0, which is slow where KVM emulates it. */
enum { VCPUS = 64, EMULATED = 2, PAGES = 1000, ROUNDS = 200 };

static pthread_barrier_t begin, end;
static unsigned long rounds;

static void *verify(struct vcpu *v)
{
	vcpu_attach(v);
	for (unsigned long round = 0; round < rounds; round++) {
		pthread_barrier_wait(&begin);
		vcpu_verify(v);
		pthread_barrier_wait(&end);
	}
	vcpu_detach(v);
	return NULL;
}

static void race(enum backing backing, unsigned long most)
{
	struct machine m;
	struct ram ram;
	struct source source;
	uint64_t list_gpa, seed = 7;

	rounds = scaled(most);
	ram_create(&ram, backing, PAGES * PAGE);
	machine_create(&m, 2 * PAGES * sizeof(uint32_t));
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	machine_attach(&m, &source, NULL);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	/* Twice the list, one after the other: each vCPU can begin at a place of its own. */
	uint32_t *list = machine_share(&m, 2 * PAGES * sizeof(*list), &list_gpa);

	pthread_barrier_init(&begin, NULL, VCPUS + 1);
	pthread_barrier_init(&end, NULL, VCPUS + 1);
	for (int i = 0; i < VCPUS; i++)
		vcpu_start(machine_add_vcpu(&m, i < EMULATED ? 0 : 3), verify, NULL);

	for (unsigned long round = 0; round < rounds; round++) {
		source.pattern.factor = random_number(&seed) | 1;
		source.total = 0;
		list_shuffle(list, PAGES, round + 1);
		for (int i = 0; i < PAGES; i++)
			list[PAGES + i] = list[i];
		for (int i = 0; i < VCPUS; i++) {
			/*
			 * All for the same page at once; or each from elsewhere, so that they also
			 * overtake each other.
			 */
			uint64_t start = round % 2 ? i * PAGES / VCPUS : 0;
			vcpu_load_verify(m.vcpu[i], RAM_GPA, list_gpa + start * sizeof(*list), PAGES, &source.pattern,
					 READ_FIRST);
		}
		if (round > 0)
			OK(kvmfault_pages_discard(m.library, RAM_GPA, ram.len));
		/*
		 * A reader thread may be about to serve a fault of the round before, and fetch that
		 * page in this one.
		 */
		int64_t absent = kvmfault_pages_absent(m.library),
			early = test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD ? 2 : 0;
		CHECK(absent <= PAGES && absent >= PAGES - early, "%ld pages absent", absent);
		pthread_barrier_wait(&begin);
		pthread_barrier_wait(&end);

		struct kvmfault_stats stats = machine_settled_stats(&m);
		/* the guest may be ahead of the counters */
		UNTIL(kvmfault_pages_absent(m.library) == 0);
		EQUAL("the resolver's own count in a round", source.total, PAGES);
		EQUAL("resolver calls in all", stats.resolver_calls, (round + 1) * PAGES);
		EQUAL("pages that arrived in all", stats.pages_copied, (round + 1) * PAGES);
		for (int page = 0; page < PAGES; page++)
			EQUAL("calls for a page in all", source.calls[page], round + 1);
		pattern_check(&source.pattern, ram.hva, 0, PAGES);
	}
	struct kvmfault_stats stats = machine_stats(&m);
	note("%lu rounds: %lu faults, %lu resolver calls, %lu waited, %lu found the page mapped or there", rounds,
	     stats.faults_vcpu, stats.resolver_calls, stats.outcome_waited, stats.outcome_mapped);
	/* A race in which vCPUs never meet proves nothing. */
	CHECK(stats.outcome_waited + stats.outcome_mapped > 0, "the vCPUs never met");
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(m.vcpu[i]);
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
}

static void anon(void)
{
	race(ANON, ROUNDS / 4);
}

static void memfd(void)
{
	race(MEMFD, ROUNDS);
}

static const struct test_case cases[] = {
	{ "anon", anon, true },
	{ "memfd", memfd, true },
};
TEST_MAIN(cases)
