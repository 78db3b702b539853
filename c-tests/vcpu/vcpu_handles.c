/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Making and freeing a vCPU's handle has no lasting effect on the VM, on other vCPUs, on threads or
 * on signals.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>

/* Linux 6.0; older headers lack it. */
enum { TRIPLE_FAULT_EVENT = 218, VALID_TRIPLE_FAULT = 0x20 };

static struct vcpu *sibling;
static atomic_bool stop;
static atomic_ulong set, refused;

/* As a VMM does that sets the state of another vCPU meanwhile. */
static void *set_events(void *unused)
{
	struct kvm_vcpu_events events;
	while (!stop) {
		SYS(ioctl(sibling->fd, KVM_GET_VCPU_EVENTS, &events));
		events.flags |= VALID_TRIPLE_FAULT;
		refused += ioctl(sibling->fd, KVM_SET_VCPU_EVENTS, &events) != 0;
		set++;
	}
	return unused;
}

/*
 * No switch of the VM's is turned, not even for a moment: KVM_SET_VCPU_EVENTS of another vCPU would
 * fail.
 */
static void leaves_the_vm_alone(void)
{
	pthread_t thread;
	struct kvm_enable_cap triple_fault = { .cap = TRIPLE_FAULT_EVENT, .args = { 1 } };
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, 2, 3);
	if (SYS(ioctl(resolver_vm.m.kvm, KVM_CHECK_EXTENSION, TRIPLE_FAULT_EVENT)) <= 0)
		skip("KVM has no KVM_CAP_X86_TRIPLE_FAULT_EVENT (Linux 6.0)");
	SYS(ioctl(resolver_vm.m.vm, KVM_ENABLE_CAP, &triple_fault));
	sibling = resolver_vm.m.vcpu[1];
	CHECK(!pthread_create(&thread, NULL, set_events, NULL), "pthread_create");
	UNTIL(set > 0);
	for (unsigned long n = scaled(1000), before = set; n || set<before + 1000; n -= n> 0) {
		vcpu_attach(resolver_vm.m.vcpu[0]);
		vcpu_detach(resolver_vm.m.vcpu[0]);
	}
	stop = true;
	pthread_join(thread, NULL);
	EQUAL("KVM_SET_VCPU_EVENTS refused", refused, 0);
	note("KVM_SET_VCPU_EVENTS %lu times", (unsigned long)set);
	resolver_vm_tear_down();
}

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	return source_install(&resolver_vm.source, vm, fault->gpa, fault->len);
}

/*
 * A vCPU of another VM goes unnoticed and does no harm: its guest runs, and accesses in no slot are
 * the VMM's.
 */
static void of_another_vm(void)
{
	struct machine other;
	uint64_t steps_gpa;
	uint32_t value;
	resolver_vm_set_up(MEMFD, resolve, 1, 3);
	machine_create(&other, PAGE);
	struct step *steps = machine_share(&other, PAGE, &steps_gpa);
	/* The first of its VM has the number of one of ours, whether that has a handle or not. */
	machine_add_vcpu(&other, 3);
	struct vcpu *foreign = machine_add_vcpu(&other, 3);
	vcpu_attach(resolver_vm.m.vcpu[0]);
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	options.fd = foreign->fd;
	options.run = foreign->run;
	OK(kvmfault_vcpu_new(resolver_vm.m.library, &options, &foreign->handle));
	steps[0] = (struct step){ READ64, NOWHERE_GPA, 0, 0 };
	steps[1] = (struct step){ READ64, RAM_GPA + 3 * PAGE, 0, 0 };
	steps[2] = (struct step){ STOP, 0, 7, 0 };
	vcpu_load_script(foreign, steps_gpa);
	int ret = kvmfault_vcpu_run(foreign->handle);
	CHECK(ret == KVMFAULT_PASS && foreign->run->exit_reason == KVM_EXIT_MMIO, "%s", vcpu_describe(foreign, ret));
	EQUAL("the address", foreign->run->mmio.phys_addr, NOWHERE_GPA);
	ret = kvmfault_vcpu_run(foreign->handle);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(foreign, &value) && value == 7, "%s", vcpu_describe(foreign, ret));
	EQUAL("what it read where only our VM has memory", steps[1].value,
	      pattern_word(&resolver_vm.source.pattern, 3, 0));
	OK(kvmfault_vcpu_kick(foreign->handle));
	steps[3] = (struct step){ STOP, 0, 8, 0 };
	EQUAL("after a kick", kvmfault_vcpu_run(foreign->handle), KVMFAULT_INTERRUPTED);
	EQUAL("stop", vcpu_run(foreign), 8);
	resolver_vm_read_all(resolver_vm.m.vcpu[0]);
	vcpu_detach(foreign);
	machine_destroy(&other);
	resolver_vm_tear_down();
}

/* ---- kicks against free ---- */

static struct kvmfault_vcpu *_Atomic handle;

static void *kick_always(void *unused)
{
	while (!stop) {
		struct kvmfault_vcpu *vcpu = handle;
		if (vcpu) {
			int ret = kvmfault_vcpu_kick(vcpu);
			CHECK(ret == 0 || ret == -EBADF, "kick: %d", ret);
			set++;
		}
	}
	return unused;
}

static void do_nothing(int signal)
{
	(void)signal;
}

/*
 * A kick may come at any moment of a handle's life and after. `run` NULL: the library's mapping of
 * kvm_run goes with the handle.
 */
static void kick_and_free(int sigbus, bool own_mapping)
{
	pthread_t thread[2];
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	stop = false;
	set = 0;
	handle = NULL;
	resolver_vm_set_up(MEMFD, resolve, 1, 3);
	options.fd = resolver_vm.m.vcpu[0]->fd;
	options.run = own_mapping ? NULL : resolver_vm.m.vcpu[0]->run;
	options.sigbus = sigbus;
	options.kick_signal = SIGUSR1;
	for (int i = 0; i < 2; i++)
		CHECK(!pthread_create(&thread[i], NULL, kick_always, NULL), "pthread_create");
	for (unsigned long n = SCALED(3000, 200); n; n--) {
		struct kvmfault_vcpu *vcpu;
		OK(kvmfault_vcpu_new(resolver_vm.m.library, &options, &vcpu));
		handle = vcpu;
		if (n % 4 == 0)
			sched_yield();
		kvmfault_vcpu_free(vcpu);
		if (n % 2)
			sched_yield();
	}
	UNTIL(set > 0);
	stop = true;
	for (int i = 0; i < 2; i++)
		pthread_join(thread[i], NULL);
	resolver_vm_tear_down();
}

/* No signal is left that ends the process: SIGUSR1 has no handler. */
static void kicked_by_mask(void)
{
	kick_and_free(KVMFAULT_SIGBUS_BY_MASK, true);
	kick_and_free(KVMFAULT_SIGBUS_BY_MASK, false);
}

/* kvm_run isn't touched after it was unmapped. */
static void kicked_by_handler(void)
{
	struct sigaction nothing = { .sa_handler = do_nothing };
	SYS(sigaction(SIGUSR1, &nothing, NULL));
	kick_and_free(KVMFAULT_SIGBUS_BY_HANDLER, true);
	kick_and_free(KVMFAULT_SIGBUS_BY_HANDLER, false);
}

/* ---- signals ---- */

static bool is_blocked(int signal)
{
	sigset_t blocked;
	pthread_sigmask(SIG_SETMASK, NULL, &blocked);
	return sigismember(&blocked, signal);
}

static void attach_with(struct vcpu *v, int kick_signal)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	options.fd = v->fd;
	options.run = v->run;
	options.kick_signal = kick_signal;
	OK(kvmfault_vcpu_new(resolver_vm.m.library, &options, &v->handle));
}

/*
 * KVM lets through what the thread blocks, as before: the mask that the library gave the vCPU goes
 * with the handle.
 */
static void gives_kvms_mask_back(void)
{
	uint32_t value;
	sigset_t usr1;
	resolver_vm_set_up(MEMFD, resolve, 1, 3);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	attach_with(v, SIGUSR1);
	resolver_vm_read(v, 1);
	vcpu_detach(v);
	EQUAL("SIGUSR1 is blocked", is_blocked(SIGUSR1), false);
	EQUAL("SIGBUS is blocked", is_blocked(SIGBUS), false);
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &usr1, NULL);
	raise(SIGUSR1);
	resolver_vm_load_read(v, 1);
	CHECK(ioctl(v->fd, KVM_RUN, 0) == 0, "KVM_RUN: %s", strerror(errno));
	CHECK(vcpu_stopped(v, &value), "exit reason %u", v->run->exit_reason);
	resolver_vm_tear_down();
}

/* Each has its signals for as long as it lives, whichever goes first. */
static void two_on_one_thread(void)
{
	resolver_vm_set_up(MEMFD, resolve, 2, 3);
	struct vcpu *first = resolver_vm.m.vcpu[0], *second = resolver_vm.m.vcpu[1];
	attach_with(first, SIGUSR1);
	attach_with(second, SIGUSR1);
	/* A kick isn't lost if the other takes the signal, which the two have in common. */
	OK(kvmfault_vcpu_kick(second->handle));
	OK(kvmfault_vcpu_kick(first->handle));
	resolver_vm_load_read(first, 1);
	EQUAL("after a kick", kvmfault_vcpu_run(first->handle), KVMFAULT_INTERRUPTED);
	resolver_vm_load_read(second, 2);
	EQUAL("after a kick", kvmfault_vcpu_run(second->handle), KVMFAULT_INTERRUPTED);
	vcpu_detach(first);
	EQUAL("SIGUSR1 is blocked", is_blocked(SIGUSR1), true);
	EQUAL("SIGBUS is blocked", is_blocked(SIGBUS), true);
	resolver_vm_read_all(second);
	OK(kvmfault_vcpu_kick(second->handle));
	vcpu_detach(second);
	EQUAL("SIGUSR1 is blocked", is_blocked(SIGUSR1), false);
	EQUAL("SIGBUS is blocked", is_blocked(SIGBUS), false);
	resolver_vm_tear_down();
}

static void *run_elsewhere(void *unused)
{
	resolver_vm_read(resolver_vm.m.vcpu[0], 2);
	CHECK(is_blocked(SIGBUS), "SIGBUS isn't blocked where the vCPU runs");
	return unused;
}

/* A vCPU that goes to another thread and comes back leaves nothing where it is freed. */
static void there_and_back(void)
{
	resolver_vm_set_up(MEMFD, resolve, 1, 3);
	vcpu_attach(resolver_vm.m.vcpu[0]);
	resolver_vm_read(resolver_vm.m.vcpu[0], 1);
	for (int i = 0; i < 3; i++) {
		pthread_t thread;
		CHECK(!pthread_create(&thread, NULL, run_elsewhere, NULL), "pthread_create");
		pthread_join(thread, NULL);
		resolver_vm_read(resolver_vm.m.vcpu[0], 3);
	}
	vcpu_detach(resolver_vm.m.vcpu[0]);
	EQUAL("SIGBUS is blocked", is_blocked(SIGBUS), false);
	resolver_vm_tear_down();
}

/* ---- one handle ---- */

static atomic_uint turn, ready;
static atomic_ulong made;

static void *make_one(void *opaque)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	struct kvmfault_vcpu **vcpu = opaque;
	options.fd = resolver_vm.m.vcpu[0]->fd;
	for (unsigned long n = 1; n <= SCALED(300, 20); n++) {
		ready++;
		while (turn != n)
			;
		int ret = kvmfault_vcpu_new(resolver_vm.m.library, &options, vcpu);
		CHECK(ret == 0 || ret == -EEXIST, "kvmfault_vcpu_new: %d", ret);
		made += ret == 0;
		ready++;
		while (turn == n)
			;
		if (ret == 0)
			kvmfault_vcpu_free(*vcpu);
	}
	return NULL;
}

/* Of two threads that make a handle for a vCPU at the same time one gets it. */
static void made_twice(void)
{
	pthread_t thread[2];
	struct kvmfault_vcpu *vcpu[2];
	unsigned long rounds = SCALED(300, 20);
	resolver_vm_set_up(MEMFD, resolve, 1, 3);
	for (int i = 0; i < 2; i++)
		CHECK(!pthread_create(&thread[i], NULL, make_one, &vcpu[i]), "pthread_create");
	for (unsigned long n = 1; n <= rounds; n++) {
		made = 0;
		while (ready != 2)
			sched_yield();
		ready = 0;
		turn = n;
		while (ready != 2)
			sched_yield();
		EQUAL("handles of one vCPU", made, 1);
		ready = 0;
		turn = 0;
	}
	for (int i = 0; i < 2; i++)
		pthread_join(thread[i], NULL);
	resolver_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "leaves-the-vm-alone", leaves_the_vm_alone, true },
	{ "of-another-vm", of_another_vm, true },
	{ "kicked-by-mask", kicked_by_mask, true },
	{ "kicked-by-handler", kicked_by_handler, true },
	{ "gives-kvms-mask-back", gives_kvms_mask_back, true },
	{ "two-on-one-thread", two_on_one_thread, true },
	{ "there-and-back", there_and_back, true },
	{ "made-twice", made_twice, true },
};
TEST_MAIN(cases)
