/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * libkvmfault: guest memory that is supplied on demand, to VMs on KVM.
 *
 * Generated from src/capi by `make header`; don't edit.
 *
 * A VMM that restores a snapshot lazily, or runs the destination of a post-copy migration, starts
 * its guest before the memory is there. When the guest touches an absent page, this library calls a
 * function of the VMM's, the resolver, on the faulting vCPU's own thread: no userfaultfd queue is
 * shared between the vCPUs. The resolver installs the page, and the guest continues.
 *
 * Order of calls
 *   1. Open /dev/kvm and create the VM as always. kvmfault_vm_new() attaches the library to it.
 *   2. kvmfault_memslot_set() for each range of guest memory, absent at first. (A VMM that does the
 *      ioctl itself calls kvmfault_memslot_prepare().)
 *   3. On each vCPU's thread, when its CPUID and registers are set: kvmfault_vcpu_new().
 *   4. On that thread, kvmfault_vcpu_run() in a loop instead of KVM_RUN. (A VMM with its own loop
 *      calls kvmfault_vcpu_resume(), KVM_RUN and kvmfault_vcpu_handle_exit().)
 *   5. From any thread, at any time: kvmfault_pages_*(), kvmfault_vcpu_kick(), a fill, statistics.
 *   6. kvmfault_vcpu_free() on each vCPU's thread; kvmfault_memslot_set() with `len` 0 for each
 *      slot; kvmfault_vm_close().
 *
 * A complete program. Its guest has two pages, loads a byte of the second one and writes it to a
 * port.
 *
 *     #include <fcntl.h>
 *     #include <kvmfault.h>
 *     #include <linux/kvm.h>
 *     #include <stdio.h>
 *     #include <string.h>
 *     #include <sys/ioctl.h>
 *     #include <sys/mman.h>
 *
 *     static int fail(void)
 *     {
 *         fprintf(stderr, "%s\n", kvmfault_last_error());
 *         return 1;
 *     }
 *
 *     // Called on the vCPU's thread for each page that the guest touches and that is absent.
 *     static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
 *     {
 *         char page[4096] = { 0 };
 *         (void)opaque;
 *         if (fault->gpa == 0)
 *             memcpy(page, "\xa0\x00\x10\xe6\x10\xf4", 6); // mov al,[0x1000]; out 0x10,al; hlt
 *         else
 *             page[0] = 42;
 *         int ret = kvmfault_pages_install(vm, fault->gpa, page, fault->len);
 *         return ret < 0 ? ret : KVMFAULT_RESOLVED;
 *     }
 *
 *     int main(void)
 *     {
 *         struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
 *         struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
 *         struct kvmfault_vcpu_options vcpu_options = KVMFAULT_VCPU_OPTIONS_INIT;
 *         struct kvmfault_vm *vm;
 *         struct kvmfault_vcpu *vcpu;
 *
 *         options.kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
 *         options.vm_fd = ioctl(options.kvm_fd, KVM_CREATE_VM, 0);
 *         options.resolver = resolve;
 *         if (kvmfault_vm_new(&options, &vm) < 0)
 *             return fail();
 *         slot.len = 2 * 4096;
 *         slot.hva = mmap(NULL, slot.len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
 *                         -1, 0);
 *         if (kvmfault_memslot_set(vm, &slot) < 0)
 *             return fail();
 *
 *         int fd = vcpu_options.fd = ioctl(options.vm_fd, KVM_CREATE_VCPU, 0);
 *         int size = ioctl(options.kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
 *         struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
 *         struct kvm_regs regs = { .rflags = 2 };
 *         struct kvm_sregs sregs;
 *         ioctl(fd, KVM_GET_SREGS, &sregs);
 *         sregs.cs.base = sregs.cs.selector = 0; // real mode, at address 0
 *         ioctl(fd, KVM_SET_SREGS, &sregs);
 *         ioctl(fd, KVM_SET_REGS, &regs);
 *         if (kvmfault_vcpu_new(vm, &vcpu_options, &vcpu) < 0)
 *             return fail();
 *         while (kvmfault_vcpu_run(vcpu) == KVMFAULT_PASS && run->exit_reason == KVM_EXIT_IO)
 *             printf("the guest says %d\n", *((char *)run + run->io.data_offset));
 *
 *         kvmfault_vcpu_free(vcpu);
 *         slot.len = 0;
 *         kvmfault_memslot_set(vm, &slot);
 *         return kvmfault_vm_close(vm, -1) < 0 ? fail() : 0;
 *     }
 *
 * Groups, in the order of this file
 * @INDEX@
 *
 * Results. Functions that return int or int64_t return 0 or a positive documented value, else
 * -errno; kvmfault_last_error() then has a message. On an error nothing has changed, unless the
 * function says otherwise. Besides the errors that a function lists, it can return these common
 * errors:
 *   -EINVAL           a handle, or a pointer that is needed, is NULL; or the size of a structure is
 *                     none that a version of this header has
 *   -E2BIG            a structure has values beyond what this version of the library knows
 *   -EBADF            the handle was freed, or is none of that type
 *   -ECHILD           the handle belongs to the parent of this process (see *fork*)
 *   -EDEADLK          called in a callback, and its *Callbacks* section says "refused"
 *   -ESHUTDOWN        the VM was freed or closed meanwhile; of a vCPU or fill: or before
 *   -ENOTRECOVERABLE  a bug in the library: this call, or an earlier one on the handle, panicked;
 *                     freeing the handle is all that is left
 *
 * Structures begin with their size. Define each with its initialiser, for example `struct
 * kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;`, so that fields that a later version
 * appends have their defaults. Programs compiled against an older header work with a newer library,
 * and those compiled against a newer one work with an older library as long as they neither set nor
 * call what it lacks.
 *
 * Threads. A function that takes its handle as const may be called from any thread at any time,
 * also concurrently. The others belong to one thread at a time: that of the vCPU, or the one that
 * frees.
 *
 * Callbacks are the resolver and the other functions of the VMM's that the library calls. In them,
 * call only functions whose *Callbacks* section says "allowed". No lock of the library is held.
 *
 * Handles are opaque, and freeing NULL does nothing. A call with a handle that was freed returns
 * -EBADF and is not undefined behaviour: its memory is never used for anything else, which costs
 * the process 64 bytes for each handle that it ever makes (a vCPU: 1.2 KiB). A pointer that
 * never was a handle is not always recognised.
 *
 * Fork. A handle works in the process that made it. In a child of fork(2) its functions return
 * -ECHILD (kvmfault_vm_address: NULL) and touch nothing. The functions that free handles forget
 * them there and close the child's copies of descriptors that the library opened; the parent's
 * guest runs on, no finalizer runs, and nothing waits for a lock of the parent's. So exit(3) in a
 * child, with its destructors, is harmless. A child may make handles of its own. A child that
 * shares its parent's memory (vfork(2), CLONE_VM) counts as the same process. A child forked in a
 * callback must not return from it. Absent pages are not resolved in a child: they read as zeros or
 * raise SIGBUS. (docs/process.md)
 *
 * Jails. Descriptors are used as they are given and duplicated where the library keeps them, and no
 * path is opened for what was given: the library works without /proc, under Landlock, in user
 * namespaces and as any user, if the VMM passes open descriptors and says what its memory is
 * (kvmfault_memslot.memory and .fd; docs/process.md). A seccomp filter must allow the system calls
 * of docs/seccomp.md, which names for each what happens if it is refused.
 */
