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
 *   Version: of the library, and of the header that a program was compiled with
 *       kvmfault_version kvmfault_version_number
 *   Errors: the message that goes with a -errno
 *       kvmfault_last_error
 *   Probe: which mechanisms work on this machine, for programs and for people
 *       kvmfault_probe kvmfault_explain
 *   Resolver: the VMM's function that supplies a page, and the other callbacks
 *       kvmfault_resolver kvmfault_finalizer kvmfault_written
 *   VM: attaching the library to a VM of KVM's, and detaching it
 *       kvmfault_vm_new kvmfault_vm_free kvmfault_vm_close kvmfault_vm_mechanism
 *       kvmfault_vm_check_guest kvmfault_vm_address kvmfault_vm_enable
 *   Memslots: guest memory, as KVM_SET_USER_MEMORY_REGION knows it
 *       kvmfault_memslot_set kvmfault_memslot_prepare kvmfault_memslot_set_fast_only
 *       kvmfault_memslot_mechanism
 *   Pages: installing them, taking them away, and asking for their states
 *       kvmfault_pages_install kvmfault_pages_zero kvmfault_pages_map kvmfault_pages_arrived
 *       kvmfault_pages_missing kvmfault_pages_lost kvmfault_pages_discard kvmfault_pages_give_back
 *       kvmfault_pages_withdraw kvmfault_pages_resolve kvmfault_pages_state kvmfault_pages_bitmap
 *       kvmfault_pages_absent
 *   vCPU: running the guest, its signals, kicks, and memory errors
 *       kvmfault_vcpu_new kvmfault_vcpu_free kvmfault_vcpu_run kvmfault_vcpu_handle_exit
 *       kvmfault_vcpu_resume kvmfault_vcpu_on_sigbus kvmfault_vcpu_kick kvmfault_vcpu_resolve
 *       kvmfault_vcpu_memory_error
 *   Background fill: resolving what is absent while the guest runs
 *       kvmfault_fill_callback kvmfault_fill_start kvmfault_fill_wait
 *       kvmfault_fill_wait_working_set kvmfault_fill_status kvmfault_fill_pause
 *       kvmfault_fill_resume kvmfault_fill_stop kvmfault_fill_free
 *   File source: the built-in resolver, for guest memory in a snapshot file
 *       kvmfault_file_source_new kvmfault_file_source_resolve kvmfault_file_source_finalize
 *       kvmfault_file_source_free
 *   Working set: recording which pages a guest needs, to fetch them first the next time
 *       kvmfault_working_set_record kvmfault_working_set_save
 *   Statistics: counters of a VM and of a vCPU
 *       kvmfault_vm_stats kvmfault_vcpu_stats
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

#ifndef KVMFAULT_H
#define KVMFAULT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Handles. Each is described in its group. */
struct kvmfault_file_source;
struct kvmfault_fill;
struct kvmfault_vcpu;
struct kvmfault_vm;

/* =================================================================================================
 * Version: of the library, and of the header that a program was compiled with
 * ============================================================================================== */

/* Major version: incremented when programs have to change. */
#define KVMFAULT_VERSION_MAJOR 0

/* Minor version: incremented when something is added. */
#define KVMFAULT_VERSION_MINOR 2

/* Patch version: incremented when bugs are fixed. */
#define KVMFAULT_VERSION_PATCH 0

/* The version that a program is compiled with, as a number: see `kvmfault_version_number`. */
#define KVMFAULT_VERSION_NUMBER \
  (((KVMFAULT_VERSION_MAJOR * 1000000) + (KVMFAULT_VERSION_MINOR * 1000)) + KVMFAULT_VERSION_PATCH)

/*
 * The version of the library in use, as a string: "0.2.0".
 *
 * Returns: a static string, never NULL.
 * Threads: any.
 * Callbacks: allowed.
 */
const char *kvmfault_version(void);

/*
 * The version of the library in use, as a number. Compare it with KVMFAULT_VERSION_NUMBER, the
 * version that the program was compiled with.
 *
 * Returns: major * 1000000 + minor * 1000 + patch.
 * Threads: any.
 * Callbacks: allowed.
 */
uint32_t kvmfault_version_number(void);

/* =================================================================================================
 * Errors: the message that goes with a -errno
 * ============================================================================================== */

/*
 * The message of the last call that failed in this thread. It names, in English, the argument or
 * the system call at fault and, where possible, what to do about it. The text is for people and
 * may change in any version: programs go by the -errno. The functions for signal handlers
 * (`kvmfault_vcpu_kick`, `kvmfault_vcpu_on_sigbus`) leave no message.
 *
 * Returns: a string, never NULL; "" if no call has failed in this thread.
 * Threads: any.
 * Callbacks: allowed.
 * Lifetime: the string is valid until the next call that fails in this thread, or the thread's
 *   end.
 */
const char *kvmfault_last_error(void);

/* =================================================================================================
 * Probe: which mechanisms work on this machine, for programs and for people
 *
 * A mechanism is the way in which a vCPU's fault reaches the library. docs/choosing-a-mechanism.md
 * compares them. A positive KVM_CHECK_EXTENSION proves nothing here, because numbers of the
 * memslot flag's capabilities collide with those of mainline Linux: the library tries each one in
 * a scratch VM.
 * ============================================================================================== */

/*
 * For `kvmfault_vm_options.mechanism` only: for each memslot, the first of the following
 * mechanisms that works for it, in the order of their numbers.
 */
#define KVMFAULT_MECHANISM_AUTO 0

/*
 * A memslot flag makes KVM_RUN exit with the faulting address. Needs a kernel that carries one of
 * the revisions of that flag; mainline Linux, up to 7.3, has none (docs/kernel.md).
 */
#define KVMFAULT_MECHANISM_MEMSLOT_FLAG 1

/*
 * UFFDIO_POISON markers (Documentation/admin-guide/mm/userfaultfd.rst) in a mapping for KVM alone:
 * at a marked page KVM sends SIGBUS with BUS_MCEERR_AR to the vCPU's thread
 * (kvm_send_hwpoison_signal), as for broken memory. Any Linux from 6.6.
 */
#define KVMFAULT_MECHANISM_POISON_TRAP 2

/*
 * Classic userfaultfd (userfaultfd(2)): reader threads of the library serve the faults, while the
 * vCPU sleeps in the kernel. Any Linux from 4.11.
 */
#define KVMFAULT_MECHANISM_USERFAULTFD 3

/* Size in bytes of `kvmfault_probe.abi`, the terminating 0 included. */
#define KVMFAULT_PROBE_ABI_LEN 32

/* What works on this machine. Start from KVMFAULT_PROBE_INIT. */
struct kvmfault_probe {
  /* Set by KVMFAULT_PROBE_INIT. */
  size_t size;
  /*
   * Private anonymous memory: bit (1 << KVMFAULT_MECHANISM_x) is set if mechanism x works for it
   * (of `poison-trap`: with KVMFAULT_MEMSLOT_VCPU_ONLY).
   */
  uint32_t mechanisms_anon;
  /* Shared memory (memfd, tmpfs): the same bits. */
  uint32_t mechanisms_shared;
  /* Shared hugetlb memory: the same bits. */
  uint32_t mechanisms_hugetlb;
  /* Always 0. */
  uint32_t reserved;
  /* UFFD_FEATURE_* bits that a userfaultfd of this process has; 0 if it can't open one. */
  uint64_t uffd_features;
  /*
   * Revision of the memslot flag that was proven in a scratch VM ("v2", "v7" and so on); "" if
   * none was.
   */
  char abi[KVMFAULT_PROBE_ABI_LEN];
  /* 1 if KVM has KVM_PRE_FAULT_MEMORY, else 0. */
  uint32_t pre_fault_memory;
  /*
   * 1 if KVM maps guest memory by two-dimensional paging (EPT, NPT; always on arm64). 0 if KVM
   * shadows the guest's page tables, or if /sys/module/kvm_intel or kvm_amd can't be read: KVM
   * then reads these tables itself, and with `poison-trap` they must be present before the guest
   * uses them.
   */
  uint32_t two_dimensional_paging;
};

#ifdef __cplusplus
static inline struct kvmfault_probe kvmfault_probe_initial_(void)
{
	struct kvmfault_probe s = {};
	s.size = sizeof(s);
	return s;
}
#define KVMFAULT_PROBE_INIT kvmfault_probe_initial_()
#else
#define KVMFAULT_PROBE_INIT { .size = sizeof(struct kvmfault_probe) }
#endif

/*
 * Finds out which mechanisms work here, by trying them in scratch VMs. Takes some milliseconds.
 * `kvm_fd` is an open /dev/kvm, or -1 to open it.
 *
 * Returns: 0. A mechanism that doesn't work is no error: its bit is not set, and
 *   `kvmfault_explain` says why.
 * Errors:
 *   -EINVAL: `kvm_fd` is not /dev/kvm; `probe` is NULL, or its size is wrong.
 *   -EBADF: `kvm_fd` is closed.
 *   The errno of opening /dev/kvm (`kvm_fd` is -1).
 * Threads: any.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_probe(int kvm_fd, struct kvmfault_probe *probe);

/*
 * Writes for people what `kvmfault_probe` found out: every way to KVM and to userfaultfd that was
 * tried, why it failed, and what to do about it. Like snprintf(3), it writes at most `size` bytes
 * with the terminating 0, and a call with NULL and 0 tells the length.
 *
 * Returns: the length in bytes of the whole text, without the terminating 0.
 * Errors:
 *   -EINVAL: `buf` is NULL and `size` is not 0; `kvm_fd` is not /dev/kvm.
 *   -EBADF: `kvm_fd` is closed.
 *   The errno of opening /dev/kvm (`kvm_fd` is -1).
 * Threads: any.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_explain(int kvm_fd, char *buf, size_t size);

/* =================================================================================================
 * Resolver: the VMM's function that supplies a page, and the other callbacks
 *
 * The library calls the resolver for each page that is needed and absent. A resolver that has the
 * bytes at hand installs them (`kvmfault_pages_install`) and returns KVMFAULT_RESOLVED. One that
 * has to ask for them sends the request and returns KVMFAULT_PENDING; another thread installs the
 * page when it arrives.
 * ============================================================================================== */

/* Returned by a resolver: the page is installed. */
#define KVMFAULT_RESOLVED 0

/*
 * Returned by a resolver: the page is announced. Another thread installs it later, or has
 * installed it already: an install may come before the resolver returns this. Until then, threads
 * that need the page sleep (a vCPU so that a kick wakes it). The announcement is for the page at
 * `gpa` alone: the other pages of the window stay absent, and the resolver is called for each when
 * it is needed. `kvmfault_pages_withdraw` takes announcements back.
 */
#define KVMFAULT_PENDING 1

/*
 * Returned by a resolver: the page's bytes are gone for good. The page becomes KVMFAULT_PAGE_LOST,
 * and the vCPU's loop returns KVMFAULT_MEMORY_ERROR.
 */
#define KVMFAULT_LOST 2

/*
 * Returned by a resolver: not now. The page is absent again, and the access is repeated after a
 * short pause, which grows. After many such answers in a row to one vCPU, its loop returns -ELOOP.
 */
#define KVMFAULT_RETRY 3

/* In `kvmfault_fault.access`: the access was a read. */
#define KVMFAULT_ACCESS_READ (1 << 0)

/* In `kvmfault_fault.access`: the access was a write. */
#define KVMFAULT_ACCESS_WRITE (1 << 1)

/* In `kvmfault_fault.access`: the access was an instruction fetch. */
#define KVMFAULT_ACCESS_EXEC (1 << 2)

/* In `kvmfault_fault.origin`: a vCPU needs the page (`kvmfault_fault.vcpu` says which). */
#define KVMFAULT_ORIGIN_VCPU 0

/* In `kvmfault_fault.origin`: a thread or a system call of this process needs the page. */
#define KVMFAULT_ORIGIN_HOST 1

/* In `kvmfault_fault.origin`: `kvmfault_pages_resolve` or readahead asks for the page. */
#define KVMFAULT_ORIGIN_PREFETCH 2

/* In `kvmfault_fault.origin`: background fill (`kvmfault_fill_start`) asks for the page. */
#define KVMFAULT_ORIGIN_FILL 3

/* A fault, as the resolver sees it. Valid during the call only. */
struct kvmfault_fault {
  /* sizeof(struct kvmfault_fault) as the library knows it; later versions append fields. */
  size_t size;
  /* Guest physical address of the page that is needed; a multiple of `len`. */
  uint64_t gpa;
  /* Size of the page in bytes: 4096, or the huge page size of hugetlb memory. */
  uint64_t len;
  /* Address of the page in the VMM's own mapping. */
  void *hva;
  /* KVM's number of the memslot: id in bits 0-15, address space in bits 16-31. */
  uint32_t slot;
  /* KVMFAULT_ACCESS_* bits; 0 if the kernel doesn't tell (with `poison-trap` it never does). */
  uint32_t access;
  /* KVMFAULT_ORIGIN_*: who needs the page. */
  int origin;
  /*
   * Number of the vCPU as given to KVM_CREATE_VCPU. -1 if the fault is not a vCPU's, or if the
   * number can't be found out: neither /proc/self/fd nor KVM_GET_STATS_FD (Linux 5.14) tells it.
   */
  int vcpu;
  /*
   * Guest physical address of the readahead window: the pages that are likely to be needed next.
   * It holds `gpa`, lies inside the memslot, and none of its pages was present when the call
   * began. The resolver may install all of it, a part of it, or the page alone;
   * `kvmfault_pages_install` skips what has been installed meanwhile. If the resolver fails for
   * a window, it is called again for the page alone. Without readahead this is `gpa`.
   */
  uint64_t window_gpa;
  /* Length of the window in bytes; `len` without readahead. */
  uint64_t window_len;
};

/*
 * Supplies a page: `vm` is the VM's handle, `opaque` is `kvmfault_vm_options.opaque`, and `fault`
 * says which page is needed. No lock of the library is held during the call.
 *
 * Calls for different pages run at the same time. For one page there is one call at a time, and
 * none once the page is present. The resolver must not touch the absent page through the VMM's
 * mapping, and must not wait for a lock whose holder may touch guest memory. It may take as long
 * as it likes, but a kick of the vCPU is seen only when it returns: to wait so that a kick ends
 * it, return KVMFAULT_PENDING.
 *
 * Another thread can make the page absent again while the call runs: by `kvmfault_pages_withdraw`,
 * or by `kvmfault_pages_discard` after the page was installed or marked lost. The call is then
 * overtaken. Its page stays KVMFAULT_PAGE_RESOLVING, without a second call, until it returns; what
 * it returns, an error included, is ignored. The page is then absent (or present, if it was
 * installed since), and the resolver is called again for threads that need it.
 * `kvmfault_pages_give_back` overtakes a call as well, but its page is present at once. A call
 * that never returns keeps its page from being asked for ever again.
 *
 * Returns: KVMFAULT_RESOLVED, _PENDING, _LOST or _RETRY, or -errno. After a -errno the page is
 *   absent again and the vCPU's loop returns that error (-EEXIST counts as KVMFAULT_RESOLVED if
 *   the page is present). A thread of this process that waits for the page can't be told: it goes
 *   on waiting, and the resolver is called again after a pause, which grows to one second.
 *   KVMFAULT_RESOLVED without an installed page, and any other value, become -EPROTO. If
 *   `kvmfault_pages_lost` has marked the page meanwhile, it is lost, whatever is returned.
 * Threads: that of the vCPU that faulted; a reader thread of the library (accesses by this
 *   process, and all faults of the mechanism `userfaultfd`); the caller of
 *   `kvmfault_pages_resolve` or `kvmfault_vcpu_resolve`; a thread of a fill.
 * Callbacks: the functions whose *Callbacks* section says "allowed".
 */
typedef int (*kvmfault_resolver)(void *opaque,
                                 struct kvmfault_vm *vm,
                                 const struct kvmfault_fault *fault);

/*
 * Frees what `opaque` points to. Called once, after the last call of the callbacks that were given
 * the same `opaque` has returned, whichever handles still exist; not at all if the call that was
 * given it failed, and not in a child of fork(2).
 *
 * Threads: the one on which the last callback ended: one of the library's, a vCPU's inside
 *   `kvmfault_vcpu_run`, or the one that frees the VM.
 * Callbacks: those that say "allowed"; among them the functions that free handles.
 */
typedef void (*kvmfault_finalizer)(void *opaque);

/*
 * Reports that the library has written guest memory on behalf of a guest instruction that KVM
 * emulates (it has completed a KVM_EXIT_MMIO inside a memslot). KVM's dirty log misses such
 * writes, so a VMM that migrates while pages are absent marks [gpa, gpa + len) dirty here.
 *
 * Threads: the vCPU's.
 * Callbacks: those that say "allowed".
 */
typedef void (*kvmfault_written)(void *opaque, uint64_t gpa, uint64_t len);

/* =================================================================================================
 * VM: attaching the library to a VM of KVM's, and detaching it
 * ============================================================================================== */

/*
 * In `kvmfault_vm_options.flags`: after a vCPU's fault, call KVM_PRE_FAULT_MEMORY (Linux 6.11, x86
 * with EPT or NPT) for the page and for what the resolver installed behind it in the readahead
 * window. One system call then replaces a guest exit a page.
 *
 * Only for a VMM that changes no memslot of the VM, through the library or by itself, while a vCPU
 * with absent pages runs: in kernels up to 7.3 the call may then retry without end
 * (kvm_tdp_map_page), and the change of memslots waits for it.
 */
#define KVMFAULT_VM_PRE_FAULT (1 << 0)

/*
 * In `kvmfault_vm_options.flags`: the VMM has a userfaultfd of its own on its memory and serves
 * all faults there, as QEMU's post-copy does; the library serves vCPUs only, which then don't go
 * through that userfaultfd. The library registers, installs and drops nothing in the VMM's
 * mappings and has no reader threads: the VMM tells it what is there, by `kvmfault_pages_missing`
 * and `kvmfault_pages_arrived`.
 *
 * The resolver requests the page and returns KVMFAULT_PENDING, or calls `kvmfault_pages_arrived`
 * and returns KVMFAULT_RESOLVED. When post-copy is over, call `kvmfault_memslot_set_fast_only(vm,
 * slot, 0)` for each slot; with `poison-trap` all pages must be present by then.
 *
 * Memory that no mechanism can take away from userfaultfd (private memory with `poison-trap`) is
 * refused with -EOPNOTSUPP: leave such slots as they are, and the VMM's userfaultfd goes on
 * serving vCPUs there. `kvmfault_vm_new` fails with -EOPNOTSUPP if that is so of all kinds of
 * memory.
 */
#define KVMFAULT_VM_EXTERNAL_UFFD (1 << 1)

/*
 * In `kvmfault_vm_options.flags`: also resolve areas that the guest registers at run time. A guest
 * writes MSRs (0x4b564d00 to 0x4b564d04, Documentation/virt/kvm/x86/msr.rst) to tell KVM where to
 * write the wall clock, kvmclock, steal time, async page faults and PV EOI. With `poison-trap`
 * such a write by KVM fails quietly on an absent page, and the guest reads old values: for example
 * when a restored guest brings a CPU online, or wakes from suspend, and hasn't touched the page
 * since.
 *
 * With this flag, and if `poison-trap` is in use, the library sets the VM's MSR filter
 * (KVM_X86_SET_MSR_FILTER and KVM_CAP_X86_USER_SPACE_MSR, Linux 5.10) for writes to those MSRs;
 * `kvmfault_vcpu_run` and `kvmfault_vcpu_handle_exit` serve the exits (KVM_EXIT_X86_WRMSR): they
 * resolve the page and set the MSR. `kvmfault_vm_free` removes the filter. KVM has one filter a
 * VM, so this is for a VMM without one of its own; a VMM that has one adds those MSRs to it and,
 * at such an exit, calls `kvmfault_vcpu_resolve` for the area and then KVM_SET_MSRS.
 *
 * Setting and removing the filter may wait for a vCPU that sleeps inside KVM for a page which only
 * a userfaultfd of the VMM's own supplies, as a change of memslots does.
 *
 * x86-64 only: on arm64 `kvmfault_vm_new` fails with -EOPNOTSUPP, because guests there have no
 * such MSRs.
 */
#define KVMFAULT_VM_FILTER_MSRS (1 << 2)

/*
 * For `kvmfault_vm_enable`: KVM's memory-fault exits, in whichever way the kernel's ABI enables
 * them.
 */
#define KVMFAULT_CAP_FAULT_EXITS (1 << 0)

/* A VM whose memory the library manages. Opaque. */
struct kvmfault_vm;

/* What `kvmfault_vm_new` needs. Start from KVMFAULT_VM_OPTIONS_INIT. */
struct kvmfault_vm_options {
  /* Set by KVMFAULT_VM_OPTIONS_INIT. */
  size_t size;
  /*
   * An open /dev/kvm. Duplicated, like the other descriptors: the VMM may close its own at any
   * time.
   */
  int kvm_fd;
  /* The VM (KVM_CREATE_VM). The duplicate keeps the VM alive until `kvmfault_vm_free`. */
  int vm_fd;
  /*
   * KVMFAULT_MECHANISM_*. Any but AUTO is forced: where it can't work, `kvmfault_vm_new` or
   * `kvmfault_memslot_set` fails with -EOPNOTSUPP, and `kvmfault_last_error` has the reason.
   */
  int mechanism;
  /*
   * -1: the library opens a userfaultfd. Or an open /dev/userfaultfd (Linux 6.1), also one
   * passed by another process, from which the library makes a userfaultfd. Or a userfaultfd that
   * this process opened, for example before it gave up the privilege: one from another process,
   * or from before a fork, can't work, because it serves the memory of its creator. UFFDIO_API
   * may have been called on it (without events and without UFFD_FEATURE_SIGBUS) or not.
   * O_NONBLOCK is set on it.
   */
  int uffd;
  /*
   * NULL, or the revision of the memslot flag to use ("v2", "v3", "v4", "v7", "userfault-v3")
   * without asking KVM_CHECK_EXTENSION: for a kernel with capability numbers of its own. It is
   * still proven in a scratch VM; -EOPNOTSUPP if the kernel behaves otherwise.
   */
  const char *abi;
  /* Called for each page that is needed and absent. Required. */
  kvmfault_resolver resolver;
  /* First argument of the callbacks. */
  void *opaque;
  /*
   * NULL, or frees `opaque`. Not called if `kvmfault_vm_new` fails: `opaque` is the caller's
   * then.
   */
  kvmfault_finalizer finalizer;
  /* NULL, or reports writes by the library: see `kvmfault_written`. */
  kvmfault_written written;
  /*
   * Threads that read the userfaultfd, 1 to 64. 0 means 1 (2 if `userfaultfd` is forced). With
   * KVMFAULT_VM_EXTERNAL_UFFD there are none, and any value but 0 is -EINVAL.
   */
  uint32_t reader_threads;
  /*
   * Most pages in the window of one resolver call, 1 to 4096. 0 means 1: no readahead. The
   * window adapts to each vCPU: faults in sequence, upwards or downwards, get 4 pages, then 8,
   * and so on up to this limit; faults without a pattern get their page alone. If faults are a
   * constant step apart, the resolver is also called, on the same thread, for the pages expected
   * next (with KVMFAULT_ORIGIN_PREFETCH; for 200 us at most, unless it returns
   * KVMFAULT_PENDING). 64 is a good value for memory and files, more if a call is slow.
   */
  uint32_t readahead;
  /* KVMFAULT_VM_* bits. */
  uint64_t flags;
};

#ifdef __cplusplus
static inline struct kvmfault_vm_options kvmfault_vm_options_initial_(void)
{
	struct kvmfault_vm_options s = {};
	s.size = sizeof(s);
	s.kvm_fd = -1;
	s.vm_fd = -1;
	s.uffd = -1;
	return s;
}
#define KVMFAULT_VM_OPTIONS_INIT kvmfault_vm_options_initial_()
#else
#define KVMFAULT_VM_OPTIONS_INIT \
	{ .size = sizeof(struct kvmfault_vm_options), .kvm_fd = -1, .vm_fd = -1, .uffd = -1 }
#endif

/*
 * Attaches to a VM: finds out what this kernel can do, opens a userfaultfd and starts the reader
 * threads. `kvmfault_memslot_set` or `_prepare` then adds memory, and `kvmfault_vcpu_new` adds
 * vCPUs.
 *
 * A new process needs a new handle: in a child of fork(2) this one is refused (see *fork* at the
 * top of this file). In a jail (chroot, Landlock, a user namespace, no /proc) pass open
 * descriptors in `options`; a seccomp filter must allow the system calls of docs/seccomp.md. If
 * such a filter later refuses read(2) to all reader threads, then while a page is waited for, the
 * calls that run vCPUs return its errno, and `kvmfault_memslot_set` refuses new memory with it; a
 * thread of the VMM that sleeps for a page can't be told.
 *
 * Returns: 0, and *vm is the new handle; on an error *vm is NULL.
 * Errors:
 *   -EINVAL: an argument; the message names it.
 *   -EBADF: a descriptor is closed.
 *   -EPERM, -EACCES: userfaultfd isn't permitted (`kvmfault_explain` says what would permit it),
 *     or a seccomp filter refuses read(2) to the reader threads.
 *   -EOPNOTSUPP: the forced mechanism or revision of the flag can't work here.
 *   -E2BIG: `options` has values that this version doesn't know.
 *   Another errno of a system call, which the message names.
 * Threads: any.
 * Callbacks: refused with -EDEADLK.
 * Lifetime: free it with `kvmfault_vm_close` or `kvmfault_vm_free`. `options` need not outlive the
 *   call.
 */
int kvmfault_vm_new(const struct kvmfault_vm_options *options, struct kvmfault_vm **vm);

/*
 * Detaches from a VM and frees the handle, without waiting for anything (but see
 * KVMFAULT_VM_FILTER_MSRS). NULL is allowed. A handle that was freed before is left alone;
 * `kvmfault_last_error` then says so.
 *
 * `kvmfault_vcpu_run` returns -ESHUTDOWN on every vCPU, threads that wait for a page are woken,
 * and resolver calls that are under way end in their own time. The finalizer runs after the last
 * of them. Calls on the VM that other threads are in return -ESHUTDOWN if they can't be finished,
 * and what they have begun (setting a slot, say) is undone; calls from a callback that is under
 * way return -ESHUTDOWN as well. Calls that begin later return -EBADF.
 *
 * Call it when the guest has stopped, or after deleting the slots. Afterwards absent pages are no
 * longer resolved: they read as zeros, and private ones that `poison-trap` has marked raise SIGBUS
 * until they are unmapped. Slots of KVM's that use the library's mapping lose their memory; the
 * addresses of that mapping stay reserved and inaccessible for the life of the process, so that a
 * guest that still runs gets an error and never sees what is mapped there next. If the slots were
 * deleted before, nothing stays reserved.
 *
 * Threads: any.
 * Callbacks: allowed; from a resolver, the finalizer runs after that resolver has returned.
 * Lifetime: `opaque` must stay until the finalizer has run. The slots' memory must stay mapped
 *   until then too, and until calls of the VMM's own have returned, those of its vCPUs among them:
 *   an install that is under way writes to it. vCPU and fill handles stay valid, and their
 *   functions return -ESHUTDOWN; free them too, before or after. To wait for the end, use
 *   `kvmfault_vm_close`.
 */
void kvmfault_vm_free(struct kvmfault_vm *vm);

/*
 * Detaches from a VM as `kvmfault_vm_free` does, waits until that is over, and then frees the
 * handle. Over means: no callback of the VM is under way and none will come, the finalizer has
 * run, and no thread of the library uses the slots' memory. Waits `timeout_ms` milliseconds at
 * most; a negative value means without limit.
 *
 * It waits for resolver calls that are under way and for nothing else, so the caller must not hold
 * a lock that the resolver takes. It doesn't wait for announced pages (KVMFAULT_PENDING).
 *
 * Returns: 0, and `vm` is freed.
 * Errors:
 *   -ETIMEDOUT: the VM is shut down, but a callback has not returned. The handle still exists; its
 *     functions return -ESHUTDOWN, except that slots can be deleted and statistics read. Call this
 *     again, or `kvmfault_vm_free`.
 *   -EDEADLK: called in a callback; nothing has changed.
 * Threads: any.
 * Callbacks: refused with -EDEADLK.
 * Lifetime: after 0 `opaque` may be freed, and the slots' memory may be unmapped once the VMM's
 *   own calls have returned (`kvmfault_vcpu_run` returns -ESHUTDOWN).
 */
int kvmfault_vm_close(struct kvmfault_vm *vm, int64_t timeout_ms);

/*
 * The mechanism in use. With KVMFAULT_MECHANISM_AUTO it is the one that shared memory gets;
 * `kvmfault_memslot_mechanism` tells that of one slot.
 *
 * Returns: KVMFAULT_MECHANISM_*, never AUTO.
 * Errors: common errors only.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_vm_mechanism(const struct kvmfault_vm *vm);

/*
 * Checks by the CPUID of a vCPU whether the mechanism that `kvmfault_vm_mechanism` tells can serve
 * its guest. For a VMM that has another way to serve it: nothing else in the library asks. With
 * `poison-trap` KVM must not access the guest's memory by itself, which fails quietly on an absent
 * page. KVM does so if it has no EPT or NPT, and for guests with nested virtualization or with
 * Hyper-V or Xen enlightenments. (kvmclock, steal time, PV EOI and async page faults are no
 * obstacle: see `kvmfault_vcpu_run`.)
 *
 * On arm64 this refuses a vCPU with KVM_ARM_VCPU_HAS_EL2. It can't see an interrupt controller:
 * with an ITS in KVM the VMM itself resolves (`kvmfault_pages_resolve`) the tables of the ITS and
 * the property and pending tables of LPIs before it restores or saves them
 * (KVM_DEV_ARM_ITS_RESTORE_TABLES and the others fail with EFAULT on an absent page) and before
 * the guest runs. So it does for pages whose tags it copies (KVM_ARM_MTE_COPY_TAGS).
 *
 * `vcpu_fd` is a vCPU on which KVM_SET_CPUID2 (arm64: KVM_ARM_VCPU_INIT) was called. The ioctl
 * that asks it waits while that vCPU is inside KVM_RUN: call this before it runs.
 *
 * Returns: 0: it can.
 * Errors:
 *   -EOPNOTSUPP: it can't; `kvmfault_last_error` says why.
 *   -ENOEXEC: arm64: KVM_ARM_VCPU_INIT was not called.
 *   -EINVAL: `vcpu_fd` is not a vCPU.
 *   -EBADF: `vcpu_fd` is closed.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_vm_check_guest(const struct kvmfault_vm *vm, int vcpu_fd);

/*
 * Translates an address of this process that the kernel reported (si_addr of a SIGBUS for broken
 * hardware, say) into the VMM's own mapping. KVM may know the memory by a mapping of the
 * library's, which the VMM has never seen.
 *
 * Returns: the address in the VMM's mapping. NULL if `address` is in no slot's memory, and for a
 *   handle that is NULL, freed or the parent process's.
 * Threads: any.
 * Callbacks: allowed.
 */
void *kvmfault_vm_address(const struct kvmfault_vm *vm, const void *address);

/*
 * Enables what KVM's ABI wants enabled before its fault exits work. Optional: setting a slot does
 * it as well. Best called before the first vCPU runs, because KVM's maintainers ask for fault
 * information from the start. Does nothing for mechanisms that need nothing. `caps` is a set of
 * KVMFAULT_CAP_* bits, or 0 for all.
 *
 * Returns: 0.
 * Errors:
 *   -EINVAL: `caps` has unknown bits.
 *   The errno of KVM_ENABLE_CAP.
 * Threads: any.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_vm_enable(const struct kvmfault_vm *vm, uint64_t caps);

/* =================================================================================================
 * Memslots: guest memory, as KVM_SET_USER_MEMORY_REGION knows it
 * ============================================================================================== */

/* In `kvmfault_memslot.memory`: whatever /proc/self/maps says that the memory is. */
#define KVMFAULT_MEMORY_AUTO 0

/*
 * In `kvmfault_memslot.memory`: private anonymous memory (MAP_PRIVATE | MAP_ANONYMOUS), of 4 KiB
 * pages or transparent huge pages.
 */
#define KVMFAULT_MEMORY_ANON 1

/*
 * In `kvmfault_memslot.memory`: shared memory (memfd, a file in tmpfs, MAP_SHARED |
 * MAP_ANONYMOUS).
 */
#define KVMFAULT_MEMORY_SHARED 2

/* In `kvmfault_memslot.memory`: hugetlb memory, private or shared. */
#define KVMFAULT_MEMORY_HUGETLB 3

/*
 * In `kvmfault_memslot.flags`: only vCPUs touch absent pages of this memory: no thread of the VMM,
 * no system call, no device, no vhost. This lets `poison-trap` work on private anonymous memory.
 * An access by this process to an absent page raises SIGBUS (a thread) or is EFAULT (a system
 * call) and doesn't wait.
 */
#define KVMFAULT_MEMSLOT_VCPU_ONLY (1 << 0)

/*
 * In `kvmfault_memslot.flags`: all pages are present at the start, as at the destination of a
 * post-copy after its pre-copy phase; `kvmfault_pages_discard` then makes absent those that are to
 * be fetched. A page that is present and has no memory (a hole of the file, private memory that
 * was never touched, a page that was given back) reads as zeros, for the guest, this process and
 * KVM.
 */
#define KVMFAULT_MEMSLOT_PRESENT (1 << 1)

/*
 * In `kvmfault_memslot.flags`, for deleting (`len` 0): keep the page states of the memory and stay
 * registered with userfaultfd, for a VMM that deletes a slot to create it anew in another shape.
 * Ends with `kvmfault_vm_free`, or with deleting a slot of the same memory without this flag.
 * While no slot shows the memory, threads and system calls of this process that touch absent pages
 * wait, and the resolver isn't called for them.
 */
#define KVMFAULT_MEMSLOT_KEEP (1 << 2)

/*
 * In `kvmfault_memslot.flags`: start with the fast path off, as after
 * `kvmfault_memslot_set_fast_only(vm, slot, 0)`.
 */
#define KVMFAULT_MEMSLOT_SLOW (1 << 3)

/*
 * A memslot: what KVM_SET_USER_MEMORY_REGION takes, and what the library has to know about the
 * memory. Start from KVMFAULT_MEMSLOT_INIT.
 */
struct kvmfault_memslot {
  /* Set by KVMFAULT_MEMSLOT_INIT. */
  size_t size;
  /* KVM's number of the memslot: id in bits 0-15, address space in bits 16-31. */
  uint32_t slot;
  /*
   * KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY or 0; the fast-only flag is set by the library.
   * (With `poison-trap` the kernel doesn't tell where in a read-only slot a fault is: the first
   * fault resolves all absent pages in it.)
   */
  uint32_t kvm_flags;
  /* Guest physical address of the first byte; a multiple of the memory's page size. */
  uint64_t gpa;
  /* Length in bytes, a multiple of the memory's page size. 0 deletes the slot. */
  uint64_t len;
  /*
   * Address of the memory in this process: mapped, readable and writable, of one kind
   * throughout, in one mapping or in several that adjoin. It must stay mapped, and must not be
   * mapped over, until the slot is deleted.
   *
   * Loads, stores and system calls that use addresses of this mapping resolve absent pages. No
   * other access does: another process that maps the memory (a vhost-user backend), a second
   * mapping in this process, and I/O on `fd` read zeros in absent pages, and what they write is
   * lost when the page is installed. Call `kvmfault_pages_resolve` for the range before such an
   * access.
   */
  void *hva;
  /*
   * NULL, or the start of the larger block of memory (QEMU's RAMBlock) of which the slot shows a
   * part. Page states belong to the block: slots that overlap in this process's memory must name
   * the same block. NULL means that `hva` and `len` are the block.
   */
  void *block_hva;
  /* Length of that block in bytes; 0 if `block_hva` is NULL. */
  uint64_t block_len;
  /*
   * KVMFAULT_MEMORY_*. The library compares it with /proc/self/maps. If that can't be read (a
   * chroot without /proc, Landlock), this value is believed as far as no system call contradicts
   * it, and must not be AUTO for memory in several adjoining mappings; that the memory is
   * readable and writable is then not checked.
   */
  int memory;
  /*
   * The descriptor that the memory is a shared mapping of, or -1. Needed by `poison-trap` for
   * shared hugetlb memory, of which the kernel can't duplicate a mapping (memory of several
   * files is opened anew instead, which needs /proc and CAP_CHECKPOINT_RESTORE or
   * CAP_SYS_ADMIN). Also needed, if /proc/self/maps can't be read, for any hugetlb memory and
   * for shared memory in several adjoining mappings (of this one file); it is believed then.
   * Duplicated where it is used: the VMM may close its own.
   *
   * pread(2), pwrite(2), sendfile(2), splice(2) and copy_file_range(2) on this descriptor don't
   * notice absent pages: they read zeros, and what they write is lost when the page is
   * installed. Call `kvmfault_pages_resolve` for the range first.
   */
  int fd;
  /* Offset in that file, in bytes, at which `block_hva` (or `hva`, without a block) begins. */
  uint64_t fd_offset;
  /* KVMFAULT_MEMSLOT_* bits. */
  uint32_t flags;
  /* Must be 0. */
  uint32_t reserved;
};

#ifdef __cplusplus
static inline struct kvmfault_memslot kvmfault_memslot_initial_(void)
{
	struct kvmfault_memslot s = {};
	s.size = sizeof(s);
	s.fd = -1;
	return s;
}
#define KVMFAULT_MEMSLOT_INIT kvmfault_memslot_initial_()
#else
#define KVMFAULT_MEMSLOT_INIT { .size = sizeof(struct kvmfault_memslot), .fd = -1 }
#endif

/*
 * What a VMM that does its own ioctl passes to KVM (`kvmfault_memslot_prepare`). Start from
 * KVMFAULT_REGION_INIT.
 */
struct kvmfault_region {
  /* Set by KVMFAULT_REGION_INIT. */
  size_t size;
  /* 1: KVM_SET_USER_MEMORY_REGION is enough. 2: KVM_SET_USER_MEMORY_REGION2 is needed. */
  uint32_t ioctl_version;
  /* `slot` of the memslot. */
  uint32_t slot;
  /* Flags for KVM: the memslot's own and the fast-only flag. */
  uint32_t flags;
  /* Always 0. */
  uint32_t reserved;
  /* `gpa` of the memslot. */
  uint64_t guest_phys_addr;
  /* `len` of the memslot; 0 deletes. */
  uint64_t memory_size;
  /*
   * Address for KVM: the memslot's `hva`, or that of the library's private mapping of the same
   * memory. What the VMM does to its own mapping (mprotect(2), write protection by a
   * userfaultfd) doesn't stop vCPUs in that private mapping, also when no page is absent any
   * more. A VMM that needs to stop them deletes the slot and sets it with its own address,
   * without the library.
   */
  uint64_t userspace_addr;
  /*
   * With the KVM Userfault ABI: goes to the field of that name in the ioctl's argument.
   * Otherwise 0.
   */
  uint64_t userfault_bitmap;
};

#ifdef __cplusplus
static inline struct kvmfault_region kvmfault_region_initial_(void)
{
	struct kvmfault_region s = {};
	s.size = sizeof(s);
	return s;
}
#define KVMFAULT_REGION_INIT kvmfault_region_initial_()
#else
#define KVMFAULT_REGION_INIT { .size = sizeof(struct kvmfault_region) }
#endif

/*
 * Creates, moves or deletes (`len` 0) a memslot and tells KVM (KVM_SET_USER_MEMORY_REGION or
 * _REGION2). All of its pages are absent at the start, unless KVMFAULT_MEMSLOT_PRESENT is given or
 * another slot shows the same memory already. If shared memory has content at that time (it was
 * preallocated, or used before), neither the guest nor this process sees it until
 * `kvmfault_pages_map` shows it; `kvmfault_pages_install` replaces it. Deleting a slot wakes the
 * threads that wait for its pages; memory that no other slot shows becomes ordinary memory, in
 * which absent pages read as zeros (see KVMFAULT_MEMSLOT_KEEP). With `block_hva` that is all of
 * the block's memory, when the last slot that shows a part of it is deleted.
 *
 * Threads may touch the memory during the call: they wait for their pages as always, and the
 * resolver may be called for these pages before the call has returned.
 *
 * KVM's ioctl waits (synchronize_srcu in kvm_swap_active_memslots) for each vCPU that is in the
 * middle of a fault inside KVM_RUN, also for one that sleeps there for a page (`userfaultfd`, or a
 * slot whose fast path is off). So that this function and `kvmfault_memslot_set_fast_only` don't
 * wait until the page is supplied, the library makes the vCPUs leave KVM_RUN for a moment once the
 * ioctl has taken 10 ms: it sends their kick signal, which doesn't count as a kick and which the
 * VMM doesn't see (see `kvmfault_vcpu_options.kick_signal`). There are two limits. Before Linux
 * 6.2 (whose KVM lets a signal interrupt a fault), and in any kernel if the vCPU sleeps in a copy
 * that KVM makes for an emulated instruction (all of CPL 0 on a KVM without hardware
 * virtualization), the call waits until the page is installed or lost; during such a copy the
 * vCPU's thread uses a CPU. And a VMM that does the ioctl itself (`kvmfault_memslot_prepare`)
 * waits likewise: it kicks its vCPUs and keeps them out of KVM_RUN until the ioctl has returned,
 * or does the ioctl on a thread that may wait.
 *
 * When a slot has been deleted, or replaced by one on other memory, the library no longer touches
 * that memory: the VMM may unmap it or use it for something else as soon as this call has
 * returned. The call waits for threads that are inside a system call on that memory, in
 * `kvmfault_vcpu_run` or in a call on its pages; later ones do nothing (-ENOENT). Three things
 * remain for the VMM to observe:
 * - A resolver call for one of the pages may still be under way, or just begin. The library
 *   refuses its installs with -ENOENT, but can't prevent what the resolver itself writes at
 *   `fault->hva` or to the memory's file.
 * - An install whose source doesn't answer is waited for one second. It can't reach the memory
 *   unless that is registered with a userfaultfd again. Setting a slot there is -EBUSY until the
 *   install has ended; with a userfaultfd of its own, the VMM waits until the install has
 *   returned.
 * - A vCPU inside KVM_RUN uses the memory until KVM knows that the slot is gone: with
 *   `kvmfault_memslot_prepare`, until the VMM's own ioctl has returned.
 *
 * Private memory of a deleted slot can be set again once it has been dropped (MADV_DONTNEED) and
 * if no thread touches it until this function has returned. A thread that waited for a page of the
 * deleted slot continues after the deleting call has returned, and reads a page of zeros, which is
 * content (-EEXIST): wait for such threads before dropping the memory.
 *
 * Returns: 0. On an error nothing has changed.
 * Errors:
 *   -EINVAL: an argument; the message names it.
 *   -EEXIST: the guest range overlaps another slot; or the memory has content that can't be
 *     hidden: in private memory, in locked memory, and in any memory before Linux 5.14.
 *   -EFAULT, -EACCES: `hva` isn't mapped, or isn't readable and writable.
 *   -EBADF: `fd` is closed.
 *   -EBUSY: the memory is registered with another userfaultfd, or an install that began under an
 *     earlier slot has not ended there.
 *   -ENOENT: the slot to delete is not set.
 *   -EOPNOTSUPP: the forced mechanism can't serve this memory.
 *   -ESHUTDOWN: the VM was freed meanwhile.
 *   The errno of reader threads that can't read (see `kvmfault_vm_new`), or KVM's errno.
 * Threads: any; calls take turns.
 * Callbacks: refused with -EDEADLK.
 * Lifetime: the memory stays mapped until the slot is deleted. `slot` need not outlive the call.
 */
int kvmfault_memslot_set(const struct kvmfault_vm *vm, const struct kvmfault_memslot *slot);

/*
 * Registers a memslot as `kvmfault_memslot_set` does, for a VMM that does the ioctl itself: fills
 * in *region with what to pass to KVM. From then on the library regards the slot as set. If the
 * VMM's ioctl fails, call this with `len` 0 to undo. To delete a slot, also before it is set anew
 * on other memory: first tell KVM, then call this with `len` 0.
 *
 * Returns: 0. On an error nothing has changed.
 * Errors:
 *   Those of `kvmfault_memslot_set`, KVM's errno for the ioctl excepted.
 * Threads: any; calls take turns.
 * Callbacks: refused with -EDEADLK.
 * Lifetime: as for `kvmfault_memslot_set`.
 */
int kvmfault_memslot_prepare(const struct kvmfault_vm *vm,
                             const struct kvmfault_memslot *slot,
                             struct kvmfault_region *region);

/*
 * Turns the fast path of a slot on (1) or off (0) while vCPUs run, as post-copy does when it
 * begins and ends. While it is off, classic userfaultfd serves absent pages. `slot` is KVM's
 * number (address space in bits 16-31). The mechanism `userfaultfd` has no fast path: this does
 * nothing. vCPUs that sleep for a page don't delay the call, with the limits that
 * `kvmfault_memslot_set` names.
 *
 * With KVMFAULT_VM_EXTERNAL_UFFD, 0 ends a post-copy: when this has returned 0, no thread is in a
 * resolver call for a page of the slot's memory that is present (one may have been under way while
 * the last pages arrived); if all are present, what the resolver uses may be freed. So the caller
 * must not hold a lock that the resolver takes.
 *
 * Returns: 0.
 * Errors:
 *   -ENOENT: `slot` is not set.
 *   -EINVAL: `on` is neither 0 nor 1.
 *   -EBUSY: with KVMFAULT_VM_EXTERNAL_UFFD, a page is missing (`poison-trap`); or a resolver call
 *     has not returned for ten seconds (the fast path is off then; call again).
 *   KVM's errno.
 * Threads: any; calls take turns.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_memslot_set_fast_only(const struct kvmfault_vm *vm, uint32_t slot, int on);

/*
 * The mechanism that serves one slot. `slot` is KVM's number.
 *
 * Returns: KVMFAULT_MECHANISM_*, never AUTO.
 * Errors:
 *   -ENOENT: `slot` is not set.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_memslot_mechanism(const struct kvmfault_vm *vm, uint32_t slot);

/* =================================================================================================
 * Pages: installing them, taking them away, and asking for their states
 *
 * A page is one of the memory's page size: 4096 bytes, or a huge page of hugetlb memory. `gpa` is
 * an address of address space 0; if that has no slot there, it is one of the first other address
 * space that has (on x86: that of system management mode). With KVMFAULT_VM_EXTERNAL_UFFD the VMM
 * installs and drops pages itself and calls `kvmfault_pages_arrived` and `kvmfault_pages_missing`.
 *
 * Take pages away with these functions only. After madvise(2), fallocate(2) or mremap(2) on a
 * slot's memory, the library's page states are wrong.
 * ============================================================================================== */

/* Page state: not installed, or discarded. The next access calls the resolver. */
#define KVMFAULT_PAGE_ABSENT 0

/*
 * Page state: a resolver call for it is under way, or it is announced (KVMFAULT_PENDING). Other
 * threads that need it wait.
 */
#define KVMFAULT_PAGE_RESOLVING 1

/* Page state: its bytes are in place and visible. */
#define KVMFAULT_PAGE_PRESENT 2

/* Page state: its bytes are gone for good. An access is a memory error. */
#define KVMFAULT_PAGE_LOST 3

/* For `kvmfault_pages_bitmap`: pages that are KVMFAULT_PAGE_ABSENT. */
#define KVMFAULT_STATE_ABSENT (1 << 0)

/* For `kvmfault_pages_bitmap`: pages that are KVMFAULT_PAGE_RESOLVING. */
#define KVMFAULT_STATE_RESOLVING (1 << 1)

/* For `kvmfault_pages_bitmap`: pages that are KVMFAULT_PAGE_PRESENT. */
#define KVMFAULT_STATE_PRESENT (1 << 2)

/* For `kvmfault_pages_bitmap`: pages that are KVMFAULT_PAGE_LOST. */
#define KVMFAULT_STATE_LOST (1 << 3)

/*
 * Installs pages by copying `len` bytes from `src`; the guest, this process and waiting threads
 * see them at once. Pages that are present already are skipped and keep their bytes, so ranges
 * that several threads install may overlap. Content that shared memory has in the place of an
 * absent page is replaced. `gpa` and `len` are multiples of the memory's page size, inside one
 * slot.
 *
 * Pages are installed in ascending order. The first LOST page ends the call with -EHWPOISON: the
 * pages before it are installed, those after it are not. To install over it, discard it first.
 *
 * Returns: 0: this call has installed at least one page, and the whole range is present. After an
 *   error the pages that were installed before it stay installed.
 * Errors:
 *   -EEXIST: all pages were present already; nothing has changed.
 *   -ENOENT: `gpa` is in no slot, or the slot was deleted meanwhile.
 *   -EINVAL: `gpa` or `len` is no multiple of the page size, `len` is 0, the range goes beyond the
 *     slot's end, or `src` is NULL.
 *   -EFAULT: `src` can't be read, or is guest memory that isn't present itself (a page that is
 *     being resolved is waited for, ten seconds at most).
 *   -EHWPOISON: a page of the range is lost.
 *   -ENOMEM, -ENOSPC: no memory, or the huge page pool is empty.
 *   -EAGAIN: the address space has been changing for ten seconds.
 *   -ESHUTDOWN: the VM was freed meanwhile.
 * Threads: any.
 * Callbacks: allowed.
 * Lifetime: `src` need not outlive the call.
 */
int kvmfault_pages_install(const struct kvmfault_vm *vm,
                           uint64_t gpa,
                           const void *src,
                           uint64_t len);

/*
 * Installs pages of zeros. For the rest it is `kvmfault_pages_install` without a source.
 *
 * Returns: as `kvmfault_pages_install`.
 * Errors:
 *   Those of `kvmfault_pages_install`, except those of `src`.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_pages_zero(const struct kvmfault_vm *vm, uint64_t gpa, uint64_t len);

/*
 * Installs pages of shared memory whose bytes are in the page cache already, because they were
 * written through another mapping or by another process. Until this call neither the guest nor
 * this process sees them. For the rest it is `kvmfault_pages_install` without a source. Needs
 * Linux 5.14 (5.13 for hugetlb memory): UFFDIO_CONTINUE.
 *
 * Returns: as `kvmfault_pages_install`.
 * Errors:
 *   -EINVAL: the memory is private; else as `kvmfault_pages_install`.
 *   -ENOENT: a page is not in the page cache, or `gpa` is in no slot.
 *   The others of `kvmfault_pages_install`, except those of `src`.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_pages_map(const struct kvmfault_vm *vm, uint64_t gpa, uint64_t len);

/*
 * With KVMFAULT_VM_EXTERNAL_UFFD: the VMM's mapping has these pages now (its UFFDIO_COPY,
 * _ZEROPAGE or _CONTINUE has returned). vCPUs see them, and those that wait for them continue.
 * Call it once for each page that was missing. Pages that are present already stay as they are, so
 * a range may hold such pages. A page without memory reads as zeros, and takes memory only when a
 * vCPU touches it: for a balloon, drop the pages (madvise(2), fallocate(2)) and then call this for
 * them. `hva` is an address of the VMM's; `hva` and `len` are multiples of the memory's page size.
 *
 * Returns: 0: the whole range is present.
 * Errors:
 *   -ENOENT: `hva` is in no slot's memory. No error for a VMM that calls this for all of its
 *     memory.
 *   -EINVAL: `hva` or `len` is misaligned, `len` is 0, or the range goes beyond the memory that
 *     was registered.
 *   -EHWPOISON: a page is lost.
 *   -EOPNOTSUPP: the VM has no KVMFAULT_VM_EXTERNAL_UFFD.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_pages_arrived(const struct kvmfault_vm *vm, const void *hva, uint64_t len);

/*
 * With KVMFAULT_VM_EXTERNAL_UFFD: the VMM's mapping doesn't have these pages, or no longer has
 * them; a vCPU that needs one calls the resolver. Before this call the VMM has registered them
 * with its userfaultfd and dropped their bytes, if there were any; the library drops nothing.
 * Pages that are missing already, or that are being resolved, stay so. If a page arrives at the
 * same time, the resolver may be called for a page that is there: it then calls
 * `kvmfault_pages_arrived` and returns KVMFAULT_RESOLVED. `hva` and `len` as for
 * `kvmfault_pages_arrived`.
 *
 * Returns: 0.
 * Errors:
 *   -EBUSY: the fast path of a slot on this memory is off; or vCPUs use the pages, which are then
 *     not missing.
 *   -ENOENT, -EINVAL, -EOPNOTSUPP: as for `kvmfault_pages_arrived`.
 * Threads: any.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_pages_missing(const struct kvmfault_vm *vm, const void *hva, uint64_t len);

/*
 * Marks absent pages lost. vCPUs that touch them or wait for them get KVMFAULT_MEMORY_ERROR;
 * threads of this process get SIGBUS and system calls EFAULT, as for broken hardware (before Linux
 * 6.6: SIGSEGV). `kvmfault_pages_discard` makes them absent again. `gpa` and `len` are multiples
 * of the memory's page size, inside one slot.
 *
 * Returns: 0.
 * Errors:
 *   -EEXIST: all pages are present or lost already.
 *   -ENOENT: `gpa` is in no slot.
 *   -EINVAL: `gpa` or `len` is misaligned, `len` is 0, or the range goes beyond the slot's end.
 *   -EBUSY: for ten seconds an install in the same 512 pages has been reading from a source that
 *     doesn't answer.
 *   Another errno: the memory is no longer mapped. Threads of this process may not learn that
 *     pages are lost. Pages of the range may be lost, and vCPUs and waiting threads are told so.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_pages_lost(const struct kvmfault_vm *vm, uint64_t gpa, uint64_t len);

/*
 * Makes present or lost pages absent: their memory is freed, and the resolver is called for them
 * at the next access, or by a fill. For a post-copy that fetches anew what has changed at the
 * source, and for a lost page that was found. Pages that the guest gave up (a balloon) must not be
 * fetched again: use `kvmfault_pages_give_back` for them. Pages that are being resolved stay so.
 * `gpa` and `len` are multiples of the memory's page size, inside one slot.
 *
 * A page that was installed or marked lost while a resolver call for it is under way is
 * KVMFAULT_PAGE_RESOLVING until that call returns, and then absent; there is no second call for it
 * meanwhile (see `kvmfault_resolver`).
 *
 * Returns: 0. After an error, present pages that could not be dropped are still present, with
 *   their bytes, and other pages of the range may be absent: `kvmfault_pages_bitmap` tells which.
 * Errors:
 *   -ENOENT: `gpa` is in no slot.
 *   -EINVAL: `gpa` or `len` is misaligned, `len` is 0, the range goes beyond the slot's end, or
 *     the memory is locked (mlock(2)).
 *   -EPERM: the memory's file is sealed (F_SEAL_WRITE, F_SEAL_FUTURE_WRITE): the kernel drops
 *     nothing from it. F_SEAL_SHRINK and F_SEAL_GROW don't matter.
 *   -EBUSY: vCPUs use the pages faster than they can be taken away; or, after ten seconds, an
 *     install in the same 512 pages reads from a source that doesn't answer; or, at once, a fill
 *     has ended on this memory (see `kvmfault_fill_start`).
 *   -EOPNOTSUPP: the VM has KVMFAULT_VM_EXTERNAL_UFFD.
 * Threads: any.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_pages_discard(const struct kvmfault_vm *vm, uint64_t gpa, uint64_t len);

/*
 * Gives pages back that the guest has given up (a balloon, free page reporting, virtio-mem): their
 * memory is freed at once, and they read as zeros at the next access. The resolver is never called
 * for them, a fill skips them, and they are not missing to a post-copy: they are
 * KVMFAULT_PAGE_PRESENT, and an install skips them. For pages that are to be fetched again use
 * `kvmfault_pages_discard`.
 *
 * Pages in any state are given back: present, absent and lost ones (which are no longer lost), and
 * those that are being resolved. An announced page (KVMFAULT_PENDING) need not be installed any
 * more. A resolver call that is under way is overtaken: what it installs for these pages and what
 * it returns is ignored. Works also with the fast path off, and on memory that a finished fill has
 * made ordinary.
 *
 * What the guest writes to a page during the call may be lost: the VMM acknowledges a balloon's
 * request after the call. KVM's dirty log doesn't report pages that were given back: a migration
 * learns of them from the balloon. hugetlb memory is given back in whole huge pages, and the next
 * access needs a free one in the pool. `gpa` and `len` are multiples of the memory's page size,
 * inside one slot.
 *
 * Returns: 0. After an error, whose message names a page, pages that could not be dropped are as
 *   before, with their bytes; pages before the failing one are given back, and those behind it may
 *   be.
 * Errors:
 *   -ENOENT: `gpa` is in no slot.
 *   -EINVAL: `gpa` or `len` is misaligned, `len` is 0, the range goes beyond the slot's end, or
 *     the memory is locked (mlock(2)).
 *   -EACCES, -EPERM: the memory can't be written: it is read-only, or its file is sealed.
 *   -EBUSY: an install in the same 512 pages has taken ten seconds.
 *   -EOPNOTSUPP: the VM has KVMFAULT_VM_EXTERNAL_UFFD: it drops the memory itself and then calls
 *     `kvmfault_pages_arrived`.
 * Threads: any.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_pages_give_back(const struct kvmfault_vm *vm, uint64_t gpa, uint64_t len);

/*
 * Takes announcements back: pages for which the resolver returned KVMFAULT_PENDING, and which have
 * not been installed, are absent again. The resolver is called anew for vCPUs and threads that
 * wait for them, and by a fill that is under way. For post-copy recovery, when the connection over
 * which the pages were requested is gone. A page whose resolver call is under way is withdrawn,
 * too: it is absent when that call returns, whatever it returns, KVMFAULT_PENDING included (see
 * `kvmfault_resolver`). A page that is installed before or after this call is present. PRESENT,
 * LOST and ABSENT pages stay as they are. `gpa` and `len` are multiples of the memory's page size,
 * inside one slot.
 *
 * With KVMFAULT_VM_EXTERNAL_UFFD it works for vCPUs that wait; threads that wait in the VMM's own
 * userfaultfd are the VMM's to wake.
 *
 * Returns: the number of pages that were withdrawn, 0 or more.
 * Errors:
 *   -ENOENT: `gpa` is in no slot.
 *   -EINVAL: `gpa` or `len` is misaligned, `len` is 0, or the range goes beyond the slot's end.
 * Threads: any.
 * Callbacks: allowed.
 */
int64_t kvmfault_pages_withdraw(const struct kvmfault_vm *vm, uint64_t gpa, uint64_t len);

/*
 * Resolves pages now: calls the resolver for them on the calling thread, and waits for those that
 * other threads are resolving. For memory that must be present before an access that can't wait or
 * fails quietly: I/O on the memory's descriptor (pread, pwrite, sendfile, splice), a second
 * mapping of it, or another process. With `poison-trap` also for what KVM accesses outside of
 * guest instructions and `kvmfault_vcpu_run` doesn't resolve by itself: guest page tables if
 * `kvmfault_probe.two_dimensional_paging` is 0, and an area whose MSR the VMM sets after the first
 * KVM_RUN (see `kvmfault_vm_check_guest`). `gpa` and `len` are multiples of the memory's page
 * size, inside one slot.
 *
 * Returns: 0: all pages are present.
 * Errors:
 *   The resolver's -errno.
 *   -EHWPOISON: a page is lost.
 *   -EINTR: a signal handler ran while the call waited.
 *   -ELOOP: the resolver has returned KVMFAULT_RETRY many times.
 *   -ENOENT: `gpa` is in no slot, or the slot was deleted meanwhile.
 *   -EINVAL: `gpa` or `len` is misaligned, `len` is 0, or the range goes beyond the slot's end.
 *   -ESHUTDOWN: the VM was freed meanwhile.
 * Threads: any.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_pages_resolve(const struct kvmfault_vm *vm, uint64_t gpa, uint64_t len);

/*
 * The state of the page that holds `gpa`.
 *
 * Returns: KVMFAULT_PAGE_*.
 * Errors:
 *   -ENOENT: `gpa` is in no slot.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_pages_state(const struct kvmfault_vm *vm, uint64_t gpa);

/*
 * The states of a range as a bitmap: one bit a page, set if the page is in one of `states` (at
 * least one KVMFAULT_STATE_* bit). Bit n % 8 of byte n / 8 is page n of the range, as in
 * little-endian 64-bit words and in KVM's dirty log; bits beyond the last page are 0. Writes as
 * many whole 64-bit words as the pages need: `size`, in bytes, is at least 8 * ((len / page size +
 * 63) / 64). `bitmap` needs no alignment. `gpa` and `len` are multiples of the memory's page size,
 * inside one slot.
 *
 * Each page is looked at once, while other threads may change it: a page that was RESOLVING may be
 * present by the time the call returns.
 *
 * Returns: how many bits are set, 0 or more.
 * Errors:
 *   -EINVAL: `gpa` or `len` is misaligned, `len` is 0, the range goes beyond the slot's end,
 *     `states` is 0 or has unknown bits, `bitmap` is NULL, or `size` is too small.
 *   -ENOENT: `gpa` is in no slot.
 *   -EFAULT: `bitmap` can't be written.
 * Threads: any.
 * Callbacks: allowed.
 */
int64_t kvmfault_pages_bitmap(const struct kvmfault_vm *vm,
                              uint64_t gpa,
                              uint64_t len,
                              uint32_t states,
                              void *bitmap,
                              size_t size);

/*
 * Counts the pages of all memory that are absent or being resolved. A page that two slots show
 * counts once. Looks at the state of every page: about 10 ms a TiB.
 *
 * Returns: the number of pages, 0 or more.
 * Errors:
 *   -EOVERFLOW: the number doesn't fit.
 * Threads: any.
 * Callbacks: allowed.
 */
int64_t kvmfault_pages_absent(const struct kvmfault_vm *vm);

/* =================================================================================================
 * vCPU: running the guest, its signals, kicks, and memory errors
 *
 * A VMM either calls `kvmfault_vcpu_run` instead of KVM_RUN, or keeps its own loop: it calls
 * KVM_RUN itself and then `kvmfault_vcpu_handle_exit`, with `kvmfault_vcpu_resume` before each
 * KVM_RUN. All of these belong to the thread that runs the vCPU.
 * ============================================================================================== */

/*
 * In `kvmfault_vcpu_options.sigbus`: SIGBUS and the kick signal are blocked in the vCPU's thread
 * and let through only inside KVM_RUN (KVM_SET_SIGNAL_MASK), where they end the run; the library
 * then fetches them with sigtimedwait(2). No signal handler is needed.
 */
#define KVMFAULT_SIGBUS_BY_MASK 0

/*
 * In `kvmfault_vcpu_options.sigbus`: the VMM has a SIGBUS handler that calls
 * `kvmfault_vcpu_on_sigbus`, and a handler for the kick signal (doing nothing is enough). Neither
 * signal may be blocked in the vCPU's thread.
 *
 * kvm_run->immediate_exit is then shared: the library uses bit 1 (the value 2) for its own kicks,
 * and a VMM that kicks by itself writes 1. The VMM may write 0 at any time before
 * `kvmfault_vcpu_run` or `kvmfault_vcpu_resume`, which set the library's bit again if it is due.
 * Between one of these and KVM_RUN, or in a loop of its own without KVMFAULT_VCPU_RESUMES, it
 * clears bit 0 only.
 */
#define KVMFAULT_SIGBUS_BY_HANDLER 1

/*
 * In `kvmfault_vcpu_options.flags`: the VMM has its own loop and calls `kvmfault_vcpu_resume`
 * before each KVM_RUN.
 */
#define KVMFAULT_VCPU_RESUMES (1 << 0)

/* A vCPU of a VM that the library is attached to. Opaque. */
struct kvmfault_vcpu;

/* What `kvmfault_vcpu_new` needs. Start from KVMFAULT_VCPU_OPTIONS_INIT. */
struct kvmfault_vcpu_options {
  /* Set by KVMFAULT_VCPU_OPTIONS_INIT. */
  size_t size;
  /* The vCPU (KVM_CREATE_VCPU). Duplicated: the VMM may close its own. */
  int fd;
  /* KVMFAULT_SIGBUS_BY_MASK or KVMFAULT_SIGBUS_BY_HANDLER. */
  int sigbus;
  /*
   * The vCPU's struct kvm_run, mapped by the VMM for as long as the handle lives. NULL: the
   * library maps it.
   */
  void *run;
  /*
   * The signal that `kvmfault_vcpu_kick` sends to the vCPU's thread, for the library alone in
   * that thread. 0 means SIGURG (by mask only). By handler it must be given; the library also
   * sends it for purposes of its own, so system calls of the thread may end with EINTR without a
   * kick, unless the handler has SA_RESTART. The handler should not set `immediate_exit`.
   */
  int kick_signal;
  /* KVMFAULT_VCPU_* bits. */
  uint32_t flags;
};

#ifdef __cplusplus
static inline struct kvmfault_vcpu_options kvmfault_vcpu_options_initial_(void)
{
	struct kvmfault_vcpu_options s = {};
	s.size = sizeof(s);
	s.fd = -1;
	return s;
}
#define KVMFAULT_VCPU_OPTIONS_INIT kvmfault_vcpu_options_initial_()
#else
#define KVMFAULT_VCPU_OPTIONS_INIT { .size = sizeof(struct kvmfault_vcpu_options), .fd = -1 }
#endif

/* Returned by `kvmfault_vcpu_handle_exit`: the library has served the exit; call KVM_RUN again. */
#define KVMFAULT_HANDLED 0

/*
 * Returned by the functions that run a vCPU: the exit is the VMM's. Look at kvm_run, or at
 * KVM_RUN's errno, as without the library.
 */
#define KVMFAULT_PASS 1

/*
 * Returned by the functions that run a vCPU: a kick or a signal ended the run; kvm_run holds no
 * exit.
 */
#define KVMFAULT_INTERRUPTED 2

/*
 * Returned by the functions that run a vCPU: the guest touched memory that is lost (KVMFAULT_LOST)
 * or broken (hardware); `kvmfault_vcpu_memory_error` tells where.
 */
#define KVMFAULT_MEMORY_ERROR 3

/*
 * The memory error that ended a run with KVMFAULT_MEMORY_ERROR. Start from
 * KVMFAULT_MEMORY_ERROR_INFO_INIT.
 */
struct kvmfault_memory_error_info {
  /* Set by KVMFAULT_MEMORY_ERROR_INFO_INIT. */
  size_t size;
  /*
   * Guest physical address. UINT64_MAX if the address is in no memslot of the library, or is not
   * known (before Linux 6.6, if more than one page is lost).
   */
  uint64_t gpa;
  /* Address in this process. */
  void *hva;
  /* Length in bytes of what is concerned: the page. */
  uint64_t len;
  /*
   * 1: the VMM has marked the page lost. 0: the kernel reported a broken page (hwpoison) that
   * was present.
   */
  int lost;
  /* Always 0. */
  uint32_t reserved;
};

#ifdef __cplusplus
static inline struct kvmfault_memory_error_info kvmfault_memory_error_info_initial_(void)
{
	struct kvmfault_memory_error_info s = {};
	s.size = sizeof(s);
	return s;
}
#define KVMFAULT_MEMORY_ERROR_INFO_INIT kvmfault_memory_error_info_initial_()
#else
#define KVMFAULT_MEMORY_ERROR_INFO_INIT { .size = sizeof(struct kvmfault_memory_error_info) }
#endif

/*
 * Attaches to a vCPU. Call it on the thread that runs the vCPU, after its registers and CPUID are
 * set. With KVMFAULT_SIGBUS_BY_MASK it blocks SIGBUS and the kick signal in that thread until
 * `kvmfault_vcpu_free` is called there, and sets the vCPU's KVM_SET_SIGNAL_MASK to the rest of the
 * thread's mask; KVM_SET_SIGNAL_MASK waits while the vCPU is inside KVM_RUN on another thread. A
 * vCPU may move to another thread: the first `kvmfault_vcpu_run` there sets that one up. The
 * thread that it leaves keeps the signals blocked, unless the vCPU is freed there. Nothing of the
 * VM or of its other vCPUs changes.
 *
 * `options->fd` must be a vCPU of the VM of `vm`. KVM can't be asked, so this is not checked. A
 * vCPU of another VM does no harm, but its guest finds `vm`'s memory where `vm` has a memslot and
 * its own VM has none; its other exits are passed to the VMM.
 *
 * Returns: 0, and *vcpu is the new handle; on an error *vcpu is NULL, and signals and masks are as
 *   before.
 * Errors:
 *   -EINVAL: an argument; the message names it.
 *   -EBADF: `fd` is closed.
 *   -EEXIST: the vCPU has a handle already.
 *   -E2BIG: `options` has values that this version doesn't know.
 *   The errno of a system call, which the message names: also of tgkill, rt_sigtimedwait and
 *     rt_sigprocmask, which a vCPU's signals need, if a seccomp filter refuses one
 *     (docs/seccomp.md).
 * Threads: the vCPU's.
 * Callbacks: refused with -EDEADLK.
 * Lifetime: free it with `kvmfault_vcpu_free`, before or after the VM. `options->run` stays mapped
 *   until then; `options` need not outlive the call.
 */
int kvmfault_vcpu_new(const struct kvmfault_vm *vm,
                      const struct kvmfault_vcpu_options *options,
                      struct kvmfault_vcpu **vcpu);

/*
 * Detaches from a vCPU and frees the handle. NULL is allowed; a handle that was freed before is
 * left alone. With KVMFAULT_SIGBUS_BY_MASK the vCPU has no KVM_SET_SIGNAL_MASK afterwards. On the
 * vCPU's own thread the signals are unblocked, unless another vCPU of the thread needs them
 * blocked; on any other thread they stay blocked in the vCPU's. Waits for kicks that are under
 * way.
 *
 * Not while `kvmfault_vcpu_run` is under way on another thread: kick it out first. (Otherwise the
 * handle is freed when that call returns.) If the vCPU is to run on without the library, not in
 * the middle of an access that KVM emulates: see `kvmfault_vcpu_run`. A new handle for the vCPU
 * takes over such an access.
 *
 * Threads: any; best the vCPU's.
 * Callbacks: allowed.
 * Lifetime: `kvmfault_vcpu_options.run` may be unmapped afterwards.
 */
void kvmfault_vcpu_free(struct kvmfault_vcpu *vcpu);

/*
 * Runs the guest (KVM_RUN) and serves its faults until there is something for the VMM.
 *
 * With `poison-trap`, what KVM itself accesses for a guest fails quietly on an absent page. So
 * before the first KVM_RUN this resolves the areas of the wall clock, kvmclock, steal time, PV EOI
 * and async page faults, and the one where system management mode saves the registers, as the
 * vCPU's MSRs name them then. Areas that a guest registers later have mostly been written to
 * before; for the others there is KVMFAULT_VM_FILTER_MSRS. It also resolves the guest's page
 * tables for what RSI and RDI point to, then and after each exit to a device: for the memory of a
 * string instruction (INS, OUTS, MOVS) KVM walks them itself, and takes an absent table for a page
 * that the guest hasn't mapped. What the first word of an OUTS needs cannot be known in advance,
 * if the guest hasn't touched it before. The registers must be set before the first call; in PAE
 * mode the first table is then read anew if it was absent (KVM_SET_SREGS reads it and reports
 * nothing). On arm64 none of this is needed but for the area of stolen time
 * (KVM_ARM_VCPU_PVTIME_CTRL), which must be set before the first call, too.
 *
 * INTERRUPTED, MEMORY_ERROR or an error may leave the vCPU in the middle of an access that KVM
 * emulates, or of a filtered write to an MSR. kvm_run->exit_reason is then KVM_EXIT_MMIO or
 * KVM_EXIT_X86_WRMSR until the next call has finished it, and the VMM leaves that exit alone. This
 * state outlives the handle: a new one for the vCPU finishes the access in its first call of this
 * or of `kvmfault_vcpu_resume`. Before the vCPU's state is saved, migrated or reset, or the vCPU
 * runs without the library, do what Documentation/virt/kvm/api.rst says for KVM_EXIT_MMIO: set
 * kvm_run->immediate_exit and call this until the exit reason is neither. If the page will not be
 * supplied, mark it with `kvmfault_pages_lost`.
 *
 * After MEMORY_ERROR the next call repeats the access. If the page was discarded meanwhile
 * (`kvmfault_pages_discard`), the resolver is called anew and the guest gets its bytes. If the
 * page is still lost or broken, an access by native code is reported again, but one that KVM
 * emulates is given up in the second call: the guest reads ones, what it wrote is dropped, and a
 * machine check that the VMM has injected is then delivered.
 *
 * Returns: KVMFAULT_PASS (an exit in kvm_run), KVMFAULT_INTERRUPTED (a kick; a signal that the VMM
 *   handles; or, by mask, a SIGBUS that a process sent) or KVMFAULT_MEMORY_ERROR; never
 *   KVMFAULT_HANDLED. After an error the vCPU can be run again: the guest repeats the access.
 * Errors:
 *   The resolver's -errno.
 *   -EPROTO: the resolver has broken its contract.
 *   -EFAULT: KVM can't access a slot's memory in this process and doesn't say where.
 *   -ELOOP: a page faults again and again without progress; the message names it.
 *   -ESHUTDOWN: the VM was freed.
 *   -EBUSY: another thread is in this vCPU's functions.
 *   The errno of KVM_RUN, or of a system call that the message names, also one of reader threads
 *     (refused by a seccomp filter).
 * Threads: the vCPU's.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_vcpu_run(struct kvmfault_vcpu *vcpu);

/*
 * For a VMM with its own loop: serves what KVM_RUN has returned with. `ret` is 0 or more if
 * KVM_RUN succeeded, else -errno; -1 means that the errno is in errno, so that ioctl's own result
 * can be passed. Call it after each KVM_RUN, before anything that changes errno.
 *
 * After an error and after KVMFAULT_MEMORY_ERROR, a VMM that continues all the same calls
 * `kvmfault_vcpu_resume` until it returns KVMFAULT_HANDLED, and only then KVM_RUN, also without
 * KVMFAULT_VCPU_RESUMES. The guest may be in the middle of an access that KVM emulates: KVM_RUN
 * alone would give it wrong bytes (ones, after a memory error), or lose what it wrote. The same
 * applies to the first KVM_RUN with a handle for a vCPU that was left so.
 *
 * Returns: KVMFAULT_HANDLED (the fault is served: call KVM_RUN again), KVMFAULT_PASS (an exit in
 *   kvm_run, or KVM_RUN's own errno), KVMFAULT_INTERRUPTED or KVMFAULT_MEMORY_ERROR.
 * Errors:
 *   -EBUSY: another thread is in this vCPU's functions. Nothing was looked at: before KVM_RUN,
 *     call this again with the same result, as -errno (errno itself may have changed).
 *   The others of `kvmfault_vcpu_run`, except KVM_RUN's own errno.
 * Threads: the vCPU's.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_vcpu_handle_exit(struct kvmfault_vcpu *vcpu, int ret);

/*
 * For a VMM with its own loop and KVMFAULT_VCPU_RESUMES: call it before each KVM_RUN. It finishes
 * an access of the guest that KVM emulates, or a filtered write to an MSR, that a
 * KVMFAULT_INTERRUPTED left in the middle: KVM_RUN alone would give the guest wrong bytes.
 * (Without the flag such waits are not interrupted.) It also resolves what `kvmfault_vcpu_run`
 * resolves before KVM_RUN; without the flag the VMM does that itself (`kvmfault_vcpu_resolve`).
 *
 * Returns: KVMFAULT_HANDLED: KVM_RUN may be called. Else as `kvmfault_vcpu_handle_exit`.
 * Errors:
 *   Those of `kvmfault_vcpu_handle_exit`. After -EBUSY call it again, before KVM_RUN.
 * Threads: the vCPU's.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_vcpu_resume(struct kvmfault_vcpu *vcpu);

/*
 * With KVMFAULT_SIGBUS_BY_HANDLER: reports a SIGBUS from the VMM's handler to the library. `code`
 * and `address` are si_code and si_addr of the handler's siginfo_t. Async-signal-safe; leaves
 * errno alone.
 *
 * Returns: 1: the next `kvmfault_vcpu_run` or `kvmfault_vcpu_handle_exit` deals with it. 0: the
 *   signal is the VMM's to handle: its code is not BUS_MCEERR_AR; or it repeats one that neither
 *   of these functions has seen yet, because the thread itself touches broken memory and would do
 *   so for ever.
 * Errors:
 *   -EINVAL, -EBADF, -ECHILD: a bad handle, as for every function.
 * Threads: the vCPU's, in a signal handler.
 * Callbacks: allowed.
 */
int kvmfault_vcpu_on_sigbus(const struct kvmfault_vcpu *vcpu, int code, const void *address);

/*
 * Makes `kvmfault_vcpu_run` or `kvmfault_vcpu_handle_exit` of this vCPU return
 * KVMFAULT_INTERRUPTED once, wherever the vCPU is: in the guest, in KVM_RUN, waiting for a page,
 * or about to enter. A kick is never lost; several that come before one is seen count as one.
 * Async-signal-safe; leaves errno alone. May race with `kvmfault_vcpu_free`, which waits for kicks
 * that are under way; with KVMFAULT_SIGBUS_BY_MASK no kick signal is pending afterwards, so the
 * signal needs no handler.
 *
 * Three limits:
 * - A resolver that runs on the vCPU's thread is not interrupted, not even inside a system call
 *   that reads from a source which doesn't answer (by mask the signal is blocked there). A
 *   resolver that must be interruptible reads with a timeout or returns KVMFAULT_PENDING.
 * - With `userfaultfd` a vCPU whose access KVM emulates (CPL 0 on a KVM without hardware
 *   virtualization) sleeps inside KVM's copy until its page is installed.
 * - Before Linux 6.2 a vCPU that sleeps in classic userfaultfd is not interrupted either, and
 *   doesn't learn that its resolver has failed, until its page is installed.
 *
 * Returns: 0.
 * Errors:
 *   The errno of tgkill(2) (-EPERM if a seccomp filter refuses it). The kick is then seen when the
 *     loop next looks for kicks.
 *   -EINVAL, -EBADF, -ECHILD: a bad handle, as for every function.
 * Threads: any, and any signal handler, that of the kick signal included.
 * Callbacks: allowed.
 */
int kvmfault_vcpu_kick(const struct kvmfault_vcpu *vcpu);

/*
 * For a VMM with its own loop: resolves the pages that hold [gpa, gpa + len) on the vCPU's thread,
 * as if the guest had touched them; a kick ends the wait. For what KVM accesses outside of guest
 * instructions, see `kvmfault_pages_resolve`. The range is in address space 0, is rounded outwards
 * to pages, and may span slots.
 *
 * Returns: KVMFAULT_HANDLED: all pages are present. KVMFAULT_INTERRUPTED: call it again.
 *   KVMFAULT_MEMORY_ERROR: a page is lost.
 * Errors:
 *   -ENOENT: a page is in no slot.
 *   -EINVAL: `len` is 0 or too large.
 *   The others of `kvmfault_vcpu_run`, except KVM_RUN's own errno.
 * Threads: the vCPU's.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_vcpu_resolve(struct kvmfault_vcpu *vcpu, uint64_t gpa, uint64_t len);

/*
 * Describes the last KVMFAULT_MEMORY_ERROR that a function of this vCPU returned. Doesn't wait.
 *
 * Returns: 0, and *info is filled in.
 * Errors:
 *   -ENODATA: there was no memory error.
 *   -EINVAL: `info` is NULL, or its size is wrong.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_vcpu_memory_error(const struct kvmfault_vcpu *vcpu,
                               struct kvmfault_memory_error_info *info);

/* =================================================================================================
 * Background fill: resolving what is absent while the guest runs
 * ============================================================================================== */

/*
 * In `kvmfault_fill_options.flags`: memory stays as it is when no page is absent any more, for a
 * VMM that goes on to discard pages and to have them fetched again.
 */
#define KVMFAULT_FILL_KEEP_ARMED (1 << 0)

/* In `kvmfault_fill_options.flags`: don't recover huge pages at the end (MADV_COLLAPSE). */
#define KVMFAULT_FILL_NO_COLLAPSE (1 << 1)

/*
 * In `kvmfault_fill_options.flags`: resolve the working set only, and leave the other pages
 * absent.
 */
#define KVMFAULT_FILL_WORKING_SET_ONLY (1 << 2)

/* A background fill. Opaque. */
struct kvmfault_fill;

/* Progress of a fill. Start from KVMFAULT_FILL_PROGRESS_INIT. */
struct kvmfault_fill_progress {
  /*
   * Set by KVMFAULT_FILL_PROGRESS_INIT; in the callback, sizeof(struct kvmfault_fill_progress)
   * as the library knows it.
   */
  size_t size;
  /*
   * Pages of the fill's range that were absent when it began; of all memory, if it has no range.
   */
  uint64_t pages_total;
  /* Pages of the fill's range that are absent now; of all memory, if it has no range. */
  uint64_t pages_left;
  /* Calls of the resolver that failed. Their pages are tried again. */
  uint64_t failures;
  /*
   * Rate at which pages became present since the last report, whichever thread installed them;
   * in `kvmfault_fill_status`, since the fill began, pauses included.
   */
  uint64_t bytes_per_second;
  /* Milliseconds until no page is absent, at this rate; -1 if not known. */
  int64_t eta_ms;
  /* 1 if the working set is present, or none was given. */
  uint32_t working_set_done;
  /* 1 if the fill is over, in whichever way: `kvmfault_fill_wait` tells. */
  uint32_t ended;
  /* 1 between `kvmfault_fill_pause` and `kvmfault_fill_resume`; 0 if the fill is over. */
  uint32_t paused;
  /*
   * Threads of the fill that are in a call of the resolver, or about to make one. If this is 0
   * and `paused` is 1, no call is under way for the fill, and none begins before
   * `kvmfault_fill_resume`. Pages that the resolver has announced (KVMFAULT_PENDING) may still
   * be outstanding.
   */
  uint32_t threads_calling;
};

#ifdef __cplusplus
static inline struct kvmfault_fill_progress kvmfault_fill_progress_initial_(void)
{
	struct kvmfault_fill_progress s = {};
	s.size = sizeof(s);
	return s;
}
#define KVMFAULT_FILL_PROGRESS_INIT kvmfault_fill_progress_initial_()
#else
#define KVMFAULT_FILL_PROGRESS_INIT { .size = sizeof(struct kvmfault_fill_progress) }
#endif

/*
 * Fill progress callback: called every `interval_ms` and at the end. `progress` is valid during
 * the call.
 *
 * Threads: one of the library's.
 * Callbacks: those that say "allowed".
 */
typedef void (*kvmfault_fill_callback)(void *opaque, const struct kvmfault_fill_progress *progress);

/*
 * What `kvmfault_fill_start` needs; every field is optional. Start from
 * KVMFAULT_FILL_OPTIONS_INIT.
 */
struct kvmfault_fill_options {
  /* Set by KVMFAULT_FILL_OPTIONS_INIT. */
  size_t size;
  /* Threads that call the resolver, 1 to 64; 0 means 1. They run with a nice value of 10. */
  uint32_t threads;
  /* Most pages in the window of one resolver call, 1 to 4096; 0 means 64. */
  uint32_t batch;
  /*
   * Rate limit for all threads together; 0 means none. Pages of the guest's own faults don't
   * count.
   */
  uint64_t bytes_per_second;
  /* NULL, or the progress callback. */
  kvmfault_fill_callback progress;
  /* First argument of the callback. */
  void *opaque;
  /* NULL, or frees `opaque`. */
  kvmfault_finalizer finalizer;
  /* Milliseconds between reports; 0 means 1000. */
  uint32_t interval_ms;
  /* KVMFAULT_FILL_* bits. */
  uint32_t flags;
  /*
   * -1, or a file that `kvmfault_working_set_save` wrote: its pages are resolved first, in the
   * order in which they were needed then. A file that is damaged, of another version, or of a VM
   * with other memory is refused with -EINVAL and the reason; start without it then.
   */
  int working_set_fd;
  /* Must be 0. */
  uint32_t reserved;
  /*
   * With `len`: the guest physical range to fill, [gpa, gpa + len). It may span slots and holes
   * between them; what is in no slot is skipped. Both are multiples of 4096; in hugetlb memory a
   * range begins and ends between two pages. An address at which several address spaces have
   * memory means the first of them, as for `kvmfault_pages_state`. The fill is for the memory
   * that is there when it starts: memory that slots show later isn't added, and a slot that is
   * deleted is left out. Must be 0 if `len` is 0.
   */
  uint64_t gpa;
  /*
   * Length of the range in bytes; 0 means all memory. Nothing outside of the range is resolved:
   * pages of the working set outside of it are left out. Memory that is shown at a second
   * address, too, may be asked for there. At the end of a fill with a range memory stays as with
   * KVMFAULT_FILL_KEEP_ARMED, whatever the range holds: after the last of them, a fill without a
   * range makes the memory ordinary.
   */
  uint64_t len;
};

#ifdef __cplusplus
static inline struct kvmfault_fill_options kvmfault_fill_options_initial_(void)
{
	struct kvmfault_fill_options s = {};
	s.size = sizeof(s);
	s.working_set_fd = -1;
	return s;
}
#define KVMFAULT_FILL_OPTIONS_INIT kvmfault_fill_options_initial_()
#else
#define KVMFAULT_FILL_OPTIONS_INIT \
	{ .size = sizeof(struct kvmfault_fill_options), .working_set_fd = -1 }
#endif

/*
 * Starts to resolve all absent pages, or those of a range (`options.gpa`, `options.len`), in the
 * background while the guest runs: threads of the library call the VM's resolver, with
 * KVMFAULT_ORIGIN_FILL, for windows of up to `options.batch` pages. Pages after the vCPUs' latest
 * faults come first, and a fault of the guest's own takes precedence. A resolver may install the
 * window or a part of it; it is called again for the rest. The fill waits for announced pages
 * (KVMFAULT_PENDING), with up to 64 windows outstanding a thread.
 *
 * When no page is absent any more, the memory becomes ordinary (unless KVMFAULT_FILL_KEEP_ARMED or
 * a range is given): fast-only flags and markers are removed, userfaultfd is unregistered, and
 * huge pages are recovered (MADV_COLLAPSE, Linux 6.1), so that the guest runs as if its memory had
 * never been absent. Then `kvmfault_pages_discard` fails with -EBUSY (`kvmfault_pages_give_back`
 * still works), and a slot that is set anew on that memory is an ordinary one, until
 * `kvmfault_memslot_set_fast_only(.., 1)`. Memory with lost pages stays as it is.
 *
 * Returns: 0, and *fill is the new handle; on an error *fill is NULL, and `finalizer` is not
 *   called.
 * Errors:
 *   -EINVAL: an argument; the message names it.
 *   -ENOENT: no slot holds any of the range.
 *   -EBUSY: a fill of this VM is under way.
 *   -EOPNOTSUPP: the VM has KVMFAULT_VM_EXTERNAL_UFFD.
 *   -EAGAIN: no thread can be started.
 *   -EBADF, -EACCES: `working_set_fd` is closed, or not open for reading.
 * Threads: any.
 * Callbacks: refused with -EDEADLK.
 * Lifetime: free it with `kvmfault_fill_free`, before or after the VM. `options` need not outlive
 *   the call; `opaque` stays until the finalizer has run.
 */
int kvmfault_fill_start(const struct kvmfault_vm *vm,
                        const struct kvmfault_fill_options *options,
                        struct kvmfault_fill **fill);

/*
 * Waits for the end of a fill, `timeout_ms` milliseconds at most; a negative value means without
 * limit.
 *
 * Returns: 0: no page is absent any more, the memory is ordinary, and no resolver call is under
 *   way for it (a thread may have been in one while the last pages arrived): what the resolver
 *   reads from may be closed. With a range, KVMFAULT_FILL_KEEP_ARMED or
 *   KVMFAULT_FILL_WORKING_SET_ONLY: that part has been resolved, no more.
 * Errors:
 *   -ETIMEDOUT: not yet; while it is paused, a fill doesn't end (`kvmfault_fill_pause`).
 *   -ECANCELED: it was stopped.
 *   -ESHUTDOWN: the VM was freed.
 *   The -errno of the resolver that kept the other pages from being installed: they are absent as
 *     before, and another fill may be started.
 * Threads: any, several at once too.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_fill_wait(const struct kvmfault_fill *fill, int64_t timeout_ms);

/*
 * Waits until the working set (`options.working_set_fd`) is present, which is a good time to start
 * the guest. `timeout_ms` is as for `kvmfault_fill_wait`. Pages of it for which the resolver
 * failed are not waited for.
 *
 * Returns: 0: the working set is present.
 * Errors:
 *   Those of `kvmfault_fill_wait`.
 * Threads: any, several at once too.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_fill_wait_working_set(const struct kvmfault_fill *fill, int64_t timeout_ms);

/*
 * Tells the progress of a fill.
 *
 * Returns: 0, and *progress is filled in.
 * Errors:
 *   -EINVAL: `progress` is NULL, or its size is wrong.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_fill_status(const struct kvmfault_fill *fill, struct kvmfault_fill_progress *progress);

/*
 * Pauses a fill, without waiting: a resolver call that is under way ends in its own time, and what
 * it installs is present; no further one begins for the fill until `kvmfault_fill_resume`.
 * `kvmfault_fill_status` tells when the last one has ended (`threads_calling` is 0). The guest's
 * own faults are served as always. The fill's threads sleep.
 *
 * A fill doesn't end by itself while it is paused, not even if other threads install what is
 * absent: `kvmfault_fill_wait` waits on, to its timeout. (If no page was absent before this call,
 * the end may be under way, and memory may become ordinary.) Reports continue, with `paused` set.
 * Stopping and freeing the fill, and freeing or closing the VM, end it as always.
 *
 * Returns: 0, also if the fill is paused already or over.
 * Errors: common errors only.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_fill_pause(const struct kvmfault_fill *fill);

/*
 * Resumes a paused fill where it was. One call is enough, however often `kvmfault_fill_pause` was
 * called. `options.bytes_per_second` counts from now on: the pause earns no higher rate. Pages for
 * which the resolver failed before are tried again before the fill gives up on them.
 *
 * Returns: 0, also if the fill isn't paused or is over.
 * Errors: common errors only.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_fill_resume(const struct kvmfault_fill *fill);

/*
 * Asks a fill to stop, without waiting: a resolver call that is under way ends in its own time.
 * Pages that were not installed are absent as before, and another fill may be started when this
 * one has ended (`kvmfault_fill_wait` tells).
 *
 * Returns: 0.
 * Errors: common errors only.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_fill_stop(const struct kvmfault_fill *fill);

/*
 * Stops a fill if it isn't over, and frees the handle, without waiting. NULL is allowed. Until a
 * resolver call that is under way has ended, another fill is refused (-EBUSY).
 *
 * Threads: any.
 * Callbacks: allowed.
 * Lifetime: `opaque` stays until the finalizer has run, which is when the last call of `progress`
 *   (with `ended` set) has returned: the finalizer doesn't wait for this function.
 */
void kvmfault_fill_free(struct kvmfault_fill *fill);

/* =================================================================================================
 * File source: the built-in resolver, for guest memory in a snapshot file
 * ============================================================================================== */

/* A snapshot file that guest memory is restored from. Opaque. */
struct kvmfault_file_source;

/* Where a range of guest memory lies in the snapshot file. Start from KVMFAULT_FILE_RANGE_INIT. */
struct kvmfault_file_range {
  /* Set by KVMFAULT_FILE_RANGE_INIT. */
  size_t size;
  /* Guest physical address; a multiple of 4096. */
  uint64_t gpa;
  /* Length in bytes; a multiple of 4096. */
  uint64_t len;
  /* Offset in the file in bytes; a multiple of 4096. */
  uint64_t offset;
};

#ifdef __cplusplus
static inline struct kvmfault_file_range kvmfault_file_range_initial_(void)
{
	struct kvmfault_file_range s = {};
	s.size = sizeof(s);
	return s;
}
#define KVMFAULT_FILE_RANGE_INIT kvmfault_file_range_initial_()
#else
#define KVMFAULT_FILE_RANGE_INIT { .size = sizeof(struct kvmfault_file_range) }
#endif

/*
 * Opens a snapshot: `count` ranges of guest memory (1 to 4096, all with the same `size`) in `fd`,
 * a regular file or a block device. Holes of a file are pages of zeros, without any I/O; a block
 * device has no holes. To use the source as the resolver of a VM:
 *
 *     struct kvmfault_file_source *source;
 *     kvmfault_file_source_new(fd, &range, 1, &source);
 *     options.resolver = kvmfault_file_source_resolve;
 *     options.opaque = source;
 *     options.finalizer = kvmfault_file_source_finalize;
 *
 * `fd` is used as it is given: no path is opened, and no permission but its own is needed. If it
 * can't be opened anew (no /proc, no permission), the search for holes moves its file position,
 * which is restored before this returns: no other thread or process may use the position
 * meanwhile.
 *
 * The file is mapped. If mmap(2) fails, whatever the reason (a file system without it, or a limit
 * of the process such as RLIMIT_AS), the source keeps a duplicate of `fd` and reads pages with
 * pread(2) into a buffer of each thread that serves faults: of 1 MiB, or of one page of the
 * guest's memory if that is larger. That costs one more copy, and one more system call for each
 * MiB or piece of the file. What has no bytes at offsets is refused: a pipe, a socket, a
 * directory, a character device.
 *
 * A page whose bytes can't be read stays absent, and its fault ends with an error: -EIO if the
 * file is shorter than it was, or pread's errno.
 *
 * Returns: 0, and *source is the new handle; on an error *source is NULL.
 * Errors:
 *   -EINVAL: an argument, which the message names; or `fd` has no bytes at offsets.
 *   -EBADF: `fd` is closed.
 *   -EACCES: `fd` is not open for reading.
 *   -ENOMEM: no memory.
 * Threads: any.
 * Callbacks: allowed.
 * Lifetime: free it with `kvmfault_file_source_free`, or give `kvmfault_file_source_finalize` to
 *   the VM. `fd` may be closed when this returns; the file must not change while the source lives.
 */
int kvmfault_file_source_new(int fd,
                             const struct kvmfault_file_range *ranges,
                             size_t count,
                             struct kvmfault_file_source **source);

/*
 * The resolver of a snapshot file, for `kvmfault_vm_options.resolver`; `opaque` is the source.
 * Installs the readahead window as far as the file has it. A resolver of the VMM's own may call it
 * for part of its memory.
 *
 * Returns: KVMFAULT_RESOLVED, as a resolver does.
 * Errors:
 *   -EIO: the page's bytes can't be read.
 *   -ENXIO: no range of the source holds the page.
 *   -EINVAL: `fault` is not one page inside its window, or the file doesn't have the page in one
 *     piece.
 *   The errno of pread(2), or of `kvmfault_pages_install`.
 * Threads: any.
 * Callbacks: allowed; it is a resolver.
 */
int kvmfault_file_source_resolve(void *opaque,
                                 struct kvmfault_vm *vm,
                                 const struct kvmfault_fault *fault);

/*
 * Frees a source, as a finalizer for `kvmfault_vm_options.finalizer`; `opaque` is the source. For
 * the rest it is `kvmfault_file_source_free`.
 *
 * Threads: any.
 * Callbacks: allowed; it is a finalizer.
 */
void kvmfault_file_source_finalize(void *opaque);

/*
 * Frees a source that no VM owns. NULL is allowed.
 *
 * Threads: any.
 * Callbacks: allowed.
 * Lifetime: calls of `kvmfault_file_source_resolve` that are under way finish with it; later ones
 *   return -EBADF.
 */
void kvmfault_file_source_free(struct kvmfault_file_source *source);

/* =================================================================================================
 * Working set: recording which pages a guest needs, to fetch them first the next time
 * ============================================================================================== */

/*
 * Starts (1) or ends (0) recording which pages are needed, in order. Starting drops what was
 * recorded before, and so does ending. Readahead pages are recorded; background-fill pages are
 * not. Each thread has room for a million faults; further ones are not recorded. Recording costs a
 * few nanoseconds a fault.
 *
 * Returns: 0.
 * Errors:
 *   -EINVAL: `on` is neither 0 nor 1.
 *   -ENOMEM: no memory.
 * Threads: any.
 * Callbacks: refused with -EDEADLK.
 */
int kvmfault_working_set_record(const struct kvmfault_vm *vm, int on);

/*
 * Writes what was recorded so far to the regular file `fd`, replacing its content, for
 * `kvmfault_fill_options.working_set_fd` of the next restore of the same snapshot. Takes a few
 * bytes a fault. Recording continues.
 *
 * Returns: 0.
 * Errors:
 *   -ENODATA: no recording is under way.
 *   -EBADF: `fd` is closed.
 *   -EINVAL: `fd` is not a regular file.
 *   -EACCES: `fd` is not open for writing.
 *   The errno of writing; the file is then incomplete, and will be refused.
 * Threads: any.
 * Callbacks: refused with -EDEADLK.
 * Lifetime: `fd` may be closed when this returns.
 */
int kvmfault_working_set_save(const struct kvmfault_vm *vm, int fd);

/* =================================================================================================
 * Statistics: counters of a VM and of a vCPU
 * ============================================================================================== */

/* Number of buckets of `kvmfault_stats.latency_us_log2`. */
#define KVMFAULT_LATENCY_BUCKETS 32

/* Counters of a VM or a vCPU since its handle was made. Start from KVMFAULT_STATS_INIT. */
struct kvmfault_stats {
  /* Set by KVMFAULT_STATS_INIT. */
  size_t size;
  /* Faults of vCPUs, by whichever mechanism they arrived. */
  uint64_t faults_vcpu;
  /* Faults of threads and system calls of this process. */
  uint64_t faults_host;
  /* Pages that `kvmfault_pages_resolve` was called for and that were not present. */
  uint64_t faults_prefetch;
  /* Calls of the resolver: for faults, and for pages of strided runs ahead of them. */
  uint64_t resolver_calls;
  /* Faults whose own resolver call installed the page. */
  uint64_t outcome_resolved;
  /*
   * Faults that waited for another thread's resolver call, or for an announced page
   * (KVMFAULT_PENDING).
   */
  uint64_t outcome_waited;
  /* Faults on pages that were present already and only had to be mapped. */
  uint64_t outcome_mapped;
  /* Faults that ended in a memory error. */
  uint64_t outcome_lost;
  /* Faults that ended in an error. */
  uint64_t outcome_failed;
  /* Faults that a kick or a signal interrupted. */
  uint64_t outcome_interrupted;
  /* Faults that ended with the resolver's KVMFAULT_RETRY. */
  uint64_t outcome_retried;
  /* Pages installed by copying. */
  uint64_t pages_copied;
  /* Pages installed as zeros. */
  uint64_t pages_zeroed;
  /* Pages installed from the page cache. */
  uint64_t pages_mapped;
  /* Pages that `kvmfault_pages_discard` made absent. */
  uint64_t pages_discarded;
  /* Installs repeated because the address space was changing (EAGAIN). */
  uint64_t retries_again;
  /* Installs that found the page installed already (EEXIST). */
  uint64_t retries_exist;
  /* Reads completed for KVM's emulator (KVM_EXIT_MMIO inside a memslot). */
  uint64_t mmio_reads;
  /* Writes completed for KVM's emulator (KVM_EXIT_MMIO inside a memslot). */
  uint64_t mmio_writes;
  /* Kicks that `kvmfault_vcpu_run` or `kvmfault_vcpu_handle_exit` has seen. */
  uint64_t kicks;
  /*
   * Faults by service time: bucket 0 is below 1 us, bucket n is from 2^(n-1) us to below 2^n us.
   */
  uint64_t latency_us_log2[KVMFAULT_LATENCY_BUCKETS];
  /* Pages that readahead asked resolvers for, besides those that were needed. */
  uint64_t ahead_asked;
  /*
   * Pages that readahead asked resolvers for, and for which the resolver failed: each is still
   * absent, or was resolved by a fault of its own.
   */
  uint64_t ahead_failed;
  /*
   * Pages that were present and had no memory when they were touched: holes of memory that was
   * set with KVMFAULT_MEMSLOT_PRESENT, pages that were given back (`kvmfault_pages_give_back`),
   * and pages that the VMM took away without telling the library. They read as zeros. Without
   * that flag, a number above `pages_given_back` means that the VMM has lost pages by a
   * madvise(2) or fallocate(2) of its own. (With `memslot-flag`, KVM's own fault may supply such
   * a page, which is then not counted.)
   */
  uint64_t pages_empty;
  /* Pages given back by `kvmfault_pages_give_back`; a page counts each time. */
  uint64_t pages_given_back;
};

#ifdef __cplusplus
static inline struct kvmfault_stats kvmfault_stats_initial_(void)
{
	struct kvmfault_stats s = {};
	s.size = sizeof(s);
	return s;
}
#define KVMFAULT_STATS_INIT kvmfault_stats_initial_()
#else
#define KVMFAULT_STATS_INIT { .size = sizeof(struct kvmfault_stats) }
#endif

/*
 * Reads the counters of a VM: the sum over its vCPUs, its reader threads, and other threads'
 * calls.
 *
 * Returns: 0, and *stats is filled in.
 * Errors:
 *   -EINVAL: `stats` is NULL, or its size is wrong.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_vm_stats(const struct kvmfault_vm *vm, struct kvmfault_stats *stats);

/*
 * Reads the counters of a vCPU.
 *
 * Returns: 0, and *stats is filled in.
 * Errors:
 *   -EINVAL: `stats` is NULL, or its size is wrong.
 * Threads: any.
 * Callbacks: allowed.
 */
int kvmfault_vcpu_stats(const struct kvmfault_vcpu *vcpu, struct kvmfault_stats *stats);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* KVMFAULT_H */
