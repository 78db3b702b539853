//! The VMM's callbacks, and their end. A call uses them for as long as it lasts, a thread of the
//! library for as long as it runs. Shutting down the VM takes them away; the last of their users
//! drops them, whatever handles are left. That is when the VMM's finalizer runs.

use super::Resolver;
use crate::error::{fail, Result};
use arc_swap::{ArcSwapOption, Guard};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// The callbacks of a VM that is not shut down.
pub struct Callbacks {
    resolver: Box<dyn Resolver>,
    /// Dropped after the resolver: fields are dropped in order.
    _end: Ending,
}

impl Callbacks {
    /// The VMM's resolver.
    pub fn resolver(&self) -> &dyn Resolver {
        &*self.resolver
    }
}

#[derive(Default)]
struct End {
    is_over: Mutex<bool>,
    changed: Condvar,
}

struct Ending(Arc<End>);

impl Drop for Ending {
    fn drop(&mut self) {
        *self.0.is_over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.changed.notify_all();
    }
}

/// The place where a VM has its callbacks.
pub struct Holder {
    callbacks: ArcSwapOption<Callbacks>,
    end: Arc<End>,
}

impl Holder {
    /// A holder of callbacks.
    pub fn new(resolver: Box<dyn Resolver>) -> Holder {
        let end = Arc::<End>::default();
        let callbacks = Callbacks { resolver, _end: Ending(end.clone()) };
        Holder { callbacks: ArcSwapOption::from_pointee(callbacks), end }
    }

    /// The callbacks for one call; None once they were taken away. A guard, not a reference count:
    /// vCPUs do not meet here.
    pub fn get(&self) -> Guard<Option<Arc<Callbacks>>> {
        self.callbacks.load()
    }

    /// The callbacks for a thread of the library, which may use the VMM's memory between calls,
    /// too.
    pub fn keep(&self) -> Option<Arc<Callbacks>> {
        self.callbacks.load_full()
    }

    /// Takes the callbacks away. The last user drops them.
    pub fn take_away(&self) {
        drop(self.callbacks.swap(None));
    }

    /// Waits until the callbacks were taken away and dropped; ETIMEDOUT if that takes longer.
    pub fn wait_for_end(&self, timeout: Option<Duration>) -> Result<()> {
        let End { is_over, changed } = &*self.end;
        let over = is_over.lock().unwrap_or_else(PoisonError::into_inner);
        let goes_on = |over: &mut bool| !*over;
        let over = match timeout {
            None => changed.wait_while(over, goes_on).unwrap_or_else(PoisonError::into_inner),
            Some(timeout) => {
                changed.wait_timeout_while(over, timeout, goes_on).unwrap_or_else(PoisonError::into_inner).0
            }
        };
        if !*over {
            fail!(ETIMEDOUT, "a callback of the VM is still under way");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Answer, Fault};
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    struct Counted(Arc<AtomicU32>);

    impl Resolver for Counted {
        fn resolve(&self, _: &Fault) -> Answer {
            Answer::Lost
        }
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    #[test]
    fn the_last_user_drops_them() {
        let dropped = Arc::new(AtomicU32::new(0));
        let holder = Holder::new(Box::new(Counted(dropped.clone())));
        let (call, thread) = (holder.get(), holder.keep());
        holder.take_away();
        assert!(holder.get().is_none() && holder.keep().is_none());
        drop(call);
        assert_eq!(holder.wait_for_end(Some(Duration::ZERO)).unwrap_err().errno, libc::ETIMEDOUT);
        assert_eq!(dropped.load(SeqCst), 0);
        drop(thread);
        holder.wait_for_end(None).unwrap();
        assert_eq!(dropped.load(SeqCst), 1);
    }
}
