/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pages that are present, but not as the access wants them: KVM's fast path fails though nothing is
 * absent.
 */
#define _GNU_SOURCE
#include "slot_vm.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

/*
 * Zeros are the shared zero page in private memory, which can't be written: KVM's fast path fails
 * though nothing is absent.
 */
static void zero_page(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		for (int cpl = 0; cpl <= 3; cpl += 3) {
			struct slot_vm s;
			slot_vm_create(&s, backing, 96 * PAGE, 0, 0);
			struct vcpu *v = slot_vm_add_vcpu(&s, cpl);
			OK(kvmfault_pages_zero(s.m.library, RAM_GPA, 64 * PAGE));
			for (uint64_t page = 0; page < 64; page++) {
				uint64_t address = RAM_GPA + page * PAGE + 8 * page;
				if (page % 2)
					EQUAL("a zero page", slot_vm_read(&s, v, address), 0);
				slot_vm_write(&s, v, address, page + 1);
				EQUAL("what was written", slot_vm_read(&s, v, address), page + 1);
				EQUAL("what the host sees", *(uint64_t *)(s.ram.hva + (address - RAM_GPA)), page + 1);
			}
			EQUAL("resolver calls", s.source.total, 0);
			slot_vm_visit(&s, v, 64, 32, READ_FIRST);
			vcpu_detach(v);
			slot_vm_destroy(&s);
		}
	}
}

/*
 * A fork makes private pages copy-on-write, those that KVM has mapped as well; shared memory stays
 * shared.
 */
static void forked(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct slot_vm s;
		char byte;
		int quit[2];
		slot_vm_create(&s, backing, 256 * PAGE, 0, 0);
		struct vcpu *v = slot_vm_add_vcpu(&s, 3);
		slot_vm_visit(&s, v, 0, 64, READ_FIRST); /* mapped by KVM */
		/* present, and not mapped by KVM */
		OK(source_install(&s.source, s.m.library, RAM_GPA + 64 * PAGE, 64 * PAGE));
		SYS(pipe(quit));
		pid_t child = SYS(fork());
		if (child == 0) {
			close(quit[1]);
			if (read(quit[0], &byte, 1) < 0)
				_exit(1);
			/* Private memory is the child's own copy. */
			for (uint64_t page = 0; page < 128; page++)
				if (backing == ANON && *(uint64_t *)(s.ram.hva + page * PAGE + 4088) !=
							       pattern_word(&s.source.pattern, page, 511))
					_exit(2);
			_exit(0);
		}
		slot_vm_visit(&s, v, 0, 192, WRITE_FIRST);
		for (uint64_t page = 0; page < 192; page++)
			EQUAL("what the host sees", *(uint64_t *)(s.ram.hva + page * PAGE + 4088),
			      ~pattern_word(&s.source.pattern, page, 511));
		int status;
		close(quit[1]);
		waitpid(child, &status, 0);
		EQUAL("the child's memory is as it was at the fork", status, 0);
		slot_vm_visit(&s, v, 192, 64, WRITE_FIRST);
		vcpu_detach(v);
		slot_vm_destroy(&s);
	}
}

/* The memory was read-only for a while, so that the host's page tables are. */
static void protected_once(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct slot_vm s;
		slot_vm_create(&s, backing, 256 * PAGE, 0, 0);
		struct vcpu *v = slot_vm_add_vcpu(&s, 3);
		slot_vm_visit(&s, v, 0, 64, READ_FIRST);
		OK(source_install(&s.source, s.m.library, RAM_GPA + 64 * PAGE, 64 * PAGE));
		SYS(mprotect(s.ram.hva, s.ram.len, PROT_READ));
		SYS(mprotect(s.ram.hva, s.ram.len, PROT_READ | PROT_WRITE));
		slot_vm_visit(&s, v, 0, 256, WRITE_FIRST);
		vcpu_detach(v);
		slot_vm_destroy(&s);
	}
}

/*
 * Swapped out, or dropped from the page tables: present for the library, and not for KVM's fast
 * path.
 */
static void dropped_mappings(void)
{
	struct slot_vm s;
	slot_vm_create(&s, MEMFD, 256 * PAGE, 0, 0);
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	for (int round = 0; round < 4; round++) {
		slot_vm_visit(&s, v, 0, 192, READ_FIRST);
		/* Of shared memory MADV_DONTNEED forgets the mapping and keeps the bytes. */
		SYS(madvise(s.ram.hva, 128 * PAGE, MADV_DONTNEED));
		slot_vm_visit(&s, v, 0, 192, round % 2 ? READ_FIRST : WRITE_FIRST);
		for (uint64_t page = 0; page < 192; page++)
			slot_vm_write(&s, v, RAM_GPA + page * PAGE + 4088, pattern_word(&s.source.pattern, page, 511));
	}
	EQUAL("resolver calls", s.source.total, 192);
	vcpu_detach(v);
	slot_vm_destroy(&s);
}

static const struct test_case cases[] = {
	{ "zero-page", zero_page, true },
	{ "forked", forked, true },
	{ "protected-once", protected_once, true },
	{ "dropped-mappings", dropped_mappings, true },
};
TEST_MAIN(cases)
