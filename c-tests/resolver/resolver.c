/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What a resolver may answer, rightly or wrongly; and what may be called from it. */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <string.h>

/* ---- answers that are errors ---- */

static int answer;       /* the next; 0 for what is right */
static bool install_too; /* and before it, what is right */

static int answer_as_told(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	resolver_vm.calls++;
	if (!answer || install_too)
		OK(source_install(&resolver_vm.source, vm, fault->gpa, fault->len));
	return answer;
}

static int answer_nothing(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	resolver_vm.calls++;
	if (!answer)
		OK(source_install(&resolver_vm.source, vm, fault->gpa, fault->len));
	return KVMFAULT_RESOLVED;
}

/* The vCPU's loop returns `error`; after that the vCPU runs again, and the same access succeeds. */
static void bad_answer(kvmfault_resolver resolver, int given, int error, const char *words, int cpl)
{
	require_interruptible_sleep();
	if (cpl == 0 && test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD && cpl0_is_emulated())
		skip("a vCPU for which KVM's emulator waits in userfaultfd can't be interrupted, not even by an error");
	resolver_vm_set_up(MEMFD, resolver, 1, cpl);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	vcpu_attach(v);
	resolver_vm.calls = 0;
	answer = given;
	resolver_vm_load_read(v, 4);
	REFUSED(kvmfault_vcpu_run(v->handle), error, words);
	CHECK(strstr(kvmfault_last_error(), "0x40004000"), "the message doesn't name the page: %s",
	      kvmfault_last_error());
	CHECK(resolver_vm.calls >= 1, "the resolver wasn't called");
	answer = 0;
	EQUAL("stop", vcpu_run(v), 0);
	resolver_vm_check_read(v, 4);
	resolver_vm_tear_down();
}

static void error_cpl3(void)
{
	bad_answer(answer_as_told, -EIO, EIO, "Input/output error", 3);
}

static void error_cpl0(void)
{
	bad_answer(answer_as_told, -ENETDOWN, ENETDOWN, "Network is down", 0);
}

static void garbage(void)
{
	bad_answer(answer_as_told, 12345, EPROTO, "12345", 3);
	bad_answer(answer_as_told, -1000000, EPROTO, "-1000000", 3);
	bad_answer(answer_as_told, -2147483647 - 1, EPROTO, "-2147483648", 3);
}

static void installs_nothing(void)
{
	bad_answer(answer_nothing, 1, EPROTO, "installed nothing", 3);
}

static void installs_nothing_cpl0(void)
{
	bad_answer(answer_nothing, 1, EPROTO, "installed nothing", 0);
}

/* -EEXIST from a resolver means that another thread installed the page first: no error. */
static void eexist(void)
{
	answer = -EEXIST;
	install_too = true;
	resolver_vm_set_up(MEMFD, answer_as_told, 1, 3);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	vcpu_attach(v);
	resolver_vm_read_all(v);
	EQUAL("calls", resolver_vm.calls, RESOLVER_VM_PAGES);
	EQUAL("outcome_failed", machine_settled_stats(&resolver_vm.m).outcome_failed, 0);
	resolver_vm_tear_down();
}

/* But where the page isn't there, it is one. */
static void eexist_wrong(void)
{
	require_interruptible_sleep();
	bad_answer(answer_as_told, -EEXIST, EEXIST, "0x40004000", 3);
}

/* A resolver that installs more than the fault. */
static int answer_all(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)fault;
	resolver_vm.calls++;
	OK(source_install(&resolver_vm.source, vm, RAM_GPA, RESOLVER_VM_PAGES * PAGE));
	return KVMFAULT_RESOLVED;
}

static void installs_more(void)
{
	resolver_vm_set_up(ANON, answer_all, 1, 3);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	vcpu_attach(v);
	resolver_vm_read(v, 0);
	/* the guest may be ahead of the counters */
	UNTIL(kvmfault_pages_absent(resolver_vm.m.library) == 0);
	resolver_vm_read_all(v);
	EQUAL("calls", resolver_vm.calls, 1);
	resolver_vm_tear_down();
}

/* ---- calls from a callback ---- */

static int call_everything(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	uint64_t other = RAM_GPA + 20 * PAGE, third = RAM_GPA + 21 * PAGE;
	struct vcpu *v = resolver_vm.m.vcpu[0];
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	struct kvmfault_memslot slot = slot_on(&resolver_vm.ram, 2, RAM_GPA);
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vcpu_options vcpu_options = KVMFAULT_VCPU_OPTIONS_INIT;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	struct kvmfault_vm *new_vm = NULL;
	struct kvmfault_vcpu *new_vcpu = NULL;
	CHECK(opaque == &resolver_vm && vm == resolver_vm.m.library, "the resolver's arguments are not the case's");
	resolver_vm.calls++;
	if (resolver_vm_page_of(fault) != 2) { /* the host's own accesses below */
		OK(source_install(&resolver_vm.source, vm, fault->gpa, fault->len));
		return KVMFAULT_RESOLVED;
	}

	/* What the fault says. */
	EQUAL("fault.size", fault->size, sizeof(*fault));
	EQUAL("fault.len", fault->len, PAGE);
	EQUAL("fault.hva", (uint8_t *)fault->hva - resolver_vm.ram.hva, 2 * PAGE);
	EQUAL("fault.slot", fault->slot, RAM_SLOT);
	EQUAL("fault.window_gpa", fault->window_gpa, fault->gpa);
	EQUAL("fault.window_len", fault->window_len, PAGE);
	EQUAL("fault.origin", fault->origin, KVMFAULT_ORIGIN_VCPU);
	EQUAL("fault.vcpu", fault->vcpu, 0);
	EQUAL("state of the page itself", kvmfault_pages_state(vm, fault->gpa), KVMFAULT_PAGE_RESOLVING);

	/* Not from the page itself, which would be there only afterwards. */
	REFUSED(kvmfault_pages_install(vm, fault->gpa, fault->hva, PAGE), EFAULT, "src");
	EQUAL("state of the page itself", kvmfault_pages_state(vm, fault->gpa), KVMFAULT_PAGE_RESOLVING);

	/* Allowed. */
	OK(kvmfault_pages_zero(vm, other, PAGE));
	OK(source_install(&resolver_vm.source, vm, third, PAGE));
	OK(kvmfault_pages_lost(vm, third + PAGE, PAGE));
	EQUAL("pages_map of what isn't in the page cache", kvmfault_pages_map(vm, third + 2 * PAGE, PAGE), -ENOENT);
	/* the guest may be ahead of the counters */
	UNTIL(kvmfault_pages_absent(vm) == RESOLVER_VM_PAGES - 3);
	EQUAL("state", kvmfault_pages_state(vm, other), KVMFAULT_PAGE_PRESENT);
	OK(kvmfault_vm_stats(vm, &stats));
	OK(kvmfault_vcpu_stats(v->handle, &stats));
	OK(kvmfault_vcpu_kick(v->handle));
	OK(kvmfault_vm_mechanism(vm));
	OK(kvmfault_memslot_mechanism(vm, RAM_SLOT));
	CHECK(kvmfault_last_error() && kvmfault_version(), "a NULL string");

	/* Not allowed, and without effect. */
	options.kvm_fd = resolver_vm.m.kvm;
	options.vm_fd = resolver_vm.m.vm;
	options.resolver = call_everything;
	vcpu_options.fd = v->fd;
	slot.len = 0;
	REFUSED(kvmfault_pages_discard(vm, other, PAGE), EDEADLK, "kvmfault_pages_discard");
	REFUSED(kvmfault_pages_give_back(vm, other, PAGE), EDEADLK, "kvmfault_pages_give_back");
	REFUSED(kvmfault_pages_resolve(vm, third + 2 * PAGE, PAGE), EDEADLK, "kvmfault_pages_resolve");
	REFUSED(kvmfault_memslot_set(vm, &slot), EDEADLK, "kvmfault_memslot_set");
	REFUSED(kvmfault_memslot_prepare(vm, &slot, &region), EDEADLK, "kvmfault_memslot_prepare");
	REFUSED(kvmfault_memslot_set_fast_only(vm, RAM_SLOT, 0), EDEADLK, "kvmfault_memslot_set_fast_only");
	REFUSED(kvmfault_vm_enable(vm, 0), EDEADLK, "kvmfault_vm_enable");
	REFUSED(kvmfault_vm_new(&options, &new_vm), EDEADLK, "kvmfault_vm_new");
	REFUSED(kvmfault_vcpu_new(vm, &vcpu_options, &new_vcpu), EDEADLK, "kvmfault_vcpu_new");
	REFUSED(kvmfault_vcpu_run(v->handle), EDEADLK, "kvmfault_vcpu_run");
	REFUSED(kvmfault_vcpu_handle_exit(v->handle, 0), EDEADLK, "kvmfault_vcpu_handle_exit");
	REFUSED(kvmfault_vcpu_resume(v->handle), EDEADLK, "kvmfault_vcpu_resume");
	REFUSED(kvmfault_probe(-1, &probe), EDEADLK, "callback");
	REFUSED(kvmfault_explain(-1, NULL, 0), EDEADLK, "callback");
	EQUAL("state", kvmfault_pages_state(vm, other), KVMFAULT_PAGE_PRESENT);

	OK(source_install(&resolver_vm.source, vm, fault->gpa, fault->len));
	return KVMFAULT_RESOLVED;
}

static void callbacks(void)
{
	resolver_vm_set_up(MEMFD, call_everything, 1, 3);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	vcpu_attach(v);
	resolver_vm_load_read(v, 2);
	int ret = kvmfault_vcpu_run(v->handle);
	/* The kick from inside. */
	CHECK(ret == KVMFAULT_INTERRUPTED, "%s", vcpu_describe(v, ret));
	EQUAL("stop", vcpu_run(v), 0);
	resolver_vm_check_read(v, 2);
	EQUAL("calls", resolver_vm.calls, 1);
	/* Outside of callbacks the same thread may call all of it. */
	OK(kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA + 20 * PAGE, PAGE));
	OK(kvmfault_pages_resolve(resolver_vm.m.library, RAM_GPA + 20 * PAGE, PAGE));
	EQUAL("calls", resolver_vm.calls, 2);
	resolver_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "error", error_cpl3, true },
	{ "error-cpl0", error_cpl0, true },
	{ "garbage", garbage, true },
	{ "installs-nothing", installs_nothing, true },
	{ "installs-nothing-cpl0", installs_nothing_cpl0, true },
	{ "eexist", eexist, true },
	{ "eexist-wrong", eexist_wrong, true },
	{ "installs-more", installs_more, true },
	{ "callbacks", callbacks, true },
};
TEST_MAIN(cases)
