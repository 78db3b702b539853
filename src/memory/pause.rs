//! Short waits for other threads and for the kernel.

use crate::error::{fail, Result};
use std::time::{Duration, Instant};

/// Lets another thread finish what it will finish soon. Yielding alone does not let a thread of
/// lower priority run (a vCPU's may be real-time).
#[derive(Default)]
pub struct Backoff(u32);

impl Backoff {
    /// Yields; after some rounds, sleeps for a moment.
    pub fn pause(&mut self) {
        self.0 += 1;
        match self.0 {
            0..16 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(50)),
        }
    }
}

/// For userfaultfd's EAGAIN: another thread is changing the address space (mmap, fork, or mremap
/// with events that a monitor has yet to read).
#[derive(Default)]
pub struct BoundedBackoff {
    backoff: Backoff,
    deadline: Option<Instant>,
}

impl BoundedBackoff {
    /// Waits for a moment; an error after ten seconds.
    pub fn wait(&mut self) -> Result<()> {
        const ENOUGH: Duration = Duration::from_secs(10);
        if Instant::now() > *self.deadline.get_or_insert_with(|| Instant::now() + ENOUGH) {
            fail!(
                EAGAIN,
                "the address space has been changing for {ENOUGH:?} (mmap, fork or userfaultfd events under way?)"
            );
        }
        self.backoff.pause();
        Ok(())
    }
}
