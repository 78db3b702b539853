//! Instructions that KVM's emulator could not fetch, because their page is absent.

use super::super::state::LoopState;
use super::super::{Exit, Vcpu};
use crate::error::Result;
use crate::kernel::abi::ACCESS_EXEC;
use crate::memory::pages::State;
use crate::resolve::Outcome;

impl Vcpu {
    /// KVM's emulator may have failed for want of the instruction itself. Then makes its page
    /// present, takes back the #UD that KVM queued, and lets the guest try again.
    pub(super) fn emulation_failed(&self, state: &mut LoopState) -> Result<Exit> {
        const LONGEST_INSTRUCTION: u64 = 15;
        const UD: u8 = 6;
        let (regs, sregs) = (self.fd.regs()?, self.fd.sregs()?);
        let start = regs.rip.wrapping_add(sregs.cs.base);
        let slots = self.vm.engine.memory.slots();
        let mut absent = false;
        for linear in [start, start.wrapping_add(LONGEST_INSTRUCTION - 1)] {
            let Some(gpa) = self.fd.translate(linear) else { continue };
            let Some(slot) = slots.at(self.run.space(), gpa) else { continue };
            let page = slot.page_of(gpa);
            if slot.block.pages.get(page) == State::Present {
                continue;
            }
            absent = true;
            match self.resolve_page(&slots, &slot.block, page, ACCESS_EXEC, self.seat)? {
                Outcome::Retry => {
                    self.pause_for_retry(state, slot, page, true)?;
                }
                // After an interruption the instruction fails once more, and this function is
                // called again.
                Outcome::Lost => return self.settled(state, slot, page, Outcome::Lost),
                _ => {}
            }
        }
        if !absent {
            return Ok(Exit::Pass);
        }
        let mut events = self.fd.vcpu_events()?;
        if events.exception.nr == UD {
            (events.exception.injected, events.exception.pending) = (0, 0);
            // Without flags KVM leaves alone what another thread may have changed since (a pending
            // NMI or SIPI, SMM, a triple fault).
            events.flags = 0;
            self.fd.set_vcpu_events(events)?;
        }
        Ok(Exit::Handled)
    }
}
