//! Memslots: from guest physical addresses to blocks, by KVM's key (address space, id).

use super::block::Block;
use super::pages::State;
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::kvm::Region;
use std::ops::Range;
use std::sync::Arc;

/// A window of a block that the guest sees.
#[derive(Debug, Clone)]
pub struct Slot {
    /// What KVM was told. The address is the alias's if the block has one.
    pub region: Region,
    /// The block that the slot shows.
    pub block: Arc<Block>,
    /// Where the slot begins in the block, in bytes.
    pub offset: u64,
    /// Is the fast path on?
    pub fast_only: bool,
}

impl Slot {
    /// KVM's address space: 0, or 1 for system management mode.
    pub fn space(&self) -> u32 {
        self.region.slot >> 16
    }

    /// Is the slot read-only for the guest?
    pub fn is_readonly(&self) -> bool {
        self.region.flags & kvm_bindings::KVM_MEM_READONLY != 0
    }

    /// Does the slot hold this guest physical address?
    pub fn holds(&self, gpa: Gpa) -> bool {
        gpa.wrapping_sub(self.region.gpa) < self.region.len
    }

    /// The block's page that holds a guest physical address.
    pub fn page_of(&self, gpa: Gpa) -> u64 {
        (gpa - self.region.gpa + self.offset) / self.block.page
    }

    /// The guest physical address of a block's page.
    pub fn gpa_of(&self, page: u64) -> Gpa {
        self.region.gpa + (page * self.block.page - self.offset)
    }

    /// A guest physical address in the VMM's mapping.
    pub fn vmm_hva(&self, gpa: Gpa) -> Hva {
        self.block.hva + (gpa - self.region.gpa + self.offset)
    }

    /// A guest physical address in the mapping that KVM uses.
    #[allow(dead_code)] // used where KVM has an instruction emulator
    pub fn kvm_hva(&self, gpa: Gpa) -> Hva {
        self.block.kvm_hva() + (gpa - self.region.gpa + self.offset)
    }

    /// The block's pages that the slot covers.
    pub fn pages(&self) -> std::ops::Range<u64> {
        self.offset / self.block.page..(self.offset + self.region.len) / self.block.page
    }

    fn covers(&self, page: u64) -> bool {
        self.pages().contains(&page)
    }
}

/// All slots and blocks of a VM at one moment.
#[derive(Debug, Default, Clone)]
pub struct Slots {
    /// All slots, sorted by address space and gpa.
    slots: Vec<Arc<Slot>>,
    /// All slots, sorted by their address in the mapping that KVM uses.
    by_kvm_hva: Vec<Arc<Slot>>,
    /// Blocks that are in use or kept, sorted by hva.
    blocks: Vec<Arc<Block>>,
}

impl Slots {
    /// The slot of a guest physical address in an address space.
    pub fn at(&self, space: u32, gpa: Gpa) -> Option<&Arc<Slot>> {
        let after = self.slots.partition_point(|s| (s.space(), s.region.gpa) <= (space, gpa));
        let slot = &self.slots[after.checked_sub(1)?];
        (slot.space() == space && slot.holds(gpa)).then_some(slot)
    }

    /// The slot of an address, in the first address space that has one there.
    pub fn at_any(&self, gpa: Gpa) -> Option<&Arc<Slot>> {
        self.at(0, gpa).or_else(|| self.slots.iter().find(|s| s.holds(gpa)))
    }

    /// The parts of a range of guest physical addresses that are in slots, from the lowest up: each
    /// address in the slot that `at_any` finds for it.
    pub fn parts_of(&self, gpas: Range<Gpa>) -> Vec<(&Arc<Slot>, Range<Gpa>)> {
        let clip = |s: &Arc<Slot>| s.region.gpa.max(gpas.start)..(s.region.gpa + s.region.len).min(gpas.end);
        let parts: Vec<_> = self.slots.iter().map(clip).filter(|part| !part.is_empty()).collect();
        // Where slots begin and end, and by how much the number of slots changes that hold the
        // addresses from there on.
        let mut edges: Vec<_> = parts.iter().flat_map(|part| [(part.start, 1i64), (part.end, -1)]).collect();
        edges.sort_by_key(|&(gpa, _)| gpa);
        let mut held = 0;
        let between = edges.windows(2).filter_map(|edge| {
            held += edge[0].1;
            let part = edge[0].0..edge[1].0;
            (held > 0 && !part.is_empty()).then(|| Some((self.at_any(part.start)?, part))).flatten()
        });
        between.collect()
    }

    /// The slot that KVM maps from this address of this process.
    pub fn at_kvm_hva(&self, hva: Hva) -> Option<&Arc<Slot>> {
        let after = self.by_kvm_hva.partition_point(|s| s.region.hva <= hva);
        self.by_kvm_hva[..after].iter().rev().find(|s| hva - s.region.hva < s.region.len)
    }

    /// The block and the page of an address in either mapping.
    pub fn at_hva(&self, hva: Hva) -> Option<(&Arc<Block>, u64)> {
        let after = self.blocks.partition_point(|b| b.hva <= hva);
        let own = after.checked_sub(1).map(|n| &self.blocks[n]);
        let found = |b: &Arc<Block>| b.page_at(hva).is_some();
        let block = own.filter(|b| found(b)).or_else(|| self.blocks.iter().find(|b| found(b)))?;
        Some((block, block.page_at(hva)?))
    }

    /// The address and the state of the first page in a host range that belongs to a block and is
    /// not PRESENT.
    pub fn not_present_in(&self, hva: Hva, len: u64) -> Option<(Hva, State)> {
        let end = hva.saturating_add(len);
        let before_end = self.blocks.partition_point(|b| b.hva < end);
        let touched = self.blocks[..before_end].iter().rev().take_while(|b| hva < b.hva + b.len);
        let absent = touched.filter_map(|b| {
            let last = (end.min(b.hva + b.len) - b.hva - 1) / b.page;
            let mut pages = hva.saturating_sub(b.hva) / b.page..last + 1;
            pages.find_map(|page| match b.pages.get(page) {
                State::Present => None,
                state => Some((b.hva_of(page), state)),
            })
        });
        absent.last()
    }

    /// A slot that shows a block's page to the guest.
    pub fn showing(&self, block: &Block, page: u64) -> Option<&Arc<Slot>> {
        self.slots.iter().find(|s| std::ptr::eq(&*s.block, block) && s.covers(page))
    }

    /// The slot with KVM's number.
    pub fn numbered(&self, slot: u32) -> Option<&Arc<Slot>> {
        self.slots.iter().find(|s| s.region.slot == slot)
    }

    /// Another slot of the same address space that overlaps in guest memory.
    pub fn overlapping(&self, region: &Region) -> Option<&Arc<Slot>> {
        self.slots.iter().find(|s| {
            s.region.slot != region.slot
                && s.space() == region.slot >> 16
                && s.region.gpa < region.gpa + region.len
                && region.gpa < s.region.gpa + s.region.len
        })
    }

    /// Blocks that overlap a host range.
    pub fn blocks_in(&self, hva: Hva, len: u64) -> impl Iterator<Item = &Arc<Block>> {
        self.blocks.iter().filter(move |b| b.hva < hva + len && hva < b.hva + b.len)
    }

    /// All slots.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.slots.iter()
    }

    /// All blocks.
    pub fn blocks(&self) -> impl Iterator<Item = &Arc<Block>> {
        self.blocks.iter()
    }

    /// These slots with one more, or with another one of its number. `keep` keeps the block of the
    /// slot that is replaced, for as long as KVM may refuse the new one.
    pub fn with(&self, slot: Slot, keep: bool) -> Slots {
        let mut new = self.without(slot.region.slot, keep);
        if !new.blocks.iter().any(|b| Arc::ptr_eq(b, &slot.block)) {
            new.blocks.push(slot.block.clone());
        }
        new.slots.push(Arc::new(slot));
        new.sorted()
    }

    /// These slots without one; and without its block, if no other slot shows it and `keep` is
    /// false.
    pub fn without(&self, slot: u32, keep: bool) -> Slots {
        let mut new = self.clone();
        let old = self.numbered(slot).cloned();
        new.slots.retain(|s| s.region.slot != slot);
        if let (Some(old), false) = (old, keep) {
            let used = new.slots.iter().any(|s| Arc::ptr_eq(&s.block, &old.block));
            new.blocks.retain(|b| used || !Arc::ptr_eq(b, &old.block));
        }
        new.sorted()
    }

    fn sorted(mut self) -> Slots {
        self.slots.sort_by_key(|s| (s.space(), s.region.gpa));
        self.by_kvm_hva.clone_from(&self.slots);
        self.by_kvm_hva.sort_by_key(|s| s.region.hva);
        self.blocks.sort_by_key(|b| b.hva);
        self
    }

    /// The number of LOST pages, and one of them.
    pub fn lost(&self) -> (u64, Option<(&Arc<Block>, u64)>) {
        let count = |b: &Arc<Block>| b.pages.count(0..b.pages.len(), State::Lost);
        let total = self.blocks.iter().map(count).sum();
        let block = self.blocks.iter().find(|b| count(b) > 0);
        (total, block.and_then(|b| Some((b, (0..b.pages.len()).find(|&p| b.pages.get(p) == State::Lost)?))))
    }

    /// The number of pages in all blocks that are neither PRESENT nor LOST.
    pub fn absent(&self) -> u64 {
        let count = |b: &Arc<Block>, state| b.pages.count(0..b.pages.len(), state);
        self.blocks.iter().map(|b| count(b, State::Absent) + count(b, State::Resolving)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::host_memory::HostMemory;
    use crate::kernel::mem::Kind;
    use crate::kernel::page::page_size;
    use crate::memory::block::Shape;

    fn slot(number: u32, gpa: Gpa, block: &Arc<Block>, offset: u64, len: u64) -> Slot {
        let region = Region { slot: number, gpa, len, hva: block.kvm_hva() + offset, ..Default::default() };
        Slot { region, block: block.clone(), offset, fast_only: true }
    }

    fn block(hva: u64, pages: u64) -> Arc<Block> {
        let shape = Shape {
            memory: HostMemory::for_test(Hva(hva), pages * page_size()),
            page: page_size(),
            kind: Kind::Shared,
            mechanism: 0,
        };
        Arc::new(Block::new(shape, None, false, false).unwrap())
    }

    #[test]
    fn two_slots_on_one_host_range_share_page_states() {
        let ram = block(0x10_0000, 16);
        let whole_gpa = Gpa(0x4000_0000);
        let whole = slot(0, whole_gpa, &ram, 0, 16 * page_size());
        let part = slot(1 << 16, Gpa(0), &ram, 4 * page_size(), 8 * page_size());
        let slots = Slots::default().with(whole, false).with(part, false);
        assert_eq!(slots.at(0, whole_gpa + 5 * page_size()).unwrap().page_of(whole_gpa + 5 * page_size()), 5);
        assert_eq!(slots.at(1, Gpa(page_size())).unwrap().page_of(Gpa(page_size())), 5);
        assert!(slots.at(0, Gpa(page_size())).is_none() && slots.at(1, Gpa(8 * page_size())).is_none());
        assert_eq!(slots.at_any(Gpa(page_size())).unwrap().region.slot, 1 << 16);
        assert_eq!(slots.at_kvm_hva(Hva(0x10_0000) + 15 * page_size()).unwrap().region.slot, 0);
        assert_eq!((slots.absent(), slots.lost().0), (16, 0));
        ram.pages.change(9, State::Absent, State::Lost).unwrap();
        assert!(matches!(slots.lost(), (1, Some((_, 9)))));
        ram.pages.change(9, State::Lost, State::Absent).unwrap();
        let slots = slots.without(0, false);
        assert_eq!(slots.absent(), 16, "the other slot holds the block");
        assert_eq!(slots.without(1 << 16, true).absent(), 16, "kept");
        assert_eq!(slots.without(1 << 16, false).absent(), 0);
    }

    #[test]
    fn a_range_is_cut_where_slots_begin_and_end() {
        let ram = block(0x10_0000, 16);
        // All in pages.
        let at = |page: u64| Gpa(page.saturating_mul(page_size()));
        let pages = |n: u64| n * page_size();
        let slots = Slots::default()
            .with(slot(0, at(0x10), &ram, 0, pages(4)), false)
            .with(slot(1, at(0x14), &ram, pages(4), pages(4)), false)
            .with(slot(2, at(0x20), &ram, pages(8), pages(4)), false)
            .with(slot(1 << 16, at(0x12), &ram, 0, pages(16)), false);
        let parts = |start, end| -> Vec<_> {
            let parts = slots.parts_of(at(start)..at(end)).into_iter();
            parts.map(|(slot, part)| (slot.region.slot, part.start.0 / page_size(), part.end.0 / page_size())).collect()
        };
        let all = [
            (0, 0x10, 0x12),
            (0, 0x12, 0x14),
            (1, 0x14, 0x18),
            (1 << 16, 0x18, 0x20),
            (2, 0x20, 0x22),
            (2, 0x22, 0x24),
        ];
        assert_eq!(parts(0, u64::MAX), all);
        assert_eq!(parts(0x11, 0x15), [(0, 0x11, 0x12), (0, 0x12, 0x14), (1, 0x14, 0x15)]);
        assert_eq!(parts(0x24, u64::MAX), []);
        assert_eq!(parts(0, 0x10), []);
    }

    #[test]
    fn overlap_is_within_an_address_space() {
        let ram = block(0x10_0000, 16);
        let slots = Slots::default().with(slot(3, Gpa(page_size()), &ram, 0, 4 * page_size()), false);
        let region =
            |slot, page: u64| Region { slot, gpa: Gpa(page * page_size()), len: page_size(), ..Default::default() };
        assert!(slots.overlapping(&region(4, 4)).is_some());
        assert!(slots.overlapping(&region(4, 5)).is_none());
        assert!(slots.overlapping(&region(3, 4)).is_none(), "a slot may move over itself");
        assert!(slots.overlapping(&region(1 << 16 | 4, 4)).is_none());
    }
}
