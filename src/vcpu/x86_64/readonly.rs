//! SIGBUS for read-only slots, which KVM sends without saying where.

use super::super::broken::MOST_BROKEN;
use super::super::fault::MOST_MAPS;
use super::super::state::LoopState;
use super::super::{Exit, Vcpu};
use crate::error::Result;
use crate::kernel::abi::ACCESS_UNKNOWN;
use crate::kernel::address::Hva;
use crate::memory::pages::State;
use crate::memory::slots::Slots;
use crate::resolve::Outcome;

/// Addresses from here on are the kernel's.
const KERNEL_SPACE: Hva = Hva(1 << 63);

impl Vcpu {
    /// SIGBUS at an address in no slot. For a read-only slot KVM signals an address of its own:
    /// gfn_to_hva_memslot answers KVM_HVA_ERR_RO_BAD, as if for a write (kvm_send_hwpoison_signal).
    /// So every absent page of such slots is made present; they are ROMs, and small. None if the
    /// address means nothing of the kind.
    pub(in crate::vcpu) fn sigbus_outside(
        &self,
        state: &mut LoopState,
        slots: &Slots,
        address: Hva,
    ) -> Result<Option<Exit>> {
        if address < KERNEL_SPACE {
            return Ok(None);
        }
        let mut installed = false;
        let readonly = || slots.iter().filter(|s| s.is_readonly());
        for slot in readonly().filter(|s| s.block.is_marked()) {
            for page in slot.pages().filter(|&p| matches!(slot.block.pages.get(p), State::Absent | State::Resolving)) {
                match self.resolve_page(slots, &slot.block, page, ACCESS_UNKNOWN, self.seat)? {
                    Outcome::Retry => return self.pause_for_retry(state, slot, page, true).map(Some),
                    Outcome::Interrupted => return self.wait_left().map(Some),
                    Outcome::Lost => {} // perhaps not the one that the guest wants
                    _ => installed = true,
                }
            }
        }
        if installed || state.progress.none_at(address) < MOST_BROKEN {
            return Ok(Some(Exit::Handled));
        }
        // Which page it is, is certain if there is only one.
        let seen = readonly().filter(|s| s.space() == self.run.space());
        let pages = seen.flat_map(|slot| slot.pages().map(move |page| (slot, page)));
        let mut suspects = pages.filter(|(s, p)| {
            s.block.pages.get(*p) == State::Lost || self.is_broken(&s.block, *p, s.block.kvm_hva_of(*p))
        });
        Ok(Some(match (suspects.next(), suspects.next()) {
            (Some((slot, page)), None) => match slot.block.pages.get(page) {
                State::Lost => self.settled(state, slot, page, Outcome::Lost)?,
                _ => self.report_broken(state, slot, page),
            },
            (None, _) if state.progress.times() < MOST_MAPS => Exit::Handled,
            _ => {
                state.progress.made();
                self.report_unknown(address)
            }
        }))
    }
}
