/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memory of a deleted slot is the VMM's again as soon as the deleting call has returned: whatever
 * the library was about to do with it in another thread, it has done or gives up. In these cases a
 * thread of the library's is stopped just before a system call that touches the memory, until the
 * memory has been replaced, or until deleting has waited for the thread for a while.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* ---- system calls that stop ---- */

static _Thread_local bool stops; /* the next of this thread's calls */
static atomic_bool stopped, deleting, replaced;

static void stop_here(void)
{
	if (!stops)
		return;
	stops = false;
	stopped = true;
	UNTIL(deleting);
	for (double end = now() + 0.5; !replaced && now() < end;)
		usleep(1000);
}

/* The library's calls come here, as an executable's functions go before those of libc. */
ssize_t process_vm_readv(pid_t pid, const struct iovec *local, unsigned long locals, const struct iovec *remote,
			 unsigned long remotes, unsigned long flags)
{
	stop_here();
	return syscall(SYS_process_vm_readv, pid, local, locals, remote, remotes, flags);
}

ssize_t process_vm_writev(pid_t pid, const struct iovec *local, unsigned long locals, const struct iovec *remote,
			  unsigned long remotes, unsigned long flags)
{
	stop_here();
	return syscall(SYS_process_vm_writev, pid, local, locals, remote, remotes, flags);
}

int madvise(void *start, size_t len, int advice)
{
	if (advice == MADV_DONTNEED || advice == MADV_REMOVE)
		stop_here();
	return (int)syscall(SYS_madvise, start, len, advice);
}

/* ---- the VMM ---- */

enum { WORD = 0x5a5a5a5a };

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	return source_install(&resolver_vm.source, vm, fault->gpa, fault->len);
}

static void set_up(enum backing backing, int vcpus)
{
	stopped = deleting = replaced = false;
	resolver_vm_set_up(backing, resolve, vcpus, 0);
}

/* Deletes the slot while a thread has stopped, and puts memory of the VMM's own in its place. */
static void delete_and_replace(void)
{
	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	slot.slot = RAM_SLOT;
	UNTIL(stopped);
	deleting = true;
	OK(kvmfault_memslot_set(resolver_vm.m.library, &slot));
	if (resolver_vm.ram.fd >= 0) /* the file is used again, too */
		SYS(ftruncate(resolver_vm.ram.fd, 0)), SYS(ftruncate(resolver_vm.ram.fd, resolver_vm.ram.len));
	void *fresh = mmap(resolver_vm.ram.hva, resolver_vm.ram.len, PROT_READ | PROT_WRITE,
			   MAP_FIXED | (resolver_vm.ram.fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED),
			   resolver_vm.ram.fd, 0);
	CHECK(fresh == resolver_vm.ram.hva, "mmap: %s", strerror(errno));
	memset(resolver_vm.ram.hva, WORD & 0xff, resolver_vm.ram.len);
	replaced = true;
}

static void check_untouched(void)
{
	for (uint64_t n = 0; n < resolver_vm.ram.len / 4; n++)
		EQUAL("a word of the VMM's own memory", ((uint32_t *)resolver_vm.ram.hva)[n], WORD);
	resolver_vm_tear_down();
}

/* ---- accesses that KVM emulates, which the library completes ---- */

static void *run_and_stop(struct vcpu *v)
{
	uint32_t value;
	vcpu_attach(v);
	stops = true;
	int ret = kvmfault_vcpu_run(v->handle);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	vcpu_detach(v);
	return NULL;
}

static struct vcpu *set_up_emulated(enum backing backing)
{
	if (!cpl0_comes_as_mmio())
		skip("accesses at CPL 0 don't come as MMIO exits here with %s", mechanism_name(test_mechanism()));
	set_up(backing, 1);
	return resolver_vm.m.vcpu[0];
}

static void emulated_write(enum backing backing)
{
	struct vcpu *v = set_up_emulated(backing);
	resolver_vm.steps[0] = (struct step){ WRITE64, RAM_GPA + 3 * PAGE, 0x1122334455667788, 0 };
	resolver_vm.steps[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, resolver_vm.steps_gpa);
	vcpu_start(v, run_and_stop, NULL);
	delete_and_replace();
	vcpu_join(v);
	check_untouched();
}

static void write_memfd(void)
{
	emulated_write(MEMFD);
}

static void write_anon(void)
{
	emulated_write(ANON);
}

/* What the guest reads is its page, and not what the VMM has there now. */
static void emulated_read(void)
{
	struct vcpu *v = set_up_emulated(ANON);
	resolver_vm_load_read(v, 3);
	vcpu_start(v, run_and_stop, NULL);
	delete_and_replace();
	vcpu_join(v);
	resolver_vm_check_read(v, 3);
	check_untouched();
}

/* ---- calls of other threads ---- */

static void *discard(void *arg)
{
	(void)arg;
	stops = true;
	kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA, 8 * PAGE);
	return NULL;
}

static void *give_back(void *arg)
{
	(void)arg;
	stops = true;
	kvmfault_pages_give_back(resolver_vm.m.library, RAM_GPA, 8 * PAGE);
	return NULL;
}

static void dropped_by(void *(*thread_main)(void *))
{
	pthread_t thread;
	for (enum backing backing = ANON; backing <= MEMFD; backing++) {
		set_up(backing, 0);
		for (int page = 0; page < 8; page++)
			resolver_vm_install(page);
		CHECK(!pthread_create(&thread, NULL, thread_main, NULL), "pthread_create");
		delete_and_replace();
		pthread_join(thread, NULL);
		check_untouched();
	}
}

static void discarded(void)
{
	dropped_by(discard);
}

static void given_back(void)
{
	dropped_by(give_back);
}

/* ---- an install that does not end ---- */

static uint8_t *source;
static int pager;

/*
 * The source is there when the install begins, and is gone when the kernel reads it, inside the
 * library's gate.
 */
static void *install_from_nowhere(void *arg)
{
	atomic_int *result = arg;
	OK(kvmfault_pages_install(resolver_vm.m.library, RAM_GPA + 4 * PAGE, source, PAGE));
	SYS(madvise(source, PAGE, MADV_DONTNEED));
	*result = kvmfault_pages_install(resolver_vm.m.library, RAM_GPA + 5 * PAGE, source, PAGE);
	return NULL;
}

static void answer(void)
{
	struct uffdio_zeropage zero = { .range = { (uintptr_t)source, PAGE } };
	SYS(ioctl(pager, UFFDIO_ZEROPAGE, &zero));
}

/*
 * Deleting doesn't wait for it for long. It would reach the memory if that were a slot's again, so
 * that is refused until it is over.
 */
static void install_hangs(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffd_msg message;
	pthread_t thread;
	atomic_int result = 1;
	set_up(MEMFD, 0);
	pager = SYS(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
	SYS(ioctl(pager, UFFDIO_API, &api));
	source = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(source != MAP_FAILED, "mmap");
	struct uffdio_register range = { .range = { (uintptr_t)source, PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	SYS(ioctl(pager, UFFDIO_REGISTER, &range));
	answer();
	CHECK(!pthread_create(&thread, NULL, install_from_nowhere, &result), "pthread_create");
	UNTIL(read(pager, &message, sizeof(message)) == sizeof(message));
	stopped = true;
	delete_and_replace();
	EQUAL("the install's result", result, 1);

	struct kvmfault_memslot slot = slot_on(&resolver_vm.ram, RAM_SLOT, RAM_GPA);
	REFUSED(kvmfault_memslot_set(resolver_vm.m.library, &slot), EBUSY, "install");
	answer();
	pthread_join(thread, NULL);
	EQUAL("the install's result", result, -ENOENT);
	for (uint64_t n = 0; n < resolver_vm.ram.len / 4; n++)
		EQUAL("a word of the VMM's own memory", ((uint32_t *)resolver_vm.ram.hva)[n], WORD);
	OK(kvmfault_memslot_set(resolver_vm.m.library, &slot));
	close(pager);
	munmap(source, PAGE);
	resolver_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "write", write_memfd, true },   { "write-anon", write_anon, true }, { "read", emulated_read, true },
	{ "discarded", discarded, true }, { "given-back", given_back, true }, { "install-hangs", install_hangs, true },
};
TEST_MAIN(cases)
