//! The byte of `struct kvm_run` that keeps KVM_RUN from beginning.

use std::sync::atomic::{AtomicPtr, AtomicU8, Ordering::SeqCst};

/// `kvm_run.immediate_exit`, which any thread and any signal handler may set: KVM_RUN then
/// completes what the last exit left, and returns at once with EINTR. KVM asks only whether the
/// byte is 0, so there is room for two: the VMM writes 0 and 1, and the library has a bit of its
/// own. Neither clears what the other has set, unless the VMM writes 0.
#[derive(Debug)]
pub struct ImmediateExit(AtomicPtr<AtomicU8>);

/// The library's bit of the byte.
const LIBRARY_BIT: u8 = 2;

impl ImmediateExit {
    /// The byte at this address.
    ///
    /// # Safety
    /// It stays mapped until `detach`, and after that until no caller can have found it before.
    pub(super) unsafe fn at(byte: *mut AtomicU8) -> ImmediateExit {
        ImmediateExit(AtomicPtr::new(byte))
    }

    /// The byte of no vCPU: raising it does nothing.
    #[cfg(test)]
    pub fn none() -> ImmediateExit {
        ImmediateExit(AtomicPtr::default())
    }

    fn byte(&self) -> Option<&AtomicU8> {
        // SAFETY: the byte is in the vCPU's kvm_run, which stays mapped until `detach`, and after
        // that for as long as there are callers that may have found it before (see `Seat::detach`).
        unsafe { self.0.load(SeqCst).as_ref() }
    }

    /// Sets the library's bit; async-signal-safe.
    pub fn raise(&self) {
        if let Some(byte) = self.byte() {
            byte.fetch_or(LIBRARY_BIT, SeqCst);
        }
    }

    /// Clears the library's bit.
    pub fn lower(&self) {
        if let Some(byte) = self.byte() {
            byte.fetch_and(!LIBRARY_BIT, SeqCst);
        }
    }

    /// Is the library's bit set?
    pub fn is_raised(&self) -> bool {
        self.byte().is_some_and(|byte| byte.load(SeqCst) & LIBRARY_BIT != 0)
    }

    /// Has the VMM set its part of the byte?
    pub fn is_the_vmms(&self) -> bool {
        self.byte().is_some_and(|byte| byte.load(SeqCst) & !LIBRARY_BIT != 0)
    }

    /// Do both name the same byte?
    pub fn is_same(&self, other: &ImmediateExit) -> bool {
        let address = self.0.load(SeqCst);
        !address.is_null() && address == other.0.load(SeqCst)
    }

    /// Forgets the byte: its kvm_run is about to be unmapped.
    pub fn detach(&self) {
        self.0.store(std::ptr::null_mut(), SeqCst);
    }
}
