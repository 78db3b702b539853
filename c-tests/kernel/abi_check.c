/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The KVM patch's own test: abi_check ABI, on a kernel with kvm.fault_abi=ABI (or "none" on any
 * stock 6.12). Prints one line a case, "PASS kvm-abi-npt/case seconds" (or -shadow, by kvm-amd's
 * paging) or "FAIL ... reason", and the totals; exits 1 on failure.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <time.h>

#include "abi_expect.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

static void capabilities(void)
{
	struct vm *vm = vm_new(0);
	for (int i = 0; i < WATCHED; i++) {
		int expected = row->caps[i];
		/*
		 * Mainline's 236, PRE_FAULT_MEMORY, needs nested paging; that of an ABI does not.
		 */
		if (watched_caps[i] == 236 && row->flag_cap != 236)
			expected = npt;
		int system = ioctl(vm->kvm, KVM_CHECK_EXTENSION, watched_caps[i]);
		int of_vm = ioctl(vm->fd, KVM_CHECK_EXTENSION, watched_caps[i]);
		expect(system == expected, "cap %d: %d, not %d", watched_caps[i], system, expected);
		expect(of_vm == expected, "cap %d of a VM: %d, not %d", watched_caps[i], of_vm, expected);
	}
	vm_free(vm);
}

static void enabling(void)
{
	static const uint64_t args[] = { 0, 1, 2, 3, 4, 1ull << 63 };
	static const bool taken[][6] = {
		[REASON_MASK] = { 1, 1, 1, 1, 0, 0 },
		[SWITCH] = { 1, 1, 0, 0, 0, 0 },
		[ANYTHING] = { 1, 1, 1, 1, 1, 1 },
	};
	struct vm *vm = vm_new(0);
	for (int cap = 227; cap <= 243; cap++) {
		bool ours = cap == row->enable_cap;
		if (!ours && cap != row->info_cap && cap != row->flag_cap && cap != 227 && cap != 228 && cap != 229)
			continue;
		for (int i = 0; i < 6; i++) {
			int expected = ours && taken[row->enabling][i] ? 0 : EINVAL;
			int err = enable_cap(vm, cap, args[i]);
			expect(err == expected, "cap %d with %lx: errno %d, not %d", cap, args[i], err, expected);
		}
	}
	if (row->enable_cap) {
		struct kvm_enable_cap c = { .cap = row->enable_cap, .flags = 1 };
		expect(ioctl(vm->fd, KVM_ENABLE_CAP, &c) && errno == EINVAL, "flags in KVM_ENABLE_CAP accepted");
	}
	vm_free(vm);
}

/* Each single flag through each ioctl, alone and with READONLY. */
static void memslot_flags(void)
{
	struct vm *vm = vm_new(0);
	for (int bit = 0; bit < 32; bit++) {
		uint32_t f = 1u << bit;
		bool mainline = bit < 2;
		for (int ioctl2 = 0; ioctl2 < 2; ioctl2++) {
			for (int readonly = 0; readonly < 2; readonly++) {
				uint32_t mine = ioctl2 ? row->region2 : row->region1;
				uint32_t all = f | (readonly ? KVM_MEM_READONLY : 0);
				bool accepted = mainline || (mine & f && (row->readonly || !readonly));
				int err = ioctl2 ? set_region2(vm, all, RAM_GPA, vm->ram, RAM_PAGES,
							       (uintptr_t)vm->bitmap)
						 : set_region1(vm, all, RAM_GPA, vm->ram, RAM_PAGES);
				expect(err == (accepted ? 0 : EINVAL), "flags %x by REGION%s: errno %d (%s)", all,
				       ioctl2 ? "2" : "", err, strerror(err));
				if (!err)
					expect(set_region1(vm, 0, 0, NULL, 0) == 0, "deleting the slot");
			}
		}
	}
	vm_free(vm);
}

static void exit_layout(void)
{
	static const char *const names[] = { "read", "write", "execute" };
	const uint64_t flags[] = { row->read, row->write, row->exec };
	static const uint64_t pages[] = { 0, 1, 63, 64, 511, 512, RAM_PAGES - 1 };
	struct vm *vm = absent_vm(0, 0);

	for (int i = 0; i < 7; i++) {
		for (int a = READ; a <= EXEC; a++) {
			uint64_t page = pages[i];
			/*
			 * Three accesses a page: gone again each time, and twice in a row without
			 * progress.
			 */
			struct result r = guest_access(vm, a, page);
			if (exits()) {
				expect_fault(r, flags[a], page, names[a]);
				expect_fault(resume(vm), flags[a], page, "again");
				install(vm, page);
				r = resume(vm);
			}
			expect_halt(r, names[a]);
			if (exits() && a == READ)
				expect(r.eax == 0xf4f4f4f4, "read %x", r.eax);
			if (a == WRITE)
				expect(*(uint32_t *)(vm->ram + page * PAGE + 0x124) == 0x12345678, "the write is lost");
			madvise(vm->ram + page * PAGE, PAGE, MADV_DONTNEED);
			if (row->behaviour == IGNORED)
				memset(vm->ram + page * PAGE, 0xf4, PAGE); /* for execute to halt */
			mark(vm, page, true);
		}
	}
	vm_free(vm);
}

/* v2, v3: without KVM_ENABLE_CAP the access still fails, and says nothing. */
static void not_enabled(void)
{
	struct vm *vm = vm_new(0);
	expect(set_slot(vm, flag()) == 0, "the slot");
	if (row->enable_cap && row->behaviour == FAST) {
		expect_bare(guest_access(vm, WRITE, 0), "never enabled");
		if (row->enabling == REASON_MASK) {
			enable_cap(vm, row->enable_cap, 1);
			expect_bare(guest_access(vm, WRITE, 0), "another reason enabled");
			enable_cap(vm, row->enable_cap, 2);
		} else {
			enable_cap(vm, row->enable_cap, 1);
		}
		expect_fault(guest_access(vm, WRITE, 0), row->write, 0, "enabled");
		enable_cap(vm, row->enable_cap, 0);
		expect_bare(guest_access(vm, WRITE, 0), "disabled");
		install(vm, 0);
		expect_halt(guest_access(vm, WRITE, 0), "populated");
	}
	vm_free(vm);
}

/* A failure that has nothing to do with the flag. */
static void ordinary_failure(void)
{
	struct vm *vm = vm_new(0);
	if (row->enable_cap)
		enable_cap(vm, row->enable_cap, row->enabling == REASON_MASK ? 3 : 1);
	expect(set_region1(vm, 0, RAM_GPA, vm->ram, RAM_PAGES) == 0, "the slot");
	mprotect(vm->ram, RAM_PAGES * PAGE, PROT_NONE);
	struct result r = guest_access(vm, WRITE, 3);
	if (row->others_told)
		expect_fault(r, row->other_write, 3, "no host permission");
	else
		expect_bare(r, "no host permission");
	vm_free(vm);
}

/* The zero page, mapped by a read: fast GUP wants a writable one even for the guest's reads. */
static void present_read_only(void)
{
	struct vm *vm = absent_vm(0, 0);
	memset(vm->bitmap, 0, PAGE);
	if (madvise(vm->ram, PAGE, MADV_POPULATE_READ))
		die("MADV_POPULATE_READ");
	struct result r = guest_access(vm, READ, 0);
	if (row->behaviour == FAST) {
		expect_fault(r, row->read, 0, "zero page");
		if (madvise(vm->ram, PAGE, MADV_POPULATE_WRITE))
			die("MADV_POPULATE_WRITE");
		r = resume(vm);
	}
	expect_halt(r, "writable page");
	vm_free(vm);
}

/* On and off again, between two KVM_RUNs of a vCPU that has pages mapped. */
static void toggle(void)
{
	struct vm *vm = vm_new(0);
	memset(vm->bitmap, 0xff, PAGE);
	if (row->enable_cap)
		enable_cap(vm, row->enable_cap, row->enabling == REASON_MASK ? 3 : 1);
	expect(set_slot(vm, 0) == 0, "the slot");
	for (uint64_t round = 0; round < 4; round++) {
		uint64_t mapped = 10 * round, absent = 10 * round + 1;
		populate(vm, mapped);
		expect_halt(guest_access(vm, WRITE, mapped), "flag off");
		expect(set_slot(vm, flag()) == 0, "turning it on");
		struct result r = guest_access(vm, READ, mapped);
		if (row->behaviour == BITMAP) {
			expect_fault(r, row->read, mapped, "mapped before, marked in the bitmap");
			mark(vm, mapped, false);
			r = resume(vm);
		}
		expect_halt(r, "mapped before");
		r = guest_access(vm, WRITE, absent);
		if (exits())
			expect_fault(r, row->write, absent, "flag on");
		else
			expect_halt(r, "flag on");
		expect(set_slot(vm, 0) == 0, "turning it off");
		expect_halt(guest_access(vm, WRITE, absent), "flag off: KVM faults the page in");
	}
	/* READONLY, by contrast, is fixed for a slot's life. */
	expect(set_slot(vm, KVM_MEM_READONLY) == EINVAL, "READONLY toggled on a live slot");
	vm_free(vm);
}

static struct vm *toggled;
static volatile bool stop_toggling;
static void *toggler(void *unused)
{
	for (int on = 0; !stop_toggling; on = !on)
		expect(set_slot(toggled, on ? flag() : 0) == 0, "toggling while the vCPU runs");
	return unused;
}

/* While another thread toggles, each access ends in HLT or in a proper exit. */
static void toggle_while_running(void)
{
	pthread_t thread;
	int faults = 0;
	struct vm *vm = toggled = vm_new(0);
	memset(vm->bitmap, 0xff, PAGE);
	if (row->enable_cap)
		enable_cap(vm, row->enable_cap, row->enabling == REASON_MASK ? 3 : 1);
	expect(set_slot(vm, 0) == 0, "the slot");
	stop_toggling = false;
	pthread_create(&thread, NULL, toggler, NULL);
	for (uint64_t i = 0; i < 4 * RAM_PAGES; i++) {
		uint64_t page = i % RAM_PAGES;
		struct result r = guest_access(vm, WRITE, page);
		for (int tries = 0; r.err && tries < 100; tries++, faults++) {
			expect_fault(r, row->write, page, "while toggling");
			install(vm, page);
			r = resume(vm);
		}
		expect_halt(r, "while toggling");
		if (page % 3 == 0) {
			mark(vm, page, true);
			madvise(vm->ram + page * PAGE, PAGE, MADV_DONTNEED);
		}
	}
	stop_toggling = true;
	pthread_join(thread, NULL);
	expect(!exits() || faults > 0, "never met the flag");
	vm_free(vm);
}

static bool dirty(struct vm *vm, uint64_t page)
{
	static uint64_t log[RAM_PAGES / 64];
	struct kvm_dirty_log get = { .slot = RAM_SLOT, .dirty_bitmap = log };
	if (ioctl(vm->fd, KVM_GET_DIRTY_LOG, &get))
		die("KVM_GET_DIRTY_LOG");
	return log[page / 64] >> (page % 64) & 1;
}

static void dirty_logging(void)
{
	struct vm *vm = absent_vm(KVM_MEM_LOG_DIRTY_PAGES, 0);
	struct result r = guest_access(vm, WRITE, 5);
	if (exits()) {
		expect_fault(r, row->write, 5, "logging");
		expect(!dirty(vm, 5), "dirty before the write");
		install(vm, 5);
		r = resume(vm);
	}
	expect_halt(r, "logging");
	expect(dirty(vm, 5), "the write isn't in the log");
	expect_halt(guest_access(vm, READ, 5), "reading");
	expect(!dirty(vm, 5), "a read is in the log");
	expect_halt(guest_access(vm, WRITE, 5), "writing again");
	expect(dirty(vm, 5), "the second write isn't in the log");

	/*
	 * Each of the two toggled with the other on, then both at once; KVM must neither warn nor
	 * lose a write.
	 */
	static const struct {
		bool log, fast;
	} steps[] = { { 1, 0 }, { 1, 1 }, { 0, 1 }, { 1, 1 }, { 0, 0 }, { 1, 1 }, { 0, 0 } };
	for (unsigned i = 0; i < sizeof steps / sizeof steps[0]; i++) {
		int err = set_slot(vm, (steps[i].log ? KVM_MEM_LOG_DIRTY_PAGES : 0) | (steps[i].fast ? flag() : 0));
		expect(err == 0, "step %u: %s", i, strerror(err));
		if (steps[i].log)
			dirty(vm, 5); /* clears */
		expect_halt(guest_access(vm, WRITE, 5), "a present page after a step");
		if (steps[i].log)
			expect(dirty(vm, 5), "step %u lost a write", i);
		r = guest_access(vm, WRITE, 20 + i);
		if (exits() && steps[i].fast)
			expect_fault(r, row->write, 20 + i, "an absent page after a step");
		else
			expect_halt(r, "an absent page without the flag");
	}
	vm_free(vm);
}

/* v2 to v4 take READONLY and then exit for ever; with a bitmap it works as it should. */
static void read_only_slot(void)
{
	struct vm *vm = vm_new(0);
	if (row->enable_cap)
		enable_cap(vm, row->enable_cap, row->enabling == REASON_MASK ? 3 : 1);
	int err = set_slot(vm, flag() | KVM_MEM_READONLY);
	expect(err == (row->readonly ? 0 : EINVAL), "READONLY: %s", strerror(err));
	if (!err) {
		populate(vm, 0);
		struct result r = guest_access(vm, READ, 0);
		if (row->behaviour == FAST)
			expect_fault(r, row->read, 0, "present, but the slot is read-only");
		else
			expect_halt(r, "read-only slot");
	}
	vm_free(vm);
}

/*
 * The host has 2 MiB pages: one installed huge page is one fault, and a bitmap still speaks of 4
 * KiB.
 */
static void huge_pages(int ram_flags)
{
	struct vm *vm = absent_vm(0, ram_flags);
	madvise(vm->ram, RAM_PAGES * PAGE, MADV_HUGEPAGE);
	if (exits())
		expect_fault(guest_access(vm, WRITE, 7), row->write, 7, "absent huge page");
	populate(vm, 3);
	memset(vm->bitmap, 0, 512 / 8);
	mark(vm, 9, true);
	expect_halt(guest_access(vm, WRITE, 7), "present huge page");
	expect_halt(guest_access(vm, WRITE, 8), "its neighbour");
	struct result r = guest_access(vm, WRITE, 9);
	if (row->behaviour == BITMAP)
		expect_fault(r, row->write, 9, "marked inside a huge page");
	else
		expect_halt(r, "inside the huge page");
	if (exits())
		expect_fault(guest_access(vm, WRITE, 512), row->write, 512, "the next huge page is absent");
	/* Off: KVM may map huge again, which must not break anything. */
	expect(set_slot(vm, 0) == 0, "turning it off");
	for (uint64_t page = 0; page < RAM_PAGES; page += 100)
		expect_halt(guest_access(vm, WRITE, page), "flag off");
	vm_free(vm);
}

static void transparent_huge_pages(void)
{
	huge_pages(0);
}

static void hugetlb(void)
{
	void *probe = map(2 * (2 << 20), 2 << 20, MAP_HUGETLB);
	if (!probe) {
		snprintf(failure, sizeof failure, "SKIP no huge pages: vm-run --hugepages 2");
		return;
	}
	munmap(probe, 2 * (2 << 20));
	huge_pages(MAP_HUGETLB);
}

/* KVM_PRE_FAULT_MEMORY obeys the flag, and leaves kvm_run to KVM_RUN. */
static void pre_fault(void)
{
	struct vm *vm = absent_vm(0, 0);
	populate(vm, 0);
	mark(vm, 0, false);
	struct pre_fault range = { .gpa = RAM_GPA, .size = PAGE };
	int err = ioctl(vm->vcpu, PRE_FAULT, &range) ? errno : 0;
	expect(err == (npt ? 0 : EOPNOTSUPP), "a present page: %s", strerror(err));
	range = (struct pre_fault){ .gpa = RAM_GPA + PAGE, .size = PAGE };
	err = ioctl(vm->vcpu, PRE_FAULT, &range) ? errno : 0;
	expect(err == (!npt ? EOPNOTSUPP : exits() ? EFAULT : 0), "an absent page: %s", strerror(err));
	vm_free(vm);
}

static void bitmap_pointer(void)
{
	struct vm *vm = vm_new(0);
	static const uint64_t bad[] = { 0xffff888000000000, 0xffffffffffffffff, 0x8000000000000000,
					0x00007fffffffffc0 };
	for (int i = 0; i < 4; i++) {
		int err = set_region2(vm, flag(), RAM_GPA, vm->ram, RAM_PAGES, bad[i]);
		expect(err == (row->behaviour == BITMAP ? EINVAL
			       : row->region2           ? 0
							: EINVAL),
		       "bitmap at %lx: %s", bad[i], strerror(err));
		if (!err)
			set_region1(vm, 0, 0, NULL, 0);
	}
	if (row->behaviour == BITMAP) {
		/*
		 * KVM checks no more than the range: an unmapped bitmap is only noticed by the
		 * access.
		 */
		expect(set_region2(vm, flag(), RAM_GPA, vm->ram, RAM_PAGES, 0) == 0, "bitmap at NULL");
		populate(vm, 0);
		expect_bare(guest_access(vm, READ, 0), "an unreadable bitmap");
	}
	vm_free(vm);
}

static void bitmap_meaning(void)
{
	if (row->behaviour != BITMAP)
		return;
	struct vm *vm = vm_new(0);
	for (uint64_t page = 0; page < RAM_PAGES; page++)
		populate(vm, page);
	/*
	 * A pattern over several words; bit 0 is the first page of the slot, whatever its address.
	 */
	for (uint64_t page = 0; page < RAM_PAGES; page++)
		mark(vm, page, page % 7 == 0 || page == 65);
	expect(set_slot(vm, flag()) == 0, "the slot");
	for (uint64_t page = 0; page < RAM_PAGES; page++) {
		struct result r = guest_access(vm, WRITE, page);
		if (page % 7 == 0 || page == 65) {
			expect_fault(r, row->write, page, "present and marked");
			mark(vm, page, false);
			r = resume(vm);
		}
		expect_halt(r, "present and not marked");
	}
	/* Marking a page that is mapped doesn't unmap it: that takes off and on. */
	mark(vm, 8, true);
	expect_halt(guest_access(vm, WRITE, 8), "marked after it was mapped");

	/* Same flags, other bitmap: "nothing to change", says 0 and keeps the old one. */
	uint64_t *other = map(PAGE, PAGE, 0);
	memset(other, 0xff, PAGE);
	mark(vm, 8, false);
	expect(set_slot(vm, 0) == 0 && set_slot(vm, flag()) == 0, "off and on");
	expect(set_region2(vm, flag(), RAM_GPA, vm->ram, RAM_PAGES, (uintptr_t)other) == 0, "another bitmap");
	expect_halt(guest_access(vm, WRITE, 9), "the new bitmap must not count");
	/* Any change of flags takes the pointer along. */
	expect(set_region2(vm, flag() | KVM_MEM_LOG_DIRTY_PAGES, RAM_GPA, vm->ram, RAM_PAGES, (uintptr_t)other) == 0,
	       "another bitmap with another flag");
	expect_fault(guest_access(vm, WRITE, 100), row->write, 100, "the new bitmap counts");
	munmap(other, PAGE);
	vm_free(vm);
}

static int passed, failed, skipped;

static void run(const char *name, void (*body)(void))
{
	struct timespec t0, t1;
	clock_gettime(CLOCK_MONOTONIC, &t0);
	*failure = 0;
	body();
	clock_gettime(CLOCK_MONOTONIC, &t1);
	bool skip = !strncmp(failure, "SKIP ", 5);
	printf("%s kvm-abi-%s/%s %.3f%s%s\n",
	       skip       ? "SKIP"
	       : *failure ? "FAIL"
			  : "PASS",
	       npt ? "npt" : "shadow", name, t1.tv_sec - t0.tv_sec + (t1.tv_nsec - t0.tv_nsec) * 1e-9,
	       *failure ? " " : "", failure + (skip ? 5 : 0));
	fflush(stdout);
	*(skip ? &skipped : *failure ? &failed : &passed) += 1;
}

int main(int argc, char **argv)
{
	for (unsigned i = 0; argc > 1 && i < sizeof rows / sizeof rows[0]; i++)
		if (!strcmp(argv[1], rows[i].name))
			row = &rows[i];
	if (!row)
		return fprintf(stderr, "usage: abi_check none|v2|v3|v4|v7|userfault|falsefriend\n"), 2;

	int fd = open("/sys/module/kvm_amd/parameters/npt", O_RDONLY);
	char yes = 'Y';
	if (fd >= 0 && read(fd, &yes, 1) != 1)
		die("kvm_amd.npt");
	npt = yes == 'Y';

	run("capabilities", capabilities);
	run("enabling", enabling);
	run("memslot-flags", memslot_flags);
	run("ordinary-failure", ordinary_failure);
	if (row->behaviour != REFUSED) {
		run("exit-layout", exit_layout);
		run("not-enabled", not_enabled);
		run("present-read-only", present_read_only);
		run("toggle", toggle);
		run("toggle-while-running", toggle_while_running);
		run("dirty-logging", dirty_logging);
		run("read-only-slot", read_only_slot);
		run("transparent-huge-pages", transparent_huge_pages);
		run("hugetlb", hugetlb);
		run("pre-fault", pre_fault);
		run("bitmap-pointer", bitmap_pointer);
		run("bitmap-meaning", bitmap_meaning);
	}
	printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
	return failed != 0;
}
