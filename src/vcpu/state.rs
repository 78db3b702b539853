//! What the vCPU's loop remembers from one KVM_RUN to the next.

use super::arch;
use crate::kernel::address::Hva;

/// What only the vCPU's thread uses.
#[derive(Default)]
pub(super) struct LoopState {
    /// The thread that runs the vCPU: see `thread::token`.
    pub attached: Option<u64>,
    /// The threads where the library has blocked its signals.
    pub holds: Vec<u64>,
    /// The VMM has its own loop, and is busy outside of it.
    pub is_away: bool,
    /// What has to be done before KVM_RUN.
    pub due: Due,
    /// Faults at one page without progress.
    pub progress: Progress,
    /// KVM_PRE_FAULT_MEMORY doesn't work for this vCPU.
    pub no_pre_fault: bool,
    /// What the architecture's part of the loop remembers.
    #[allow(dead_code)] // some architectures remember nothing
    pub arch: arch::State,
}

/// What has to be done before KVM_RUN. A new handle goes from `Look` to `Nothing` in the order of
/// the variants. A device's exit leads from `Nothing` back to `Walk`, and an exit that is left
/// unfinished from anywhere to `Finish`. All transitions are methods here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)] // a tag of its own: `kvm_run_returned` runs at every fault
pub(super) enum Due {
    /// See whether kvm_run has an exit that an earlier handle of this vCPU left unfinished.
    #[default]
    Look,
    /// Finish the exit in kvm_run: a page that it needs isn't present yet.
    Finish {
        /// The page (by hva) that the VMM knows can't be had: see `Vcpu::is_known_lost`.
        known_lost: Option<Hva>,
        /// The first KVM_RUN is still to come: `Prepare` is next.
        is_first: bool,
    },
    /// Before the first KVM_RUN: make what KVM itself accesses present.
    Prepare,
    /// After a device's exit: make the page tables present that KVM may walk when it goes on.
    Walk,
    /// Nothing: the guest can run.
    Nothing,
}

impl Due {
    /// KVM_RUN has returned, and with that has ended whatever was unfinished.
    #[inline]
    pub fn kvm_run_returned(&mut self) {
        if matches!(self, Due::Look | Due::Finish { .. }) {
            self.finished();
        }
    }

    /// kvm_run was looked at: it has an unfinished exit, or none.
    pub fn looked(&mut self, is_unfinished: bool) {
        match is_unfinished {
            true => self.unfinished(),
            false => *self = Due::Prepare,
        }
    }

    /// The exit in kvm_run is being finished. That may be left in the middle.
    pub fn unfinished(&mut self) {
        if !matches!(self, Due::Finish { .. }) {
            let is_first = matches!(self, Due::Look | Due::Prepare);
            *self = Due::Finish { known_lost: None, is_first };
        }
    }

    /// The VMM is told that a page of the unfinished exit can't be had. Has it been told of this
    /// page before?
    #[allow(dead_code)] // used where KVM has an instruction emulator
    pub fn is_known_lost(&mut self, hva: Hva) -> bool {
        match self {
            Due::Finish { known_lost, .. } => known_lost.replace(hva) == Some(hva),
            _ => false,
        }
    }

    /// The exit in kvm_run is finished.
    pub fn finished(&mut self) {
        *self = match *self {
            Due::Look | Due::Finish { is_first: true, .. } => Due::Prepare,
            Due::Finish { is_first: false, .. } => Due::Nothing,
            other => other,
        };
    }

    /// What KVM itself accesses is present.
    pub fn prepared(&mut self) {
        *self = Due::Walk;
    }

    /// The VMM got the exit of a device.
    #[allow(dead_code)] // used where KVM has an instruction emulator
    pub fn device_exited(&mut self) {
        if *self == Due::Nothing {
            *self = Due::Walk;
        }
    }

    /// The page tables are present.
    pub fn walked(&mut self) {
        *self = Due::Nothing;
    }
}

/// How often in a row the vCPU has come to one page without progress.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// The page, by hva.
    at: Hva,
    times: u32,
    /// What the page's gate said of discards when the vCPU came to it last, and it was PRESENT.
    discards: Option<u32>,
    /// The slots in which the vCPU looked for an address in vain; only compared.
    slots: usize,
}

impl Progress {
    /// There is progress.
    #[inline]
    pub fn made(&mut self) {
        self.times = 0;
    }

    /// There is none at this page; how often in a row.
    pub fn none_at(&mut self, hva: Hva) -> u32 {
        self.times = if self.at == hva { self.times + 1 } else { 1 };
        self.at = hva;
        self.times
    }

    /// There is none at a page that is PRESENT, with `discards` as its gate counts them. That other
    /// threads discard pages is progress, too.
    pub fn none_at_present(&mut self, hva: Hva, discards: Option<u32>) -> u32 {
        if discards.is_none() || discards != self.discards {
            self.made();
        }
        self.discards = discards;
        self.none_at(hva)
    }

    /// There is none at an address that is in none of these slots. That they change is progress,
    /// too.
    pub fn none_outside(&mut self, hva: Hva, slots: usize) -> u32 {
        if std::mem::replace(&mut self.slots, slots) != slots {
            self.made();
        }
        self.none_at(hva)
    }

    /// How often in a row, up to now.
    #[allow(dead_code)] // used where KVM has an instruction emulator
    pub fn times(&self) -> u32 {
        self.times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due_is_done_in_order() {
        let mut due = Due::default();
        due.looked(true);
        assert!(matches!(due, Due::Finish { is_first: true, .. }));
        due.finished();
        assert_eq!(due, Due::Prepare);
        due.prepared();
        assert_eq!(due, Due::Walk);
        due.walked();
        assert_eq!(due, Due::Nothing);
        due.device_exited();
        assert_eq!(due, Due::Walk);
        due.walked();
        due.unfinished();
        due.finished();
        assert_eq!(due, Due::Nothing);
    }

    /// A VMM with its own loop may never call `resume`: KVM_RUN alone doesn't prepare anything.
    #[test]
    fn kvm_run_ends_what_is_unfinished_and_prepares_nothing() {
        let mut due = Due::default();
        due.kvm_run_returned();
        assert_eq!(due, Due::Prepare);
        due.device_exited();
        assert_eq!(due, Due::Prepare);
        due.unfinished();
        due.kvm_run_returned();
        assert_eq!(due, Due::Prepare);
        due.prepared();
        due.kvm_run_returned();
        assert_eq!(due, Due::Walk);
    }

    #[test]
    fn a_lost_page_is_told_once_for_each_access() {
        let mut due = Due::Nothing;
        due.unfinished();
        assert!(!due.is_known_lost(Hva(0x1000)));
        due.unfinished();
        assert!(due.is_known_lost(Hva(0x1000)));
        assert!(!due.is_known_lost(Hva(0x2000)));
        due.kvm_run_returned();
        due.unfinished();
        assert!(!due.is_known_lost(Hva(0x2000)));
    }
}
