/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * I/O on the memory's descriptor, and a second mapping: they don't see that a page is absent, and
 * are right after kvmfault_pages_resolve.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <unistd.h>

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	int ret = source_install(&resolver_vm.source, vm, fault->gpa, fault->len);
	return ret < 0 ? ret : KVMFAULT_RESOLVED;
}

/* What the four ways read of a page, by its first word. */
static void read_by_each(uint64_t page, uint64_t expected)
{
	uint8_t *second = ram_map_again(&resolver_vm.ram);
	uint64_t got[4] = { 0 };
	off_t at = page * PAGE;
	int pipes[2];
	EQUAL("pread", pread(resolver_vm.ram.fd, &got[0], 8, at), 8);
	memcpy(&got[1], second + page * PAGE, 8);
	int file = SYS(memfd_create("copy", MFD_CLOEXEC));
	EQUAL("sendfile", sendfile(file, resolver_vm.ram.fd, &at, PAGE), PAGE);
	EQUAL("reading the copy", pread(file, &got[2], 8, 0), 8);
	SYS(pipe(pipes));
	off_t from = page * PAGE;
	EQUAL("splice", splice(resolver_vm.ram.fd, &from, pipes[1], NULL, 8, 0), 8);
	EQUAL("reading the pipe", read(pipes[0], &got[3], 8), 8);
	for (int way = 0; way < 4; way++)
		EQUAL(((const char *[]){ "by pread", "by a second mapping", "by sendfile", "by splice" })[way],
		      got[way], expected);
	close(pipes[0]);
	close(pipes[1]);
	close(file);
	munmap(second, resolver_vm.ram.len);
}

static void write_by_descriptor(uint64_t page, uint64_t value)
{
	EQUAL("pwrite", pwrite(resolver_vm.ram.fd, &value, 8, page * PAGE), 8);
}

/* The first word of a page as the guest reads it. */
static uint64_t guest_reads(uint64_t page)
{
	resolver_vm_load_read(resolver_vm.m.vcpu[0], page);
	EQUAL("stop", vcpu_run(resolver_vm.m.vcpu[0]), 0);
	return resolver_vm.steps[0].value;
}

static void resolved(void)
{
	resolver_vm_set_up(MEMFD, resolve, 1, 3);
	vcpu_attach(resolver_vm.m.vcpu[0]);
	/*
	 * As documented: an absent page reads as zeros, and a write to it is lost when the page
	 * comes.
	 */
	read_by_each(1, 0);
	write_by_descriptor(2, 42);
	EQUAL("a write to an absent page", guest_reads(2), pattern_word(&resolver_vm.source.pattern, 2, 0));
	/* And what makes it right. */
	OK(kvmfault_pages_resolve(resolver_vm.m.library, RAM_GPA, 8 * PAGE));
	for (uint64_t page = 0; page < 8; page++)
		read_by_each(page, pattern_word(&resolver_vm.source.pattern, page, 0));
	for (uint64_t page = 0; page < 8; page++) {
		write_by_descriptor(page, 1000 + page);
		EQUAL("what pwrite wrote", guest_reads(page), 1000 + page);
		EQUAL("in the VMM's mapping", *(uint64_t *)(resolver_vm.ram.hva + page * PAGE), 1000 + page);
	}
	vcpu_detach(resolver_vm.m.vcpu[0]);
	resolver_vm_tear_down();
}

/*
 * A buffer in guest memory is no I/O on the descriptor: the kernel faults its pages in as it
 * copies.
 */
static void buffers(void)
{
	uint64_t value = 0;
	resolver_vm_set_up(MEMFD, resolve, 0, 3);
	int file = SYS(memfd_create("file", MFD_CLOEXEC));
	EQUAL("pwrite", pwrite(file, resolver_vm.ram.hva + 3 * PAGE, PAGE, 0), PAGE);
	EQUAL("pread", pread(file, &value, 8, 0), 8);
	EQUAL("what was written from an absent page", value, pattern_word(&resolver_vm.source.pattern, 3, 0));
	EQUAL("pread", pread(file, resolver_vm.ram.hva + 5 * PAGE + 8, 8, 0), 8);
	EQUAL("beside what was read into an absent page", *(uint64_t *)(resolver_vm.ram.hva + 5 * PAGE),
	      pattern_word(&resolver_vm.source.pattern, 5, 0));
	EQUAL("what was read into an absent page", *(uint64_t *)(resolver_vm.ram.hva + 5 * PAGE + 8), value);
	close(file);
	resolver_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "resolved", resolved, true },
	{ "buffers", buffers, true },
};
TEST_MAIN(cases)
