//! Resolver, and the other callbacks.

use super::vm::kvmfault_vm;
use std::ffi::{c_int, c_void};

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
