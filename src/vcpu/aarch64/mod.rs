//! What only arm64 has, of the loop's side: little. KVM has no instruction emulator there, and the
//! hardware walks the guest's page tables, so every access to an absent page is a memory fault of
//! that page. See [`super`] for the list of what an architecture provides.

#[cfg(test)]
pub(super) mod test_guest;

use super::state::LoopState;
use super::{Exit, Vcpu};
use crate::error::Result;
use crate::kernel::address::Hva;
use crate::memory::slots::Slots;

/// Nothing is remembered from one KVM_RUN to the next.
#[derive(Default)]
pub(super) struct State;

impl Vcpu {
    /// An exit that is no memory fault is the VMM's. That is so of KVM_EXIT_MMIO with an address in
    /// a slot, too: it is a write to a read-only one.
    pub(super) fn other_exit(&self, state: &mut LoopState, _interruptible: bool) -> Result<Exit> {
        state.progress.made();
        Ok(Exit::Pass)
    }

    /// No exit is left in the middle.
    pub(super) fn is_left_unfinished(&self) -> bool {
        false
    }

    /// See `is_left_unfinished`.
    pub(super) fn finish_exit(&self, state: &mut LoopState, _interruptible: bool) -> Result<Exit> {
        state.due.finished();
        Ok(Exit::Handled)
    }

    /// KVM reads nothing of guest memory beside `kernel::arch::areas`.
    pub(super) fn prepare(&self, _state: &mut LoopState) -> Result<Exit> {
        Ok(Exit::Handled)
    }

    /// KVM walks no page tables.
    pub(super) fn resolve_walks(&self, _state: &mut LoopState) -> Result<Exit> {
        Ok(Exit::Handled)
    }

    /// KVM signals the address of the page, in read-only slots, too (user_mem_abort in
    /// arch/arm64/kvm/mmu.c): one in no slot means nothing more.
    pub(super) fn sigbus_outside(&self, _state: &mut LoopState, _slots: &Slots, _address: Hva) -> Result<Option<Exit>> {
        Ok(None)
    }
}
