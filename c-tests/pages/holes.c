/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * PRESENT pages without memory: holes that were there when the slot was set with
 * KVMFAULT_MEMSLOT_PRESENT, or that the VMM made without a call to the library. They read as zeros,
 * for guests and threads.
 */
#define _GNU_SOURCE
#include "slot_vm.h"
#include "postcopy_vmm.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { UNITS = 16 };

static uint64_t gpa_of(const struct slot_vm *s, uint64_t unit)
{
	return RAM_GPA + unit * s->ram.page;
}

/*
 * Nothing is in unit `n` of the memory; each way to touch it finds zeros, and what is written there
 * stays.
 */
static void touch_all(struct slot_vm *s)
{
	uint64_t unit = 0;
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		struct vcpu *v = slot_vm_add_vcpu(s, cpl);
		EQUAL("what a vCPU reads", slot_vm_read(s, v, gpa_of(s, unit) + 8), 0);
		slot_vm_write(s, v, gpa_of(s, unit) + 8, 0x1234);
		EQUAL("what a vCPU reads back", slot_vm_read(s, v, gpa_of(s, unit) + 8), 0x1234);
		EQUAL("what a thread reads", *(uint64_t *)(s->ram.hva + unit * s->ram.page + 8), 0x1234);
		unit++;
		slot_vm_write(s, v, gpa_of(s, unit) + 16, 0x5678);
		EQUAL("what a vCPU reads back", slot_vm_read(s, v, gpa_of(s, unit) + 16), 0x5678);
		EQUAL("the rest of the page", slot_vm_read(s, v, gpa_of(s, unit) + 24), 0);
		unit++;
		EQUAL("what a thread reads", *(volatile uint64_t *)(s->ram.hva + unit * s->ram.page), 0);
		*(volatile uint64_t *)(s->ram.hva + unit * s->ram.page) = 0x9abc;
		EQUAL("what a vCPU reads", slot_vm_read(s, v, gpa_of(s, unit)), 0x9abc);
		unit++;
		uint64_t word = 1;
		struct iovec local = { &word, 8 }, remote = { s->ram.hva + unit * s->ram.page, 8 };
		EQUAL("bytes that a system call reads", process_vm_readv(getpid(), &local, 1, &remote, 1, 0), 8);
		EQUAL("what it reads", word, 0);
		unit++;
		OK(kvmfault_pages_resolve(s->m.library, gpa_of(s, unit), s->ram.page));
		OK(kvmfault_vcpu_resolve(v->handle, gpa_of(s, unit), 8));
		EQUAL("what a vCPU reads", slot_vm_read(s, v, gpa_of(s, unit)), 0);
		unit++;
		vcpu_detach(v);
	}
	EQUAL("resolver calls", s->source.total, 0);
	EQUAL("pages absent", kvmfault_pages_absent(s->m.library), 0);
}

static void present(enum memory_kind kind)
{
	struct slot_vm s;
	slot_vm_create_of(&s, kind, UNITS, KVMFAULT_MEMSLOT_PRESENT);
	touch_all(&s);
	/* With the flag KVM's own fault may put a page of its own there. */
	if (test_mechanism() != KVMFAULT_MECHANISM_MEMSLOT_FLAG)
		CHECK(machine_settled_stats(&s.m).pages_empty >= 8, "only %lu pages were found empty",
		      machine_stats(&s.m).pages_empty);
	slot_vm_destroy(&s);
}

static void present_anon(void)
{
	present(OF_ANON);
}
static void present_memfd(void)
{
	present(OF_MEMFD);
}
static void present_hugetlb(void)
{
	present(OF_HUGETLB);
}
static void present_shared_anon(void)
{
	present(OF_SHARED_ANON);
}

/* Holes in a slot whose fast path is off, and turned on later. */
static void slow(void)
{
	for (enum memory_kind kind = OF_ANON; kind <= OF_MEMFD; kind++)
		for (int on = 0; on <= 1; on++) {
			struct slot_vm s;
			slot_vm_create_of(&s, kind, UNITS, KVMFAULT_MEMSLOT_PRESENT | KVMFAULT_MEMSLOT_SLOW);
			if (on)
				OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 1));
			touch_all(&s);
			slot_vm_destroy(&s);
		}
}

/*
 * A VMM drops memory without the library, which it must not. Guests and threads read zeros all the
 * same, and a counter shows it.
 */
static void behind(void)
{
	struct slot_vm s;
	slot_vm_create_of(&s, OF_MEMFD, UNITS, 0);
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	for (int page = 0; page < UNITS; page++)
		EQUAL("before", slot_vm_read(&s, v, gpa_of(&s, page)), pattern_word(&s.source.pattern, page, 0));
	slot_vm_expect_all_present(&s);
	EQUAL("pages found empty", machine_settled_stats(&s.m).pages_empty, 0);
	SYS(madvise(s.ram.hva, s.ram.len, MADV_REMOVE));
	s.source.total = 0;
	vcpu_detach(v);
	touch_all(&s);
	if (test_mechanism() != KVMFAULT_MECHANISM_MEMSLOT_FLAG)
		CHECK(machine_settled_stats(&s.m).pages_empty >= 8, "only %lu pages were found empty",
		      machine_stats(&s.m).pages_empty);
	slot_vm_destroy(&s);
}

/*
 * Another mapping in the place of the memory: an error that names it, for an absent page, and no
 * wait.
 */
static void mapped_over(void)
{
	if (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD)
		skip("KVM uses what is mapped there now, and the library never hears of it");
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		struct slot_vm s;
		slot_vm_create_of(&s, OF_MEMFD, UNITS, 0);
		struct vcpu *v = slot_vm_add_vcpu(&s, cpl);
		int fixed = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
		CHECK(mmap(s.ram.hva, s.ram.len, PROT_READ | PROT_WRITE, fixed, -1, 0) == s.ram.hva, "mmap");
		slot_vm_step(&s, v, (struct step){ READ64, RAM_GPA + PAGE, 0, 0 });
		if (test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP)
			REFUSED(kvmfault_vcpu_run(v->handle), ENOENT, "no longer mapped");
		vcpu_detach(v);
		slot_vm_destroy(&s);
	}
}

/*
 * A VMM with a userfaultfd of its own, which doesn't know of holes: all of its memory is present
 * when the fast path comes on.
 */
static int never(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm, (void)fault;
	FAIL("the resolver is called for gpa %#lx", fault->gpa);
}

static void external(enum backing backing)
{
	if (test_mechanism() != KVMFAULT_MECHANISM_POISON_TRAP)
		skip("what isn't there is asked of the VMM's own userfaultfd");
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct machine m;
	struct ram ram;
	uint64_t steps_gpa;
	machine_create(&m, PAGE);
	ram_create(&ram, backing, UNITS * (backing == HUGETLB ? HUGE_PAGE : PAGE));
	memset(ram.hva, 7, ram.page);
	options.flags = KVMFAULT_VM_EXTERNAL_UFFD;
	options.resolver = never;
	machine_attach(&m, NULL, &options);
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	slot.flags |= KVMFAULT_MEMSLOT_PRESENT;
	OK(kvmfault_memslot_set(m.library, &slot));
	struct step *steps = machine_share(&m, PAGE, &steps_gpa);
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		struct vcpu *v = machine_add_vcpu(&m, cpl);
		vcpu_attach(v);
		for (uint64_t unit = 0; unit < 4; unit++) {
			steps[0] = (struct step){ READ64, RAM_GPA + (unit ? unit + cpl : 0) * ram.page, 0, 0 };
			steps[1] = (struct step){ STOP, 0, 1, 0 };
			vcpu_load_script(v, steps_gpa);
			vcpu_run(v);
			EQUAL("what a vCPU reads", steps[0].value, unit ? 0 : 0x0707070707070707);
		}
		vcpu_detach(v);
	}
	/* Dropped, and said to be there: given back. It takes no memory until it is touched. */
	SYS(madvise(ram.hva, ram.page, MADV_REMOVE));
	uint64_t empty = machine_stats(&m).pages_empty;
	OK(kvmfault_pages_arrived(m.library, ram.hva, ram.page));
	EQUAL("pages found empty", machine_stats(&m).pages_empty, empty);
	struct vcpu *v = machine_add_vcpu(&m, 3);
	vcpu_attach(v);
	steps[0] = (struct step){ READ64, RAM_GPA, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 1, 0 };
	vcpu_load_script(v, steps_gpa);
	vcpu_run(v);
	EQUAL("what a vCPU reads in a page that was given back", steps[0].value, 0);
	vcpu_detach(v);
	machine_destroy(&m);
	ram_destroy(&ram);
}

static void external_memfd(void)
{
	external(MEMFD);
}
static void external_hugetlb(void)
{
	external(HUGETLB);
}

static const struct test_case cases[] = {
	{ "anon", present_anon, true },
	{ "memfd", present_memfd, true },
	{ "shared-anon", present_shared_anon, true },
	{ "hugetlb", present_hugetlb, true },
	{ "slow", slow, true },
	{ "behind", behind, true },
	{ "mapped-over", mapped_over, true },
	{ "external-memfd", external_memfd, true },
	{ "external-hugetlb", external_hugetlb, true },
};
TEST_MAIN(cases)
