//! Ranges of pages, cut into the groups of gates, and into runs of pages that have something in
//! common.

use super::gates::GATE_PAGES;
use std::ops::Range;

pub(super) fn gate_groups(pages: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let first = pages.start / GATE_PAGES;
    let last = pages.end.div_ceil(GATE_PAGES);
    (first..last).map(move |g| (g * GATE_PAGES).max(pages.start)..((g + 1) * GATE_PAGES).min(pages.end))
}

/// Runs of the pages for which `take` returns true. It is called once for each page, in order.
pub(super) fn runs(pages: Range<u64>, take: impl Fn(u64) -> bool) -> impl Iterator<Item = Range<u64>> {
    let mut next = pages.start;
    std::iter::from_fn(move || {
        while next < pages.end && !take(next) {
            next += 1;
        }
        if next == pages.end {
            return None;
        }
        let start = next;
        next += 1;
        while next < pages.end && take(next) {
            next += 1;
        }
        let run = start..next;
        next = (next + 1).min(pages.end); // the page that said no
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_ask_once_and_miss_nothing() {
        let asked = std::cell::RefCell::new(Vec::new());
        let take = |page: u64| {
            asked.borrow_mut().push(page);
            ![3, 4, 9].contains(&page)
        };
        assert_eq!(runs(0..12, take).collect::<Vec<_>>(), [0..3, 5..9, 10..12]);
        assert_eq!(*asked.borrow(), (0..12).collect::<Vec<_>>());
        assert_eq!(runs(5..5, |_| true).count(), 0);
        assert_eq!(runs(0..1, |_| false).count(), 0);
    }

    #[test]
    fn groups_cover_the_range() {
        assert_eq!(gate_groups(500..1100).collect::<Vec<_>>(), [500..512, 512..1024, 1024..1100]);
        assert_eq!((gate_groups(512..1024).next(), gate_groups(512..1024).count()), (Some(512..1024), 1));
        assert_eq!(gate_groups(7..7).filter(|g| !g.is_empty()).count(), 0);
    }
}
