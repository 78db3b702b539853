//! Mechanisms and kinds of memory.

use crate::kernel::mem::Kind;
use crate::mechanism::MECHANISMS;
use crate::vm::memslots;
use std::fmt;

/// How a vCPU's access to an absent page comes to the library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mechanism {
    /// A KVM memslot flag makes `KVM_RUN` exit with the faulting address. Needs a kernel that
    /// carries one of the revisions of the flag.
    MemslotFlag = 1,
    /// `UFFDIO_POISON` markers make KVM send SIGBUS to the vCPU's thread. Linux 6.6 and later.
    PoisonTrap = 2,
    /// Classic userfaultfd: reader threads of the library serve the faults. Linux 4.11 and later.
    Userfaultfd = 3,
}

impl Mechanism {
    /// Its name: `memslot-flag`, `poison-trap` or `userfaultfd`.
    pub fn name(self) -> &'static str {
        MECHANISMS[self.place()].name()
    }

    /// Its place in the table of mechanisms.
    pub(super) fn place(self) -> usize {
        let place = MECHANISMS.iter().position(|m| m.number() == self as i32);
        place.expect("every mechanism is in the table")
    }

    /// The mechanism of the table with this number.
    pub(super) fn numbered(number: i32) -> Mechanism {
        match number {
            1 => Mechanism::MemslotFlag,
            2 => Mechanism::PoisonTrap,
            _ => Mechanism::Userfaultfd,
        }
    }
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a memslot's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Private anonymous memory (`MAP_PRIVATE | MAP_ANONYMOUS`).
    Anonymous,
    /// Shared memory: memfd, a file in tmpfs, or `MAP_SHARED | MAP_ANONYMOUS`.
    Shared,
    /// hugetlb memory, private or shared.
    Hugetlb,
}

impl MemoryKind {
    pub(super) fn declared(kind: Option<MemoryKind>) -> memslots::MemoryKind {
        match kind {
            None => memslots::MemoryKind::Auto,
            Some(MemoryKind::Anonymous) => memslots::MemoryKind::Anon,
            Some(MemoryKind::Shared) => memslots::MemoryKind::Shared,
            Some(MemoryKind::Hugetlb) => memslots::MemoryKind::Hugetlb,
        }
    }

    pub(super) fn kind(self) -> Kind {
        match self {
            MemoryKind::Anonymous => Kind::Anon,
            MemoryKind::Shared => Kind::Shared,
            MemoryKind::Hugetlb => Kind::HugetlbShared,
        }
    }
}
