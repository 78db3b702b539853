//! Why an install failed that a resolver called for.

use crate::error::Error;
use std::cell::RefCell;

thread_local! {
    /// Why the last install failed that a resolver called for on this thread.
    static FAILED: RefCell<Option<Error>> = const { RefCell::new(None) };
}

/// An install that a resolver called for failed: its errno is all that the resolver can return.
pub fn note_failure(error: &Error) {
    FAILED.set(Some(error.clone()));
}

/// Why the last install failed that a resolver called for on this thread, if that had this errno.
pub fn take_failure(errno: i32) -> Option<Error> {
    FAILED.take().filter(|error| error.errno == errno)
}
