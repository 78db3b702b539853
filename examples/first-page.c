// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * The smallest whole program: a VM with 1 MiB of memory, of which nothing is present at the start,
 * not even the guest's code. The guest loads a byte from one page and writes it to a port.
 *
 *     cc first-page.c $(pkg-config --cflags --libs kvmfault) && ./a.out
 */
#include <fcntl.h>
#include <kvmfault.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/* Runs on the vCPU's thread for each page that the guest needs and that is absent. */
static int resolver(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	/* mov al, [0x5000]; out 0x10, al; hlt */
	static const unsigned char code[] = { 0xa0, 0x00, 0x50, 0xe6, 0x10, 0xf4 };
	unsigned char page[4096] = { 0 };
	int ret;

	(void)opaque;
	printf("the guest needs page %#llx\n", (unsigned long long)fault->gpa);
	if (fault->gpa == 0)
		memcpy(page, code, sizeof(code));
	if (fault->gpa == 0x5000)
		page[0] = 42;
	ret = kvmfault_pages_install(vm, fault->gpa, page, fault->len);
	return ret == 0 ? KVMFAULT_RESOLVED : ret;
}

static int failed(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, kvmfault_last_error());
	return 1;
}

int main(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	struct kvmfault_vcpu_options vcpu_options = KVMFAULT_VCPU_OPTIONS_INIT;
	struct kvmfault_vm *vm;
	struct kvmfault_vcpu *vcpu;
	struct kvm_regs regs = { .rflags = 2 };
	struct kvm_sregs sregs;
	struct kvm_run *run;
	int ret;

	/* Without KVM these are -1, and kvmfault_vm_new says so. */
	options.kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	options.vm_fd = ioctl(options.kvm_fd, KVM_CREATE_VM, 0);
	options.resolver = resolver;
	if (kvmfault_vm_new(&options, &vm) < 0)
		return failed("kvmfault_vm_new");

	slot.len = 1 << 20;
	slot.hva = mmap(NULL, slot.len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (kvmfault_memslot_set(vm, &slot) < 0)
		return failed("kvmfault_memslot_set");

	vcpu_options.fd = ioctl(options.vm_fd, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, ioctl(options.kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED,
		   vcpu_options.fd, 0);
	ioctl(vcpu_options.fd, KVM_GET_SREGS, &sregs);
	sregs.cs.base = sregs.cs.selector = 0; /* real mode, at address 0 */
	ioctl(vcpu_options.fd, KVM_SET_SREGS, &sregs);
	ioctl(vcpu_options.fd, KVM_SET_REGS, &regs);
	if (kvmfault_vcpu_new(vm, &vcpu_options, &vcpu) < 0)
		return failed("kvmfault_vcpu_new");

	while ((ret = kvmfault_vcpu_run(vcpu)) == KVMFAULT_PASS && run->exit_reason == KVM_EXIT_IO)
		printf("the guest says %d\n", *((unsigned char *)run + run->io.data_offset));
	if (ret < 0)
		return failed("kvmfault_vcpu_run");

	kvmfault_vcpu_free(vcpu);
	kvmfault_vm_free(vm);
	return 0;
}
