//! The memory that a fill covers: all of it, or a part.

use crate::kernel::address::Hva;
use crate::memory::block::Block;
use crate::memory::pages::State;
use crate::memory::slots::Slots;
use std::ops::Range;
use std::sync::Arc;

/// Addresses in the VMM's mapping: sorted, and each of them once.
#[derive(Debug, Clone)]
pub struct Scope {
    ranges: Vec<Range<Hva>>,
}

impl Default for Scope {
    /// All memory.
    fn default() -> Scope {
        Scope { ranges: std::iter::once(Hva(0)..Hva(u64::MAX)).collect() }
    }
}

impl Scope {
    /// A scope of these addresses, in any order. Addresses that are given twice (two slots may show
    /// the same memory) count once.
    pub fn of(mut ranges: Vec<Range<Hva>>) -> Scope {
        ranges.sort_by_key(|range| range.start);
        ranges.dedup_by(|next, last| {
            let touches = next.start <= last.end;
            if touches {
                last.end = last.end.max(next.end);
            }
            touches
        });
        Scope { ranges }
    }

    /// The parts of a range of addresses that are in the scope, from the lowest up.
    pub fn within(&self, range: Range<Hva>) -> impl Iterator<Item = Range<Hva>> + '_ {
        let first = self.ranges.partition_point(|r| r.end <= range.start);
        let touched = self.ranges[first..].iter().take_while(move |r| r.start < range.end);
        touched.map(move |r| r.start.max(range.start)..r.end.min(range.end))
    }

    /// The pages in the scope, block by block.
    pub fn pages<'a>(&'a self, slots: &'a Slots) -> impl Iterator<Item = (&'a Arc<Block>, Range<u64>)> {
        let of_block = |b: &'a Arc<Block>| self.within(b.hva..b.hva + b.len).map(move |range| (b, b.pages_in(&range)));
        slots.blocks().flat_map(of_block)
    }

    /// The number of pages in the scope that are in a state.
    pub fn count(&self, slots: &Slots, state: State) -> u64 {
        self.pages(slots).map(|(block, pages)| block.pages.count(pages, state)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_twice_counts_once() {
        let given = [30..40, 0..10, 5..12, 12..13, 32..34, 50..60];
        let scope = Scope::of(given.map(|r| Hva(r.start)..Hva(r.end)).to_vec());
        let within = |scope: &Scope, range: Range<u64>| -> Vec<_> {
            let parts = scope.within(Hva(range.start)..Hva(range.end));
            parts.map(|part| part.start.0..part.end.0).collect()
        };
        assert_eq!(within(&scope, 0..u64::MAX), [0..13, 30..40, 50..60]);
        assert_eq!(within(&scope, 8..31), [8..13, 30..31]);
        assert_eq!(within(&scope, 13..30), []);
        assert_eq!(within(&scope, 55..100), vec![55..60]);
        assert_eq!(within(&Scope::default(), 8..31), vec![8..31]);
        assert_eq!(within(&Scope::of(Vec::new()), 0..u64::MAX), []);
    }
}
