/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What KVM itself accesses in a guest's memory. A restored or migrated guest has registered its
 * areas with KVM before it runs, and their pages may be absent: the library resolves them first.
 * And it recognises guests for which markers are not supported.
 */
#define _GNU_SOURCE
#include "slot_vm.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

enum { PAGES = 64 };
#define VMX (1u << 5) /* in leaf 1, ECX */
#define SVM (1u << 2) /* in leaf 0x80000001, ECX */

/* Documentation/virt/kvm/x86/msr.rst. */
static const struct area {
	const char *name;
	uint32_t msr;
	uint64_t page, offset, len;
	bool enable;  /* a bit of the MSR */
	bool written; /* as soon as the vCPU runs */
} areas[] = {
	{ "kvmclock", 0x4b564d01, 40, 36, 32, true, true }, /* aligned to 4 bytes, and no more */
	{ "async page faults", 0x4b564d02, 43, 64, 64, true, false },
	{ "steal time", 0x4b564d03, 45, 128, 64, true, true },
	{ "PV EOI", 0x4b564d04, 47, 256, 4, true, false },
	/* Written when the MSR is; in two pages. */
	{ "wall clock", 0x4b564d00, 50, PAGE - 4, 12, false, false },
};
enum { KVMCLOCK, ASYNC_PF, STEAL_TIME, PV_EOI, WALL_CLOCK, AREAS };
_Static_assert(AREAS == sizeof(areas) / sizeof(*areas), "one each");

static uint64_t msr_value(const struct area *a)
{
	return RAM_GPA + a->page * PAGE + a->offset + a->enable;
}

static bool set_msr(struct vcpu *v, uint32_t index, uint64_t value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} msrs = { { .nmsrs = 1 }, { .index = index, .data = value } };
	return ioctl(v->fd, KVM_SET_MSRS, &msrs) == 1;
}

/* Registers the areas as a VMM that restores a vCPU does; returns which of them this KVM takes. */
static void restore(struct vcpu *v, bool taken[AREAS])
{
	for (int i = 0; i < AREAS; i++) {
		taken[i] = set_msr(v, areas[i].msr, msr_value(&areas[i]));
		printf("%s: %s\n", areas[i].name, taken[i] ? "set" : "not here");
	}
	if (!taken[KVMCLOCK] && !taken[STEAL_TIME])
		skip("this KVM has neither kvmclock nor steal time");
}

static bool is_present(struct slot_vm *s, uint64_t page)
{
	return kvmfault_pages_state(s->m.library, RAM_GPA + page * PAGE) == KVMFAULT_PAGE_PRESENT;
}

/* The bytes of an area as they were at the source. */
static void pattern_of(struct slot_vm *s, const struct area *a, uint8_t *bytes)
{
	uint8_t pages[2 * PAGE];
	pattern_fill(&s->source.pattern, a->page, pages);
	pattern_fill(&s->source.pattern, a->page + 1, pages + PAGE);
	memcpy(bytes, pages + a->offset, a->len);
}

static void check_areas(struct slot_vm *s, const bool taken[AREAS], bool resolved)
{
	uint8_t before[64];
	for (int i = 0; i < AREAS; i++) {
		const struct area *a = &areas[i];
		if (!taken[i])
			continue;
		uint64_t last = a->page + (a->offset + a->len - 1) / PAGE;
		if (resolved)
			CHECK(is_present(s, a->page) && is_present(s, last), "%s: a page was not resolved", a->name);
		if (!a->written)
			continue;
		/* the guest may be ahead of the counters */
		UNTIL(is_present(s, a->page) && is_present(s, last));
		pattern_of(s, a, before);
		CHECK(memcmp(s->ram.hva + a->page * PAGE + a->offset, before, a->len), "%s: KVM has written nothing",
		      a->name);
	}
}

/* Their pages are absent when the vCPU first runs. */
static void restored(void)
{
	bool trap = test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP;
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct slot_vm s;
		bool taken[AREAS];
		slot_vm_create(&s, backing, PAGES * PAGE, 0, 0);
		struct vcpu *v = slot_vm_add_vcpu(&s, 3);
		restore(v, taken);
		/*
		 * An earlier kick is seen before the guest runs, or while its areas are resolved;
		 * it is not an error.
		 */
		kvmfault_vcpu_kick(v->handle);
		vcpu_load_verify(v, RAM_GPA, s.list_gpa, 8, &s.source.pattern, READ_FIRST);
		int ret = kvmfault_vcpu_run(v->handle);
		CHECK(ret == KVMFAULT_INTERRUPTED, "%s", vcpu_describe(v, ret));
		slot_vm_visit(&s, v, 0, 8, READ_FIRST);
		check_areas(&s, taken, trap);
		/* Once is enough: what is discarded later is the VMM's to know. */
		unsigned long total = s.source.total;
		slot_vm_visit(&s, v, 0, 8, READ_FIRST);
		EQUAL("resolver calls", s.source.total, total);
		vcpu_detach(v);
		slot_vm_destroy(&s);
	}
}

/* A lost page of such an area does not keep the vCPU from running. */
static void lost_area(void)
{
	struct slot_vm s;
	bool taken[AREAS];
	slot_vm_create(&s, MEMFD, PAGES * PAGE, 0, 0);
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	for (int i = 0; i < AREAS; i++)
		OK(kvmfault_pages_lost(s.m.library, RAM_GPA + areas[i].page * PAGE, PAGE));
	restore(v, taken); /* which may touch some */
	slot_vm_visit(&s, v, 0, 8, READ_FIRST);
	vcpu_detach(v);
	slot_vm_destroy(&s);
}

/* The areas are resolved for a VMM that calls KVM_RUN itself, too. */
static void restored_own_loop(void)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	bool taken[AREAS], trap = test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP;
	struct slot_vm s;
	uint32_t value;
	int ret;
	slot_vm_create(&s, MEMFD, PAGES * PAGE, 0, 0);
	struct vcpu *v = machine_add_vcpu(&s.m, 3);
	options.fd = v->fd;
	options.run = v->run;
	options.flags = KVMFAULT_VCPU_RESUMES;
	OK(kvmfault_vcpu_new(s.m.library, &options, &v->handle));
	restore(v, taken);
	vcpu_load_verify(v, RAM_GPA, s.list_gpa, 8, &s.source.pattern, READ_FIRST);
	do {
		OK(kvmfault_vcpu_resume(v->handle));
		if (trap)
			check_areas(&s,
				    (bool[AREAS]){ [ASYNC_PF] = taken[ASYNC_PF],
						   [PV_EOI] = taken[PV_EOI],
						   [WALL_CLOCK] = taken[WALL_CLOCK] },
				    true);
		ret = kvmfault_vcpu_handle_exit(v->handle, ioctl(v->fd, KVM_RUN, 0));
	} while (ret == KVMFAULT_HANDLED || ret == KVMFAULT_INTERRUPTED);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	check_areas(&s, taken, trap);
	vcpu_detach(v);
	slot_vm_destroy(&s);
}

/* ---- areas that a guest names while it runs ---- */

static struct vcpu *later_vcpu;
/* the first fault at these pages gets that instead */
static enum trouble { NONE, KICK, FAILURE } trouble_at[PAGES];
/* the page of the last one that got a kick */
static uint64_t asked_for;

static int install(struct kvmfault_vm *vm, uint64_t page)
{
	uint8_t bytes[PAGE];
	pattern_fill(&PATTERN, page, bytes);
	return kvmfault_pages_install(vm, RAM_GPA + page * PAGE, bytes, PAGE);
}

static int resolve_later(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	uint64_t page = (fault->gpa - RAM_GPA) / PAGE;
	(void)opaque;
	enum trouble trouble = trouble_at[page];
	trouble_at[page] = NONE;
	if (trouble == NONE)
		return install(vm, page);
	if (trouble == FAILURE)
		return -EIO;
	asked_for = page;
	kvmfault_vcpu_kick(later_vcpu->handle);
	return KVMFAULT_PENDING;
}

/* Which MSRs a guest can set: as the guest will, but from outside, and with no address. */
static void find_msrs(struct vcpu *v, bool taken[AREAS])
{
	for (int i = 0; i < AREAS; i++)
		/* which wants more than an address */
		taken[i] = set_msr(v, areas[i].msr, 0) && i != ASYNC_PF;
	if (!taken[KVMCLOCK] && !taken[STEAL_TIME])
		skip("this KVM has neither kvmclock nor steal time");
}

/* Guest code: sets them, and stops. */
static void put_writes(uint8_t *code, const bool taken[AREAS])
{
	for (int i = 0; i < AREAS; i++) {
		uint32_t value = (uint32_t)msr_value(&areas[i]);
		if (!taken[i])
			continue;
		*code++ = 0xb9; /* mov ecx, imm32 */
		memcpy(code, &areas[i].msr, 4);
		code[4] = 0xb8; /* mov eax, imm32 */
		memcpy(code + 5, &value, 4);
		/* xor edx, edx; wrmsr */
		memcpy(code + 9, (uint8_t[]){ 0x31, 0xd2, 0x0f, 0x30 }, 4);
		code += 13;
	}
	/* stop: out STOP_PORT, eax; jmp stop */
	memcpy(code, (uint8_t[]){ 0xe7, STOP_PORT, 0xeb, 0xfc }, 4);
}

static void check_wall_clock(const struct ram *ram)
{
	struct {
		uint32_t version, sec, nsec;
	} clock;
	memcpy(&clock, ram->hva + areas[WALL_CLOCK].page * PAGE + areas[WALL_CLOCK].offset, sizeof(clock));
	CHECK(clock.version && clock.version % 2 == 0, "the wall clock has version %u", clock.version);
	CHECK(clock.sec <= time(NULL) && clock.sec > time(NULL) - 600, "the VM started at %u, and it is %lu", clock.sec,
	      time(NULL));
}

static int run_once(struct vcpu *v, bool own_loop)
{
	return own_loop ? kvmfault_vcpu_handle_exit(v->handle, ioctl(v->fd, KVM_RUN, 0)) : kvmfault_vcpu_run(v->handle);
}

/* Then the VM has no filter any more: the writes are no exits. */
static void without_library(struct machine *m, const struct ram *ram, struct vcpu *v, const struct kvm_regs *regs)
{
	struct kvmfault_memslot slot = slot_on(ram, RAM_SLOT, RAM_GPA);
	struct kvm_userspace_memory_region region = {
		.slot = RAM_SLOT,
		.guest_phys_addr = RAM_GPA,
		.memory_size = ram->len,
		.userspace_addr = (uintptr_t)ram->hva,
	};
	uint32_t value;
	slot.len = 0;
	OK(kvmfault_memslot_set(m->library, &slot));
	vcpu_detach(v);
	kvmfault_vm_free(m->library);
	m->library = NULL;
	SYS(ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &region));
	SYS(ioctl(v->fd, KVM_SET_REGS, regs));
	SYS(ioctl(v->fd, KVM_RUN, 0));
	CHECK(vcpu_stopped(v, &value), "%s", vcpu_describe(v, KVMFAULT_PASS));
}

static void name_later(bool own_loop, enum trouble trouble)
{
	enum { CODE = 8 };
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	bool taken[AREAS], trap = test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP;
	uint8_t code[PAGE] = { 0 }, before[2 * PAGE];
	struct machine m;
	struct ram ram;
	struct kvm_regs regs = { .rip = RAM_GPA + CODE * PAGE, .rflags = 2 };
	uint32_t value;
	int ret, troubles = 0;
	printf("%s%s\n", own_loop ? "own loop" : "run",
	       trouble == KICK      ? ", kicks"
	       : trouble == FAILURE ? ", failures"
				    : "");
	ram_create(&ram, MEMFD, PAGES * PAGE);
	machine_create(&m, 0);
	options.resolver = resolve_later;
	options.flags = KVMFAULT_VM_FILTER_MSRS;
	machine_attach(&m, NULL, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = later_vcpu = machine_add_vcpu(&m, 0);
	find_msrs(v, taken);
	put_writes(code, taken);
	OK(kvmfault_pages_install(m.library, regs.rip, code, PAGE));
	SYS(ioctl(v->fd, KVM_SET_REGS, &regs));
	vcpu_attach(v);
	for (int i = 0; i < AREAS; i++)
		trouble_at[areas[i].page] = taken[i] ? trouble : NONE;
	while ((ret = run_once(v, own_loop)) == KVMFAULT_HANDLED || ret == KVMFAULT_INTERRUPTED || ret == -EIO) {
		if (ret == KVMFAULT_INTERRUPTED && asked_for) {
			troubles++;
			OK(install(m.library, asked_for));
			asked_for = 0;
		}
		for (; ret == -EIO; troubles++)
			ret = own_loop ? kvmfault_vcpu_resume(v->handle) : KVMFAULT_HANDLED;
	}
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	for (int i = 0; i < AREAS; i++) {
		const struct area *a = &areas[i];
		/* KVM writes the area of PV EOI with an interrupt. */
		if (!taken[i] || (i == PV_EOI && !trap))
			continue;
		printf("%s\n", a->name);
		CHECK(trouble_at[a->page] == NONE, "the page was not asked for");
		/* With userfaultfd the guest is ahead of the counters. */
		UNTIL(kvmfault_pages_state(m.library, RAM_GPA + a->page * PAGE) == KVMFAULT_PAGE_PRESENT);
		pattern_fill(&PATTERN, a->page, before);
		pattern_fill(&PATTERN, a->page + 1, before + PAGE);
		const uint8_t *after = ram.hva + a->page * PAGE;
		CHECK(i == PV_EOI || memcmp(after + a->offset, before + a->offset, a->len), "KVM has written nothing");
		CHECK(!memcmp(after, before, a->offset), "what is before it has changed");
		uint64_t end = a->offset + a->len, pages = end > PAGE ? 2 : 1;
		CHECK(!memcmp(after + end, before + end, pages * PAGE - end), "what is behind it has changed");
	}
	if (taken[WALL_CLOCK])
		check_wall_clock(&ram);
	CHECK(trouble == NONE || troubles >= 3, "%d times trouble", troubles);
	without_library(&m, &ram, v, &regs);
	machine_destroy(&m);
	ram_destroy(&ram);
}

static void named_later(void)
{
	name_later(false, NONE);
	name_later(true, NONE);
	if (test_mechanism() != KVMFAULT_MECHANISM_POISON_TRAP)
		return; /* KVM itself waits for the page, deaf to kicks */
	name_later(false, KICK);
	name_later(false, FAILURE);
	name_later(true, FAILURE);
}

/*
 * System management mode: KVM saves the registers at the vCPU's SMBASE, and reads them from there,
 * in address space 1. The handler is the one instruction that ends it.
 */
static void management_mode(void)
{
	/* pages: SMBASE + 0x8000, and + 0xfe00 */
	enum { HANDLER = 8, SAVED = 15, SMBASE_MSR = 0x9e };
	struct slot_vm s;
	uint8_t code[PAGE] = { 0x0f, 0xaa }, before[PAGE]; /* rsm */
	slot_vm_create(&s, MEMFD, PAGES * PAGE, 0, 0);
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	if (ioctl(s.m.vm, KVM_CHECK_EXTENSION, KVM_CAP_X86_SMM) <= 0 || !set_msr(v, SMBASE_MSR, RAM_GPA))
		skip("this KVM has no system management mode");
	machine_set_slot(&s.m, &s.ram, 1u << 16 | RAM_SLOT, RAM_GPA);
	OK(kvmfault_pages_install(s.m.library, RAM_GPA + HANDLER * PAGE, code, PAGE));
	SYS(ioctl(v->fd, KVM_SMI));
	slot_vm_visit(&s, v, 0, HANDLER, READ_FIRST);
	UNTIL(is_present(&s, SAVED));
	pattern_fill(&s.source.pattern, SAVED, before);
	CHECK(!memcmp(s.ram.hva + SAVED * PAGE, before, 0xe00), "what is beside the registers has changed");
	CHECK(memcmp(s.ram.hva + SAVED * PAGE + 0xe00, before + 0xe00, 0x200), "KVM has saved nothing");
	vcpu_detach(v);
	slot_vm_destroy(&s);
}

/* ---- which guests ---- */

static struct {
	struct kvm_cpuid2 head;
	struct kvm_cpuid_entry2 entries[256];
} cpuid;

static struct kvm_cpuid_entry2 *leaf(uint32_t function)
{
	for (uint32_t i = 0; i < cpuid.head.nent; i++)
		if (cpuid.entries[i].function == function)
			return &cpuid.entries[i];
	CHECK(cpuid.head.nent < 256, "too many leaves");
	cpuid.entries[cpuid.head.nent].function = function;
	return &cpuid.entries[cpuid.head.nent++];
}

/* What KVM can do, without nesting. */
static void plain_guest(struct slot_vm *s)
{
	cpuid.head.nent = 256;
	SYS(ioctl(s->m.kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
	leaf(1)->ecx &= ~VMX;
	leaf(0x80000001)->ecx &= ~SVM;
}

static void nested_vmx(void)
{
	leaf(1)->ecx |= VMX;
}

static void nested_svm(void)
{
	leaf(0x80000001)->ecx |= SVM;
}

static void hypervisor(const char *signature)
{
	struct kvm_cpuid_entry2 *l = leaf(0x40000000);
	l->eax = 0x40000001;
	memcpy(&l->ebx, signature, 4);
	memcpy(&l->ecx, signature + 4, 4);
	memcpy(&l->edx, signature + 8, 4);
}

static void hyper_v(void)
{
	hypervisor("Microsoft Hv");
	memcpy(&leaf(0x40000001)->eax, "Hv#1", 4);
}

static void xen(void)
{
	hypervisor("XenVMMXenVMM");
}

static void check_guest(void)
{
	static const struct {
		void (*change)(void);
		const char *why;
	} guests[] = { { nested_vmx, "VMX" }, { nested_svm, "SVM" }, { hyper_v, "Hyper-V" }, { xen, "Xen" } };
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	bool trap = test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP;
	struct slot_vm s;
	OK(kvmfault_probe(-1, &probe));
	slot_vm_create(&s, MEMFD, PAGES * PAGE, 0, 0);
	plain_guest(&s);
	struct vcpu *v = machine_add_vcpu(&s.m, 3);
	SYS(ioctl(v->fd, KVM_SET_CPUID2, &cpuid));
	if (trap && !probe.two_dimensional_paging)
		REFUSED(kvmfault_vm_check_guest(s.m.library, v->fd), EOPNOTSUPP, "EPT");
	else
		OK(kvmfault_vm_check_guest(s.m.library, v->fd));
	for (unsigned i = 0; i < sizeof(guests) / sizeof(*guests); i++) {
		plain_guest(&s);
		guests[i].change();
		v = machine_add_vcpu(&s.m, 3);
		SYS(ioctl(v->fd, KVM_SET_CPUID2, &cpuid));
		if (trap)
			REFUSED(kvmfault_vm_check_guest(s.m.library, v->fd), EOPNOTSUPP, guests[i].why);
		else
			OK(kvmfault_vm_check_guest(s.m.library, v->fd));
	}
	REFUSED(kvmfault_vm_check_guest(s.m.library, -1), EBADF, "vcpu_fd");
	REFUSED(kvmfault_vm_check_guest(s.m.library, s.m.vm), EINVAL, "vcpu_fd");
	slot_vm_destroy(&s);
}

static const struct test_case cases[] = {
	{ "restored", restored, true },
	{ "restored-own-loop", restored_own_loop, true },
	{ "lost-area", lost_area, true },
	{ "named-later", named_later, true },
	{ "management-mode", management_mode, true },
	{ "check-guest", check_guest, true },
};
TEST_MAIN(cases)
