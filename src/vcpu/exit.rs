//! What KVM_RUN's return means.

use super::state::LoopState;
use super::{Exit, Vcpu};
use crate::error::{fail, Result};
use crate::kernel::abi::Access;
use crate::kernel::address::Gpa;
use kvm_bindings as kb;

impl Vcpu {
    /// Serves an exit that is a fault; tells what any other one is. `interruptible`: the caller
    /// comes back if a wait is left for a kick.
    pub(super) fn exit(
        &self,
        state: &mut LoopState,
        ret: std::result::Result<(), i32>,
        interruptible: bool,
    ) -> Result<Exit> {
        state.due.kvm_run_returned();
        if ret == Err(libc::EINTR) {
            return self.interrupted(state);
        }
        self.seat.forget_bus();
        let errno = ret.err().unwrap_or(0);
        if let Some(fault) = self.vm.host.abi.and_then(|abi| abi.decode(errno, &self.run)) {
            return self.fault_at_gpa(state, fault.gpa, fault.access);
        }
        match ret {
            Ok(()) => self.other_exit(state, interruptible),
            Err(errno) => self.failed(errno),
        }
    }

    /// KVM_RUN has failed, and not as the ABI of the memslot flag says.
    fn failed(&self, errno: i32) -> Result<Exit> {
        if let Some(notice) = self.seat.take_notice() {
            return self.receive(notice);
        }
        if let Some(exit) = (errno == libc::EFAULT).then(|| self.lost_somewhere()).flatten() {
            return Ok(exit);
        }
        match errno {
            libc::EFAULT if self.run.exit_reason() != kb::KVM_EXIT_MEMORY_FAULT => fail!(
                EFAULT,
                "KVM_RUN failed with EFAULT and did not say where: a memslot's host memory can't be accessed (unmapped, or not writable?)"
            ),
            _ => Ok(Exit::Pass),
        }
    }

    fn fault_at_gpa(&self, state: &mut LoopState, gpa: Gpa, access: Access) -> Result<Exit> {
        let slots = self.vm.engine.memory.slots();
        match slots.at(self.run.space(), gpa) {
            Some(slot) => self.fault(state, &slots, slot, gpa, access, false),
            // The VMM's: private/shared conversion, or a slot that the library doesn't have.
            None => Ok(Exit::Pass),
        }
    }
}
