//! The structures and numbers of the C API. cbindgen copies these comments into `kvmfault.h`: write them for a C developer.

use std::ffi::{c_char, c_int, c_void};

/// What the mechanism is chosen by (`kvmfault_vm_options.mechanism`) and what `kvmfault_vm_mechanism` returns.
/// AUTO takes, for each memslot, the first of the others that works for it, in this order.
pub const KVMFAULT_MECHANISM_AUTO: c_int = 0;
/// A KVM memslot flag makes KVM_RUN exit with the faulting address. Needs a kernel that carries one of the revisions of the flag.
pub const KVMFAULT_MECHANISM_MEMSLOT_FLAG: c_int = 1;
/// UFFDIO_POISON markers make KVM send SIGBUS to the vCPU thread. Any Linux from 6.6.
pub const KVMFAULT_MECHANISM_POISON_TRAP: c_int = 2;
/// Classic userfaultfd: reader threads of the library serve the faults. Any Linux from 4.11.
pub const KVMFAULT_MECHANISM_USERFAULTFD: c_int = 3;

/// The page was never installed (or was discarded): the next access calls the resolver.
pub const KVMFAULT_PAGE_ABSENT: c_int = 0;
/// One caller is bringing the page; others wait for it.
pub const KVMFAULT_PAGE_RESOLVING: c_int = 1;
/// The page's bytes are in place and visible.
pub const KVMFAULT_PAGE_PRESENT: c_int = 2;
/// The page can't be had; whoever touches it gets a memory error.
pub const KVMFAULT_PAGE_LOST: c_int = 3;

/// For `kvmfault_pages_bitmap`: pages in KVMFAULT_PAGE_ABSENT.
pub const KVMFAULT_STATE_ABSENT: u32 = 1 << 0;
/// For `kvmfault_pages_bitmap`: pages in KVMFAULT_PAGE_RESOLVING.
pub const KVMFAULT_STATE_RESOLVING: u32 = 1 << 1;
/// For `kvmfault_pages_bitmap`: pages in KVMFAULT_PAGE_PRESENT.
pub const KVMFAULT_STATE_PRESENT: u32 = 1 << 2;
/// For `kvmfault_pages_bitmap`: pages in KVMFAULT_PAGE_LOST.
pub const KVMFAULT_STATE_LOST: u32 = 1 << 3;

/// What a resolver returns: the page is installed now (before returning).
pub const KVMFAULT_RESOLVED: c_int = 0;
/// The page is installed later, from any thread; until then threads that need it sleep (vCPUs interruptibly). It may also be installed before
/// the resolver returns this. This announces the page at `gpa` only: the others of the window stay absent, and each is asked for when it is
/// needed.
pub const KVMFAULT_PENDING: c_int = 1;
/// The page can't be had, for ever. It becomes LOST, and the vCPU's loop returns KVMFAULT_MEMORY_ERROR.
pub const KVMFAULT_LOST: c_int = 2;
/// Not now: the page is absent again and the access is tried anew after a short, growing pause.
/// After many such tries in a row by one vCPU, its loop ends with -ELOOP.
pub const KVMFAULT_RETRY: c_int = 3;

/// What `kvmfault_vcpu_handle_exit` returns: the exit was the library's; call KVM_RUN again.
pub const KVMFAULT_HANDLED: c_int = 0;
/// The exit is the VMM's: look at kvm_run (or at KVM_RUN's errno) as if the library were not there.
pub const KVMFAULT_PASS: c_int = 1;
/// A kick or a signal ended the run; kvm_run holds no exit.
pub const KVMFAULT_INTERRUPTED: c_int = 2;
/// The guest touched memory that is lost (KVMFAULT_LOST) or broken (hardware): `kvmfault_vcpu_memory_error` tells which.
pub const KVMFAULT_MEMORY_ERROR: c_int = 3;

/// Why `kvmfault_fault.access` has its value: no bit set means that the kernel didn't say.
pub const KVMFAULT_ACCESS_READ: u32 = 1 << 0;
/// The access was a write.
pub const KVMFAULT_ACCESS_WRITE: u32 = 1 << 1;
/// The access was an instruction fetch.
pub const KVMFAULT_ACCESS_EXEC: u32 = 1 << 2;

/// The fault is a vCPU's (`kvmfault_fault.vcpu` says which, or -1 where the kernel does not tell).
pub const KVMFAULT_ORIGIN_VCPU: c_int = 0;
/// The fault comes from a host thread or system call that touched absent memory.
pub const KVMFAULT_ORIGIN_HOST: c_int = 1;
/// Nobody waits for the page: `kvmfault_pages_resolve` or readahead asked for it.
pub const KVMFAULT_ORIGIN_PREFETCH: c_int = 2;
/// Nobody waits for the page: background fill (`kvmfault_fill_start`) asks for it.
pub const KVMFAULT_ORIGIN_FILL: c_int = 3;

/// What a memslot's memory is; the library checks it against /proc/self/maps. AUTO accepts whatever it finds.
pub const KVMFAULT_MEMORY_AUTO: c_int = 0;
/// Private anonymous memory (MAP_PRIVATE | MAP_ANONYMOUS), 4 KiB pages or transparent huge pages.
pub const KVMFAULT_MEMORY_ANON: c_int = 1;
/// Shared memory: memfd, a file in tmpfs, or MAP_SHARED | MAP_ANONYMOUS.
pub const KVMFAULT_MEMORY_SHARED: c_int = 2;
/// hugetlb memory, private or shared.
pub const KVMFAULT_MEMORY_HUGETLB: c_int = 3;

/// `kvmfault_vm_options.flags`: after serving a vCPU's fault, call KVM_PRE_FAULT_MEMORY (Linux 6.11, x86 with EPT or NPT) for the page and for
/// what the resolver installed behind it in the readahead window: one system call instead of a guest exit a page.
///
/// Only for a VMM that changes no memslot of the VM (through the library or by itself) while a vCPU with absent pages runs: all kernels
/// to 7.3 may then retry inside that call without end, and with it the change of memslots waits.
pub const KVMFAULT_VM_PRE_FAULT: u64 = 1 << 0;
/// `kvmfault_vm_options.flags`: the VMM has a userfaultfd of its own on its memory and serves all faults there with it, as QEMU's post-copy
/// does; the library serves vCPUs only, and spares them that way. It registers, installs and drops nothing in the VMM's mappings, has no reader
/// threads, and learns from the VMM what is there: `kvmfault_pages_missing`, `kvmfault_pages_arrived`. Memory that no mechanism can take
/// away from userfaultfd (private memory with `poison-trap`) is refused with -EOPNOTSUPP: leave its slots as they are, and the VMM's
/// userfaultfd serves vCPUs there too. `kvmfault_vm_new` fails with -EOPNOTSUPP where this is so of all memory.
///
/// The resolver asks for the page and returns KVMFAULT_PENDING (or calls `kvmfault_pages_arrived` and returns KVMFAULT_RESOLVED).
/// `kvmfault_memslot_set_fast_only(vm, slot, 0)`, for each slot, is the end of it: with `poison-trap` it needs all pages there.
pub const KVMFAULT_VM_EXTERNAL_UFFD: u64 = 1 << 1;
/// `kvmfault_vm_options.flags`: areas that a guest names while it runs come too. A guest tells KVM by MSRs (0x4b564d00 to 0x4b564d04) where to write
/// the wall clock, kvmclock, steal time, async page faults and PV EOI; with `poison-trap` KVM's write fails quietly on an absent page, and the
/// guest reads old time. That can be when a guest that was restored brings a CPU online or wakes from suspend, and has not touched the page since.
///
/// With this flag, and where `poison-trap` is in use, the library sets the VM's MSR filter (KVM_X86_SET_MSR_FILTER, with
/// KVM_CAP_X86_USER_SPACE_MSR) for writes to those, and `kvmfault_vcpu_run` and `kvmfault_vcpu_handle_exit` serve the exits (KVM_EXIT_X86_WRMSR):
/// they bring the page and set the MSR. `kvmfault_vm_free` takes the filter away. For a VMM with no MSR filter of its own, which KVM would forget; one
/// that has one adds those MSRs, and at such an exit calls `kvmfault_vcpu_resolve` for the area, and KVM_SET_MSRS. Linux 5.10.
///
/// Setting it, and taking it away, waits as a change of memslots does for a vCPU that sleeps in KVM for a page which only a userfaultfd of the
/// VMM's own brings.
pub const KVMFAULT_VM_FILTER_MSRS: u64 = 1 << 2;

/// `kvmfault_memslot.flags`: nothing but vCPUs touches absent pages of this memory: no thread of the VMM, no system call,
/// no device, no vhost. Lets `poison-trap` work on private anonymous memory. A host access to an absent page then ends in
/// SIGBUS (threads) or EFAULT (system calls) instead of waiting.
pub const KVMFAULT_MEMSLOT_VCPU_ONLY: u32 = 1 << 0;
/// `kvmfault_memslot.flags`: all pages are present at the start (a post-copy destination after its pre-copy phase);
/// `kvmfault_pages_discard` makes absent those that are to be fetched. A page that is present and has nothing in it (a hole of the file, private memory
/// that was never touched, a page that was given back) reads as zeros, for the guest, this process and KVM.
pub const KVMFAULT_MEMSLOT_PRESENT: u32 = 1 << 1;
/// `kvmfault_memslot.flags`, when deleting (`len` 0): keep the page states of the memory and stay registered with
/// userfaultfd, for a VMM that deletes a slot to create it anew in another shape. Ends with `kvmfault_vm_free`, or with
/// deleting a slot of the same memory without this flag. While no slot shows the memory, the VMM's threads and system calls wait at absent pages, and
/// the resolver isn't called for them.
pub const KVMFAULT_MEMSLOT_KEEP: u32 = 1 << 2;
/// `kvmfault_memslot.flags`: start with the fast path off, as if `kvmfault_memslot_set_fast_only(vm, slot, 0)` had been called.
pub const KVMFAULT_MEMSLOT_SLOW: u32 = 1 << 3;

/// `kvmfault_vm_enable`: KVM's memory-fault exits, by whatever way the kernel's ABI enables them.
pub const KVMFAULT_CAP_FAULT_EXITS: u64 = 1 << 0;

/// `kvmfault_vcpu_options.sigbus`: SIGBUS and the kick signal are blocked in the vCPU's thread and let through only inside
/// KVM_RUN (KVM_SET_SIGNAL_MASK), where they end the run and are fetched with sigtimedwait(2). No signal handler is needed.
pub const KVMFAULT_SIGBUS_BY_MASK: c_int = 0;
/// `kvmfault_vcpu_options.sigbus`: the VMM has a SIGBUS handler that calls `kvmfault_vcpu_on_sigbus`, and a handler
/// (doing nothing is enough) for the kick signal. Neither may be blocked in the vCPU's thread.
///
/// kvm_run->immediate_exit is then shared: the library has bit 1 (the value 2) for its own kicks, and a VMM that kicks by itself writes 1. It may write
/// 0 at any time before `kvmfault_vcpu_run` or `kvmfault_vcpu_resume`, which set the library's bit again where it is due; between one of these and
/// KVM_RUN, or with a loop of its own without KVMFAULT_VCPU_RESUMES, it clears bit 0 only.
pub const KVMFAULT_SIGBUS_BY_HANDLER: c_int = 1;

/// `kvmfault_vcpu_options.flags`: the VMM has its own loop and calls `kvmfault_vcpu_resume` before each KVM_RUN.
pub const KVMFAULT_VCPU_RESUMES: u32 = 1 << 0;

/// `kvmfault_probe.mechanisms_*`: bit (1 << KVMFAULT_MECHANISM_x) is set where x works.
pub const KVMFAULT_PROBE_ABI_LEN: usize = 32;

/// `kvmfault_fill_options.flags`: memory stays as it is when nothing is absent any more, for a VMM that goes on to discard pages and have them
/// brought again.
pub const KVMFAULT_FILL_KEEP_ARMED: u32 = 1 << 0;
/// `kvmfault_fill_options.flags`: huge pages are not recovered at the end.
pub const KVMFAULT_FILL_NO_COLLAPSE: u32 = 1 << 1;
/// `kvmfault_fill_options.flags`: bring the working set, and leave the rest absent.
pub const KVMFAULT_FILL_WORKING_SET_ONLY: u32 = 1 << 2;

/// Number of buckets of `kvmfault_stats.latency_us_log2`.
pub const KVMFAULT_LATENCY_BUCKETS: usize = 32;

/// A VM whose memory the library looks after. Opaque. Functions that take it `const` may be called from any thread at any
/// time, also concurrently.
pub struct kvmfault_vm {
    _private: [u8; 0],
}

/// A vCPU of such a VM. Opaque. `run` and `handle_exit` belong to the vCPU's thread; what takes it `const` may be called
/// from any thread.
pub struct kvmfault_vcpu {
    _private: [u8; 0],
}

/// The built-in resolver's state: a snapshot file. Opaque.
pub struct kvmfault_file_source {
    _private: [u8; 0],
}

/// A background fill. Opaque. What takes it `const` may be called from any thread.
pub struct kvmfault_fill {
    _private: [u8; 0],
}

/// One fault, as the resolver sees it. Lives only during the call.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_fault {
    /// sizeof(struct kvmfault_fault) as the library knows it; later versions append fields.
    pub size: usize,
    /// Guest physical address of the page that is needed, aligned to `len`.
    pub gpa: u64,
    /// The page's size in bytes: the granularity of the memory (4096, or the huge page size of hugetlb memory).
    pub len: u64,
    /// The page's address in this process (the VMM's own mapping).
    pub hva: *mut c_void,
    /// KVM's number of the memslot: id in bits 0-15, address space in bits 16-31.
    pub slot: u32,
    /// KVMFAULT_ACCESS_* bits; 0 where the kernel doesn't say (always so for `poison-trap`).
    pub access: u32,
    /// KVMFAULT_ORIGIN_*.
    pub origin: c_int,
    /// The vCPU's number (as given to KVM_CREATE_VCPU), or -1: the fault is no vCPU's, or the number can't be known (neither /proc/self/fd nor, before
    /// Linux 5.14, KVM_GET_STATS_FD tells it).
    pub vcpu: c_int,
    /// Start of the readahead window: what the library expects to be needed next, around the page. It holds `gpa`, lies inside the memslot, and
    /// none of its pages was present when the call began. Installing all of it is welcome, a part of it or the page alone is fine; what came
    /// meanwhile is skipped by `kvmfault_pages_install`. If the resolver fails, it is called again for the page alone. Equal to `gpa` and `len`
    /// without readahead.
    pub window_gpa: u64,
    /// Length of that window in bytes.
    pub window_len: u64,
}

/// The VMM's callback that brings a page.
///
/// It runs on the thread of the vCPU that faulted, or on a reader thread of the library (host accesses, and all faults of
/// the `userfaultfd` mechanism), or on the caller's thread of `kvmfault_pages_resolve`; for different pages concurrently.
/// For one page there is one call at a time, and none once the page is present. No lock of the library is held.
///
/// It may call the functions on pages (`kvmfault_pages_*`, except `_resolve` and `_discard`), `kvmfault_last_error`,
/// `kvmfault_vcpu_kick` and the stats functions; the others return -EDEADLK. It must not touch the absent page itself
/// through its mapping. It may take as long as it likes; kicks of that vCPU are seen when it returns (KVMFAULT_PENDING
/// is the way to wait interruptibly).
///
/// Returns KVMFAULT_RESOLVED, KVMFAULT_PENDING, KVMFAULT_LOST, KVMFAULT_RETRY or -errno. With -errno the page is absent
/// again and the vCPU's loop returns that error (-EEXIST counts as RESOLVED when the page is indeed present); a host
/// thread that waits for the page goes on waiting and the resolver is asked again after a pause that grows to a second.
/// KVMFAULT_RESOLVED without an installed page, and any other value, become -EPROTO. If the page was given up meanwhile
/// (`kvmfault_pages_lost`), it is LOST whatever the resolver returns.
///
/// A call is overtaken if another thread makes its page missing anew while it is under way: by `kvmfault_pages_discard` after the page was
/// installed or given up, or by `kvmfault_pages_withdraw`. The page then stays KVMFAULT_PAGE_RESOLVING, without a second call, until the
/// call returns. Its answer, an error too, counts for nothing: the page is absent (or present, if it was installed since), and the resolver is
/// called again for threads that still need it. A call that never returns therefore keeps its page from ever being asked for again.
/// `kvmfault_pages_give_back` overtakes a call, too, but its page is present at once.
pub type kvmfault_resolver =
    Option<unsafe extern "C" fn(opaque: *mut c_void, vm: *mut kvmfault_vm, fault: *const kvmfault_fault) -> c_int>;

/// Frees what `opaque` points to; called once, after the last call of the callbacks it was given with has returned, whatever handles are left. On
/// the thread on which that call ended: a thread of the library, a vCPU's inside `kvmfault_vcpu_run`, or the one that frees the VM. It is a callback
/// like the others: it may free handles, and must not call what is "not from callbacks".
pub type kvmfault_finalizer = Option<unsafe extern "C" fn(opaque: *mut c_void)>;

/// Told after the library itself wrote guest memory on behalf of a guest instruction that KVM emulates (completing an
/// exit with KVM_EXIT_MMIO inside a memslot). KVM's dirty log does not know of such a write: a VMM that migrates while
/// pages are absent marks [gpa, gpa + len) dirty here. Runs on the vCPU's thread.
pub type kvmfault_written = Option<unsafe extern "C" fn(opaque: *mut c_void, gpa: u64, len: u64)>;

/// What `kvmfault_vm_new` needs. Start from KVMFAULT_VM_OPTIONS_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_vm_options {
    /// Set by KVMFAULT_VM_OPTIONS_INIT.
    pub size: usize,
    /// An open /dev/kvm. Duplicated, like the other descriptors: the VMM may close its own at any time.
    pub kvm_fd: c_int,
    /// The VM (KVM_CREATE_VM). The duplicate keeps the VM alive until `kvmfault_vm_free`.
    pub vm_fd: c_int,
    /// KVMFAULT_MECHANISM_*. Anything but AUTO is forced: `kvmfault_vm_new` or `kvmfault_memslot_set` fails with
    /// -EOPNOTSUPP, and the reason in `kvmfault_last_error`, where it can't work.
    pub mechanism: c_int,
    /// -1: the library opens a userfaultfd. Or an open /dev/userfaultfd (Linux 6.1), which another process may have passed: one is made from it. Or a
    /// userfaultfd that this process opened, before it gave up the privileges for it: one of another process, or of before a fork, can't work, as it
    /// serves the memory of its creator. Its UFFDIO_API may have been done (without events, and without UFFD_FEATURE_SIGBUS) or not. O_NONBLOCK is set on it.
    pub uffd: c_int,
    /// NULL, or the name of an ABI of the memslot flag ("v2", "v3", "v4", "v7", "userfault-v3") to use without asking
    /// KVM_CHECK_EXTENSION, for a kernel with numbers of its own. It is still proven in a scratch VM:
    /// -EOPNOTSUPP where the kernel doesn't behave so.
    pub abi: *const c_char,
    /// Called for every page that is needed and absent. Required.
    pub resolver: kvmfault_resolver,
    /// First argument of the callbacks.
    pub opaque: *mut c_void,
    /// NULL, or frees `opaque`. If `kvmfault_vm_new` fails it is not called: `opaque` is still the caller's.
    pub finalizer: kvmfault_finalizer,
    /// NULL, or see `kvmfault_written`.
    pub written: kvmfault_written,
    /// Threads that read the userfaultfd, 1 to 64; 0 means 1 (2 for a forced `userfaultfd` mechanism). 0 with KVMFAULT_VM_EXTERNAL_UFFD, which has
    /// no such threads (else -EINVAL).
    pub reader_threads: u32,
    /// Readahead: so many pages, 1 to 4096, may be in the window of one resolver call; 0 means 1, no readahead. The window adapts itself, for each vCPU:
    /// faults in a row, up or down, get 4 pages, then 8, and so on up to this; faults without a pattern get their page and nothing more. Where
    /// faults are a constant step apart the resolver is called, on the same thread, for the pages that will follow as well (with
    /// KVMFAULT_ORIGIN_PREFETCH, and for 200 us at most unless it answers KVMFAULT_PENDING). 64 is a good value for memory and files, more where a
    /// call is slow.
    pub readahead: u32,
    /// KVMFAULT_VM_* bits.
    pub flags: u64,
}

/// A memslot: what KVM_SET_USER_MEMORY_REGION takes, and what the library has to know of the memory. Start from
/// KVMFAULT_MEMSLOT_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_memslot {
    /// Set by KVMFAULT_MEMSLOT_INIT.
    pub size: usize,
    /// KVM's number of the memslot: id in bits 0-15, address space in bits 16-31.
    pub slot: u32,
    /// KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY or 0. The fast-only flag is the library's to set. (With `poison-trap` the kernel does not
    /// tell where in read-only slots a fault is: the first fault brings all that is absent in them.)
    pub kvm_flags: u32,
    /// Guest physical address of the first byte; aligned to the memory's page size.
    pub gpa: u64,
    /// Length in bytes, a multiple of the memory's page size. 0 deletes the slot.
    pub len: u64,
    /// The memory in this process: mapped, readable and writable, of one kind throughout, in one mapping or several side by side. It must
    /// stay mapped, and must not be mapped over, until the slot is deleted. Accesses through this mapping bring absent pages: loads and stores, and
    /// system calls that are given its addresses. Nothing else does: another process that maps the memory (a vhost-user backend), a second mapping
    /// in this one, and I/O on `fd` read zeros in absent pages, and what they write there is lost when the page comes. `kvmfault_pages_resolve`
    /// beforehand makes them right.
    pub hva: *mut c_void,
    /// NULL, or the start of the larger block of host memory (QEMU's RAMBlock) that the slot is a window of. Page states
    /// belong to the block: slots that overlap in host memory must name the same block (the same `hva` and `len` is the
    /// block where this is NULL).
    pub block_hva: *mut c_void,
    /// Length in bytes of that block.
    pub block_len: u64,
    /// KVMFAULT_MEMORY_*. Where /proc/self/maps can't be read (a chroot without /proc, Landlock) it is taken at its word, as far as system calls don't tell
    /// otherwise, and must not be AUTO for memory in several mappings side by side; that the memory is readable and writable is not checked there.
    pub memory: c_int,
    /// The descriptor that the memory is a shared mapping of, or -1. `poison-trap` on shared hugetlb memory needs it
    /// (the kernel can't duplicate such a mapping without; memory of several files is opened anew instead, which needs /proc, and
    /// CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN). Where /proc/self/maps can't be read it is also needed for any hugetlb memory, and for shared memory that is
    /// several mappings (of this one file) side by side; it is taken at its word then. Duplicated where it is used: it may be closed afterwards.
    ///
    /// pread, pwrite, sendfile, splice and copy_file_range on it don't see that a page is absent: they read zeros, and what they write is lost when
    /// the page comes. Call `kvmfault_pages_resolve` for the range first.
    pub fd: c_int,
    /// Where in that file `block_hva` (or `hva` without a block) begins, in bytes.
    pub fd_offset: u64,
    /// KVMFAULT_MEMSLOT_* bits.
    pub flags: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// What a VMM that does its own ioctl passes to KVM (`kvmfault_memslot_prepare`). Start from KVMFAULT_REGION_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_region {
    /// Set by KVMFAULT_REGION_INIT.
    pub size: usize,
    /// 1: KVM_SET_USER_MEMORY_REGION is enough. 2: KVM_SET_USER_MEMORY_REGION2 is needed.
    pub ioctl_version: u32,
    /// As in the memslot.
    pub slot: u32,
    /// KVM's flags: the memslot's own and the fast-only flag.
    pub flags: u32,
    /// Always 0.
    pub reserved: u32,
    /// As in the memslot.
    pub guest_phys_addr: u64,
    /// As in the memslot; 0 deletes.
    pub memory_size: u64,
    /// The address to give to KVM: the memslot's `hva`, or the library's private alias of it. The alias is a mapping for itself: what the VMM
    /// does to its own (mprotect, a userfaultfd's write protection) doesn't stop vCPUs there, also when nothing is absent any more.
    /// A VMM that needs that deletes the slot, and sets it with its own address without the library.
    pub userspace_addr: u64,
    /// For the KVM Userfault ABI: goes to the field of that name; otherwise 0.
    pub userfault_bitmap: u64,
}

/// What `kvmfault_vcpu_new` needs. Start from KVMFAULT_VCPU_OPTIONS_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_vcpu_options {
    /// Set by KVMFAULT_VCPU_OPTIONS_INIT.
    pub size: usize,
    /// The vCPU (KVM_CREATE_VCPU). Duplicated.
    pub fd: c_int,
    /// KVMFAULT_SIGBUS_BY_MASK or KVMFAULT_SIGBUS_BY_HANDLER.
    pub sigbus: c_int,
    /// The vCPU's struct kvm_run, mapped by the VMM for as long as the handle lives; NULL: the library maps it.
    pub run: *mut c_void,
    /// The signal that `kvmfault_vcpu_kick` sends to the vCPU's thread; the library's alone in that thread.
    /// 0 means SIGURG (by mask); by handler it must be given, and the handler runs for the library's own purposes too, so that system calls
    /// of the thread may end with EINTR without a kick (SA_RESTART avoids that). It shouldn't set `immediate_exit`.
    pub kick_signal: c_int,
    /// KVMFAULT_VCPU_* bits.
    pub flags: u32,
}

/// The memory error that ended a run with KVMFAULT_MEMORY_ERROR. Start from KVMFAULT_MEMORY_ERROR_INFO_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_memory_error_info {
    /// Set by KVMFAULT_MEMORY_ERROR_INFO_INIT.
    pub size: usize,
    /// Guest physical address, or UINT64_MAX if the address lies in no memslot of the library, or (lost pages before Linux 6.6, more than
    /// one) is not known.
    pub gpa: u64,
    /// The address in this process.
    pub hva: *mut c_void,
    /// Bytes concerned: the page.
    pub len: u64,
    /// 1: the page is LOST, as the VMM said. 0: the kernel reported a broken page (hwpoison) that was PRESENT.
    pub lost: c_int,
    /// Always 0.
    pub reserved: u32,
}

/// Which mechanisms work here. Start from KVMFAULT_PROBE_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_probe {
    /// Set by KVMFAULT_PROBE_INIT.
    pub size: usize,
    /// Bit (1 << KVMFAULT_MECHANISM_x) is set where x works for private anonymous memory (for `poison-trap`:
    /// with KVMFAULT_MEMSLOT_VCPU_ONLY).
    pub mechanisms_anon: u32,
    /// The same for shared memory.
    pub mechanisms_shared: u32,
    /// The same for shared hugetlb memory.
    pub mechanisms_hugetlb: u32,
    /// Always 0.
    pub reserved: u32,
    /// UFFD_FEATURE_* bits that this process can have; 0 if it can't open a userfaultfd.
    pub uffd_features: u64,
    /// The ABI of the memslot flag that was proven in a scratch VM, or an empty string.
    pub abi: [c_char; KVMFAULT_PROBE_ABI_LEN],
    /// 1 if KVM_PRE_FAULT_MEMORY is there.
    pub pre_fault_memory: u32,
    /// 1 if KVM maps guest memory by two-dimensional paging (EPT, NPT) as far as can be told, 0 if it shadows page tables: then
    /// KVM reads the guest's page tables itself, and with `poison-trap` they must be present before the guest uses them.
    pub two_dimensional_paging: u32,
}

/// Counters of a VM or a vCPU, since its creation. Start from KVMFAULT_STATS_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_stats {
    /// Set by KVMFAULT_STATS_INIT.
    pub size: usize,
    /// Faults of vCPUs, however they arrived.
    pub faults_vcpu: u64,
    /// Faults of host threads and system calls.
    pub faults_host: u64,
    /// Pages asked for by `kvmfault_pages_resolve` that were not present.
    pub faults_prefetch: u64,
    /// Calls of the resolver: for faults, and for pages of strided runs ahead of them.
    pub resolver_calls: u64,
    /// Faults that ended with the page installed by their own resolver call.
    pub outcome_resolved: u64,
    /// Faults that waited for somebody else's call (or a PENDING page).
    pub outcome_waited: u64,
    /// Faults on pages that were present already and only had to be mapped.
    pub outcome_mapped: u64,
    /// Faults that ended in a memory error.
    pub outcome_lost: u64,
    /// Faults that ended in an error.
    pub outcome_failed: u64,
    /// Faults left by a kick or a signal.
    pub outcome_interrupted: u64,
    /// Faults that a resolver's KVMFAULT_RETRY sent back.
    pub outcome_retried: u64,
    /// Pages installed by copying.
    pub pages_copied: u64,
    /// Pages installed as zeros.
    pub pages_zeroed: u64,
    /// Pages installed from the page cache.
    pub pages_mapped: u64,
    /// Pages made absent again (`kvmfault_pages_discard`).
    pub pages_discarded: u64,
    /// Installs tried again because the address space was changing (EAGAIN).
    pub retries_again: u64,
    /// Installs that found the page there already (EEXIST).
    pub retries_exist: u64,
    /// In-slot MMIO reads completed.
    pub mmio_reads: u64,
    /// In-slot MMIO writes completed.
    pub mmio_writes: u64,
    /// Kicks seen by `run` or `handle_exit`.
    pub kicks: u64,
    /// Faults by service time: bucket 0 below 1 us, bucket n from 2^(n-1) us up to 2^n us.
    pub latency_us_log2: [u64; KVMFAULT_LATENCY_BUCKETS],
    /// Pages that resolvers were asked for by readahead, besides those that were needed.
    pub ahead_asked: u64,
    /// Of them, those for which the resolver failed; each is still absent, or came by a fault of its own.
    pub ahead_failed: u64,
    /// Pages that were present and had nothing in them when they were touched: holes of memory that was set with KVMFAULT_MEMSLOT_PRESENT, pages
    /// that were given back (`kvmfault_pages_give_back`), and pages that the VMM took away without telling the library. They read as zeros. Without
    /// that flag any number above `pages_given_back` means that the VMM has lost pages by a madvise(2) or fallocate(2) of its own. (With
    /// `memslot-flag` KVM's own fault may fill such a page uncounted.)
    pub pages_empty: u64,
    /// Pages given back by `kvmfault_pages_give_back`; each time they are.
    pub pages_given_back: u64,
}

/// Where a range of guest memory lies in the snapshot file. Start from KVMFAULT_FILE_RANGE_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_file_range {
    /// Set by KVMFAULT_FILE_RANGE_INIT.
    pub size: usize,
    /// Guest physical address, 4096-aligned.
    pub gpa: u64,
    /// Length in bytes, 4096-aligned.
    pub len: u64,
    /// Where it begins in the file, 4096-aligned.
    pub offset: u64,
}

/// How a fill goes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_fill_progress {
    /// Set by KVMFAULT_FILL_PROGRESS_INIT; in the callback, sizeof(struct kvmfault_fill_progress) as the library knows it.
    pub size: usize,
    /// Pages that were absent when it began; of the fill's range, if it has one (`options.len`).
    pub pages_total: u64,
    /// Pages that are absent now; of the fill's range, if it has one.
    pub pages_left: u64,
    /// Calls of the resolver that failed. The pages are tried again.
    pub failures: u64,
    /// At which rate memory came since the last report, whoever brought it.
    pub bytes_per_second: u64,
    /// Milliseconds until nothing is absent, at this rate; -1 if that can't be told.
    pub eta_ms: i64,
    /// 1 when the working set is there (or none was given).
    pub working_set_done: u32,
    /// 1 when the fill is over, one way or another: `kvmfault_fill_wait` tells which.
    pub ended: u32,
    /// 1 between `kvmfault_fill_pause` and `kvmfault_fill_resume`; 0 when the fill is over.
    pub paused: u32,
    /// Threads of the fill that are in a call of the resolver, or on their way to one. When this is
    /// 0 and `paused` 1, no call is under way for the fill, and none begins before
    /// `kvmfault_fill_resume`. Pages that the resolver has announced (KVMFAULT_PENDING) may still
    /// be on their way.
    pub threads_calling: u32,
}

/// Told how a fill goes, every `interval_ms` and at the end, on a thread of the library. It may call what a resolver may, and the functions on
/// fills except `_start` and `_wait`. `progress` lives during the call.
pub type kvmfault_fill_callback =
    Option<unsafe extern "C" fn(opaque: *mut c_void, progress: *const kvmfault_fill_progress)>;

/// What `kvmfault_fill_start` needs. Start from KVMFAULT_FILL_OPTIONS_INIT; all of it is optional.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_fill_options {
    /// Set by KVMFAULT_FILL_OPTIONS_INIT.
    pub size: usize,
    /// Threads that call the resolver, 1 to 64; 0 means 1. They run with a nice value of 10.
    pub threads: u32,
    /// Most pages in the window of one resolver call, 1 to 4096; 0 means 64.
    pub batch: u32,
    /// A limit for all threads together; 0: none. Pages that the guest's own faults bring don't count.
    pub bytes_per_second: u64,
    /// NULL, or told how it goes.
    pub progress: kvmfault_fill_callback,
    /// First argument of the callback.
    pub opaque: *mut c_void,
    /// NULL, or frees `opaque`.
    pub finalizer: kvmfault_finalizer,
    /// Milliseconds between reports; 0 means 1000.
    pub interval_ms: u32,
    /// KVMFAULT_FILL_* bits.
    pub flags: u32,
    /// -1, or a file that `kvmfault_working_set_save` wrote: those pages come first, in the order in which they were needed. A file that is
    /// damaged, of another version, or of a VM with other memory is refused with -EINVAL and the reason; start without it then.
    pub working_set_fd: c_int,
    /// Must be 0.
    pub reserved: u32,
    /// With `len`: the memory to fill, [gpa, gpa + len), guest physical, in bytes. The range may
    /// span several slots, and holes between them; what is in no slot is skipped. Both are
    /// multiples of 4096; a range that begins or ends in hugetlb memory does so between two pages
    /// of it. An address that several address spaces have memory at is that of the first of them,
    /// as for `kvmfault_pages_state`. It is the memory that is there when the fill starts: what
    /// slots show later isn't added, and a slot that is deleted is left out. 0 if `len` is 0.
    pub gpa: u64,
    /// Length of the range; 0: all memory. Nothing outside of the range is brought, also not by the
    /// working set (its pages outside are left out) or by what follows the vCPUs' faults. Memory
    /// that is shown at a second address, too, may be asked for there. At the end of a fill with a
    /// range memory stays as it is, as with KVMFAULT_FILL_KEEP_ARMED, whatever the range holds:
    /// when the last of them is over, a fill without a range makes the memory ordinary.
    pub len: u64,
}
