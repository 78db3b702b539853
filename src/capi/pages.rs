//! Pages: installing them, taking them away, and asking for their states.
//!
//! A page is one of the memory's page size: 4096 bytes, or a huge page of hugetlb memory. `gpa` is
//! an address of address space 0; if that has no slot there, it is one of the first other address
//! space that has (on x86: that of system management mode). With KVMFAULT_VM_EXTERNAL_UFFD the VMM
//! installs and drops pages itself and calls `kvmfault_pages_arrived` and `kvmfault_pages_missing`.
//!
//! Take pages away with these functions only. After madvise(2), fallocate(2) or mremap(2) on a
//! slot's memory, the library's page states are wrong.

use super::boundary::{not_in_callback, with, with_wide};
use super::vm::kvmfault_vm;
use crate::error::{fail, Error, Result};
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::mem::{self, ADDRESSES};
use crate::memory::source::Source;
use std::ffi::{c_int, c_void};

/// Page state: not installed, or discarded. The next access calls the resolver.
pub const KVMFAULT_PAGE_ABSENT: c_int = 0;

/// Page state: a resolver call for it is under way, or it is announced (KVMFAULT_PENDING). Other
/// threads that need it wait.
pub const KVMFAULT_PAGE_RESOLVING: c_int = 1;

/// Page state: its bytes are in place and visible.
pub const KVMFAULT_PAGE_PRESENT: c_int = 2;

/// Page state: its bytes are gone for good. An access is a memory error.
pub const KVMFAULT_PAGE_LOST: c_int = 3;

/// For `kvmfault_pages_bitmap`: pages that are KVMFAULT_PAGE_ABSENT.
pub const KVMFAULT_STATE_ABSENT: u32 = 1 << 0;

/// For `kvmfault_pages_bitmap`: pages that are KVMFAULT_PAGE_RESOLVING.
pub const KVMFAULT_STATE_RESOLVING: u32 = 1 << 1;

/// For `kvmfault_pages_bitmap`: pages that are KVMFAULT_PAGE_PRESENT.
pub const KVMFAULT_STATE_PRESENT: u32 = 1 << 2;

/// For `kvmfault_pages_bitmap`: pages that are KVMFAULT_PAGE_LOST.
pub const KVMFAULT_STATE_LOST: u32 = 1 << 3;

/// Installs pages by copying `len` bytes from `src`; the guest, this process and waiting threads
/// see them at once. Pages that are present already are skipped and keep their bytes, so ranges
/// that several threads install may overlap. Content that shared memory has in the place of an
/// absent page is replaced. `gpa` and `len` are multiples of the memory's page size, inside one
/// slot.
///
/// Pages are installed in ascending order. The first LOST page ends the call with -EHWPOISON: the
/// pages before it are installed, those after it are not. To install over it, discard it first.
///
/// Returns: 0: this call has installed at least one page, and the whole range is present. After an
///   error the pages that were installed before it stay installed.
/// Errors:
///   -EEXIST: all pages were present already; nothing has changed.
///   -ENOENT: `gpa` is in no slot, or the slot was deleted meanwhile.
///   -EINVAL: `gpa` or `len` is no multiple of the page size, `len` is 0, the range goes beyond the
///     slot's end, or `src` is NULL.
///   -EFAULT: `src` can't be read, or is guest memory that isn't present itself (a page that is
///     being resolved is waited for, ten seconds at most).
///   -EHWPOISON: a page of the range is lost.
///   -ENOMEM, -ENOSPC: no memory, or the huge page pool is empty.
///   -EAGAIN: the address space has been changing for ten seconds.
///   -ESHUTDOWN: the VM was freed meanwhile.
/// Threads: any.
/// Callbacks: allowed.
/// Lifetime: `src` need not outlive the call.
///
/// # Safety
/// `vm` is NULL or a handle of this library. `src` needs no checks of ours: the kernel reads it.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_install(
    vm: *const kvmfault_vm,
    gpa: u64,
    src: *const c_void,
    len: u64,
) -> c_int {
    with("kvmfault_pages_install", vm, |vm| {
        if src.is_null() {
            fail!(EINVAL, "src: is NULL");
        }
        match (src as u64).checked_add(len) {
            None => fail!(EINVAL, "len: src {src:p} plus {len:#x} wraps around"),
            // A `len` that is far too long is left to the check of the guest's range.
            Some(end) if end > ADDRESSES && len <= ADDRESSES => {
                fail!(EFAULT, "src: {src:p} is no address of a process")
            }
            Some(_) => {}
        }
        vm.install(Gpa(gpa), len, Source::Copy(Hva(src as u64))).map(|()| 0)
    })
}

/// Installs pages of zeros. For the rest it is `kvmfault_pages_install` without a source.
///
/// Returns: as `kvmfault_pages_install`.
/// Errors:
///   Those of `kvmfault_pages_install`, except those of `src`.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_zero(vm: *const kvmfault_vm, gpa: u64, len: u64) -> c_int {
    with("kvmfault_pages_zero", vm, |vm| vm.install(Gpa(gpa), len, Source::Zero).map(|()| 0))
}

/// Installs pages of shared memory whose bytes are in the page cache already, because they were
/// written through another mapping or by another process. Until this call neither the guest nor
/// this process sees them. For the rest it is `kvmfault_pages_install` without a source. Needs
/// Linux 5.14 (5.13 for hugetlb memory): UFFDIO_CONTINUE.
///
/// Returns: as `kvmfault_pages_install`.
/// Errors:
///   -EINVAL: the memory is private; else as `kvmfault_pages_install`.
///   -ENOENT: a page is not in the page cache, or `gpa` is in no slot.
///   The others of `kvmfault_pages_install`, except those of `src`.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_map(vm: *const kvmfault_vm, gpa: u64, len: u64) -> c_int {
    with("kvmfault_pages_map", vm, |vm| vm.install(Gpa(gpa), len, Source::Map).map(|()| 0))
}

/// With KVMFAULT_VM_EXTERNAL_UFFD: the VMM's mapping has these pages now (its UFFDIO_COPY,
/// _ZEROPAGE or _CONTINUE has returned). vCPUs see them, and those that wait for them continue.
/// Call it once for each page that was missing. Pages that are present already stay as they are, so
/// a range may hold such pages. A page without memory reads as zeros, and takes memory only when a
/// vCPU touches it: for a balloon, drop the pages (madvise(2), fallocate(2)) and then call this for
/// them. `hva` is an address of the VMM's; `hva` and `len` are multiples of the memory's page size.
///
/// Returns: 0: the whole range is present.
/// Errors:
///   -ENOENT: `hva` is in no slot's memory. No error for a VMM that calls this for all of its
///     memory.
///   -EINVAL: `hva` or `len` is misaligned, `len` is 0, or the range goes beyond the memory that
///     was registered.
///   -EHWPOISON: a page is lost.
///   -EOPNOTSUPP: the VM has no KVMFAULT_VM_EXTERNAL_UFFD.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// `vm` is NULL or a handle of this library. `hva` is only compared.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_arrived(vm: *const kvmfault_vm, hva: *const c_void, len: u64) -> c_int {
    with("kvmfault_pages_arrived", vm, |vm| vm.arrived(Hva(hva as u64), len).map(|()| 0))
}

/// With KVMFAULT_VM_EXTERNAL_UFFD: the VMM's mapping doesn't have these pages, or no longer has
/// them; a vCPU that needs one calls the resolver. Before this call the VMM has registered them
/// with its userfaultfd and dropped their bytes, if there were any; the library drops nothing.
/// Pages that are missing already, or that are being resolved, stay so. If a page arrives at the
/// same time, the resolver may be called for a page that is there: it then calls
/// `kvmfault_pages_arrived` and returns KVMFAULT_RESOLVED. `hva` and `len` as for
/// `kvmfault_pages_arrived`.
///
/// Returns: 0.
/// Errors:
///   -EBUSY: the fast path of a slot on this memory is off; or vCPUs use the pages, which are then
///     not missing.
///   -ENOENT, -EINVAL, -EOPNOTSUPP: as for `kvmfault_pages_arrived`.
/// Threads: any.
/// Callbacks: refused with -EDEADLK.
///
/// # Safety
/// `vm` is NULL or a handle of this library. `hva` is only compared.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_missing(vm: *const kvmfault_vm, hva: *const c_void, len: u64) -> c_int {
    with("kvmfault_pages_missing", vm, |vm| {
        not_in_callback("kvmfault_pages_missing")?;
        vm.missing(Hva(hva as u64), len).map(|()| 0)
    })
}

/// Marks absent pages lost. vCPUs that touch them or wait for them get KVMFAULT_MEMORY_ERROR;
/// threads of this process get SIGBUS and system calls EFAULT, as for broken hardware (before Linux
/// 6.6: SIGSEGV). `kvmfault_pages_discard` makes them absent again. `gpa` and `len` are multiples
/// of the memory's page size, inside one slot.
///
/// Returns: 0.
/// Errors:
///   -EEXIST: all pages are present or lost already.
///   -ENOENT: `gpa` is in no slot.
///   -EINVAL: `gpa` or `len` is misaligned, `len` is 0, or the range goes beyond the slot's end.
///   -EBUSY: for ten seconds an install in the same 512 pages has been reading from a source that
///     doesn't answer.
///   Another errno: the memory is no longer mapped. Threads of this process may not learn that
///     pages are lost. Pages of the range may be lost, and vCPUs and waiting threads are told so.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_lost(vm: *const kvmfault_vm, gpa: u64, len: u64) -> c_int {
    with("kvmfault_pages_lost", vm, |vm| vm.lose(Gpa(gpa), len).map(|()| 0))
}

/// Makes present or lost pages absent: their memory is freed, and the resolver is called for them
/// at the next access, or by a fill. For a post-copy that fetches anew what has changed at the
/// source, and for a lost page that was found. Pages that the guest gave up (a balloon) must not be
/// fetched again: use `kvmfault_pages_give_back` for them. Pages that are being resolved stay so.
/// `gpa` and `len` are multiples of the memory's page size, inside one slot.
///
/// A page that was installed or marked lost while a resolver call for it is under way is
/// KVMFAULT_PAGE_RESOLVING until that call returns, and then absent; there is no second call for it
/// meanwhile (see `kvmfault_resolver`).
///
/// Returns: 0. After an error, present pages that could not be dropped are still present, with
///   their bytes, and other pages of the range may be absent: `kvmfault_pages_bitmap` tells which.
/// Errors:
///   -ENOENT: `gpa` is in no slot.
///   -EINVAL: `gpa` or `len` is misaligned, `len` is 0, the range goes beyond the slot's end, or
///     the memory is locked (mlock(2)).
///   -EPERM: the memory's file is sealed (F_SEAL_WRITE, F_SEAL_FUTURE_WRITE): the kernel drops
///     nothing from it. F_SEAL_SHRINK and F_SEAL_GROW don't matter.
///   -EBUSY: vCPUs use the pages faster than they can be taken away; or, after ten seconds, an
///     install in the same 512 pages reads from a source that doesn't answer; or, at once, a fill
///     has ended on this memory (see `kvmfault_fill_start`).
///   -EOPNOTSUPP: the VM has KVMFAULT_VM_EXTERNAL_UFFD.
/// Threads: any.
/// Callbacks: refused with -EDEADLK.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_discard(vm: *const kvmfault_vm, gpa: u64, len: u64) -> c_int {
    with("kvmfault_pages_discard", vm, |vm| {
        not_in_callback("kvmfault_pages_discard")?;
        vm.discard(Gpa(gpa), len).map(|()| 0)
    })
}

/// Gives pages back that the guest has given up (a balloon, free page reporting, virtio-mem): their
/// memory is freed at once, and they read as zeros at the next access. The resolver is never called
/// for them, a fill skips them, and they are not missing to a post-copy: they are
/// KVMFAULT_PAGE_PRESENT, and an install skips them. For pages that are to be fetched again use
/// `kvmfault_pages_discard`.
///
/// Pages in any state are given back: present, absent and lost ones (which are no longer lost), and
/// those that are being resolved. An announced page (KVMFAULT_PENDING) need not be installed any
/// more. A resolver call that is under way is overtaken: what it installs for these pages and what
/// it returns is ignored. Works also with the fast path off, and on memory that a finished fill has
/// made ordinary.
///
/// What the guest writes to a page during the call may be lost: the VMM acknowledges a balloon's
/// request after the call. KVM's dirty log doesn't report pages that were given back: a migration
/// learns of them from the balloon. hugetlb memory is given back in whole huge pages, and the next
/// access needs a free one in the pool. `gpa` and `len` are multiples of the memory's page size,
/// inside one slot.
///
/// Returns: 0. After an error, whose message names a page, pages that could not be dropped are as
///   before, with their bytes; pages before the failing one are given back, and those behind it may
///   be.
/// Errors:
///   -ENOENT: `gpa` is in no slot.
///   -EINVAL: `gpa` or `len` is misaligned, `len` is 0, the range goes beyond the slot's end, or
///     the memory is locked (mlock(2)).
///   -EACCES, -EPERM: the memory can't be written: it is read-only, or its file is sealed.
///   -EBUSY: an install in the same 512 pages has taken ten seconds.
///   -EOPNOTSUPP: the VM has KVMFAULT_VM_EXTERNAL_UFFD: it drops the memory itself and then calls
///     `kvmfault_pages_arrived`.
/// Threads: any.
/// Callbacks: refused with -EDEADLK.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_give_back(vm: *const kvmfault_vm, gpa: u64, len: u64) -> c_int {
    with("kvmfault_pages_give_back", vm, |vm| {
        not_in_callback("kvmfault_pages_give_back")?;
        vm.give_back(Gpa(gpa), len).map(|()| 0)
    })
}

/// Takes announcements back: pages for which the resolver returned KVMFAULT_PENDING, and which have
/// not been installed, are absent again. The resolver is called anew for vCPUs and threads that
/// wait for them, and by a fill that is under way. For post-copy recovery, when the connection over
/// which the pages were requested is gone. A page whose resolver call is under way is withdrawn,
/// too: it is absent when that call returns, whatever it returns, KVMFAULT_PENDING included (see
/// `kvmfault_resolver`). A page that is installed before or after this call is present. PRESENT,
/// LOST and ABSENT pages stay as they are. `gpa` and `len` are multiples of the memory's page size,
/// inside one slot.
///
/// With KVMFAULT_VM_EXTERNAL_UFFD it works for vCPUs that wait; threads that wait in the VMM's own
/// userfaultfd are the VMM's to wake.
///
/// Returns: the number of pages that were withdrawn, 0 or more.
/// Errors:
///   -ENOENT: `gpa` is in no slot.
///   -EINVAL: `gpa` or `len` is misaligned, `len` is 0, or the range goes beyond the slot's end.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_withdraw(vm: *const kvmfault_vm, gpa: u64, len: u64) -> i64 {
    with_wide("kvmfault_pages_withdraw", vm, |vm| Ok(vm.withdraw(Gpa(gpa), len)? as i64))
}

/// Resolves pages now: calls the resolver for them on the calling thread, and waits for those that
/// other threads are resolving. For memory that must be present before an access that can't wait or
/// fails quietly: I/O on the memory's descriptor (pread, pwrite, sendfile, splice), a second
/// mapping of it, or another process. With `poison-trap` also for what KVM accesses outside of
/// guest instructions and `kvmfault_vcpu_run` doesn't resolve by itself: guest page tables if
/// `kvmfault_probe.two_dimensional_paging` is 0, and an area whose MSR the VMM sets after the first
/// KVM_RUN (see `kvmfault_vm_check_guest`). `gpa` and `len` are multiples of the memory's page
/// size, inside one slot.
///
/// Returns: 0: all pages are present.
/// Errors:
///   The resolver's -errno.
///   -EHWPOISON: a page is lost.
///   -EINTR: a signal handler ran while the call waited.
///   -ELOOP: the resolver has returned KVMFAULT_RETRY many times.
///   -ENOENT: `gpa` is in no slot, or the slot was deleted meanwhile.
///   -EINVAL: `gpa` or `len` is misaligned, `len` is 0, or the range goes beyond the slot's end.
///   -ESHUTDOWN: the VM was freed meanwhile.
/// Threads: any.
/// Callbacks: refused with -EDEADLK.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_resolve(vm: *const kvmfault_vm, gpa: u64, len: u64) -> c_int {
    with("kvmfault_pages_resolve", vm, |vm| {
        not_in_callback("kvmfault_pages_resolve")?;
        vm.resolve(Gpa(gpa), len).map(|()| 0)
    })
}

/// The state of the page that holds `gpa`.
///
/// Returns: KVMFAULT_PAGE_*.
/// Errors:
///   -ENOENT: `gpa` is in no slot.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_state(vm: *const kvmfault_vm, gpa: u64) -> c_int {
    with("kvmfault_pages_state", vm, |vm| Ok(vm.state(Gpa(gpa))? as c_int))
}

/// The states of a range as a bitmap: one bit a page, set if the page is in one of `states` (at
/// least one KVMFAULT_STATE_* bit). Bit n % 8 of byte n / 8 is page n of the range, as in
/// little-endian 64-bit words and in KVM's dirty log; bits beyond the last page are 0. Writes as
/// many whole 64-bit words as the pages need: `size`, in bytes, is at least 8 * ((len / page size +
/// 63) / 64). `bitmap` needs no alignment. `gpa` and `len` are multiples of the memory's page size,
/// inside one slot.
///
/// Each page is looked at once, while other threads may change it: a page that was RESOLVING may be
/// present by the time the call returns.
///
/// Returns: how many bits are set, 0 or more.
/// Errors:
///   -EINVAL: `gpa` or `len` is misaligned, `len` is 0, the range goes beyond the slot's end,
///     `states` is 0 or has unknown bits, `bitmap` is NULL, or `size` is too small.
///   -ENOENT: `gpa` is in no slot.
///   -EFAULT: `bitmap` can't be written.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// `vm` is NULL or a handle of this library. `bitmap` needs no checks of ours: the kernel writes
/// it.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_bitmap(
    vm: *const kvmfault_vm,
    gpa: u64,
    len: u64,
    states: u32,
    bitmap: *mut c_void,
    size: usize,
) -> i64 {
    with_wide("kvmfault_pages_bitmap", vm, |vm| {
        if states == 0 || states > 15 {
            fail!(EINVAL, "states: {states:#x} is not a set of KVMFAULT_STATE_*");
        }
        if bitmap.is_null() {
            fail!(EINVAL, "bitmap: is NULL");
        }
        let put = |offset, bytes: &[u8]| {
            // SAFETY: C says that the bitmap has room for `size` bytes, which it lets us write.
            unsafe { mem::write(Hva((bitmap as u64).wrapping_add(offset)), bytes) }
        };
        vm.bitmap(Gpa(gpa), len, states, size as u64, put).map(|set| set as i64)
    })
}

/// Counts the pages of all memory that are absent or being resolved. A page that two slots show
/// counts once. Looks at the state of every page: about 10 ms a TiB.
///
/// Returns: the number of pages, 0 or more.
/// Errors:
///   -EOVERFLOW: the number doesn't fit.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_absent(vm: *const kvmfault_vm) -> i64 {
    with_wide("kvmfault_pages_absent", vm, |vm| -> Result<i64> {
        i64::try_from(vm.absent()).map_err(|_| Error::new(libc::EOVERFLOW, "the number of pages doesn't fit"))
    })
}
