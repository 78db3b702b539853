//! Page tables that KVM walks itself though there is EPT or NPT: those of the memory that a string
//! instruction reads or writes on its way to or from a device (INS, OUTS, MOVS). KVM emulates such
//! instructions, and the processor has not walked those tables before. The walk doesn't wait for a
//! table that carries a marker: the guest gets a page fault that it shouldn't
//! (FNAME(walk_addr_generic) in arch/x86/kvm/mmu/paging_tmpl.h).
//!
//! KVM stops at the device first, except for the first word of an OUTS, and walks in the next
//! KVM_RUN: before that the tables can be made present.

use super::super::state::LoopState;
use super::super::{Exit, Vcpu};
use crate::error::Result;
use crate::kernel::address::Gpa;
use crate::kernel::mem;
use crate::memory::pages::State;
use kvm_bindings::{kvm_segment, kvm_sregs};

/// A way of translating linear addresses. See "Paging" in Intel's manual, volume 3, or "Page
/// Translation and Protection" in AMD's, volume 2.
struct Paging {
    levels: u32,
    /// Bits of an address that choose one of a table's entries.
    bits: u32,
    /// Bytes of an entry.
    entry: u64,
    /// The first table.
    top: Gpa,
}

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// What one table of the lowest level maps, at least: 2 MiB.
const REGION: u32 = 21;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;

/// None if the guest doesn't use paging.
fn paging_of(sregs: &kvm_sregs) -> Option<Paging> {
    const PG: u64 = 1 << 31;
    const PAE: u64 = 1 << 5;
    const LA57: u64 = 1 << 12;
    const LMA: u64 = 1 << 10;
    let (long, pae) = (sregs.efer & LMA != 0, sregs.cr4 & PAE != 0);
    let levels = if long { 4 + (sregs.cr4 & LA57 != 0) as u32 } else { 2 + pae as u32 };
    let (bits, entry) = if long || pae { (9, 8) } else { (10, 4) };
    let top = Gpa(sregs.cr3 & if long { ADDRESS } else { 0xffff_ffe0 });
    (sregs.cr0 & PG != 0).then_some(Paging { levels, bits, entry, top })
}

/// A register as the address that it means in a segment.
fn linear(sregs: &kvm_sregs, segment: &kvm_segment, register: u64) -> u64 {
    match sregs.cs.l {
        0 => segment.base.wrapping_add(register) & 0xffff_ffff,
        _ => register,
    }
}

/// The tables of one operand, so that the next exit of the same device needs no system call for
/// them.
#[derive(Default)]
pub(super) struct Walked {
    top: Gpa,
    region: u64,
    /// Their guest physical addresses; 0 behind the last.
    entries: [Gpa; 5],
}

impl Vcpu {
    /// How the guest translates addresses, if that matters: some memory is marked, the guest uses
    /// paging, and its registers can be read (those of an encrypted guest can't, nor can KVM walk
    /// its tables).
    fn paging(&self) -> Option<(kvm_sregs, Paging)> {
        self.vm.engine.memory.slots().blocks().find(|b| b.is_marked())?;
        let sregs = self.fd.sregs().ok()?;
        paging_of(&sregs).map(|paging| (sregs, paging))
    }

    /// Makes the tables present of what RSI and RDI point to, which is where a string instruction
    /// goes on. (If the instruction was another, they are tables of the guest's all the same, or
    /// what doesn't look like any.) Called before KVM_RUN, so that a kick can interrupt it and the
    /// next call goes on.
    pub(in crate::vcpu) fn resolve_walks(&self, state: &mut LoopState) -> Result<Exit> {
        if let Some((sregs, paging)) = self.paging() {
            let regs = self.fd.regs()?;
            for (n, (segment, register)) in [(&sregs.ds, regs.rsi), (&sregs.es, regs.rdi)].into_iter().enumerate() {
                let first = linear(&sregs, segment, register);
                let last = first.wrapping_add(7);
                for address in [first, last].into_iter().take(1 + (first >> REGION != last >> REGION) as usize) {
                    match self.walk(state, n, &paging, address)? {
                        Exit::Handled => {}
                        other => return Ok(other),
                    }
                }
            }
        }
        Ok(Exit::Handled)
    }

    /// In PAE mode KVM keeps copies of the four entries of the first table, which it reads as the
    /// vCPU is set up (KVM_SET_SREGS; load_pdptrs in arch/x86/kvm/x86.c). If the table was absent,
    /// and the VMM did not say what is in it (KVM_SET_SREGS2), the copies are empty: now the table
    /// can be read.
    pub(in crate::vcpu) fn prepare(&self, state: &mut LoopState) -> Result<Exit> {
        let Some((sregs, Paging { levels: 3, top, .. })) = self.paging() else { return Ok(Exit::Handled) };
        let space = self.run.space();
        let is_ours = self.vm.engine.memory.slots().at(space, top).is_some_and(|s| s.block.is_marked());
        if is_ours && self.fd.pdptrs().is_none_or(|copies| copies.iter().all(|entry| entry & PRESENT == 0)) {
            match self.resolve_range(state, space, top, top + 1, true)? {
                Exit::Handled => self.fd.set_sregs(sregs)?,
                other => return Ok(other),
            }
        }
        Ok(Exit::Handled)
    }

    /// Goes down the tables as KVM will, and makes each present, as far as they lie in memslots
    /// that the library knows, and can be had.
    fn walk(&self, state: &mut LoopState, operand: usize, paging: &Paging, address: u64) -> Result<Exit> {
        let slots = self.vm.engine.memory.slots();
        let space = self.run.space();
        let at = |gpa: Gpa| slots.at(space, gpa).map(|slot| (slot, slot.block.pages.get(slot.page_of(gpa))));
        let known = &state.arch.walked[operand];
        let mut entries = known.entries.iter().take_while(|&&gpa| gpa != Gpa(0));
        if (known.top, known.region) == (paging.top, address >> REGION)
            && entries.all(|&gpa| at(gpa).is_some_and(|(_, now)| now == State::Present))
        {
            return Ok(Exit::Handled);
        }
        let mut walked = Walked { top: paging.top, region: address >> REGION, ..Walked::default() };
        let mut table = paging.top;
        for level in (0..paging.levels).rev() {
            let index = address >> (12 + level * paging.bits) & ((1 << paging.bits) - 1);
            let gpa = table + index * paging.entry;
            let Some((slot, page_state)) = at(gpa) else { break };
            if page_state == State::Lost {
                break;
            }
            match self.resolve_range(state, space, gpa, gpa + 1, true) {
                Ok(Exit::Handled) => {}
                Ok(Exit::MemoryError) => break,
                Err(e) if e.errno == libc::ENOENT => break, // the slot has just been deleted
                other => return other,
            }
            let mut entry = [0; 8];
            let Some(_touching) = self.seat.touch(&slot.block) else { break };
            if mem::read(slot.vmm_hva(gpa), &mut entry[..paging.entry as usize]).is_err() {
                break;
            }
            let entry = u64::from_le_bytes(entry);
            if entry & PRESENT == 0 {
                break;
            }
            walked.entries[(paging.levels - 1 - level) as usize] = gpa;
            if level == 0 || entry & LARGE != 0 {
                state.arch.walked[operand] = walked;
                break;
            }
            table = Gpa(entry & ADDRESS);
        }
        Ok(Exit::Handled)
    }
}
