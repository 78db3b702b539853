//! Guest memory: which slot an address belongs to, the state of each page, and how a page becomes present.
//!
//! A **block** is a range of host memory with its page states; a **slot** is a window of a block that the guest sees. Page
//! states belong to the block, so that two slots on one host range can't disagree.

pub mod block;
pub mod calls;
pub mod discard;
pub mod give_back;
pub mod install;
pub mod pages;
pub mod slots;
pub mod wait;

use crate::error::Result;
use crate::kernel::uffd::{Mode, Registration, Uffd};
use crate::stats::Shards;
use arc_swap::{ArcSwap, Guard};
use block::Block;
use slots::Slots;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};
use wait::Gates;

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

    /// The slots as they are now. Lock-free: a fault never waits for somebody who edits slots, nor for another vCPU.
    pub fn slots(&self) -> Guard<Arc<Slots>> {
        self.slots.load()
    }

    /// Replaces the slots as a whole. Editors take turns by a lock of their own (see `Vm`).
    pub fn replace_slots(&self, slots: Slots) {
        self.slots.store(Arc::new(slots));
    }
}
