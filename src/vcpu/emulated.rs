//! Accesses that KVM emulates: guests on a KVM without hardware virtualisation, and some instructions everywhere. Its emulator reads and
//! writes guest memory with copy_from_user and copy_to_user (arch/x86/kvm/x86.c, emulator_read_write), and does not wait for absent pages that
//! carry a marker.

use super::{Exit, Own, Vcpu, MOST_MAPS};
use crate::error::Result;
use crate::kernel::arch;
use crate::kernel::kvm::Mmio;
use crate::kernel::mem;
use crate::mechanism::MECHANISMS;
use crate::memory::block::Block;
use crate::memory::pages::State;
use crate::memory::slots::{Slot, Slots};
use crate::memory::wait::{Pause, Sleeper};
use crate::resolve::{Outcome, Waiter};
use kvm_bindings as kb;

/// A part of an access that lies in one page: its slot, its address, and which of the access's bytes it is.
type Piece<'s> = (&'s Slot, u64, std::ops::Range<usize>);
/// An access crosses one border at most.
type Pieces<'s> = [Option<Piece<'s>>; 2];

impl Vcpu {
    /// KVM's emulator could not read or write guest memory, and so took it for a device (KVM_EXIT_MMIO with an address in a slot):
    /// brings the page, and does what the device would. Left at a kick only if the caller can come back to it.
    pub(super) fn finish(&self, own: &mut Own, interruptible: bool) -> Result<Exit> {
        let mut pause = Pause::default();
        loop {
            let slots = self.vm.engine.memory.slots();
            let mmio = self.run.mmio();
            let Some(pieces) = self.pieces(&slots, &mmio) else {
                own.unfinished = false;
                return Ok(Exit::Pass);
            };
            own.unfinished = true;
            match self.finish_in(own, &slots, &pieces, mmio, interruptible)? {
                Some(exit) => return Ok(exit),
                None => pause.a_moment(), // a slot was deleted: another may be there, or it is the VMM's
            }
        }
    }

    /// None if a slot was deleted meanwhile.
    fn finish_in(
        &self,
        own: &mut Own,
        slots: &Slots,
        pieces: &Pieces<'_>,
        mut mmio: Mmio,
        interruptible: bool,
    ) -> Result<Option<Exit>> {
        let deaf = Deaf(&self.seat.sleeper);
        let waiter: &dyn Waiter = if interruptible { self.seat } else { &deaf };
        for (slot, gpa, bytes) in pieces.iter().flatten() {
            // KVM's own mapping: where a page isn't there an access fails, and waits for nobody.
            let (page, hva) = (slot.page_of(*gpa), slot.kvm_hva(*gpa));
            loop {
                let was_lost = slot.block.pages.get(page) == State::Lost;
                let outcome = self.bring(slots, &slot.block, page, if mmio.write { 2 } else { 1 }, waiter)?;
                // PRESENT, and KVM could not access it: it needs mapping.
                let was_present = outcome == Outcome::WasPresent;
                if was_present {
                    self.map_for_kvm(&slot.block, page, hva)
                        .map_err(|e| e.context(format!("completing an access of the guest to gpa {gpa:#x}")))?;
                }
                let exit = match outcome {
                    Outcome::Installed | Outcome::Waited | Outcome::WasPresent | Outcome::Elsewhere => {
                        let done = match mmio.write {
                            true => mem::write(hva, &mmio.data[bytes.clone()]),
                            false => mem::read(hva, &mut mmio.data[bytes.clone()]),
                        };
                        match done {
                            Err(e)
                                if e.errno == libc::EFAULT && was_present && self.is_broken(&slot.block, page, hva) =>
                            {
                                if self.is_told(own, slot, page, &mmio) {
                                    return Ok(Some(self.give_up(own)));
                                }
                                self.report_broken(own, slot, page)
                            }
                            // Discarded since, and private memory has its marker back; and somebody else may have brought it anew by now.
                            Err(e)
                                if e.errno == libc::EFAULT
                                    && (slot.block.pages.get(page) != State::Present
                                        || self.stuck_present(own, &slot.block, page) < MOST_MAPS) =>
                            {
                                continue
                            }
                            Err(e) => {
                                return Err(e.context(format!("completing an access of the guest to gpa {gpa:#x}")))
                            }
                            Ok(()) => break,
                        }
                    }
                    Outcome::Retry => self.again(own, slot, page, interruptible)?,
                    Outcome::Gone => return Ok(None),
                    Outcome::Interrupted if !interruptible => continue,
                    Outcome::Lost => {
                        if self.is_told(own, slot, page, &mmio) && was_lost {
                            return Ok(Some(self.give_up(own)));
                        }
                        self.settled(own, slot, page, Outcome::Lost)?
                    }
                    other => self.settled(own, slot, page, other)?,
                };
                if exit != Exit::Handled {
                    return Ok(Some(exit));
                }
            }
            if mmio.write {
                self.vm.engine.written(*gpa, bytes.len() as u64);
            }
        }
        if mmio.write {
            self.seat.stats.mmio_writes.add(1);
        } else {
            self.seat.stats.mmio_reads.add(1);
            self.run.set_mmio_data(mmio.data);
        }
        self.is_over(own);
        Ok(Some(Exit::Handled))
    }

    /// Has the VMM been told already that this page of the access can't be had? The first time it is: the access stays unfinished, so that the next
    /// call repeats it. KVM_RUN alone would give the guest ones, as from no device.
    fn is_told(&self, own: &mut Own, slot: &Slot, page: u64, mmio: &Mmio) -> bool {
        let hva = slot.block.hva_of(page);
        if !mmio.write {
            self.run.set_mmio_data([0xff; 8]);
        }
        own.told.replace(hva) == Some(hva)
    }

    /// The VMM goes on though the page can't be had: a machine check that it has injected comes only once KVM has ended the instruction. So the
    /// guest reads ones, and what it wrote is dropped.
    fn give_up(&self, own: &mut Own) -> Exit {
        self.is_over(own);
        Exit::Handled
    }

    /// The access is finished. kvm_run tells so to whoever comes to the vCPU later. (KVM on x86 doesn't look at it.)
    pub(super) fn is_over(&self, own: &mut Own) {
        (own.unfinished, own.told, own.stuck) = (false, None, 0);
        self.run.clear_exit_reason();
    }

    /// Has a handle before this one left an access, or a write to an MSR, in the middle? kvm_run still has it.
    pub(super) fn is_left_unfinished(&self) -> bool {
        match self.run.exit_reason() {
            kb::KVM_EXIT_MMIO => self.pieces(&self.vm.engine.memory.slots(), &self.run.mmio()).is_some(),
            kb::KVM_EXIT_X86_WRMSR => {
                let write = self.run.msr_write();
                self.vm.filters_msrs && write.filtered && arch::is_area_msr(write.index)
            }
            _ => false,
        }
    }

    /// A broken page can't be mapped; the access itself shows it.
    fn map_for_kvm(&self, block: &Block, page: u64, hva: u64) -> Result<()> {
        match MECHANISMS[block.mechanism].map_present(&self.vm.engine.memory, block, page, &self.seat.stats) {
            Err(e) if matches!(e.errno, libc::EHWPOISON | libc::EIO) && self.is_broken(block, page, hva) => Ok(()),
            mapped => mapped,
        }
    }

    /// The access cut at page borders, if all of it lies in slots (and, for a write, none that is read-only).
    fn pieces<'s>(&self, slots: &'s Slots, mmio: &Mmio) -> Option<Pieces<'s>> {
        let first = (mem::PAGE - mmio.gpa % mem::PAGE).min(mmio.len as u64) as usize;
        let piece = |bytes: std::ops::Range<usize>| {
            let gpa = mmio.gpa.checked_add(bytes.start as u64)?;
            let slot = slots.at(self.run.space(), gpa).filter(|s| !(mmio.write && s.is_readonly()))?;
            Some((slot.as_ref(), gpa, bytes))
        };
        let second = match first < mmio.len {
            true => Some(piece(first..mmio.len)?),
            false => None,
        };
        Some([Some(piece(0..first)?), second])
    }

    /// KVM's emulator may have failed for want of the instruction itself, in a page that is absent. Then bring it, take back the #UD
    /// that KVM queued, and let the guest try again.
    pub(super) fn emulation_failed(&self, own: &mut Own) -> Result<Exit> {
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
            match self.bring(&slots, &slot.block, page, 4, self.seat)? {
                Outcome::Retry => {
                    self.again(own, slot, page, true)?;
                }
                // Interrupted: the instruction fails once more, and we are back here.
                Outcome::Lost => return self.settled(own, slot, page, Outcome::Lost),
                _ => {}
            }
        }
        if !absent {
            return Ok(Exit::Pass);
        }
        let mut events = self.fd.vcpu_events()?;
        if events.exception.nr == UD {
            (events.exception.injected, events.exception.pending) = (0, 0);
            // Without flags KVM leaves alone what another thread may have changed since (a pending NMI or SIPI, SMM, a triple fault).
            events.flags = 0;
            self.fd.set_vcpu_events(events)?;
        }
        Ok(Exit::Handled)
    }
}

/// Waits deaf to kicks: for an exit that must be completed, of a VMM with its own loop, which would enter KVM_RUN again without coming back.
pub(super) struct Deaf<'a>(pub(super) &'a Sleeper);

impl Waiter for Deaf<'_> {
    fn sleeper(&self) -> &Sleeper {
        self.0
    }

    fn must_leave(&self) -> bool {
        false
    }
}
