//! The areas of guest memory that KVM itself writes: their pages come before it does, as far as anybody is told.

use super::{Exit, Own, Vcpu};
use crate::error::Result;
use crate::kernel::arch;
use std::ops::Range;

impl Vcpu {
    /// Those that the guest named before it came here.
    pub(super) fn bring_areas(&self, own: &mut Own) -> Result<Exit> {
        for (space, area) in arch::areas(&self.fd) {
            match self.bring_area(own, space, &area, true)? {
                Exit::Handled => {}
                other => return Ok(other),
            }
        }
        Ok(Exit::Handled)
    }

    /// One that it names now, by a write to an MSR that the VM's filter made an exit of. KVM's own way would be to write it at once, so its pages
    /// come before KVM hears of it. Left at a kick only if the caller can come back to it.
    pub(super) fn name_area(&self, own: &mut Own, interruptible: bool) -> Result<Exit> {
        let write = self.run.msr_write();
        if !write.filtered || !arch::is_area_msr(write.index) {
            own.unfinished = false;
            return Ok(Exit::Pass);
        }
        own.unfinished = true;
        // Should the VMM go on after an error, the guest is told: it gets #GP.
        self.run.set_msr_failed(true);
        if let Some(area) = arch::area_of_msr(write.index, write.data) {
            match self.bring_area(own, 0, &area, interruptible)? {
                Exit::Handled => {}
                other => return Ok(other),
            }
        }
        self.run.set_msr_failed(!self.fd.set_msr(write.index, write.data)?);
        self.is_over(own);
        Ok(Exit::Handled)
    }

    fn bring_area(&self, own: &mut Own, space: u32, area: &Range<u64>, interruptible: bool) -> Result<Exit> {
        let slots = self.vm.engine.memory.slots();
        // Each is in two pages at most.
        for byte in [area.start, area.end - 1] {
            if !slots.at(space, byte).is_some_and(|slot| slot.block.is_marked()) {
                continue;
            }
            match self.bring_range(own, space, byte, byte + 1, interruptible) {
                // One that is lost the guest meets by itself, if it wants it.
                Ok(Exit::Handled | Exit::MemoryError) => {}
                Err(e) if e.errno == libc::ENOENT => {} // the slot has just been deleted
                other => return other,
            }
        }
        Ok(Exit::Handled)
    }
}
