/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "slot_vm.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static _Thread_local int my_vcpu = -1;

int slot_vm_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct slot_vm *s = opaque;
	if (my_vcpu >= 0) {
		EQUAL("the vCPU whose thread the resolver runs on", my_vcpu, fault->vcpu);
		EQUAL("origin", fault->origin, KVMFAULT_ORIGIN_VCPU);
		s->here++;
	} else {
		s->elsewhere++;
	}
	s->source.total++;
	int ret = source_install(&s->source, vm, s->source.window ? fault->window_gpa : fault->gpa,
				 s->source.window ? fault->window_len : fault->len);
	return ret < 0 && ret != -EEXIST ? ret : KVMFAULT_RESOLVED;
}

static void slot_vm_written(void *opaque, uint64_t gpa, uint64_t len)
{
	struct slot_vm *s = opaque;
	s->written += len;
	for (uint64_t at = gpa / PAGE * PAGE; at < gpa + len; at += PAGE)
		s->was_written[(at - RAM_GPA) / PAGE] = 1;
}

void slot_vm_attach(struct slot_vm *s, enum backing backing, uint64_t len, int mechanism, const char *abi)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	memset(s, 0, sizeof(*s));
	ram_create(&s->ram, backing, len);
	s->pages = s->ram.len / PAGE;
	machine_create(&s->m, s->pages * sizeof(uint32_t));
	source_create(&s->source, RAM_GPA, s->ram.len, PATTERN);
	s->was_written = calloc(s->pages, 1);
	s->list = machine_share(&s->m, s->pages * sizeof(uint32_t), &s->list_gpa);
	list_sequential(s->list, s->pages);
	options.mechanism = mechanism;
	options.abi = abi;
	options.resolver = slot_vm_resolve;
	options.written = slot_vm_written;
	options.opaque = s;
	machine_attach(&s->m, &s->source, &options);
}

void slot_vm_create(struct slot_vm *s, enum backing backing, uint64_t len, uint32_t flags, uint32_t kvm_flags)
{
	slot_vm_attach(s, backing, len, test_mechanism(), NULL);
	struct kvmfault_memslot slot = slot_on(&s->ram, RAM_SLOT, RAM_GPA);
	slot.flags |= flags;
	slot.kvm_flags = kvm_flags;
	OK(kvmfault_memslot_set(s->m.library, &slot));
	EQUAL("the slot's mechanism", kvmfault_memslot_mechanism(s->m.library, RAM_SLOT), test_mechanism());
}

void slot_vm_create_of(struct slot_vm *s, enum memory_kind kind, uint64_t units, uint32_t flags)
{
	enum backing backing = kind == OF_ANON ? ANON : kind == OF_HUGETLB ? HUGETLB : MEMFD;
	slot_vm_attach(s, backing, units * (kind == OF_HUGETLB ? HUGE_PAGE : PAGE), test_mechanism(), NULL);
	struct kvmfault_memslot slot = slot_on(&s->ram, RAM_SLOT, RAM_GPA);
	if (kind == OF_SHARED_ANON) {
		int fixed = MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED;
		CHECK(mmap(s->ram.hva, s->ram.len, PROT_READ | PROT_WRITE, fixed, -1, 0) == s->ram.hva, "mmap");
		close(s->ram.fd);
		s->ram.fd = slot.fd = -1;
	}
	slot.flags |= flags;
	OK(kvmfault_memslot_set(s->m.library, &slot));
}

void slot_vm_destroy(struct slot_vm *s)
{
	machine_destroy(&s->m);
	ram_destroy(&s->ram);
	source_destroy(&s->source);
	free((void *)s->was_written);
}

struct vcpu *slot_vm_add_vcpu(struct slot_vm *s, int cpl)
{
	struct vcpu *v = machine_add_vcpu(&s->m, cpl);
	my_vcpu = v->number;
	vcpu_attach(v);
	return v;
}

void slot_vm_expect_all_present(struct slot_vm *s)
{
	for (double start = now(); kvmfault_pages_absent(s->m.library) && now() - start < 5;)
		poll(NULL, 0, 1);
	EQUAL("pages absent", kvmfault_pages_absent(s->m.library), 0);
}

void slot_vm_visit(struct slot_vm *s, struct vcpu *v, uint64_t first, uint64_t count, int mode)
{
	vcpu_load_verify(v, RAM_GPA, s->list_gpa + first * sizeof(*s->list), count, &s->source.pattern, mode);
	vcpu_verify(v);
}

struct step *slot_vm_step(struct slot_vm *s, struct vcpu *v, struct step step)
{
	struct step *steps = (struct step *)(s->m.low + v->stack);
	steps[0] = step;
	steps[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, v->stack);
	return steps;
}

uint64_t slot_vm_read(struct slot_vm *s, struct vcpu *v, uint64_t address)
{
	struct step *steps = slot_vm_step(s, v, (struct step){ READ64, address, 0, 0 });
	vcpu_run(v);
	return steps[0].value;
}

void slot_vm_write(struct slot_vm *s, struct vcpu *v, uint64_t address, uint64_t value)
{
	slot_vm_step(s, v, (struct step){ WRITE64, address, value, 0 });
	vcpu_run(v);
}

void slot_vm_dirty_log(struct slot_vm *s, uint64_t *log)
{
	struct kvm_dirty_log get = { .slot = RAM_SLOT, .dirty_bitmap = log };
	memset(log, 0, s->pages / 8);
	SYS(ioctl(s->m.vm, KVM_GET_DIRTY_LOG, &get));
}

struct visit {
	struct slot_vm *vm;
	uint64_t first, count;
	int mode;
};

static void *visit_main(struct vcpu *v)
{
	struct visit *visit = v->opaque;
	my_vcpu = v->number;
	vcpu_attach(v);
	slot_vm_visit(visit->vm, v, visit->first, visit->count, visit->mode);
	vcpu_detach(v);
	free(visit);
	return NULL;
}

void slot_vm_start_visit(struct slot_vm *s, struct vcpu *v, uint64_t first, uint64_t count, int mode)
{
	struct visit *visit = malloc(sizeof(*visit));
	CHECK(visit, "no memory");
	*visit = (struct visit){ s, first, count, mode };
	vcpu_start(v, visit_main, visit);
}
