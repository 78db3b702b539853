//! Memory that the library may change: what the VMM has lent it, and mappings of the library's own.
//! Nothing else is ever given to madvise(2), mprotect(2), userfaultfd or KVM, nor written: their
//! functions take an [`Area`], which only the two give out.

use super::address::Hva;
use super::mem::Mapping;
use std::marker::PhantomData;

/// Guest memory in this process, lent to the library for memslots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostMemory {
    hva: Hva,
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
    /// - Nothing else relies on its bytes: setting a memslot may drop them.
    pub unsafe fn new(start: *mut u8, len: usize) -> HostMemory {
        HostMemory { hva: Hva(start as u64), len: len as u64 }
    }

    /// No memory.
    pub(crate) fn none() -> HostMemory {
        HostMemory { hva: Hva(0), len: 0 }
    }

    /// Memory at an address of no meaning, for tests that never touch it; or at that of a mapping
    /// that outlives it.
    #[cfg(test)]
    pub(crate) fn for_test(hva: Hva, len: u64) -> HostMemory {
        HostMemory { hva, len }
    }

    /// Its first byte.
    pub(crate) fn address(&self) -> Hva {
        self.hva
    }

    /// Its length in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.len
    }

    /// The part that begins at an address and has `len` bytes; `None` if it isn't inside.
    #[inline]
    pub(crate) fn area(&self, hva: Hva, len: u64) -> Option<Area<'_>> {
        Area::within(self.hva, self.len, hva, len)
    }

    /// All of it.
    pub(crate) fn whole(&self) -> Area<'_> {
        Area { hva: self.hva, len: self.len, memory: PhantomData }
    }
}

impl Mapping {
    /// The part that begins at an address and has `len` bytes; `None` if it isn't inside.
    #[inline]
    pub fn area(&self, hva: Hva, len: u64) -> Option<Area<'_>> {
        Area::within(self.address(), self.size(), hva, len)
    }

    /// All of it.
    pub fn whole(&self) -> Area<'_> {
        Area { hva: self.address(), len: self.size(), memory: PhantomData }
    }
}

/// A range of memory that the library may change.
#[derive(Debug, Clone, Copy)]
pub struct Area<'m> {
    hva: Hva,
    len: u64,
    memory: PhantomData<&'m ()>,
}

impl<'m> Area<'m> {
    #[inline]
    fn within(start: Hva, size: u64, hva: Hva, len: u64) -> Option<Area<'m>> {
        let offset = hva.wrapping_sub(start);
        (offset <= size && len <= size - offset).then_some(Area { hva, len, memory: PhantomData })
    }

    /// Its first byte.
    #[inline]
    pub fn hva(self) -> Hva {
        self.hva
    }

    /// Its length in bytes.
    #[inline]
    pub fn len(self) -> u64 {
        self.len
    }

    /// Its first `len` bytes, or all of it if it has less.
    #[inline]
    pub fn first(self, len: u64) -> Area<'m> {
        Area { len: len.min(self.len), ..self }
    }

    /// What follows its first `len` bytes.
    #[inline]
    pub fn after(self, len: u64) -> Area<'m> {
        let skipped = len.min(self.len);
        Area { hva: self.hva + skipped, len: self.len - skipped, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_area_lies_inside() {
        let memory = HostMemory::for_test(Hva(0x1000), 0x3000);
        let area = |hva, len| memory.area(Hva(hva), len).map(|a| (a.hva().0, a.len()));
        assert_eq!(area(0x1000, 0x3000), Some((0x1000, 0x3000)));
        assert_eq!(area(0x4000, 0), Some((0x4000, 0)));
        for (hva, len) in [(0xfff, 1), (0x1000, 0x3001), (0x4000, 1), (0x2000, u64::MAX), (u64::MAX, 2), (0, 0)] {
            assert_eq!(area(hva, len), None, "{hva:#x} {len:#x}");
        }
        let part = |a: Area<'_>| (a.hva().0, a.len());
        assert_eq!(part(memory.whole().after(0x1000).first(0x1000)), (0x2000, 0x1000));
        assert_eq!(part(memory.whole().after(0x9000).first(0x1000)), (0x4000, 0));
    }
}
