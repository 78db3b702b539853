//! The byte of `struct kvm_run` that keeps KVM_RUN from beginning.

use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU8, Ordering::SeqCst};

/// `kvm_run.immediate_exit`, which any thread and any signal handler may set: KVM_RUN then
/// completes what the last exit left, and returns at once with EINTR. KVM asks only whether the
/// byte is 0, so there is room for two: the VMM writes 0 and 1, and the library has a bit of its
/// own. Neither clears what the other has set, unless the VMM writes 0.
///
/// It may outlive its `Run`, which detaches it: from then on it does nothing.
#[derive(Debug)]
pub struct ImmediateExit {
    /// NULL once it is detached.
    byte: AtomicPtr<AtomicU8>,
    /// Accesses under way, which may have found the byte.
    accesses: AtomicU32,
}

/// The library's bit of the byte.
pub(super) const LIBRARY_BIT: u8 = 2;

impl ImmediateExit {
    /// The byte at this address.
    ///
    /// # Safety
    /// It stays mapped until `detach` has returned.
    pub(super) unsafe fn at(byte: *mut AtomicU8) -> ImmediateExit {
        ImmediateExit { byte: AtomicPtr::new(byte), accesses: AtomicU32::new(0) }
    }

    /// The byte of no vCPU: raising it does nothing.
    #[cfg(test)]
    pub fn none() -> std::sync::Arc<ImmediateExit> {
        std::sync::Arc::new(ImmediateExit { byte: AtomicPtr::default(), accesses: AtomicU32::new(0) })
    }

    /// Accesses the byte; None if it is detached. Async-signal-safe.
    fn access<T>(&self, access: impl FnOnce(&AtomicU8) -> T) -> Option<T> {
        self.accesses.fetch_add(1, SeqCst);
        // SAFETY: the byte stays mapped until `detach` has returned. If the load finds the byte,
        // this access was counted before `detach` looks, which waits for it.
        let done = unsafe { self.byte.load(SeqCst).as_ref() }.map(access);
        self.accesses.fetch_sub(1, SeqCst);
        done
    }

    /// Sets the library's bit; async-signal-safe.
    pub fn raise(&self) {
        self.access(|byte| byte.fetch_or(LIBRARY_BIT, SeqCst));
    }

    /// Clears the library's bit.
    pub fn lower(&self) {
        self.access(|byte| byte.fetch_and(!LIBRARY_BIT, SeqCst));
    }

    /// Is the library's bit set?
    pub fn is_raised(&self) -> bool {
        self.access(|byte| byte.load(SeqCst) & LIBRARY_BIT != 0) == Some(true)
    }

    /// Has the VMM set its part of the byte?
    pub fn is_the_vmms(&self) -> bool {
        self.access(|byte| byte.load(SeqCst) & !LIBRARY_BIT != 0) == Some(true)
    }

    /// Do both name the same byte?
    pub fn is_same(&self, other: &ImmediateExit) -> bool {
        let address = self.byte.load(SeqCst);
        !address.is_null() && address == other.byte.load(SeqCst)
    }

    /// Forgets the byte, as its kvm_run is about to be unmapped, and waits for the accesses under
    /// way.
    pub fn detach(&self) {
        self.forget();
        while self.accesses.load(SeqCst) > 0 {
            std::thread::yield_now();
        }
    }

    /// Forgets the byte without waiting: for a forked child, where no other thread is that may have
    /// an access under way.
    pub(super) fn forget(&self) {
        self.byte.store(std::ptr::null_mut(), SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    /// The byte may be unmapped as soon as `detach` has returned: no access is under way then.
    #[test]
    fn detach_waits_for_accesses() {
        let byte = Box::into_raw(Box::new(AtomicU8::new(0)));
        // SAFETY: the byte stays until the end of the test.
        let exit = unsafe { ImmediateExit::at(byte) };
        let (begun, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                exit.access(|_| {
                    begun.store(true, SeqCst);
                    std::thread::sleep(Duration::from_millis(50));
                    is_over.store(true, SeqCst);
                })
            });
            while !begun.load(SeqCst) {
                std::thread::yield_now();
            }
            exit.detach();
            assert!(is_over.load(SeqCst));
        });
        exit.raise();
        assert!(!exit.is_raised() && exit.access(|_| ()).is_none());
        // SAFETY: it came from a box, and nothing refers to it any more.
        assert_eq!(unsafe { Box::from_raw(byte) }.into_inner(), 0);
    }

    #[test]
    fn a_run_that_goes_detaches_its_byte() {
        let system = needs!(super::super::SystemFd::open());
        let vcpu = system.create_vm().unwrap().create_vcpu(0).unwrap();
        let run = super::super::Run::map(&system, &vcpu).unwrap();
        let exit = run.immediate_exit().clone();
        exit.raise();
        assert!(exit.is_raised() && run.is_exit_raised() && !exit.is_the_vmms());
        drop(run);
        exit.raise();
        assert!(!exit.is_raised());
    }
}
