/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Where KVM emulates the guest's instructions it mistakes absent memory for a device. The library
 * completes such accesses: of every size, across pages, by every kind of instruction; and leaves
 * real device accesses to the VMM.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum { PAGES = 64, READONLY_SLOT = 2 };
#define READONLY_GPA 0x80000000ul

static struct machine m;
static struct ram ram, readonly;
static struct source source, readonly_source;
static struct step *steps;
static uint64_t steps_gpa;
static unsigned written_calls;
static uint64_t written_bytes;

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	return source_resolve(fault->slot == RAM_SLOT ? &source : &readonly_source, vm, fault);
}

static void written(void *opaque, uint64_t gpa, uint64_t len)
{
	CHECK(opaque == &m, "the callback's argument is not the resolver's");
	CHECK(gpa >= RAM_GPA && gpa + len <= RAM_GPA + ram.len, "`written` is told of [%#lx, +%lu)", gpa, len);
	written_calls++;
	written_bytes += len;
}

static struct vcpu *set_up(kvmfault_resolver resolver, int cpl)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolver;
	options.written = written;
	options.opaque = &m;
	ram_create(&ram, MEMFD, PAGES * PAGE);
	machine_create(&m, 2 * PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	machine_attach(&m, NULL, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	steps = machine_share(&m, 2 * PAGE, &steps_gpa);
	struct vcpu *v = machine_add_vcpu(&m, cpl);
	vcpu_attach(v);
	return v;
}

static void tear_down(void)
{
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
}

/* What `size` bytes at an offset of the memory are in the snapshot. */
static uint64_t expected_bytes(uint64_t offset, unsigned size)
{
	uint8_t bytes[8] = { 0 };
	uint64_t value;
	for (unsigned i = 0; i < size; i++) {
		uint64_t at = offset + i, word = pattern_word(&source.pattern, at / PAGE, at % PAGE / 8);
		bytes[i] = word >> at % 8 * 8;
	}
	memcpy(&value, bytes, 8);
	return value;
}

/*
 * Every size, at places where it lies in one absent page, and across the border of two: 16
 * accesses, 3 pages apart.
 */
static void sizes(bool write, int cpl)
{
	static const unsigned size_of[] = { 1, 2, 4, 8 };
	enum { N = 16 };
	uint64_t offsets[N];
	unsigned sizes[N];
	struct vcpu *v = set_up(resolve, cpl);
	for (unsigned i = 0; i < N; i++) {
		uint64_t page = 1 + i * 3;
		sizes[i] = size_of[i % 4];
		/*
		 * First byte of a page, odd place, last bytes of a page, across (a single byte
		 * can't be).
		 */
		offsets[i] =
			page * PAGE + (const uint64_t[]){ 0, 1001, PAGE - sizes[i], PAGE - (sizes[i] + 1) / 2 }[i / 4];
		steps[i] = (struct step){ (write ? WRITE8 : READ8) + i % 4, RAM_GPA + offsets[i],
					  0x8877665544332211 + i, 0 };
	}
	steps[N] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, steps_gpa);
	EQUAL("stop", vcpu_run(v), 0);

	unsigned bytes = 0, crossing = 0;
	for (unsigned i = 0; i < N; i++) {
		bytes += sizes[i];
		crossing += offsets[i] / PAGE != (offsets[i] + sizes[i] - 1) / PAGE;
		if (!write) {
			EQUAL("bytes read", steps[i].value, expected_bytes(offsets[i], sizes[i]));
			continue;
		}
		uint64_t value = 0x8877665544332211 + i, got = 0;
		memcpy(&got, ram.hva + offsets[i], sizes[i]);
		EQUAL("bytes written", got, sizes[i] == 8 ? value : value & ((1ull << sizes[i] * 8) - 1));
		/* And nothing beside them. */
		EQUAL("the byte before", ram.hva[offsets[i] - 1], expected_bytes(offsets[i] - 1, 1));
		EQUAL("the byte after", ram.hva[offsets[i] + sizes[i]], expected_bytes(offsets[i] + sizes[i], 1));
	}
	EQUAL("accesses across pages", crossing, 3);
	struct kvmfault_stats stats = machine_settled_stats(&m);
	for (unsigned i = 0; i < N; i++)
		EQUAL("calls for the page of an access", source.calls[offsets[i] / PAGE], 1);
	EQUAL("outcome_failed", stats.outcome_failed, 0);
	printf("%lu reads and %lu writes as MMIO, `written` %u times for %lu bytes\n", stats.mmio_reads,
	       stats.mmio_writes, written_calls, written_bytes);
	if (cpl == 0 && cpl0_comes_as_mmio()) {
		/*
		 * KVM cuts accesses at page borders. The page after an access is present where an
		 * earlier one installed it.
		 */
		EQUAL("MMIO", write ? stats.mmio_writes : stats.mmio_reads, N + crossing);
		EQUAL("MMIO of the other kind", write ? stats.mmio_reads : stats.mmio_writes, 0);
		EQUAL("bytes that `written` was told of", written_bytes, write ? bytes : 0);
	} else if (cpl == 3) {
		EQUAL("`written` calls", written_calls, 0);
	}
	tear_down();
}

static void read_cpl0(void)
{
	sizes(false, 0);
}

static void write_cpl0(void)
{
	sizes(true, 0);
}

static void read_cpl3(void)
{
	sizes(false, 3);
}

static void write_cpl3(void)
{
	sizes(true, 3);
}

/*
 * Instructions that touch memory in other ways: read-modify-write, string instructions, SSE, and
 * code in absent memory.
 */
static void instructions(int cpl)
{
	/* xor $0x5a, %eax; ret: two bytes of it in one page, and two in the next */
	static const uint8_t code[] = { 0x83, 0xf0, 0x5a, 0xc3 };
	struct vcpu *v = set_up(resolve, cpl);
	uint64_t rmw = RAM_GPA + 3 * PAGE + 16, from = RAM_GPA + 6 * PAGE - 50, to = RAM_GPA + 10 * PAGE - 20;
	uint64_t sse = RAM_GPA + 20 * PAGE - 8, fill = RAM_GPA + 30 * PAGE - 24, call = RAM_GPA + 41 * PAGE - 2;
	uint64_t sse_written = RAM_GPA + 26 * PAGE - 8;
	/* The code's pages: in shared memory, and absent for the guest until they are mapped. */
	uint8_t page[2 * PAGE];
	memset(page, 0x90, sizeof(page));
	memcpy(page + PAGE - 2, code, sizeof(code));
	OK(kvmfault_pages_install(m.library, RAM_GPA + 40 * PAGE, page, sizeof(page)));

	unsigned n = 0;
	steps[n++] = (struct step){ ADD64, rmw, 1000, 0 };
	steps[n++] = (struct step){ COPY, to, from, 100 };
	steps[n++] = (struct step){ READ128, sse, 0, 0 };
	steps[n++] = (struct step){ WRITE128, sse_written, 0x1122334455667788, 0x99aabbccddeeff00 };
	steps[n++] = (struct step){ FILL, fill, 0x0123456789abcdef, 6 };
	steps[n++] = (struct step){ CALL, call, 0xf0, 0 };
	steps[n++] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, steps_gpa);
	EQUAL("stop", vcpu_run(v), 0);

	uint64_t before = pattern_word(&source.pattern, 3, 2), word, words[2];
	EQUAL("xadd returned", steps[0].value, before);
	memcpy(&word, ram.hva + (rmw - RAM_GPA), 8);
	EQUAL("xadd left", word, before + 1000);
	for (unsigned i = 0; i < 100; i++)
		EQUAL("a byte copied", ram.hva[to - RAM_GPA + i], expected_bytes(from - RAM_GPA + i, 1));
	EQUAL("the byte before the copy", ram.hva[to - RAM_GPA - 1], expected_bytes(to - RAM_GPA - 1, 1));
	EQUAL("the byte after the copy", ram.hva[to - RAM_GPA + 100], expected_bytes(to - RAM_GPA + 100, 1));
	EQUAL("SSE read, low", steps[2].value, expected_bytes(sse - RAM_GPA, 8));
	EQUAL("SSE read, high", steps[2].more, expected_bytes(sse - RAM_GPA + 8, 8));
	memcpy(words, ram.hva + (sse_written - RAM_GPA), 16);
	EQUAL("SSE write, low", words[0], 0x1122334455667788);
	EQUAL("SSE write, high", words[1], 0x99aabbccddeeff00);
	for (unsigned i = 0; i < 6; i++) {
		memcpy(&word, ram.hva + (fill - RAM_GPA) + i * 8, 8);
		EQUAL("a word filled", word, 0x0123456789abcdef);
	}
	EQUAL("code across pages", steps[5].value, 0xf0 ^ 0x5a);
	EQUAL("outcome_failed", machine_settled_stats(&m).outcome_failed, 0);
	tear_down();
}

static void instructions_cpl0(void)
{
	instructions(0);
}

static void instructions_cpl3(void)
{
	instructions(3);
}

/*
 * Code in pages that are absent: the source's bytes are made such that each page begins with an
 * instruction and a return.
 */
static int resolve_code(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	/* mov $page, %eax; ret */
	uint8_t page[PAGE] = { 0xb8, (uint8_t)((fault->gpa - RAM_GPA) / PAGE), 0x12, 0x34, 0, 0xc3 };
	(void)opaque;
	source.total++;
	OK(kvmfault_pages_install(vm, fault->gpa, page, PAGE));
	return KVMFAULT_RESOLVED;
}

static void execute(int cpl)
{
	enum { N = 16 };
	struct vcpu *v = set_up(resolve_code, cpl);
	for (uint64_t i = 0; i < N; i++)
		steps[i] = (struct step){ CALL, RAM_GPA + i * 4 * PAGE, 0, 0 };
	steps[N] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, steps_gpa);
	EQUAL("stop", vcpu_run(v), 0);
	for (uint64_t i = 0; i < N; i++)
		EQUAL("what the code returned", steps[i].value, 0x341200 + i * 4);
	EQUAL("resolver calls", source.total, N);
	tear_down();
}

static void execute_cpl0(void)
{
	execute(0);
}

static void execute_cpl3(void)
{
	execute(3);
}

/* ---- what is for a device ---- */

static void expect_mmio(struct vcpu *v, uint64_t gpa, unsigned len, bool write, uint64_t value)
{
	int ret = kvmfault_vcpu_run(v->handle);
	uint64_t data = 0;
	CHECK(ret == KVMFAULT_PASS && v->run->exit_reason == KVM_EXIT_MMIO, "%s", vcpu_describe(v, ret));
	EQUAL("the address of an MMIO exit", v->run->mmio.phys_addr, gpa);
	EQUAL("its length", v->run->mmio.len, len);
	EQUAL("is it a write", v->run->mmio.is_write, write);
	memcpy(&data, v->run->mmio.data, len);
	if (write)
		EQUAL("what is written", data, value);
	else
		memcpy(v->run->mmio.data, &value, 8);
}

/* No memory there: the exit is the VMM's, as it is without the library, and so is its answer. */
static void devices(void)
{
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		struct vcpu *v = set_up(resolve, cpl);
		steps[0] = (struct step){ READ32, NOWHERE_GPA + 4, 0, 0 };
		steps[1] = (struct step){ WRITE64, NOWHERE_GPA + 8, 0x0102030405060708, 0 };
		steps[2] = (struct step){ READ64, RAM_GPA, 0, 0 };
		steps[3] = (struct step){ STOP, 0, 7, 0 };
		vcpu_load_script(v, steps_gpa);
		expect_mmio(v, NOWHERE_GPA + 4, 4, false, 0xcafe1234);
		expect_mmio(v, NOWHERE_GPA + 8, 8, true, 0x0102030405060708);
		EQUAL("stop", vcpu_run(v), 7);
		EQUAL("the device's answer", steps[0].value, 0xcafe1234);
		EQUAL("a read of memory afterwards", steps[2].value, pattern_word(&source.pattern, 0, 0));
		EQUAL("resolver calls", source.total, 1);
		tear_down();
	}
}

/* Memory that the guest may only read comes on demand; a write to it is the VMM's. */
static void read_only(void)
{
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		struct vcpu *v = set_up(resolve, cpl);
		ram_create(&readonly, MEMFD, PAGES * PAGE);
		source_create(&readonly_source, READONLY_GPA, readonly.len, PATTERN);
		struct kvmfault_memslot slot = slot_on(&readonly, READONLY_SLOT, READONLY_GPA);
		slot.kvm_flags = KVM_MEM_READONLY;
		int ret = kvmfault_memslot_set(m.library, &slot);
		if (ret == -EOPNOTSUPP && test_mechanism() == KVMFAULT_MECHANISM_MEMSLOT_FLAG)
			skip("%s", kvmfault_last_error());
		OK(ret);
		steps[0] = (struct step){ READ64, READONLY_GPA + 8, 0, 0 };
		/* present */
		steps[1] = (struct step){ WRITE32, READONLY_GPA + 16, 0xdeadbeef, 0 };
		steps[2] = (struct step){ WRITE8, READONLY_GPA + 5 * PAGE, 0x77, 0 }; /* absent */
		steps[3] = (struct step){ READ64, READONLY_GPA + 5 * PAGE, 0, 0 };
		steps[4] = (struct step){ READ64, READONLY_GPA + 16, 0, 0 };
		steps[5] = (struct step){ STOP, 0, 0, 0 };
		vcpu_load_script(v, steps_gpa);
		expect_mmio(v, READONLY_GPA + 16, 4, true, 0xdeadbeef);
		expect_mmio(v, READONLY_GPA + 5 * PAGE, 1, true, 0x77);
		EQUAL("stop", vcpu_run(v), 0);
		struct pattern *p = &readonly_source.pattern;
		EQUAL("the first read", steps[0].value, pattern_word(p, 0, 1));
		EQUAL("a read after the write that didn't happen", steps[3].value, pattern_word(p, 5, 0));
		EQUAL("another", steps[4].value, pattern_word(p, 0, 2));
		/*
		 * poison-trap doesn't learn which page of a read-only slot it is, and resolves them
		 * all.
		 */
		if (test_mechanism() != KVMFAULT_MECHANISM_POISON_TRAP)
			EQUAL("resolver calls", readonly_source.total, 2);
		for (int page = 0; page < PAGES; page++)
			CHECK(readonly_source.calls[page] <= 1, "%u calls for page %d", readonly_source.calls[page],
			      page);
		pattern_check(p, readonly.hva, 0, 1);
		pattern_check(p, readonly.hva + 5 * PAGE, 5, 1);
		tear_down();
		ram_destroy(&readonly);
		source_destroy(&readonly_source);
	}
}

static const struct test_case cases[] = {
	{ "read", read_cpl3, true },
	{ "write", write_cpl3, true },
	{ "read-cpl0", read_cpl0, true },
	{ "write-cpl0", write_cpl0, true },
	{ "instructions", instructions_cpl3, true },
	{ "instructions-cpl0", instructions_cpl0, true },
	{ "execute", execute_cpl3, true },
	{ "execute-cpl0", execute_cpl0, true },
	{ "devices", devices, true },
	{ "read-only", read_only, true },
};
TEST_MAIN(cases)
