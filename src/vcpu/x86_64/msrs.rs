//! Guests' writes to the MSRs that register memory for KVM, which the VM's filter makes exits.

use super::super::state::LoopState;
use super::super::{Exit, Vcpu};
use crate::error::Result;
use crate::kernel::arch;

impl Vcpu {
    /// Does the write for the guest. KVM would write the memory at once, so its pages are made
    /// present before KVM hears of it. Left at a kick only if the caller can come back.
    pub(super) fn finish_msr_write(&self, state: &mut LoopState, interruptible: bool) -> Result<Exit> {
        if !self.is_area_write() {
            state.due.finished();
            return Ok(Exit::Pass);
        }
        state.due.unfinished();
        let write = self.run.msr_write();
        // Should the VMM go on after an error, the guest is told: it gets #GP.
        self.run.set_msr_failed(true);
        if let Some(area) = arch::area_of_msr(write.index, write.data) {
            match self.resolve_area(state, 0, &area, interruptible)? {
                Exit::Handled => {}
                other => return Ok(other),
            }
        }
        self.run.set_msr_failed(!self.fd.set_msr(write.index, write.data)?);
        self.exit_finished(state);
        Ok(Exit::Handled)
    }

    /// Is the write in kvm_run one that the library's filter made an exit?
    pub(super) fn is_area_write(&self) -> bool {
        let write = self.run.msr_write();
        write.filtered && arch::is_area_msr(write.index)
    }
}
