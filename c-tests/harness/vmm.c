/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

struct vmm vmm;

static uint64_t page_of(uint64_t hva)
{
	return (hva - (uintptr_t)vmm.ram.hva) / PAGE;
}

void vmm_place(uint64_t page)
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
			vmm_place(page);
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

int vmm_open_uffd(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		skip("userfaultfd(2): %s", strerror(errno));
	SYS(ioctl(fd, UFFDIO_API, &api));
	return fd;
}

struct kvmfault_vm_options vmm_options(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolve;
	options.flags = KVMFAULT_VM_EXTERNAL_UFFD;
	return options;
}

struct kvmfault_memslot vmm_slot(uint32_t number, uint64_t gpa)
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
	struct kvmfault_memslot slot = vmm_slot(number, gpa);
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

void vmm_set_up(enum backing backing, bool stream)
{
	struct kvmfault_vm_options options = vmm_options();
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
	vmm.uffd = vmm_open_uffd();
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

void vmm_tear_down(void)
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

/* All vCPUs, at both levels, each its part of the list. */
void vmm_run_guests(int mode)
{
	struct vcpu *v[VCPUS];
	for (int i = 0; i < VCPUS; i++) {
		uint64_t part = PAGES / VCPUS;
		v[i] = i < (int)vmm.m.vcpus ? vmm.m.vcpu[i] : machine_add_vcpu(&vmm.m, i % 2 ? 0 : 3);
		vcpu_load_verify(v[i], RAM_GPA, vmm.list_gpa + i * part * sizeof(*vmm.list), part, &vmm.source.pattern, mode);
		vcpu_start_verify(v[i]);
	}
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(v[i]);
}
