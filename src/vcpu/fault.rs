//! A page that the guest needs: it is made present, or the vCPU waits until it is.

use super::state::LoopState;
use super::{Exit, MemoryError, Vcpu};
use crate::error::{fail, Result};
use crate::kernel::abi::{Access, ACCESS_UNKNOWN};
use crate::kernel::address::Gpa;
use crate::mechanism::MECHANISMS;
use crate::memory::block::Block;
use crate::memory::pages::State;
use crate::memory::slots::{Slot, Slots};
use crate::memory::wait::{recheck_interval, Sleeper, WAITS};
use crate::resolve::readahead::{self, Plan};
use crate::resolve::{pause_before, Extent, FaultRequest, Origin, Outcome, Waiter, MAX_RETRIES};
use std::sync::Arc;
use std::time::Instant;

/// Faults in a row of one vCPU at one page that is PRESENT, after which the fault is an error.
pub(super) const MOST_MAPS: u32 = 64;

impl Vcpu {
    /// Serves a fault. `broken`: KVM has sent SIGBUS, which it also does where memory is really
    /// broken.
    pub(super) fn fault(
        &self,
        state: &mut LoopState,
        slots: &Slots,
        slot: &Slot,
        gpa: Gpa,
        access: Access,
        broken: bool,
    ) -> Result<Exit> {
        let (block, page) = (&slot.block, slot.page_of(gpa));
        let outcome = self.resolve_page(slots, block, page, access, self.seat)?;
        match outcome {
            Outcome::WasPresent => self.map_again(state, slot, page, broken),
            Outcome::Retry => self.pause_for_retry(state, slot, page, true),
            other => {
                if self.vm.pre_fault && matches!(other, Outcome::Installed | Outcome::Waited) {
                    self.pre_fault(state, slot, page);
                }
                self.settled(state, slot, page, other)
            }
        }
    }

    /// Makes the pages that hold a range present.
    pub(super) fn resolve_range(
        &self,
        state: &mut LoopState,
        space: u32,
        gpa: Gpa,
        end: Gpa,
        interruptible: bool,
    ) -> Result<Exit> {
        let uninterruptible = Uninterruptible(&self.seat.sleeper);
        let waiter: &dyn Waiter = if interruptible { self.seat } else { &uninterruptible };
        let slots = self.vm.engine.memory.slots();
        let mut at = gpa;
        while at < end {
            let Some(slot) = slots.at(space, at) else { fail!(ENOENT, "gpa: {at:#x} is in no slot") };
            let page = slot.page_of(at);
            if slot.block.is_deferred(page) {
                self.map_present(&slot.block, page)?;
            }
            if slot.block.pages.get(page) != State::Present {
                let exit = match self.resolve_page(&slots, &slot.block, page, ACCESS_UNKNOWN, waiter)? {
                    Outcome::Retry => self.pause_for_retry(state, slot, page, interruptible)?,
                    Outcome::Interrupted if !interruptible => continue,
                    Outcome::Gone => fail!(ENOENT, "slot {:#x} was deleted meanwhile", slot.region.slot),
                    outcome => self.settled(state, slot, page, outcome)?,
                };
                if exit != Exit::Handled {
                    return Ok(exit);
                }
                continue;
            }
            at = slot.gpa_of(page) + slot.block.page;
        }
        Ok(Exit::Handled)
    }

    /// Makes a page present, or waits for the thread that does.
    pub(super) fn resolve_page(
        &self,
        slots: &Slots,
        block: &Arc<Block>,
        page: u64,
        access: Access,
        waiter: &dyn Waiter,
    ) -> Result<Outcome> {
        let request = FaultRequest {
            origin: Origin::Vcpu(self.seat.number),
            access,
            waiter: Some(waiter),
            stats: &self.seat.stats,
            extent: Extent::Readahead(&self.seat.runs),
        };
        let _serving = self.seat.begin_fault(block.hva_of(page));
        self.vm.engine.serve(slots, block, page, &request)
    }

    /// Maps in stage 2 what has just become present: the page, and what the resolver installed
    /// beside it. Only a help: if it fails, the guest's retry does the same.
    fn pre_fault(&self, state: &mut LoopState, slot: &Slot, page: u64) {
        if state.no_pre_fault {
            return;
        }
        let plan = self.seat.runs.try_lock().map_or(Plan::ALONE, |runs| runs.last());
        let window = match plan.is_contiguous() {
            true => readahead::window(slot, page, &plan),
            false => page..page + 1,
        };
        let is_there = |&p: &u64| slot.block.pages.get(p) == State::Present;
        let end = page + 1 + (page + 1..window.end).take_while(is_there).count() as u64;
        let start = page - (window.start..page).rev().take_while(is_there).count() as u64;
        match self.fd.pre_fault(slot.gpa_of(start), (end - start) * slot.block.page) {
            Err(e) if ![libc::EAGAIN, libc::EINTR, libc::EFAULT, libc::ENOENT].contains(&e.errno) => {
                state.no_pre_fault = true
            }
            _ => {}
        }
    }

    /// What an outcome that needs nothing more means to the VMM.
    #[inline]
    pub(super) fn settled(&self, state: &mut LoopState, slot: &Slot, page: u64, outcome: Outcome) -> Result<Exit> {
        match outcome {
            Outcome::Lost | Outcome::Interrupted => self.settled_badly(slot, page, outcome),
            _ => {
                state.progress.made();
                Ok(Exit::Handled)
            }
        }
    }

    #[cold]
    fn settled_badly(&self, slot: &Slot, page: u64, outcome: Outcome) -> Result<Exit> {
        match outcome {
            Outcome::Lost => {
                let (gpa, hva) = (Some(slot.gpa_of(page)), slot.block.hva_of(page));
                Ok(self.report(MemoryError { gpa, hva, len: slot.block.page, lost: true }))
            }
            _ => self.wait_left(),
        }
    }

    /// A page is PRESENT and faults all the same: maps it, unless it is broken. After many times in
    /// a row, something works against the library.
    fn map_again(&self, state: &mut LoopState, slot: &Slot, page: u64, broken: bool) -> Result<Exit> {
        let block = &slot.block;
        let times = self.no_progress_at_present(state, block, page);
        if times >= MOST_MAPS {
            state.progress.made();
            fail!(
                ELOOP,
                "vCPU {} faults at gpa {:#x} again and again ({times} times), though the page is present",
                self.seat.number,
                slot.gpa_of(page)
            );
        }
        match self.map_present(block, page) {
            Ok(()) if !broken => Ok(Exit::Handled),
            Err(e) if e.errno == libc::EFAULT => Err(e.context(format!(
                "gpa {:#x} is present but its memory is gone (dropped without kvmfault_pages_discard?)",
                slot.gpa_of(page)
            ))),
            Err(e) if e.errno != libc::EHWPOISON => Err(e),
            // The page is broken; or SIGBUS (with the flag, which sends none: the attempt to map
            // the page) met the marker that the page had a moment ago.
            _ if self.is_broken(block, page, block.kvm_hva_of(page)) => Ok(self.report_broken(state, slot, page)),
            _ => Ok(Exit::Handled),
        }
    }

    /// Maps a PRESENT page for KVM. Does nothing where its block goes meanwhile.
    pub(super) fn map_present(&self, block: &Block, page: u64) -> Result<()> {
        let Some(_touching) = self.seat.touch(block) else { return Ok(()) };
        let mechanism = MECHANISMS[block.mechanism];
        match mechanism.map_for_kvm(&self.vm.engine.memory, block, page, &self.seat.stats) {
            Err(_) if block.is_gone() => Ok(()),
            mapped => mapped,
        }
    }

    /// The resolver wants to be asked once more: after a pause, which a kick ends if the caller can
    /// come back.
    pub(super) fn pause_for_retry(
        &self,
        state: &mut LoopState,
        slot: &Slot,
        page: u64,
        interruptible: bool,
    ) -> Result<Exit> {
        let hva = slot.block.hva_of(page);
        let times = state.progress.none_at(hva);
        if times > MAX_RETRIES {
            state.progress.made();
            fail!(
                ELOOP,
                "the resolver asked vCPU {} for {times} retries at gpa {:#x}",
                self.seat.number,
                slot.gpa_of(page)
            );
        }
        let until = Instant::now() + pause_before(times);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if interruptible && self.seat.must_leave() {
                return self.wait_left();
            }
            if left.is_zero() {
                return Ok(Exit::Handled);
            }
            WAITS.wait(hva, &self.seat.sleeper, left.min(recheck_interval()), || {
                !(interruptible && self.seat.must_leave())
            });
        }
    }

    /// How often in a row this vCPU has come to this page, which is PRESENT, without progress.
    pub(super) fn no_progress_at_present(&self, state: &mut LoopState, block: &Block, page: u64) -> u32 {
        let discards = self.vm.engine.memory.gates.discard_count(block.gate_of(page));
        state.progress.none_at_present(block.hva_of(page), discards)
    }
}

/// Waits without leaving for a kick: for an exit that must be completed, of a VMM with its own
/// loop, which would enter KVM_RUN again without coming back.
pub(super) struct Uninterruptible<'a>(pub(super) &'a Sleeper);

impl Waiter for Uninterruptible<'_> {
    fn sleeper(&self) -> &Sleeper {
        self.0
    }

    fn must_leave(&self) -> bool {
        false
    }
}
