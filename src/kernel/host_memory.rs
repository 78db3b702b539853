//! Guest memory that the VMM has lent to the library.

/// Guest memory in this process, lent to the library for memslots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostMemory {
    hva: u64,
    len: u64,
}

impl HostMemory {
    /// Lends `len` bytes from `start` on, mapped by this process, to the library: as the memory of
    /// [`Memslot`](crate::Memslot)s. This is the one promise that the crate needs; all that follows
    /// from it is checked.
    ///
    /// Nothing is looked at yet: [`Vm::set_memslot`](crate::Vm::set_memslot) says what is wrong
    /// with memory that does not suit (not mapped, read-only, of two kinds, or misaligned).
    ///
    /// # Safety
    /// While a memslot is set that is made of this memory (or of a clone), these hold for all of
    /// it. That time begins with `set_memslot` or `prepare_memslot`. It ends when
    /// [`Vm::delete_memslot`](crate::Vm::delete_memslot) or
    /// [`Vm::prepare_deletion`](crate::Vm::prepare_deletion) has returned for the last such
    /// memslot; or, for memslots that are never deleted, when [`Vm::close`](crate::Vm::close) has
    /// returned `Ok`, all other calls on the VM have returned, and KVM has destroyed its VM.
    /// - It stays mapped as it is: it is not unmapped, nor is anything else mapped in its place.
    /// - No reference of Rust's to it exists (`&[u8]`, `&mut T`, slices of vm-memory), unless it is
    ///   to atomics or another `UnsafeCell`. The guest, the kernel and the library change its bytes
    ///   at any time, and take pages away. Raw pointers with volatile accesses are fine.
    /// - Nobody depends on its bytes: setting a memslot may drop what is in its pages.
    pub unsafe fn new(start: *mut u8, len: usize) -> HostMemory {
        HostMemory { hva: start as u64, len: len as u64 }
    }

    /// No memory.
    pub(crate) fn none() -> HostMemory {
        HostMemory { hva: 0, len: 0 }
    }

    /// Memory at an address of no meaning, for tests that never touch it; or at that of a mapping
    /// that outlives it.
    #[cfg(test)]
    pub(crate) fn for_test(hva: u64, len: u64) -> HostMemory {
        HostMemory { hva, len }
    }

    /// Its first byte.
    pub(crate) fn address(&self) -> u64 {
        self.hva
    }

    /// Its length in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.len
    }
}
