/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "lab.h"

#include <string.h>

struct lab lab;

void lab_set_up_with(struct kvmfault_vm_options *options, enum backing backing, int vcpus, int cpl)
{
	options->opaque = &lab;
	ram_create(&lab.ram, backing, LAB_PAGES * PAGE);
	machine_create(&lab.m, PAGE);
	source_create(&lab.source, RAM_GPA, lab.ram.len, PATTERN);
	machine_attach(&lab.m, NULL, options);
	machine_set_slot(&lab.m, &lab.ram, RAM_SLOT, RAM_GPA);
	lab.steps = machine_share(&lab.m, PAGE, &lab.steps_gpa);
	for (int i = 0; i < vcpus; i++)
		machine_add_vcpu(&lab.m, cpl);
}

void lab_set_up(enum backing backing, kvmfault_resolver resolver, int vcpus, int cpl)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolver;
	lab_set_up_with(&options, backing, vcpus, cpl);
}

void lab_tear_down(void)
{
	machine_destroy(&lab.m);
	ram_destroy(&lab.ram);
	source_destroy(&lab.source);
}

uint64_t lab_page_of(const struct kvmfault_fault *fault)
{
	return (fault->gpa - RAM_GPA) / PAGE;
}

void lab_install(uint64_t page)
{
	OK(source_install(&lab.source, lab.m.library, RAM_GPA + page * PAGE, PAGE));
}

int lab_answer_pending(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm;
	lab.calls_for[lab_page_of(fault)]++;
	lab.calls++;
	return KVMFAULT_PENDING;
}

/* The steps of vCPU `v` are number 2 * v and the next. */
void lab_load_read(struct vcpu *v, uint64_t page)
{
	struct step *steps = lab.steps + 2 * v->number;
	steps[0] = (struct step){ READ64, RAM_GPA + page * PAGE, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, lab.steps_gpa + 2 * v->number * sizeof(*steps));
}

void lab_check_read(const struct vcpu *v, uint64_t page)
{
	EQUAL("the word that the guest read", lab.steps[2 * v->number].value, pattern_word(&lab.source.pattern, page, 0));
}

void lab_read(struct vcpu *v, uint64_t page)
{
	lab_load_read(v, page);
	EQUAL("stop", vcpu_run(v), 0);
	lab_check_read(v, page);
}

void lab_read_all(struct vcpu *v)
{
	for (int page = 0; page < LAB_PAGES; page++)
		lab_read(v, page);
}

void *lab_run_to_stop(struct vcpu *v)
{
	vcpu_attach(v);
	vcpu_run(v);
	return NULL;
}
