//! What a thread knows of the VMM's callback that it is inside of.

use crate::error::{fail, Error, Result};
use std::cell::{Cell, RefCell};

thread_local! {
    /// The bits `INSIDE` and `FAILED`.
    static STATE: Cell<u8> = const { Cell::new(0) };
    /// The error of the install that failed last.
    static ERROR: RefCell<Option<Error>> = const { RefCell::new(None) };
}

/// The thread is inside a callback.
const INSIDE: u8 = 1 << 0;
/// An install that this callback called for has failed.
const FAILED: u8 = 1 << 1;

/// A callback of the VMM, entered by the calling thread and left when this is dropped. Callbacks
/// may be nested; each has a state of its own.
pub struct Callback {
    outer: u8,
}

impl Callback {
    /// Enters a callback, for which no install has failed yet.
    #[inline]
    pub fn enter() -> Callback {
        Callback { outer: STATE.replace(INSIDE) }
    }

    /// Why an install failed that this callback called for, if that was with this errno. The errno
    /// is all that a resolver can return.
    #[cold]
    pub fn failure(&self, errno: i32) -> Option<Box<Error>> {
        match STATE.get() & FAILED {
            0 => None,
            _ => ERROR.take().filter(|error| error.errno == errno).map(Box::new),
        }
    }
}

impl Drop for Callback {
    #[inline]
    fn drop(&mut self) {
        STATE.set(self.outer);
    }
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
    let _callback = Callback::enter();
    call()
}

/// Is the calling thread inside a callback of the VMM?
pub fn in_callback() -> bool {
    STATE.get() & INSIDE != 0
}

/// Notes that an install has failed. If a callback called for it, the callback's guard has the
/// error.
pub fn note_failure(error: &Error) {
    if in_callback() {
        STATE.set(STATE.get() | FAILED);
        ERROR.set(Some(error.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(errno: i32) -> Error {
        Error::new(errno, "why")
    }

    #[test]
    fn a_thread_is_inside_until_the_outermost_callback_ends() {
        assert!(!in_callback());
        callback(|| {
            callback(|| assert!(in_callback()));
            assert!(in_callback());
        });
        assert!(!in_callback());
    }

    #[test]
    fn a_failure_is_told_of_the_call_in_which_it_happened() {
        note_failure(&error(libc::EIO));
        let call = Callback::enter();
        assert_eq!(call.failure(libc::EIO), None, "it was before this call");
        note_failure(&error(libc::EIO));
        assert_eq!(call.failure(libc::EIO), Some(Box::new(error(libc::EIO))));
        note_failure(&error(libc::EIO));
        assert_eq!(call.failure(libc::EINVAL), None, "the resolver returned another errno");
        note_failure(&error(libc::EFAULT));
        drop(call);
        assert_eq!(Callback::enter().failure(libc::EFAULT), None, "a call before this one noted it");
    }
}
