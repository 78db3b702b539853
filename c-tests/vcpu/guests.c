/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Guests whose memory is all absent, as when a whole VM is restored: code, stack and tables (of
 * pages, segments, interrupts) are fetched lazily, too. Long mode at CPL 0, 32-bit protected mode
 * with and without paging, and a guest with the in-kernel interrupt controller, its timer, kvmclock
 * and steal time (guest/lazy.S, guest/clock.S).
 *
 * Each guest first runs with all of its memory present and without the library: where KVM can't run
 * it at all, the case is skipped.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

extern const uint8_t guest_lazy64_start[], guest_lazy64_end[], guest_lazy32_start[], guest_lazy32_end[];
extern const uint8_t guest_clock_start[], guest_clock_end[], guest_clock_handler[];

/* Where things are in the guest's memory, in pages. */
enum {
	TOP_TABLE = 0, /* of page tables: PML4, or the directory of 32-bit paging */
	PDPT,
	DIRECTORY,
	LOW_DIRECTORY,
	GDT,
	IDT,
	TICKS,
	CLOCK,
	STEAL,
	TABLES = 16, /* the lowest level: RAM_PAGES / 512 (32-bit: / 1024) */
	CODE = 32,
	STACK_END = 96,
	DEPTH = 24,
	DATA = 1024,
	DATA_PAGES = 1024,
	RAM_PAGES = 4096,
};
#define RAM_LEN (RAM_PAGES * PAGE)
#define AT(page) (RAM_GPA + (uint64_t)(page)*PAGE)

enum kind { LONG_MODE, PROTECTED, PROTECTED_PAGED, TIMER };
static const char *const kind_name[] = { "a long-mode guest at CPL 0", "a 32-bit guest", "a 32-bit guest with paging",
					 "a guest with the in-kernel interrupt controller" };

/* What guest/clock.S and we share. */
struct clock_guest {
	uint8_t idt_pointer[16];
	uint64_t ticks, wanted, initial_count, clock, steal, data, pages, factor, done, pad[5];
	struct sample {
		uint32_t version, pad;
		uint64_t tsc_timestamp, system_time;
		uint32_t multiplier;
		int8_t shift;
		uint8_t flags, pad2[2];
		uint64_t tsc, pad3[3];
	} samples[3];
};
_Static_assert(offsetof(struct clock_guest, done) == 80 && offsetof(struct clock_guest, samples) == 128,
	       "as in clock.S");
_Static_assert(offsetof(struct sample, tsc) == 32 && sizeof(struct sample) == 64, "as in clock.S");

/* ---- what is to be restored ---- */

static struct pattern pattern = { .factor = 0x9e3779b97f4a7c15ul };

static void put_code(uint8_t *image, const uint8_t *start, const uint8_t *end)
{
	CHECK(end - start <= (STACK_END - CODE - DEPTH - 1) * (long)PAGE, "the code is too long");
	memcpy(image + CODE * PAGE, start, end - start);
}

static void put_tables64(uint8_t *image)
{
	/* Present and writable; the processor sets accessed and dirty. */
	enum { ALL = 3, LARGE = 0x80 };
	uint64_t *words = (uint64_t *)image;
	words[TOP_TABLE * 512] = AT(PDPT) | ALL;
	words[PDPT * 512] = AT(LOW_DIRECTORY) | ALL; /* ordinary memory at 0 */
	words[LOW_DIRECTORY * 512] = 0 | ALL | LARGE;
	words[PDPT * 512 + (RAM_GPA >> 30)] = AT(DIRECTORY) | ALL;
	for (int i = 0; i < RAM_PAGES / 512; i++)
		words[DIRECTORY * 512 + i] = AT(TABLES + i) | ALL;
	for (int i = 0; i < RAM_PAGES; i++)
		words[TABLES * 512 + i] = AT(i) | ALL;
}

static void put_tables32(uint8_t *image)
{
	enum { ALL = 3 };
	uint32_t *words = (uint32_t *)image;
	for (int i = 0; i < RAM_PAGES / 1024; i++)
		words[TOP_TABLE * 1024 + (RAM_GPA >> 22) + i] = (uint32_t)AT(TABLES + i) | ALL;
	for (int i = 0; i < RAM_PAGES; i++)
		words[TABLES * 1024 + i] = (uint32_t)AT(i) | ALL;
}

static void put_interrupts(uint8_t *image)
{
	uint64_t *gdt = (uint64_t *)(image + GDT * PAGE), *gate = (uint64_t *)(image + IDT * PAGE) + 2 * 0x40;
	uint64_t handler = AT(CODE) + (guest_clock_handler - guest_clock_start);
	gdt[2] = 0x00af9b000000ffff; /* 64-bit code */
	gdt[3] = 0x00cf93000000ffff;
	gate[0] = (handler & 0xffff) | 0x10ull << 16 | 0x8e00ull << 32 | (handler >> 16 & 0xffff) << 48;
	gate[1] = handler >> 32;
}

static uint8_t *make_image(enum kind kind)
{
	uint8_t *image = mmap(NULL, RAM_LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(image != MAP_FAILED, "mmap: %s", strerror(errno));
	if (kind == LONG_MODE || kind == TIMER)
		put_tables64(image);
	if (kind == PROTECTED_PAGED)
		put_tables32(image);
	if (kind == LONG_MODE)
		put_code(image, guest_lazy64_start, guest_lazy64_end);
	else if (kind == TIMER)
		put_code(image, guest_clock_start, guest_clock_end);
	else
		put_code(image, guest_lazy32_start, guest_lazy32_end);
	if (kind == TIMER)
		put_interrupts(image);
	for (uint64_t page = 0; page < DATA_PAGES; page++)
		pattern_fill(&pattern, page, image + (DATA + page) * PAGE);
	return image;
}

struct source_of_image {
	const uint8_t *image;
	_Atomic uint32_t calls[RAM_PAGES];
};

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct source_of_image *source = opaque;
	source->calls[(fault->gpa - RAM_GPA) / PAGE]++;
	OK(kvmfault_pages_install(vm, fault->gpa, source->image + (fault->gpa - RAM_GPA), fault->len));
	return KVMFAULT_RESOLVED;
}

/* ---- the vCPU ---- */

static struct vcpu *add_vcpu(struct machine *m, enum kind kind, uint64_t shared)
{
	if (kind == TIMER)
		SYS(ioctl(m->vm, KVM_CREATE_IRQCHIP, 0));
	struct vcpu *v = machine_add_vcpu(m, 0);
	struct kvm_sregs s;
	struct kvm_regs r = {
		.rip = AT(CODE),
		.rsp = AT(STACK_END),
		.rflags = 2,
		.rdi = kind == TIMER ? shared : AT(DATA),
		.rcx = DATA_PAGES,
		.rdx = DEPTH,
		.r8 = pattern.factor,
		.rbx = (uint32_t)pattern.factor,
	};
	SYS(ioctl(v->fd, KVM_GET_SREGS, &s));
	s.cr3 = AT(TOP_TABLE);
	if (kind == TIMER) {
		s.gdt.base = AT(GDT);
		s.gdt.limit = 4 * 8 - 1;
	}
	if (kind == PROTECTED || kind == PROTECTED_PAGED) {
		s.cr0 = kind == PROTECTED ? 0x33 : 0x80010033;
		s.cr4 = 0;
		s.efer = 0;
		s.cs.l = 0;
		s.cs.db = 1;
		s.cs.limit = s.ds.limit = s.es.limit = s.ss.limit = 0xffffffff;
		if (kind == PROTECTED)
			s.cr3 = 0;
	}
	SYS(ioctl(v->fd, KVM_SET_SREGS, &s));
	SYS(ioctl(v->fd, KVM_SET_REGS, &r));
	return v;
}

/* A feature that KVM offers to guests: a bit of CPUID. */
static bool offers(struct machine *m, uint32_t function, bool ecx, unsigned bit)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid;
	cpuid.head.nent = 256;
	SYS(ioctl(m->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
	for (uint32_t i = 0; i < cpuid.head.nent; i++)
		if (cpuid.entries[i].function == function)
			return (ecx ? cpuid.entries[i].ecx : cpuid.entries[i].eax) >> bit & 1;
	return false;
}

#define KVM_FEATURES 0x40000001
enum { WANTED_TICKS = 20, TICK_NS = 2000000 };

static struct clock_guest *share_clock(struct machine *m, uint64_t *gpa)
{
	struct clock_guest *g = machine_share(m, PAGE, gpa);
	uint16_t limit = PAGE - 1;
	uint64_t base = AT(IDT);
	memcpy(g->idt_pointer, &limit, 2);
	memcpy(g->idt_pointer + 2, &base, 8);
	g->ticks = AT(TICKS);
	g->wanted = WANTED_TICKS;
	g->initial_count = TICK_NS; /* KVM's local APIC counts nanoseconds */
	g->clock = offers(m, KVM_FEATURES, false, 3) ? AT(CLOCK) : 0;
	g->steal = offers(m, KVM_FEATURES, false, 5) ? AT(STEAL) : 0;
	g->data = AT(DATA);
	g->pages = DATA_PAGES;
	g->factor = pattern.factor;
	return g;
}

/* In a child: all memory present, no library. Exits with 0 if the guest did what it should. */
static void run_control(enum kind kind)
{
	struct machine m;
	uint64_t shared;
	uint32_t value = 0;
	uint8_t *image = make_image(kind);
	machine_create(&m, PAGE);
	struct clock_guest *g = share_clock(&m, &shared);
	struct kvm_userspace_memory_region region = {
		.slot = RAM_SLOT,
		.guest_phys_addr = RAM_GPA,
		.memory_size = RAM_LEN,
		.userspace_addr = (uintptr_t)image,
	};
	SYS(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &region));
	struct vcpu *v = add_vcpu(&m, kind, shared);
	if (kind == TIMER && !offers(&m, 1, true, 21))
		skip("KVM offers no x2APIC");
	alarm(20);
	do {
		if (ioctl(v->fd, KVM_RUN, 0) < 0 && errno != EINTR)
			skip("KVM_RUN: %s", strerror(errno));
	} while (v->run->exit_reason == KVM_EXIT_INTR);
	if (!vcpu_stopped(v, &value))
		skip("%s", vcpu_describe(v, KVMFAULT_PASS));
	CHECK(value == 0 && (kind != TIMER || g->done == DATA_PAGES), "a wrong guest: stops with %u after %lu pages",
	      value, g->done);
	_exit(0);
}

static bool two_dimensional(void)
{
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	return probe.two_dimensional_paging;
}

static void require_guest(enum kind kind)
{
	char text[512] = "";
	int output[2], status;
	SYS(pipe(output));
	fflush(stdout);
	pid_t child = SYS(fork());
	if (child == 0) {
		dup2(output[1], 1);
		close(output[0]);
		run_control(kind);
	}
	close(output[1]);
	for (size_t length = 0; length < sizeof(text) - 1;) {
		ssize_t n = read(output[0], text + length, sizeof(text) - 1 - length);
		if (n <= 0)
			break;
		length += n;
	}
	close(output[0]);
	waitpid(child, &status, 0);
	CHECK(status == 0 || !two_dimensional(), "the guest is wrong, or KVM is: status %#x, %s", status, text);
	if (WIFSIGNALED(status))
		skip("this KVM can't run %s, all of its memory present: it does nothing", kind_name[kind]);
	CHECK(WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 77, "the guest is wrong: %s", text);
	if (status)
		skip("this KVM can't run %s, all of its memory present: %s", kind_name[kind], text + strlen("SKIP: "));
}

/* ---- all of it absent ---- */

struct lazy {
	struct machine m;
	struct ram ram;
	struct source_of_image source;
	struct vcpu *v;
	struct clock_guest *clock;
	double started;
	uint64_t clock_before, clock_after; /* KVM_GET_CLOCK */
};

static uint64_t get_clock(struct lazy *l)
{
	struct kvm_clock_data data;
	SYS(ioctl(l->m.vm, KVM_GET_CLOCK, &data));
	return data.clock;
}

static void run_lazily(struct lazy *l, enum kind kind, enum backing backing)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	uint64_t shared;
	memset(l, 0, sizeof(*l));
	ram_create(&l->ram, backing, RAM_LEN);
	l->source.image = make_image(kind);
	machine_create(&l->m, PAGE);
	l->clock = share_clock(&l->m, &shared);
	options.resolver = resolve;
	options.opaque = &l->source;
	/* the guest tells KVM of its areas before it has touched them */
	options.flags = KVMFAULT_VM_FILTER_MSRS;
	machine_attach(&l->m, NULL, &options);
	machine_set_slot(&l->m, &l->ram, RAM_SLOT, RAM_GPA);
	l->v = add_vcpu(&l->m, kind, shared);
	if (test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP && !two_dimensional()) {
		OK(kvmfault_pages_resolve(l->m.library, AT(TOP_TABLE), (LOW_DIRECTORY + 1 - TOP_TABLE) * PAGE));
		OK(kvmfault_pages_resolve(l->m.library, AT(TABLES), RAM_PAGES / 512 * PAGE));
		/*
		 * Where KVM emulates the guest it also reads the tables of segments and interrupts.
		 */
		OK(kvmfault_pages_resolve(l->m.library, AT(GDT), 2 * PAGE));
	}
	vcpu_attach(l->v);
	l->started = now();
	l->clock_before = kind == TIMER ? get_clock(l) : 0;
	EQUAL("what the guest stops with", vcpu_run(l->v), 0);
	l->clock_after = kind == TIMER ? get_clock(l) : 0;
}

static void expect_calls(struct lazy *l, const char *what, int first, int count)
{
	for (int page = first; page < first + count; page++)
		CHECK(l->source.calls[page] == 1, "%s, page %d: %u resolver calls", what, page, l->source.calls[page]);
}

static void finish(struct lazy *l)
{
	/* Nothing came but what was needed. */
	expect_calls(l, "data", DATA, DATA_PAGES);
	for (int page = DATA + DATA_PAGES; page < RAM_PAGES; page++)
		CHECK(l->source.calls[page] == 0, "page %d, which the guest does not use, was fetched", page);
	EQUAL("state of an unused page", kvmfault_pages_state(l->m.library, AT(RAM_PAGES - 1)), KVMFAULT_PAGE_ABSENT);
	pattern_check(&pattern, l->ram.hva + DATA * PAGE, 0, DATA_PAGES);
	vcpu_detach(l->v);
	machine_destroy(&l->m);
	ram_destroy(&l->ram);
	munmap((void *)l->source.image, RAM_LEN);
}

static void lazy_guest(enum kind kind)
{
	require_guest(kind);
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct lazy l;
		run_lazily(&l, kind, backing);
		expect_calls(&l, "code", CODE, 1);
		expect_calls(&l, "code", CODE + 1, 3);
		/* One page a step; the last step is the top of the next. */
		expect_calls(&l, "stack", STACK_END - DEPTH, DEPTH);
		if (kind == LONG_MODE) {
			expect_calls(&l, "page tables", TOP_TABLE, 1);
			expect_calls(&l, "page tables", PDPT, 2);
			expect_calls(&l, "page tables", TABLES, 1);
			expect_calls(&l, "page tables", TABLES + DATA / 512, DATA_PAGES / 512);
		} else if (kind == PROTECTED_PAGED) {
			expect_calls(&l, "page tables", TOP_TABLE, 1);
			expect_calls(&l, "page tables", TABLES, 1);
			expect_calls(&l, "page tables", TABLES + DATA / 1024, DATA_PAGES / 1024);
		}
		finish(&l);
	}
}

static void long_mode(void)
{
	lazy_guest(LONG_MODE);
}

static void protected_mode(void)
{
	lazy_guest(PROTECTED);
}

static void protected_mode_paged(void)
{
	lazy_guest(PROTECTED_PAGED);
}

/* ---- interrupts, kvmclock, steal time ---- */

struct steal_time {
	uint64_t steal;
	uint32_t version, flags;
	uint8_t preempted;
};

static uint64_t nanoseconds(const struct sample *s)
{
	uint64_t delta = s->tsc - s->tsc_timestamp;
	delta = s->shift < 0 ? delta >> -s->shift : delta << s->shift;
	return s->system_time + (uint64_t)((unsigned __int128)delta * s->multiplier >> 32);
}

static void check_clock(struct lazy *l, double elapsed)
{
	enum { SLACK = 100000000 };
	uint64_t t[3];
	for (int i = 0; i < 3; i++) {
		const struct sample *s = &l->clock->samples[i];
		CHECK(s->version && s->version % 2 == 0, "sample %d of kvmclock has version %u", i, s->version);
		CHECK(s->multiplier && s->system_time && s->tsc_timestamp <= s->tsc,
		      "sample %d: multiplier %u, system time %lu, TSC %lu of %lu", i, s->multiplier, s->system_time,
		      s->tsc_timestamp, s->tsc);
		t[i] = nanoseconds(s);
	}
	printf("kvmclock: %lu, +%lu, +%lu ns; %.0f ns passed; KVM_GET_CLOCK from %lu to %lu\n", t[0], t[1] - t[0],
	       t[2] - t[1], elapsed * 1e9, l->clock_before, l->clock_after);
	CHECK(t[0] < t[1] && t[1] < t[2], "kvmclock doesn't advance: %lu, %lu, %lu", t[0], t[1], t[2]);
	CHECK((double)(t[2] - t[0]) < elapsed * 1e9 + SLACK, "kvmclock runs ahead: %lu ns in %.0f", t[2] - t[0],
	      elapsed * 1e9);
	CHECK(t[0] + SLACK > l->clock_before && t[2] < l->clock_after + SLACK,
	      "kvmclock isn't KVM's: %lu to %lu, KVM_GET_CLOCK %lu to %lu", t[0], t[2], l->clock_before,
	      l->clock_after);
}

/* How long this thread has waited for a processor, in nanoseconds: what KVM reports as stolen. */
static uint64_t run_delay(void)
{
	unsigned long long ran, waited = 0;
	FILE *file = fopen("/proc/thread-self/schedstat", "r");
	if (file && fscanf(file, "%llu %llu", &ran, &waited) != 2)
		waited = 0;
	if (file)
		fclose(file);
	return waited;
}

static void check_steal_time(struct lazy *l)
{
	const volatile struct steal_time *s = (const void *)(l->ram.hva + STEAL * PAGE);
	uint32_t version = s->version;
	CHECK(version && version % 2 == 0, "steal time has version %u", version);
	uint64_t stolen = s->steal, waited = run_delay();
	CHECK(stolen <= waited, "%lu ns stolen of %lu that the thread has waited", stolen, waited);
	CHECK(s->flags == 0, "flags %#x", s->flags);
	for (int i = 0; i < 5; i++) {
		poll(NULL, 0, 2);
		/* KVM_RUN loads the vCPU anew, which is when the record is written */
		vcpu_run(l->v);
	}
	CHECK(s->version > version && s->version % 2 == 0, "steal time isn't written any more: version %u, then %u",
	      version, s->version);
	CHECK(s->steal >= stolen && s->steal <= run_delay(), "%lu ns stolen, then %lu", stolen, s->steal);
	printf("steal time: %lu ns, version %u\n", s->steal, s->version);
}

static void timer(void)
{
	require_guest(TIMER);
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct lazy l;
		run_lazily(&l, TIMER, backing);
		double elapsed = now() - l.started;
		EQUAL("data pages that were right", l.clock->done, DATA_PAGES);
		CHECK(*(uint64_t *)(l.ram.hva + TICKS * PAGE) >= WANTED_TICKS, "too few ticks");
		expect_calls(&l, "code, and the interrupt's handler", CODE, 2);
		expect_calls(&l, "stack", STACK_END - 1, 1);
		expect_calls(&l, "GDT, IDT, the counter of ticks", GDT, 3);
		if (l.clock->clock) {
			expect_calls(&l, "kvmclock", CLOCK, 1);
			check_clock(&l, elapsed);
		}
		if (l.clock->steal) {
			expect_calls(&l, "steal time", STEAL, 1);
			check_steal_time(&l);
		}
		printf("%s: %.2f s, %lu ticks%s%s\n", backing_name(backing), elapsed,
		       *(uint64_t *)(l.ram.hva + TICKS * PAGE), l.clock->clock ? "" : ", no kvmclock here",
		       l.clock->steal ? "" : ", no steal time here");
		finish(&l);
	}
}

static const struct test_case cases[] = {
	{ "long-mode", long_mode, true },
	{ "protected-mode", protected_mode, true },
	{ "protected-mode-paged", protected_mode_paged, true },
	{ "timer-clock-steal-time", timer, true },
};
TEST_MAIN(cases)
