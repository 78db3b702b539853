//! Memory that the guest can't have: broken though it is PRESENT (hwpoison), as SIGBUS tells; or lost, where KVM can't say more than EFAULT.

use super::{Exit, MemoryError, Own, Vcpu, MOST_MAPS};
use crate::error::Result;
use crate::kernel::{arch, mem};
use crate::memory::block::Block;
use crate::memory::install;
use crate::memory::pages::State;
use crate::memory::slots::{Slot, Slots};
use crate::resolve::Outcome;

/// So many SIGBUS in a row at an address of which nothing is known are a memory error: one signal may be stale, and one more may follow an unlucky
/// race.
const MOST_BROKEN: u32 = 3;

impl Vcpu {
    /// Without UFFDIO_POISON lost pages are inaccessible, and EFAULT is all that KVM can say. Which page it was is certain if only one is lost.
    pub(super) fn lost_somewhere(&self) -> Option<Exit> {
        let slots = self.vm.engine.memory.slots();
        let (total, page) = slots.lost();
        let (block, page) = page.filter(|_| !self.vm.has_poison())?;
        let gpa = slots.showing(block, page).filter(|_| total == 1).map(|slot| slot.gpa_of(page));
        let hva = if total == 1 { block.hva_of(page) } else { 0 };
        let _ = self.seat.take_news(); // the reader that lost it may have told the same
        Some(self.report(MemoryError { gpa, hva, len: block.page, lost: true }))
    }

    /// SIGBUS with an address: a marker of ours, or memory that is really broken.
    pub(super) fn broken_page(&self, own: &mut Own, code: i32, address: u64) -> Result<Exit> {
        let slots = self.vm.engine.memory.slots();
        let required = code == libc::BUS_MCEERR_AR;
        let Some(slot) = slots.at_kvm_hva(address).filter(|_| required) else {
            if required && address >= arch::KERNEL_SPACE {
                return self.broken_somewhere(own, &slots, address);
            }
            // Its slot may have been deleted since; real trouble comes again.
            if required && self.stuck_at(own, address) < MOST_BROKEN {
                return Ok(Exit::Handled);
            }
            let error = MemoryError { gpa: None, hva: address, len: mem::PAGE, lost: false };
            return Ok(self.report(error));
        };
        let gpa = slot.region.gpa + (address - slot.region.hva);
        self.fault(own, &slots, slot, gpa, 0, true)
    }

    /// For a read-only slot KVM signals an address that is none: gfn_to_hva_memslot answers KVM_HVA_ERR_RO_BAD, as if for a write
    /// (kvm_send_hwpoison_signal). So whatever is absent in such slots is brought; they are ROMs, and small.
    fn broken_somewhere(&self, own: &mut Own, slots: &Slots, address: u64) -> Result<Exit> {
        let mut brought = false;
        let readonly = || slots.iter().filter(|s| s.is_readonly());
        for slot in readonly().filter(|s| s.block.is_marked()) {
            for page in slot.pages().filter(|&p| matches!(slot.block.pages.get(p), State::Absent | State::Resolving)) {
                match self.bring(slots, &slot.block, page, 0, self.seat)? {
                    Outcome::Retry => return self.again(own, slot, page, true),
                    Outcome::Interrupted => return self.look_up(),
                    Outcome::Lost => {} // perhaps not the one that the guest wants
                    _ => brought = true,
                }
            }
        }
        if brought || self.stuck_at(own, address) < MOST_BROKEN {
            return Ok(Exit::Handled);
        }
        // Which one it is, is certain if there is only one.
        let seen = readonly().filter(|s| s.space() == self.run.space());
        let pages = seen.flat_map(|slot| slot.pages().map(move |page| (slot, page)));
        let mut suspects = pages.filter(|(s, p)| {
            s.block.pages.get(*p) == State::Lost || self.is_broken(&s.block, *p, s.block.kvm_hva_of(*p))
        });
        match (suspects.next(), suspects.next()) {
            (Some((slot, page)), None) => Ok(match slot.block.pages.get(page) {
                State::Lost => self.settled(own, slot, page, Outcome::Lost)?,
                _ => self.report_broken(own, slot, page),
            }),
            (None, _) if own.stuck < MOST_MAPS => Ok(Exit::Handled),
            _ => {
                own.stuck = 0;
                Ok(self.report(MemoryError { gpa: None, hva: address, len: mem::PAGE, lost: false }))
            }
        }
    }

    pub(super) fn is_broken(&self, block: &Block, page: u64, hva: u64) -> bool {
        install::is_broken(&self.vm.engine.memory, block, page, hva)
    }

    pub(super) fn report_broken(&self, own: &mut Own, slot: &Slot, page: u64) -> Exit {
        own.stuck = 0;
        let (gpa, hva) = (Some(slot.gpa_of(page)), slot.block.hva_of(page));
        self.report(MemoryError { gpa, hva, len: slot.block.page, lost: false })
    }
}
