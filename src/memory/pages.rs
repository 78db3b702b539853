//! The states of a block's pages: two bits each, changed by compare-and-swap only.
//!
//! ```text
//!   ABSENT -> RESOLVING -> PRESENT        one caller wins the first arrow and fetches the page
//!             RESOLVING -> ABSENT         that failed: another caller may try
//!             RESOLVING -> LOST           the page cannot be had
//!   PRESENT -> RESOLVING -> ABSENT        discard
//!   any -> RESOLVING -> PRESENT           given back by the guest: with nothing in it
//! ```

use crate::error::Result;
use crate::kernel::mem::Mapping;
use crate::kernel::page::page_size;
use std::sync::atomic::Ordering::SeqCst;

/// The state of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Never installed, or discarded.
    Absent = 0,
    /// A thread fetches or drops it, or the resolver has announced it.
    Resolving = 1,
    /// Its bytes are visible.
    Present = 2,
    /// It cannot be had.
    Lost = 3,
}

impl State {
    fn from_bits(bits: u64) -> State {
        match bits & 3 {
            0 => State::Absent,
            1 => State::Resolving,
            2 => State::Present,
            _ => State::Lost,
        }
    }
}

const PER_WORD: u64 = 32;

/// The states of `len` pages, all ABSENT at first. They take memory only where a page was touched:
/// at most 64 MiB for 1 TiB of 4 KiB pages.
#[derive(Debug)]
pub struct Pages {
    words: Mapping,
    len: u64,
}

#[allow(clippy::len_without_is_empty, reason = "a block is never empty")]
impl Pages {
    /// `len` absent pages.
    pub fn new(len: u64) -> Result<Pages> {
        let bytes = len.div_ceil(PER_WORD) * 8;
        Ok(Pages { words: Mapping::anonymous(bytes.next_multiple_of(page_size()))?, len })
    }

    /// The number of pages.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// A number that names a page among all pages of the process, for as long as these states
    /// exist: even, and not 0.
    pub fn key_of(&self, page: u64) -> u64 {
        (self.words.address().0 * 4 + page) << 1
    }

    /// The page that a key names; None if it is not one of these pages.
    pub fn page_of_key(&self, key: u64) -> Option<u64> {
        (key >> 1).checked_sub(self.words.address().0 * 4).filter(|&page| page < self.len)
    }

    /// The state of a page.
    pub fn get(&self, page: u64) -> State {
        State::from_bits(self.words.atomics()[(page / PER_WORD) as usize].load(SeqCst) >> (page % PER_WORD * 2))
    }

    /// Changes a page's state if it is `from`. Otherwise returns the state that the page has.
    pub fn change(&self, page: u64, from: State, to: State) -> std::result::Result<(), State> {
        debug_assert!(page < self.len);
        let word = &self.words.atomics()[(page / PER_WORD) as usize];
        let shift = page % PER_WORD * 2;
        let mut seen = word.load(SeqCst);
        loop {
            let state = State::from_bits(seen >> shift);
            if state != from {
                return Err(state);
            }
            let new = seen & !(3 << shift) | (to as u64) << shift;
            match word.compare_exchange_weak(seen, new, SeqCst, SeqCst) {
                Ok(_) => return Ok(()),
                Err(now) => seen = now,
            }
        }
    }

    /// Makes an ABSENT or RESOLVING page PRESENT, as its bytes are visible. True if this call did
    /// it.
    pub fn make_present(&self, page: u64) -> bool {
        let mut from = State::Resolving;
        loop {
            match self.change(page, from, State::Present) {
                Ok(()) => return true,
                Err(State::Present | State::Lost) => return false,
                Err(state) => from = state,
            }
        }
    }

    /// The end of the ABSENT pages from `from` up: the first page that is not ABSENT, or `end`.
    pub fn absent_up(&self, from: u64, end: u64) -> u64 {
        let mut page = from;
        while page < end {
            let rest = self.words.atomics()[(page / PER_WORD) as usize].load(SeqCst) >> (page % PER_WORD * 2);
            if rest != 0 {
                return end.min(page + rest.trailing_zeros() as u64 / 2);
            }
            page = (page / PER_WORD + 1) * PER_WORD;
        }
        end
    }

    /// The first ABSENT page of a range.
    pub fn first_absent(&self, range: std::ops::Range<u64>) -> Option<u64> {
        const LOW: u64 = 0x5555_5555_5555_5555;
        let mut page = range.start;
        while page < range.end {
            let word = self.words.atomics()[(page / PER_WORD) as usize].load(SeqCst);
            let absent = !(word | word >> 1) & LOW & (!0 << (page % PER_WORD * 2));
            if absent != 0 {
                let found = page / PER_WORD * PER_WORD + absent.trailing_zeros() as u64 / 2;
                return Some(found).filter(|&page| page < range.end);
            }
            page = (page / PER_WORD + 1) * PER_WORD;
        }
        None
    }

    /// The start of the ABSENT pages that end below `from`, but not below `start`; `from` if there
    /// are none.
    pub fn absent_down(&self, from: u64, start: u64) -> u64 {
        let mut above = from;
        while above > start {
            let last = above - 1;
            let word = self.words.atomics()[(last / PER_WORD) as usize].load(SeqCst);
            let rest = word << ((PER_WORD - 1 - last % PER_WORD) * 2);
            if rest != 0 {
                return start.max(above - rest.leading_zeros() as u64 / 2);
            }
            above = last / PER_WORD * PER_WORD;
        }
        start
    }

    /// Gives all pages one state, before other threads see them.
    pub fn fill(&self, state: State) {
        let word = (0..PER_WORD).fold(0, |word, n| word | (state as u64) << (2 * n));
        for w in self.words.atomics() {
            w.store(word, SeqCst);
        }
    }

    /// The number of pages in `range` that are in `state`: a snapshot, exact only while nothing
    /// changes.
    pub fn count(&self, range: std::ops::Range<u64>, state: State) -> u64 {
        let wanted = state as u64;
        let mut total = 0;
        let mut page = range.start;
        while page < range.end {
            if page % PER_WORD == 0 && range.end - page >= PER_WORD {
                let word = self.words.atomics()[(page / PER_WORD) as usize].load(SeqCst);
                let spread = (0..PER_WORD).fold(0, |w, n| w | wanted << (2 * n));
                let differs = word ^ spread;
                let differs = (differs | differs >> 1) & 0x5555_5555_5555_5555;
                total += PER_WORD - differs.count_ones() as u64;
                page += PER_WORD;
            } else {
                total += (self.get(page) == state) as u64;
                page += 1;
            }
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_many_wins() {
        let pages = Pages::new(100).unwrap();
        let wins = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        (0..100).filter(|&p| pages.change(p, State::Absent, State::Resolving).is_ok()).count()
                    })
                })
                .collect();
            racers.into_iter().map(|r| r.join().unwrap()).sum::<usize>()
        });
        assert_eq!(wins, 100);
        assert_eq!(pages.count(0..100, State::Resolving), 100);
    }

    #[test]
    fn neighbours_keep_their_state() {
        let pages = Pages::new(70).unwrap();
        pages.change(33, State::Absent, State::Resolving).unwrap();
        assert!(pages.make_present(33));
        assert!(!pages.make_present(33));
        assert_eq!(pages.change(33, State::Absent, State::Lost), Err(State::Present));
        assert_eq!((pages.get(32), pages.get(33), pages.get(34)), (State::Absent, State::Present, State::Absent));
        assert_eq!(pages.count(0..70, State::Absent), 69);
        assert_eq!(pages.count(33..34, State::Present), 1);
        pages.fill(State::Present);
        assert_eq!(pages.count(1..70, State::Present), 69);
    }

    #[test]
    fn absent_pages_are_measured_in_both_directions() {
        let pages = Pages::new(200).unwrap();
        for state in [State::Resolving, State::Present, State::Lost] {
            let pages = Pages::new(200).unwrap();
            for page in [10, 100] {
                pages.change(page, State::Absent, state).unwrap();
            }
            for start in 0..200 {
                let up = (start..200).find(|&p| pages.get(p) != State::Absent).unwrap_or(200);
                assert_eq!(pages.absent_up(start, 200), up, "{state:?}: up from {start}");
                assert_eq!(pages.absent_up(start, 120.max(start)), up.min(120.max(start)));
                let first = (start..200).find(|&p| pages.get(p) == State::Absent);
                assert_eq!(pages.first_absent(start..200), first, "{state:?}: first from {start}");
                assert_eq!(pages.first_absent(start..start), None);
                let down = (0..start).rev().find(|&p| pages.get(p) != State::Absent).map_or(0, |p| p + 1);
                assert_eq!(pages.absent_down(start, 0), down, "{state:?}: down from {start}");
                assert_eq!(pages.absent_down(start, 40.min(start)), down.max(40.min(start)));
            }
        }
        assert_eq!((pages.absent_up(0, 200), pages.absent_down(200, 0)), (200, 0));
        pages.fill(State::Present);
        assert_eq!(pages.first_absent(0..200), None);
        pages.change(64, State::Present, State::Absent).unwrap();
        assert_eq!((pages.first_absent(3..200), pages.first_absent(3..64)), (Some(64), None));
    }

    #[test]
    fn a_lost_page_stays_lost() {
        let pages = Pages::new(1).unwrap();
        pages.change(0, State::Absent, State::Resolving).unwrap();
        pages.change(0, State::Resolving, State::Lost).unwrap();
        assert!(!pages.make_present(0));
        assert_eq!(pages.get(0), State::Lost);
    }

    /// The promise of the header, for pages of 4 KiB: 64 MiB for 1 TiB.
    #[test]
    fn a_terabyte_costs_64_mib() {
        let pages = Pages::new((1 << 40) / 4096).unwrap();
        assert_eq!(pages.words.atomics().len() * 8, 64 << 20);
        assert_eq!(pages.get((1 << 40) / 4096 - 1), State::Absent);
    }
}
