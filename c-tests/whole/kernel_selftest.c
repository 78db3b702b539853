/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The library beside the kernel's selftest demand_paging_test -u MISSING
 * (tools/testing/selftests/kvm), in turns, in the same boot: one vCPU at CPL 0 writes to each page
 * once, in order, one page a fault, and a resolver copies it. Then with readahead, which the
 * selftest doesn't have.
 *
 * KVMFAULT_SELFTEST names the selftest; else this program looks beside itself.
 * KVMFAULT_SELFTEST_ROUNDS is the number of rounds (7).
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MEBIBYTES = 16, MOST_ROUNDS = 100, SKIPPED_BY_SELFTEST = 4, READAHEAD = 64 };

/*
 * The least ratio to the selftest's rate. An emulated machine on a busy host measures the host as
 * well: there the library only has to be no slower. KVMFAULT_SELFTEST_STRICT in the environment
 * requires what the mechanisms achieve on real machines.
 */
static double required(void)
{
	bool strict = getenv("KVMFAULT_SELFTEST_STRICT") != NULL;
	switch (test_mechanism()) {
	case KVMFAULT_MECHANISM_MEMSLOT_FLAG:
		return strict ? 2.0 : 1.0;
	case KVMFAULT_MECHANISM_POISON_TRAP:
		return strict ? 1.4 : 1.0;
	default:
		return 0; /* it is what the selftest does, too: for comparison only */
	}
}

/* ---- the selftest ---- */

static const char *find_selftest(void)
{
	static char path[4096];
	const char *named = getenv("KVMFAULT_SELFTEST");
	if (named && *named) {
		snprintf(path, sizeof(path), "%s", named);
	} else {
		ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 64);
		path[length > 0 ? length : 0] = 0;
		char *slash = strrchr(path, '/');
		strcpy(slash ? slash + 1 : path, "demand_paging_test");
	}
	if (access(path, X_OK) != 0)
		skip("no selftest to compare with: %s: %s (c-tests/vm/selftest builds it; KVMFAULT_SELFTEST names it)",
		     path, strerror(errno));
	return path;
}

/* Pages a second. */
static double run_selftest(const char *path, const char *type)
{
	char command[5000], line[512], last[512] = "it said nothing";
	double rate = 0;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	snprintf(command, sizeof(command), "exec '%s' -u MISSING -b %dM -v 1 -s %s 2>&1", path, MEBIBYTES, type);
	FILE *output = popen(command, "r");
	CHECK(output, "popen: %s", strerror(errno));
	while (fgets(line, sizeof(line), output)) {
		sscanf(line, "Overall demand paging rate: %lf", &rate);
		memcpy(last, line, sizeof(last));
	}
	int status = pclose(output);
	if (status == 0 && rate > 0)
		return rate;
	OK(kvmfault_probe(-1, &probe));
	if (!probe.two_dimensional_paging || WEXITSTATUS(status) == SKIPPED_BY_SELFTEST)
		skip("the selftest doesn't run on this KVM: status %#x, %s", status, last);
	FAIL("the selftest failed: status %#x, %s", status, last);
}

/* ---- the library ---- */

static uint8_t bytes[READAHEAD * PAGE] __attribute__((aligned(PAGE)));

static int copy_page(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	return kvmfault_pages_install(vm, fault->window_gpa, bytes, fault->window_len);
}

static double run_ours(enum backing backing, uint64_t flags, uint32_t readahead)
{
	struct machine m;
	struct ram ram;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	uint64_t pages = ((uint64_t)MEBIBYTES << 20) / PAGE;
	ram_create(&ram, backing, pages * PAGE);
	machine_create(&m, 0);
	options.resolver = copy_page;
	options.flags = flags;
	options.readahead = readahead;
	machine_attach(&m, NULL, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = machine_add_vcpu(&m, 0);
	vcpu_load_touch(v, RAM_GPA, pages, PAGE);
	vcpu_attach(v);
	double start = now();
	vcpu_run(v);
	double seconds = now() - start;
	/* with userfaultfd the guest is ahead of the counters */
	struct kvmfault_stats stats = machine_settled_stats(&m);
	CHECK(readahead > 1 ? stats.resolver_calls <= pages / readahead + 8 : stats.resolver_calls == pages,
	      "%lu resolver calls", stats.resolver_calls);
	EQUAL("pages that came", stats.pages_copied, pages);
	CHECK(ram.hva[0] == 0x5a && ram.hva[pages * PAGE - PAGE] == 0x5a && ram.hva[1] == bytes[1],
	      "the memory is wrong");
	vcpu_detach(v);
	machine_destroy(&m);
	ram_destroy(&ram);
	return pages / seconds;
}

/* ---- in turns ---- */

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

struct spread {
	double least, median, most;
};

static struct spread spread_of(double *values, int count)
{
	qsort(values, count, sizeof(*values), ascending);
	double median = count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
	return (struct spread){ values[0], median, values[count - 1] };
}

/*
 * Each of ours stands between two of theirs, and is compared with their mean: what slows the
 * machine down for longer slows both down.
 */
static struct spread compare(const char *path, enum backing backing, int rounds, struct spread *ahead)
{
	const char *type = backing == ANON ? "anonymous" : "shmem";
	double theirs[MOST_ROUNDS + 1], ours[MOST_ROUNDS], ratios[MOST_ROUNDS], asked[MOST_ROUNDS], aheads[MOST_ROUNDS];
	struct machine keeper;
	/*
	 * KVM patches the kernel's scheduler when the first VM comes and when the last one goes
	 * (preempt_notifier_inc), and itself with the first vCPU without an APIC. Emulators with
	 * several threads don't always survive that (c-tests/vm/kvmfault_vm/machine.py): so one
	 * stays.
	 */
	machine_create(&keeper, 0);
	machine_add_vcpu(&keeper, 0);
	theirs[0] = run_selftest(path, type);
	for (int i = 0; i < rounds; i++) {
		ours[i] = run_ours(backing, 0, 1);
		asked[i] = run_ours(backing, KVMFAULT_VM_PRE_FAULT, 1) / ours[i];
		aheads[i] = run_ours(backing, 0, READAHEAD);
		theirs[i + 1] = run_selftest(path, type);
		ratios[i] = ours[i] / ((theirs[i] + theirs[i + 1]) / 2);
		aheads[i] /= (theirs[i] + theirs[i + 1]) / 2;
	}
	machine_destroy(&keeper);
	struct spread a = spread_of(asked, rounds);
	*ahead = spread_of(aheads, rounds);
	struct spread t = spread_of(theirs, rounds + 1), o = spread_of(ours, rounds), r = spread_of(ratios, rounds);
	note("%s, %d MiB, %d rounds: selftest %.0f pages/s (%.0f to %.0f), %s %.0f (%.0f to %.0f), ratio %.2f (%.2f to "
	     "%.2f); "
	     "with KVM_PRE_FAULT_MEMORY %.2f times that (%.2f to %.2f); with readahead ratio %.2f (%.2f to %.2f)",
	     type, MEBIBYTES, rounds, t.median, t.least, t.most, mechanism_name(test_mechanism()), o.median, o.least,
	     o.most, r.median, r.least, r.most, a.median, a.least, a.most, ahead->median, ahead->least, ahead->most);
	return r;
}

static int rounds_wanted(void)
{
	const char *told = getenv("KVMFAULT_SELFTEST_ROUNDS");
	int rounds = told ? atoi(told) : 7;
	return rounds < 1 ? 1 : rounds > MOST_ROUNDS ? MOST_ROUNDS : rounds;
}

static void private_memory(void)
{
	const char *path = find_selftest();
	memset(bytes, 0xab, sizeof(bytes));
	struct spread ahead, ratio = compare(path, ANON, rounds_wanted(), &ahead);
	CHECK(ratio.median >= required(),
	      "%s restores %.2f times as fast as the kernel's selftest, not %.1f (%.2f to %.2f in %d rounds)",
	      mechanism_name(test_mechanism()), ratio.median, required(), ratio.least, ratio.most, rounds_wanted());
	double times = test_mechanism() != KVMFAULT_MECHANISM_MEMSLOT_FLAG ? 1
		       : getenv("KVMFAULT_SELFTEST_STRICT")                ? 5
									   : 2;
	CHECK(ahead.median >= times, "with readahead %s restores %.2f times as fast as the selftest, not %.1f",
	      mechanism_name(test_mechanism()), ahead.median, times);
}

/*
 * The comparison with shared memory, which costs poison-trap a second mapping of each page:
 * measured, not judged.
 */
static void shared_memory(void)
{
	const char *path = find_selftest();
	memset(bytes, 0xab, sizeof(bytes));
	struct spread ahead;
	compare(path, MEMFD, (rounds_wanted() + 1) / 2, &ahead);
}

static const struct test_case cases[] = {
	{ "anon", private_memory, true },
	{ "memfd", shared_memory, true },
};
TEST_MAIN(cases)
