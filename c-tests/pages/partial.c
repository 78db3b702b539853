/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * System calls that do a part of their range and then fail: each page is what its state says, and
 * the threads that wait for it are released.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"
#include "slot_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef UFFDIO_CONTINUE
struct uffdio_continue {
	struct uffdio_range range;
	__u64 mode;
	__s64 mapped;
};
#define UFFDIO_CONTINUE _IOWR(0xaa, 0x07, struct uffdio_continue)
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

enum { PAGES = 16, FIRST_LOCKED = 6, LOCKED = 4 };

/*
 * The next UFFDIO_CONTINUE of several pages maps half of them, and the one after it fails. Page
 * tables may not be had (a memory cgroup).
 */
static atomic_int half, failing;

/* In the place of libc's, for the library, too. */
int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	va_start(arguments, request);
	void *argument = va_arg(arguments, void *);
	va_end(arguments);
	struct uffdio_continue *c = argument;
	if (request == UFFDIO_CONTINUE && atomic_exchange(&failing, 0)) {
		c->mapped = -ENOMEM;
		errno = ENOMEM;
		return -1;
	}
	if (request == UFFDIO_CONTINUE && half && c->range.len > PAGE) {
		struct uffdio_continue less = *c;
		less.range.len = c->range.len / PAGE / 2 * PAGE;
		if (syscall(SYS_ioctl, fd, request, &less))
			return -1;
		half = 0;
		failing = 1;
		c->mapped = less.range.len; /* as the kernel reports a partial result */
		errno = EAGAIN;
		return -1;
	}
	return syscall(SYS_ioctl, fd, request, argument);
}

static uint64_t gpa_of(uint64_t page)
{
	return RAM_GPA + page * PAGE;
}

static void expect_state(const struct slot_vm *s, uint64_t page, int state)
{
	int is = kvmfault_pages_state(s->m.library, gpa_of(page));
	CHECK(is == state, "page %lu: its state is %d, not %d", page, is, state);
}

/*
 * Pages are mapped for KVM in part: what the guest has written there stays, and a repeated install
 * doesn't restore the old bytes.
 */
static void install(void)
{
	if (test_mechanism() != KVMFAULT_MECHANISM_POISON_TRAP)
		skip("memory has no second mapping for KVM");
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		struct slot_vm s;
		slot_vm_create(&s, MEMFD, PAGES * PAGE, 0, 0);
		struct vcpu *v = slot_vm_add_vcpu(&s, cpl);
		half = 1;
		REFUSED(source_install(&s.source, s.m.library, RAM_GPA, PAGES * PAGE), ENOMEM,
			"mapping a page for KVM");
		EQUAL("failures to come", half + failing, 0);
		for (uint64_t page = 0; page < PAGES; page++)
			expect_state(&s, page, KVMFAULT_PAGE_PRESENT);
		/* One that was mapped, and one that wasn't. */
		for (uint64_t page = 1; page < PAGES; page += PAGES / 2) {
			slot_vm_write(&s, v, gpa_of(page) + 8, 0x1234 + page);
			int ret = source_install(&s.source, s.m.library, RAM_GPA, PAGES * PAGE);
			EQUAL("a second install", ret, -EEXIST);
			EQUAL("what the guest reads", slot_vm_read(&s, v, gpa_of(page) + 8), 0x1234 + page);
			EQUAL("what a thread reads", *(uint64_t *)(s.ram.hva + page * PAGE + 8), 0x1234 + page);
		}
		EQUAL("resolver calls", s.source.total, 0);
		vcpu_detach(v);
		slot_vm_destroy(&s);
	}
}

/* Touches a page that is locked, and one that is dropped again and again. */
static atomic_ulong touched;
static atomic_bool enough;
static void *touch(void *hva)
{
	while (!enough) {
		for (int page = FIRST_LOCKED - 1; page <= FIRST_LOCKED; page++)
			(void)*(volatile uint64_t *)((uint8_t *)hva + page * PAGE);
		touched++;
	}
	return NULL;
}

/* Locked memory can't be dropped: the pages before and after it are dropped, and it stays. */
static void locked(enum backing backing)
{
	struct slot_vm s;
	pthread_t thread;
	slot_vm_create(&s, backing, PAGES * PAGE, 0, 0);
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	OK(source_install(&s.source, s.m.library, RAM_GPA, PAGES * PAGE));
	SYS(mlock(s.ram.hva + FIRST_LOCKED * PAGE, LOCKED * PAGE));
	for (uint64_t page = 0; page < PAGES; page++)
		slot_vm_write(&s, v, gpa_of(page) + 8, 0x1234);
	for (int round = 0; round < 3; round++) {
		REFUSED(kvmfault_pages_discard(s.m.library, RAM_GPA, PAGES * PAGE), EINVAL, "mlock");
		s.source.total = 0;
		for (uint64_t page = 0; page < PAGES; page++) {
			bool stays = page >= FIRST_LOCKED && page < FIRST_LOCKED + LOCKED;
			expect_state(&s, page, stays ? KVMFAULT_PAGE_PRESENT : KVMFAULT_PAGE_ABSENT);
			uint64_t word = slot_vm_read(&s, v, gpa_of(page) + 8);
			uint64_t expected = stays ? 0x1234 : pattern_word(&s.source.pattern, page, 1);
			CHECK(word == expected, "page %lu: the guest reads %#lx, not %#lx", page, word, expected);
		}
		EQUAL("resolver calls", s.source.total, PAGES - LOCKED);
		slot_vm_expect_all_present(&s);
	}
	if (backing == MEMFD) { /* of private memory only vCPUs may touch what is absent */
		enough = false;
		CHECK(!pthread_create(&thread, NULL, touch, s.ram.hva), "pthread_create");
		UNTIL(touched);
		for (int round = 0; round < 50; round++)
			REFUSED(kvmfault_pages_discard(s.m.library, RAM_GPA, PAGES * PAGE), EINVAL, "mlock");
		unsigned long before = touched;
		UNTIL(touched > before + 1);
		enough = true;
		pthread_join(thread, NULL);
		EQUAL("what the thread left", *(uint64_t *)(s.ram.hva + FIRST_LOCKED * PAGE + 8), 0x1234);
	}
	SYS(munlock(s.ram.hva, s.ram.len));
	OK(kvmfault_pages_discard(s.m.library, RAM_GPA, PAGES * PAGE));
	EQUAL("absent", kvmfault_pages_absent(s.m.library), PAGES);
	vcpu_detach(v);
	slot_vm_destroy(&s);
}

static void locked_anon(void)
{
	locked(ANON);
}
static void locked_memfd(void)
{
	locked(MEMFD);
}

/*
 * The kernel punches no hole in a file that is sealed against writing. The pages stay what they
 * are, and vCPUs find them.
 */
static void sealed(void)
{
	struct slot_vm s;
	slot_vm_attach(&s, MEMFD, PAGES * PAGE, test_mechanism(), NULL);
	struct kvmfault_memslot slot = slot_on(&s.ram, RAM_SLOT, RAM_GPA);
	slot.fd = SYS(memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
	SYS(ftruncate(slot.fd, s.ram.len));
	CHECK(mmap(s.ram.hva, s.ram.len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, slot.fd, 0) == s.ram.hva,
	      "mmap");
	if (fcntl(slot.fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE))
		skip("F_SEAL_FUTURE_WRITE: %s (Linux 5.1 and later have it)", strerror(errno));
	OK(kvmfault_memslot_set(s.m.library, &slot));
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	OK(source_install(&s.source, s.m.library, RAM_GPA, PAGES * PAGE));
	slot_vm_write(&s, v, gpa_of(3) + 8, 0x1234);
	uint64_t exits = machine_settled_stats(&s.m).faults_vcpu;
	REFUSED(kvmfault_pages_discard(s.m.library, RAM_GPA, PAGES * PAGE), EPERM, "F_SEAL_FUTURE_WRITE");
	for (uint64_t page = 0; page < PAGES; page++)
		expect_state(&s, page, KVMFAULT_PAGE_PRESENT);
	for (uint64_t page = 0; page < PAGES; page++)
		EQUAL("what the guest reads", slot_vm_read(&s, v, gpa_of(page) + 8),
		      page == 3 ? 0x1234 : pattern_word(&s.source.pattern, page, 1));
	if (test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP)
		EQUAL("faults of the vCPU in pages that stayed", machine_settled_stats(&s.m).faults_vcpu, exits);
	EQUAL("what a thread reads", *(uint64_t *)(s.ram.hva + 3 * PAGE + 8), 0x1234);
	EQUAL("resolver calls", s.source.total, 0);
	vcpu_detach(v);
	slot_vm_destroy(&s);
	close(slot.fd);
}

static atomic_bool went_on;
static void *wait_for_page(void *hva)
{
	(void)*(volatile uint8_t *)hva;
	went_on = true;
	return NULL;
}

/*
 * Pages that are given up where that can't be shown, as something else is mapped there: the threads
 * waiting for them go on.
 */
static void lost(void)
{
	pthread_t thread;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	if (!(probe.mechanisms_anon & 1u << KVMFAULT_MECHANISM_POISON_TRAP))
		skip("before Linux 6.6 a thread that touches a lost page gets SIGSEGV");
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, 0, 3);
	CHECK(!pthread_create(&thread, NULL, wait_for_page, resolver_vm.ram.hva), "pthread_create");
	UNTIL(resolver_vm.calls == 1);
	int fixed = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
	CHECK(mmap(resolver_vm.ram.hva, resolver_vm.ram.len, PROT_READ | PROT_WRITE, fixed, -1, 0) ==
		      resolver_vm.ram.hva,
	      "mmap");
	CHECK(!went_on, "the mapping woke it");
	int ret = kvmfault_pages_lost(resolver_vm.m.library, RAM_GPA, RESOLVER_VM_PAGES * PAGE);
	UNTIL(went_on);
	pthread_join(thread, NULL);
	CHECK(ret < 0, "the kernel has markers where nothing is registered");
	EQUAL("state", kvmfault_pages_state(resolver_vm.m.library, RAM_GPA), KVMFAULT_PAGE_LOST);
	resolver_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "install", install, true },
	{ "locked-anon", locked_anon, true },
	{ "locked-memfd", locked_memfd, true },
	{ "sealed", sealed, true },
	{ "lost", lost, true },
};
TEST_MAIN(cases)
