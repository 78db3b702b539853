//! The VMM's finalizers. Each is called once, when the library no longer uses `opaque`; and not at
//! all if the call that was to make the object failed.

use super::resolver::kvmfault_finalizer;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::sync::Arc;

/// It is not known yet whether the object will exist.
const OPEN: u8 = 0;
/// The object exists: the finalizer runs when the last user is gone.
const ARMED: u8 = 1;
/// The last user went before it was known whether the object will exist.
const UNUSED: u8 = 2;

#[derive(Clone, Copy)]
struct Call {
    finalizer: kvmfault_finalizer,
    opaque: *mut c_void,
}

impl Call {
    /// Calls the finalizer as a callback, on the current thread, which may be in the middle of a
    /// call of the VMM's.
    fn run(self) {
        if let Some(finalizer) = self.finalizer {
            // SAFETY: the VMM's function; nothing in the library uses `opaque` any more.
            crate::resolve::callback(|| unsafe { finalizer(self.opaque) });
        }
    }
}

/// Held by what uses `opaque`.
pub struct Finalizer {
    call: Call,
    state: Arc<AtomicU8>,
}

/// Held by the call that makes the object.
pub struct Arm {
    call: Call,
    state: Arc<AtomicU8>,
}

impl Finalizer {
    /// Makes the two halves; the finalizer is not armed yet.
    pub fn new(finalizer: kvmfault_finalizer, opaque: *mut c_void) -> (Finalizer, Arm) {
        let (call, state) = (Call { finalizer, opaque }, Arc::new(AtomicU8::new(OPEN)));
        (Finalizer { call, state: state.clone() }, Arm { call, state })
    }
}

impl Drop for Finalizer {
    fn drop(&mut self) {
        if self.state.swap(UNUSED, SeqCst) == ARMED {
            self.call.run();
        }
    }
}

impl Arm {
    /// Arms the finalizer: the object exists.
    pub fn arm(self) {
        if self.state.swap(ARMED, SeqCst) == UNUSED {
            // Its user is gone already: a fill may end before its caller knows of it.
            self.call.run();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    unsafe extern "C" fn count(opaque: *mut c_void) {
        // SAFETY: the tests pass a counter that lives.
        unsafe { &*opaque.cast::<AtomicU32>() }.fetch_add(1, SeqCst);
    }

    #[test]
    fn it_runs_once_and_only_for_what_exists() {
        let counter = AtomicU32::new(0);
        let new = || Finalizer::new(Some(count), (&raw const counter).cast_mut().cast());
        let (user, _) = new();
        drop(user);
        assert_eq!(counter.load(SeqCst), 0, "the object was never made");
        let (user, arm) = new();
        arm.arm();
        assert_eq!(counter.load(SeqCst), 0);
        drop(user);
        assert_eq!(counter.load(SeqCst), 1);
        let (user, arm) = new();
        drop(user);
        arm.arm();
        assert_eq!(counter.load(SeqCst), 2, "used up before it was armed");
    }
}
