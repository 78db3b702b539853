//! Guest memory: which slot an address belongs to, the state of each page, and how a page becomes present.
//!
//! A **block** is a range of host memory with its page states; a **slot** is a window of a block that the guest sees. Page
//! states belong to the block, so that two slots on one host range can't disagree.

mod arrive;
pub mod block;
pub mod calls;
pub mod discard;
pub mod gates;
pub mod give_back;
pub mod install;
pub mod lose;
pub mod map;
pub mod markers;
pub mod pages;
pub mod pause;
pub mod phase;
pub mod release;
mod runs;
pub mod slots;
pub mod source;
#[cfg(test)]
mod testing;
pub mod wait;

use crate::error::{fail, Result};
use crate::kernel::uffd::{Mode, Registration, Uffd};
use crate::stats::Shards;
use arc_swap::{ArcSwap, Guard};
use block::Block;
use gates::{Gates, Pass};
use slots::Slots;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// The memory of one VM.
pub struct Memory {
    /// The userfaultfd that all blocks are registered with.
    pub uffd: Uffd,
    /// The VMM's mappings are served by a userfaultfd of the VMM's own: nothing of ours is registered, installed or dropped there. The
    /// library keeps the states, KVM's alias, and vCPUs that wait.
    pub external: bool,
    /// Keeps discards and installs of a page apart.
    pub gates: Gates,
    /// For pages that a call puts back (see `calls`): one at a time.
    pub putting_back: Mutex<()>,
    /// How often pages were made missing that had been asked for: for a fill, which then asks again.
    pub withdrawn: AtomicU32,
    /// What nobody else's counters cover: reader threads and calls from outside.
    pub stats: Shards,
    slots: ArcSwap<Slots>,
}

impl Memory {
    /// No slots yet.
    pub fn new(uffd: Uffd, external: bool) -> Memory {
        let slots = ArcSwap::from_pointee(Slots::default());
        Memory {
            uffd,
            external,
            gates: Gates::new(),
            putting_back: Mutex::new(()),
            withdrawn: AtomicU32::new(0),
            stats: Shards::default(),
            slots,
        }
    }

    /// Registers the VMM's mapping of a new block, for as long as the registration is kept; nothing where that is the VMM's own affair.
    pub fn try_register(&self, hva: u64, len: u64, mode: Mode) -> Result<Option<Registration<'_>>> {
        match self.external {
            true => Ok(None),
            false => self.uffd.try_register(hva, len, mode).map(Some),
        }
    }

    /// Ends the registration of a block's mappings. Before Linux 6.17 UFFDIO_UNREGISTER doesn't ask whose registration it ends.
    pub fn unregister(&self, block: &Block) {
        if !self.external {
            let _ = self.uffd.unregister(block.hva, block.len);
        }
        block.alias.as_ref().map(|alias| self.uffd.unregister(alias.address(), block.len));
    }

    /// A pass for installing pages of `page`'s gate. None if the block is gone: its memory is the VMM's, and
    /// must not be touched. A block that goes while the pass is held waits for it (`have_left`).
    #[inline]
    pub fn enter(&self, block: &Block, page: u64) -> Option<Pass<'_>> {
        let pass = self.gates.enter_install(block.gate_of(page));
        (!block.is_gone()).then_some(pass)
    }

    /// A pass for discarding pages of `page`'s gate. ENOENT if the block is gone, as with `enter`.
    pub fn enter_alone(&self, block: &Block, page: u64) -> Result<Pass<'_>> {
        let pass = self.gates.enter_discard(block.gate_of(page))?;
        match block.is_gone() {
            false => Ok(pass),
            true => fail!(ENOENT, "the slot that showed the memory at hva {:#x} was deleted", block.hva_of(page)),
        }
    }

    /// For the end of a block that is gone: waits until no pass of its gates is held that was entered before.
    /// Returns false if an install is still there at `end`.
    pub fn have_left(&self, block: &Block, end: Instant) -> bool {
        let groups = runs::gate_groups(0..block.pages.len());
        groups.fold(true, |all, group| self.gates.have_left(block.gate_of(group.start), end) && all)
    }

    /// The slots as they are now. Lock-free: a fault never waits for somebody who edits slots, nor for another vCPU.
    pub fn slots(&self) -> Guard<Arc<Slots>> {
        self.slots.load()
    }

    /// Replaces the slots as a whole. Editors take turns by a lock of their own (see `Vm`).
    pub fn replace_slots(&self, slots: Slots) {
        self.slots.store(Arc::new(slots));
    }
}
