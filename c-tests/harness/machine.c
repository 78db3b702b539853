/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <unistd.h>

#define PAGE_TABLES 0x1000ul
#define CODE 0x10000ul
#define SHARED 0x20000ul

extern const uint8_t guest_verify_start[], guest_verify_end[];
extern const uint8_t guest_touch_start[], guest_touch_end[];
extern const uint8_t guest_script_start[], guest_script_end[];
extern const uint8_t guest_walk_start[], guest_walk_end[];

static const struct {
	const uint8_t *start, *end;
} guests[] = {
	{ guest_verify_start, guest_verify_end },
	{ guest_touch_start, guest_touch_end },
	{ guest_script_start, guest_script_end },
	{ guest_walk_start, guest_walk_end },
};
enum { VERIFY, TOUCH, SCRIPT, WALK, GUESTS };

/* ---- the machine ---- */

static void write_page_tables(struct machine *m)
{
	enum { ALL = 7 /* present, writable, user */, LARGE = 0x80 };
	uint64_t *pml4 = (uint64_t *)(m->low + PAGE_TABLES), *pdpt = pml4 + 512, *directory = pdpt + 512;

	pml4[0] = (PAGE_TABLES + PAGE) | ALL;
	for (uint64_t i = 0; i < GUEST_LIMIT >> 30; i++)
		pdpt[i] = (PAGE_TABLES + (2 + i) * PAGE) | ALL;
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
	m->low_len = round_up(SHARED + shared + (MOST_VCPUS + 64) * PAGE, HUGE_PAGE);
	m->low_used = SHARED;
	m->low = mmap(NULL, m->low_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	CHECK(m->low != MAP_FAILED && m->low_len <= RAM_GPA, "%lu bytes of low memory: %s", m->low_len, strerror(errno));
	struct kvm_userspace_memory_region low = { .memory_size = m->low_len, .userspace_addr = (uintptr_t)m->low };
	SYS(ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &low));
	write_page_tables(m);
	for (int i = 0; i < GUESTS; i++) {
		CHECK(guests[i].end - guests[i].start <= (long)PAGE, "guest %d is longer than a page", i);
		memcpy(m->low + CODE + i * PAGE, guests[i].start, guests[i].end - guests[i].start);
	}
}

/* Of the VMs that machine_attach gave a finalizer: how many machine_destroy has freed, and how many the library is done with. */
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
	/* Threads of the library may be in the resolver: memory, and what the resolver uses, must stay until they are done. */
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
	slot.memory = (const int[]){ KVMFAULT_MEMORY_ANON, KVMFAULT_MEMORY_SHARED, KVMFAULT_MEMORY_HUGETLB }[ram->backing];
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
	/* Counters are read one after the other: those before the histogram may be older than it. */
	return machine_stats(m);
}

/* ---- vCPUs ---- */

static void set_mode(struct vcpu *v)
{
	struct kvm_sregs s;
	struct kvm_segment code = {
		.limit = 0xfffff, .selector = v->cpl ? 0x33 : 0x10, .type = 11, .present = 1, .dpl = v->cpl, .s = 1, .l = 1, .g = 1,
	};
	struct kvm_segment data = {
		.limit = 0xfffff, .selector = v->cpl ? 0x2b : 0x18, .type = 3, .present = 1, .dpl = v->cpl, .s = 1, .db = 1, .g = 1,
	};
	SYS(ioctl(v->fd, KVM_GET_SREGS, &s));
	s.cs = code;
	s.ds = s.es = s.fs = s.gs = s.ss = data;
	memset(&s.ldt, 0, sizeof(s.ldt));
	s.tr.present = 1;
	s.tr.type = 11;
	s.cr3 = PAGE_TABLES;
	s.cr4 = 0x620; /* PAE, and SSE as the operating system allows it */
	s.cr0 = 0x80050033;
	s.efer = 0xd01;
	SYS(ioctl(v->fd, KVM_SET_SREGS, &s));
}

struct vcpu *machine_add_vcpu(struct machine *m, int cpl)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid;
	CHECK(m->vcpus < MOST_VCPUS, "too many vCPUs");
	struct vcpu *v = calloc(1, sizeof(*v));
	CHECK(v, "no memory");
	v->machine = m;
	v->number = (int)m->vcpus;
	v->cpl = cpl;
	v->fd = SYS(ioctl(m->vm, KVM_CREATE_VCPU, v->number));
	v->run = mmap(NULL, SYS(ioctl(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0)), PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
	CHECK(v->run != MAP_FAILED, "kvm_run: %s", strerror(errno));
	cpuid.head.nent = 256;
	SYS(ioctl(m->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
	SYS(ioctl(v->fd, KVM_SET_CPUID2, &cpuid));
	set_mode(v);
	machine_share(m, PAGE, &v->stack);
	m->vcpu[m->vcpus++] = v;
	return v;
}

void vcpu_attach(struct vcpu *v)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	options.fd = v->fd;
	options.run = v->run;
	OK(kvmfault_vcpu_new(v->machine->library, &options, &v->handle));
}

void vcpu_detach(struct vcpu *v)
{
	kvmfault_vcpu_free(v->handle);
	v->handle = NULL;
}

bool vcpu_stopped(const struct vcpu *v, uint32_t *value)
{
	if (v->run->exit_reason != KVM_EXIT_IO || v->run->io.port != STOP_PORT)
		return false;
	memcpy(value, (uint8_t *)v->run + v->run->io.data_offset, sizeof(*value));
	return true;
}

const char *vcpu_describe(const struct vcpu *v, int ret)
{
	static _Thread_local char text[512];
	struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	struct kvm_regs regs;
	unsigned long long rip = ioctl(v->fd, KVM_GET_REGS, &regs) ? 0 : regs.rip;
	if (ret < 0)
		snprintf(text, sizeof(text), "vCPU %d at %#llx: %s (%s)", v->number, rip, strerror(-ret), kvmfault_last_error());
	else if (ret == KVMFAULT_MEMORY_ERROR && !kvmfault_vcpu_memory_error(v->handle, &info))
		snprintf(text, sizeof(text), "vCPU %d: memory error at gpa %#llx, lost %d", v->number,
			 (unsigned long long)info.gpa, info.lost);
	else if (v->run->exit_reason == KVM_EXIT_MMIO)
		snprintf(text, sizeof(text), "vCPU %d at %#llx: returned %d, MMIO exit at %#llx, %u bytes, write %u", v->number,
			 rip, ret, v->run->mmio.phys_addr, v->run->mmio.len, v->run->mmio.is_write);
	else if (v->run->exit_reason == KVM_EXIT_INTERNAL_ERROR)
		snprintf(text, sizeof(text), "vCPU %d at %#llx: returned %d, internal error %u", v->number, rip, ret,
			 v->run->internal.suberror);
	else
		snprintf(text, sizeof(text), "vCPU %d at %#llx: returned %d, exit reason %u", v->number, rip, ret,
			 v->run->exit_reason);
	return text;
}

uint32_t vcpu_run(struct vcpu *v)
{
	uint32_t value;
	int ret;
	do
		ret = kvmfault_vcpu_run(v->handle);
	while (ret == KVMFAULT_INTERRUPTED);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	return value;
}

static void *vcpu_thread(void *arg)
{
	struct vcpu *v = arg;
	return v->main(v);
}

void vcpu_start(struct vcpu *v, void *(*main)(struct vcpu *), void *opaque)
{
	v->main = main;
	v->opaque = opaque;
	int error = pthread_create(&v->thread, NULL, vcpu_thread, v);
	CHECK(!error, "pthread_create: %s", strerror(error));
}

void vcpu_join(struct vcpu *v)
{
	pthread_join(v->thread, NULL);
}

/* ---- guests ---- */

static void load(struct vcpu *v, int guest, struct kvm_regs *regs)
{
	regs->rip = CODE + guest * PAGE;
	regs->rsp = v->stack + PAGE;
	regs->rflags = 0x3002; /* I/O privilege level 3 */
	SYS(ioctl(v->fd, KVM_SET_REGS, regs));
}

void vcpu_load_verify(struct vcpu *v, uint64_t gpa, uint64_t list, uint64_t count, const struct pattern *pattern, int mode)
{
	struct kvm_regs regs = {
		.rdi = gpa,
		.rsi = list,
		.rcx = count,
		.r8 = pattern->factor,
		.r9 = pattern->zero_mask,
		.r10 = v->cpl == 3 ? 1 : 73, /* emulation is slow */
		.r12 = mode,
	};
	load(v, VERIFY, &regs);
}

void vcpu_verify(struct vcpu *v)
{
	vcpu_check_verified(v, vcpu_run(v));
}

void vcpu_check_verified(struct vcpu *v, uint32_t stopped_with)
{
	struct kvm_regs r;
	if (stopped_with == 0)
		return;
	SYS(ioctl(v->fd, KVM_GET_REGS, &r));
	FAIL("vCPU %d (CPL %d) found %#llx at %#llx, not %#llx", v->number, v->cpl, r.rbx, r.rdi, r.rdx);
}

static void *verify(struct vcpu *v)
{
	vcpu_attach(v);
	vcpu_verify(v);
	vcpu_detach(v);
	return NULL;
}

void vcpu_start_verify(struct vcpu *v)
{
	vcpu_start(v, verify, NULL);
}

void vcpu_load_touch(struct vcpu *v, uint64_t gpa, uint64_t pages, uint64_t step)
{
	struct kvm_regs regs = { .rdi = gpa, .rcx = pages, .rdx = step };
	load(v, TOUCH, &regs);
}

void vcpu_load_walk(struct vcpu *v, uint64_t gpa, uint64_t list, uint64_t count, uint64_t times)
{
	struct kvm_regs regs = { .rdi = gpa, .rsi = list, .rcx = count, .r8 = times };
	load(v, WALK, &regs);
}

void vcpu_load_script(struct vcpu *v, uint64_t first_step)
{
	struct kvm_regs regs = { .rdi = first_step };
	load(v, SCRIPT, &regs);
}

void list_sequential(uint32_t *list, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		list[i] = (uint32_t)i;
}

void list_shuffle(uint32_t *list, uint64_t count, uint64_t seed)
{
	list_sequential(list, count);
	for (uint64_t i = count - 1; i > 0; i--) {
		uint64_t other = random_number(&seed) % (i + 1);
		uint32_t swap = list[i];
		list[i] = list[other];
		list[other] = swap;
	}
}

/* ---- what KVM does here ---- */

/* Reads an absent page at CPL 0, and asks the library how it came to know. */
static bool reads_by_mmio(int mechanism)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct machine m;
	struct ram ram;
	struct source source;
	uint64_t steps_gpa;
	machine_create(&m, PAGE);
	ram_create(&ram, MEMFD, PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	options.mechanism = mechanism;
	machine_attach(&m, &source, &options);
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	OK(kvmfault_memslot_set(m.library, &slot));
	struct step *steps = machine_share(&m, PAGE, &steps_gpa);
	steps[0] = (struct step){ READ64, RAM_GPA, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 0, 0 };
	struct vcpu *v = machine_add_vcpu(&m, 0);
	vcpu_load_script(v, steps_gpa);
	vcpu_attach(v);
	vcpu_run(v);
	bool by_mmio = machine_stats(&m).mmio_reads > 0;
	vcpu_detach(v);
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
	return by_mmio;
}

static void require_linux_6_2(const char *else_what)
{
	struct utsname name;
	int major = 0, minor = 0;
	SYS(uname(&name));
	EQUAL("numbers in the kernel's release", sscanf(name.release, "%d.%d", &major, &minor), 2);
	if (major < 6 || (major == 6 && minor < 2))
		skip("%s", else_what);
}

void require_interruptible_sleep(void)
{
	if (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD)
		require_linux_6_2("before Linux 6.2 a vCPU that sleeps in userfaultfd can't be interrupted");
}

void require_interruptible_sleep_in_slow_slots(void)
{
	require_linux_6_2("before Linux 6.2 a vCPU that sleeps in a slot without the fast path can't be interrupted");
}

bool cpl0_comes_as_mmio(void)
{
	return reads_by_mmio(test_mechanism());
}

bool cpl0_is_emulated(void)
{
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	return probe.mechanisms_shared & 1u << KVMFAULT_MECHANISM_POISON_TRAP && reads_by_mmio(KVMFAULT_MECHANISM_POISON_TRAP);
}
