/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static void write_page_tables(struct machine *m)
{
	enum { ALL = 7 /* present, writable, user */, LARGE = 0x80 };
	uint64_t *pml4 = (uint64_t *)(m->low + LOW_PAGE_TABLES), *pdpt = pml4 + 512, *directory = pdpt + 512;

	pml4[0] = (LOW_PAGE_TABLES + PAGE) | ALL;
	for (uint64_t i = 0; i < GUEST_LIMIT >> 30; i++)
		pdpt[i] = (LOW_PAGE_TABLES + (2 + i) * PAGE) | ALL;
	for (uint64_t i = 0; i < GUEST_LIMIT >> 21; i++)
		directory[i] = i << 21 | ALL | LARGE;
}

void machine_create(struct machine *m, uint64_t shared)
{
	memset(m, 0, sizeof(*m));
	m->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (m->kvm < 0)
		skip("/dev/kvm: %s", strerror(errno));
	m->vm = SYS(ioctl(m->kvm, KVM_CREATE_VM, 0));
	/* A stack for each vCPU, and room for rounding. */
	m->low_len = round_up(LOW_SHARED + shared + (MOST_VCPUS + 64) * PAGE, HUGE_PAGE);
	m->low_used = LOW_SHARED;
	m->low = mmap(NULL, m->low_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	CHECK(m->low != MAP_FAILED && m->low_len <= RAM_GPA, "%lu bytes of low memory: %s", m->low_len,
	      strerror(errno));
	struct kvm_userspace_memory_region low = { .memory_size = m->low_len, .userspace_addr = (uintptr_t)m->low };
	SYS(ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &low));
	write_page_tables(m);
	guest_copy_programs(m->low);
}

/*
 * Of the VMs that machine_attach gave a finalizer: how many machine_destroy has freed, and how many
 * the library is done with.
 */
static atomic_uint freed, finished;

static void finalize(void *opaque)
{
	(void)opaque;
	finished++;
}

void machine_destroy(struct machine *m)
{
	long run_size = ioctl(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	vms_going++;
	kvmfault_vm_free(m->library);
	for (unsigned i = 0; i < m->vcpus; i++) {
		kvmfault_vcpu_free(m->vcpu[i]->handle);
		m->vcpu[i]->handle = NULL;
	}
	/*
	 * Threads of the library may be in the resolver: memory, and what the resolver uses, must
	 * stay until they are done.
	 */
	if (m->finalized) {
		freed++;
		UNTIL(finished >= freed);
	}
	vms_going--;
	for (unsigned i = 0; i < m->vcpus; i++) {
		munmap(m->vcpu[i]->run, run_size);
		close(m->vcpu[i]->fd);
		free(m->vcpu[i]);
	}
	close(m->vm);
	close(m->kvm);
	munmap(m->low, m->low_len);
}

void *machine_share(struct machine *m, uint64_t len, uint64_t *gpa)
{
	CHECK(m->low_used + len <= m->low_len, "machine_create was told less than machine_share is asked for");
	*gpa = m->low_used;
	m->low_used += round_up(len, PAGE);
	return m->low + *gpa;
}

void machine_attach(struct machine *m, struct source *source, const struct kvmfault_vm_options *given)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	if (given)
		options = *given;
	options.kvm_fd = m->kvm;
	options.vm_fd = m->vm;
	if (!options.mechanism)
		options.mechanism = test_mechanism();
	if (!options.resolver) {
		options.resolver = source_resolve;
		options.opaque = source;
	}
	if (!options.finalizer) {
		options.finalizer = finalize;
		m->finalized = true;
	}
	OK(kvmfault_vm_new(&options, &m->library));
}

struct kvmfault_memslot slot_on(const struct ram *ram, uint32_t number, uint64_t gpa)
{
	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	slot.slot = number;
	slot.gpa = gpa;
	slot.len = ram->len;
	slot.hva = ram->hva;
	slot.memory =
		(const int[]){ KVMFAULT_MEMORY_ANON, KVMFAULT_MEMORY_SHARED, KVMFAULT_MEMORY_HUGETLB }[ram->backing];
	slot.fd = ram->fd;
	slot.flags = ram->backing == ANON ? KVMFAULT_MEMSLOT_VCPU_ONLY : 0;
	return slot;
}

void machine_set_slot(struct machine *m, const struct ram *ram, uint32_t number, uint64_t gpa)
{
	struct kvmfault_memslot slot = slot_on(ram, number, gpa);
	OK(kvmfault_memslot_set(m->library, &slot));
	if (test_mechanism())
		EQUAL("the slot's mechanism", kvmfault_memslot_mechanism(m->library, number), test_mechanism());
}

/* KVM_SET_USER_MEMORY_REGION2, which older headers lack. */
struct region2 {
	uint32_t slot, flags;
	uint64_t guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
	uint32_t guest_memfd, pad1;
	uint64_t userfault_bitmap, pad2[13];
};
#define SET_REGION2 _IOW(KVMIO, 0x49, struct region2)

void machine_set_region(const struct machine *m, const struct kvmfault_region *r)
{
	if (r->ioctl_version == 1) {
		struct kvm_userspace_memory_region old = {
			.slot = r->slot,
			.flags = r->flags,
			.guest_phys_addr = r->guest_phys_addr,
			.memory_size = r->memory_size,
			.userspace_addr = r->userspace_addr,
		};
		SYS(ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &old));
	} else {
		struct region2 new = {
			.slot = r->slot,
			.flags = r->flags,
			.guest_phys_addr = r->guest_phys_addr,
			.memory_size = r->memory_size,
			.userspace_addr = r->userspace_addr,
			.userfault_bitmap = r->userfault_bitmap,
		};
		EQUAL("ioctl_version", r->ioctl_version, 2);
		SYS(ioctl(m->vm, SET_REGION2, &new));
	}
}

struct kvmfault_stats machine_stats(const struct machine *m)
{
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	OK(kvmfault_vm_stats(m->library, &stats));
	return stats;
}

struct kvmfault_stats machine_settled_stats(const struct machine *m)
{
	struct kvmfault_stats stats;
	uint64_t faults, served;
	double deadline = now() + 5;
	do {
		stats = machine_stats(m);
		faults = stats.faults_vcpu + stats.faults_host + stats.faults_prefetch;
		served = 0;
		for (int i = 0; i < KVMFAULT_LATENCY_BUCKETS; i++)
			served += stats.latency_us_log2[i];
		CHECK(now() < deadline, "%lu faults, but %lu in the histogram", faults, served);
	} while (faults != served);
	/*
	 * Counters are read one after the other: those before the histogram may be older than it.
	 */
	return machine_stats(m);
}
