//! A range of host memory with the states of its pages.

use super::gates::GATE_PAGES;
use super::pages::{Pages, State};
use super::phase::{AtomicPhase, Phase};
use crate::error::Result;
use crate::kernel::address::Hva;
use crate::kernel::host_memory::{Area, HostMemory};
use crate::kernel::mem::{Kind, Mapping};
use crate::kernel::page::page_size;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What a block is made from.
pub struct Shape {
    /// The VMM's mapping.
    pub memory: HostMemory,
    /// The size of a page in bytes: the least that one install makes PRESENT.
    pub page: u64,
    /// The kind of memory.
    pub kind: Kind,
    /// The index of its mechanism in `mechanism::MECHANISMS`.
    pub mechanism: usize,
}

/// A block of host memory.
#[derive(Debug)]
pub struct Block {
    /// The VMM's mapping.
    memory: HostMemory,
    /// The first address in the VMM's mapping.
    pub hva: Hva,
    /// The length in bytes.
    pub len: u64,
    /// The size of a page in bytes.
    pub page: u64,
    /// The kind of memory.
    pub kind: Kind,
    /// The index of its mechanism in `mechanism::MECHANISMS`.
    pub mechanism: usize,
    /// The state of each page.
    pub pages: Pages,
    /// A second mapping of the memory, which KVM uses instead of the VMM's own.
    pub alias: Option<Mapping>,
    /// Whether pages may be missing, and whether markers may be in their place.
    pub phase: AtomicPhase,
    /// The bitmap of KVM Userfault: one bit for each base page; a set bit makes KVM_RUN exit.
    bitmap: Option<Mapping>,
    /// One bit for each page: it is PRESENT, and the alias still has its marker (see
    /// `arrive::install_arrived`).
    deferred: Option<Mapping>,
    /// KVM may have a slot of this block, and with it the addresses of the alias and of the bitmap.
    pub in_kvm: AtomicBool,
}

impl Block {
    /// A block whose pages are all ABSENT, or all PRESENT.
    pub fn new(shape: Shape, alias: Option<Mapping>, bitmap: bool, present: bool) -> Result<Block> {
        let Shape { memory, page, kind, mechanism } = shape;
        let (hva, len) = (memory.address(), memory.size());
        let pages = Pages::new(len / page)?;
        let bitmap = match bitmap {
            true => Some(Mapping::anonymous(
                (len / page_size()).div_ceil(64).wrapping_mul(8).next_multiple_of(page_size()),
            )?),
            false => None,
        };
        if present {
            pages.fill(State::Present);
        } else if let Some(bitmap) = &bitmap {
            bitmap.atomics().iter().for_each(|word| word.store(!0, Ordering::Release));
        }
        Ok(Block {
            memory,
            hva,
            len,
            page,
            kind,
            mechanism,
            pages,
            alias,
            phase: AtomicPhase::new(Phase::Unmarked),
            bitmap,
            deferred: None,
            in_kvm: AtomicBool::new(false),
        })
    }

    /// Allows pages to be PRESENT before they are mapped in the alias.
    pub fn with_deferral(mut self) -> Result<Block> {
        let deferred = Mapping::anonymous((self.pages.len().div_ceil(64) * 8).next_multiple_of(page_size()))?;
        self.deferred = Some(deferred);
        Ok(self)
    }

    /// The block's first address in the mapping that KVM uses.
    pub fn kvm_hva(&self) -> Hva {
        self.alias.as_ref().map_or(self.hva, Mapping::address)
    }

    /// Memory of the VMM's mapping, or of the alias: what the library may change.
    #[inline]
    pub fn area(&self, hva: Hva, len: u64) -> Area<'_> {
        let in_alias = || self.alias.as_ref()?.area(hva, len);
        match self.memory.area(hva, len).or_else(in_alias) {
            Some(area) => area,
            None => self.is_outside(hva, len),
        }
    }

    #[cold]
    fn is_outside(&self, hva: Hva, len: u64) -> ! {
        panic!("[{hva:#x}, +{len:#x}) is not memory of the block at {:#x}", self.hva)
    }

    /// All of the VMM's mapping.
    pub fn whole(&self) -> Area<'_> {
        self.memory.whole()
    }

    /// The page at an address of the VMM's mapping or of the alias.
    pub fn page_at(&self, hva: Hva) -> Option<u64> {
        let inside = |start: Hva| Some(hva.wrapping_sub(start)).filter(|&offset| offset < self.len);
        let offset = inside(self.hva).or_else(|| self.alias.as_ref().and_then(|a| inside(a.address())))?;
        Some(offset / self.page)
    }

    /// The block's pages in a range of addresses of the VMM's mapping, those at its edges that are
    /// only partly in the range included.
    pub fn pages_in(&self, range: &Range<Hva>) -> Range<u64> {
        let start = range.start.saturating_sub(self.hva) / self.page;
        let end = range.end.saturating_sub(self.hva).div_ceil(self.page).min(self.pages.len());
        start.min(end)..end
    }

    /// The address of a page in the VMM's mapping.
    pub fn hva_of(&self, page: u64) -> Hva {
        self.hva + page * self.page
    }

    /// The address of a page in the mapping that KVM uses.
    pub fn kvm_hva_of(&self, page: u64) -> Hva {
        self.kvm_hva() + page * self.page
    }

    /// The address of a page in the alias.
    pub fn alias_of(&self, page: u64) -> Option<Hva> {
        self.alias.as_ref().map(|a| a.address() + page * self.page)
    }

    /// The gate that installs and discards of a page enter: one gate for a group of pages.
    pub fn gate_of(&self, page: u64) -> Hva {
        self.hva_of(page / GATE_PAGES * GATE_PAGES)
    }

    /// May absent pages carry poison markers?
    pub fn is_marked(&self) -> bool {
        self.phase.is_marked()
    }

    /// Leaves the mapping of a page in the alias for later; false if this block does not defer.
    pub fn defer(&self, page: u64) -> bool {
        let Some(deferred) = &self.deferred else { return false };
        deferred.atomics()[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::SeqCst);
        true
    }

    /// Is the mapping of this page in the alias left for later?
    pub fn is_deferred(&self, page: u64) -> bool {
        let word = |d: &Mapping| d.atomics()[(page / 64) as usize].load(Ordering::SeqCst);
        self.deferred.as_ref().is_some_and(|d| word(d) >> (page % 64) & 1 != 0)
    }

    /// Ends the deferral of pages in a range that lies within one word of 64 pages. Returns those
    /// that were deferred: one bit for each, counted from the word's first page.
    fn take_deferred(&self, pages: Range<u64>) -> u64 {
        let Some(deferred) = &self.deferred else { return 0 };
        let mask = (!0u64 >> (64 - (pages.end - pages.start))) << (pages.start % 64);
        deferred.atomics()[(pages.start / 64) as usize].fetch_and(!mask, Ordering::SeqCst) & mask
    }

    /// The pages whose deferral bits share a word with this page's.
    pub fn word_of(&self, page: u64) -> Range<u64> {
        page / 64 * 64..self.pages.len().min(page / 64 * 64 + 64)
    }

    /// Ends the deferral of pages in a range. Returns runs of those that were deferred.
    pub fn take_deferred_runs(&self, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        (pages.start / 64..pages.end.div_ceil(64)).flat_map(move |word| {
            let first = word * 64;
            let mut bits = self.take_deferred(first.max(pages.start)..(first + 64).min(pages.end));
            std::iter::from_fn(move || {
                let start = (bits != 0).then(|| bits.trailing_zeros() as u64)?;
                let len = (bits >> start).trailing_ones() as u64;
                bits &= !((!0u64 >> (64 - len)) << start);
                Some(first + start..first + start + len)
            })
        })
    }

    /// Is the block's memory the VMM's again?
    #[inline]
    pub fn is_gone(&self) -> bool {
        self.phase.is_retired()
    }

    /// The address in KVM Userfault's bitmap that belongs to a byte offset; 0 without a bitmap.
    pub fn bitmap_at(&self, offset: u64) -> Hva {
        self.bitmap.as_ref().map_or(Hva(0), |b| b.address() + offset / page_size() / 8)
    }

    /// Sets (`exits`) or clears the bits of pages in KVM's bitmap, before the pages become absent
    /// or PRESENT; with release order, as the patch series asks.
    pub fn set_exits(&self, pages: Range<u64>, exits: bool) {
        let Some(bitmap) = &self.bitmap else { return };
        let words = bitmap.atomics();
        let per_page = self.page / page_size();
        let mut bit = pages.start * per_page;
        let end = pages.end * per_page;
        while bit < end {
            let count = (64 - bit % 64).min(end - bit);
            let mask = (!0u64 >> (64 - count)) << (bit % 64);
            set_bits(&words[(bit / 64) as usize], mask, exits);
            bit += count;
        }
    }
}

impl Drop for Block {
    /// KVM keeps a slot until its VM is freed, which may be long after the library's VM, and
    /// unnoticed. Until then nothing else may be mapped at the addresses that KVM knows: those of
    /// the memory and of the bitmap. The memory itself is freed.
    fn drop(&mut self) {
        if self.in_kvm.load(Ordering::SeqCst) {
            self.alias.take().into_iter().chain(self.bitmap.take()).for_each(Mapping::keep_addresses);
        }
    }
}

fn set_bits(word: &AtomicU64, mask: u64, on: bool) {
    if on {
        word.fetch_or(mask, Ordering::AcqRel);
    } else {
        word.fetch_and(!mask, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bitmap_follows_in_base_pages() {
        let shape = Shape {
            memory: HostMemory::for_test(Hva(0x20_0000), 8 << 20),
            page: 2 << 20,
            kind: Kind::HugetlbShared,
            mechanism: 0,
        };
        let block = Block::new(shape, None, true, false).unwrap();
        block.set_exits(1..2, false);
        // A huge page's words in the bitmap, which has a bit for each base page.
        let each = ((2 << 20) / page_size() / 64) as usize;
        let words: Vec<u64> =
            block.bitmap.as_ref().unwrap().atomics()[..4 * each].iter().map(|w| w.load(Ordering::Relaxed)).collect();
        assert!(words[..each].iter().all(|&w| w == !0) && words[each..2 * each].iter().all(|&w| w == 0));
        block.set_exits(1..2, true);
        assert_eq!(block.bitmap_at(2 << 20), block.bitmap.as_ref().unwrap().address() + 8 * each as u64);
        let shape = Shape {
            memory: HostMemory::for_test(Hva(page_size()), 256 * page_size()),
            page: page_size(),
            kind: Kind::Anon,
            mechanism: 0,
        };
        let block = Block::new(shape, None, true, false).unwrap();
        block.set_exits(60..70, false);
        assert_eq!(block.bitmap.as_ref().unwrap().atomics()[0].load(Ordering::Relaxed), (1 << 60) - 1);
        assert_eq!(block.bitmap.as_ref().unwrap().atomics()[1].load(Ordering::Relaxed), !0x3f);
    }

    #[test]
    fn deferred_pages_are_taken_once_and_in_runs() {
        let shape = Shape {
            memory: HostMemory::for_test(Hva(0x1000), 200 * page_size()),
            page: page_size(),
            kind: Kind::Shared,
            mechanism: 0,
        };
        let block = Block::new(shape, None, false, true).unwrap();
        assert!(!block.defer(3) && block.take_deferred_runs(0..200).count() == 0, "not with every block");
        let block = block.with_deferral().unwrap();
        for page in [0, 1, 5, 62, 63, 64, 65, 127, 128, 199] {
            assert!(block.defer(page) && block.is_deferred(page));
        }
        assert_eq!(block.take_deferred_runs(1..64).collect::<Vec<_>>(), [1..2, 5..6, 62..64]);
        assert_eq!(block.take_deferred_runs(60..129).collect::<Vec<_>>(), [64..66, 127..128, 128..129]);
        assert_eq!(block.take_deferred_runs(0..200).collect::<Vec<_>>(), [0..1, 199..200]);
        assert_eq!(block.take_deferred_runs(0..200).count(), 0);
        assert_eq!((block.word_of(63), block.word_of(64), block.word_of(199)), (0..64, 64..128, 192..200));
    }

    #[test]
    fn addresses_of_both_mappings_name_the_same_page() {
        let alias = Mapping::anonymous(4 * page_size()).unwrap();
        let at = alias.address();
        let shape = Shape {
            memory: HostMemory::for_test(Hva(page_size()), 4 * page_size()),
            page: page_size(),
            kind: Kind::Shared,
            mechanism: 0,
        };
        let block = Block::new(shape, Some(alias), false, true).unwrap();
        let in_page_2 = 2 * page_size() + 0xabc;
        assert_eq!((block.page_at(Hva(page_size()) + in_page_2), block.page_at(at + in_page_2)), (Some(2), Some(2)));
        assert_eq!((block.page_at(Hva(page_size() - 1)), block.page_at(Hva(5 * page_size()))), (None, None));
        assert_eq!(block.pages.get(3), State::Present);
    }

    #[test]
    fn what_kvm_has_an_address_of_stays_there_inaccessible() {
        use crate::kernel::mem::{mappings, read};
        for in_kvm in [true, false] {
            let alias = Mapping::anonymous(4 * page_size()).unwrap();
            let at = alias.address();
            let shape = Shape {
                memory: HostMemory::for_test(Hva(0x1000), 4 * page_size()),
                page: page_size(),
                kind: Kind::Shared,
                mechanism: 0,
            };
            let block = Block::new(shape, Some(alias), true, false).unwrap();
            let bitmap = block.bitmap_at(0);
            block.in_kvm.store(in_kvm, Ordering::SeqCst);
            drop(block);
            if in_kvm {
                for (start, len) in [(at, 4 * page_size()), (bitmap, page_size())] {
                    assert!(mappings(start, len).is_ok(), "something else may come there");
                    assert_eq!(read(start, &mut [0]).unwrap_err().errno, libc::EFAULT);
                }
            }
        }
    }
}
