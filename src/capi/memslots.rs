//! Memslots.

use super::boundary::{not_in_callback, with};
use super::structs::{self, Out};
use super::vm::kvmfault_vm;
use crate::error::{fail, Result};
use crate::kernel::host_memory::HostMemory;
use crate::vm::memslots::{MemoryKind, SlotRequest};
use std::ffi::{c_int, c_void};

/// What a memslot's memory is; the library checks it against /proc/self/maps. AUTO accepts whatever it finds.
pub const KVMFAULT_MEMORY_AUTO: c_int = 0;

/// Private anonymous memory (MAP_PRIVATE | MAP_ANONYMOUS), 4 KiB pages or transparent huge pages.
pub const KVMFAULT_MEMORY_ANON: c_int = 1;

/// Shared memory: memfd, a file in tmpfs, or MAP_SHARED | MAP_ANONYMOUS.
pub const KVMFAULT_MEMORY_SHARED: c_int = 2;

/// hugetlb memory, private or shared.
pub const KVMFAULT_MEMORY_HUGETLB: c_int = 3;

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

/// Creates, moves or deletes (`len` 0) a memslot, and tells KVM (KVM_SET_USER_MEMORY_REGION or _REGION2). All its pages are absent at
/// the start, unless KVMFAULT_MEMSLOT_PRESENT is given or the memory is known from another slot. What shared memory holds all the same
/// (preallocated, used before) nobody sees until `kvmfault_pages_map` shows it; `kvmfault_pages_install` replaces it.
///
/// Threads may touch the memory while this is under way: they wait for their pages as ever, and the resolver may be called for these before this
/// has returned.
///
/// KVM's ioctl waits for each vCPU that is in the middle of a fault inside KVM_RUN, also of one
/// that sleeps there for a page (`userfaultfd`; a slot whose fast path is off). So that this call,
/// deleting and `kvmfault_memslot_set_fast_only` don't wait for the source of the page, the vCPUs
/// are made to leave KVM_RUN for a moment when the ioctl has taken 10 ms: by their kick signal,
/// which is no kick and which the VMM doesn't see (see `kvmfault_vcpu_options.kick_signal`). Two
/// limits. Before Linux 6.2, and wherever the vCPU sleeps in a copy that KVM makes (an instruction
/// that it emulates: all of CPL 0 on a KVM without hardware virtualisation), the call waits until
/// the page is brought or lost; in such a copy the vCPU's thread uses a CPU meanwhile. And a VMM
/// that does the ioctl itself (`kvmfault_memslot_prepare`) waits likewise: it kicks its vCPUs and
/// keeps them out of KVM_RUN until the ioctl has returned, or does the ioctl on a thread that may
/// wait.
///
/// On an error nothing has changed. Deleting a slot wakes whoever waits for its pages; memory that no other slot shows becomes ordinary
/// memory again, in which absent pages read as zeros (see KVMFAULT_MEMSLOT_KEEP). With `block_hva` that is all of the block's memory, when
/// the last slot that shows a part of it is deleted.
///
/// When a slot has been deleted, or replaced by one on other memory, the library no longer touches that memory: the VMM
/// may unmap it or use it for something else as soon as this call has returned. The call waits for
/// threads that are inside a system call on that memory, in `kvmfault_vcpu_run` or in a call on its
/// pages; later ones do nothing (-ENOENT). What remains for the VMM to do:
///
/// - A resolver call for one of the pages may still be under way, or begin just now. The library
///   refuses its installs with -ENOENT, but what the resolver itself writes at `fault->hva` or to the
///   memory's file is not the library's.
/// - An install whose source doesn't answer is waited for one second. It can't reach the memory
///   unless that is registered with a userfaultfd again. Setting a slot there is -EBUSY until the
///   install has ended; with a userfaultfd of its own the VMM waits until the install has returned.
/// - A vCPU inside KVM_RUN uses the memory until KVM knows that the slot is gone: with
///   `kvmfault_memslot_prepare`, until the VMM's own ioctl has returned.
///
/// Private memory of a deleted slot can be set again when it has been dropped (MADV_DONTNEED) and no
/// thread touches it until this has returned. A thread that waited for a page of the deleted slot
/// goes on after the deleting call has returned: what it reads then is a page of zeros, which is
/// content (-EEXIST). So wait for such threads before the memory is dropped.
///
/// Errors: -EINVAL (an argument; the message names it), -EEXIST (the guest range overlaps another slot, or there is content already that
/// can't be hidden: in private memory, in memory that is locked, and in any before Linux 5.14), -EFAULT and -EACCES (hva isn't mapped, or
/// not readable and writable), -EBADF (`fd` is closed), -EBUSY (the memory is registered with another userfaultfd, or an install that
/// began under an earlier slot has not ended there), -ENOENT (deleting what
/// is not set), -EOPNOTSUPP (the forced mechanism can't serve this memory), -ESHUTDOWN (the VM was freed meanwhile), the errno of reader
/// threads that can't read (see `kvmfault_vm_new`), or KVM's errno. Any thread; calls take turns; not from callbacks.
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

/// The same for a VMM that does its own ioctl: registers the slot and fills in *region with what KVM is to be told. From then on the
/// library takes the slot for set. To delete (also before a slot is set anew on other memory): first KVM, then this with `len` 0. If the VMM's ioctl fails, undo with `len` 0.
///
/// Errors as `kvmfault_memslot_set`. Any thread; calls take turns; not from callbacks.
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
            guest_phys_addr: told.gpa,
            memory_size: told.len,
            userspace_addr: told.hva,
            userfault_bitmap: told.bitmap,
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
        gpa: slot.gpa,
        len: slot.len,
        hva: slot.hva as u64,
        host,
        memory,
        file: (slot.fd != -1).then_some((slot.fd, slot.fd_offset)),
        vcpu_only: slot.flags & KVMFAULT_MEMSLOT_VCPU_ONLY != 0,
        present: slot.flags & KVMFAULT_MEMSLOT_PRESENT != 0,
        keep: slot.flags & KVMFAULT_MEMSLOT_KEEP != 0,
        slow: slot.flags & KVMFAULT_MEMSLOT_SLOW != 0,
    })
}

/// Turns the fast path of a slot on (1) or off (0) while vCPUs run, as post-copy does when it begins and ends. Off, absent pages are still
/// brought, by classic userfaultfd. `slot` is KVM's number (address space in bits 16-31). With the mechanism `userfaultfd` there is no
/// fast path, and this does nothing.
///
/// With KVMFAULT_VM_EXTERNAL_UFFD, off is the end of a post-copy: when this has returned 0, no thread is in a resolver call any more for a page of
/// the slot's memory that is there (one may have been on its way while the last pages came); if all are, what the resolver looks at can be put
/// away. So don't hold a lock that the resolver takes. -EBUSY: a page is missing (`poison-trap` only), or such a call has not returned for ten
/// seconds (the fast path is off then; call again).
///
/// A vCPU that sleeps for a page doesn't hold it up, with the limits that `kvmfault_memslot_set`
/// names.
///
/// Errors: -ENOENT (no such slot), -EINVAL (`on`), or KVM's errno. Any thread; calls take turns; not from callbacks.
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

/// The mechanism of one slot: KVMFAULT_MECHANISM_*, or -ENOENT. Any thread.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_memslot_mechanism(vm: *const kvmfault_vm, slot: u32) -> c_int {
    with("kvmfault_memslot_mechanism", vm, |vm| Ok(vm.slot_mechanism(slot)?.number()))
}
