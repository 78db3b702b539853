/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "machine.h"

#include <stdio.h>
#include <sys/utsname.h>

/* Reads an absent page at CPL 0, and asks the library how it came to know. */
static bool reads_by_mmio(int mechanism)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct machine m;
	struct ram ram;
	struct source source;
	uint64_t steps_gpa;
	machine_create(&m, PAGE);
	ram_create(&ram, MEMFD, PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	options.mechanism = mechanism;
	machine_attach(&m, &source, &options);
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	OK(kvmfault_memslot_set(m.library, &slot));
	struct step *steps = machine_share(&m, PAGE, &steps_gpa);
	steps[0] = (struct step){ READ64, RAM_GPA, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 0, 0 };
	struct vcpu *v = machine_add_vcpu(&m, 0);
	vcpu_load_script(v, steps_gpa);
	vcpu_attach(v);
	vcpu_run(v);
	bool by_mmio = machine_stats(&m).mmio_reads > 0;
	vcpu_detach(v);
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
	return by_mmio;
}

static void require_linux_6_2(const char *else_what)
{
	struct utsname name;
	int major = 0, minor = 0;
	SYS(uname(&name));
	EQUAL("numbers in the kernel's release", sscanf(name.release, "%d.%d", &major, &minor), 2);
	if (major < 6 || (major == 6 && minor < 2))
		skip("%s", else_what);
}

void require_interruptible_sleep(void)
{
	if (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD)
		require_linux_6_2("before Linux 6.2 a vCPU that sleeps in userfaultfd can't be interrupted");
}

void require_interruptible_sleep_in_slow_slots(void)
{
	require_linux_6_2("before Linux 6.2 a vCPU that sleeps in a slot without the fast path can't be interrupted");
}

bool cpl0_comes_as_mmio(void)
{
	return reads_by_mmio(test_mechanism());
}

bool cpl0_is_emulated(void)
{
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	return probe.mechanisms_shared & 1u << KVMFAULT_MECHANISM_POISON_TRAP &&
	       reads_by_mmio(KVMFAULT_MECHANISM_POISON_TRAP);
}
