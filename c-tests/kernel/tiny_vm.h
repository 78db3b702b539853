/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VM with one vCPU and one slot under test. The guest is 32-bit protected mode without paging, so
 * that one access of the guest is one access to guest physical memory: read, write or execute, then
 * HLT.
 */
#ifndef TINY_VM_H
#define TINY_VM_H

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096ul
#define CODE_GPA 0x10000ul
#define RAM_GPA 0x40000000ul
#define RAM_PAGES 1024ul /* two huge pages */
#define RAM_SLOT 1

/* Newer than the headers of Debian 12. */
struct region2 {
	uint32_t slot, flags;
	uint64_t gpa, size, hva, guest_memfd_offset;
	uint32_t guest_memfd, pad1;
	uint64_t userfault_bitmap, pad2[13];
};
#define SET_REGION2 _IOW(KVMIO, 0x49, struct region2)
struct pre_fault {
	uint64_t gpa, size, flags, padding[5];
};
#define PRE_FAULT _IOWR(KVMIO, 0xd5, struct pre_fault)

struct memory_fault {
	uint64_t flags, gpa, size;
};

struct vm {
	int kvm, fd, vcpu;
	struct kvm_run *run;
	uint8_t *code;
	uint8_t *ram;     /* RAM_PAGES of host memory, aligned to 2 MiB */
	uint64_t *bitmap; /* for ABIs that have one; all clear at first */
};

enum access { READ, WRITE, EXEC };
struct result {
	int err; /* 0 or KVM_RUN's errno */
	uint32_t exit_reason;
	struct memory_fault fault;
	uint32_t eax;
};

extern const uint8_t guest_code[], guest_read[], guest_write[], guest_exec[], guest_end[];
__asm__(".pushsection .rodata\n"
	".code32\n"
	"guest_code:\n"
	"guest_read:  mov (%edi), %eax; hlt\n"
	"guest_write: mov %eax, (%edi); hlt\n"
	"guest_exec:  jmp *%edi\n"
	"guest_end:\n"
	".code64\n"
	".popsection\n");

static inline void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(2);
}

static inline void *map(size_t size, size_t align, int flags)
{
	uint8_t *p = mmap(NULL, size + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	p = (uint8_t *)(((uintptr_t)p + align - 1) & ~(align - 1));
	p = mmap(p, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | flags, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

static inline int set_region1(struct vm *vm, uint32_t flags, uint64_t gpa, void *hva, uint64_t pages)
{
	struct kvm_userspace_memory_region r = {
		.slot = RAM_SLOT,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = pages * PAGE,
		.userspace_addr = (uintptr_t)hva,
	};
	return ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &r) ? errno : 0;
}

static inline int set_region2(struct vm *vm, uint32_t flags, uint64_t gpa, void *hva, uint64_t pages, uint64_t bitmap)
{
	struct region2 r = {
		.slot = RAM_SLOT,
		.flags = flags,
		.gpa = gpa,
		.size = pages * PAGE,
		.hva = (uintptr_t)hva,
		.userfault_bitmap = bitmap,
	};
	return ioctl(vm->fd, SET_REGION2, &r) ? errno : 0;
}

static inline int enable_cap(struct vm *vm, int cap, uint64_t arg)
{
	struct kvm_enable_cap c = { .cap = cap, .args = { arg } };
	return ioctl(vm->fd, KVM_ENABLE_CAP, &c) ? errno : 0;
}

/* A VM whose slot RAM_SLOT isn't there yet; RAM comes with these mmap flags, all absent. */
static inline struct vm *vm_new(int ram_flags)
{
	struct vm *vm = calloc(1, sizeof *vm);
	vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vm->kvm < 0 || (vm->fd = ioctl(vm->kvm, KVM_CREATE_VM, 0)) < 0)
		die("KVM_CREATE_VM");
	vm->code = map(PAGE, PAGE, 0);
	memcpy(vm->code, guest_code, guest_end - guest_code);
	struct kvm_userspace_memory_region code = {
		.guest_phys_addr = CODE_GPA,
		.memory_size = PAGE,
		.userspace_addr = (uintptr_t)vm->code,
	};
	if (ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &code))
		die("KVM_SET_USER_MEMORY_REGION");
	vm->ram = map(RAM_PAGES * PAGE, 2 << 20, ram_flags);
	if (!vm->ram)
		die("guest memory");
	if (!(ram_flags & MAP_HUGETLB))
		madvise(vm->ram, RAM_PAGES * PAGE, MADV_NOHUGEPAGE);
	vm->bitmap = map(PAGE, PAGE, 0);

	if ((vm->vcpu = ioctl(vm->fd, KVM_CREATE_VCPU, 0)) < 0)
		die("KVM_CREATE_VCPU");
	vm->run =
		mmap(NULL, ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu, 0);
	struct kvm_sregs s;
	ioctl(vm->vcpu, KVM_GET_SREGS, &s);
	s.cr0 |= 1;
	s.cs = (struct kvm_segment){
		.limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1
	};
	s.ds = s.es = s.ss = (struct kvm_segment){
		.limit = 0xffffffff, .selector = 16, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1
	};
	if (ioctl(vm->vcpu, KVM_SET_SREGS, &s))
		die("KVM_SET_SREGS");
	return vm;
}

static inline void vm_free(struct vm *vm)
{
	munmap(vm->run, ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	close(vm->vcpu);
	close(vm->fd);
	close(vm->kvm);
	munmap(vm->ram, RAM_PAGES * PAGE);
	munmap(vm->bitmap, PAGE);
	munmap(vm->code, PAGE);
	free(vm);
}

/* KVM_RUN with the registers as they are; what isn't written by KVM stays 0xa5. */
static inline struct result resume(struct vm *vm)
{
	struct result r = { 0 };
	struct kvm_regs regs;
	memset(&vm->run->hw, 0xa5, sizeof(struct memory_fault));
	vm->run->exit_reason = 0xa5a5a5a5;
	r.err = ioctl(vm->vcpu, KVM_RUN, 0) ? errno : 0;
	r.exit_reason = vm->run->exit_reason;
	memcpy(&r.fault, &vm->run->hw, sizeof r.fault);
	ioctl(vm->vcpu, KVM_GET_REGS, &regs);
	r.eax = regs.rax;
	return r;
}

/*
 * One access of the guest; an odd offset into the page shows whether KVM rounds the address down.
 */
static inline struct result guest_access(struct vm *vm, enum access access, uint64_t page)
{
	static const uint8_t *const stubs[] = { guest_read, guest_write, guest_exec };
	struct kvm_regs regs = {
		.rip = CODE_GPA + (stubs[access] - guest_code),
		.rdi = RAM_GPA + page * PAGE + 0x124,
		.rax = 0x12345678,
		.rflags = 2,
	};
	ioctl(vm->vcpu, KVM_SET_REGS, &regs);
	return resume(vm);
}

/*
 * The host makes a page present and writable; it holds its number, and HLT where guest_access()
 * jumps to.
 */
static inline void populate(struct vm *vm, uint64_t page)
{
	uint8_t *p = vm->ram + page * PAGE;
	memset(p, 0xf4, PAGE);
	memcpy(p + 8, &page, sizeof page);
}

#endif
