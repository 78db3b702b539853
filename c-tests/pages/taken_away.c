/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The VMM unmapped memory without the library. KVM fails with an EFAULT that has no address (or,
 * with some ABIs, has one): the vCPU's loop ends with an error, soon. A memfd's poison-trap alias
 * does not depend on the VMM's mapping.
 */
#define _GNU_SOURCE
#include "slot_vm.h"

#include <errno.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXIT_MEMORY_FAULT 39 /* newer than some headers */

static bool told_where(struct vcpu *v, int ret, uint64_t address)
{
	/*
	 * v7 reports every access that failed. Where the library doesn't use the flag, that exit is
	 * the VMM's.
	 */
	return ret == KVMFAULT_PASS && v->run->exit_reason == EXIT_MEMORY_FAULT &&
	       ((uint64_t *)&v->run->hw)[1] / PAGE == address / PAGE;
}

/* Runs the vCPU, which is not to take long, and by no means to hang. */
static int run_for_10_s(struct vcpu *v)
{
	double start = now();
	alarm(60);
	int ret = kvmfault_vcpu_run(v->handle);
	alarm(0);
	CHECK(now() - start < 10, "it took %.1f s", now() - start);
	return ret;
}

/* One access to the middle of memory that was taken away, in the same state throughout. */
static void access_what_is_gone(bool unmapped, enum backing backing, int cpl, bool present, bool write)
{
	struct slot_vm s;
	uint64_t address = RAM_GPA + 5 * PAGE;
	const char *state = present ? "present" : "absent";
	bool alias = backing == MEMFD && test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP;
	slot_vm_create(&s, backing, 64 * PAGE, 0, 0);
	struct vcpu *v = slot_vm_add_vcpu(&s, cpl);
	if (present)
		OK(source_install(&s.source, s.m.library, RAM_GPA, 64 * PAGE));
	if (unmapped)
		SYS(munmap(s.ram.hva + 4 * PAGE, 4 * PAGE));
	else
		SYS(mprotect(s.ram.hva + 4 * PAGE, 4 * PAGE, PROT_NONE));
	struct step *steps = slot_vm_step(&s, v, (struct step){ write ? WRITE64 : READ64, address, 1, 0 });
	int ret = run_for_10_s(v);
	if (told_where(v, ret, address))
		ret = -EFAULT;
	CHECK(ret < 0 || alias, "%s page, %s, write %d, CPL %d: %s", state, backing_name(backing), write, cpl,
	      vcpu_describe(v, ret));
	if (ret < 0) {
		CHECK(ret == -EFAULT || ret == -ELOOP || ret == -ENOENT, "%s", vcpu_describe(v, ret));
		printf("%s, %s, %s, CPL %d: %s\n", backing_name(backing), state, write ? "write" : "read", cpl,
		       kvmfault_last_error());
	} else if (!write) {
		EQUAL("a word, by KVM's own mapping", steps[0].value, pattern_word(&s.source.pattern, 5, 0));
	}
	if (ret < 0 && !unmapped) {
		/* Mended, the guest repeats the access. */
		SYS(mprotect(s.ram.hva + 4 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE));
		vcpu_run(v);
		if (!write)
			EQUAL("a word, after all", steps[0].value, pattern_word(&s.source.pattern, 5, 0));
		slot_vm_visit(&s, v, 8, 56, READ_FIRST);
	}
	vcpu_detach(v);
	slot_vm_destroy(&s);
}

static void taken_away(bool unmapped)
{
	for (int backing = ANON; backing <= MEMFD; backing++)
		for (int cpl = 0; cpl <= 3; cpl += 3)
			for (int present = 0; present < 2; present++)
				for (int write = 0; write < 2; write++)
					access_what_is_gone(unmapped, backing, cpl, present, write);
}

static void unmapped(void)
{
	taken_away(true);
}

static void inaccessible(void)
{
	taken_away(false);
}

/* The mapping is read-only, for good: reads work, writes end in an error. */
static void not_writable(void)
{
	struct slot_vm s;
	slot_vm_create(&s, ANON, 64 * PAGE, 0, 0);
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	OK(source_install(&s.source, s.m.library, RAM_GPA, 32 * PAGE));
	SYS(mprotect(s.ram.hva, s.ram.len, PROT_READ));
	slot_vm_step(&s, v, (struct step){ WRITE64, RAM_GPA, 1, 0 });
	int ret = run_for_10_s(v);
	CHECK(ret == -EFAULT || ret == -ELOOP || told_where(v, ret, RAM_GPA), "%s", vcpu_describe(v, ret));
	printf("%s\n", kvmfault_last_error());
	SYS(mprotect(s.ram.hva, s.ram.len, PROT_READ | PROT_WRITE));
	vcpu_run(v);
	slot_vm_visit(&s, v, 1, 63, WRITE_FIRST);
	vcpu_detach(v);
	slot_vm_destroy(&s);
}

static const struct test_case cases[] = {
	{ "unmapped", unmapped, true },
	{ "inaccessible", inaccessible, true },
	{ "not-writable", not_writable, true },
};
TEST_MAIN(cases)
