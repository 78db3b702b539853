//! Readahead: predicts the pages that a vCPU needs next from the faults that it has had. Runs of
//! pages in either direction, also with a step between them, are recognised, several at a time.
//! Faults without a pattern predict nothing and cost a few comparisons.

use crate::kernel::address::Gpa;
use crate::memory::slots::Slot;
use std::ops::Range;

/// The number of runs that are followed at once: a copy loop has two, a guest between two tasks a
/// few more.
const RUNS: usize = 8;
/// How many pages are fetched when a run is recognised; twice as many each time it goes on.
const FIRST: u64 = 4;
/// How many faults that belong to no run are remembered, to recognise a step.
const STRAYS: usize = 16;
/// Pages further apart than this are not taken for one run.
const MAX_STEP: u64 = 4096;

/// The pages to fetch together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// From one page to the next, in pages; negative for a run that goes down.
    pub step: i64,
    /// The number of pages, the one that is needed included.
    pub count: u64,
}

impl Plan {
    /// The page and no other.
    pub const ALONE: Plan = Plan { step: 1, count: 1 };

    /// Are the pages neighbours, which one resolver call can fetch together?
    pub fn is_contiguous(&self) -> bool {
        self.step.unsigned_abs() == 1
    }

    /// The pages of a contiguous plan, inside `bounds`, which hold `page`. They end at a multiple
    /// of the plan's length: after the first few, windows are aligned, so that KVM, which maps
    /// aligned groups of neighbours at once (PTE_PREFETCH_NUM in arch/x86/kvm/mmu), finds whole
    /// groups.
    pub fn around(&self, page: u64, bounds: Range<u64>) -> Range<u64> {
        match self.step {
            1 => page..bounds.end.min(page.saturating_add(self.count) / self.count * self.count),
            _ => bounds.start.max((page + 1).saturating_sub(self.count).next_multiple_of(self.count))..page + 1,
        }
    }

    /// The further pages of a strided plan, inside `bounds`, in the order in which they will be
    /// needed.
    pub fn beyond(self, page: u64, bounds: Range<u64>) -> impl Iterator<Item = u64> {
        let pages = (1..self.count).map_while(move |n| page.checked_add_signed(self.step.checked_mul(n as i64)?));
        pages.take_while(move |p| bounds.contains(p))
    }
}

/// The block's pages of a contiguous plan, aligned as the guest sees them.
pub fn window(slot: &Slot, page: u64, plan: &Plan) -> Range<u64> {
    let size = slot.block.page;
    let (first, end) = (slot.region.gpa.0 / size, (slot.region.gpa + slot.region.len).0 / size);
    let found = plan.around(slot.gpa_of(page).0 / size, first..end);
    slot.page_of(Gpa(found.start * size))..slot.page_of(Gpa(found.end * size - 1)) + 1
}

#[derive(Debug, Clone, Copy, Default)]
struct Run {
    /// The page that faulted last; by address, so that runs in different blocks are different.
    last: u64,
    step: i64,
    /// How many pages were fetched last; 0 without a run.
    count: u64,
    /// The number of the fault that it last went on with.
    stamp: u64,
}

impl Run {
    /// Does the fault continue this run? Some of the run's pages may have been PRESENT already, or
    /// may not have been fetched.
    fn goes_on_at(&self, page: u64) -> bool {
        let distance = page.wrapping_sub(self.last) as i64;
        self.count > 0
            && distance.checked_rem(self.step) == Some(0)
            && (1..=2 * self.count as i64).contains(&(distance / self.step))
    }
}

/// The runs of one vCPU (or of the reader threads, for host threads).
#[derive(Debug, Default)]
pub struct Runs {
    runs: [Run; RUNS],
    /// The last faults that belonged to no run, in a ring.
    stray: [u64; STRAYS],
    /// The number of faults so far.
    clock: u64,
    last: Plan,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan::ALONE
    }
}

impl Runs {
    /// The plan that `next` returned last.
    pub fn last(&self) -> Plan {
        self.last
    }

    /// Plans what to fetch with a page (by address, in pages) that is needed: at most `most` pages
    /// together.
    pub fn next(&mut self, page: u64, most: u64) -> Plan {
        self.clock += 1;
        self.last = self.find(page, most).unwrap_or(Plan::ALONE);
        self.last
    }

    fn find(&mut self, page: u64, most: u64) -> Option<Plan> {
        if let Some(run) = self.runs.iter_mut().find(|r| r.goes_on_at(page)) {
            (run.last, run.stamp, run.count) = (page, self.clock, (2 * run.count).min(most));
            return Some(Plan { step: run.step, count: run.count });
        }
        let step = self.step_to(page);
        self.stray[self.clock as usize % STRAYS] = page;
        let oldest = self.runs.iter_mut().min_by_key(|r| r.stamp)?;
        *oldest = Run { last: page, step: step?, count: FIRST.min(most), stamp: self.clock };
        Some(Plan { step: oldest.step, count: oldest.count })
    }

    /// The step that leads to this page: from a neighbour, or over two earlier faults at the same
    /// distance.
    fn step_to(&self, page: u64) -> Option<i64> {
        let steps = self.stray.iter().map(|before| page.wrapping_sub(*before) as i64);
        let leads_here = |&step: &i64| match step.unsigned_abs() {
            1 => true,
            2..=MAX_STEP => self.stray.contains(&page.wrapping_sub(step as u64).wrapping_sub(step as u64)),
            _ => false,
        };
        steps.filter(leads_here).min_by_key(|step| step.unsigned_abs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The faults of a guest that touches `pages` in this order, with everything fetched that is
    /// planned. Returns the numbers of faults and of pages fetched.
    fn replay(pages: impl IntoIterator<Item = u64>, most: u64) -> (u64, usize) {
        let (mut runs, mut present, mut faults) = (Runs::default(), std::collections::HashSet::new(), 0);
        for page in pages {
            if !present.contains(&page) {
                faults += 1;
                let plan = runs.next(page, most);
                assert!((1..=most).contains(&plan.count));
                present.insert(page);
                match plan.is_contiguous() {
                    true => present.extend(plan.around(page, 0..u64::MAX)),
                    false => present.extend(plan.beyond(page, 0..u64::MAX)),
                }
            }
        }
        (faults, present.len())
    }

    #[test]
    fn runs_in_both_directions_are_fetched_in_ever_larger_pieces() {
        // 1, then up to 4, 8, 16 .. 256; then 256 each.
        assert_eq!(replay(4096..8192, 256), (8 + 15, 4096));
        assert_eq!(replay((4096..8192).rev(), 256), (8 + 15, 4096));
        // Wherever a run begins, all windows but the first few are whole.
        for start in (4096..4352).step_by(7) {
            assert!(replay(start..start + 4096, 256).0 <= 8 + 16 + 1, "from {start}");
            assert!(replay((start..start + 4096).rev(), 256).0 <= 8 + 16 + 1, "down to {start}");
        }
        assert_eq!(replay(5000..9096, 1).0, 4096);
        assert_eq!(replay(5000..9096, 2).0, 1 + 4095_u64.div_ceil(2));
    }

    #[test]
    fn steps_are_recognised() {
        for step in [2, 7, 64, 4096] {
            let (faults, fetched) = replay((0..1000).map(|n| (1 << 30) + n * step), 64);
            assert!(faults < 30, "step {step}: {faults} faults");
            assert!(fetched < 1064, "step {step}: {fetched} pages");
            let (back, _) = replay((0..1000).map(|n| (1 << 30) - n * step), 64);
            assert_eq!(back, faults);
        }
    }

    #[test]
    fn interleaved_runs_are_kept_apart() {
        for distance in [2_000, 900_000] {
            let both = (0..1000).flat_map(|n| [5_000 + n, 5_000 + distance + n]);
            assert!(replay(both, 64).0 < 60);
        }
        for distance in [5_000, 1_000_000] {
            let six = (0..500u64).flat_map(|n| (0..6).map(move |run| (run + 1) * distance + n * (run + 1)));
            let faults = replay(six, 64).0;
            assert!(faults < 140, "{distance} pages apart: {faults} faults");
        }
    }

    /// A run of which other calls have fetched a part goes on where it faults next.
    #[test]
    fn gaps_do_not_end_a_run() {
        let mut runs = Runs::default();
        assert_eq!([runs.next(100, 64), runs.next(101, 64)], [Plan::ALONE, Plan { step: 1, count: 4 }]);
        assert_eq!(runs.next(103, 64), Plan { step: 1, count: 8 }, "only some of the window was fetched");
        assert_eq!(runs.next(119, 64), Plan { step: 1, count: 16 }, "what follows the window was there");
        assert_eq!(runs.next(119 + 33, 64), Plan::ALONE, "further away than that is something else");
    }

    #[test]
    fn faults_without_a_pattern_ask_for_nothing() {
        let mut x = 12345_u64;
        let random = (0..4000).map(|_| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 33) % (1 << 20)
        });
        let pages: Vec<u64> = random.collect();
        let different: std::collections::HashSet<_> = pages.iter().collect();
        let (faults, fetched) = replay(pages.iter().copied(), 512);
        assert!(fetched - different.len() < different.len() / 50, "{fetched} pages for {}", different.len());
        assert!(faults as usize + fetched / 50 >= different.len());
    }

    #[test]
    fn plans_stay_inside_their_bounds() {
        let up = Plan { step: 1, count: 8 };
        let down = Plan { step: -1, count: 8 };
        assert_eq!((up.around(10, 8..13), down.around(13, 11..18)), (10..13, 11..14));
        assert_eq!((up.around(10, 0..100), down.around(13, 0..100)), (10..16, 8..14));
        assert_eq!((up.around(16, 0..100), down.around(15, 0..100)), (16..24, 8..16));
        assert_eq!((up.around(15, 0..100), down.around(16, 0..100)), (15..16, 16..17), "a whole one comes next");
        assert_eq!(down.around(3, 0..100), 0..4);
        let near_the_end = up.around(u64::MAX - 9, 0..u64::MAX);
        assert!(near_the_end.start < near_the_end.end);
        assert_eq!((Plan::ALONE.around(7, 0..100), Plan { step: 1, count: 6 }.around(7, 0..100)), (7..8, 7..12));
        let strided = Plan { step: -3, count: 8 };
        assert_eq!(strided.beyond(10, 0..100).collect::<Vec<_>>(), [7, 4, 1]);
        assert_eq!(Plan { step: 3, count: 3 }.beyond(10, 0..100).collect::<Vec<_>>(), [13, 16]);
        assert_eq!(Plan { step: i64::MIN, count: 3 }.beyond(10, 0..100).count(), 0);
    }
}
