//! Memory that the guest can't have: broken though it is PRESENT (hwpoison), as SIGBUS says; or
//! lost, where KVM says no more than EFAULT.

use super::state::LoopState;
use super::{Exit, MemoryError, Vcpu};
use crate::error::Result;
use crate::kernel::abi::ACCESS_UNKNOWN;
use crate::kernel::address::Hva;
use crate::kernel::page::page_size;
use crate::memory::block::Block;
use crate::memory::map;
use crate::memory::slots::{Slot, Slots};
use std::sync::Arc;

/// SIGBUS in a row at an address in no slot, after which they are a memory error: one signal may be
/// stale, and one more may follow an unlucky race.
pub(super) const MOST_BROKEN: u32 = 3;

impl Vcpu {
    /// Without UFFDIO_POISON lost pages are inaccessible, and EFAULT is all that KVM can say. Which
    /// page it was is certain if only one is lost.
    pub(super) fn lost_somewhere(&self) -> Option<Exit> {
        let slots = self.vm.engine.memory.slots();
        let (total, page) = slots.lost();
        let (block, page) = page.filter(|_| !self.vm.has_poison())?;
        let gpa = slots.showing(block, page).filter(|_| total == 1).map(|slot| slot.gpa_of(page));
        let hva = if total == 1 { block.hva_of(page) } else { Hva(0) };
        let _ = self.seat.take_notice(); // the reader that lost it may have reported the same
        Some(self.report(MemoryError { gpa, hva, len: block.page, lost: true }))
    }

    /// SIGBUS with an address: a marker of the library's, or memory that is really broken.
    pub(super) fn broken_page(&self, state: &mut LoopState, code: i32, address: Hva) -> Result<Exit> {
        let slots = self.vm.engine.memory.slots();
        match code {
            libc::BUS_MCEERR_AR => {}
            libc::BUS_MCEERR_AO => return Ok(self.broken_elsewhere(&slots, address)),
            // Sent by a process (kill(2)): it says nothing of memory.
            _ => return Ok(Exit::Interrupted),
        }
        let Some(slot) = slots.at_kvm_hva(address) else {
            if let Some(exit) = self.sigbus_outside(state, &slots, address)? {
                return Ok(exit);
            }
            // Its slot may have been deleted since. A broken page is reported again, whatever is
            // done to the slots.
            let slots = Arc::as_ptr(&slots) as usize;
            return Ok(match state.progress.none_outside(address, slots) < MOST_BROKEN {
                true => Exit::Handled,
                false => self.report_unknown(address),
            });
        };
        let gpa = slot.region.gpa + (address - slot.region.hva);
        self.fault(state, &slots, slot, gpa, ACCESS_UNKNOWN, true)
    }

    /// The kernel found broken memory that the guest hasn't touched, and tells the threads that
    /// asked for it (PR_MCE_KILL_EARLY). The address may be in either mapping.
    fn broken_elsewhere(&self, slots: &Slots, address: Hva) -> Exit {
        let Some((block, page)) = slots.at_hva(address) else { return self.report_unknown(address) };
        let gpa = slots.showing(block, page).map(|slot| slot.gpa_of(page));
        self.report(MemoryError { gpa, hva: block.hva_of(page), len: block.page, lost: false })
    }

    pub(super) fn is_broken(&self, block: &Block, page: u64, hva: Hva) -> bool {
        let touching = self.seat.touch(block);
        touching.is_some() && map::is_broken(&self.vm.engine.memory, block, page, hva)
    }

    pub(super) fn report_broken(&self, state: &mut LoopState, slot: &Slot, page: u64) -> Exit {
        state.progress.made();
        let (gpa, hva) = (Some(slot.gpa_of(page)), slot.block.hva_of(page));
        self.report(MemoryError { gpa, hva, len: slot.block.page, lost: false })
    }

    /// A memory error of which no more is known than an address in no slot.
    pub(super) fn report_unknown(&self, address: Hva) -> Exit {
        self.report(MemoryError { gpa: None, hva: address, len: page_size(), lost: false })
    }
}
