//! What works on this machine.

use super::kinds::{Mechanism, MemoryKind};
use crate::error::Result;
use crate::kernel::kvm::SystemFd;
use crate::mechanism::report::Report;
use crate::resolve::not_in_callback;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Finds out which mechanisms work here. `kvm` is an open `/dev/kvm`; with `None` it is opened.
///
/// Asks the kernel by doing: it makes scratch VMs, and takes some milliseconds. A mechanism that
/// does not work is no error; [`Probe::explain`] says why. Not from callbacks.
///
/// ```no_run
/// # fn main() -> Result<(), kvmfault::Error> {
/// use kvmfault::{Mechanism, MemoryKind};
///
/// let probe = kvmfault::probe(None)?;
/// if !probe.works(Mechanism::PoisonTrap, MemoryKind::Shared) {
///     eprintln!("{}", probe.explain());
/// }
/// # Ok(())
/// # }
/// ```
pub fn probe(kvm: Option<BorrowedFd<'_>>) -> Result<Probe> {
    not_in_callback("probing")?;
    let system = match kvm {
        None => SystemFd::open()?,
        Some(fd) => SystemFd::duplicate(fd.as_raw_fd(), "kvm")?,
    };
    Ok(Probe(Report::new(&system)))
}

/// What [`probe`] has found out.
pub struct Probe(Report);

impl Probe {
    /// Can this mechanism serve such memory? ([`Mechanism::PoisonTrap`] serves
    /// [`MemoryKind::Anonymous`] only with [`Memslot::vcpu_only`](crate::Memslot::vcpu_only).)
    pub fn works(&self, mechanism: Mechanism, kind: MemoryKind) -> bool {
        self.0.check(mechanism.place(), kind.kind()).is_ok()
    }

    /// The revision of the memslot flag that was proven in a scratch VM.
    pub fn abi(&self) -> Option<&'static str> {
        self.0.abi()
    }

    /// The `UFFD_FEATURE_*` bits that this process can have; 0 if it can't open a userfaultfd.
    pub fn uffd_features(&self) -> u64 {
        self.0.features()
    }

    /// Has KVM `KVM_PRE_FAULT_MEMORY` (see [`VmOptions::pre_fault`](crate::VmOptions::pre_fault))?
    pub fn pre_fault_memory(&self) -> bool {
        self.0.pre_fault()
    }

    /// A report for people: every path that was tried, why it failed, and what to do.
    pub fn explain(&self) -> String {
        self.0.explain()
    }
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mechanisms = [Mechanism::MemslotFlag, Mechanism::PoisonTrap, Mechanism::Userfaultfd];
        let shared: Vec<_> = mechanisms.iter().filter(|m| self.works(**m, MemoryKind::Shared)).collect();
        f.debug_struct("Probe").field("shared", &shared).field("abi", &self.abi()).finish_non_exhaustive()
    }
}
