//! The areas of guest memory that KVM itself writes: their pages are made present before it does,
//! as far as the library learns of them.

use super::state::LoopState;
use super::{Exit, Vcpu};
use crate::error::Result;
use crate::kernel::address::Gpa;
use crate::kernel::arch;
use std::ops::Range;

impl Vcpu {
    /// Makes those present that the guest registered before it came to this library.
    pub(super) fn resolve_areas(&self, state: &mut LoopState) -> Result<Exit> {
        for (space, area) in arch::areas(&self.fd) {
            match self.resolve_area(state, space, &area, true)? {
                Exit::Handled => {}
                other => return Ok(other),
            }
        }
        Ok(Exit::Handled)
    }

    /// Makes one area present. Left at a kick only if the caller can come back.
    pub(super) fn resolve_area(
        &self,
        state: &mut LoopState,
        space: u32,
        area: &Range<Gpa>,
        interruptible: bool,
    ) -> Result<Exit> {
        let slots = self.vm.engine.memory.slots();
        // Each area is in two pages at most.
        for byte in [area.start, area.start + (area.end - area.start - 1)] {
            if !slots.at(space, byte).is_some_and(|slot| slot.block.is_marked()) {
                continue;
            }
            match self.resolve_range(state, space, byte, byte + 1, interruptible) {
                // A page that is lost the guest meets by itself, if it wants it.
                Ok(Exit::Handled | Exit::MemoryError) => {}
                Err(e) if e.errno == libc::ENOENT => {} // the slot has just been deleted
                other => return other,
            }
        }
        Ok(Exit::Handled)
    }
}
