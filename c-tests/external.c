/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VMM that has a post-copy of its own, as QEMU does (KVMFAULT_VM_EXTERNAL_UFFD): its userfaultfd serves its threads, a stream brings the pages,
 * and the library spares the vCPUs that userfaultfd.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGES = 2048, VCPUS = 4 };

/* The VMM: one memory, half of it brought before the vCPUs run (pre-copy), the rest by a stream, asked for or not. */
static struct vmm {
	struct machine m;
	struct ram ram;
	struct source source; /* the other side's memory */
	uint32_t *list;
	uint64_t list_gpa;
	int uffd, quit[2];
	pthread_t stream, reader;
	_Atomic uint8_t received[PAGES]; /* set after the page is in the VMM's mapping */
	_Atomic uint8_t requested[PAGES];
	atomic_uint calls, there_already, host_faults;
	atomic_bool paused, stop;
	atomic_uint *waits_for; /* until this isn't 0 any more, the stream sends only what is requested */
	atomic_bool held; /* the resolver doesn't return, nor look at anything */
} vmm;

static uint64_t page_of(uint64_t hva)
{
	return (hva - (uintptr_t)vmm.ram.hva) / PAGE;
}

static void place(uint64_t page)
{
	static _Thread_local uint64_t bytes[512];
	struct uffdio_copy copy = { .dst = (uintptr_t)vmm.ram.hva + page * PAGE, .src = (uintptr_t)bytes, .len = PAGE };
	pattern_fill(&vmm.source.pattern, page, bytes);
	while (ioctl(vmm.uffd, UFFDIO_COPY, &copy)) {
		CHECK(errno == EAGAIN, "UFFDIO_COPY of page %lu: %s", page, strerror(errno));
		copy.copy = 0;
	}
	vmm.received[page] = 1;
	OK(kvmfault_pages_arrived(vmm.m.library, vmm.ram.hva + page * PAGE, PAGE));
}

/* Requested pages first; the others in order. */
static void *stream_main(void *arg)
{
	(void)arg;
	uint64_t next = 0;
	while (!vmm.stop) {
		uint64_t page = PAGES;
		for (uint64_t p = 0; p < PAGES && page == PAGES; p++)
			if (vmm.requested[p] && !vmm.received[p])
				page = p;
		while (next < PAGES && vmm.received[next])
			next++;
		if (page == PAGES && !(vmm.waits_for && !*vmm.waits_for))
			page = next;
		if (vmm.paused || page == PAGES)
			usleep(100);
		else
			place(page);
	}
	return NULL;
}

static void request(uint64_t page)
{
	vmm.requested[page] = 1;
}

/* The VMM's own fault thread: for accesses of its other threads. */
static void *reader_main(void *arg)
{
	(void)arg;
	struct pollfd fds[2] = { { .fd = vmm.uffd, .events = POLLIN }, { .fd = vmm.quit[0], .events = POLLIN } };
	struct uffd_msg message;
	for (;;) {
		SYS(poll(fds, 2, -1));
		if (fds[1].revents)
			return NULL;
		if (read(vmm.uffd, &message, sizeof(message)) != sizeof(message))
			continue;
		CHECK(message.event == UFFD_EVENT_PAGEFAULT, "event %#x", message.event);
		vmm.host_faults++;
		request(page_of(message.arg.pagefault.address));
	}
}

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	uint64_t page = page_of((uintptr_t)fault->hva);
	vmm.calls++;
	while (vmm.held)
		wait_a_little();
	if (vmm.received[page]) {
		vmm.there_already++;
		OK(kvmfault_pages_arrived(vm, fault->hva, fault->len));
		return KVMFAULT_RESOLVED;
	}
	request(page);
	return KVMFAULT_PENDING;
}

static int open_uffd(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		skip("userfaultfd(2): %s", strerror(errno));
	SYS(ioctl(fd, UFFDIO_API, &api));
	return fd;
}

static struct kvmfault_vm_options options_of_vmm(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolve;
	options.flags = KVMFAULT_VM_EXTERNAL_UFFD;
	return options;
}

static struct kvmfault_memslot slot_of_vmm(uint32_t number, uint64_t gpa)
{
	struct kvmfault_memslot slot = slot_on(&vmm.ram, number, gpa);
	slot.block_hva = vmm.ram.hva;
	slot.block_len = vmm.ram.len;
	slot.flags = KVMFAULT_MEMSLOT_PRESENT;
	return slot;
}

/* KVM has the slot already, on the VMM's mapping: it is made anew through the library, as when a post-copy begins in a VM that runs. */
static void arm(uint32_t number, uint64_t gpa)
{
	struct kvmfault_memslot slot = slot_of_vmm(number, gpa);
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	struct kvm_userspace_memory_region plain = {
		.slot = number, .guest_phys_addr = gpa, .memory_size = vmm.ram.len, .userspace_addr = (uintptr_t)vmm.ram.hva,
	};
	SYS(ioctl(vmm.m.vm, KVM_SET_USER_MEMORY_REGION, &plain));
	plain.memory_size = 0;
	SYS(ioctl(vmm.m.vm, KVM_SET_USER_MEMORY_REGION, &plain));
	OK(kvmfault_memslot_prepare(vmm.m.library, &slot, &region));
	machine_set_region(&vmm.m, &region);
	EQUAL("the slot's mechanism", kvmfault_memslot_mechanism(vmm.m.library, number), test_mechanism());
}

static void set_up(enum backing backing, bool stream)
{
	struct kvmfault_vm_options options = options_of_vmm();
	if (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD)
		skip("the VMM's own userfaultfd is that mechanism (see refusals)");
	if (backing == ANON && test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP)
		skip("poison-trap leaves private memory to the VMM's userfaultfd (see refusals)");
	memset(&vmm, 0, sizeof(vmm));
	ram_create(&vmm.ram, backing, PAGES * PAGE);
	machine_create(&vmm.m, PAGES * sizeof(uint32_t));
	source_create(&vmm.source, RAM_GPA, vmm.ram.len, PATTERN);
	vmm.list = machine_share(&vmm.m, PAGES * sizeof(uint32_t), &vmm.list_gpa);
	list_shuffle(vmm.list, PAGES, 5);
	/* Pre-copy: the first half, and of that a quarter is stale and dropped again. */
	for (uint64_t page = 0; page < PAGES / 2; page++) {
		if (page % 4) {
			pattern_fill(&vmm.source.pattern, page, vmm.ram.hva + page * PAGE);
			vmm.received[page] = 1;
		}
	}
	vmm.uffd = open_uffd();
	struct uffdio_register reg = {
		.range = { (uintptr_t)vmm.ram.hva, vmm.ram.len },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	SYS(ioctl(vmm.uffd, UFFDIO_REGISTER, &reg));
	machine_attach(&vmm.m, NULL, &options);
	arm(RAM_SLOT, RAM_GPA);
	for (uint64_t page = 0, end; page < PAGES; page = end) {
		for (end = page + 1; end < PAGES && vmm.received[end] == vmm.received[page]; end++)
			;
		if (!vmm.received[page])
			OK(kvmfault_pages_missing(vmm.m.library, vmm.ram.hva + page * PAGE, (end - page) * PAGE));
	}
	EQUAL("pages missing", kvmfault_pages_absent(vmm.m.library), PAGES / 2 + PAGES / 8);
	SYS(pipe(vmm.quit));
	CHECK(!pthread_create(&vmm.reader, NULL, reader_main, NULL), "pthread_create");
	vmm.paused = !stream;
	CHECK(!pthread_create(&vmm.stream, NULL, stream_main, NULL), "pthread_create");
}

static void tear_down(void)
{
	vmm.stop = true;
	SYS(write(vmm.quit[1], "", 1));
	pthread_join(vmm.stream, NULL);
	pthread_join(vmm.reader, NULL);
	machine_destroy(&vmm.m);
	close(vmm.uffd);
	ram_destroy(&vmm.ram);
	source_destroy(&vmm.source);
}

static void *verify(struct vcpu *v)
{
	vcpu_attach(v);
	vcpu_verify(v);
	vcpu_detach(v);
	return NULL;
}

/* All vCPUs, at both levels, each its part of the list. */
static void run_guests(int mode)
{
	struct vcpu *v[VCPUS];
	for (int i = 0; i < VCPUS; i++) {
		uint64_t part = PAGES / VCPUS;
		v[i] = i < (int)vmm.m.vcpus ? vmm.m.vcpu[i] : machine_add_vcpu(&vmm.m, i % 2 ? 0 : 3);
		vcpu_load_verify(v[i], RAM_GPA, vmm.list_gpa + i * part * sizeof(*vmm.list), part, &vmm.source.pattern, mode);
		vcpu_start(v[i], verify, NULL);
	}
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(v[i]);
}

static void *touch_from_the_host(void *arg)
{
	const uint64_t *words = (uint64_t *)vmm.ram.hva;
	(void)arg;
	for (uint64_t page = PAGES - 1; page >= PAGES / 2; page -= 16)
		EQUAL("what a host thread reads", words[page * 512 + 7], pattern_word(&vmm.source.pattern, page, 7));
	return NULL;
}

/* The whole of a post-copy. Afterwards the memory is as any other: the fast path is off, and vCPUs write all of it. */
static void postcopy(enum backing backing)
{
	pthread_t host;
	set_up(backing, true);
	vmm.waits_for = &vmm.calls; /* a vCPU has asked */
	CHECK(!pthread_create(&host, NULL, touch_from_the_host, NULL), "pthread_create");
	run_guests(READ_FIRST);
	pthread_join(host, NULL);
	UNTIL(kvmfault_pages_absent(vmm.m.library) == 0);
	struct kvmfault_stats stats = machine_stats(&vmm.m);
	note("%u resolver calls, %u host faults by the VMM's own userfaultfd", vmm.calls, vmm.host_faults);
	CHECK(vmm.calls > 0, "no vCPU ever asked for a page");
	EQUAL("faults_host", stats.faults_host, 0);
	EQUAL("resolver_calls", stats.resolver_calls, vmm.calls);
	EQUAL("pages_copied", stats.pages_copied, 0);
	OK(kvmfault_memslot_set_fast_only(vmm.m.library, RAM_SLOT, 0));
	struct uffdio_range range = { (uintptr_t)vmm.ram.hva, vmm.ram.len };
	SYS(ioctl(vmm.uffd, UFFDIO_UNREGISTER, &range));
	unsigned calls = vmm.calls;
	/* Dropped mappings, which a released alias takes as any memory does. */
	if (backing != ANON)
		SYS(madvise(vmm.ram.hva, vmm.ram.len / 2, MADV_DONTNEED));
	run_guests(READ_FIRST);
	EQUAL("resolver calls after the end", vmm.calls, calls);
	tear_down();
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
	while ((ret = kvmfault_memslot_set_fast_only(vmm.m.library, RAM_SLOT, 0)) == -EBUSY)
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
		set_up(MEMFD, true);
		CHECK(!pthread_create(&thread, NULL, end_again_and_again, NULL), "pthread_create");
		pthread_join(thread, NULL);
		UNTIL(test_mechanism() != KVMFAULT_MECHANISM_POISON_TRAP || kvmfault_pages_absent(vmm.m.library) == 0);
		run_guests(READ_FIRST);
		tear_down();
	}
}

static atomic_bool ended;

static void *end_once(void *arg)
{
	(void)arg;
	OK(kvmfault_memslot_set_fast_only(vmm.m.library, RAM_SLOT, 0));
	ended = true;
	return NULL;
}

/* A vCPU is on its way to the resolver while the last pages come: after the end a VMM puts away what its resolver looks at. */
static void end_waits_for_resolver(void)
{
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		pthread_t thread;
		set_up(MEMFD, false);
		ended = false;
		vmm.held = true;
		vmm.list[0] = PAGES - 1; /* missing */
		struct vcpu *v = machine_add_vcpu(&vmm.m, cpl);
		vcpu_load_verify(v, RAM_GPA, vmm.list_gpa, 1, &vmm.source.pattern, READ_FIRST);
		vcpu_start(v, verify, NULL);
		UNTIL(vmm.calls == 1);
		for (uint64_t page = 0; page < PAGES; page++)
			if (!vmm.received[page])
				place(page);
		UNTIL(kvmfault_pages_absent(vmm.m.library) == 0);
		CHECK(!pthread_create(&thread, NULL, end_once, NULL), "pthread_create");
		usleep(100000);
		CHECK(!ended, "the end has come, and a resolver call is under way");
		vmm.held = false;
		pthread_join(thread, NULL);
		vcpu_join(v);
		EQUAL("resolver calls", vmm.calls, 1);
		tear_down();
	}
}

/* The end comes too early: refused while a page is missing, and the guests never see zeros. */
static void too_early(void)
{
	bool trap = test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP;
	set_up(MEMFD, false);
	if (trap)
		REFUSED(kvmfault_memslot_set_fast_only(vmm.m.library, RAM_SLOT, 0), EBUSY, "missing");
	else /* the flag goes, and KVM sleeps in the VMM's userfaultfd */
		OK(kvmfault_memslot_set_fast_only(vmm.m.library, RAM_SLOT, 0));
	vmm.waits_for = trap ? &vmm.calls : &vmm.host_faults; /* or all might be there before a guest has begun */
	vmm.paused = false;
	run_guests(READ_FIRST);
	UNTIL(kvmfault_pages_absent(vmm.m.library) == 0);
	CHECK(trap ? vmm.calls > 0 : vmm.host_faults > 0, "%u resolver calls, %u faults of the VMM's", vmm.calls, vmm.host_faults);
	OK(kvmfault_memslot_set_fast_only(vmm.m.library, RAM_SLOT, 0));
	if (trap) {
		REFUSED(kvmfault_pages_missing(vmm.m.library, vmm.ram.hva, PAGE), EBUSY, "off");
		EQUAL("state", kvmfault_pages_state(vmm.m.library, RAM_GPA), KVMFAULT_PAGE_PRESENT);
	}
	tear_down();
}

/* A page is called missing after it came (its VMM looked at its books too early): the resolver is asked, knows better, and nothing is lost. */
static void stale_missing(void)
{
	set_up(MEMFD, false);
	for (uint64_t page = 0; page < PAGES; page++)
		if (!vmm.received[page])
			place(page);
	EQUAL("pages missing", kvmfault_pages_absent(vmm.m.library), 0);
	OK(kvmfault_pages_missing(vmm.m.library, vmm.ram.hva, vmm.ram.len));
	EQUAL("pages called missing", kvmfault_pages_absent(vmm.m.library), PAGES);
	run_guests(READ_FIRST);
	/* With the memslot flag KVM may find the pages in the VMM's page tables, and then doesn't ask. */
	if (test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP)
		EQUAL("resolver calls", vmm.calls, PAGES);
	EQUAL("of those for pages that were there", vmm.there_already, vmm.calls);
	EQUAL("pages missing", kvmfault_pages_absent(vmm.m.library), PAGES - vmm.calls);
	tear_down();
}

/* Slots come and go while pages are missing, and a second one shows the same memory; states stay with the memory. */
static void slots_change(void)
{
	struct kvmfault_memslot slot;
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	set_up(MEMFD, false);
	uint64_t missing = kvmfault_pages_absent(vmm.m.library);
	for (int round = 0; round < 3; round++) {
		slot = slot_of_vmm(RAM_SLOT, RAM_GPA);
		slot.len = 0;
		slot.flags = KVMFAULT_MEMSLOT_KEEP;
		struct kvm_userspace_memory_region none = { .slot = RAM_SLOT };
		SYS(ioctl(vmm.m.vm, KVM_SET_USER_MEMORY_REGION, &none));
		OK(kvmfault_memslot_prepare(vmm.m.library, &slot, &region));
		place(PAGES / 2 + round); /* while no slot shows it */
		slot = slot_of_vmm(RAM_SLOT, RAM_GPA);
		OK(kvmfault_memslot_prepare(vmm.m.library, &slot, &region));
		machine_set_region(&vmm.m, &region);
		EQUAL("pages missing", kvmfault_pages_absent(vmm.m.library), missing - round - 1);
	}
	slot = slot_of_vmm(RAM_SLOT + 1, RAM_GPA + vmm.ram.len);
	OK(kvmfault_memslot_prepare(vmm.m.library, &slot, &region));
	machine_set_region(&vmm.m, &region);
	EQUAL("pages missing with two slots", kvmfault_pages_absent(vmm.m.library), missing - 3);
	vmm.paused = false;
	run_guests(READ_FIRST);
	UNTIL(kvmfault_pages_absent(vmm.m.library) == 0);
	OK(kvmfault_memslot_set_fast_only(vmm.m.library, RAM_SLOT, 0));
	OK(kvmfault_memslot_set_fast_only(vmm.m.library, RAM_SLOT + 1, 0));
	tear_down();
}

/* The VMM's address of what KVM may know by another. */
static void addresses(void)
{
	struct kvmfault_memslot slot;
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	set_up(MEMFD, false);
	slot = slot_of_vmm(RAM_SLOT, RAM_GPA);
	OK(kvmfault_memslot_prepare(vmm.m.library, &slot, &region));
	for (uint64_t offset = 0; offset < vmm.ram.len; offset += 12345) {
		void *expected = vmm.ram.hva + offset;
		CHECK(kvmfault_vm_address(vmm.m.library, (void *)(region.userspace_addr + offset)) == expected, "offset %#lx", offset);
		CHECK(kvmfault_vm_address(vmm.m.library, expected) == expected, "offset %#lx", offset);
	}
	CHECK(!kvmfault_vm_address(vmm.m.library, vmm.ram.hva + vmm.ram.len), "an address behind the memory");
	CHECK(!kvmfault_vm_address(vmm.m.library, NULL), "NULL");
	CHECK(!kvmfault_vm_address(NULL, vmm.ram.hva), "no VM");
	tear_down();
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
		set_up(MEMFD, false);
		signals = interrupted = done = 0;
		vmm.list[0] = PAGES - 1; /* missing */
		struct vcpu *v = machine_add_vcpu(&vmm.m, cpl);
		vcpu_load_verify(v, RAM_GPA, vmm.list_gpa, 1, &vmm.source.pattern, READ_FIRST);
		vcpu_start(v, own_loop, NULL);
		UNTIL(vmm.calls == 1);
		for (unsigned i = 0; i < KICKS; i++) {
			double began = now();
			CHECK(!pthread_kill(v->thread, SIGUSR1), "pthread_kill");
			UNTIL(interrupted > i);
			slowest = now() - began > slowest ? now() - began : slowest;
		}
		usleep(50000);
		EQUAL("signals", signals, KICKS);
		EQUAL("INTERRUPTED", interrupted, KICKS);
		vmm.paused = false;
		UNTIL(done);
		vcpu_join(v);
		tear_down();
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
	EQUAL("resolver calls for present pages", vmm.calls, 0);
	while ((ret = kvmfault_vcpu_resolve(v->handle, border - 8, 16)) == KVMFAULT_INTERRUPTED)
		interrupted++;
	last = ret;
	done++;
	vcpu_detach(v);
	return NULL;
}

static void resolve_by_vcpu(void)
{
	set_up(MEMFD, false);
	done = interrupted = 0;
	struct vcpu *v = machine_add_vcpu(&vmm.m, 3);
	vcpu_start(v, resolve_main, NULL);
	UNTIL(vmm.calls == 1);
	for (unsigned i = 0; i < 10; i++) {
		OK(kvmfault_vcpu_kick(v->handle));
		UNTIL(interrupted == i + 1);
	}
	place(PAGES - 2);
	UNTIL(vmm.calls == 2); /* the other page that the range touches */
	EQUAL("done with one page of two", done, 0);
	place(PAGES - 1);
	UNTIL(done);
	EQUAL("vcpu_resolve", last, KVMFAULT_HANDLED);
	vcpu_join(v);
	REFUSED(kvmfault_vcpu_resolve(NULL, RAM_GPA, 1), EINVAL, "vcpu");
	tear_down();
}

/* ---- what doesn't go together ---- */

static void refusals(void)
{
	struct kvmfault_vm_options options = options_of_vmm();
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
	set_up(MEMFD, false);
	struct kvmfault_vm *vm = vmm.m.library;
	uint8_t *hva = vmm.ram.hva, *missing = hva + (PAGES - 1) * PAGE;
	static uint8_t bytes[PAGE];
	REFUSED(kvmfault_pages_install(vm, RAM_GPA, bytes, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	REFUSED(kvmfault_pages_zero(vm, RAM_GPA, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	REFUSED(kvmfault_pages_map(vm, RAM_GPA, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	REFUSED(kvmfault_pages_discard(vm, RAM_GPA, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	struct kvmfault_fill_options fill_options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	REFUSED(kvmfault_fill_start(vm, &fill_options, &fill), EOPNOTSUPP, "kvmfault_pages_arrived");
	int (*const functions[])(const struct kvmfault_vm *, const void *, uint64_t) = { kvmfault_pages_arrived, kvmfault_pages_missing };
	for (int i = 0; i < 2; i++) {
		REFUSED(functions[i](NULL, hva, PAGE), EINVAL, "vm");
		REFUSED(functions[i](vm, NULL, PAGE), ENOENT, "hva");
		REFUSED(functions[i](vm, bytes, PAGE), ENOENT, "hva");
		REFUSED(functions[i](vm, hva + vmm.ram.len, PAGE), ENOENT, "hva");
		REFUSED(functions[i](vm, hva, 0), EINVAL, "len");
		REFUSED(functions[i](vm, hva, PAGE - 1), EINVAL, "len");
		REFUSED(functions[i](vm, hva + 8, PAGE), EINVAL, "hva");
		REFUSED(functions[i](vm, hva + PAGE, vmm.ram.len), EINVAL, "len");
		REFUSED(functions[i](vm, hva, -PAGE), EINVAL, "len");
	}
	if (test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP) {
		struct ram anon;
		ram_create(&anon, ANON, 16 * PAGE);
		struct kvmfault_memslot slot = slot_on(&anon, RAM_SLOT + 1, RAM_GPA + vmm.ram.len);
		REFUSED(kvmfault_memslot_set(vm, &slot), EOPNOTSUPP, "private");
		ram_destroy(&anon);
		/* A lie is found out when a vCPU comes to the page. */
		struct vcpu *v = machine_add_vcpu(&vmm.m, 3);
		vcpu_load_touch(v, RAM_GPA + (PAGES - 1) * PAGE, 1, PAGE);
		OK(kvmfault_pages_arrived(vm, missing, PAGE));
		vcpu_attach(v);
		REFUSED(kvmfault_vcpu_run(v->handle), ENOENT, "page cache");
		vcpu_detach(v);
		OK(kvmfault_pages_missing(vm, missing, PAGE));
		EQUAL("the page", kvmfault_pages_state(vm, RAM_GPA + (PAGES - 1) * PAGE), KVMFAULT_PAGE_ABSENT);
	}
	/* A lost page is lost for vCPUs; the VMM's threads still get it, if it comes. */
	OK(kvmfault_pages_lost(vm, RAM_GPA + (PAGES - 1) * PAGE, PAGE));
	REFUSED(kvmfault_pages_arrived(vm, missing, PAGE), EHWPOISON, "lost");
	EQUAL("pages missing", kvmfault_pages_absent(vm), PAGES / 2 + PAGES / 8 - 1);
	tear_down();
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
	{ "refusals", refusals, true },
};
TEST_MAIN(cases)
