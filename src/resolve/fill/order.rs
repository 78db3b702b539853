//! The order in which a fill fetches pages: first what it was given, then the memory behind each
//! vCPU's latest fault, then everything from the lowest address up.

use super::scope::Scope;
use crate::kernel::address::Hva;
use crate::memory::block::Block;
use crate::memory::Memory;
use crate::resolve::seat::Seats;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// How much of the memory behind a fault is fetched before the rest.
const NEIGHBOURHOOD: u64 = 2 << 20;

/// Pages of a block that were absent a moment ago.
#[derive(Debug)]
pub struct Piece {
    /// The block.
    pub block: Arc<Block>,
    /// The pages.
    pub pages: Range<u64>,
    /// Do they belong to what is fetched before all else?
    pub is_first: bool,
}

impl Piece {
    /// The length in bytes.
    pub fn bytes(&self) -> u64 {
        (self.pages.end - self.pages.start) * self.block.page
    }
}

/// The order of one fill. Its threads take turns with it.
#[derive(Debug, Default)]
pub struct Order {
    /// What is fetched before all else: addresses in the VMM's mapping.
    first: VecDeque<Range<Hva>>,
    /// The memory behind the latest faults.
    near: VecDeque<Range<Hva>>,
    /// The latest fault of each vCPU that was looked at.
    seen: Vec<Hva>,
    /// This pass has looked at everything below this address.
    at: Hva,
    /// Nothing but `first` is fetched.
    only_first: bool,
    /// Nothing outside of it is fetched.
    scope: Scope,
}

impl Order {
    /// An order in which `first`, addresses in the VMM's mapping, comes first; with `only` nothing
    /// else follows. What is outside of `scope` is left out.
    pub fn new(first: Vec<Range<Hva>>, only: bool, scope: Scope) -> Order {
        Order { first: first.into(), only_first: only, scope, ..Order::default() }
    }

    /// The next absent pages, at most `most` of them; None at the end of the pass.
    pub fn next(&mut self, memory: &Memory, seats: &Seats, most: u64) -> Option<Piece> {
        if let Some(piece) = take(&mut self.first, &self.scope, memory, most) {
            return Some(Piece { is_first: true, ..piece });
        }
        if self.only_first {
            return None;
        }
        self.look_at_faults(seats);
        take(&mut self.near, &self.scope, memory, most).or_else(|| self.sweep(memory, most))
    }

    /// Was all that comes first taken?
    pub fn is_past_first(&self) -> bool {
        self.first.is_empty()
    }

    /// Begins another pass over what is still absent.
    pub fn start_again(&mut self) {
        self.at = Hva(0);
    }

    fn look_at_faults(&mut self, seats: &Seats) {
        let seats = seats.all();
        self.seen.resize(seats.len(), Hva(0));
        for (seat, seen) in seats.iter().zip(&mut self.seen) {
            if let Some(hva) = seat.last_fault().filter(|hva| hva != seen) {
                *seen = hva;
                self.near.push_front(hva..hva.saturating_add(NEIGHBOURHOOD));
                // Only the latest fault of each vCPU counts.
                self.near.truncate(seats.len());
            }
        }
    }

    fn sweep(&mut self, memory: &Memory, most: u64) -> Option<Piece> {
        let slots = memory.slots();
        // Blocks are sorted by address.
        let piece = slots.blocks().find_map(|block| {
            let mut ranges = self.scope.within(self.at.max(block.hva)..block.hva + block.len);
            ranges.find_map(|range| absent_in(block, range, most))
        })?;
        self.at = piece.block.hva_of(piece.pages.end);
        Some(piece)
    }
}

/// The first absent pages of the ranges. What was looked at is removed from them.
fn take(ranges: &mut VecDeque<Range<Hva>>, scope: &Scope, memory: &Memory, most: u64) -> Option<Piece> {
    let slots = memory.slots();
    while let Some(range) = ranges.front_mut() {
        let found = scope.within(range.clone()).find_map(|part| {
            let mut blocks = slots.blocks_in(part.start, part.end - part.start);
            blocks.find_map(|b| absent_in(b, part.clone(), most))
        });
        if let Some(piece) = found {
            range.start = piece.block.hva_of(piece.pages.end).min(range.end);
            return Some(piece);
        }
        ranges.pop_front();
    }
    None
}

/// The first run of absent pages of a block that begins in a range of addresses.
fn absent_in(block: &Arc<Block>, range: Range<Hva>, most: u64) -> Option<Piece> {
    let within = block.pages_in(&range);
    let start = block.pages.first_absent(within.clone())?;
    let pages = start..block.pages.absent_up(start, within.end.min(start.saturating_add(most)));
    (!pages.is_empty()).then(|| Piece { block: block.clone(), pages, is_first: false })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::address::Gpa;
    use crate::kernel::host_memory::HostMemory;
    use crate::kernel::kvm::{ImmediateExit, Region};
    use crate::kernel::mem::Kind;
    use crate::kernel::page::page_size;
    use crate::kernel::uffd::Uffd;
    use crate::memory::block::Shape;
    use crate::memory::pages::State;
    use crate::memory::slots::{Slot, Slots};
    use crate::resolve::seat::Seat;

    const A: Hva = Hva(0x1000_0000);
    const B: Hva = Hva(0x9000_0000);

    /// Two blocks of 2048 pages.
    fn memory() -> crate::error::Result<Memory> {
        let memory = Memory::new(Uffd::open()?, false);
        let mut slots = Slots::default();
        for (number, hva) in [(0, B), (1, A)] {
            let shape = Shape {
                memory: HostMemory::for_test(hva, 2048 * page_size()),
                page: page_size(),
                kind: Kind::Shared,
                mechanism: 0,
            };
            let block = Arc::new(Block::new(shape, None, false, false)?);
            let region = Region { slot: number, gpa: Gpa(hva.0), len: 2048 * page_size(), hva, ..Default::default() };
            slots = slots.with(Slot { region, block, offset: 0, fast_only: true }, false);
        }
        memory.replace_slots(slots);
        Ok(memory)
    }

    fn next(order: &mut Order, memory: &Memory, seats: &Seats, most: u64) -> Option<Range<Hva>> {
        let piece = order.next(memory, seats, most)?;
        for page in piece.pages.clone() {
            assert_eq!(piece.block.pages.get(page), State::Absent);
            assert!(piece.block.pages.make_present(page));
        }
        Some(piece.block.hva_of(piece.pages.start)..piece.block.hva_of(piece.pages.end))
    }

    #[test]
    fn everything_comes_once_from_the_lowest_address_up() {
        let (memory, seats) = (needs!(memory()), Seats::default());
        let mut order = Order::default();
        let slots = memory.slots().clone();
        let (a, _) = slots.at_hva(A).unwrap();
        assert!(a.pages.make_present(100) && a.pages.make_present(101));
        let mut total = 0;
        let pieces: Vec<_> = std::iter::from_fn(|| next(&mut order, &memory, &seats, 512))
            .inspect(|piece| total += piece.end - piece.start)
            .collect();
        assert_eq!(pieces[..2], [A..A + 100 * page_size(), A + 102 * page_size()..A + 614 * page_size()]);
        assert_eq!(total, (2 * 2048 - 2) * page_size());
        a.pages.change(7, State::Present, State::Absent).unwrap();
        assert_eq!(next(&mut order, &memory, &seats, 512), None, "the pass is over");
        order.start_again();
        assert_eq!(next(&mut order, &memory, &seats, 512), Some(A + 7 * page_size()..A + 8 * page_size()));
    }

    #[test]
    fn what_is_given_comes_first_and_what_follows_faults_next() {
        let (memory, seats) = (needs!(memory()), Seats::default());
        let seat: &'static Seat = Box::leak(Box::new(Seat::new(0, ImmediateExit::none(), libc::SIGURG, false)));
        seats.add(seat);
        drop(seat.begin_fault(B + 1000 * page_size()));
        let first = vec![
            B + 8 * page_size()..B + 12 * page_size(),
            Hva(0x5000)..Hva(0x9000),
            A + 2040 * page_size()..A + 3000 * page_size(),
        ];
        let mut order = Order::new(first, false, Scope::default());
        let near = NEIGHBOURHOOD / page_size();
        let mut next = || next(&mut order, &memory, &seats, near / 2).unwrap();
        assert_eq!(next(), B + 8 * page_size()..B + 12 * page_size());
        assert_eq!(next(), A + 2040 * page_size()..A + 2048 * page_size());
        assert_eq!(next(), B + 1000 * page_size()..B + (1000 + near / 2) * page_size());
        drop(seat.begin_fault(B + 500 * page_size()));
        assert_eq!(next(), B + 500 * page_size()..B + (500 + near / 2) * page_size());
        assert_eq!(next(), B + (500 + near / 2) * page_size()..B + (500 + near).min(1000) * page_size());
        assert_eq!(next(), A..A + near / 2 * page_size(), "one fault of each vCPU, the latest");
    }

    /// Neither the sweep, nor a fault, nor what is given leads out of the scope.
    #[test]
    fn nothing_outside_of_the_scope() {
        let (memory, seats) = (needs!(memory()), Seats::default());
        let seat: &'static Seat = Box::leak(Box::new(Seat::new(0, ImmediateExit::none(), libc::SIGURG, false)));
        seats.add(seat);
        drop(seat.begin_fault(B + 100 * page_size()));
        let scope = Scope::of(vec![
            A + 10 * page_size()..A + 20 * page_size(),
            A + 30 * page_size()..A + 33 * page_size(),
            B + 90 * page_size()..B + 110 * page_size(),
        ]);
        let mut order = Order::new(vec![A + 18 * page_size()..A + 31 * page_size(), A..A + page_size()], false, scope);
        let pieces: Vec<_> = std::iter::from_fn(|| next(&mut order, &memory, &seats, 512)).collect();
        let expected = [
            A + 18 * page_size()..A + 20 * page_size(),
            A + 30 * page_size()..A + 31 * page_size(),
            B + 100 * page_size()..B + 110 * page_size(),
            A + 10 * page_size()..A + 18 * page_size(),
            A + 31 * page_size()..A + 33 * page_size(),
            B + 90 * page_size()..B + 100 * page_size(),
        ];
        assert_eq!(pieces, expected);
    }

    #[test]
    fn only_what_is_given() {
        let (memory, seats) = (needs!(memory()), Seats::default());
        let mut order =
            Order::new(Vec::from([A..A + page_size(), A + page_size()..A + 3 * page_size()]), true, Scope::default());
        assert_eq!(next(&mut order, &memory, &seats, 2), Some(A..A + page_size()));
        assert!(!order.is_past_first());
        assert_eq!(next(&mut order, &memory, &seats, 2), Some(A + page_size()..A + 3 * page_size()));
        assert_eq!(next(&mut order, &memory, &seats, 2), None);
        assert!(order.is_past_first());
    }
}
