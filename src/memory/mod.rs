//! Guest memory: which slot an address belongs to, the state of each page, and how a page becomes present.
//!
//! A **block** is a range of host memory with its page states; a **slot** is a window of a block that the guest sees. Page
//! states belong to the block, so that two slots on one host range can't disagree.

pub mod block;
pub mod discard;
pub mod install;
pub mod pages;
pub mod slots;
pub mod wait;

use crate::kernel::uffd::Uffd;
use crate::stats::Shards;
use arc_swap::{ArcSwap, Guard};
use slots::Slots;
use std::sync::Arc;
use wait::Gates;

/// The memory of one VM.
pub struct Memory {
    /// The userfaultfd that all blocks are registered with.
    pub uffd: Uffd,
    /// Keeps discards and installs of a page apart.
    pub gates: Gates,
    /// What nobody else's counters cover: reader threads and calls from outside.
    pub stats: Shards,
    slots: ArcSwap<Slots>,
}

impl Memory {
    /// No slots yet.
    pub fn new(uffd: Uffd) -> Memory {
        Memory { uffd, gates: Gates::new(), stats: Shards::default(), slots: ArcSwap::from_pointee(Slots::default()) }
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
