/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "tiny-vm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE_TABLES 0x1000ul
#define SHARED 0x20000ul
#define LARGE_PAGE (2ul << 20)

void die(int error, const char *format, ...)
{
	va_list args;
	fflush(stdout);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fprintf(stderr, error ? ": %s\n" : "\n", strerror(error));
	exit(1);
}

static uint64_t round_up(uint64_t n, uint64_t to)
{
	return (n + to - 1) / to * to;
}

/* Maps each virtual address below 8 GiB to the same physical address. CPL 3 may use all pages. */
static void write_page_tables(struct tiny_vm *vm)
{
	enum { PRESENT = 1, WRITABLE = 2, USER = 4, LARGE = 0x80, ALL = PRESENT | WRITABLE | USER };
	uint64_t *pml4 = (uint64_t *)(vm->low + PAGE_TABLES);
	uint64_t *pdpt = pml4 + 512, *directory = pdpt + 512;

	pml4[0] = (PAGE_TABLES + PAGE_SIZE) | ALL;
	for (uint64_t i = 0; i < 8; i++)
		pdpt[i] = (PAGE_TABLES + (2 + i) * PAGE_SIZE) | ALL;
	for (uint64_t i = 0; i < 8 * 512; i++)
		directory[i] = i * LARGE_PAGE | ALL | LARGE;
}

void tiny_vm_set_memory(const struct tiny_vm *vm, unsigned slot, uint64_t gpa, void *memory, uint64_t size)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)memory,
	};
	if (ioctl(vm->vm, KVM_SET_USER_MEMORY_REGION, &region))
		die(errno, "KVM_SET_USER_MEMORY_REGION");
}

void tiny_vm_create(struct tiny_vm *vm, uint64_t shared, const void *code, size_t code_size)
{
	vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vm->kvm < 0)
		die(errno, "/dev/kvm can't be opened (load the kvm module; be root, or a member of group kvm)");
	vm->vm = ioctl(vm->kvm, KVM_CREATE_VM, 0);
	if (vm->vm < 0)
		die(errno, "KVM_CREATE_VM");

	vm->low_used = SHARED;
	vm->low_size = round_up(SHARED + shared + 64 * PAGE_SIZE, LARGE_PAGE);
	if (vm->low_size > TINY_VM_RAM)
		die(0, "the tables for the guest do not fit below its memory; use a smaller --size");
	vm->low = mmap(NULL, vm->low_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (vm->low == MAP_FAILED)
		die(errno, "%lu MiB of memory for the guest's tables", (unsigned long)(vm->low_size >> 20));
	tiny_vm_set_memory(vm, 0, 0, vm->low, vm->low_size);
	write_page_tables(vm);
	memcpy(vm->low + TINY_VM_CODE, code, code_size);
}

void tiny_vm_destroy(struct tiny_vm *vm)
{
	close(vm->vm);
	close(vm->kvm);
	munmap(vm->low, vm->low_size);
}

void *tiny_vm_share(struct tiny_vm *vm, uint64_t size, uint64_t *guest_address)
{
	if (vm->low_used + size > vm->low_size)
		die(0, "tiny_vm_share: more memory than tiny_vm_create was asked for");
	*guest_address = vm->low_used;
	vm->low_used += round_up(size, PAGE_SIZE);
	return vm->low + *guest_address;
}

void tiny_vcpu_create(const struct tiny_vm *vm, int number, int cpl, struct kvm_regs *regs, struct tiny_vcpu *vcpu)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid;

	vcpu->fd = ioctl(vm->vm, KVM_CREATE_VCPU, number);
	if (vcpu->fd < 0)
		die(errno, "KVM_CREATE_VCPU %d", number);
	vcpu->run_size = ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	vcpu->run = mmap(NULL, vcpu->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (vcpu->run == MAP_FAILED)
		die(errno, "kvm_run of vCPU %d", number);

	cpuid.head.nent = 256;
	if (ioctl(vm->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) || ioctl(vcpu->fd, KVM_SET_CPUID2, &cpuid))
		die(errno, "the CPUID of vCPU %d", number);

	struct kvm_sregs sregs;
	if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs))
		die(errno, "KVM_GET_SREGS");
	struct kvm_segment code = {
		.limit = 0xfffff,
		.selector = cpl ? 0x33 : 0x10,
		.type = 11,
		.present = 1,
		.dpl = cpl,
		.s = 1,
		.l = 1,
		.g = 1,
	};
	struct kvm_segment data = {
		.limit = 0xfffff,
		.selector = cpl ? 0x2b : 0x18,
		.type = 3,
		.present = 1,
		.dpl = cpl,
		.s = 1,
		.db = 1,
		.g = 1,
	};
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	memset(&sregs.ldt, 0, sizeof(sregs.ldt));
	sregs.tr.present = 1;
	sregs.tr.type = 11; /* a busy 64-bit TSS */
	sregs.cr3 = PAGE_TABLES;
	sregs.cr4 = 1 << 5;     /* PAE */
	sregs.cr0 = 0x80050033; /* PG, WP, NE, ET, MP, PE: paging in protected mode */
	sregs.efer = 0xd01;     /* long mode, active; NX; syscall */
	if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs))
		die(errno, "KVM_SET_SREGS");

	regs->rip = TINY_VM_CODE;
	regs->rflags = 0x3002; /* I/O privilege level 3: the guest may use `out` at CPL 3 */
	regs->rsp = TINY_VM_CODE;
	if (ioctl(vcpu->fd, KVM_SET_REGS, regs))
		die(errno, "KVM_SET_REGS");
}

void tiny_vcpu_destroy(struct tiny_vcpu *vcpu)
{
	munmap(vcpu->run, vcpu->run_size);
	close(vcpu->fd);
}
