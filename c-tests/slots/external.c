/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The library beside a post-copy of the VMM's own (postcopy_vmm.h): the whole of one, its end at the wrong time, and what doesn't go together.
 */
#define _GNU_SOURCE
#include "postcopy_vmm.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static void *touch_from_the_host(void *arg)
{
	const uint64_t *words = (uint64_t *)postcopy_vmm.ram.hva;
	(void)arg;
	for (uint64_t page = PAGES - 1; page >= PAGES / 2; page -= 16)
		EQUAL("what a host thread reads", words[page * 512 + 7], pattern_word(&postcopy_vmm.source.pattern, page, 7));
	return NULL;
}

/* The whole of a post-copy. Afterwards the memory is as any other: the fast path is off, and vCPUs write all of it. */
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
	note("%u resolver calls, %u host faults by the VMM's own userfaultfd", postcopy_vmm.calls, postcopy_vmm.host_faults);
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
		UNTIL(test_mechanism() != KVMFAULT_MECHANISM_POISON_TRAP || kvmfault_pages_absent(postcopy_vmm.m.library) == 0);
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

/* A vCPU is on its way to the resolver while the last pages come: after the end a VMM puts away what its resolver looks at. */
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
	postcopy_vmm.waits_for = trap ? &postcopy_vmm.calls : &postcopy_vmm.host_faults; /* or all might be there before a guest has begun */
	postcopy_vmm.paused = false;
	postcopy_vmm_run_guests(READ_FIRST);
	UNTIL(kvmfault_pages_absent(postcopy_vmm.m.library) == 0);
	CHECK(trap ? postcopy_vmm.calls > 0 : postcopy_vmm.host_faults > 0, "%u resolver calls, %u faults of the VMM's", postcopy_vmm.calls, postcopy_vmm.host_faults);
	OK(kvmfault_memslot_set_fast_only(postcopy_vmm.m.library, RAM_SLOT, 0));
	if (trap) {
		REFUSED(kvmfault_pages_missing(postcopy_vmm.m.library, postcopy_vmm.ram.hva, PAGE), EBUSY, "off");
		EQUAL("state", kvmfault_pages_state(postcopy_vmm.m.library, RAM_GPA), KVMFAULT_PAGE_PRESENT);
	}
	postcopy_vmm_tear_down();
}

/* A page is called missing after it came (its VMM looked at its books too early): the resolver is asked, knows better, and nothing is lost. */
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
	/* With the memslot flag KVM may find the pages in the VMM's page tables, and then doesn't ask. */
	if (test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP)
		EQUAL("resolver calls", postcopy_vmm.calls, PAGES);
	EQUAL("of those for pages that were there", postcopy_vmm.there_already, postcopy_vmm.calls);
	EQUAL("pages missing", kvmfault_pages_absent(postcopy_vmm.m.library), PAGES - postcopy_vmm.calls);
	postcopy_vmm_tear_down();
}

/* Slots come and go while pages are missing, and a second one shows the same memory; states stay with the memory. */
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
		CHECK(kvmfault_vm_address(postcopy_vmm.m.library, (void *)(region.userspace_addr + offset)) == expected, "offset %#lx", offset);
		CHECK(kvmfault_vm_address(postcopy_vmm.m.library, expected) == expected, "offset %#lx", offset);
	}
	CHECK(!kvmfault_vm_address(postcopy_vmm.m.library, postcopy_vmm.ram.hva + postcopy_vmm.ram.len), "an address behind the memory");
	CHECK(!kvmfault_vm_address(postcopy_vmm.m.library, NULL), "NULL");
	CHECK(!kvmfault_vm_address(NULL, postcopy_vmm.ram.hva), "no VM");
	postcopy_vmm_tear_down();
}

/* ---- a kick by the handler of the kick signal, as QEMU's ---- */

static _Thread_local struct vcpu *current;
static atomic_uint signals;

static void on_kick(int signal)
{
	(void)signal;
	signals++;
	if (current && kvmfault_vcpu_kick(current->handle))
		_exit(98);
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	if (!current || kvmfault_vcpu_on_sigbus(current->handle, info->si_code, info->si_addr) != 1)
		_exit(99);
}

static atomic_uint interrupted, done;

static void *own_loop(struct vcpu *v)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	uint32_t value;
	int ret;
	current = v;
	options.fd = v->fd;
	options.run = v->run;
	options.flags = KVMFAULT_VCPU_RESUMES;
	options.sigbus = KVMFAULT_SIGBUS_BY_HANDLER;
	options.kick_signal = SIGUSR1;
	OK(kvmfault_vcpu_new(v->machine->library, &options, &v->handle));
	for (;;) {
		ret = kvmfault_vcpu_resume(v->handle);
		if (ret == KVMFAULT_HANDLED)
			ret = kvmfault_vcpu_handle_exit(v->handle, ioctl(v->fd, KVM_RUN, 0));
		if (ret == KVMFAULT_INTERRUPTED)
			interrupted++;
		else if (ret != KVMFAULT_HANDLED)
			break;
	}
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	EQUAL("the guest's verdict", value, 0);
	done++;
	return NULL;
}

/* The signal alone ends each wait, in time and once; it doesn't bring forth another. */
static void kick_in_handler(void)
{
	struct sigaction kick = { .sa_handler = on_kick };
	struct sigaction bus = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	double slowest = 0;
	enum { KICKS = 200 };
	SYS(sigaction(SIGUSR1, &kick, NULL));
	SYS(sigaction(SIGBUS, &bus, NULL));
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		postcopy_vmm_set_up(MEMFD, false);
		signals = interrupted = done = 0;
		postcopy_vmm.list[0] = PAGES - 1; /* missing */
		struct vcpu *v = machine_add_vcpu(&postcopy_vmm.m, cpl);
		vcpu_load_verify(v, RAM_GPA, postcopy_vmm.list_gpa, 1, &postcopy_vmm.source.pattern, READ_FIRST);
		vcpu_start(v, own_loop, NULL);
		UNTIL(postcopy_vmm.calls == 1);
		for (unsigned i = 0; i < KICKS; i++) {
			double began = now();
			CHECK(!pthread_kill(v->thread, SIGUSR1), "pthread_kill");
			UNTIL(interrupted > i);
			slowest = now() - began > slowest ? now() - began : slowest;
		}
		usleep(50000);
		EQUAL("signals", signals, KICKS);
		EQUAL("INTERRUPTED", interrupted, KICKS);
		postcopy_vmm.paused = false;
		UNTIL(done);
		vcpu_join(v);
		postcopy_vmm_tear_down();
	}
	note("slowest of %d: %.1f ms", 2 * KICKS, slowest * 1e3);
}

/* ---- pages that KVM itself needs ---- */

static atomic_int last;

/* The vCPU's thread before its first KVM_RUN, as a VMM's is with the clock page of its guest. */
static void *resolve_main(struct vcpu *v)
{
	int ret;
	vcpu_attach(v);
	const uint64_t border = RAM_GPA + (PAGES - 1) * PAGE;
	REFUSED(kvmfault_vcpu_resolve(v->handle, border, 0), EINVAL, "len");
	REFUSED(kvmfault_vcpu_resolve(v->handle, border, -border), EINVAL, "len");
	REFUSED(kvmfault_vcpu_resolve(v->handle, RAM_GPA - 1, 1), ENOENT, "gpa");
	EQUAL("present pages", kvmfault_vcpu_resolve(v->handle, RAM_GPA + PAGE + 5, 2 * PAGE), KVMFAULT_HANDLED);
	EQUAL("resolver calls for present pages", postcopy_vmm.calls, 0);
	while ((ret = kvmfault_vcpu_resolve(v->handle, border - 8, 16)) == KVMFAULT_INTERRUPTED)
		interrupted++;
	last = ret;
	done++;
	vcpu_detach(v);
	return NULL;
}

static void resolve_by_vcpu(void)
{
	postcopy_vmm_set_up(MEMFD, false);
	done = interrupted = 0;
	struct vcpu *v = machine_add_vcpu(&postcopy_vmm.m, 3);
	vcpu_start(v, resolve_main, NULL);
	UNTIL(postcopy_vmm.calls == 1);
	for (unsigned i = 0; i < 10; i++) {
		OK(kvmfault_vcpu_kick(v->handle));
		UNTIL(interrupted == i + 1);
	}
	postcopy_vmm_place(PAGES - 2);
	UNTIL(postcopy_vmm.calls == 2); /* the other page that the range touches */
	EQUAL("done with one page of two", done, 0);
	postcopy_vmm_place(PAGES - 1);
	UNTIL(done);
	EQUAL("vcpu_resolve", last, KVMFAULT_HANDLED);
	vcpu_join(v);
	REFUSED(kvmfault_vcpu_resolve(NULL, RAM_GPA, 1), EINVAL, "vcpu");
	postcopy_vmm_tear_down();
}

/* ---- what doesn't go together ---- */

static void refusals(void)
{
	struct kvmfault_vm_options options = postcopy_vmm_options();
	struct machine plain;
	struct source source;
	struct ram ram;

	/* Without the flag the pages are the library's. */
	ram_create(&ram, MEMFD, 16 * PAGE);
	machine_create(&plain, PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	machine_attach(&plain, &source, NULL);
	machine_set_slot(&plain, &ram, RAM_SLOT, RAM_GPA);
	REFUSED(kvmfault_pages_arrived(plain.library, ram.hva, PAGE), EOPNOTSUPP, "KVMFAULT_VM_EXTERNAL_UFFD");
	REFUSED(kvmfault_pages_missing(plain.library, ram.hva, PAGE), EOPNOTSUPP, "KVMFAULT_VM_EXTERNAL_UFFD");
	EQUAL("pages absent", kvmfault_pages_absent(plain.library), 16);
	machine_destroy(&plain);

	/* With it, none of these. */
	machine_create(&plain, PAGE);
	options.kvm_fd = plain.kvm;
	options.vm_fd = plain.vm;
	options.mechanism = test_mechanism();
	if (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD) {
		REFUSED(kvmfault_vm_new(&options, &plain.library), EOPNOTSUPP, "KVMFAULT_VM_EXTERNAL_UFFD");
		machine_destroy(&plain);
		return;
	}
	options.reader_threads = 1;
	REFUSED(kvmfault_vm_new(&options, &plain.library), EINVAL, "reader_threads");
	machine_destroy(&plain);
	postcopy_vmm_set_up(MEMFD, false);
	struct kvmfault_vm *vm = postcopy_vmm.m.library;
	uint8_t *hva = postcopy_vmm.ram.hva, *missing = hva + (PAGES - 1) * PAGE;
	static uint8_t bytes[PAGE];
	REFUSED(kvmfault_pages_install(vm, RAM_GPA, bytes, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	REFUSED(kvmfault_pages_zero(vm, RAM_GPA, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	REFUSED(kvmfault_pages_map(vm, RAM_GPA, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	REFUSED(kvmfault_pages_discard(vm, RAM_GPA, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	REFUSED(kvmfault_pages_give_back(vm, RAM_GPA, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	struct kvmfault_fill_options fill_options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	REFUSED(kvmfault_fill_start(vm, &fill_options, &fill), EOPNOTSUPP, "kvmfault_pages_arrived");
	int (*const functions[])(const struct kvmfault_vm *, const void *, uint64_t) = { kvmfault_pages_arrived, kvmfault_pages_missing };
	for (int i = 0; i < 2; i++) {
		REFUSED(functions[i](NULL, hva, PAGE), EINVAL, "vm");
		REFUSED(functions[i](vm, NULL, PAGE), ENOENT, "hva");
		REFUSED(functions[i](vm, bytes, PAGE), ENOENT, "hva");
		REFUSED(functions[i](vm, hva + postcopy_vmm.ram.len, PAGE), ENOENT, "hva");
		REFUSED(functions[i](vm, hva, 0), EINVAL, "len");
		REFUSED(functions[i](vm, hva, PAGE - 1), EINVAL, "len");
		REFUSED(functions[i](vm, hva + 8, PAGE), EINVAL, "hva");
		REFUSED(functions[i](vm, hva + PAGE, postcopy_vmm.ram.len), EINVAL, "len");
		REFUSED(functions[i](vm, hva, -PAGE), EINVAL, "len");
	}
	if (test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP) {
		struct ram anon;
		ram_create(&anon, ANON, 16 * PAGE);
		struct kvmfault_memslot slot = slot_on(&anon, RAM_SLOT + 1, RAM_GPA + postcopy_vmm.ram.len);
		REFUSED(kvmfault_memslot_set(vm, &slot), EOPNOTSUPP, "private");
		ram_destroy(&anon);
		/* What arrived without bytes reads as zeros. */
		struct vcpu *v = machine_add_vcpu(&postcopy_vmm.m, 3);
		vcpu_load_touch(v, RAM_GPA + (PAGES - 1) * PAGE, 1, PAGE);
		OK(kvmfault_pages_arrived(vm, missing, PAGE));
		EQUAL("pages found empty before", machine_stats(&postcopy_vmm.m).pages_empty, 0);
		vcpu_attach(v);
		vcpu_run(v);
		vcpu_detach(v);
		EQUAL("pages found empty", machine_stats(&postcopy_vmm.m).pages_empty, 1);
		SYS(madvise(missing, PAGE, MADV_REMOVE));
		OK(kvmfault_pages_missing(vm, missing, PAGE));
		EQUAL("the page", kvmfault_pages_state(vm, RAM_GPA + (PAGES - 1) * PAGE), KVMFAULT_PAGE_ABSENT);
	}
	/* A lost page is lost for vCPUs; the VMM's threads still get it, if it comes. */
	OK(kvmfault_pages_lost(vm, RAM_GPA + (PAGES - 1) * PAGE, PAGE));
	REFUSED(kvmfault_pages_arrived(vm, missing, PAGE), EHWPOISON, "lost");
	EQUAL("pages missing", kvmfault_pages_absent(vm), PAGES / 2 + PAGES / 8 - 1);
	postcopy_vmm_tear_down();
}

/* Huge pages that are missing are dropped all the same, as post-copy does with what it has never got. */
struct punched {
	struct source source;
	struct ram ram;
	int uffd;
};

static int bring_huge_page(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
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
		skip("the VMM's own userfaultfd is that mechanism (see refusals)");
	ram_create(&p.ram, HUGETLB, COUNT * HUGE_PAGE);
	source_create(&p.source, RAM_GPA, p.ram.len, PATTERN);
	machine_create(&m, pages * sizeof(uint32_t));
	list_sequential(machine_share(&m, pages * sizeof(uint32_t), &list_gpa), pages);
	options.resolver = bring_huge_page;
	options.opaque = &p;
	machine_attach(&m, NULL, &options);
	struct uffdio_register reg = { .range = { (uintptr_t)p.ram.hva, p.ram.len }, .mode = UFFDIO_REGISTER_MODE_MISSING };
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
	{ "kick-in-handler", kick_in_handler, true },
	{ "resolve-by-vcpu", resolve_by_vcpu, true },
	{ "punched-hugetlb", punched_hugetlb, true },
	{ "refusals", refusals, true },
};
TEST_MAIN(cases)
