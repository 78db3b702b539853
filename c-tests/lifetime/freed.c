/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kvmfault_vm_free during a resolver call, while vCPUs wait, and before anything ran; and when the
 * finalizer is called.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <unistd.h>

static atomic_int finalized, attached;
static atomic_bool let_go, left;

static void finalizer(void *opaque)
{
	CHECK(opaque == &resolver_vm, "the finalizer's argument is not the resolver's");
	/* After the last call, and not while it is under way. */
	CHECK(left, "the finalizer ran before the callback returned");
	finalized++;
}

static int answer_when_let_go(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	resolver_vm.calls++;
	while (!let_go)
		usleep(1000);
	/* The VM may be gone by now: an error, and nothing worse. */
	int ret = source_install(&resolver_vm.source, vm, fault->gpa, fault->len);
	EQUAL("installing in a VM that was freed", ret, -ESHUTDOWN);
	left = true;
	return ret;
}

static void set_up_with_finalizer(kvmfault_resolver resolver, int vcpus)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolver;
	options.finalizer = finalizer;
	resolver_vm_set_up_with(&options, MEMFD, vcpus, 3);
}

static void *run_until_shutdown(struct vcpu *v)
{
	int ret;
	vcpu_attach(v);
	attached++;
	while ((ret = kvmfault_vcpu_run(v->handle)) == KVMFAULT_INTERRUPTED)
		;
	CHECK(ret == -ESHUTDOWN, "%s", vcpu_describe(v, ret));
	EQUAL("once more", kvmfault_vcpu_run(v->handle), -ESHUTDOWN);
	resolver_vm.finished++;
	return NULL;
}

static void free_vm(void)
{
	double start = now();
	struct kvmfault_vm *vm = resolver_vm.m.library;
	resolver_vm.m.library = NULL;
	kvmfault_vm_free(vm);
	CHECK(now() - start < 5, "kvmfault_vm_free took %.1f s", now() - start);
	EQUAL("a call on the freed handle", kvmfault_pages_absent(vm), -EBADF);
	kvmfault_vm_free(vm); /* left alone */
}

/* The resolver does not return: the VM can be freed all the same, and nothing waits. */
static void free_during_call(void)
{
	set_up_with_finalizer(answer_when_let_go, 1);
	resolver_vm_load_read(resolver_vm.m.vcpu[0], 1);
	vcpu_start(resolver_vm.m.vcpu[0], run_until_shutdown, NULL);
	UNTIL(resolver_vm.calls == 1);
	free_vm();
	usleep(100000);
	EQUAL("finalized while the resolver is still at it", finalized, 0);
	let_go = true;
	UNTIL(resolver_vm.finished == 1);
	vcpu_join(resolver_vm.m.vcpu[0]);
	vcpu_detach(resolver_vm.m.vcpu[0]);
	UNTIL(finalized == 1);
	usleep(50000);
	EQUAL("finalized", finalized, 1);
	EQUAL("calls", resolver_vm.calls, 1);
	resolver_vm_tear_down();
}

/* vCPUs that wait for a page leave when the VM is freed. */
static void free_while_waiting(void)
{
	enum { N = 4 };
	left = true;
	set_up_with_finalizer(resolver_vm_answer_pending, N);
	for (int i = 0; i < N; i++) {
		resolver_vm_load_read(resolver_vm.m.vcpu[i], i / 2);
		vcpu_start(resolver_vm.m.vcpu[i], run_until_shutdown, NULL);
	}
	UNTIL(resolver_vm.calls == N / 2 && attached == N);
	usleep(20000);
	free_vm();
	UNTIL(resolver_vm.finished == N);
	for (int i = 0; i < N; i++) {
		vcpu_join(resolver_vm.m.vcpu[i]);
		vcpu_detach(resolver_vm.m.vcpu[i]);
	}
	UNTIL(finalized == 1);
	usleep(50000);
	EQUAL("finalized", finalized, 1);
	resolver_vm_tear_down();
}

/*
 * A VM that never ran: its finalizer runs, too; one that couldn't be made leaves `opaque` to the
 * caller.
 */
static void free_unused(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vm *vm;
	left = true;
	set_up_with_finalizer(resolver_vm_answer_pending, 0);
	free_vm();
	UNTIL(finalized == 1);
	options.kvm_fd = resolver_vm.m.kvm;
	options.vm_fd = resolver_vm.m.vm;
	options.mechanism = 99;
	options.resolver = resolver_vm_answer_pending;
	options.opaque = &resolver_vm;
	options.finalizer = finalizer;
	REFUSED(kvmfault_vm_new(&options, &vm), EINVAL, "mechanism");
	usleep(20000);
	EQUAL("finalized", finalized, 1);
	resolver_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "during-call", free_during_call, true },
	{ "while-waiting", free_while_waiting, true },
	{ "unused", free_unused, true },
};
TEST_MAIN(cases)
