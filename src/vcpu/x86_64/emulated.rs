//! Accesses that KVM emulates: guests on a KVM without hardware virtualisation, and some
//! instructions everywhere. Its emulator reads and writes guest memory with copy_from_user and
//! copy_to_user (arch/x86/kvm/x86.c, emulator_read_write), and does not wait for absent pages that
//! carry a marker.

use super::super::fault::{Uninterruptible, MOST_MAPS};
use super::super::state::LoopState;
use super::super::{Exit, Vcpu};
use crate::error::{Error, Result};
use crate::kernel::abi::{ACCESS_READ, ACCESS_WRITE};
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::arch::Mmio;
use crate::kernel::mem;
use crate::kernel::page::page_size;
use crate::memory::block::Block;
use crate::memory::pages::State;
use crate::memory::pause::Backoff;
use crate::memory::slots::{Slot, Slots};
use crate::resolve::{Outcome, Waiter};
use std::ops::Range;

/// A part of an access that lies in one page: its slot, its address, and which of the access's
/// bytes it is.
type Piece<'s> = (&'s Slot, Gpa, Range<usize>);
/// The pieces of an access, which crosses one page border at most.
type Pieces<'s> = [Option<Piece<'s>>; 2];

/// How far one piece has come.
enum Part {
    /// It is read or written.
    Done,
    /// Its slot was deleted meanwhile.
    SlotGone,
    /// It was left, for this exit.
    Left(Exit),
}

/// Reads or writes a piece's bytes.
fn transfer(block: &Block, hva: Hva, mmio: &mut Mmio, bytes: &Range<usize>) -> Result<()> {
    match mmio.write {
        true => block.area(hva, bytes.len() as u64).write(&mmio.data[bytes.clone()]),
        false => mem::read(hva, &mut mmio.data[bytes.clone()]),
    }
}

impl Vcpu {
    /// KVM's emulator could not read or write guest memory, and so took it for a device
    /// (KVM_EXIT_MMIO with an address in a slot): makes the page present, and does what the device
    /// would. Left at a kick only if the caller can come back.
    pub(super) fn finish_access(&self, state: &mut LoopState, interruptible: bool) -> Result<Exit> {
        let mut backoff = Backoff::default();
        loop {
            let slots = self.vm.engine.memory.slots();
            let mmio = self.run.mmio();
            let Some(pieces) = self.pieces(&slots, &mmio) else {
                state.due.finished();
                return Ok(Exit::Pass);
            };
            state.due.unfinished();
            match self.finish_pieces(state, &slots, &pieces, mmio, interruptible)? {
                Some(exit) => return Ok(exit),
                // A slot was deleted: another may be there, or the access is the VMM's.
                None => backoff.pause(),
            }
        }
    }

    /// Finishes all pieces of an access; None if a slot was deleted meanwhile.
    fn finish_pieces(
        &self,
        state: &mut LoopState,
        slots: &Slots,
        pieces: &Pieces<'_>,
        mut mmio: Mmio,
        interruptible: bool,
    ) -> Result<Option<Exit>> {
        for piece in pieces.iter().flatten() {
            match self.finish_piece(state, slots, piece, &mut mmio, interruptible)? {
                Part::Done => {}
                Part::SlotGone => return Ok(None),
                Part::Left(exit) => return Ok(Some(exit)),
            }
            if mmio.write {
                let (_, gpa, bytes) = piece;
                self.vm.engine.written(*gpa, bytes.len() as u64);
            }
        }
        if mmio.write {
            self.seat.stats.mmio_writes.add(1);
        } else {
            self.seat.stats.mmio_reads.add(1);
            self.run.set_mmio_data(mmio.data);
        }
        self.exit_finished(state);
        Ok(Some(Exit::Handled))
    }

    /// Makes the page of one piece present, and reads or writes it.
    fn finish_piece(
        &self,
        state: &mut LoopState,
        slots: &Slots,
        (slot, gpa, bytes): &Piece<'_>,
        mmio: &mut Mmio,
        interruptible: bool,
    ) -> Result<Part> {
        let uninterruptible = Uninterruptible(&self.seat.sleeper);
        let waiter: &dyn Waiter = if interruptible { self.seat } else { &uninterruptible };
        let access = if mmio.write { ACCESS_WRITE } else { ACCESS_READ };
        let completing = |e: Error| e.context(format!("completing an access of the guest to gpa {gpa:#x}"));
        // KVM's own mapping: where a page is absent an access fails, and doesn't wait.
        let (page, hva) = (slot.page_of(*gpa), slot.kvm_hva(*gpa));
        loop {
            let was_lost = slot.block.pages.get(page) == State::Lost;
            let outcome = self.resolve_page(slots, &slot.block, page, access, waiter)?;
            // PRESENT, and KVM could not access it: it needs mapping.
            let was_present = outcome == Outcome::WasPresent;
            if was_present {
                self.map_for_kvm(&slot.block, page, hva).map_err(completing)?;
            }
            let exit = match outcome {
                Outcome::Installed | Outcome::Waited | Outcome::WasPresent | Outcome::Elsewhere => {
                    let Some(touching) = self.seat.touch(&slot.block) else { return Ok(Part::SlotGone) };
                    let done = transfer(&slot.block, hva, mmio, bytes);
                    drop(touching);
                    match done {
                        Ok(()) => return Ok(Part::Done),
                        Err(e) if e.errno != libc::EFAULT => return Err(completing(e)),
                        Err(_) if was_present && self.is_broken(&slot.block, page, hva) => {
                            if self.is_known_lost(state, slot, page, mmio) {
                                return Ok(Part::Left(self.give_up(state)));
                            }
                            self.report_broken(state, slot, page)
                        }
                        // Discarded since, and private memory has its marker back; and another
                        // thread may have installed it anew by now.
                        Err(_)
                            if slot.block.pages.get(page) != State::Present
                                || self.no_progress_at_present(state, &slot.block, page) < MOST_MAPS =>
                        {
                            continue
                        }
                        Err(e) => return Err(completing(e)),
                    }
                }
                Outcome::Retry => self.pause_for_retry(state, slot, page, interruptible)?,
                Outcome::Gone => return Ok(Part::SlotGone),
                Outcome::Interrupted if !interruptible => continue,
                Outcome::Lost => {
                    if self.is_known_lost(state, slot, page, mmio) && was_lost {
                        return Ok(Part::Left(self.give_up(state)));
                    }
                    self.settled(state, slot, page, Outcome::Lost)?
                }
                other => self.settled(state, slot, page, other)?,
            };
            if exit != Exit::Handled {
                return Ok(Part::Left(exit));
            }
        }
    }

    /// Does the VMM know already that this page of the access can't be had? From now on it does:
    /// the access stays unfinished, so that the next call repeats it. KVM_RUN alone would give the
    /// guest ones, as from no device.
    fn is_known_lost(&self, state: &mut LoopState, slot: &Slot, page: u64, mmio: &Mmio) -> bool {
        let hva = slot.block.hva_of(page);
        if !mmio.write {
            self.run.set_mmio_data([0xff; 8]);
        }
        state.due.is_known_lost(hva)
    }

    /// The VMM goes on though the page can't be had: a machine check that it has injected comes
    /// only once KVM has ended the instruction. So the guest reads ones, and what it wrote is
    /// dropped.
    fn give_up(&self, state: &mut LoopState) -> Exit {
        self.exit_finished(state);
        Exit::Handled
    }

    /// Is the access in kvm_run one to memory in slots?
    pub(super) fn is_access_to_slots(&self) -> bool {
        self.pieces(&self.vm.engine.memory.slots(), &self.run.mmio()).is_some()
    }

    /// A broken page can't be mapped; the access itself shows it.
    fn map_for_kvm(&self, block: &Block, page: u64, hva: Hva) -> Result<()> {
        match self.map_present(block, page) {
            Err(e) if matches!(e.errno, libc::EHWPOISON | libc::EIO) && self.is_broken(block, page, hva) => Ok(()),
            mapped => mapped,
        }
    }

    /// The access cut at page borders, if all of it lies in slots (and, for a write, none that is
    /// read-only).
    fn pieces<'s>(&self, slots: &'s Slots, mmio: &Mmio) -> Option<Pieces<'s>> {
        let first = (page_size() - mmio.gpa % page_size()).min(mmio.len as u64) as usize;
        let piece = |bytes: Range<usize>| {
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
}
