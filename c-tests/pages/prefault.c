/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KVM_PRE_FAULT_MEMORY after a fault: the guest sees the same bytes with it and without, it avoids
 * exits that readahead alone can't avoid, and it does no harm while memslots come and go.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { READAHEAD = 16 };

static void require_pre_fault(void)
{
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	if (!probe.pre_fault_memory)
		skip("KVM has no KVM_PRE_FAULT_MEMORY that is of use here (x86 with EPT or NPT has)");
}

/*
 * A counter of a vCPU by KVM's name (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD); -1 if there
 * is none.
 */
static long long vcpu_counter(const struct vcpu *v, const char *name)
{
	struct kvm_stats_header header;
	long long value = -1;
	int fd = ioctl(v->fd, KVM_GET_STATS_FD, NULL);
	if (fd < 0)
		return -1;
	EQUAL("the header of the counters", pread(fd, &header, sizeof(header), 0), sizeof(header));
	size_t size = sizeof(struct kvm_stats_desc) + header.name_size;
	struct kvm_stats_desc *desc = malloc(size);
	CHECK(desc, "no memory");
	for (uint32_t i = 0; i < header.num_desc && value < 0; i++) {
		uint64_t number;
		EQUAL("a counter's description", pread(fd, desc, size, header.desc_offset + i * size), size);
		if (!strcmp(desc->name, name) && pread(fd, &number, 8, header.data_offset + desc->offset) == 8)
			value = (long long)number;
	}
	free(desc);
	close(fd);
	return value;
}

struct result {
	double seconds;
	long long exits;
};

/* Restores memory with one vCPU, in order, a window at a time. */
static struct result restore(enum backing backing, uint64_t flags, int mode)
{
	struct machine m;
	struct ram ram;
	struct source source;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	uint64_t list_gpa;
	ram_create(&ram, backing, 4ul << 20);
	uint64_t pages = ram.len / PAGE;
	machine_create(&m, pages * sizeof(uint32_t));
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	source.window = true;
	options.readahead = READAHEAD;
	options.flags = flags;
	machine_attach(&m, &source, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	list_sequential(machine_share(&m, pages * sizeof(uint32_t), &list_gpa), pages);
	struct vcpu *v = machine_add_vcpu(&m, 3);
	vcpu_load_verify(v, RAM_GPA, list_gpa, pages, &source.pattern, mode);
	vcpu_attach(v);
	double start = now();
	vcpu_verify(v);
	struct result result = { now() - start, vcpu_counter(v, "exits") };
	CHECK(source.total <= pages / READAHEAD + 8, "%lu resolver calls", source.total);
	if (mode == READ_FIRST)
		pattern_check(&source.pattern, ram.hva, 0, pages);
	vcpu_detach(v);
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
	return result;
}

/*
 * The guest reads the same bytes with and without; with it, pages of the window other than the
 * faulting one cause no exit. (With `userfaultfd` the vCPU sleeps inside KVM, and the library has
 * no place to call it from.)
 */
static void exits(void)
{
	static const char *const modes[] = { "read", "written" };
	char ratios[256] = "";
	require_pre_fault();
	for (int backing = ANON; backing <= MEMFD; backing++) {
		for (int mode = READ_FIRST; mode <= WRITE_FIRST; mode++) {
			struct result on = restore(backing, KVMFAULT_VM_PRE_FAULT, mode),
				      off = restore(backing, 0, mode);
			double pages = (4ul << 20) / PAGE;
			printf("%s, %s: on %.0f pages/s, %lld exits; off %.0f pages/s, %lld exits\n",
			       backing_name(backing), modes[mode], pages / on.seconds, on.exits, pages / off.seconds,
			       off.exits);
			size_t length = strlen(ratios);
			snprintf(ratios + length, sizeof(ratios) - length, "%s%s, %s: %.2fx, %lld exits for %lld",
				 *ratios ? "; " : "", backing_name(backing), modes[mode], off.seconds / on.seconds,
				 on.exits, off.exits);
			if (on.exits < 0 || test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD)
				continue;
			/* A window costs two or three exits instead of one a page. */
			CHECK(on.exits < off.exits / 2, "%lld exits with it, %lld without", on.exits, off.exits);
		}
	}
	note("with KVM_PRE_FAULT_MEMORY: %s", ratios);
}

/* ---- memslots come and go ---- */

static atomic_bool busy;
static atomic_ulong changes;

struct churn {
	struct machine *m;
	struct ram *ram;
};

static void *change_slots(void *opaque)
{
	struct churn *churn = opaque;
	struct kvm_userspace_memory_region other = {
		.slot = 9,
		.guest_phys_addr = NOWHERE_GPA,
		.memory_size = churn->ram->len,
		.userspace_addr = (uintptr_t)churn->ram->hva,
	};
	while (busy) {
		struct kvm_userspace_memory_region gone = other;
		gone.memory_size = 0;
		SYS(ioctl(churn->m->vm, KVM_SET_USER_MEMORY_REGION, &other));
		SYS(ioctl(churn->m->vm, KVM_SET_USER_MEMORY_REGION, &gone));
		changes++;
		poll(NULL, 0, 1);
	}
	return NULL;
}

static void *watch(void *unused)
{
	poll(NULL, 0, 25000);
	FAIL("vCPUs are stuck after %lu changes of another memslot", (unsigned long)changes);
	return unused;
}

/*
 * Deleting a memslot makes KVM forget all of its page tables. A KVM_PRE_FAULT_MEMORY that is under
 * way (or, before Linux 6.15, comes before the next KVM_RUN) then tries again and again until a
 * signal ends it, and meanwhile keeps the next change of memslots waiting. A VMM changes memslots
 * at any time, so the library must not get there unless it was asked to (KVMFAULT_VM_PRE_FAULT).
 */
static void slot_changes(void)
{
	enum { VCPUS = 3 };
	struct machine m;
	struct ram ram, other;
	struct source source;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	uint64_t list_gpa;
	pthread_t watcher, changer;
	ram_create(&ram, MEMFD, 8ul << 20);
	ram_create(&other, ANON, 64 * PAGE);
	uint64_t pages = ram.len / PAGE;
	machine_create(&m, pages * sizeof(uint32_t));
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	source.window = true;
	options.readahead = 4;
	machine_attach(&m, &source, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	list_sequential(machine_share(&m, pages * sizeof(uint32_t), &list_gpa), pages);
	CHECK(!pthread_create(&watcher, NULL, watch, NULL), "pthread_create");
	struct churn churn = { &m, &other };
	busy = true;
	CHECK(!pthread_create(&changer, NULL, change_slots, &churn), "pthread_create");
	for (uint64_t i = 0; i < VCPUS; i++) {
		uint64_t first = pages * i / VCPUS, end = pages * (i + 1) / VCPUS;
		struct vcpu *v = machine_add_vcpu(&m, i % 2 ? 0 : 3);
		vcpu_load_verify(v, RAM_GPA, list_gpa + first * sizeof(uint32_t), end - first, &source.pattern,
				 READ_FIRST);
		vcpu_start_verify(v);
	}
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(m.vcpu[i]);
	busy = false;
	pthread_join(changer, NULL);
	pattern_check(&source.pattern, ram.hva, 0, pages);
	note("%lu changes", (unsigned long)changes);
	machine_destroy(&m);
	ram_destroy(&ram);
	ram_destroy(&other);
	source_destroy(&source);
}

static const struct test_case cases[] = {
	{ "exits", exits, true },
	{ "slot-changes", slot_changes, true },
};
TEST_MAIN(cases)
