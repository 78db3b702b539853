/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "postcopy_vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

struct postcopy_vmm postcopy_vmm;

static uint64_t page_of(uint64_t hva)
{
	return (hva - (uintptr_t)postcopy_vmm.ram.hva) / PAGE;
}

void postcopy_vmm_place(uint64_t page)
{
	static _Thread_local uint64_t bytes[512];
	struct uffdio_copy copy = { .dst = (uintptr_t)postcopy_vmm.ram.hva + page * PAGE,
				    .src = (uintptr_t)bytes,
				    .len = PAGE };
	pattern_fill(&postcopy_vmm.source.pattern, page, bytes);
	while (ioctl(postcopy_vmm.uffd, UFFDIO_COPY, &copy)) {
		CHECK(errno == EAGAIN, "UFFDIO_COPY of page %lu: %s", page, strerror(errno));
		copy.copy = 0;
	}
	postcopy_vmm.received[page] = 1;
	OK(kvmfault_pages_arrived(postcopy_vmm.m.library, postcopy_vmm.ram.hva + page * PAGE, PAGE));
}

/* Requested pages first; the others in order. */
static void *stream_main(void *arg)
{
	(void)arg;
	uint64_t next = 0;
	while (!postcopy_vmm.stop) {
		uint64_t page = PAGES;
		for (uint64_t p = 0; p < PAGES && page == PAGES; p++)
			if (postcopy_vmm.requested[p] && !postcopy_vmm.received[p])
				page = p;
		while (next < PAGES && postcopy_vmm.received[next])
			next++;
		if (page == PAGES && !(postcopy_vmm.waits_for && !*postcopy_vmm.waits_for))
			page = next;
		if (postcopy_vmm.paused || page == PAGES)
			usleep(100);
		else
			postcopy_vmm_place(page);
	}
	return NULL;
}

static void request(uint64_t page)
{
	postcopy_vmm.requested[page] = 1;
}

/* The VMM's own fault thread: for accesses of its other threads. */
static void *reader_main(void *arg)
{
	(void)arg;
	struct pollfd fds[2] = { { .fd = postcopy_vmm.uffd, .events = POLLIN },
				 { .fd = postcopy_vmm.quit[0], .events = POLLIN } };
	struct uffd_msg message;
	for (;;) {
		SYS(poll(fds, 2, -1));
		if (fds[1].revents)
			return NULL;
		if (read(postcopy_vmm.uffd, &message, sizeof(message)) != sizeof(message))
			continue;
		CHECK(message.event == UFFD_EVENT_PAGEFAULT, "event %#x", message.event);
		postcopy_vmm.host_faults++;
		request(page_of(message.arg.pagefault.address));
	}
}

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	uint64_t page = page_of((uintptr_t)fault->hva);
	postcopy_vmm.calls++;
	while (postcopy_vmm.held)
		wait_a_little();
	if (postcopy_vmm.received[page]) {
		postcopy_vmm.there_already++;
		OK(kvmfault_pages_arrived(vm, fault->hva, fault->len));
		return KVMFAULT_RESOLVED;
	}
	request(page);
	return KVMFAULT_PENDING;
}

int postcopy_vmm_open_uffd(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		skip("userfaultfd(2): %s", strerror(errno));
	SYS(ioctl(fd, UFFDIO_API, &api));
	return fd;
}

struct kvmfault_vm_options postcopy_vmm_options(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolve;
	options.flags = KVMFAULT_VM_EXTERNAL_UFFD;
	return options;
}

struct kvmfault_memslot postcopy_vmm_slot(uint32_t number, uint64_t gpa)
{
	struct kvmfault_memslot slot = slot_on(&postcopy_vmm.ram, number, gpa);
	slot.block_hva = postcopy_vmm.ram.hva;
	slot.block_len = postcopy_vmm.ram.len;
	slot.flags = KVMFAULT_MEMSLOT_PRESENT;
	return slot;
}

/*
 * KVM has the slot already, on the VMM's mapping: it is made anew through the library, as when a
 * post-copy begins in a VM that runs.
 */
static void arm(uint32_t number, uint64_t gpa)
{
	struct kvmfault_memslot slot = postcopy_vmm_slot(number, gpa);
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	struct kvm_userspace_memory_region plain = {
		.slot = number,
		.guest_phys_addr = gpa,
		.memory_size = postcopy_vmm.ram.len,
		.userspace_addr = (uintptr_t)postcopy_vmm.ram.hva,
	};
	SYS(ioctl(postcopy_vmm.m.vm, KVM_SET_USER_MEMORY_REGION, &plain));
	plain.memory_size = 0;
	SYS(ioctl(postcopy_vmm.m.vm, KVM_SET_USER_MEMORY_REGION, &plain));
	OK(kvmfault_memslot_prepare(postcopy_vmm.m.library, &slot, &region));
	machine_set_region(&postcopy_vmm.m, &region);
	EQUAL("the slot's mechanism", kvmfault_memslot_mechanism(postcopy_vmm.m.library, number), test_mechanism());
}

void postcopy_vmm_set_up(enum backing backing, bool stream)
{
	struct kvmfault_vm_options options = postcopy_vmm_options();
	if (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD)
		skip("the VMM's own userfaultfd is that mechanism (see bad_external)");
	if (backing == ANON && test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP)
		skip("poison-trap leaves private memory to the VMM's userfaultfd (see bad_external)");
	memset(&postcopy_vmm, 0, sizeof(postcopy_vmm));
	ram_create(&postcopy_vmm.ram, backing, PAGES * PAGE);
	machine_create(&postcopy_vmm.m, PAGES * sizeof(uint32_t));
	source_create(&postcopy_vmm.source, RAM_GPA, postcopy_vmm.ram.len, PATTERN);
	postcopy_vmm.list = machine_share(&postcopy_vmm.m, PAGES * sizeof(uint32_t), &postcopy_vmm.list_gpa);
	list_shuffle(postcopy_vmm.list, PAGES, 5);
	/* Pre-copy: the first half, and of that a quarter is stale and dropped again. */
	for (uint64_t page = 0; page < PAGES / 2; page++) {
		if (page % 4) {
			pattern_fill(&postcopy_vmm.source.pattern, page, postcopy_vmm.ram.hva + page * PAGE);
			postcopy_vmm.received[page] = 1;
		}
	}
	postcopy_vmm.uffd = postcopy_vmm_open_uffd();
	struct uffdio_register reg = {
		.range = { (uintptr_t)postcopy_vmm.ram.hva, postcopy_vmm.ram.len },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	SYS(ioctl(postcopy_vmm.uffd, UFFDIO_REGISTER, &reg));
	machine_attach(&postcopy_vmm.m, NULL, &options);
	arm(RAM_SLOT, RAM_GPA);
	for (uint64_t page = 0, end; page < PAGES; page = end) {
		for (end = page + 1; end < PAGES && postcopy_vmm.received[end] == postcopy_vmm.received[page]; end++)
			;
		if (!postcopy_vmm.received[page])
			OK(kvmfault_pages_missing(postcopy_vmm.m.library, postcopy_vmm.ram.hva + page * PAGE,
						  (end - page) * PAGE));
	}
	EQUAL("pages missing", kvmfault_pages_absent(postcopy_vmm.m.library), PAGES / 2 + PAGES / 8);
	SYS(pipe(postcopy_vmm.quit));
	CHECK(!pthread_create(&postcopy_vmm.reader, NULL, reader_main, NULL), "pthread_create");
	postcopy_vmm.paused = !stream;
	CHECK(!pthread_create(&postcopy_vmm.stream, NULL, stream_main, NULL), "pthread_create");
}

void postcopy_vmm_tear_down(void)
{
	postcopy_vmm.stop = true;
	SYS(write(postcopy_vmm.quit[1], "", 1));
	pthread_join(postcopy_vmm.stream, NULL);
	pthread_join(postcopy_vmm.reader, NULL);
	machine_destroy(&postcopy_vmm.m);
	close(postcopy_vmm.uffd);
	ram_destroy(&postcopy_vmm.ram);
	source_destroy(&postcopy_vmm.source);
}

/* Runs all vCPUs, at both privilege levels; each verifies its part of the list. */
void postcopy_vmm_run_guests(int mode)
{
	struct vcpu *v[VCPUS];
	for (int i = 0; i < VCPUS; i++) {
		uint64_t part = PAGES / VCPUS;
		v[i] = i < (int)postcopy_vmm.m.vcpus ? postcopy_vmm.m.vcpu[i]
						     : machine_add_vcpu(&postcopy_vmm.m, i % 2 ? 0 : 3);
		vcpu_load_verify(v[i], RAM_GPA, postcopy_vmm.list_gpa + i * part * sizeof(*postcopy_vmm.list), part,
				 &postcopy_vmm.source.pattern, mode);
		vcpu_start_verify(v[i]);
	}
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(v[i]);
}
