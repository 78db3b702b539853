/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "fill_vm.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct fill_vm *t = opaque;
	if (fault->origin != KVMFAULT_ORIGIN_FILL) {
		EQUAL("the window of a fault", fault->window_len, fault->len);
		t->holding++;
		while (t->held)
			wait_a_little();
		int ret = source_install(&t->s.source, vm, fault->gpa, fault->len);
		if (ret != -EEXIST)
			OK(ret);
		t->holding--; /* the VM may be freed now, and `t` go */
		return 0;
	}
	EQUAL("vcpu", fault->vcpu, -1);
	t->calls++;
	t->pages += fault->window_len / PAGE;
	if (t->us)
		usleep(t->us);
	while (t->fill_held)
		wait_a_little();
	for (uint64_t gpa = fault->window_gpa; t->answer && gpa < fault->window_gpa + fault->window_len; gpa += PAGE)
		if ((gpa - RAM_GPA) / PAGE % 97 == 5)
			return t->answer;
	int ret = source_install(&t->s.source, vm, fault->window_gpa, fault->window_len);
	/* Another thread may have installed the page; or the VM was freed. */
	return ret == -EEXIST || ret == -EBADF || ret == -ESHUTDOWN ? 0 : OK(ret);
}

void fill_vm_create(struct fill_vm *t, enum backing backing, uint64_t len)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct slot_vm *s = &t->s;
	memset(t, 0, sizeof(*t));
	ram_create(&s->ram, backing, len);
	s->pages = s->ram.len / PAGE;
	machine_create(&s->m, s->pages * sizeof(uint32_t));
	source_create(&s->source, RAM_GPA, s->ram.len, PATTERN);
	s->list = machine_share(&s->m, s->pages * sizeof(uint32_t), &s->list_gpa);
	list_sequential(s->list, s->pages);
	options.resolver = resolve;
	options.opaque = t;
	machine_attach(&s->m, &s->source, &options);
	machine_set_slot(&s->m, &s->ram, RAM_SLOT, RAM_GPA);
}

struct kvmfault_fill *fill_vm_start(struct fill_vm *t, const struct kvmfault_fill_options *options)
{
	struct kvmfault_fill_options usual = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	OK(kvmfault_fill_start(t->s.m.library, options ? options : &usual, &fill));
	return fill;
}

void fill_vm_fill_all(struct fill_vm *t, const struct kvmfault_fill_options *options)
{
	struct kvmfault_fill *fill = fill_vm_start(t, options);
	OK(kvmfault_fill_wait(fill, 60000));
	OK(kvmfault_fill_wait(fill, 0));
	kvmfault_fill_free(fill);
	EQUAL("absent pages", kvmfault_pages_absent(t->s.m.library), 0);
}
