/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The library beside a post-copy of the VMM's own (postcopy_vmm.h): a whole post-copy, and one that
 * ends at the wrong time.
 */
#define _GNU_SOURCE
#include "postcopy_vmm.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static void *touch_from_the_host(void *arg)
{
	const uint64_t *words = (uint64_t *)postcopy_vmm.ram.hva;
	(void)arg;
	for (uint64_t page = PAGES - 1; page >= PAGES / 2; page -= 16)
		EQUAL("what a host thread reads", words[page * 512 + 7],
		      pattern_word(&postcopy_vmm.source.pattern, page, 7));
	return NULL;
}

/*
 * The whole of a post-copy. Afterwards the memory is as any other: the fast path is off, and vCPUs
 * write all of it.
 */
static void postcopy(enum backing backing)
{
	pthread_t host;
	postcopy_vmm_set_up(backing, false);
	postcopy_vmm.waits_for = &postcopy_vmm.calls; /* a vCPU has asked */
	postcopy_vmm.paused = false;
	CHECK(!pthread_create(&host, NULL, touch_from_the_host, NULL), "pthread_create");
	postcopy_vmm_run_guests(READ_FIRST);
	pthread_join(host, NULL);
	UNTIL(kvmfault_pages_absent(postcopy_vmm.m.library) == 0);
	struct kvmfault_stats stats = machine_stats(&postcopy_vmm.m);
	note("%u resolver calls, %u host faults by the VMM's own userfaultfd", postcopy_vmm.calls,
	     postcopy_vmm.host_faults);
	CHECK(postcopy_vmm.calls > 0, "no vCPU ever asked for a page");
	EQUAL("faults_host", stats.faults_host, 0);
	EQUAL("resolver_calls", stats.resolver_calls, postcopy_vmm.calls);
	EQUAL("pages_copied", stats.pages_copied, 0);
	OK(kvmfault_memslot_set_fast_only(postcopy_vmm.m.library, RAM_SLOT, 0));
	struct uffdio_range range = { (uintptr_t)postcopy_vmm.ram.hva, postcopy_vmm.ram.len };
	SYS(ioctl(postcopy_vmm.uffd, UFFDIO_UNREGISTER, &range));
	unsigned calls = postcopy_vmm.calls;
	/* Dropped mappings, which a released alias takes as any memory does. */
	if (backing != ANON)
		SYS(madvise(postcopy_vmm.ram.hva, postcopy_vmm.ram.len / 2, MADV_DONTNEED));
	postcopy_vmm_run_guests(READ_FIRST);
	EQUAL("resolver calls after the end", postcopy_vmm.calls, calls);
	postcopy_vmm_tear_down();
}

static void postcopy_memfd(void)
{
	postcopy(MEMFD);
}

static void postcopy_anon(void)
{
	postcopy(ANON);
}

/* Tries to end it all the time; in the end all pages are there, and it may. */
static void *end_again_and_again(void *arg)
{
	int ret;
	unsigned refused = 0;
	(void)arg;
	while ((ret = kvmfault_memslot_set_fast_only(postcopy_vmm.m.library, RAM_SLOT, 0)) == -EBUSY)
		refused++;
	OK(ret);
	note("refused %u times", refused);
	return NULL;
}

/* Pages that arrive just then leave no marker behind: after the end vCPUs come to all of them. */
static void end_while_pages_arrive(void)
{
	for (unsigned long round = 0; round < SCALED(20, 5); round++) {
		pthread_t thread;
		postcopy_vmm_set_up(MEMFD, true);
		CHECK(!pthread_create(&thread, NULL, end_again_and_again, NULL), "pthread_create");
		pthread_join(thread, NULL);
		UNTIL(test_mechanism() != KVMFAULT_MECHANISM_POISON_TRAP ||
		      kvmfault_pages_absent(postcopy_vmm.m.library) == 0);
		postcopy_vmm_run_guests(READ_FIRST);
		postcopy_vmm_tear_down();
	}
}

static atomic_bool ended;

static void *end_once(void *arg)
{
	(void)arg;
	OK(kvmfault_memslot_set_fast_only(postcopy_vmm.m.library, RAM_SLOT, 0));
	ended = true;
	return NULL;
}

/*
 * A vCPU is on its way to the resolver while the last pages come: after the end a VMM puts away
 * what its resolver looks at.
 */
static void end_waits_for_resolver(void)
{
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		pthread_t thread;
		postcopy_vmm_set_up(MEMFD, false);
		ended = false;
		postcopy_vmm.held = true;
		postcopy_vmm.list[0] = PAGES - 1; /* missing */
		struct vcpu *v = machine_add_vcpu(&postcopy_vmm.m, cpl);
		vcpu_load_verify(v, RAM_GPA, postcopy_vmm.list_gpa, 1, &postcopy_vmm.source.pattern, READ_FIRST);
		vcpu_start_verify(v);
		UNTIL(postcopy_vmm.calls == 1);
		for (uint64_t page = 0; page < PAGES; page++)
			if (!postcopy_vmm.received[page])
				postcopy_vmm_place(page);
		UNTIL(kvmfault_pages_absent(postcopy_vmm.m.library) == 0);
		CHECK(!pthread_create(&thread, NULL, end_once, NULL), "pthread_create");
		usleep(100000);
		CHECK(!ended, "the end has come, and a resolver call is under way");
		postcopy_vmm.held = false;
		pthread_join(thread, NULL);
		vcpu_join(v);
		EQUAL("resolver calls", postcopy_vmm.calls, 1);
		postcopy_vmm_tear_down();
	}
}

/* The end comes too early: refused while a page is missing, and the guests never see zeros. */
static void too_early(void)
{
	bool trap = test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP;
	postcopy_vmm_set_up(MEMFD, false);
	if (trap)
		REFUSED(kvmfault_memslot_set_fast_only(postcopy_vmm.m.library, RAM_SLOT, 0), EBUSY, "missing");
	else /* the flag goes, and KVM sleeps in the VMM's userfaultfd */
		OK(kvmfault_memslot_set_fast_only(postcopy_vmm.m.library, RAM_SLOT, 0));
	/* or all might be there before a guest has begun */
	postcopy_vmm.waits_for = trap ? &postcopy_vmm.calls : &postcopy_vmm.host_faults;
	postcopy_vmm.paused = false;
	postcopy_vmm_run_guests(READ_FIRST);
	UNTIL(kvmfault_pages_absent(postcopy_vmm.m.library) == 0);
	CHECK(trap ? postcopy_vmm.calls > 0 : postcopy_vmm.host_faults > 0, "%u resolver calls, %u faults of the VMM's",
	      postcopy_vmm.calls, postcopy_vmm.host_faults);
	OK(kvmfault_memslot_set_fast_only(postcopy_vmm.m.library, RAM_SLOT, 0));
	if (trap) {
		REFUSED(kvmfault_pages_missing(postcopy_vmm.m.library, postcopy_vmm.ram.hva, PAGE), EBUSY, "off");
		EQUAL("state", kvmfault_pages_state(postcopy_vmm.m.library, RAM_GPA), KVMFAULT_PAGE_PRESENT);
	}
	postcopy_vmm_tear_down();
}

/*
 * A page is reported missing after it came (the VMM looked too early): the resolver is called,
 * finds the page, and nothing is lost.
 */
static void stale_missing(void)
{
	postcopy_vmm_set_up(MEMFD, false);
	for (uint64_t page = 0; page < PAGES; page++)
		if (!postcopy_vmm.received[page])
			postcopy_vmm_place(page);
	EQUAL("pages missing", kvmfault_pages_absent(postcopy_vmm.m.library), 0);
	OK(kvmfault_pages_missing(postcopy_vmm.m.library, postcopy_vmm.ram.hva, postcopy_vmm.ram.len));
	EQUAL("pages called missing", kvmfault_pages_absent(postcopy_vmm.m.library), PAGES);
	postcopy_vmm_run_guests(READ_FIRST);
	/*
	 * With the memslot flag KVM may find the pages in the VMM's page tables, and then doesn't
	 * ask.
	 */
	if (test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP)
		EQUAL("resolver calls", postcopy_vmm.calls, PAGES);
	EQUAL("of those for pages that were there", postcopy_vmm.there_already, postcopy_vmm.calls);
	EQUAL("pages missing", kvmfault_pages_absent(postcopy_vmm.m.library), PAGES - postcopy_vmm.calls);
	postcopy_vmm_tear_down();
}

/*
 * Slots come and go while pages are missing, and a second one shows the same memory; states stay
 * with the memory.
 */
static void slots_change(void)
{
	struct kvmfault_memslot slot;
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	postcopy_vmm_set_up(MEMFD, false);
	uint64_t missing = kvmfault_pages_absent(postcopy_vmm.m.library);
	for (int round = 0; round < 3; round++) {
		slot = postcopy_vmm_slot(RAM_SLOT, RAM_GPA);
		slot.len = 0;
		slot.flags = KVMFAULT_MEMSLOT_KEEP;
		struct kvm_userspace_memory_region none = { .slot = RAM_SLOT };
		SYS(ioctl(postcopy_vmm.m.vm, KVM_SET_USER_MEMORY_REGION, &none));
		OK(kvmfault_memslot_prepare(postcopy_vmm.m.library, &slot, &region));
		postcopy_vmm_place(PAGES / 2 + round); /* while no slot shows it */
		slot = postcopy_vmm_slot(RAM_SLOT, RAM_GPA);
		OK(kvmfault_memslot_prepare(postcopy_vmm.m.library, &slot, &region));
		machine_set_region(&postcopy_vmm.m, &region);
		EQUAL("pages missing", kvmfault_pages_absent(postcopy_vmm.m.library), missing - round - 1);
	}
	slot = postcopy_vmm_slot(RAM_SLOT + 1, RAM_GPA + postcopy_vmm.ram.len);
	OK(kvmfault_memslot_prepare(postcopy_vmm.m.library, &slot, &region));
	machine_set_region(&postcopy_vmm.m, &region);
	EQUAL("pages missing with two slots", kvmfault_pages_absent(postcopy_vmm.m.library), missing - 3);
	postcopy_vmm.paused = false;
	postcopy_vmm_run_guests(READ_FIRST);
	UNTIL(kvmfault_pages_absent(postcopy_vmm.m.library) == 0);
	OK(kvmfault_memslot_set_fast_only(postcopy_vmm.m.library, RAM_SLOT, 0));
	OK(kvmfault_memslot_set_fast_only(postcopy_vmm.m.library, RAM_SLOT + 1, 0));
	postcopy_vmm_tear_down();
}

/* The VMM's address of what KVM may know by another. */
static void addresses(void)
{
	struct kvmfault_memslot slot;
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	postcopy_vmm_set_up(MEMFD, false);
	slot = postcopy_vmm_slot(RAM_SLOT, RAM_GPA);
	OK(kvmfault_memslot_prepare(postcopy_vmm.m.library, &slot, &region));
	for (uint64_t offset = 0; offset < postcopy_vmm.ram.len; offset += 12345) {
		void *expected = postcopy_vmm.ram.hva + offset;
		CHECK(kvmfault_vm_address(postcopy_vmm.m.library, (void *)(region.userspace_addr + offset)) == expected,
		      "offset %#lx", offset);
		CHECK(kvmfault_vm_address(postcopy_vmm.m.library, expected) == expected, "offset %#lx", offset);
	}
	CHECK(!kvmfault_vm_address(postcopy_vmm.m.library, postcopy_vmm.ram.hva + postcopy_vmm.ram.len),
	      "an address behind the memory");
	CHECK(!kvmfault_vm_address(postcopy_vmm.m.library, NULL), "NULL");
	CHECK(!kvmfault_vm_address(NULL, postcopy_vmm.ram.hva), "no VM");
	postcopy_vmm_tear_down();
}

/* Missing huge pages are dropped all the same, as post-copy does with pages that never came. */
struct punched {
	struct source source;
	struct ram ram;
	int uffd;
};

static int install_huge_page(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct punched *p = opaque;
	void *bytes = aligned_alloc(PAGE, HUGE_PAGE);
	CHECK(bytes, "no memory");
	uint64_t first = (fault->gpa - RAM_GPA) / PAGE;
	for (uint64_t page = 0; page < HUGE_PAGE / PAGE; page++)
		pattern_fill(&p->source.pattern, first + page, (uint8_t *)bytes + page * PAGE);
	struct uffdio_copy copy = { .dst = (uintptr_t)fault->hva, .src = (uintptr_t)bytes, .len = HUGE_PAGE };
	SYS(ioctl(p->uffd, UFFDIO_COPY, &copy));
	free(bytes);
	p->source.total++;
	OK(kvmfault_pages_arrived(vm, fault->hva, fault->len));
	return KVMFAULT_RESOLVED;
}

static void punched_hugetlb(void)
{
	enum { COUNT = 4 };
	struct punched p = { .uffd = postcopy_vmm_open_uffd() };
	struct machine m;
	struct kvmfault_vm_options options = postcopy_vmm_options();
	uint64_t list_gpa, pages = COUNT * HUGE_PAGE / PAGE;
	if (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD)
		skip("the VMM's own userfaultfd is that mechanism (see bad_external)");
	ram_create(&p.ram, HUGETLB, COUNT * HUGE_PAGE);
	source_create(&p.source, RAM_GPA, p.ram.len, PATTERN);
	machine_create(&m, pages * sizeof(uint32_t));
	list_sequential(machine_share(&m, pages * sizeof(uint32_t), &list_gpa), pages);
	options.resolver = install_huge_page;
	options.opaque = &p;
	machine_attach(&m, NULL, &options);
	struct uffdio_register reg = { .range = { (uintptr_t)p.ram.hva, p.ram.len },
				       .mode = UFFDIO_REGISTER_MODE_MISSING };
	SYS(ioctl(p.uffd, UFFDIO_REGISTER, &reg));
	machine_set_slot(&m, &p.ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = machine_add_vcpu(&m, 3);
	vcpu_attach(v);
	for (int round = 1; round <= 2; round++) {
		SYS(madvise(p.ram.hva, p.ram.len, MADV_REMOVE));
		OK(kvmfault_pages_missing(m.library, p.ram.hva, p.ram.len));
		vcpu_load_verify(v, RAM_GPA, list_gpa, pages, &p.source.pattern, READ_FIRST);
		vcpu_verify(v);
		EQUAL("resolver calls", p.source.total, round * COUNT);
	}
	vcpu_detach(v);
	machine_destroy(&m);
	ram_destroy(&p.ram);
	source_destroy(&p.source);
	close(p.uffd);
}

static const struct test_case cases[] = {
	{ "postcopy-memfd", postcopy_memfd, true },
	{ "postcopy-anon", postcopy_anon, true },
	{ "too-early", too_early, true },
	{ "end-while-pages-arrive", end_while_pages_arrive, true },
	{ "end-waits-for-resolver", end_waits_for_resolver, true },
	{ "stale-missing", stale_missing, true },
	{ "slots-change", slots_change, true },
	{ "addresses", addresses, true },
	{ "punched-hugetlb", punched_hugetlb, true },
};
TEST_MAIN(cases)
