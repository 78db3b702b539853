/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * An install whose source does not answer: a file on a network that is gone, another pager that
 * hangs. Here the source is memory under a userfaultfd that the case serves when it likes. No other
 * thread waits for it.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static uint8_t *stalled;
static int pager;
static atomic_int install_returned, installing;

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	resolver_vm.calls++;
	return source_install(&resolver_vm.source, vm, fault->gpa, fault->len);
}

static void answer(void)
{
	struct uffdio_zeropage zero = { .range = { (uintptr_t)stalled, PAGE } };
	SYS(ioctl(pager, UFFDIO_ZEROPAGE, &zero));
}

static void set_up(int vcpus)
{
	install_returned = installing = 0;
	resolver_vm_set_up(MEMFD, resolve, vcpus, 3);
	pager = SYS(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
	struct uffdio_api api = { .api = UFFD_API };
	SYS(ioctl(pager, UFFDIO_API, &api));
	stalled = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(stalled != MAP_FAILED, "mmap");
	struct uffdio_register range = { .range = { (uintptr_t)stalled, PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	SYS(ioctl(pager, UFFDIO_REGISTER, &range));
}

static void tear_down(void)
{
	close(pager);
	munmap(stalled, PAGE);
	resolver_vm_tear_down();
}

/* Waits until the pager has been asked. */
static void await_read(void)
{
	struct uffd_msg message;
	UNTIL(read(pager, &message, sizeof(message)) == sizeof(message));
}

static void *install_page_5(void *arg)
{
	(void)arg;
	installing = kvmfault_pages_install(resolver_vm.m.library, RAM_GPA + 5 * PAGE, stalled, PAGE);
	install_returned = 1;
	return NULL;
}

/*
 * Meanwhile all else works in the same 2 MiB: pages are marked lost, discarded, installed and read
 * by a vCPU; the slot is switched and deleted.
 */
static void others_go_on(void)
{
	pthread_t thread;
	uint8_t bytes[PAGE] = { 0 };
	set_up(1);
	struct kvmfault_vm *vm = resolver_vm.m.library;
	resolver_vm_install(20);
	CHECK(!pthread_create(&thread, NULL, install_page_5, NULL), "pthread_create");
	await_read();
	double began = now();
	OK(kvmfault_pages_lost(vm, RAM_GPA + 6 * PAGE, PAGE));
	OK(kvmfault_pages_discard(vm, RAM_GPA + 6 * PAGE, PAGE));
	OK(kvmfault_pages_discard(vm, RAM_GPA + 20 * PAGE, PAGE));
	OK(kvmfault_pages_install(vm, RAM_GPA + 21 * PAGE, bytes, PAGE));
	OK(kvmfault_pages_withdraw(vm, RAM_GPA, RESOLVER_VM_PAGES * PAGE));
	vcpu_attach(resolver_vm.m.vcpu[0]);
	resolver_vm_read(resolver_vm.m.vcpu[0], 7);
	OK(kvmfault_pages_lost(vm, RAM_GPA + 5 * PAGE, PAGE));
	OK(kvmfault_pages_discard(vm, RAM_GPA + 5 * PAGE, PAGE));
	OK(kvmfault_memslot_set_fast_only(vm, RAM_SLOT, 0));
	OK(kvmfault_memslot_set_fast_only(vm, RAM_SLOT, 1));
	CHECK(now() - began < 9, "it took %.1f s: something waited", now() - began);
	EQUAL("the install has returned", install_returned, 0);
	answer();
	pthread_join(thread, NULL);
	EQUAL("the install's result", installing, 0);
	tear_down();
}

static void *lose_page_6(void *arg)
{
	*(atomic_int *)arg = kvmfault_pages_lost(resolver_vm.m.library, RAM_GPA + 6 * PAGE, PAGE);
	return NULL;
}

/* The source was there when the install began, and is gone when the kernel reads it. */
static void *install_again(void *arg)
{
	(void)arg;
	OK(kvmfault_pages_install(resolver_vm.m.library, RAM_GPA + 4 * PAGE, stalled, PAGE));
	SYS(madvise(stalled, PAGE, MADV_DONTNEED));
	return install_page_5(NULL);
}

/*
 * Then a discard in the same 2 MiB can't get in: it gives up, vCPUs go on meanwhile, and the end of
 * the VM ends it.
 */
static void gone_again(void)
{
	pthread_t installer, loser;
	atomic_int lost = 1;
	set_up(1);
	answer();
	CHECK(!pthread_create(&installer, NULL, install_again, NULL), "pthread_create");
	await_read();
	CHECK(!pthread_create(&loser, NULL, lose_page_6, &lost), "pthread_create");
	vcpu_attach(resolver_vm.m.vcpu[0]);
	for (int page = 10; page < RESOLVER_VM_PAGES; page++)
		resolver_vm_read(resolver_vm.m.vcpu[0], page);
	REFUSED(kvmfault_pages_lost(resolver_vm.m.library, RAM_GPA + 8 * PAGE, PAGE), EBUSY, "source");
	pthread_join(loser, NULL);
	EQUAL("pages_lost", lost, -EBUSY);
	lost = 1;
	CHECK(!pthread_create(&loser, NULL, lose_page_6, &lost), "pthread_create");
	usleep(50000);
	vms_going++;
	kvmfault_vm_free(resolver_vm.m.library);
	pthread_join(loser, NULL);
	EQUAL("pages_lost when the VM goes", lost, -ESHUTDOWN);
	EQUAL("the install has returned", install_returned, 0);
	answer();
	pthread_join(installer, NULL);
	_exit(0); /* the VM is freed already */
}

static const struct test_case cases[] = {
	{ "others-go-on", others_go_on, true },
	{ "gone-again", gone_again, true },
};
TEST_MAIN(cases)
