/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Page tables that KVM walks itself, for the memory side of a string instruction that reads from or
 * writes to a port: an absent table must not become a page fault in the guest. The guest has no
 * interrupt table: one page fault ends it.
 */
#define _GNU_SOURCE
#include "slot_vm.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

/*
 * Pages of the memory under test. Code and device have directories of their own, so that the
 * processor doesn't come to the buffer's.
 */
enum { TOP, PDPT, DIRECTORY, TABLE, CODE_DIRECTORY, DEVICE_DIRECTORY, CODE, BUFFER = 8, PAGES = 16 };
enum { PORT = 0x99, LEN = 64, FIRST = 100 };
#define AT(page) (RAM_GPA + (page)*PAGE)
#define DEVICE 0x80000000ul  /* no memory is there */
#define VIRTUAL 0xc0000000ul /* AT(0), by the tables that are walked */

enum mode { LONG_MODE, LARGE_PAGES, PAE, TWO_LEVELS };
static const char *const mode_name[] = { "long mode", "large pages", "PAE", "32-bit paging" };

enum operation { OUTS, INS, FROM_DEVICE, TO_DEVICE };

static uint8_t image[PAGES * PAGE] __attribute__((aligned(PAGE)));
static struct vcpu *the_vcpu;
static int kick_at; /* a page that is installed later, and a kick comes instead; 0: none */

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	if (kick_at && fault->gpa == AT((uint64_t)kick_at)) {
		kick_at = 0;
		kvmfault_vcpu_kick(the_vcpu->handle);
		return KVMFAULT_PENDING;
	}
	return kvmfault_pages_install(vm, fault->gpa, image + (fault->gpa - RAM_GPA), fault->len);
}

/* ---- the guest ---- */

static void put_tables(enum mode mode)
{
	enum { ALL = 3 /* present, writable */, LARGE = 0x83 };
	uint64_t *words = (uint64_t *)image;
	if (mode == TWO_LEVELS) {
		uint32_t *top = (uint32_t *)image, *table = (uint32_t *)(image + TABLE * PAGE);
		top[RAM_GPA >> 22] = RAM_GPA | LARGE;
		top[DEVICE >> 22] = DEVICE | LARGE;
		top[VIRTUAL >> 22] = AT(TABLE) | ALL;
		for (int i = 0; i < PAGES; i++)
			table[i] = AT(i) | ALL;
		return;
	}
	/* In PAE mode the entries of the first table have no rights. */
	uint64_t rights = mode == PAE ? 1 : ALL;
	words[TOP * 512] = AT(PDPT) | ALL;
	words[PDPT * 512 + (RAM_GPA >> 30)] = AT(CODE_DIRECTORY) | rights;
	words[PDPT * 512 + (DEVICE >> 30)] = AT(DEVICE_DIRECTORY) | rights;
	words[PDPT * 512 + (VIRTUAL >> 30)] = AT(DIRECTORY) | rights;
	words[CODE_DIRECTORY * 512] = RAM_GPA | LARGE;
	words[DEVICE_DIRECTORY * 512] = DEVICE | LARGE;
	words[DIRECTORY * 512] = mode == LARGE_PAGES ? RAM_GPA | LARGE : AT(TABLE) | ALL;
	for (int i = 0; i < PAGES; i++)
		words[TABLE * 512 + i] = AT(i) | ALL;
}

/*
 * Returns where it begins. In the middle: the string instruction is the first that the guest
 * executes, as if it was interrupted there.
 */
static uint64_t put_code(enum operation operation, bool middle)
{
	static const uint8_t instruction[] = { [OUTS] = 0x6e, [INS] = 0x6c, [FROM_DEVICE] = 0xa4, [TO_DEVICE] = 0xa4 };
	uint32_t source = operation == FROM_DEVICE ? DEVICE : VIRTUAL + BUFFER * PAGE;
	uint32_t target = operation == TO_DEVICE ? DEVICE : VIRTUAL + BUFFER * PAGE;
	uint8_t *code = image + CODE * PAGE;
	unsigned n = 0;
	if (!middle) {
		code[n++] = 0xbe; /* mov esi, source: zero-extended */
		memcpy(code + n, &source, 4);
		code[n += 4] = 0xbf; /* mov edi, target */
		memcpy(code + ++n, &target, 4);
		n += 4;
	}
	/* rep ...; out STOP_PORT, eax */
	memcpy(code + n, (uint8_t[]){ 0xf3, instruction[operation], 0xe7, STOP_PORT }, 4);
	return AT(CODE);
}

static struct vcpu *add_vcpu(struct machine *m, enum mode mode, uint64_t rip, enum operation operation, bool middle)
{
	struct kvm_sregs s;
	struct kvm_regs regs = { .rip = rip, .rflags = 2, .rcx = LEN, .rdx = PORT };
	struct vcpu *v = machine_add_vcpu(m, 0);
	SYS(ioctl(v->fd, KVM_GET_SREGS, &s));
	s.cr3 = mode == PAE ? AT(PDPT) : AT(TOP);
	if (mode == PAE || mode == TWO_LEVELS) {
		s.cr0 = 0x80010033;
		s.cr4 = mode == PAE ? 1 << 5 : 1 << 4 /* PSE */;
		s.efer = 0;
		s.cs.l = 0;
		s.cs.db = 1;
		s.cs.limit = s.ds.limit = s.es.limit = s.ss.limit = 0xffffffff;
	}
	if (middle) {
		regs.rsi = operation == FROM_DEVICE ? DEVICE : VIRTUAL + BUFFER * PAGE;
		regs.rdi = operation == TO_DEVICE ? DEVICE : VIRTUAL + BUFFER * PAGE;
	}
	SYS(ioctl(v->fd, KVM_SET_SREGS, &s));
	SYS(ioctl(v->fd, KVM_SET_REGS, &regs));
	vcpu_attach(v);
	return v;
}

/* The device: sends and expects FIRST, FIRST + 1, ... Returns false when the guest stops. */
static bool serve(struct vcpu *v, unsigned *bytes)
{
	struct kvm_run *run = v->run;
	uint32_t value;
	uint8_t *data;
	unsigned len;
	bool to_guest;
	if (vcpu_stopped(v, &value))
		return false;
	if (run->exit_reason == KVM_EXIT_IO && run->io.port == PORT) {
		data = (uint8_t *)run + run->io.data_offset;
		len = run->io.count * run->io.size;
		to_guest = run->io.direction == KVM_EXIT_IO_IN;
	} else if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.phys_addr >= DEVICE) {
		data = run->mmio.data;
		len = run->mmio.len;
		to_guest = !run->mmio.is_write;
	} else {
		FAIL("%s", vcpu_describe(v, KVMFAULT_PASS));
	}
	for (unsigned i = 0; i < len; i++, ++*bytes) {
		if (to_guest)
			data[i] = FIRST + *bytes;
		else
			EQUAL("what the device gets", data[i], FIRST + *bytes);
	}
	return true;
}

/* ---- the cases ---- */

static void transfer(enum mode mode, enum operation operation, bool middle, bool kick)
{
	struct machine m;
	struct ram ram;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	unsigned bytes = 0, kicks = 0;
	printf("%s%s%s\n", mode_name[mode], middle ? ", in the middle" : "", kick ? ", with a kick" : "");
	memset(image, 0, sizeof(image));
	put_tables(mode);
	for (unsigned i = 0; i < LEN && (operation == OUTS || operation == TO_DEVICE); i++)
		image[BUFFER * PAGE + i] = FIRST + i;
	uint64_t rip = put_code(operation, middle);
	ram_create(&ram, MEMFD, sizeof(image));
	machine_create(&m, 0);
	options.resolver = resolve;
	machine_attach(&m, NULL, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = the_vcpu = add_vcpu(&m, mode, rip, operation, middle);
	kick_at = kick ? mode == LARGE_PAGES ? DIRECTORY : TABLE : 0;
	for (;;) {
		int ret = kvmfault_vcpu_run(v->handle);
		if (ret == KVMFAULT_INTERRUPTED) {
			/*
			 * Here the page has to come before the vCPU goes on, with what it and the
			 * device were in the middle of.
			 */
			kicks++;
			OK(kvmfault_pages_install(m.library, AT(TABLE), image + TABLE * PAGE, PAGE));
			continue;
		}
		CHECK(ret == KVMFAULT_PASS, "%s", vcpu_describe(v, ret));
		if (!serve(v, &bytes))
			break;
	}
	EQUAL("kicks", kicks, kick);
	EQUAL("bytes", bytes, LEN);
	for (unsigned i = 0; i < LEN; i++)
		EQUAL("a byte in memory", ram.hva[BUFFER * PAGE + i], FIRST + i);
	machine_destroy(&m);
	ram_destroy(&ram);
}

/* Skips the case where there can be no such thing; the last mode that this KVM runs. */
static enum mode last_mode(void)
{
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	if (!probe.two_dimensional_paging && test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP)
		skip("this KVM walks the guest's page tables at every access (no EPT or NPT)");
	return probe.two_dimensional_paging ? TWO_LEVELS : LARGE_PAGES;
}

static void all_modes(enum operation operation)
{
	enum mode last = last_mode();
	for (enum mode mode = 0; mode <= last; mode++) {
		transfer(mode, operation, true, false);
		/* The library doesn't learn what the first word of an OUTS needs. */
		if (operation != OUTS)
			transfer(mode, operation, false, false);
	}
}

static void outs(void)
{
	all_modes(OUTS);
}

static void ins(void)
{
	all_modes(INS);
}

static void from_device(void)
{
	all_modes(FROM_DEVICE);
}

static void to_device(void)
{
	all_modes(TO_DEVICE);
}

static void kicked(void)
{
	last_mode();
	if (test_mechanism() != KVMFAULT_MECHANISM_POISON_TRAP)
		skip("with this mechanism KVM itself waits for the table, deaf to kicks");
	for (int middle = 0; middle < 2; middle++) {
		transfer(LONG_MODE, INS, middle, true);
		transfer(PAE, FROM_DEVICE, middle, true);
	}
}

static const struct test_case cases[] = {
	{ "outs", outs, true },           { "ins", ins, true },       { "from-device", from_device, true },
	{ "to-device", to_device, true }, { "kicked", kicked, true },
};
TEST_MAIN(cases)
