//! Accesses that KVM emulates: guests on a KVM without hardware virtualisation, and some instructions everywhere. Its emulator reads and
//! writes guest memory with copy_from_user and copy_to_user (arch/x86/kvm/x86.c, emulator_read_write), and does not wait for absent pages that
//! carry a marker.

use super::{Exit, Own, Vcpu, MOST_MAPS};
use crate::error::Result;
use crate::kernel::kvm::Mmio;
use crate::kernel::mem;
use crate::memory::pages::State;
use crate::memory::slots::{Slot, Slots};
use crate::memory::wait::Sleeper;
use crate::resolve::{Outcome, Waiter};

/// A part of an access that lies in one page: its slot, its address, and which of the access's bytes it is.
type Piece<'s> = (&'s Slot, u64, std::ops::Range<usize>);

impl Vcpu {
    /// KVM's emulator could not read or write guest memory, and so took it for a device (KVM_EXIT_MMIO with an address in a slot):
    /// brings the page, and does what the device would. Left at a kick only if the caller can come back to it.
    pub(super) fn finish(&self, own: &mut Own, interruptible: bool) -> Result<Exit> {
        let run = &self.run;
        let deaf = Deaf(&self.seat.sleeper);
        let waiter: &dyn Waiter = if interruptible { self.seat } else { &deaf };
        let mut mmio = run.mmio();
        let slots = self.vm.engine.memory.slots();
        let Some(pieces) = self.pieces(&slots, &mmio) else {
            own.unfinished = false;
            return Ok(Exit::Pass);
        };
        own.unfinished = true;
        for (slot, gpa, bytes) in pieces.into_iter().flatten() {
            let (page, hva) = (slot.page_of(gpa), slot.vmm_hva(gpa));
            loop {
                let exit = match self.bring(&slot.block, page, if mmio.write { 2 } else { 1 }, waiter)? {
                    Outcome::Installed | Outcome::Waited | Outcome::WasPresent | Outcome::Elsewhere => {
                        let done = match mmio.write {
                            true => mem::write(hva, &mmio.data[bytes.clone()]),
                            false => mem::read(hva, &mut mmio.data[bytes.clone()]),
                        };
                        match done {
                            Err(e) if e.errno == libc::EFAULT && self.is_broken(&slot.block, page, hva) => {
                                self.give_up(own);
                                return Ok(self.report_broken(own, slot, page));
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
                    Outcome::Gone => {
                        own.unfinished = false;
                        return Ok(Exit::Pass);
                    }
                    Outcome::Interrupted if !interruptible => continue,
                    Outcome::Lost => {
                        self.give_up(own);
                        self.settled(own, slot, page, Outcome::Lost)?
                    }
                    other => self.settled(own, slot, page, other)?,
                };
                if exit != Exit::Handled {
                    return Ok(exit);
                }
            }
            if mmio.write {
                self.vm.engine.written(gpa, bytes.len() as u64);
            }
        }
        if mmio.write {
            self.seat.stats.mmio_writes.add(1);
        } else {
            self.seat.stats.mmio_reads.add(1);
            run.set_mmio_data(mmio.data);
        }
        own.unfinished = false;
        own.stuck = 0;
        Ok(Exit::Handled)
    }

    /// Nobody can finish the access. Should the VMM go on all the same, the guest reads ones, as from no device.
    fn give_up(&self, own: &mut Own) {
        own.unfinished = false;
        self.run.set_mmio_data([0xff; 8]);
    }

    /// The access cut at page borders, if all of it lies in slots (and, for a write, none that is read-only).
    fn pieces<'s>(&self, slots: &'s Slots, mmio: &Mmio) -> Option<[Option<Piece<'s>>; 2]> {
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
            match self.bring(&slot.block, page, 4, self.seat)? {
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
