/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The pool of huge pages is smaller than the memory, which reserves none: the error says so, at
 * once, and the guest goes on when there is room.
 */
#define _GNU_SOURCE
#include "guest.h"
#include "kvm_traits.h"
#include "machine.h"
#include "vcpu.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { PAGES = 6, LEFT = 2 };

static struct machine m;
static struct ram ram;
static struct source source;
static struct step *steps;
static uint64_t steps_gpa;

/*
 * A hugetlbfs of PAGES huge pages, mounted nowhere: a pool that no other program uses. Only LEFT
 * of its pages are free until give_back().
 */
static int pool_fd, memory_fd, taken_fd;

static uint64_t unused(void)
{
	struct statfs fs;
	SYS(fstatfs(pool_fd, &fs));
	return fs.f_bfree;
}

static void pool_create(void)
{
	char size[16];
	int fs = fsopen("hugetlbfs", FSOPEN_CLOEXEC);
	if (fs < 0)
		skip("a hugetlbfs can't be made: %s", strerror(errno));
	snprintf(size, sizeof(size), "%uM", PAGES * 2);
	SYS(fsconfig(fs, FSCONFIG_SET_STRING, "pagesize", "2M", 0));
	SYS(fsconfig(fs, FSCONFIG_SET_STRING, "size", size, 0));
	SYS(fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0));
	pool_fd = SYS(fsmount(fs, FSMOUNT_CLOEXEC, 0));
	close(fs);
	memory_fd = SYS(openat(pool_fd, "memory", O_RDWR | O_CREAT | O_CLOEXEC, 0600));
	taken_fd = SYS(openat(pool_fd, "taken", O_RDWR | O_CREAT | O_CLOEXEC, 0600));
	SYS(fallocate(taken_fd, 0, 0, (PAGES - LEFT) * HUGE_PAGE));
	EQUAL("huge pages left", unused(), LEFT);
}

static void give_back(void)
{
	SYS(ftruncate(taken_fd, 0));
}

static void pool_destroy(void)
{
	close(taken_fd);
	close(memory_fd);
	close(pool_fd);
}

/* A failed install is the resolver's own failure. */
static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	return source_install(&source, vm, fault->gpa, fault->len);
}

static void load_read(struct vcpu *v, uint64_t page)
{
	steps[0] = (struct step){ READ64, RAM_GPA + page * HUGE_PAGE, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 1, 0 };
	vcpu_load_script(v, steps_gpa);
}

static void over_the_pool(bool shared, uint32_t flags, int cpl)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	huge_pages_provide(PAGES + 1); /* one for the zeros that the library copies from */
	pool_create();
	machine_create(&m, PAGE);
	ram_create(&ram, MEMFD, PAGES * HUGE_PAGE);
	SYS(ftruncate(memory_fd, ram.len));
	void *hva = mmap(ram.hva, ram.len, PROT_READ | PROT_WRITE,
			 (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_FIXED | MAP_NORESERVE, memory_fd, 0);
	CHECK(hva == ram.hva, "mmap of memory that reserves nothing: %s", strerror(errno));
	ram.backing = HUGETLB, ram.page = HUGE_PAGE;
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	options.resolver = resolve;
	machine_attach(&m, NULL, &options);
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	slot.fd = shared ? memory_fd : -1;
	slot.flags |= flags | (shared ? 0 : KVMFAULT_MEMSLOT_VCPU_ONLY);
	OK(kvmfault_memslot_set(m.library, &slot));
	EQUAL("huge pages left once the slot is set", unused(), LEFT);
	steps = machine_share(&m, PAGE, &steps_gpa);
	struct vcpu *v = machine_add_vcpu(&m, cpl);
	vcpu_attach(v);
	bool present = flags & KVMFAULT_MEMSLOT_PRESENT;
	for (uint64_t page = 0; page < PAGES; page++) {
		load_read(v, page);
		if (page == LEFT) {
			int ret = kvmfault_vcpu_run(v->handle);
			CHECK(ret == -ENOMEM, "over an empty pool: %s", vcpu_describe(v, ret));
			REFUSED(ret, ENOMEM, "huge page pool is empty");
			if (!present)
				REFUSED(kvmfault_pages_zero(m.library, RAM_GPA + page * HUGE_PAGE, HUGE_PAGE), ENOMEM,
					"pool is empty");
			give_back();
		}
		vcpu_run(v);
		EQUAL("what the guest reads", steps[0].value,
		      present ? 0 : pattern_word(&source.pattern, page * 512, 0));
	}
	vcpu_detach(v);
	machine_destroy(&m);
	ram_destroy(&ram);
	pool_destroy();
	source_destroy(&source);
}

static void at_each_level(bool shared, uint32_t flags)
{
	/*
	 * A vCPU for which KVM's emulator waits in userfaultfd can't be interrupted, not even by an
	 * error. With poison-trap it waits there for a page that is PRESENT and isn't in the page
	 * cache.
	 */
	bool sleeps = test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD || flags & KVMFAULT_MEMSLOT_PRESENT;
	if (sleeps)
		require_interruptible_sleep();
	if (!sleeps || !cpl0_is_emulated())
		over_the_pool(shared, flags, 0);
	over_the_pool(shared, flags, 3);
}

static void shared(void)
{
	at_each_level(true, 0);
}

static void private(void)
{
	at_each_level(false, 0);
}

/* Pages that are called present, and of which there are none. */
static void present_shared(void)
{
	at_each_level(true, KVMFAULT_MEMSLOT_PRESENT);
}

static void present_private(void)
{
	if (test_mechanism() != KVMFAULT_MECHANISM_USERFAULTFD)
		skip("KVM finds nothing that is marked there, and answers by itself");
	at_each_level(false, KVMFAULT_MEMSLOT_PRESENT);
}

static const struct test_case cases[] = {
	{ "shared", shared, true },
	{ "private", private, true },
	{ "present-shared", present_shared, true },
	{ "present-private", present_private, true },
};
TEST_MAIN(cases)
