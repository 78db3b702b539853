//! Short waits for other threads and for the kernel.

use crate::error::{fail, Result};
use std::time::{Duration, Instant};

/// Lets another thread get on with what is over soon. Yielding alone would not let one of lower priority run (a vCPU's may be real-time).
#[derive(Default)]
pub struct Backoff(u32);

impl Backoff {
    /// A moment.
    pub fn pause(&mut self) {
        self.0 += 1;
        match self.0 {
            0..16 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(50)),
        }
    }
}

/// For userfaultfd's EAGAIN: another thread is changing the address space (mmap, fork, mremap with events that a monitor has yet to read).
#[derive(Default)]
pub struct BoundedBackoff {
    backoff: Backoff,
    deadline: Option<Instant>,
}

impl BoundedBackoff {
    /// A moment; an error when it has been enough.
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
