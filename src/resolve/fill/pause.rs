//! Where the threads of a fill wait while it is paused.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A pause, which any thread may ask for and end.
#[derive(Debug, Default)]
pub struct Pause {
    asked: AtomicBool,
    /// Held by a thread between checking what it waits for and sleeping, so that no wake-up is
    /// lost.
    looking: Mutex<()>,
    changed: Condvar,
}

impl Pause {
    /// Begins the pause: threads wait from now on.
    pub fn ask(&self) {
        self.asked.store(true, SeqCst);
    }

    /// Ends the pause.
    pub fn end(&self) {
        self.asked.store(false, SeqCst);
        self.wake();
    }

    /// Is there a pause?
    pub fn is_asked(&self) -> bool {
        self.asked.load(SeqCst)
    }

    /// Wakes waiting threads to check `is_over` again.
    pub fn wake(&self) {
        drop(self.look());
        self.changed.notify_all();
    }

    /// Waits for the end of the pause, until `is_over` (`wake` tells of its changes), or until the
    /// time `until`.
    pub fn wait(&self, until: Option<Instant>, is_over: impl Fn() -> bool) {
        let mut looking = self.look();
        while self.is_asked() && !is_over() {
            looking = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => return,
                Some(left) => self.changed.wait_timeout(looking, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(looking).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn look(&self) -> MutexGuard<'_, ()> {
        self.looking.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
