/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "hva_vm.h"

struct hva_vm hva_vm;

/* The host address identifies the page, which may have several guest addresses. */
static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	uint8_t bytes[PAGE];
	uint64_t page = ((uint8_t *)fault->hva - hva_vm.ram.hva) / PAGE;
	(void)opaque;
	CHECK(page < hva_vm.source.pages, "the resolver is asked for hva %p", fault->hva);
	hva_vm.source.calls[page]++;
	hva_vm.source.total++;
	pattern_fill(&hva_vm.source.pattern, page, bytes);
	OK(kvmfault_pages_install(vm, fault->gpa, bytes, PAGE));
	return KVMFAULT_RESOLVED;
}

static void written(void *opaque, uint64_t gpa, uint64_t len)
{
	(void)opaque, (void)gpa, (void)len;
	hva_vm.written_calls++;
}

void hva_vm_set_up(enum backing backing, uint64_t pages)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolve;
	options.written = written;
	ram_create(&hva_vm.ram, backing, pages * PAGE);
	machine_create(&hva_vm.m, pages * sizeof(uint32_t) + PAGE);
	source_create(&hva_vm.source, RAM_GPA, hva_vm.ram.len, PATTERN);
	machine_attach(&hva_vm.m, NULL, &options);
	hva_vm.list = machine_share(&hva_vm.m, pages * sizeof(*hva_vm.list), &hva_vm.list_gpa);
	list_shuffle(hva_vm.list, pages, 5);
	hva_vm.steps = machine_share(&hva_vm.m, PAGE, &hva_vm.steps_gpa);
}

void hva_vm_tear_down(void)
{
	machine_destroy(&hva_vm.m);
	ram_destroy(&hva_vm.ram);
	source_destroy(&hva_vm.source);
}

void hva_vm_delete_slot(uint32_t number, uint32_t flags)
{
	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	slot.slot = number;
	slot.flags = flags;
	OK(kvmfault_memslot_set(hva_vm.m.library, &slot));
}

void hva_vm_check_pages(struct vcpu *v, uint64_t gpa, uint64_t first, uint64_t count)
{
	vcpu_load_verify(v, gpa, hva_vm.list_gpa + first * sizeof(*hva_vm.list), count, &hva_vm.source.pattern,
			 READ_FIRST);
	vcpu_verify(v);
}

struct vcpu *hva_vm_add_vcpu(int cpl)
{
	struct vcpu *v = machine_add_vcpu(&hva_vm.m, cpl);
	vcpu_attach(v);
	return v;
}
