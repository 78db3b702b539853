/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What KVM itself accesses in a guest's memory. A guest that goes on elsewhere (restored, or migrated by post-copy) has told KVM of its areas
 * before it runs, and their pages may be absent: KVM finds them all the same. And the library knows which guests don't go with markers.
 */
#define _GNU_SOURCE
#include "scene.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

enum { PAGES = 64 };
#define VMX (1u << 5) /* in leaf 1, ECX */
#define SVM (1u << 2) /* in leaf 0x80000001, ECX */

/* Documentation/virt/kvm/x86/msr.rst. */
static const struct area {
	const char *name;
	uint32_t msr;
	uint64_t page, offset, len;
	bool written; /* as soon as the vCPU runs */
} areas[] = {
	{ "kvmclock", 0x4b564d01, 40, 36, 32, true }, /* aligned to 4 bytes, and no more */
	{ "async page faults", 0x4b564d02, 43, 64, 64, false },
	{ "steal time", 0x4b564d03, 45, 128, 64, true },
	{ "PV EOI", 0x4b564d04, 47, 256, 4, false },
};
enum { AREAS = sizeof(areas) / sizeof(*areas) };

static bool set_msr(struct vcpu *v, uint32_t index, uint64_t value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} msrs = { { .nmsrs = 1 }, { .index = index, .data = value } };
	return ioctl(v->fd, KVM_SET_MSRS, &msrs) == 1;
}

/* As a VMM does that restores a vCPU; says which areas this KVM takes. */
static void restore(struct vcpu *v, bool taken[AREAS])
{
	for (int i = 0; i < AREAS; i++) {
		taken[i] = set_msr(v, areas[i].msr, RAM_GPA + areas[i].page * PAGE + areas[i].offset + 1);
		printf("%s: %s\n", areas[i].name, taken[i] ? "set" : "not here");
	}
	if (!taken[0] && !taken[2])
		skip("this KVM has neither kvmclock nor steal time");
}

static bool is_present(struct scene *s, uint64_t page)
{
	return kvmfault_pages_state(s->m.library, RAM_GPA + page * PAGE) == KVMFAULT_PAGE_PRESENT;
}

/* The bytes of an area as they were at the source. */
static void pattern_of(struct scene *s, const struct area *a, uint8_t *bytes)
{
	uint8_t pages[2 * PAGE];
	pattern_fill(&s->source.pattern, a->page, pages);
	pattern_fill(&s->source.pattern, a->page + 1, pages + PAGE);
	memcpy(bytes, pages + a->offset, a->len);
}

static void check_areas(struct scene *s, const bool taken[AREAS], bool brought)
{
	uint8_t before[64];
	for (int i = 0; i < AREAS; i++) {
		const struct area *a = &areas[i];
		if (!taken[i])
			continue;
		uint64_t last = a->page + (a->offset + a->len - 1) / PAGE;
		if (brought)
			CHECK(is_present(s, a->page) && is_present(s, last), "%s: a page was not brought", a->name);
		if (!a->written)
			continue;
		UNTIL(is_present(s, a->page) && is_present(s, last)); /* the guest may be ahead of the books */
		pattern_of(s, a, before);
		CHECK(memcmp(s->ram.hva + a->page * PAGE + a->offset, before, a->len), "%s: KVM has written nothing", a->name);
	}
}

/* Their pages are absent when the vCPU first runs. */
static void restored(void)
{
	bool trap = test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP;
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct scene s;
		bool taken[AREAS];
		scene_create(&s, backing, PAGES * PAGE, 0, 0);
		struct vcpu *v = scene_add_vcpu(&s, 3);
		restore(v, taken);
		/* A kick that came before is seen before the guest runs, or while its areas are brought; it is not an error. */
		kvmfault_vcpu_kick(v->handle);
		vcpu_load_verify(v, RAM_GPA, s.list_gpa, 8, &s.source.pattern, READ_FIRST);
		int ret = kvmfault_vcpu_run(v->handle);
		CHECK(ret == KVMFAULT_INTERRUPTED, "%s", vcpu_describe(v, ret));
		scene_visit(&s, v, 0, 8, READ_FIRST);
		check_areas(&s, taken, trap);
		/* Once is enough: what is discarded later is the VMM's to know. */
		unsigned long total = s.source.total;
		scene_visit(&s, v, 0, 8, READ_FIRST);
		EQUAL("resolver calls", s.source.total, total);
		vcpu_detach(v);
		scene_destroy(&s);
	}
}

/* A page of theirs that is lost keeps nobody from running. */
static void lost_area(void)
{
	struct scene s;
	bool taken[AREAS];
	scene_create(&s, MEMFD, PAGES * PAGE, 0, 0);
	struct vcpu *v = scene_add_vcpu(&s, 3);
	for (int i = 0; i < AREAS; i++)
		OK(kvmfault_pages_lost(s.m.library, RAM_GPA + areas[i].page * PAGE, PAGE));
	restore(v, taken); /* which may touch some */
	scene_visit(&s, v, 0, 8, READ_FIRST);
	vcpu_detach(v);
	scene_destroy(&s);
}

/* The same for a VMM that calls KVM_RUN itself. */
static void restored_own_loop(void)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	bool taken[AREAS], trap = test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP;
	struct scene s;
	uint32_t value;
	int ret;
	scene_create(&s, MEMFD, PAGES * PAGE, 0, 0);
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
			check_areas(&s, (bool[AREAS]){ 0, taken[1], 0, taken[3] }, true);
		ret = kvmfault_vcpu_handle_exit(v->handle, ioctl(v->fd, KVM_RUN, 0));
	} while (ret == KVMFAULT_HANDLED || ret == KVMFAULT_INTERRUPTED);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	check_areas(&s, taken, trap);
	vcpu_detach(v);
	scene_destroy(&s);
}

/*
 * System management mode: KVM saves the registers at the vCPU's SMBASE, and reads them from there, in address space 1. The handler is the one
 * instruction that ends it.
 */
static void management_mode(void)
{
	enum { HANDLER = 8, SAVED = 15, SMBASE_MSR = 0x9e }; /* pages: SMBASE + 0x8000, and + 0xfe00 */
	struct scene s;
	uint8_t code[PAGE] = { 0x0f, 0xaa }, before[PAGE]; /* rsm */
	scene_create(&s, MEMFD, PAGES * PAGE, 0, 0);
	struct vcpu *v = scene_add_vcpu(&s, 3);
	if (ioctl(s.m.vm, KVM_CHECK_EXTENSION, KVM_CAP_X86_SMM) <= 0 || !set_msr(v, SMBASE_MSR, RAM_GPA))
		skip("this KVM has no system management mode");
	machine_set_slot(&s.m, &s.ram, 1u << 16 | RAM_SLOT, RAM_GPA);
	OK(kvmfault_pages_install(s.m.library, RAM_GPA + HANDLER * PAGE, code, PAGE));
	SYS(ioctl(v->fd, KVM_SMI));
	scene_visit(&s, v, 0, HANDLER, READ_FIRST);
	UNTIL(is_present(&s, SAVED));
	pattern_fill(&s.source.pattern, SAVED, before);
	CHECK(!memcmp(s.ram.hva + SAVED * PAGE, before, 0xe00), "what is beside the registers has changed");
	CHECK(memcmp(s.ram.hva + SAVED * PAGE + 0xe00, before + 0xe00, 0x200), "KVM has saved nothing");
	vcpu_detach(v);
	scene_destroy(&s);
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
static void plain_guest(struct scene *s)
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
	struct scene s;
	OK(kvmfault_probe(-1, &probe));
	scene_create(&s, MEMFD, PAGES * PAGE, 0, 0);
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
	scene_destroy(&s);
}

static const struct test_case cases[] = {
	{ "restored", restored, true },
	{ "restored-own-loop", restored_own_loop, true },
	{ "lost-area", lost_area, true },
	{ "management-mode", management_mode, true },
	{ "check-guest", check_guest, true },
};
TEST_MAIN(cases)
