//! A vCPU's thread and its signals: SIGBUS, kicks, reports from reader threads; and how all that
//! ends with the handle.

use super::state::LoopState;
use super::{Exit, MemoryError, Sigbus, Vcpu};
use crate::error::Result;
use crate::kernel::page::page_size;
use crate::kernel::{signal, thread};
use crate::memory::calls;
use crate::resolve::seat::Notice;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::PoisonError;

impl Vcpu {
    /// Makes the calling thread the one that runs the vCPU.
    #[inline]
    pub(super) fn attach(&self, state: &mut LoopState) -> Result<()> {
        let token = thread::token();
        match state.attached == Some(token) {
            true => Ok(()),
            false => self.attach_to(state, token),
        }
    }

    #[cold]
    fn attach_to(&self, state: &mut LoopState, token: u64) -> Result<()> {
        signal::check(self.sigbus == Sigbus::ByMask)?;
        if self.sigbus == Sigbus::ByMask {
            let before = match state.holds.contains(&token) {
                true => signal::blocked()?,
                false => signal::hold(self.signals)?,
            };
            if !state.holds.contains(&token) {
                state.holds.push(token);
            }
            self.fd.set_signal_mask(before.without(self.signals))?;
        }
        state.attached = Some(token);
        calls::prepare_thread();
        self.seat.thread.store(thread::id(), SeqCst);
        // A kick may have gone to the thread before this one, or to none.
        self.seat.refresh(&self.run);
        Ok(())
    }

    /// KVM_RUN ended with EINTR: for SIGBUS, a kick, a reader's report, or a signal of the VMM's.
    pub(super) fn interrupted(&self, state: &mut LoopState) -> Result<Exit> {
        let (mut bus, mut late) = (None, false);
        match self.sigbus {
            Sigbus::ByHandler => {
                let was_nudged = self.seat.acknowledge_nudges();
                (bus, late) = (self.seat.take_bus(), was_nudged || self.seat.immediate_exit.is_raised());
            }
            // SIGBUS comes before the kick signal, as a synchronous one (dequeue_signal in
            // kernel/signal.c): one call is enough. A kick signal that stays pending ends the next
            // KVM_RUN.
            Sigbus::ByMask => match signal::take(self.signals)? {
                Some(pending) if pending.signal == libc::SIGBUS => bus = Some((pending.code, pending.address)),
                Some(_) => late = true,
                None => {}
            },
        }
        if let Some((code, address)) = bus {
            match self.broken_page(state, code, address)? {
                Exit::Handled => {}
                other => return Ok(other),
            }
        }
        if self.seat.acknowledge_kicks() {
            return Ok(Exit::Interrupted);
        }
        if let Some(notice) = self.seat.take_notice() {
            return self.receive(notice);
        }
        // A nudge; or a signal that came late, after the loop had seen what it announces.
        let ours = bus.is_some() || late && !self.seat.immediate_exit.is_the_vmms();
        Ok(if ours { Exit::Handled } else { Exit::Interrupted })
    }

    /// A wait was left: for a kick, for a reader's report, or for a signal of the VMM's own.
    pub(super) fn wait_left(&self) -> Result<Exit> {
        if !self.seat.acknowledge_kicks() {
            if let Some(notice) = self.seat.take_notice() {
                return self.receive(notice);
            }
        }
        Ok(Exit::Interrupted)
    }

    pub(super) fn receive(&self, notice: Notice) -> Result<Exit> {
        self.seat.next_turn();
        match notice {
            Notice::Failed(error) => Err(error),
            Notice::Lost(hva) => {
                let slots = self.vm.engine.memory.slots();
                let page = slots.at_hva(hva);
                let slot = page.and_then(|(block, page)| slots.showing(block, page).map(|slot| (slot, page)));
                let (gpa, len) = slot.map_or((None, page_size()), |(s, p)| (Some(s.gpa_of(p)), s.block.page));
                Ok(self.report(MemoryError { gpa, hva, len, lost: true }))
            }
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        if self.check_process().is_err() {
            return; // the vCPU is the parent's, and runs on
        }
        self.seat.detach();
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !state.holds.is_empty() {
            let _ = self.fd.reset_signal_mask();
        }
        // Only a thread itself can restore its mask.
        if state.holds.contains(&thread::token()) {
            signal::release(self.signals);
        }
        // Last: from here on a new handle of the vCPU may use its signals.
        self.vm.engine.seats.remove(self.seat);
    }
}
