/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What making and freeing a vCPU's handle does to the VM, to its other vCPUs, to threads and to signals: nothing that lasts. */
#define _GNU_SOURCE
#include "lab.h"

#include <errno.h>
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

/* No switch of the VM's is turned, not even for a moment: KVM_SET_VCPU_EVENTS of another vCPU would fail. */
static void leaves_the_vm_alone(void)
{
	pthread_t thread;
	struct kvm_enable_cap triple_fault = { .cap = TRIPLE_FAULT_EVENT, .args = { 1 } };
	lab_set_up(MEMFD, lab_answer_pending, 2, 3);
	if (SYS(ioctl(lab.m.kvm, KVM_CHECK_EXTENSION, TRIPLE_FAULT_EVENT)) <= 0)
		skip("KVM has no KVM_CAP_X86_TRIPLE_FAULT_EVENT (Linux 6.0)");
	SYS(ioctl(lab.m.vm, KVM_ENABLE_CAP, &triple_fault));
	sibling = lab.m.vcpu[1];
	CHECK(!pthread_create(&thread, NULL, set_events, NULL), "pthread_create");
	UNTIL(set > 0);
	for (unsigned long n = scaled(1000), before = set; n || set < before + 1000; n -= n > 0) {
		vcpu_attach(lab.m.vcpu[0]);
		vcpu_detach(lab.m.vcpu[0]);
	}
	stop = true;
	pthread_join(thread, NULL);
	EQUAL("KVM_SET_VCPU_EVENTS refused", refused, 0);
	note("KVM_SET_VCPU_EVENTS %lu times", (unsigned long)set);
	lab_tear_down();
}

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	return source_install(&lab.source, vm, fault->gpa, fault->len);
}

/* A vCPU of another VM isn't noticed, and nobody is harmed: its guest runs, and what is in no slot is the VMM's. */
static void of_another_vm(void)
{
	struct machine other;
	uint64_t steps_gpa;
	uint32_t value;
	lab_set_up(MEMFD, resolve, 1, 3);
	machine_create(&other, PAGE);
	struct step *steps = machine_share(&other, PAGE, &steps_gpa);
	/* The first of its VM has the number of one of ours, whether that has a handle or not. */
	machine_add_vcpu(&other, 3);
	struct vcpu *foreign = machine_add_vcpu(&other, 3);
	vcpu_attach(lab.m.vcpu[0]);
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	options.fd = foreign->fd;
	options.run = foreign->run;
	OK(kvmfault_vcpu_new(lab.m.library, &options, &foreign->handle));
	steps[0] = (struct step){ READ64, NOWHERE_GPA, 0, 0 };
	steps[1] = (struct step){ READ64, RAM_GPA + 3 * PAGE, 0, 0 };
	steps[2] = (struct step){ STOP, 0, 7, 0 };
	vcpu_load_script(foreign, steps_gpa);
	int ret = kvmfault_vcpu_run(foreign->handle);
	CHECK(ret == KVMFAULT_PASS && foreign->run->exit_reason == KVM_EXIT_MMIO, "%s", vcpu_describe(foreign, ret));
	EQUAL("the address", foreign->run->mmio.phys_addr, NOWHERE_GPA);
	ret = kvmfault_vcpu_run(foreign->handle);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(foreign, &value) && value == 7, "%s", vcpu_describe(foreign, ret));
	EQUAL("what it read where only our VM has memory", steps[1].value, pattern_word(&lab.source.pattern, 3, 0));
	OK(kvmfault_vcpu_kick(foreign->handle));
	steps[3] = (struct step){ STOP, 0, 8, 0 };
	EQUAL("after a kick", kvmfault_vcpu_run(foreign->handle), KVMFAULT_INTERRUPTED);
	EQUAL("stop", vcpu_run(foreign), 8);
	lab_read_all(lab.m.vcpu[0]);
	vcpu_detach(foreign);
	machine_destroy(&other);
	lab_tear_down();
}

static const struct test_case cases[] = {
	{ "leaves-the-vm-alone", leaves_the_vm_alone, true },
	{ "of-another-vm", of_another_vm, true },
};
TEST_MAIN(cases)
