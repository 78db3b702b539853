/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memslots as VMMs really use them: two on one piece of memory, windows of a larger block, deleted and made anew, moved, switched
 * and discarded while vCPUs run.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define OTHER_GPA 0x90000000ul
enum { OTHER_SLOT = 2, PAGES = 64, FEW = 4, VCPUS = 4 };
#define MANY SCALED(4096, 1024)

static struct machine m;
static struct ram ram;
static struct source source;
static uint64_t list_gpa, steps_gpa;
static uint32_t *list;
static struct step *steps;
static unsigned written_calls;

/* The page is told by its host address: it may be shown at several guest addresses. */
static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	uint8_t bytes[PAGE];
	uint64_t page = ((uint8_t *)fault->hva - ram.hva) / PAGE;
	(void)opaque;
	CHECK(page < source.pages, "the resolver is asked for hva %p", fault->hva);
	source.calls[page]++;
	source.total++;
	pattern_fill(&source.pattern, page, bytes);
	OK(kvmfault_pages_install(vm, fault->gpa, bytes, PAGE));
	return KVMFAULT_RESOLVED;
}

static void written(void *opaque, uint64_t gpa, uint64_t len)
{
	(void)opaque, (void)gpa, (void)len;
	written_calls++;
}

static void set_up(enum backing backing, uint64_t pages)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolve;
	options.written = written;
	ram_create(&ram, backing, pages * PAGE);
	machine_create(&m, pages * sizeof(uint32_t) + PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	machine_attach(&m, NULL, &options);
	list = machine_share(&m, pages * sizeof(*list), &list_gpa);
	list_shuffle(list, pages, 5);
	steps = machine_share(&m, PAGE, &steps_gpa);
}

static void tear_down(void)
{
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
}

static void delete_slot(uint32_t number, uint32_t flags)
{
	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	slot.slot = number;
	slot.flags = flags;
	OK(kvmfault_memslot_set(m.library, &slot));
}

/* A vCPU of our own thread checks `count` pages of the list, seen from `gpa`. */
static void look(struct vcpu *v, uint64_t gpa, uint64_t first, uint64_t count)
{
	vcpu_load_verify(v, gpa, list_gpa + first * sizeof(*list), count, &source.pattern, READ_FIRST);
	vcpu_verify(v);
}

static struct vcpu *add_vcpu(int cpl)
{
	struct vcpu *v = machine_add_vcpu(&m, cpl);
	vcpu_attach(v);
	return v;
}

/* ---- shapes ---- */

static void one_range_twice(void)
{
	set_up(MEMFD, PAGES);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	machine_set_slot(&m, &ram, OTHER_SLOT, OTHER_GPA);
	UNTIL(kvmfault_pages_absent(m.library) == PAGES); /* the guest may be ahead of the books */
	struct vcpu *v = add_vcpu(3);
	look(v, RAM_GPA, 0, PAGES / 2);
	look(v, OTHER_GPA, PAGES / 2, PAGES / 2);
	UNTIL(kvmfault_pages_absent(m.library) == 0); /* the guest may be ahead of the books */
	look(v, RAM_GPA, 0, PAGES);
	look(v, OTHER_GPA, 0, PAGES);
	look(add_vcpu(0), OTHER_GPA, 0, PAGES);
	EQUAL("resolver calls", source.total, PAGES);

	/* A discard through one slot is one for both; what the guest writes through one it sees through the other. */
	OK(kvmfault_pages_discard(m.library, OTHER_GPA, 4 * PAGE));
	EQUAL("state through the other", kvmfault_pages_state(m.library, RAM_GPA + PAGE), KVMFAULT_PAGE_ABSENT);
	steps[0] = (struct step){ WRITE64, RAM_GPA + PAGE, 99, 0 };
	steps[1] = (struct step){ READ64, OTHER_GPA + PAGE, 0, 0 };
	steps[2] = (struct step){ READ64, OTHER_GPA + PAGE + 8, 0, 0 };
	steps[3] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, steps_gpa);
	EQUAL("stop", vcpu_run(v), 0);
	EQUAL("written here, read there", steps[1].value, 99);
	EQUAL("beside it", steps[2].value, pattern_word(&source.pattern, 1, 1));

	/* Without one of them the other goes on. */
	delete_slot(RAM_SLOT, 0);
	OK(kvmfault_pages_discard(m.library, OTHER_GPA, ram.len));
	look(v, OTHER_GPA, 0, PAGES);
	EQUAL("state in the deleted slot", kvmfault_pages_state(m.library, RAM_GPA), -ENOENT);
	tear_down();
}

/* The same memory in both of KVM's address spaces, as for system management mode. */
static void address_spaces(void)
{
	set_up(MEMFD, PAGES);
	if (ioctl(m.vm, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE) < 2)
		skip("KVM_CAP_MULTI_ADDRESS_SPACE is below 2 here");
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	machine_set_slot(&m, &ram, 1u << 16 | RAM_SLOT, RAM_GPA); /* the same address: no overlap */
	UNTIL(kvmfault_pages_absent(m.library) == PAGES); /* the guest may be ahead of the books */
	struct vcpu *v = add_vcpu(3);
	look(v, RAM_GPA, 0, PAGES / 2);
	delete_slot(RAM_SLOT, 0);
	/* The guest may be ahead of the books. */
	UNTIL(kvmfault_pages_state(m.library, RAM_GPA + list[0] * PAGE) == KVMFAULT_PAGE_PRESENT);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	look(v, RAM_GPA, 0, PAGES);
	EQUAL("resolver calls", source.total, PAGES);
	tear_down();
}

/* Two windows of one block, with their order turned round, and pages between that nobody shows. */
static void windows(void)
{
	set_up(MEMFD, PAGES);
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	slot.block_hva = ram.hva;
	slot.block_len = ram.len;
	slot.len = 16 * PAGE;
	slot.hva = ram.hva + 40 * PAGE;
	OK(kvmfault_memslot_set(m.library, &slot));
	slot.slot = OTHER_SLOT;
	slot.gpa = OTHER_GPA;
	slot.hva = ram.hva + 8 * PAGE;
	OK(kvmfault_memslot_set(m.library, &slot));
	struct vcpu *v = add_vcpu(3);
	list_sequential(list, PAGES);
	/* verify.S counts pages from the block's start, wherever that would be. */
	look(v, RAM_GPA - 40 * PAGE, 40, 16);
	look(v, OTHER_GPA - 8 * PAGE, 8, 16);
	EQUAL("resolver calls", source.total, 32);
	UNTIL(kvmfault_pages_absent(m.library) == PAGES - 32); /* the guest may be ahead of the books */
	EQUAL("beyond a window", kvmfault_pages_state(m.library, RAM_GPA + 16 * PAGE), -ENOENT);
	REFUSED(kvmfault_pages_discard(m.library, RAM_GPA + 8 * PAGE, 16 * PAGE), EINVAL, "len");
	tear_down();
}

/* Deleted to be made anew in another shape (QEMU does that): with KEEP the states stay. */
static void kept(void)
{
	set_up(MEMFD, PAGES);
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	slot.block_hva = ram.hva;
	slot.block_len = ram.len;
	OK(kvmfault_memslot_set(m.library, &slot));
	struct vcpu *v = add_vcpu(3);
	look(v, RAM_GPA, 0, PAGES / 2);
	delete_slot(RAM_SLOT, KVMFAULT_MEMSLOT_KEEP);
	EQUAL("state without a slot", kvmfault_pages_state(m.library, RAM_GPA), -ENOENT);
	/* The two halves separately. */
	slot.len = ram.len / 2;
	OK(kvmfault_memslot_set(m.library, &slot));
	slot.slot = OTHER_SLOT;
	slot.gpa += slot.len;
	slot.hva = ram.hva + slot.len;
	OK(kvmfault_memslot_set(m.library, &slot));
	UNTIL(kvmfault_pages_absent(m.library) == PAGES / 2); /* the guest may be ahead of the books */
	look(v, RAM_GPA, 0, PAGES);
	EQUAL("resolver calls", source.total, PAGES);
	for (int page = 0; page < PAGES; page++)
		EQUAL("calls for a page", source.calls[page], 1);
	tear_down();
}

/* Without KEEP it becomes ordinary memory: what came stays, what did not reads as zeros, and nobody is asked. */
static void forgotten(enum backing backing)
{
	static const uint8_t zeros[PAGE];
	set_up(backing, PAGES);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = add_vcpu(3);
	look(v, RAM_GPA, 0, PAGES / 2);
	delete_slot(RAM_SLOT, 0);
	for (unsigned i = 0; i < PAGES; i++) {
		if (i < PAGES / 2)
			pattern_check(&source.pattern, ram.hva + list[i] * PAGE, list[i], 1);
		else
			CHECK(!memcmp(ram.hva + list[i] * PAGE, zeros, PAGE), "page %u isn't zero", list[i]);
	}
	EQUAL("resolver calls", source.total, PAGES / 2);
	UNTIL(kvmfault_pages_absent(m.library) == 0); /* the guest may be ahead of the books */
	tear_down();
}

static void forgotten_memfd(void)
{
	forgotten(MEMFD);
}

static void forgotten_anon(void)
{
	forgotten(ANON);
}

/* The same slot at another guest address. */
static void moved(void)
{
	set_up(MEMFD, PAGES);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = add_vcpu(3);
	look(v, RAM_GPA, 0, PAGES / 2);
	machine_set_slot(&m, &ram, RAM_SLOT, OTHER_GPA);
	look(v, OTHER_GPA, 0, PAGES);
	EQUAL("resolver calls", source.total, PAGES);
	EQUAL("state at the old address", kvmfault_pages_state(m.library, RAM_GPA), -ENOENT);
	steps[0] = (struct step){ READ64, RAM_GPA, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, steps_gpa);
	int ret = kvmfault_vcpu_run(v->handle);
	CHECK(ret == KVMFAULT_PASS && v->run->exit_reason == KVM_EXIT_MMIO && v->run->mmio.phys_addr == RAM_GPA, "%s",
	      vcpu_describe(v, ret));
	tear_down();
}

/* ---- while vCPUs run ---- */

static atomic_int finished;

static int pending(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm, (void)fault;
	source.total++;
	return KVMFAULT_PENDING;
}

/* Its slot goes while it waits: there is no memory any more, so what it wanted is for the VMM. */
static void *expect_no_memory(struct vcpu *v)
{
	vcpu_attach(v);
	int ret = kvmfault_vcpu_run(v->handle);
	CHECK(ret == KVMFAULT_PASS && v->run->exit_reason == KVM_EXIT_MMIO && v->run->mmio.phys_addr == RAM_GPA + 3 * PAGE, "%s",
	      vcpu_describe(v, ret));
	finished++;
	return NULL;
}

static void deleted_while_waiting(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	require_interruptible_sleep();
	options.resolver = pending;
	ram_create(&ram, MEMFD, PAGES * PAGE);
	machine_create(&m, PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	machine_attach(&m, NULL, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	steps = machine_share(&m, PAGE, &steps_gpa);
	steps[0] = (struct step){ READ64, RAM_GPA + 3 * PAGE, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 0, 0 };
	struct vcpu *v = machine_add_vcpu(&m, 3);
	vcpu_load_script(v, steps_gpa);
	vcpu_start(v, expect_no_memory, NULL);
	UNTIL(source.total == 1);
	usleep(20000);
	delete_slot(RAM_SLOT, 0);
	UNTIL(finished == 1);
	vcpu_join(v);
	tear_down();
}

static atomic_bool stop;
static uint64_t checked_pages; /* 0: MANY */

/* Checks all pages again and again until told to stop, but once at least. */
static void *verify_on(struct vcpu *v)
{
	vcpu_attach(v);
	do {
		vcpu_load_verify(v, RAM_GPA, list_gpa, checked_pages ?: MANY, &source.pattern, READ_FIRST);
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
		vcpu_start(machine_add_vcpu(&m, i == VCPUS - 1 ? 0 : 3), verify_on, NULL);
}

static void join_vcpus(void)
{
	stop = true;
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(m.vcpu[i]);
}

/* The fast path goes off and on while the guest runs: each page still comes once. */
static void toggled(enum backing backing)
{
	unsigned toggles = 0;
	set_up(backing, MANY);
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	slot.flags |= KVMFAULT_MEMSLOT_SLOW;
	OK(kvmfault_memslot_set(m.library, &slot));
	start_vcpus();
	while (finished < VCPUS) {
		stop = toggles > 2;
		OK(kvmfault_memslot_set_fast_only(m.library, RAM_SLOT, toggles++ % 2 == 0));
		usleep(3000);
	}
	join_vcpus();
	struct kvmfault_stats stats = machine_settled_stats(&m);
	EQUAL("resolver calls", stats.resolver_calls, MANY);
	for (uint64_t page = 0; page < MANY; page++)
		EQUAL("calls for a page", source.calls[page], 1);
	UNTIL(kvmfault_pages_absent(m.library) == 0); /* the guest may be ahead of the books */
	pattern_check(&source.pattern, ram.hva, 0, MANY);
	note("%u toggles, %lu faults", toggles, stats.faults_vcpu);
	CHECK(toggles > 2, "only %u toggles", toggles);
	tear_down();
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
	struct kvmfault_stats stats = machine_settled_stats(&m);
	note("%lu discards of %lu pages (%lu times busy), %lu resolver calls, %lu found the page there", discards, stats.pages_discarded, busy,
	     stats.resolver_calls, stats.outcome_mapped);
	CHECK(stats.pages_discarded > 0 && stats.resolver_calls > pages, "the vCPUs met no discard");
	/* What was brought is there, or was taken away. A reader may have in hand what a vCPU wanted before the last discards: so all is brought. */
	OK(kvmfault_pages_resolve(m.library, RAM_GPA, pages * PAGE));
	stats = machine_settled_stats(&m);
	EQUAL("pages brought", stats.pages_copied - stats.pages_discarded, pages);
	EQUAL("outcome_failed", stats.outcome_failed, 0);
	tear_down();
}

/* Pages go while vCPUs look at them: they see the right bytes and nothing else. */
static void discarded(enum backing backing)
{
	uint64_t seed = 17;
	unsigned long discards = 0, busy = 0;
	set_up(backing, MANY);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	start_vcpus();
	UNTIL(source.total > MANY / 2);
	unsigned long most = scaled(3000);
	for (double end = now() + 10; (discards < most || source.total < MANY + 100) && now() < end; discards++) {
		uint64_t first = random_number(&seed) % MANY, count = 1 + random_number(&seed) % 64;
		if (first + count > MANY)
			count = MANY - first;
		int ret = kvmfault_pages_discard(m.library, RAM_GPA + first * PAGE, count * PAGE);
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
 * The same few pages are wanted by all vCPUs and taken away at once: whoever has just seen one PRESENT finds it gone when it comes to map it.
 * Zeros in its place would be taken for the page.
 */
static void discarded_few(enum backing backing)
{
	uint64_t seed = 18;
	unsigned long discards = 0, busy = 0;
	set_up(backing, FEW);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	checked_pages = FEW;
	start_vcpus();
	UNTIL(source.total >= FEW);
	double end = now() + SCALED(3, 1), latest = end + 30;
	for (; now() < end || (source.total <= FEW + 10 && now() < latest); discards++) {
		int ret = kvmfault_pages_discard(m.library, RAM_GPA + random_number(&seed) % FEW * PAGE, PAGE);
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

/* Pre-copy has brought all pages; some of them have changed since, and are fetched when they are touched. */
static void post_copy(enum backing backing)
{
	struct pattern old = { .factor = 0x1234567812345677, .zero_mask = 0 };
	set_up(backing, MANY);
	for (uint64_t page = 0; page < MANY; page++)
		pattern_fill(&old, page, ram.hva + page * PAGE);
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	slot.flags |= KVMFAULT_MEMSLOT_PRESENT;
	OK(kvmfault_memslot_set(m.library, &slot));
	UNTIL(kvmfault_pages_absent(m.library) == 0); /* the guest may be ahead of the books */
	struct vcpu *v = add_vcpu(3);
	struct vcpu *slow = add_vcpu(0);
	vcpu_load_verify(v, RAM_GPA, list_gpa, MANY, &old, READ_FIRST);
	vcpu_verify(v);
	EQUAL("resolver calls for what is present", source.total, 0);

	/* The second half of the (shuffled) list has changed. */
	for (unsigned i = MANY / 2; i < MANY; i++)
		OK(kvmfault_pages_discard(m.library, RAM_GPA + list[i] * PAGE, PAGE));
	UNTIL((uint64_t)kvmfault_pages_absent(m.library) == MANY / 2); /* the guest may be ahead of the books */
	vcpu_load_verify(v, RAM_GPA, list_gpa, MANY / 2, &old, READ_FIRST);
	vcpu_verify(v);
	EQUAL("resolver calls for what is still present", source.total, 0);
	look(v, RAM_GPA, MANY / 2, MANY / 4);
	look(slow, RAM_GPA, MANY / 2, MANY / 2);
	EQUAL("resolver calls", source.total, MANY / 2);
	UNTIL(kvmfault_pages_absent(m.library) == 0); /* the guest may be ahead of the books */
	for (unsigned i = 0; i < MANY; i++)
		pattern_check(i < MANY / 2 ? &old : &source.pattern, ram.hva + list[i] * PAGE, list[i], 1);
	tear_down();
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

/* The guest's writes are in KVM's log, or `written` was told; and the flag can be switched on a slot that is in use. */
static void dirty_log(void)
{
	uint64_t bitmap[PAGES / 64 + 1] = { 0 };
	struct kvm_dirty_log log = { .slot = RAM_SLOT, .dirty_bitmap = bitmap };
	set_up(MEMFD, PAGES);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = add_vcpu(3), *slow = add_vcpu(0);
	look(v, RAM_GPA, 0, PAGES / 4);
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	slot.kvm_flags = KVM_MEM_LOG_DIRTY_PAGES;
	OK(kvmfault_memslot_set(m.library, &slot));
	SYS(ioctl(m.vm, KVM_GET_DIRTY_LOG, &log)); /* fetches and clears */

	/* Writes to pages that are present (the first quarter of the list) and absent (the second). */
	vcpu_load_verify(v, RAM_GPA, list_gpa, PAGES / 2, &source.pattern, WRITE_FIRST);
	vcpu_verify(v);
	memset(bitmap, 0, sizeof(bitmap));
	SYS(ioctl(m.vm, KVM_GET_DIRTY_LOG, &log));
	for (unsigned i = 0; i < PAGES / 2; i++)
		CHECK(bitmap[list[i] / 64] >> list[i] % 64 & 1, "page %u was written by the guest and isn't in the dirty log", list[i]);

	/* At CPL 0, the third quarter: where KVM emulates, the library writes, and says so. */
	vcpu_load_verify(slow, RAM_GPA, list_gpa + PAGES / 2 * sizeof(*list), PAGES / 4, &source.pattern, WRITE_FIRST);
	vcpu_verify(slow);
	memset(bitmap, 0, sizeof(bitmap));
	SYS(ioctl(m.vm, KVM_GET_DIRTY_LOG, &log));
	unsigned logged = 0;
	for (unsigned i = PAGES / 2; i < PAGES * 3 / 4; i++)
		logged += bitmap[list[i] / 64] >> list[i] % 64 & 1;
	EQUAL("pages in the log or told of", logged + written_calls, PAGES / 4);

	/* Off again. */
	slot.kvm_flags = 0;
	OK(kvmfault_memslot_set(m.library, &slot));
	look(v, RAM_GPA, PAGES * 3 / 4, PAGES / 4);
	EQUAL("resolver calls", source.total, PAGES);
	tear_down();
}

static const struct test_case cases[] = {
	{ "one-range-twice", one_range_twice, true },
	{ "address-spaces", address_spaces, true },
	{ "windows", windows, true },
	{ "kept", kept, true },
	{ "forgotten", forgotten_memfd, true },
	{ "forgotten-anon", forgotten_anon, true },
	{ "moved", moved, true },
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
