/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Promises of the header that a VMM developer relies on, one case each. */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static void expect_state(uint64_t page, int state)
{
	char what[32];
	snprintf(what, sizeof(what), "state of page %d", (int)page);
	EQUAL(what, kvmfault_pages_state(resolver_vm.m.library, RAM_GPA + page * PAGE), state);
}

/* ---- "PENDING announces the page, not the window" ---- */

static atomic_ulong announced, announced_first, announced_len; /* page; and the window around it */

/* The pages in a row until the library offers a window; then only an announcement. */
static int announce_a_window(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	if (fault->window_len == fault->len || announced_len) {
		OK(source_install(&resolver_vm.source, vm, fault->gpa, fault->len));
		return KVMFAULT_RESOLVED;
	}
	announced = resolver_vm_page_of(fault);
	announced_first = (fault->window_gpa - RAM_GPA) / PAGE;
	announced_len = fault->window_len / PAGE;
	return KVMFAULT_PENDING;
}

static void *read_in_a_row(struct vcpu *v)
{
	vcpu_attach(v);
	resolver_vm_read_all(v);
	resolver_vm.finished++;
	return NULL;
}

static void pending_is_for_the_page(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = announce_a_window;
	options.readahead = 16;
	resolver_vm_set_up_with(&options, MEMFD, 1, 3);
	vcpu_start(resolver_vm.m.vcpu[0], read_in_a_row, NULL);
	UNTIL(announced_len > 1);
	UNTIL(kvmfault_pages_state(resolver_vm.m.library, RAM_GPA + announced * PAGE) == KVMFAULT_PAGE_RESOLVING);
	for (uint64_t page = announced_first; page < announced_first + announced_len; page++)
		expect_state(page, page == announced ? KVMFAULT_PAGE_RESOLVING : KVMFAULT_PAGE_ABSENT);
	/* The other pages are fetched when they are needed, without a further call of the VMM. */
	resolver_vm_install(announced);
	UNTIL(resolver_vm.finished == 1);
	vcpu_join(resolver_vm.m.vcpu[0]);
	resolver_vm_tear_down();
}

/* ---- "install stops at a lost page, and what it has installed stays" ---- */

static void install_stops_at_lost(void)
{
	uint8_t bytes[8 * PAGE];
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, 1, 3);
	memset(bytes, 0x5a, sizeof(bytes));
	OK(kvmfault_pages_lost(resolver_vm.m.library, RAM_GPA + 6 * PAGE, PAGE));
	REFUSED(kvmfault_pages_install(resolver_vm.m.library, RAM_GPA + 4 * PAGE, bytes, sizeof(bytes)), EHWPOISON,
		"lost");
	for (uint64_t page = 4; page < 12; page++)
		expect_state(page, page < 6    ? KVMFAULT_PAGE_PRESENT
				   : page == 6 ? KVMFAULT_PAGE_LOST
					       : KVMFAULT_PAGE_ABSENT);
	EQUAL("a byte before it", resolver_vm.ram.hva[5 * PAGE], 0x5a);
	resolver_vm_tear_down();
}

/* ---- "the functions on pages mean address space 0, and others where 0 has nothing" ---- */

static void address_space_of_pages(void)
{
	struct ram other;
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, 1, 3);
	if (ioctl(resolver_vm.m.vm, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE) < 2)
		skip("KVM_CAP_MULTI_ADDRESS_SPACE is below 2 here");
	/* Other memory at the same guest address in address space 1, and twice as much of it. */
	ram_create(&other, MEMFD, 2 * RESOLVER_VM_PAGES * PAGE);
	machine_set_slot(&resolver_vm.m, &other, 1u << 16 | RAM_SLOT, RAM_GPA);
	OK(kvmfault_pages_zero(resolver_vm.m.library, RAM_GPA, PAGE));
	EQUAL("absent pages", kvmfault_pages_absent(resolver_vm.m.library), 3 * RESOLVER_VM_PAGES - 1);
	expect_state(0, KVMFAULT_PAGE_PRESENT);
	OK(kvmfault_pages_zero(resolver_vm.m.library, RAM_GPA + RESOLVER_VM_PAGES * PAGE, PAGE));
	expect_state(RESOLVER_VM_PAGES, KVMFAULT_PAGE_PRESENT);
	/* Once address space 0 has no slot there, the same address means the other space's slot. */
	struct kvmfault_memslot gone = KVMFAULT_MEMSLOT_INIT;
	gone.slot = RAM_SLOT;
	OK(kvmfault_memslot_set(resolver_vm.m.library, &gone));
	expect_state(0, KVMFAULT_PAGE_ABSENT);
	EQUAL("absent pages", kvmfault_pages_absent(resolver_vm.m.library), 2 * RESOLVER_VM_PAGES - 1);
	machine_destroy(&resolver_vm.m);
	ram_destroy(&resolver_vm.ram);
	ram_destroy(&other);
	source_destroy(&resolver_vm.source);
}

/* ---- "while a kept slot is away, host accesses to absent pages wait" ---- */

static int install(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	resolver_vm.calls++;
	OK(source_install(&resolver_vm.source, vm, fault->gpa, fault->len));
	return KVMFAULT_RESOLVED;
}

static atomic_ullong word;

static void *load_page_7(void *arg)
{
	resolver_vm.finished = 1;
	word = *(volatile uint64_t *)(resolver_vm.ram.hva + 7 * PAGE);
	resolver_vm.finished = 2;
	return arg;
}

static void host_waits_while_kept(void)
{
	pthread_t thread;
	struct kvmfault_memslot gone = KVMFAULT_MEMSLOT_INIT;
	resolver_vm_set_up(MEMFD, install, 1, 3);
	gone.slot = RAM_SLOT;
	gone.flags = KVMFAULT_MEMSLOT_KEEP;
	OK(kvmfault_memslot_set(resolver_vm.m.library, &gone));
	CHECK(!pthread_create(&thread, NULL, load_page_7, NULL), "pthread_create");
	UNTIL(resolver_vm.finished > 0);
	usleep(100000); /* time to go wrong in */
	EQUAL("what the thread has done", resolver_vm.finished, 1);
	EQUAL("resolver calls while no slot shows the page", resolver_vm.calls, 0);
	machine_set_slot(&resolver_vm.m, &resolver_vm.ram, RAM_SLOT, RAM_GPA);
	UNTIL(resolver_vm.finished == 2);
	pthread_join(thread, NULL);
	EQUAL("the word", word, pattern_word(&resolver_vm.source.pattern, 7, 0));
	EQUAL("resolver calls", resolver_vm.calls, 1);
	resolver_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "pending-is-for-the-page", pending_is_for_the_page, true },
	{ "install-stops-at-lost", install_stops_at_lost, true },
	{ "address-space-of-pages", address_space_of_pages, true },
	{ "host-waits-while-kept", host_waits_while_kept, true },
};
TEST_MAIN(cases)
