//! Memslots: guest memory, as KVM_SET_USER_MEMORY_REGION knows it.

use super::boundary::{not_in_callback, with};
use super::structs::{self, Out};
use super::vm::kvmfault_vm;
use crate::error::{fail, Result};
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::host_memory::HostMemory;
use crate::vm::memslots::{MemoryKind, SlotRequest};
use std::ffi::{c_int, c_void};

/// In `kvmfault_memslot.memory`: whatever /proc/self/maps says that the memory is.
pub const KVMFAULT_MEMORY_AUTO: c_int = 0;

/// In `kvmfault_memslot.memory`: private anonymous memory (MAP_PRIVATE | MAP_ANONYMOUS), of 4 KiB
/// pages or transparent huge pages.
pub const KVMFAULT_MEMORY_ANON: c_int = 1;

/// In `kvmfault_memslot.memory`: shared memory (memfd, a file in tmpfs, MAP_SHARED |
/// MAP_ANONYMOUS).
pub const KVMFAULT_MEMORY_SHARED: c_int = 2;

/// In `kvmfault_memslot.memory`: hugetlb memory, private or shared.
pub const KVMFAULT_MEMORY_HUGETLB: c_int = 3;

/// In `kvmfault_memslot.flags`: only vCPUs touch absent pages of this memory: no thread of the VMM,
/// no system call, no device, no vhost. This lets `poison-trap` work on private anonymous memory.
/// An access by this process to an absent page raises SIGBUS (a thread) or is EFAULT (a system
/// call) and doesn't wait.
pub const KVMFAULT_MEMSLOT_VCPU_ONLY: u32 = 1 << 0;

/// In `kvmfault_memslot.flags`: all pages are present at the start, as at the destination of a
/// post-copy after its pre-copy phase; `kvmfault_pages_discard` then makes absent those that are to
/// be fetched. A page that is present and has no memory (a hole of the file, private memory that
/// was never touched, a page that was given back) reads as zeros, for the guest, this process and
/// KVM.
pub const KVMFAULT_MEMSLOT_PRESENT: u32 = 1 << 1;

/// In `kvmfault_memslot.flags`, for deleting (`len` 0): keep the page states of the memory and stay
/// registered with userfaultfd, for a VMM that deletes a slot to create it anew in another shape.
/// Ends with `kvmfault_vm_free`, or with deleting a slot of the same memory without this flag.
/// While no slot shows the memory, threads and system calls of this process that touch absent pages
/// wait, and the resolver isn't called for them.
pub const KVMFAULT_MEMSLOT_KEEP: u32 = 1 << 2;

/// In `kvmfault_memslot.flags`: start with the fast path off, as after
/// `kvmfault_memslot_set_fast_only(vm, slot, 0)`.
pub const KVMFAULT_MEMSLOT_SLOW: u32 = 1 << 3;

/// A memslot: what KVM_SET_USER_MEMORY_REGION takes, and what the library has to know about the
/// memory. Start from KVMFAULT_MEMSLOT_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_memslot {
    /// Set by KVMFAULT_MEMSLOT_INIT.
    pub size: usize,
    /// KVM's number of the memslot: id in bits 0-15, address space in bits 16-31.
    pub slot: u32,
    /// KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY or 0; the fast-only flag is set by the library.
    /// (With `poison-trap` the kernel doesn't tell where in a read-only slot a fault is: the first
    /// fault resolves all absent pages in it.)
    pub kvm_flags: u32,
    /// Guest physical address of the first byte; a multiple of the memory's page size.
    pub gpa: u64,
    /// Length in bytes, a multiple of the memory's page size. 0 deletes the slot.
    pub len: u64,
    /// Address of the memory in this process: mapped, readable and writable, of one kind
    /// throughout, in one mapping or in several that adjoin. It must stay mapped, and must not be
    /// mapped over, until the slot is deleted.
    ///
    /// Loads, stores and system calls that use addresses of this mapping resolve absent pages. No
    /// other access does: another process that maps the memory (a vhost-user backend), a second
    /// mapping in this process, and I/O on `fd` read zeros in absent pages, and what they write is
    /// lost when the page is installed. Call `kvmfault_pages_resolve` for the range before such an
    /// access.
    pub hva: *mut c_void,
    /// NULL, or the start of the larger block of memory (QEMU's RAMBlock) of which the slot shows a
    /// part. Page states belong to the block: slots that overlap in this process's memory must name
    /// the same block. NULL means that `hva` and `len` are the block.
    pub block_hva: *mut c_void,
    /// Length of that block in bytes; 0 if `block_hva` is NULL.
    pub block_len: u64,
    /// KVMFAULT_MEMORY_*. The library compares it with /proc/self/maps. If that can't be read (a
    /// chroot without /proc, Landlock), this value is believed as far as no system call contradicts
    /// it, and must not be AUTO for memory in several adjoining mappings; that the memory is
    /// readable and writable is then not checked.
    pub memory: c_int,
    /// The descriptor that the memory is a shared mapping of, or -1. Needed by `poison-trap` for
    /// shared hugetlb memory, of which the kernel can't duplicate a mapping (memory of several
    /// files is opened anew instead, which needs /proc and CAP_CHECKPOINT_RESTORE or
    /// CAP_SYS_ADMIN). Also needed, if /proc/self/maps can't be read, for any hugetlb memory and
    /// for shared memory in several adjoining mappings (of this one file); it is believed then.
    /// Duplicated where it is used: the VMM may close its own.
    ///
    /// pread(2), pwrite(2), sendfile(2), splice(2) and copy_file_range(2) on this descriptor don't
    /// notice absent pages: they read zeros, and what they write is lost when the page is
    /// installed. Call `kvmfault_pages_resolve` for the range first.
    pub fd: c_int,
    /// Offset in that file, in bytes, at which `block_hva` (or `hva`, without a block) begins.
    pub fd_offset: u64,
    /// KVMFAULT_MEMSLOT_* bits.
    pub flags: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// What a VMM that does its own ioctl passes to KVM (`kvmfault_memslot_prepare`). Start from
/// KVMFAULT_REGION_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_region {
    /// Set by KVMFAULT_REGION_INIT.
    pub size: usize,
    /// 1: KVM_SET_USER_MEMORY_REGION is enough. 2: KVM_SET_USER_MEMORY_REGION2 is needed.
    pub ioctl_version: u32,
    /// `slot` of the memslot.
    pub slot: u32,
    /// Flags for KVM: the memslot's own and the fast-only flag.
    pub flags: u32,
    /// Always 0.
    pub reserved: u32,
    /// `gpa` of the memslot.
    pub guest_phys_addr: u64,
    /// `len` of the memslot; 0 deletes.
    pub memory_size: u64,
    /// Address for KVM: the memslot's `hva`, or that of the library's private mapping of the same
    /// memory. What the VMM does to its own mapping (mprotect(2), write protection by a
    /// userfaultfd) doesn't stop vCPUs in that private mapping, also when no page is absent any
    /// more. A VMM that needs to stop them deletes the slot and sets it with its own address,
    /// without the library.
    pub userspace_addr: u64,
    /// With the KVM Userfault ABI: goes to the field of that name in the ioctl's argument.
    /// Otherwise 0.
    pub userfault_bitmap: u64,
}

/// Creates, moves or deletes (`len` 0) a memslot and tells KVM (KVM_SET_USER_MEMORY_REGION or
/// _REGION2). All of its pages are absent at the start, unless KVMFAULT_MEMSLOT_PRESENT is given or
/// another slot shows the same memory already. If shared memory has content at that time (it was
/// preallocated, or used before), neither the guest nor this process sees it until
/// `kvmfault_pages_map` shows it; `kvmfault_pages_install` replaces it. Deleting a slot wakes the
/// threads that wait for its pages; memory that no other slot shows becomes ordinary memory, in
/// which absent pages read as zeros (see KVMFAULT_MEMSLOT_KEEP). With `block_hva` that is all of
/// the block's memory, when the last slot that shows a part of it is deleted.
///
/// Threads may touch the memory during the call: they wait for their pages as always, and the
/// resolver may be called for these pages before the call has returned.
///
/// KVM's ioctl waits (synchronize_srcu in kvm_swap_active_memslots) for each vCPU that is in the
/// middle of a fault inside KVM_RUN, also for one that sleeps there for a page (`userfaultfd`, or a
/// slot whose fast path is off). So that this function and `kvmfault_memslot_set_fast_only` don't
/// wait until the page is supplied, the library makes the vCPUs leave KVM_RUN for a moment once the
/// ioctl has taken 10 ms: it sends their kick signal, which doesn't count as a kick and which the
/// VMM doesn't see (see `kvmfault_vcpu_options.kick_signal`). There are two limits. Before Linux
/// 6.2 (whose KVM lets a signal interrupt a fault), and in any kernel if the vCPU sleeps in a copy
/// that KVM makes for an emulated instruction (all of CPL 0 on a KVM without hardware
/// virtualization), the call waits until the page is installed or lost; during such a copy the
/// vCPU's thread uses a CPU. And a VMM that does the ioctl itself (`kvmfault_memslot_prepare`)
/// waits likewise: it kicks its vCPUs and keeps them out of KVM_RUN until the ioctl has returned,
/// or does the ioctl on a thread that may wait.
///
/// When a slot has been deleted, or replaced by one on other memory, the library no longer touches
/// that memory: the VMM may unmap it or use it for something else as soon as this call has
/// returned. The call waits for threads that are inside a system call on that memory, in
/// `kvmfault_vcpu_run` or in a call on its pages; later ones do nothing (-ENOENT). Three things
/// remain for the VMM to observe:
/// - A resolver call for one of the pages may still be under way, or just begin. The library
///   refuses its installs with -ENOENT, but can't prevent what the resolver itself writes at
///   `fault->hva` or to the memory's file.
/// - An install whose source doesn't answer is waited for one second. It can't reach the memory
///   unless that is registered with a userfaultfd again. Setting a slot there is -EBUSY until the
///   install has ended; with a userfaultfd of its own, the VMM waits until the install has
///   returned.
/// - A vCPU inside KVM_RUN uses the memory until KVM knows that the slot is gone: with
///   `kvmfault_memslot_prepare`, until the VMM's own ioctl has returned.
///
/// Private memory of a deleted slot can be set again once it has been dropped (MADV_DONTNEED) and
/// if no thread touches it until this function has returned. A thread that waited for a page of the
/// deleted slot continues after the deleting call has returned, and reads a page of zeros, which is
/// content (-EEXIST): wait for such threads before dropping the memory.
///
/// Returns: 0. On an error nothing has changed.
/// Errors:
///   -EINVAL: an argument; the message names it.
///   -EEXIST: the guest range overlaps another slot; or the memory has content that can't be
///     hidden: in private memory, in locked memory, and in any memory before Linux 5.14.
///   -EFAULT, -EACCES: `hva` isn't mapped, or isn't readable and writable.
///   -EBADF: `fd` is closed.
///   -EBUSY: the memory is registered with another userfaultfd, or an install that began under an
///     earlier slot has not ended there.
///   -ENOENT: the slot to delete is not set.
///   -EOPNOTSUPP: the forced mechanism can't serve this memory.
///   -ESHUTDOWN: the VM was freed meanwhile.
///   The errno of reader threads that can't read (see `kvmfault_vm_new`), or KVM's errno.
/// Threads: any; calls take turns.
/// Callbacks: refused with -EDEADLK.
/// Lifetime: the memory stays mapped until the slot is deleted. `slot` need not outlive the call.
///
/// # Safety
/// The pointers are NULL or valid; the slot's memory stays mapped while the slot is set.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_memslot_set(vm: *const kvmfault_vm, slot: *const kvmfault_memslot) -> c_int {
    with("kvmfault_memslot_set", vm, |vm| {
        not_in_callback("kvmfault_memslot_set")?;
        // SAFETY: the header asks for it.
        let request = unsafe { request(&structs::read(slot, "slot")?) }?;
        vm.memslot_set(&request).map(|()| 0)
    })
}

/// Registers a memslot as `kvmfault_memslot_set` does, for a VMM that does the ioctl itself: fills
/// in *region with what to pass to KVM. From then on the library regards the slot as set. If the
/// VMM's ioctl fails, call this with `len` 0 to undo. To delete a slot, also before it is set anew
/// on other memory: first tell KVM, then call this with `len` 0.
///
/// Returns: 0. On an error nothing has changed.
/// Errors:
///   Those of `kvmfault_memslot_set`, KVM's errno for the ioctl excepted.
/// Threads: any; calls take turns.
/// Callbacks: refused with -EDEADLK.
/// Lifetime: as for `kvmfault_memslot_set`.
///
/// # Safety
/// The pointers are NULL or valid; the slot's memory stays mapped while the slot is set.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_memslot_prepare(
    vm: *const kvmfault_vm,
    slot: *const kvmfault_memslot,
    region: *mut kvmfault_region,
) -> c_int {
    with("kvmfault_memslot_prepare", vm, |vm| {
        not_in_callback("kvmfault_memslot_prepare")?;
        let out = Out::new(region, "region")?;
        // SAFETY: the header asks for it.
        let request = unsafe { request(&structs::read(slot, "slot")?) }?;
        let told = vm.memslot_prepare(&request)?;
        let c = kvmfault_region {
            size: 0,
            ioctl_version: told.version,
            slot: told.slot,
            flags: told.flags,
            reserved: 0,
            guest_phys_addr: told.gpa.0,
            memory_size: told.len,
            userspace_addr: told.hva.0,
            userfault_bitmap: told.bitmap.0,
        };
        out.write(&c);
        Ok(0)
    })
}

/// # Safety
/// The slot's memory is as the header asks for while the slot is set.
unsafe fn request(slot: &kvmfault_memslot) -> Result<SlotRequest> {
    let known = KVMFAULT_MEMSLOT_VCPU_ONLY | KVMFAULT_MEMSLOT_PRESENT | KVMFAULT_MEMSLOT_KEEP | KVMFAULT_MEMSLOT_SLOW;
    if slot.flags & !known != 0 {
        fail!(EINVAL, "slot.flags: {:#x} has unknown bits", slot.flags);
    }
    if slot.reserved != 0 {
        fail!(EINVAL, "slot.reserved: is not 0");
    }
    let memory = match slot.memory {
        KVMFAULT_MEMORY_AUTO => MemoryKind::Auto,
        KVMFAULT_MEMORY_ANON => MemoryKind::Anon,
        KVMFAULT_MEMORY_SHARED => MemoryKind::Shared,
        KVMFAULT_MEMORY_HUGETLB => MemoryKind::Hugetlb,
        other => fail!(EINVAL, "slot.memory: {other} is not a KVMFAULT_MEMORY_*"),
    };
    if slot.block_hva.is_null() != (slot.block_len == 0) {
        fail!(EINVAL, "slot.block_len: block_hva and block_len must be given together");
    }
    let (start, len) = match slot.block_hva.is_null() {
        true => (slot.hva, slot.len),
        false => (slot.block_hva, slot.block_len),
    };
    // SAFETY: the caller's promise.
    let host = unsafe { HostMemory::new(start.cast(), len as usize) };
    Ok(SlotRequest {
        slot: slot.slot,
        kvm_flags: slot.kvm_flags,
        gpa: Gpa(slot.gpa),
        len: slot.len,
        hva: Hva(slot.hva as u64),
        host,
        memory,
        file: (slot.fd != -1).then_some((slot.fd, slot.fd_offset)),
        vcpu_only: slot.flags & KVMFAULT_MEMSLOT_VCPU_ONLY != 0,
        present: slot.flags & KVMFAULT_MEMSLOT_PRESENT != 0,
        keep: slot.flags & KVMFAULT_MEMSLOT_KEEP != 0,
        slow: slot.flags & KVMFAULT_MEMSLOT_SLOW != 0,
    })
}

/// Turns the fast path of a slot on (1) or off (0) while vCPUs run, as post-copy does when it
/// begins and ends. While it is off, classic userfaultfd serves absent pages. `slot` is KVM's
/// number (address space in bits 16-31). The mechanism `userfaultfd` has no fast path: this does
/// nothing. vCPUs that sleep for a page don't delay the call, with the limits that
/// `kvmfault_memslot_set` names.
///
/// With KVMFAULT_VM_EXTERNAL_UFFD, 0 ends a post-copy: when this has returned 0, no thread is in a
/// resolver call for a page of the slot's memory that is present (one may have been under way while
/// the last pages arrived); if all are present, what the resolver uses may be freed. So the caller
/// must not hold a lock that the resolver takes.
///
/// Returns: 0.
/// Errors:
///   -ENOENT: `slot` is not set.
///   -EINVAL: `on` is neither 0 nor 1.
///   -EBUSY: with KVMFAULT_VM_EXTERNAL_UFFD, a page is missing (`poison-trap`); or a resolver call
///     has not returned for ten seconds (the fast path is off then; call again).
///   KVM's errno.
/// Threads: any; calls take turns.
/// Callbacks: refused with -EDEADLK.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_memslot_set_fast_only(vm: *const kvmfault_vm, slot: u32, on: c_int) -> c_int {
    with("kvmfault_memslot_set_fast_only", vm, |vm| {
        not_in_callback("kvmfault_memslot_set_fast_only")?;
        if !(0..=1).contains(&on) {
            fail!(EINVAL, "on: {on} is neither 0 nor 1");
        }
        vm.memslot_set_fast_only(slot, on == 1).map(|()| 0)
    })
}

/// The mechanism that serves one slot. `slot` is KVM's number.
///
/// Returns: KVMFAULT_MECHANISM_*, never AUTO.
/// Errors:
///   -ENOENT: `slot` is not set.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_memslot_mechanism(vm: *const kvmfault_vm, slot: u32) -> c_int {
    with("kvmfault_memslot_mechanism", vm, |vm| Ok(vm.slot_mechanism(slot)?.number()))
}
