//! Messages of the userfaultfd for an address that is in no block. Their threads sleep, and nothing
//! else would wake them: the memory may be registered and its slot not yet published (or never, if
//! setting it fails), or its slot has just been deleted. They are woken after a pause. If the
//! memory is still registered they fault again; by then the block is known, or the next pause is
//! longer.

use crate::kernel::address::Hva;
use crate::kernel::page::page_size;
use crate::kernel::uffd::Uffd;
use std::ops::Range;
use std::time::{Duration, Instant};

const FIRST_PAUSE: Duration = Duration::from_millis(1);
const MAX_PAUSE: Duration = Duration::from_millis(100);

/// The strays of one reader thread, all in one range: waking pages in between that have no sleepers
/// does nothing.
pub struct Strays {
    pages: Option<Range<Hva>>,
    due: Instant,
    pause: Duration,
}

impl Strays {
    /// No strays.
    pub fn new(now: Instant) -> Strays {
        Strays { pages: None, due: now, pause: FIRST_PAUSE }
    }

    /// Adds the address at which a thread sleeps.
    pub fn keep(&mut self, hva: Hva, now: Instant) {
        let page = Hva(hva.0 / page_size() * page_size());
        match &mut self.pages {
            Some(pages) => *pages = pages.start.min(page)..pages.end.max(page + page_size()),
            None => {
                // A stray that comes soon after the last were woken is mostly one of them again.
                let again = now < self.due + 2 * self.pause;
                self.pause = if again { (self.pause * 2).min(MAX_PAUSE) } else { FIRST_PAUSE };
                self.pages = Some(page..page + page_size());
                self.due = now + self.pause;
            }
        }
    }

    /// When the threads are to be woken; None if there are none.
    pub fn due(&self) -> Option<Instant> {
        self.pages.as_ref().map(|_| self.due)
    }

    /// Wakes the threads if it is time.
    pub fn wake_due(&mut self, uffd: &Uffd, now: Instant) {
        if self.due <= now {
            if let Some(pages) = self.pages.take() {
                let _ = uffd.wake(pages.start, pages.end - pages.start);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_grows_while_they_come_again_and_then_begins_anew() {
        let uffd = needs!(Uffd::open());
        let mut now = Instant::now();
        let mut strays = Strays::new(now);
        let mut pauses = Vec::new();
        now += Duration::from_secs(1);
        for _ in 0..9 {
            strays.keep(Hva(0x12_3456), now);
            strays.keep(Hva(0x10_0000), now);
            assert_eq!(strays.pages, Some(Hva(0x10_0000)..Hva(0x12_4000)), "all of them together");
            let due = strays.due().unwrap();
            pauses.push((due - now).as_millis());
            strays.wake_due(&uffd, now);
            assert!(strays.due().is_some(), "not before it is time");
            now = due;
            strays.wake_due(&uffd, now);
            assert!(strays.due().is_none());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 100, 100]);
        now += Duration::from_secs(1);
        strays.keep(Hva(0), now);
        assert_eq!(strays.due(), Some(now + FIRST_PAUSE));
    }
}
