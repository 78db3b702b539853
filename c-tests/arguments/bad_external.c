/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What cannot be used together with a post-copy of the VMM's own (KVMFAULT_VM_EXTERNAL_UFFD), and
 * what cannot be used without one.
 */
#define _GNU_SOURCE
#include "postcopy_vmm.h"

#include <errno.h>
#include <sys/mman.h>

static void refusals(void)
{
	struct kvmfault_vm_options options = postcopy_vmm_options();
	struct machine plain;
	struct source source;
	struct ram ram;

	/* Without the flag the pages are the library's. */
	ram_create(&ram, MEMFD, 16 * PAGE);
	machine_create(&plain, PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	machine_attach(&plain, &source, NULL);
	machine_set_slot(&plain, &ram, RAM_SLOT, RAM_GPA);
	REFUSED(kvmfault_pages_arrived(plain.library, ram.hva, PAGE), EOPNOTSUPP, "KVMFAULT_VM_EXTERNAL_UFFD");
	REFUSED(kvmfault_pages_missing(plain.library, ram.hva, PAGE), EOPNOTSUPP, "KVMFAULT_VM_EXTERNAL_UFFD");
	EQUAL("pages absent", kvmfault_pages_absent(plain.library), 16);
	machine_destroy(&plain);

	/* With it, none of these. */
	machine_create(&plain, PAGE);
	options.kvm_fd = plain.kvm;
	options.vm_fd = plain.vm;
	options.mechanism = test_mechanism();
	if (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD) {
		REFUSED(kvmfault_vm_new(&options, &plain.library), EOPNOTSUPP, "KVMFAULT_VM_EXTERNAL_UFFD");
		machine_destroy(&plain);
		return;
	}
	options.reader_threads = 1;
	REFUSED(kvmfault_vm_new(&options, &plain.library), EINVAL, "reader_threads");
	machine_destroy(&plain);
	postcopy_vmm_set_up(MEMFD, false);
	struct kvmfault_vm *vm = postcopy_vmm.m.library;
	uint8_t *hva = postcopy_vmm.ram.hva, *missing = hva + (PAGES - 1) * PAGE;
	static uint8_t bytes[PAGE];
	REFUSED(kvmfault_pages_install(vm, RAM_GPA, bytes, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	REFUSED(kvmfault_pages_zero(vm, RAM_GPA, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	REFUSED(kvmfault_pages_map(vm, RAM_GPA, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	REFUSED(kvmfault_pages_discard(vm, RAM_GPA, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	REFUSED(kvmfault_pages_give_back(vm, RAM_GPA, PAGE), EOPNOTSUPP, "kvmfault_pages_arrived");
	struct kvmfault_fill_options fill_options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	REFUSED(kvmfault_fill_start(vm, &fill_options, &fill), EOPNOTSUPP, "kvmfault_pages_arrived");
	int (*const functions[])(const struct kvmfault_vm *, const void *, uint64_t) = { kvmfault_pages_arrived,
											 kvmfault_pages_missing };
	for (int i = 0; i < 2; i++) {
		REFUSED(functions[i](NULL, hva, PAGE), EINVAL, "vm");
		REFUSED(functions[i](vm, NULL, PAGE), ENOENT, "hva");
		REFUSED(functions[i](vm, bytes, PAGE), ENOENT, "hva");
		REFUSED(functions[i](vm, hva + postcopy_vmm.ram.len, PAGE), ENOENT, "hva");
		REFUSED(functions[i](vm, hva, 0), EINVAL, "len");
		REFUSED(functions[i](vm, hva, PAGE - 1), EINVAL, "len");
		REFUSED(functions[i](vm, hva + 8, PAGE), EINVAL, "hva");
		REFUSED(functions[i](vm, hva + PAGE, postcopy_vmm.ram.len), EINVAL, "len");
		REFUSED(functions[i](vm, hva, -PAGE), EINVAL, "len");
	}
	if (test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP) {
		struct ram anon;
		ram_create(&anon, ANON, 16 * PAGE);
		struct kvmfault_memslot slot = slot_on(&anon, RAM_SLOT + 1, RAM_GPA + postcopy_vmm.ram.len);
		REFUSED(kvmfault_memslot_set(vm, &slot), EOPNOTSUPP, "private");
		ram_destroy(&anon);
		/* What arrived without bytes reads as zeros. */
		struct vcpu *v = machine_add_vcpu(&postcopy_vmm.m, 3);
		vcpu_load_touch(v, RAM_GPA + (PAGES - 1) * PAGE, 1, PAGE);
		OK(kvmfault_pages_arrived(vm, missing, PAGE));
		EQUAL("pages found empty before", machine_stats(&postcopy_vmm.m).pages_empty, 0);
		vcpu_attach(v);
		vcpu_run(v);
		vcpu_detach(v);
		EQUAL("pages found empty", machine_stats(&postcopy_vmm.m).pages_empty, 1);
		SYS(madvise(missing, PAGE, MADV_REMOVE));
		OK(kvmfault_pages_missing(vm, missing, PAGE));
		EQUAL("the page", kvmfault_pages_state(vm, RAM_GPA + (PAGES - 1) * PAGE), KVMFAULT_PAGE_ABSENT);
	}
	/* A lost page is lost for vCPUs; the VMM's threads still get it, if it comes. */
	OK(kvmfault_pages_lost(vm, RAM_GPA + (PAGES - 1) * PAGE, PAGE));
	REFUSED(kvmfault_pages_arrived(vm, missing, PAGE), EHWPOISON, "lost");
	EQUAL("pages missing", kvmfault_pages_absent(vm), PAGES / 2 + PAGES / 8 - 1);
	postcopy_vmm_tear_down();
}

static const struct test_case cases[] = {
	{ "refusals", refusals, true },
};
TEST_MAIN(cases)
