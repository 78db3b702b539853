//! A memslot as the VMM asks for it.

use super::kinds::MemoryKind;
use crate::kernel::address::Gpa;
use crate::kernel::host_memory::HostMemory;
use crate::kernel::kvm;
use crate::vm::memslots::SlotRequest;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A memslot: what `KVM_SET_USER_MEMORY_REGION` takes, and what the library has to know of the
/// memory. For [`Vm::set_memslot`](crate::Vm::set_memslot).
///
/// ```no_run
/// use kvmfault::{HostMemory, Memslot};
///
/// # fn memory() -> (*mut u8, usize) { unimplemented!() }
/// # let (start, len) = memory();
/// // SAFETY: it stays mapped until its memslot is deleted, and no reference to it is ever made.
/// let memory = unsafe { HostMemory::new(start, len) };
/// let slot = Memslot::new(0, 0x4000_0000, &memory).log_dirty_pages();
/// ```
#[derive(Debug, Clone)]
#[must_use = "a memslot is set with Vm::set_memslot"]
pub struct Memslot<'a> {
    number: u32,
    gpa: u64,
    memory: &'a HostMemory,
    offset: u64,
    len: u64,
    kvm_flags: u32,
    kind: Option<MemoryKind>,
    file: Option<(BorrowedFd<'a>, u64)>,
    vcpu_only: bool,
    present: bool,
    slow: bool,
}

impl<'a> Memslot<'a> {
    /// All of `memory`, at guest physical address `gpa`. `number` is KVM's: the id in bits 0-15,
    /// the address space in bits 16-31. All pages are absent at the start (but see
    /// [`present`](Self::present)).
    pub fn new(number: u32, gpa: u64, memory: &'a HostMemory) -> Memslot<'a> {
        Memslot {
            number,
            gpa,
            memory,
            offset: 0,
            len: memory.size(),
            kvm_flags: 0,
            kind: None,
            file: None,
            vcpu_only: false,
            present: false,
            slow: false,
        }
    }

    /// Only a part of the memory: `len` bytes from `offset` on. Page states belong to the memory,
    /// so that several memslots may be windows of it.
    pub fn window(self, offset: u64, len: u64) -> Memslot<'a> {
        Memslot { offset, len, ..self }
    }

    /// Sets `KVM_MEM_LOG_DIRTY_PAGES`.
    pub fn log_dirty_pages(self) -> Memslot<'a> {
        Memslot { kvm_flags: self.kvm_flags | kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES, ..self }
    }

    /// Sets `KVM_MEM_READONLY`. (With [`PoisonTrap`](crate::Mechanism::PoisonTrap) the kernel does
    /// not tell where in read-only memory a fault is: the first fault there fetches all that is
    /// absent in it.)
    pub fn read_only(self) -> Memslot<'a> {
        Memslot { kvm_flags: self.kvm_flags | kvm_bindings::KVM_MEM_READONLY, ..self }
    }

    /// Declares what the memory is; the library checks it. Without, it accepts what it finds.
    /// Needed where `/proc/self/maps` can't be read and the memory is several mappings side by
    /// side.
    pub fn kind(self, kind: MemoryKind) -> Memslot<'a> {
        Memslot { kind: Some(kind), ..self }
    }

    /// The file that the memory is a shared mapping of, and where in it the memory begins. Needed
    /// for [`PoisonTrap`](crate::Mechanism::PoisonTrap) on shared hugetlb memory.
    pub fn file(self, file: BorrowedFd<'a>, offset: u64) -> Memslot<'a> {
        Memslot { file: Some((file, offset)), ..self }
    }

    /// Declares that nothing but vCPUs touches absent pages of this memory: no thread of the VMM,
    /// no system call, no device. Lets [`PoisonTrap`](crate::Mechanism::PoisonTrap) work on private
    /// anonymous memory. A thread that touches an absent page all the same gets SIGBUS.
    pub fn vcpu_only(self) -> Memslot<'a> {
        Memslot { vcpu_only: true, ..self }
    }

    /// All pages are present at the start: [`Vm::discard`](crate::Vm::discard) makes absent those
    /// that are to be fetched.
    pub fn present(self) -> Memslot<'a> {
        Memslot { present: true, ..self }
    }

    /// Starts with the fast path off: see [`Vm::set_fast_only`](crate::Vm::set_fast_only).
    pub fn slow(self) -> Memslot<'a> {
        Memslot { slow: true, ..self }
    }

    pub(super) fn request(&self) -> SlotRequest {
        SlotRequest {
            slot: self.number,
            kvm_flags: self.kvm_flags,
            gpa: Gpa(self.gpa),
            len: self.len,
            hva: self.memory.address().saturating_add(self.offset),
            host: self.memory.clone(),
            memory: MemoryKind::declared(self.kind),
            file: self.file.map(|(fd, offset)| (fd.as_raw_fd(), offset)),
            vcpu_only: self.vcpu_only,
            present: self.present,
            keep: false,
            slow: self.slow,
        }
    }
}

/// What a VMM that does its own ioctl passes to KVM: see
/// [`Vm::prepare_memslot`](crate::Vm::prepare_memslot).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Region {
    /// 1: `KVM_SET_USER_MEMORY_REGION` is enough. 2: `KVM_SET_USER_MEMORY_REGION2` is needed.
    pub ioctl_version: u32,
    /// KVM's number of the memslot.
    pub slot: u32,
    /// KVM's flags: the memslot's own and the fast-only flag.
    pub flags: u32,
    /// Guest physical address.
    pub guest_phys_addr: u64,
    /// Bytes; 0 deletes the memslot.
    pub memory_size: u64,
    /// The address to give to KVM: the memory's own, or the library's private alias of it.
    pub userspace_addr: u64,
    /// For the KVM Userfault ABI: goes to the field of that name; otherwise 0.
    pub userfault_bitmap: u64,
}

impl Region {
    pub(super) fn from_kvm(region: kvm::Region) -> Region {
        Region {
            ioctl_version: region.version,
            slot: region.slot,
            flags: region.flags,
            guest_phys_addr: region.gpa.0,
            memory_size: region.len,
            userspace_addr: region.hva.0,
            userfault_bitmap: region.bitmap.0,
        }
    }
}
