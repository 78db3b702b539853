/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * As little of a virtual machine as a guest in 64-bit mode needs. Nothing here is about lazy
 * memory: every VMM has such code.
 *
 *   0x00001000  page tables: virtual addresses equal physical ones, in large pages
 *   0x00010000  the guest's code
 *   0x00020000  tables that host and guest share (tiny_vm_share), up to low_size
 *   0x40000000  the memory under test: a memslot of the caller
 */
#ifndef TINY_VM_H
#define TINY_VM_H

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_SIZE 4096ul
#define TINY_VM_CODE 0x10000ul
#define TINY_VM_RAM 0x40000000ul
#define TINY_VM_RAM_MAX (7ul << 30) /* as far as the page tables go */

struct tiny_vm {
	int kvm; /* /dev/kvm */
	int vm;
	uint8_t *low; /* ordinary memory at guest address 0: memslot 0 */
	uint64_t low_size;
	uint64_t low_used;
};

struct tiny_vcpu {
	int fd;
	struct kvm_run *run;
	size_t run_size;
};

/* Ends the program with a message, and the text for `error` (an errno value) if that is not 0. */
void die(int error, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));

/* Makes a VM with `shared` bytes for tiny_vm_share, and `code` in place; or ends the program. */
void tiny_vm_create(struct tiny_vm *vm, uint64_t shared, const void *code, size_t code_size);
/* Call it when all vCPUs have been destroyed. */
void tiny_vm_destroy(struct tiny_vm *vm);

/* Gives the guest ordinary memory, as a memslot without the library. */
void tiny_vm_set_memory(const struct tiny_vm *vm, unsigned slot, uint64_t gpa, void *memory, uint64_t size);

/* Allocates memory for host and guest. Returns its host address, and stores its guest address. */
void *tiny_vm_share(struct tiny_vm *vm, uint64_t size, uint64_t *guest_address);

/*
 * Creates vCPU `number`, to run the code with these registers at privilege level 0 or 3. The
 * function fills in rip, rflags and rsp.
 */
void tiny_vcpu_create(const struct tiny_vm *vm, int number, int cpl, struct kvm_regs *regs, struct tiny_vcpu *vcpu);
void tiny_vcpu_destroy(struct tiny_vcpu *vcpu);

#endif
