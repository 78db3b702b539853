//! A call of the VMM, as its thread knows of it.

use crate::error::{fail, Error, Result};
use std::cell::{Cell, RefCell};

thread_local! {
    /// The thread is inside a callback of the VMM's.
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// Is this thread inside a callback of the VMM's?
pub fn in_callback() -> bool {
    IN_CALLBACK.get()
}

/// For calls that callbacks must not make: those that change memslots, or wait for resolver calls.
pub fn not_in_callback(name: &str) -> Result<()> {
    if in_callback() {
        fail!(EDEADLK, "{name} must not be called from a callback of the library");
    }
    Ok(())
}

/// Calls into the VMM.
pub fn callback<T>(call: impl FnOnce() -> T) -> T {
    struct Leave(bool);
    impl Drop for Leave {
        fn drop(&mut self) {
            IN_CALLBACK.set(self.0);
        }
    }
    let _leave = Leave(IN_CALLBACK.replace(true));
    call()
}

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
