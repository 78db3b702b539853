//! The VMM's callback, and what it is told.

use super::vm::Vm;
use crate::error::Error;
use crate::kernel::address::Gpa;
use crate::resolve;
use std::fmt;
use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, OnceLock};

/// Fetches pages when they are needed. Closures `Fn(&Vm, &Fault) -> Answer` are resolvers too.
///
/// It runs on the thread of the vCPU that faulted, on a reader thread of the library (host
/// accesses, and all faults of [`Mechanism::Userfaultfd`](crate::Mechanism::Userfaultfd)), on the
/// thread of a background fill, or on the caller's of [`Vm::resolve`]; for different pages
/// concurrently. For one page there is one call at a time, and none once the page is present. The
/// library holds no lock meanwhile.
///
/// It may install the page ([`Vm::install`], [`Vm::zero`], [`Vm::map`], [`Vm::lose`],
/// [`Vm::withdraw`], and what lies around it, see [`Fault::window`]), ask for states and
/// statistics, and kick vCPUs. Other functions fail with `EDEADLK`. It must not touch the absent
/// page through its mapping: that would wait for itself.
///
/// A resolver that panics fails with `ENOTRECOVERABLE`.
///
/// ```
/// use kvmfault::{Answer, Fault, Resolver, Vm};
///
/// /// Every page is full of one byte.
/// struct Pattern(u8);
///
/// impl Resolver for Pattern {
///     fn resolve(&self, vm: &Vm, fault: &Fault) -> Answer {
///         vm.install(fault.gpa(), &vec![self.0; fault.len() as usize]).into()
///     }
/// }
/// ```
pub trait Resolver: Send + Sync + 'static {
    /// Fetches the page at [`Fault::gpa`] and installs it, or says why not.
    fn resolve(&self, vm: &Vm, fault: &Fault<'_>) -> Answer;

    /// Called after the library itself wrote guest memory for an instruction that KVM emulates.
    /// KVM's dirty log does not know of it: a VMM that migrates while pages are absent marks `len`
    /// bytes from `gpa` on dirty.
    fn written(&self, _vm: &Vm, _gpa: u64, _len: u64) {}
}

impl<F: Fn(&Vm, &Fault<'_>) -> Answer + Send + Sync + 'static> Resolver for F {
    fn resolve(&self, vm: &Vm, fault: &Fault<'_>) -> Answer {
        self(vm, fault)
    }
}

/// What a resolver answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// The page is installed.
    Resolved,
    /// The page will be installed later, by any thread; until then those who need it sleep (vCPUs
    /// interruptibly).
    Pending,
    /// The page can't be had, ever. The vCPU's loop returns
    /// [`Exit::MemoryError`](crate::Exit::MemoryError).
    Lost,
    /// Not now: the page is absent again, and the access is repeated after a short, growing pause.
    Retry,
    /// It failed, with this positive errno: the vCPU's loop returns the error, and the page is
    /// absent again.
    Failed(i32),
}

impl From<Result<(), Error>> for Answer {
    /// The answer of a resolver that has just called [`Vm::install`] or its like. `EEXIST` (the
    /// pages are present already) is [`Answer::Resolved`].
    fn from(installed: Result<(), Error>) -> Answer {
        match installed {
            Ok(()) => Answer::Resolved,
            Err(e) if e.errno() == libc::EEXIST => Answer::Resolved,
            Err(e) => Answer::Failed(e.errno()),
        }
    }
}

/// A fault, as a resolver is told of it.
#[derive(Clone, Copy)]
pub struct Fault<'a>(&'a resolve::Fault);

impl Fault<'_> {
    /// The guest physical address of the page that is needed; a multiple of [`len`](Self::len).
    pub fn gpa(&self) -> u64 {
        self.0.gpa.0
    }

    /// The page's size in bytes: 4096, or the huge page size of hugetlb memory.
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Never: a page has bytes.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The page's address in this process, in the VMM's own mapping.
    pub fn hva(&self) -> u64 {
        self.0.hva.0
    }

    /// KVM's number of the memslot.
    pub fn slot(&self) -> u32 {
        self.0.slot
    }

    /// What the kernel says of the access.
    pub fn access(&self) -> Access {
        Access(self.0.access)
    }

    /// Who needs the page.
    pub fn origin(&self) -> Origin {
        match self.0.origin {
            resolve::Origin::Vcpu(number) => Origin::Vcpu(u32::try_from(number).ok()),
            resolve::Origin::Host => Origin::Host,
            resolve::Origin::Prefetch => Origin::Prefetch,
            resolve::Origin::Fill => Origin::Fill,
        }
    }

    /// The readahead window: guest physical addresses around the page that are expected to be
    /// needed next, and of which none was present when the call began. Installing all of it is
    /// welcome, the page alone is enough.
    pub fn window(&self) -> Range<u64> {
        self.0.window.start.0..self.0.window.end.0
    }

    pub(super) fn inner(&self) -> &resolve::Fault {
        self.0
    }
}

impl fmt::Debug for Fault<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What the kernel says of an access; nothing of it is known with
/// [`Mechanism::PoisonTrap`](crate::Mechanism::PoisonTrap).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access(u32);

impl Access {
    /// It is known to be a read.
    pub fn is_read(self) -> bool {
        self.0 & 1 != 0
    }

    /// It is known to be a write.
    pub fn is_write(self) -> bool {
        self.0 & 2 != 0
    }

    /// It is known to be an instruction fetch.
    pub fn is_execute(self) -> bool {
        self.0 & 4 != 0
    }
}

/// Who needs a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// A vCPU, by KVM's number where that is known.
    Vcpu(Option<u32>),
    /// A thread or a system call of this process.
    Host,
    /// No thread waits: [`Vm::resolve`], or readahead.
    Prefetch,
    /// No thread waits: a background fill.
    Fill,
}

/// A resolver as the inside calls it.
pub(super) struct Adapter<R> {
    pub(super) resolver: R,
    /// Set before the first fault can come. The VM owns the adapter, and its end drops it.
    pub(super) vm: Arc<OnceLock<Vm>>,
}

impl<R: Resolver> resolve::Resolver for Adapter<R> {
    fn resolve(&self, fault: &resolve::Fault) -> resolve::Answer {
        let Some(vm) = self.vm.get() else { return resolve::Answer::Failed(libc::ESHUTDOWN) };
        match catch_unwind(AssertUnwindSafe(|| self.resolver.resolve(vm, &Fault(fault)))) {
            Ok(Answer::Resolved) => resolve::Answer::Resolved,
            Ok(Answer::Pending) => resolve::Answer::Pending,
            Ok(Answer::Lost) => resolve::Answer::Lost,
            Ok(Answer::Retry) => resolve::Answer::Retry,
            Ok(Answer::Failed(errno)) => resolve::Answer::Failed(errno.clamp(1, 4095)),
            Err(_) => resolve::Answer::Failed(libc::ENOTRECOVERABLE),
        }
    }

    fn written(&self, gpa: Gpa, len: u64) {
        if let Some(vm) = self.vm.get() {
            let _ = catch_unwind(AssertUnwindSafe(|| self.resolver.written(vm, gpa.0, len)));
        }
    }
}
