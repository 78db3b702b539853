//! What only x86-64 has, of the loop's side: KVM's instruction emulator, which accesses guest
//! memory itself; MSRs that register memory; page tables that KVM walks. See [`super`] for the list
//! of what an architecture provides.

mod emulated;
mod instruction;
mod msrs;
mod readonly;
mod tables;
#[cfg(test)]
pub(super) mod test_guest;

use super::state::LoopState;
use super::{Exit, Vcpu};
use crate::error::Result;
use kvm_bindings as kb;

/// What is remembered from one KVM_RUN to the next: the page tables of two operands.
#[derive(Default)]
pub(super) struct State {
    walked: [tables::Walked; 2],
}

impl Vcpu {
    /// Serves an exit that is no memory fault, or passes it to the VMM. Left at a kick only if the
    /// caller can come back.
    pub(super) fn other_exit(&self, state: &mut LoopState, interruptible: bool) -> Result<Exit> {
        match self.run.exit_reason() {
            kb::KVM_EXIT_MMIO => {
                let exit = self.finish_access(state, interruptible)?;
                if exit == Exit::Pass {
                    state.due.device_exited();
                }
                Ok(exit)
            }
            kb::KVM_EXIT_IO => {
                state.progress.made();
                state.due.device_exited();
                Ok(Exit::Pass)
            }
            kb::KVM_EXIT_X86_WRMSR if self.vm.filters_msrs => self.finish_msr_write(state, interruptible),
            kb::KVM_EXIT_INTERNAL_ERROR if self.run.words()[0] as u32 == kb::KVM_INTERNAL_ERROR_EMULATION => {
                self.emulation_failed(state)
            }
            _ => {
                state.progress.made();
                Ok(Exit::Pass)
            }
        }
    }

    /// Has an earlier handle left an access, or a write to an MSR, in the middle? kvm_run still has
    /// it.
    pub(super) fn is_left_unfinished(&self) -> bool {
        match self.run.exit_reason() {
            kb::KVM_EXIT_MMIO => self.is_access_to_slots(),
            kb::KVM_EXIT_X86_WRMSR => self.vm.filters_msrs && self.is_area_write(),
            _ => false,
        }
    }

    /// Goes on with what was left in the middle.
    pub(super) fn finish_exit(&self, state: &mut LoopState, interruptible: bool) -> Result<Exit> {
        match self.run.exit_reason() {
            kb::KVM_EXIT_MMIO => self.finish_access(state, interruptible),
            _ => self.finish_msr_write(state, interruptible),
        }
    }

    /// The exit in kvm_run is finished. kvm_run says so to the next handle of this vCPU. (KVM
    /// doesn't look at it.)
    fn exit_finished(&self, state: &mut LoopState) {
        state.due.finished();
        state.progress.made();
        self.run.clear_exit_reason();
    }
}
