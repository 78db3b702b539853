/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memslots that change while vCPUs use them: deleted, switched and discarded; filled by pre-copy
 * and then by post-copy; with dirty logging.
 */
#define _GNU_SOURCE
#include "hva_vm.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { FEW = 4, VCPUS = 4 };
#define MANY SCALED(4096, 1024)

static atomic_int finished;

static int pending(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm, (void)fault;
	hva_vm.source.total++;
	return KVMFAULT_PENDING;
}

/* Its slot is deleted while it waits: there is no memory any more, so the access is the VMM's. */
static void *expect_no_memory(struct vcpu *v)
{
	vcpu_attach(v);
	int ret = kvmfault_vcpu_run(v->handle);
	CHECK(ret == KVMFAULT_PASS && v->run->exit_reason == KVM_EXIT_MMIO &&
		      v->run->mmio.phys_addr == RAM_GPA + 3 * PAGE,
	      "%s", vcpu_describe(v, ret));
	finished++;
	return NULL;
}

static void deleted_while_waiting(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	require_interruptible_sleep();
	options.resolver = pending;
	ram_create(&hva_vm.ram, MEMFD, PAGES * PAGE);
	machine_create(&hva_vm.m, PAGE);
	source_create(&hva_vm.source, RAM_GPA, hva_vm.ram.len, PATTERN);
	machine_attach(&hva_vm.m, NULL, &options);
	machine_set_slot(&hva_vm.m, &hva_vm.ram, RAM_SLOT, RAM_GPA);
	hva_vm.steps = machine_share(&hva_vm.m, PAGE, &hva_vm.steps_gpa);
	hva_vm.steps[0] = (struct step){ READ64, RAM_GPA + 3 * PAGE, 0, 0 };
	hva_vm.steps[1] = (struct step){ STOP, 0, 0, 0 };
	struct vcpu *v = machine_add_vcpu(&hva_vm.m, 3);
	vcpu_load_script(v, hva_vm.steps_gpa);
	vcpu_start(v, expect_no_memory, NULL);
	UNTIL(hva_vm.source.total == 1);
	usleep(20000);
	hva_vm_delete_slot(RAM_SLOT, 0);
	UNTIL(finished == 1);
	vcpu_join(v);
	hva_vm_tear_down();
}

static atomic_bool stop;
static uint64_t checked_pages; /* 0: MANY */

/* Checks all pages again and again until told to stop, but once at least. */
static void *verify_on(struct vcpu *v)
{
	vcpu_attach(v);
	do {
		vcpu_load_verify(v, RAM_GPA, hva_vm.list_gpa, checked_pages ?: MANY, &hva_vm.source.pattern,
				 READ_FIRST);
		vcpu_verify(v);
	} while (!stop);
	finished++;
	return NULL;
}

static void start_vcpus(void)
{
	finished = 0;
	stop = false;
	for (int i = 0; i < VCPUS; i++)
		vcpu_start(machine_add_vcpu(&hva_vm.m, i == VCPUS - 1 ? 0 : 3), verify_on, NULL);
}

static void join_vcpus(void)
{
	stop = true;
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(hva_vm.m.vcpu[i]);
}

/* The fast path is turned off and on while the guest runs: each page is still fetched once. */
static void toggled(enum backing backing)
{
	unsigned toggles = 0;
	hva_vm_set_up(backing, MANY);
	struct kvmfault_memslot slot = slot_on(&hva_vm.ram, RAM_SLOT, RAM_GPA);
	slot.flags |= KVMFAULT_MEMSLOT_SLOW;
	OK(kvmfault_memslot_set(hva_vm.m.library, &slot));
	start_vcpus();
	while (finished < VCPUS) {
		stop = toggles > 2;
		OK(kvmfault_memslot_set_fast_only(hva_vm.m.library, RAM_SLOT, toggles++ % 2 == 0));
		usleep(3000);
	}
	join_vcpus();
	struct kvmfault_stats stats = machine_settled_stats(&hva_vm.m);
	EQUAL("resolver calls", stats.resolver_calls, MANY);
	for (uint64_t page = 0; page < MANY; page++)
		EQUAL("calls for a page", hva_vm.source.calls[page], 1);
	/* the guest may be ahead of the counters */
	UNTIL(kvmfault_pages_absent(hva_vm.m.library) == 0);
	pattern_check(&hva_vm.source.pattern, hva_vm.ram.hva, 0, MANY);
	note("%u toggles, %lu faults", toggles, stats.faults_vcpu);
	CHECK(toggles > 2, "only %u toggles", toggles);
	hva_vm_tear_down();
}

static void toggled_memfd(void)
{
	toggled(MEMFD);
}

static void toggled_anon(void)
{
	toggled(ANON);
}

/* The end of a case in which `pages` pages were discarded while vCPUs looked at them. */
static void end_discards(uint64_t pages, unsigned long discards, unsigned long busy)
{
	join_vcpus();
	struct kvmfault_stats stats = machine_settled_stats(&hva_vm.m);
	note("%lu discards of %lu pages (%lu times busy), %lu resolver calls, %lu found the page there", discards,
	     stats.pages_discarded, busy, stats.resolver_calls, stats.outcome_mapped);
	CHECK(stats.pages_discarded > 0 && stats.resolver_calls > pages, "the vCPUs met no discard");
	/*
	 * Each installed page is present or was discarded. A reader may be about to install a page
	 * that was discarded last: so all pages are resolved first.
	 */
	OK(kvmfault_pages_resolve(hva_vm.m.library, RAM_GPA, pages * PAGE));
	stats = machine_settled_stats(&hva_vm.m);
	EQUAL("pages installed", stats.pages_copied - stats.pages_discarded, pages);
	EQUAL("outcome_failed", stats.outcome_failed, 0);
	hva_vm_tear_down();
}

/* Pages are discarded while vCPUs read them: the vCPUs see the right bytes and nothing else. */
static void discarded(enum backing backing)
{
	uint64_t seed = 17;
	unsigned long discards = 0, busy = 0;
	hva_vm_set_up(backing, MANY);
	machine_set_slot(&hva_vm.m, &hva_vm.ram, RAM_SLOT, RAM_GPA);
	start_vcpus();
	UNTIL(hva_vm.source.total > MANY / 2);
	unsigned long most = scaled(3000);
	for (double end = now() + 10; (discards < most || hva_vm.source.total < MANY + 100) && now() < end;
	     discards++) {
		uint64_t first = random_number(&seed) % MANY, count = 1 + random_number(&seed) % 64;
		if (first + count > MANY)
			count = MANY - first;
		int ret = kvmfault_pages_discard(hva_vm.m.library, RAM_GPA + first * PAGE, count * PAGE);
		/* Used faster than they can be taken away: allowed, and not often. */
		if (ret == -EBUSY)
			busy++;
		else
			OK(ret);
	}
	end_discards(MANY, discards, busy);
}

static void discarded_memfd(void)
{
	discarded(MEMFD);
}

static void discarded_anon(void)
{
	discarded(ANON);
}

/*
 * All vCPUs want the same few pages, which are discarded at once: a thread that has just seen a
 * page PRESENT finds it gone when it comes to map it. It must not map zeros in its place.
 */
static void discarded_few(enum backing backing)
{
	uint64_t seed = 18;
	unsigned long discards = 0, busy = 0;
	hva_vm_set_up(backing, FEW);
	machine_set_slot(&hva_vm.m, &hva_vm.ram, RAM_SLOT, RAM_GPA);
	checked_pages = FEW;
	start_vcpus();
	UNTIL(hva_vm.source.total >= FEW);
	double end = now() + SCALED(3, 1), latest = end + 30;
	for (; now() < end || (hva_vm.source.total <= FEW + 10 && now() < latest); discards++) {
		int ret = kvmfault_pages_discard(hva_vm.m.library, RAM_GPA + random_number(&seed) % FEW * PAGE, PAGE);
		if (ret == -EBUSY)
			busy++;
		else
			OK(ret);
	}
	end_discards(FEW, discards, busy);
}

static void discarded_few_memfd(void)
{
	discarded_few(MEMFD);
}

static void discarded_few_anon(void)
{
	discarded_few(ANON);
}

/* ---- post-copy ---- */

/*
 * Pre-copy has installed all pages; some of them have changed since, and are fetched when they are
 * touched.
 */
static void post_copy(enum backing backing)
{
	struct pattern old = { .factor = 0x1234567812345677, .zero_mask = 0 };
	hva_vm_set_up(backing, MANY);
	for (uint64_t page = 0; page < MANY; page++)
		pattern_fill(&old, page, hva_vm.ram.hva + page * PAGE);
	struct kvmfault_memslot slot = slot_on(&hva_vm.ram, RAM_SLOT, RAM_GPA);
	slot.flags |= KVMFAULT_MEMSLOT_PRESENT;
	OK(kvmfault_memslot_set(hva_vm.m.library, &slot));
	/* the guest may be ahead of the counters */
	UNTIL(kvmfault_pages_absent(hva_vm.m.library) == 0);
	struct vcpu *v = hva_vm_add_vcpu(3);
	struct vcpu *slow = hva_vm_add_vcpu(0);
	vcpu_load_verify(v, RAM_GPA, hva_vm.list_gpa, MANY, &old, READ_FIRST);
	vcpu_verify(v);
	EQUAL("resolver calls for what is present", hva_vm.source.total, 0);

	/* The second half of the (shuffled) list has changed. */
	for (unsigned i = MANY / 2; i < MANY; i++)
		OK(kvmfault_pages_discard(hva_vm.m.library, RAM_GPA + hva_vm.list[i] * PAGE, PAGE));
	/* the guest may be ahead of the counters */
	UNTIL((uint64_t)kvmfault_pages_absent(hva_vm.m.library) == MANY / 2);
	vcpu_load_verify(v, RAM_GPA, hva_vm.list_gpa, MANY / 2, &old, READ_FIRST);
	vcpu_verify(v);
	EQUAL("resolver calls for what is still present", hva_vm.source.total, 0);
	hva_vm_check_pages(v, RAM_GPA, MANY / 2, MANY / 4);
	hva_vm_check_pages(slow, RAM_GPA, MANY / 2, MANY / 2);
	EQUAL("resolver calls", hva_vm.source.total, MANY / 2);
	/* the guest may be ahead of the counters */
	UNTIL(kvmfault_pages_absent(hva_vm.m.library) == 0);
	for (unsigned i = 0; i < MANY; i++)
		pattern_check(i < MANY / 2 ? &old : &hva_vm.source.pattern, hva_vm.ram.hva + hva_vm.list[i] * PAGE,
			      hva_vm.list[i], 1);
	hva_vm_tear_down();
}

static void post_copy_memfd(void)
{
	post_copy(MEMFD);
}

static void post_copy_anon(void)
{
	post_copy(ANON);
}

/* ---- dirty logging ---- */

/*
 * The guest's writes are in KVM's log, or `written` was called; and logging can be switched on a
 * slot in use.
 */
static void dirty_log(void)
{
	uint64_t bitmap[PAGES / 64 + 1] = { 0 };
	struct kvm_dirty_log log = { .slot = RAM_SLOT, .dirty_bitmap = bitmap };
	hva_vm_set_up(MEMFD, PAGES);
	machine_set_slot(&hva_vm.m, &hva_vm.ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = hva_vm_add_vcpu(3), *slow = hva_vm_add_vcpu(0);
	hva_vm_check_pages(v, RAM_GPA, 0, PAGES / 4);
	struct kvmfault_memslot slot = slot_on(&hva_vm.ram, RAM_SLOT, RAM_GPA);
	slot.kvm_flags = KVM_MEM_LOG_DIRTY_PAGES;
	OK(kvmfault_memslot_set(hva_vm.m.library, &slot));
	SYS(ioctl(hva_vm.m.vm, KVM_GET_DIRTY_LOG, &log)); /* fetches and clears */

	/*
	 * Writes to pages that are present (the first quarter of the list) and absent (the second).
	 */
	vcpu_load_verify(v, RAM_GPA, hva_vm.list_gpa, PAGES / 2, &hva_vm.source.pattern, WRITE_FIRST);
	vcpu_verify(v);
	memset(bitmap, 0, sizeof(bitmap));
	SYS(ioctl(hva_vm.m.vm, KVM_GET_DIRTY_LOG, &log));
	for (unsigned i = 0; i < PAGES / 2; i++)
		CHECK(bitmap[hva_vm.list[i] / 64] >> hva_vm.list[i] % 64 & 1,
		      "page %u was written by the guest and isn't in the dirty log", hva_vm.list[i]);

	/* At CPL 0, the third quarter: where KVM emulates, the library writes, and reports it. */
	vcpu_load_verify(slow, RAM_GPA, hva_vm.list_gpa + PAGES / 2 * sizeof(*hva_vm.list), PAGES / 4,
			 &hva_vm.source.pattern, WRITE_FIRST);
	vcpu_verify(slow);
	memset(bitmap, 0, sizeof(bitmap));
	SYS(ioctl(hva_vm.m.vm, KVM_GET_DIRTY_LOG, &log));
	unsigned logged = 0;
	for (unsigned i = PAGES / 2; i < PAGES * 3 / 4; i++)
		logged += bitmap[hva_vm.list[i] / 64] >> hva_vm.list[i] % 64 & 1;
	EQUAL("pages in the log or told of", logged + hva_vm.written_calls, PAGES / 4);

	/* Off again. */
	slot.kvm_flags = 0;
	OK(kvmfault_memslot_set(hva_vm.m.library, &slot));
	hva_vm_check_pages(v, RAM_GPA, PAGES * 3 / 4, PAGES / 4);
	EQUAL("resolver calls", hva_vm.source.total, PAGES);
	hva_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "deleted-while-waiting", deleted_while_waiting, true },
	{ "toggled", toggled_memfd, true },
	{ "toggled-anon", toggled_anon, true },
	{ "discarded", discarded_memfd, true },
	{ "discarded-anon", discarded_anon, true },
	{ "discarded-few", discarded_few_memfd, true },
	{ "discarded-few-anon", discarded_few_anon, true },
	{ "post-copy", post_copy_memfd, true },
	{ "post-copy-anon", post_copy_anon, true },
	{ "dirty-log", dirty_log, true },
};
TEST_MAIN(cases)
