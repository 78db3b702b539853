//! Fill threads begin together, and a panic of one ends the fill.

use super::Fill;
use crate::error::Error;
use std::sync::{Condvar, Mutex, PoisonError};

/// Where threads wait until it is known whether all of them could be started.
#[derive(Default)]
pub struct Gate {
    all_there: Mutex<Option<bool>>,
    changed: Condvar,
}

impl Gate {
    pub fn open(&self, all_there: bool) {
        *self.all_there.lock().unwrap_or_else(PoisonError::into_inner) = Some(all_there);
        self.changed.notify_all();
    }

    pub fn wait(&self) -> bool {
        let answer = self.all_there.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = self.changed.wait_while(answer, |a| a.is_none()).unwrap_or_else(PoisonError::into_inner);
        *answer == Some(true)
    }
}

/// Ends the fill if a thread panics, so that no thread waits for it.
pub struct EndOnPanic<'a>(pub &'a Fill);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(Err(Error::new(libc::ENOTRECOVERABLE, "a fill thread panicked (see stderr)")));
        }
    }
}
