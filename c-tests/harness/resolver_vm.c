/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <string.h>

struct resolver_vm resolver_vm;

void resolver_vm_set_up_with(struct kvmfault_vm_options *options, enum backing backing, int vcpus, int cpl)
{
	options->opaque = &resolver_vm;
	ram_create(&resolver_vm.ram, backing, RESOLVER_VM_PAGES * PAGE);
	machine_create(&resolver_vm.m, PAGE);
	source_create(&resolver_vm.source, RAM_GPA, resolver_vm.ram.len, PATTERN);
	machine_attach(&resolver_vm.m, NULL, options);
	machine_set_slot(&resolver_vm.m, &resolver_vm.ram, RAM_SLOT, RAM_GPA);
	resolver_vm.steps = machine_share(&resolver_vm.m, PAGE, &resolver_vm.steps_gpa);
	for (int i = 0; i < vcpus; i++)
		machine_add_vcpu(&resolver_vm.m, cpl);
}

void resolver_vm_set_up(enum backing backing, kvmfault_resolver resolver, int vcpus, int cpl)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolver;
	resolver_vm_set_up_with(&options, backing, vcpus, cpl);
}

void resolver_vm_tear_down(void)
{
	machine_destroy(&resolver_vm.m);
	ram_destroy(&resolver_vm.ram);
	source_destroy(&resolver_vm.source);
}

uint64_t resolver_vm_page_of(const struct kvmfault_fault *fault)
{
	return (fault->gpa - RAM_GPA) / PAGE;
}

void resolver_vm_install(uint64_t page)
{
	OK(source_install(&resolver_vm.source, resolver_vm.m.library, RAM_GPA + page * PAGE, PAGE));
}

int resolver_vm_answer_pending(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm;
	resolver_vm.calls_for[resolver_vm_page_of(fault)]++;
	resolver_vm.calls++;
	return KVMFAULT_PENDING;
}

/* The steps of vCPU `v` are number 2 * v and the next. */
void resolver_vm_load_read(struct vcpu *v, uint64_t page)
{
	struct step *steps = resolver_vm.steps + 2 * v->number;
	steps[0] = (struct step){ READ64, RAM_GPA + page * PAGE, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, resolver_vm.steps_gpa + 2 * v->number * sizeof(*steps));
}

void resolver_vm_check_read(const struct vcpu *v, uint64_t page)
{
	EQUAL("the word that the guest read", resolver_vm.steps[2 * v->number].value,
	      pattern_word(&resolver_vm.source.pattern, page, 0));
}

void resolver_vm_read(struct vcpu *v, uint64_t page)
{
	resolver_vm_load_read(v, page);
	EQUAL("stop", vcpu_run(v), 0);
	resolver_vm_check_read(v, page);
}

void resolver_vm_read_all(struct vcpu *v)
{
	for (int page = 0; page < RESOLVER_VM_PAGES; page++)
		resolver_vm_read(v, page);
}

void *resolver_vm_run_to_stop(struct vcpu *v)
{
	vcpu_attach(v);
	vcpu_run(v);
	return NULL;
}
