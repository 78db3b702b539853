/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Resolvers that don't install the page before they return: KVMFAULT_PENDING, and KVMFAULT_RETRY.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <unistd.h>

/* ---- PENDING ---- */

static atomic_int order[RESOLVER_VM_PAGES];

static void *run_and_note(struct vcpu *v)
{
	vcpu_attach(v);
	vcpu_run(v);
	order[resolver_vm.finished] = v->number; /* one at a time goes on */
	resolver_vm.finished++;
	return NULL;
}

/*
 * Eight vCPUs wait for eight pages; these come from another thread, last first, and each wakes its
 * vCPU and no other.
 */
static void pending_out_of_order(void)
{
	enum { N = 8 };
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, N, 3);
	for (int i = 0; i < N; i++) {
		resolver_vm_load_read(resolver_vm.m.vcpu[i], i);
		vcpu_start(resolver_vm.m.vcpu[i], run_and_note, NULL);
	}
	UNTIL(resolver_vm.calls == N);
	for (int i = N - 1; i >= 0; i--) {
		EQUAL("vCPUs that have gone on", resolver_vm.finished, N - 1 - i);
		EQUAL("state", kvmfault_pages_state(resolver_vm.m.library, RAM_GPA + i * PAGE),
		      KVMFAULT_PAGE_RESOLVING);
		resolver_vm_install(i);
		UNTIL(resolver_vm.finished == N - i);
		EQUAL("the vCPU that went on", order[N - 1 - i], i);
	}
	for (int i = 0; i < N; i++) {
		vcpu_join(resolver_vm.m.vcpu[i]);
		resolver_vm_check_read(resolver_vm.m.vcpu[i], i);
		EQUAL("calls for a page", resolver_vm.calls_for[i], 1);
	}
	EQUAL("outcome_failed", machine_settled_stats(&resolver_vm.m).outcome_failed, 0);
	resolver_vm_tear_down();
}

/* Eight vCPUs wait for one page: one call, and all go on. */
static void pending_shared(void)
{
	enum { N = 8 };
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, N, 3);
	for (int i = 0; i < N; i++) {
		resolver_vm_load_read(resolver_vm.m.vcpu[i], 5);
		vcpu_start(resolver_vm.m.vcpu[i], resolver_vm_run_to_stop, NULL);
	}
	UNTIL(resolver_vm.calls == 1);
	usleep(100000); /* the others come, too */
	EQUAL("calls while the page is pending", resolver_vm.calls, 1);
	resolver_vm_install(5);
	for (int i = 0; i < N; i++) {
		vcpu_join(resolver_vm.m.vcpu[i]);
		resolver_vm_check_read(resolver_vm.m.vcpu[i], 5);
	}
	EQUAL("calls in all", resolver_vm.calls, 1);
	resolver_vm_tear_down();
}

/* The page comes, or turns out to be lost, before the resolver that says PENDING has returned. */
static int pending_too_late(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	resolver_vm.calls++;
	OK(source_install(&resolver_vm.source, vm, fault->gpa, fault->len));
	return KVMFAULT_PENDING;
}

static void pending_already_there(void)
{
	resolver_vm_set_up(MEMFD, pending_too_late, 1, 3);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	vcpu_attach(v);
	resolver_vm_read_all(v);
	EQUAL("calls", resolver_vm.calls, RESOLVER_VM_PAGES);
	resolver_vm_tear_down();
}

static void *install_from_page_5(void *arg)
{
	(void)arg;
	OK(kvmfault_pages_install(resolver_vm.m.library, RAM_GPA + 6 * PAGE, resolver_vm.ram.hva + 5 * PAGE, PAGE));
	resolver_vm.finished++;
	return NULL;
}

/* A pending page is the source of another: that one waits, and gets the bytes. */
static void pending_source(void)
{
	pthread_t thread;
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, 1, 3);
	resolver_vm_load_read(resolver_vm.m.vcpu[0], 5);
	vcpu_start(resolver_vm.m.vcpu[0], resolver_vm_run_to_stop, NULL);
	UNTIL(resolver_vm.calls == 1);
	CHECK(!pthread_create(&thread, NULL, install_from_page_5, NULL), "pthread_create");
	usleep(50000);
	EQUAL("installed from a page that isn't there", resolver_vm.finished, 0);
	resolver_vm_install(5);
	pthread_join(thread, NULL);
	vcpu_join(resolver_vm.m.vcpu[0]);
	EQUAL("state", kvmfault_pages_state(resolver_vm.m.library, RAM_GPA + 6 * PAGE), KVMFAULT_PAGE_PRESENT);
	EQUAL("a word of the copy", *(uint64_t *)(resolver_vm.ram.hva + 6 * PAGE),
	      pattern_word(&resolver_vm.source.pattern, 5, 0));
	resolver_vm_tear_down();
}

/* ---- RETRY ---- */

enum { TRIES = 5 };

static int answer_retry(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	resolver_vm.calls++;
	if (++resolver_vm.calls_for[resolver_vm_page_of(fault)] < TRIES)
		return KVMFAULT_RETRY;
	OK(source_install(&resolver_vm.source, vm, fault->gpa, fault->len));
	return KVMFAULT_RESOLVED;
}

static void retry(int cpl)
{
	resolver_vm_set_up(MEMFD, answer_retry, 1, cpl);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	vcpu_attach(v);
	resolver_vm_read_all(v);
	struct kvmfault_stats stats = machine_settled_stats(&resolver_vm.m);
	EQUAL("calls", resolver_vm.calls, RESOLVER_VM_PAGES * TRIES);
	EQUAL("resolver_calls", stats.resolver_calls, RESOLVER_VM_PAGES * TRIES);
	EQUAL("outcome_retried", stats.outcome_retried, RESOLVER_VM_PAGES * (TRIES - 1));
	resolver_vm_tear_down();
}

static void retry_cpl3(void)
{
	retry(3);
}

static void retry_cpl0(void)
{
	retry(0);
}

static int always_retry(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm, (void)fault;
	resolver_vm.calls++;
	return KVMFAULT_RETRY;
}

/* Retries end with an error that names the page. (Takes some 20 s, asleep.) */
static void retry_ends(void)
{
	require_interruptible_sleep();
	resolver_vm_set_up(MEMFD, always_retry, 1, 3);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	vcpu_attach(v);
	resolver_vm_load_read(v, 7);
	double began = now();
	REFUSED(kvmfault_vcpu_run(v->handle), ELOOP,
		test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD ? "retries" : "0x40007000");
	CHECK(resolver_vm.calls > 100, "only %u tries", resolver_vm.calls);
	CHECK(now() - began > 1, "%u tries in %.3f s: no pauses between", resolver_vm.calls, now() - began);
	resolver_vm_tear_down();
}

/* A kick ends the pause between tries. */
static void *run_once(struct vcpu *v)
{
	vcpu_attach(v);
	int ret = kvmfault_vcpu_run(v->handle);
	CHECK(ret == KVMFAULT_INTERRUPTED, "%s", vcpu_describe(v, ret));
	resolver_vm.finished++;
	return NULL;
}

static void retry_kicked(void)
{
	require_interruptible_sleep();
	resolver_vm_set_up(MEMFD, always_retry, 1, 3);
	resolver_vm_load_read(resolver_vm.m.vcpu[0], 7);
	vcpu_start(resolver_vm.m.vcpu[0], run_once, NULL);
	UNTIL(resolver_vm.calls > 20);
	OK(kvmfault_vcpu_kick(resolver_vm.m.vcpu[0]->handle));
	UNTIL(resolver_vm.finished == 1);
	vcpu_join(resolver_vm.m.vcpu[0]);
	resolver_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "out-of-order", pending_out_of_order, true },
	{ "shared", pending_shared, true },
	{ "already-there", pending_already_there, true },
	{ "source", pending_source, true },
	{ "retry", retry_cpl3, true },
	{ "retry-cpl0", retry_cpl0, true },
	{ "retry-ends", retry_ends, true },
	{ "retry-kicked", retry_kicked, true },
};
TEST_MAIN(cases)
