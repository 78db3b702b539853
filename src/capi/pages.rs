//! Pages.

use super::boundary::{not_in_callback, with, with_wide};
use super::vm::kvmfault_vm;
use crate::error::{fail, Error, Result};
use crate::kernel::mem::{self, ADDRESSES};
use crate::memory::source::Source;
use std::ffi::{c_int, c_void};

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

/// Installs pages by copying `len` bytes from `src`: the guest, this process and whoever waits see them at once. Pages that are present
/// already are skipped and keep their bytes (so a range may overlap with what others install). What is in the place of an absent page is
/// replaced: shared memory may have been populated (preallocated, used before) when its slot was set. `gpa` and `len` are multiples of
/// the memory's page size, inside one slot.
///
/// Returns 0 if at least one page was installed by this call and all of the range is present now. -EEXIST: all were present, nothing
/// changed. -ENOENT: `gpa` is in no slot. -EINVAL: alignment, `len` 0, beyond the slot's end, NULL. -EFAULT: `src` can't be read, or is
/// guest memory that isn't present itself (one that is being brought is waited for, ten seconds at most). -EHWPOISON: a page is lost
/// (discard it first): those before it in the range are installed, those after it are not. -ENOMEM, -ENOSPC: no memory, or the huge page pool is empty. -EAGAIN: the address space was being changed for ten
/// seconds. -ESHUTDOWN: the VM was freed meanwhile. On an error after some pages, those stay installed. Any thread, also in callbacks.
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
            // A `len` that is far too long is for the check of the guest's range.
            Some(end) if end > ADDRESSES && len <= ADDRESSES => {
                fail!(EFAULT, "src: {src:p} is no address of a process")
            }
            Some(_) => {}
        }
        vm.install(gpa, len, Source::Copy(src as u64)).map(|()| 0)
    })
}

/// The same with zeros, without a source.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_zero(vm: *const kvmfault_vm, gpa: u64, len: u64) -> c_int {
    with("kvmfault_pages_zero", vm, |vm| vm.install(gpa, len, Source::Zero).map(|()| 0))
}

/// The same for shared memory whose bytes are in the page cache already: written through another mapping, or by another process. Until
/// then nobody sees them. -EINVAL for private memory; -ENOENT if a page is not in the page cache. Needs Linux 5.13 (hugetlb) or 5.14.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_map(vm: *const kvmfault_vm, gpa: u64, len: u64) -> c_int {
    with("kvmfault_pages_map", vm, |vm| vm.install(gpa, len, Source::Map).map(|()| 0))
}

/// With KVMFAULT_VM_EXTERNAL_UFFD: the VMM's mapping has these pages now (the VMM's UFFDIO_COPY, _ZEROPAGE or _CONTINUE has returned). vCPUs
/// see them, and those that wait for them go on. Once for each page that was missing; pages that are present already stay as they are, so a
/// range may hold such. A page with nothing in it reads as zeros, and takes no memory before a vCPU comes to it: a balloon drops its pages
/// (madvise(2), fallocate(2)) and then calls this for them. `hva` is the VMM's address, and `hva` and `len` are multiples of the memory's page size.
///
/// Returns 0: all of the range is present. -ENOENT: `hva` is in no slot's memory (not an error for a VMM that calls this for all of its memory). -EINVAL:
/// alignment, `len` 0, beyond the memory that was registered. -EHWPOISON: a page is lost. -EOPNOTSUPP: a VM without
/// KVMFAULT_VM_EXTERNAL_UFFD. Any thread, also in callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library. `hva` is only compared.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_arrived(vm: *const kvmfault_vm, hva: *const c_void, len: u64) -> c_int {
    with("kvmfault_pages_arrived", vm, |vm| vm.arrived(hva as u64, len).map(|()| 0))
}

/// With KVMFAULT_VM_EXTERNAL_UFFD: the VMM's mapping doesn't have these pages (any more): a vCPU that needs one calls the resolver. The VMM has
/// registered them with its userfaultfd and dropped their bytes, if there were any, before this; the library drops nothing. Pages that are missing
/// already, or are being brought, stay so. Should a page arrive at the same time, the resolver may be called for a page that is there: it then
/// calls `kvmfault_pages_arrived` and returns KVMFAULT_RESOLVED.
///
/// Returns 0; -ENOENT, -EINVAL and -EOPNOTSUPP as `kvmfault_pages_arrived`; -EBUSY if the fast path of a slot on this memory is off, or if vCPUs use
/// the pages (which then are not missing). Any thread; not from callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library. `hva` is only compared.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_missing(vm: *const kvmfault_vm, hva: *const c_void, len: u64) -> c_int {
    with("kvmfault_pages_missing", vm, |vm| {
        not_in_callback("kvmfault_pages_missing")?;
        vm.missing(hva as u64, len).map(|()| 0)
    })
}

/// Gives absent pages up: they are LOST. vCPUs that touch them (or wait for them) get KVMFAULT_MEMORY_ERROR; host threads get SIGBUS
/// and system calls EFAULT, as for broken hardware (before Linux 6.6: SIGSEGV). `kvmfault_pages_discard` makes them absent again.
///
/// Returns 0; -EEXIST if all of them are present or lost already; -ENOENT and -EINVAL as above. Another error (the memory is no longer
/// mapped) means that host threads may not be told: pages of the range may be lost, and vCPUs and waiters are told so. -EBUSY after ten seconds: an
/// install in the same 512 pages reads from a source that doesn't answer. Any thread, also in callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_lost(vm: *const kvmfault_vm, gpa: u64, len: u64) -> c_int {
    with("kvmfault_pages_lost", vm, |vm| vm.lose(gpa, len).map(|()| 0))
}

/// Makes present or lost pages missing again: their memory goes, and the resolver is asked for them at the next touch, or by a fill. For a post-copy
/// that fetches anew what changed at the source, and for a lost page that turned up. What the guest itself gave up (a balloon) must not be fetched
/// again: that is for `kvmfault_pages_give_back`. Pages that are being resolved stay so. Use this and not madvise(2): the library must know.
///
/// A page that was installed or given up while a resolver call for it is under way stays KVMFAULT_PAGE_RESOLVING until that call returns, and is
/// absent then; there is no second call for it meanwhile (see `kvmfault_resolver`).
///
/// Returns 0; -ENOENT and -EINVAL as above, and -EINVAL for memory that is locked (mlock(2)); -EPERM for memory whose file is sealed
/// (F_SEAL_WRITE, F_SEAL_FUTURE_WRITE: the kernel drops nothing from it, whichever call is used; F_SEAL_SHRINK and F_SEAL_GROW don't matter);
/// -EBUSY if vCPUs use the pages faster than they can be taken away, or after ten seconds if an install in the same 512 pages reads from a source that
/// doesn't answer, or at once if nothing may be missing in the memory (a fill has ended there, see `kvmfault_fill_start`); -EOPNOTSUPP: a VM with
/// KVMFAULT_VM_EXTERNAL_UFFD. After an error present pages that could not be dropped are still present,
/// with their bytes, and other pages of the range may be absent: `kvmfault_pages_bitmap` tells which. Any thread; not from callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_discard(vm: *const kvmfault_vm, gpa: u64, len: u64) -> c_int {
    with("kvmfault_pages_discard", vm, |vm| {
        not_in_callback("kvmfault_pages_discard")?;
        vm.discard(gpa, len).map(|()| 0)
    })
}

/// The guest has given these pages up (a balloon, free page reporting, virtio-mem): their memory goes to the system at once, and they read as zeros
/// when the guest or the VMM touches them again. The resolver is never asked for them, a fill doesn't bring them, and they are not missing to a
/// post-copy: they are KVMFAULT_PAGE_PRESENT, and an install skips them. Use this and not madvise(2): the library must know. Pages that are to be fetched
/// again are `kvmfault_pages_discard`'s.
///
/// Pages in any state are given back: present, absent and lost ones (which are lost no more), and those that are being resolved. An announced page
/// (KVMFAULT_PENDING) need not come any more. A resolver call that is under way is overtaken: what it installs for these pages, and what it answers,
/// counts for nothing. Works the same with the fast path off, and on memory of which nothing is missing any more because a fill has ended.
///
/// What the guest writes to a page while the call is under way may be lost; so the VMM acknowledges a balloon's request after the call, and not
/// before. KVM's dirty log doesn't tell of pages that were given back: a migration learns of them from the balloon. Memory of huge pages (hugetlb)
/// is given back in whole huge pages, and the next touch needs a free one in the pool.
///
/// Returns 0; -ENOENT: `gpa` is in no slot; -EINVAL: `gpa` or `len` is no multiple of the memory's page size, `len` is 0, the range goes beyond the
/// slot's end, or memory is locked (mlock(2)). -EACCES, -EPERM: the memory may not be written (read-only, a sealed memfd). -EBUSY: an install in the same
/// 512 pages has taken ten seconds. -EOPNOTSUPP: a VM with KVMFAULT_VM_EXTERNAL_UFFD, which drops the memory itself and then calls
/// `kvmfault_pages_arrived`. On an error the message names a page. Pages that could not be dropped are what they were before, with their bytes; the others,
/// before the failing one in the range, are given back, and those behind it may be. Any thread; not from callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_give_back(vm: *const kvmfault_vm, gpa: u64, len: u64) -> c_int {
    with("kvmfault_pages_give_back", vm, |vm| {
        not_in_callback("kvmfault_pages_give_back")?;
        vm.give_back(gpa, len).map(|()| 0)
    })
}

/// Withdraws announcements: pages for which the resolver returned KVMFAULT_PENDING, and that have not come, are absent again, and the resolver is
/// called anew for vCPUs and threads that wait for them (and by a fill under way). For post-copy recovery: the connection over which the pages
/// were asked for has died. A page whose resolver call is under way is withdrawn, too: it is absent when that call returns, whatever that
/// answers, KVMFAULT_PENDING included (see `kvmfault_resolver`). A page that is installed before or after is present as ever. PRESENT, LOST and
/// ABSENT pages stay as they are. `gpa` and `len` are multiples of the memory's page size, inside one slot. Also for VMs with
/// KVMFAULT_VM_EXTERNAL_UFFD, where it concerns vCPUs that wait; who waits in the VMM's own userfaultfd is the VMM's to wake.
///
/// Returns how many pages were withdrawn, 0 or more; -ENOENT and -EINVAL as `kvmfault_pages_install`. Any thread, also in callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_withdraw(vm: *const kvmfault_vm, gpa: u64, len: u64) -> i64 {
    with_wide("kvmfault_pages_withdraw", vm, |vm| Ok(vm.withdraw(gpa, len)? as i64))
}

/// Brings pages now, through the resolver, on the calling thread; waits for those that somebody else is bringing. For memory that must be
/// present before something touches it that can't wait or fails quietly: I/O on the memory's descriptor (pread, pwrite, sendfile, splice), a second mapping
/// of it, or another process. With `poison-trap` that is also what KVM itself accesses outside of guest instructions, and `kvmfault_vcpu_run` doesn't bring by itself (guest page tables, where `kvmfault_probe.two_dimensional_paging` is 0;
/// an area whose MSR the VMM sets later than the first KVM_RUN; see `kvmfault_vm_check_guest`).
///
/// Returns 0 when all are present; the resolver's -errno; -EHWPOISON if a page is lost; -EINTR if a signal handler ran while waiting;
/// -ELOOP after many KVMFAULT_RETRY; -ENOENT and -EINVAL as above. Any thread; not from callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_resolve(vm: *const kvmfault_vm, gpa: u64, len: u64) -> c_int {
    with("kvmfault_pages_resolve", vm, |vm| {
        not_in_callback("kvmfault_pages_resolve")?;
        vm.resolve(gpa, len).map(|()| 0)
    })
}

/// The state of the page that holds `gpa`: KVMFAULT_PAGE_*, or -ENOENT if it is in no slot. Any thread, also in callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_state(vm: *const kvmfault_vm, gpa: u64) -> c_int {
    with("kvmfault_pages_state", vm, |vm| Ok(vm.state(gpa)? as c_int))
}

/// The states of a range as a bitmap: one bit a page of the memory's page size, set if the page is in one of `states` (KVMFAULT_STATE_* bits, at
/// least one). Bit n % 8 of byte n / 8 is page n of the range, as in little-endian 64-bit words and in KVM's dirty log; bits beyond the last page
/// are 0. Writes as many whole 64-bit words as the pages need and no more: `size`, in bytes, is at least 8 * ((len / page size + 63) / 64).
/// `bitmap` needs no alignment. `gpa` and `len` are multiples of the memory's page size, inside one slot.
///
/// A snapshot: each page is looked at once, while others may change. A page that was RESOLVING may be present by the time the call returns.
///
/// Returns how many bits are set, 0 or more. -EINVAL: alignment, `len` 0, beyond the slot's end, `states` 0 or with unknown bits, `bitmap` NULL,
/// `size` too small. -ENOENT: `gpa` is in no slot. -EFAULT: `bitmap` can't be written. Any thread, also in callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library. `bitmap` needs no checks of ours: the kernel writes it.
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
        let put = |offset, bytes: &[u8]| mem::write((bitmap as u64).wrapping_add(offset), bytes);
        vm.bitmap(gpa, len, states, size as u64, put).map(|set| set as i64)
    })
}

/// How many pages of all memory are not there yet (absent or being resolved; pages that two slots show count once), or -errno. Takes time
/// in proportion to the memory: about 10 ms a TiB. Any thread, also in callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_pages_absent(vm: *const kvmfault_vm) -> i64 {
    with_wide("kvmfault_pages_absent", vm, |vm| -> Result<i64> {
        i64::try_from(vm.absent()).map_err(|_| Error::new(libc::EOVERFLOW, "more pages than fit"))
    })
}
