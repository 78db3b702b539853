//! Where the threads of a fill wait while it is paused.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A pause that may be asked for, and ended, from any thread.
#[derive(Debug, Default)]
pub struct Pause {
    asked: AtomicBool,
    /// Held by a thread between its look at what it waits for and its sleep; so no wake-up is lost.
    looking: Mutex<()>,
    changed: Condvar,
}

impl Pause {
    /// From now on threads are to wait.
    pub fn ask(&self) {
        self.asked.store(true, SeqCst);
    }

    /// Threads go on.
    pub fn end(&self) {
        self.asked.store(false, SeqCst);
        self.wake();
    }

    /// Are threads to wait?
    pub fn is_asked(&self) -> bool {
        self.asked.load(SeqCst)
    }

    /// Has waiting threads look again: what ends a wait besides the end of the pause has changed.
    pub fn wake(&self) {
        drop(self.look());
        self.changed.notify_all();
    }

    /// Waits for the end of the pause, or until `is_over`, whose changes `wake` tells; no longer
    /// than to `until`.
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
