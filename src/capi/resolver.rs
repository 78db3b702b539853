//! Resolver: the VMM's function that supplies a page, and the other callbacks.
//!
//! The library calls the resolver for each page that is needed and absent. A resolver that has the
//! bytes at hand installs them (`kvmfault_pages_install`) and returns KVMFAULT_RESOLVED. One that
//! has to ask for them sends the request and returns KVMFAULT_PENDING; another thread installs the
//! page when it arrives.

use super::vm::kvmfault_vm;
use std::ffi::{c_int, c_void};

/// Returned by a resolver: the page is installed.
pub const KVMFAULT_RESOLVED: c_int = 0;

/// Returned by a resolver: the page is announced. Another thread installs it later, or has
/// installed it already: an install may come before the resolver returns this. Until then, threads
/// that need the page sleep (a vCPU so that a kick wakes it). The announcement is for the page at
/// `gpa` alone: the other pages of the window stay absent, and the resolver is called for each when
/// it is needed. `kvmfault_pages_withdraw` takes announcements back.
pub const KVMFAULT_PENDING: c_int = 1;

/// Returned by a resolver: the page's bytes are gone for good. The page becomes KVMFAULT_PAGE_LOST,
/// and the vCPU's loop returns KVMFAULT_MEMORY_ERROR.
pub const KVMFAULT_LOST: c_int = 2;

/// Returned by a resolver: not now. The page is absent again, and the access is repeated after a
/// short pause, which grows. After many such answers in a row to one vCPU, its loop returns -ELOOP.
pub const KVMFAULT_RETRY: c_int = 3;

/// In `kvmfault_fault.access`: the access was a read.
pub const KVMFAULT_ACCESS_READ: u32 = 1 << 0;

/// In `kvmfault_fault.access`: the access was a write.
pub const KVMFAULT_ACCESS_WRITE: u32 = 1 << 1;

/// In `kvmfault_fault.access`: the access was an instruction fetch.
pub const KVMFAULT_ACCESS_EXEC: u32 = 1 << 2;

/// In `kvmfault_fault.origin`: a vCPU needs the page (`kvmfault_fault.vcpu` says which).
pub const KVMFAULT_ORIGIN_VCPU: c_int = 0;

/// In `kvmfault_fault.origin`: a thread or a system call of this process needs the page.
pub const KVMFAULT_ORIGIN_HOST: c_int = 1;

/// In `kvmfault_fault.origin`: `kvmfault_pages_resolve` or readahead asks for the page.
pub const KVMFAULT_ORIGIN_PREFETCH: c_int = 2;

/// In `kvmfault_fault.origin`: background fill (`kvmfault_fill_start`) asks for the page.
pub const KVMFAULT_ORIGIN_FILL: c_int = 3;

/// A fault, as the resolver sees it. Valid during the call only.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_fault {
    /// sizeof(struct kvmfault_fault) as the library knows it; later versions append fields.
    pub size: usize,
    /// Guest physical address of the page that is needed; a multiple of `len`.
    pub gpa: u64,
    /// Size of the page in bytes: 4096, or the huge page size of hugetlb memory.
    pub len: u64,
    /// Address of the page in the VMM's own mapping.
    pub hva: *mut c_void,
    /// KVM's number of the memslot: id in bits 0-15, address space in bits 16-31.
    pub slot: u32,
    /// KVMFAULT_ACCESS_* bits; 0 if the kernel doesn't tell (with `poison-trap` it never does).
    pub access: u32,
    /// KVMFAULT_ORIGIN_*: who needs the page.
    pub origin: c_int,
    /// Number of the vCPU as given to KVM_CREATE_VCPU. -1 if the fault is not a vCPU's, or if the
    /// number can't be found out: neither /proc/self/fd nor KVM_GET_STATS_FD (Linux 5.14) tells it.
    pub vcpu: c_int,
    /// Guest physical address of the readahead window: the pages that are likely to be needed next.
    /// It holds `gpa`, lies inside the memslot, and none of its pages was present when the call
    /// began. The resolver may install all of it, a part of it, or the page alone;
    /// `kvmfault_pages_install` skips what has been installed meanwhile. If the resolver fails for
    /// a window, it is called again for the page alone. Without readahead this is `gpa`.
    pub window_gpa: u64,
    /// Length of the window in bytes; `len` without readahead.
    pub window_len: u64,
}

/// Supplies a page: `vm` is the VM's handle, `opaque` is `kvmfault_vm_options.opaque`, and `fault`
/// says which page is needed. No lock of the library is held during the call.
///
/// Calls for different pages run at the same time. For one page there is one call at a time, and
/// none once the page is present. The resolver must not touch the absent page through the VMM's
/// mapping, and must not wait for a lock whose holder may touch guest memory. It may take as long
/// as it likes, but a kick of the vCPU is seen only when it returns: to wait so that a kick ends
/// it, return KVMFAULT_PENDING.
///
/// Another thread can make the page absent again while the call runs: by `kvmfault_pages_withdraw`,
/// or by `kvmfault_pages_discard` after the page was installed or marked lost. The call is then
/// overtaken. Its page stays KVMFAULT_PAGE_RESOLVING, without a second call, until it returns; what
/// it returns, an error included, is ignored. The page is then absent (or present, if it was
/// installed since), and the resolver is called again for threads that need it.
/// `kvmfault_pages_give_back` overtakes a call as well, but its page is present at once. A call
/// that never returns keeps its page from being asked for ever again.
///
/// Returns: KVMFAULT_RESOLVED, _PENDING, _LOST or _RETRY, or -errno. After a -errno the page is
///   absent again and the vCPU's loop returns that error (-EEXIST counts as KVMFAULT_RESOLVED if
///   the page is present). A thread of this process that waits for the page can't be told: it goes
///   on waiting, and the resolver is called again after a pause, which grows to one second.
///   KVMFAULT_RESOLVED without an installed page, and any other value, become -EPROTO. If
///   `kvmfault_pages_lost` has marked the page meanwhile, it is lost, whatever is returned.
/// Threads: that of the vCPU that faulted; a reader thread of the library (accesses by this
///   process, and all faults of the mechanism `userfaultfd`); the caller of
///   `kvmfault_pages_resolve` or `kvmfault_vcpu_resolve`; a thread of a fill.
/// Callbacks: the functions whose *Callbacks* section says "allowed".
pub type kvmfault_resolver =
    Option<unsafe extern "C" fn(opaque: *mut c_void, vm: *mut kvmfault_vm, fault: *const kvmfault_fault) -> c_int>;

/// Frees what `opaque` points to. Called once, after the last call of the callbacks that were given
/// the same `opaque` has returned, whichever handles still exist; not at all if the call that was
/// given it failed, and not in a child of fork(2).
///
/// Threads: the one on which the last callback ended: one of the library's, a vCPU's inside
///   `kvmfault_vcpu_run`, or the one that frees the VM.
/// Callbacks: those that say "allowed"; among them the functions that free handles.
pub type kvmfault_finalizer = Option<unsafe extern "C" fn(opaque: *mut c_void)>;

/// Reports that the library has written guest memory on behalf of a guest instruction that KVM
/// emulates (it has completed a KVM_EXIT_MMIO inside a memslot). KVM's dirty log misses such
/// writes, so a VMM that migrates while pages are absent marks [gpa, gpa + len) dirty here.
///
/// Threads: the vCPU's.
/// Callbacks: those that say "allowed".
pub type kvmfault_written = Option<unsafe extern "C" fn(opaque: *mut c_void, gpa: u64, len: u64)>;
