/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memory that breaks although it is PRESENT, as by a hardware error: the vCPU's loop says so, tells where, and doesn't ask the
 * resolver for what it had brought. The breaking is done by UFFDIO_POISON, through a userfaultfd that the VMM opened and shares
 * with the library.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGES = 16 };

/* Linux 6.6; older headers lack it. */
struct poison {
	struct uffdio_range range;
	uint64_t mode;
	int64_t updated;
};
#define POISON _IOWR(0xAA, 0x08, struct poison)
#define NEW_USERFAULTFD _IO(0xAA, 0x00)

static int open_userfaultfd(void)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0) {
		int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
		fd = device < 0 ? -1 : ioctl(device, NEW_USERFAULTFD, O_CLOEXEC | O_NONBLOCK);
		close(device);
	}
	if (fd < 0)
		skip("userfaultfd: %s", strerror(errno));
	return fd;
}

static struct machine m;
static struct ram ram;
static struct source source;
static struct step *steps;
static uint64_t steps_gpa;
static int uffd;

static struct vcpu *set_up(int cpl)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	if (!(probe.mechanisms_anon & 1u << KVMFAULT_MECHANISM_POISON_TRAP))
		skip("the kernel has no UFFDIO_POISON (Linux 6.6)");
	uffd = open_userfaultfd();
	options.uffd = uffd;
	ram_create(&ram, ANON, PAGES * PAGE);
	machine_create(&m, PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	machine_attach(&m, &source, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	steps = machine_share(&m, PAGE, &steps_gpa);
	struct vcpu *v = machine_add_vcpu(&m, cpl);
	vcpu_attach(v);
	return v;
}

static void tear_down(void)
{
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
	close(uffd);
}

static void load_read(struct vcpu *v, uint64_t page)
{
	steps[0] = (struct step){ READ64, RAM_GPA + page * PAGE + 8, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, steps_gpa);
}

static void check_read(struct vcpu *v, uint64_t page)
{
	load_read(v, page);
	EQUAL("stop", vcpu_run(v), 0);
	EQUAL("the word that the guest read", steps[0].value, pattern_word(&source.pattern, page, 1));
}

static void break_page(uint64_t page)
{
	struct poison poison = { .range = { (uintptr_t)ram.hva + page * PAGE, PAGE } };
	SYS(madvise(ram.hva + page * PAGE, PAGE, MADV_DONTNEED));
	SYS(ioctl(uffd, POISON, &poison));
}

static void broken(void)
{
	struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	struct vcpu *v = set_up(3);
	for (int page = 0; page < PAGES; page++)
		check_read(v, page);
	EQUAL("resolver calls", source.total, PAGES);

	break_page(5);
	EQUAL("state", kvmfault_pages_state(m.library, RAM_GPA + 5 * PAGE), KVMFAULT_PAGE_PRESENT);
	load_read(v, 5);
	for (int i = 0; i < 3; i++) {
		int ret = kvmfault_vcpu_run(v->handle);
		CHECK(ret == KVMFAULT_MEMORY_ERROR, "%s", vcpu_describe(v, ret));
		OK(kvmfault_vcpu_memory_error(v->handle, &info));
		EQUAL("gpa", info.gpa, RAM_GPA + 5 * PAGE);
		EQUAL("hva", (uint8_t *)info.hva - ram.hva, 5 * PAGE);
		EQUAL("len", info.len, PAGE);
		EQUAL("lost", info.lost, 0);
	}
	EQUAL("resolver calls", source.total, PAGES);

	/* Other pages are as they were, and the vCPU goes on. */
	check_read(v, 4);
	check_read(v, 6);
	/* The VMM takes the page out and has it brought anew. */
	OK(kvmfault_pages_discard(m.library, RAM_GPA + 5 * PAGE, PAGE));
	check_read(v, 5);
	EQUAL("resolver calls", source.total, PAGES + 1);
	tear_down();
}

/* One marker more or less is no memory error: an absent page that is touched, broken and discarded many times. */
static void mended(void)
{
	struct vcpu *v = set_up(3);
	for (int i = 0; i < 50; i++) {
		check_read(v, 2);
		break_page(2);
		OK(kvmfault_pages_discard(m.library, RAM_GPA + 2 * PAGE, PAGE));
	}
	check_read(v, 2);
	EQUAL("resolver calls", source.total, 51);
	tear_down();
}

/* A userfaultfd that is handed over works as one that the library opens, and stays the VMM's. */
static void shared_uffd(void)
{
	struct vcpu *v = set_up(0);
	for (int page = 0; page < PAGES; page++)
		check_read(v, page);
	EQUAL("resolver calls", source.total, PAGES);
	tear_down();
	/* tear_down closed ours; the library's duplicate went with its VM. */
}

static const struct test_case cases[] = {
	{ "broken", broken, true },
	{ "mended", mended, true },
	{ "shared-uffd", shared_uffd, true },
};
TEST_MAIN(cases)
