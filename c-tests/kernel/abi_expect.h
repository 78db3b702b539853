/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the cases of abi_check.c share: the row under test, expectations, and a slot with the ABI's
 * flag.
 */
#ifndef ABI_EXPECT_H
#define ABI_EXPECT_H

#include <stdarg.h>

#include "abi_rows.h"
#include "tiny_vm.h"

static const struct row *row;
static bool npt; /* KVM uses nested paging, and not shadow page tables */
static char failure[512];

/* The first failure is the reason; the case goes on where it can. */
static void expect(bool ok, const char *format, ...)
{
	va_list args;
	if (ok || *failure)
		return;
	va_start(args, format);
	vsnprintf(failure, sizeof failure, format, args);
	va_end(args);
}

static void expect_halt(struct result r, const char *what)
{
	expect(r.err == 0 && r.exit_reason == KVM_EXIT_HLT, "%s: expected HLT, got errno %d (%s), exit %u", what, r.err,
	       strerror(r.err), r.exit_reason);
}

static void expect_bare(struct result r, const char *what)
{
	expect(r.err == EFAULT && r.exit_reason == KVM_EXIT_UNKNOWN && r.fault.gpa == 0xa5a5a5a5a5a5a5a5,
	       "%s: expected a bare EFAULT, got errno %d (%s), exit %u, gpa %lx", what, r.err, strerror(r.err),
	       r.exit_reason, r.fault.gpa);
}

static void expect_fault(struct result r, uint64_t flags, uint64_t page, const char *what)
{
	expect(r.err == row->run_errno, "%s: errno %d (%s), not %d", what, r.err, strerror(r.err), row->run_errno);
	expect(r.exit_reason == row->exit_reason, "%s: exit %u, not %u", what, r.exit_reason, row->exit_reason);
	expect(r.fault.flags == flags, "%s: flags %lx, not %lx", what, r.fault.flags, flags);
	expect(r.fault.gpa == RAM_GPA + page * PAGE, "%s: gpa %lx, not %lx", what, r.fault.gpa, RAM_GPA + page * PAGE);
	expect(r.fault.size == PAGE, "%s: size %lx", what, r.fault.size);
}

static uint32_t flag(void)
{
	return row->region2 ? row->region2 : row->region1;
}

/* The slot under test with these flags, by the ioctl that takes the ABI's flag. */
static int set_slot(struct vm *vm, uint32_t flags)
{
	if (row->region2)
		return set_region2(vm, flags, RAM_GPA, vm->ram, RAM_PAGES, (uintptr_t)vm->bitmap);
	return set_region1(vm, flags, RAM_GPA, vm->ram, RAM_PAGES);
}

static void mark(struct vm *vm, uint64_t page, bool absent)
{
	uint64_t bit = 1ull << (page % 64);
	if (absent)
		__atomic_fetch_or(&vm->bitmap[page / 64], bit, __ATOMIC_RELEASE);
	else
		__atomic_fetch_and(&vm->bitmap[page / 64], ~bit, __ATOMIC_RELEASE);
}

/* Installs a page, in the order in which a VMM must: bytes, then bitmap. */
static void install(struct vm *vm, uint64_t page)
{
	populate(vm, page);
	mark(vm, page, false);
}

/* Exits are enabled, the slot has the flag, every page is absent by the ABI's own measure. */
static struct vm *absent_vm(uint32_t more_flags, int ram_flags)
{
	struct vm *vm = vm_new(ram_flags);
	memset(vm->bitmap, 0xff, PAGE);
	if (row->enable_cap)
		enable_cap(vm, row->enable_cap, row->enabling == REASON_MASK ? 3 : 1);
	int err = set_slot(vm, flag() | more_flags);
	expect(err == 0, "the slot: %s", strerror(err));
	return vm;
}

static bool exits(void)
{
	return row->behaviour == FAST || row->behaviour == BITMAP;
}

#endif
