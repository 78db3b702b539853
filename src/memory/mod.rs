//! Guest memory: which slot an address belongs to, the state of each page, and how a page becomes
//! PRESENT.
//!
//! A **block** is a range of host memory with the states of its pages; a **slot** is a window of a
//! block that the guest sees. Page states belong to the block, so that two slots on one host range
//! cannot disagree.

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
use crate::kernel::host_memory::HostMemory;
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
    /// A userfaultfd of the VMM serves the VMM's mappings: the library registers, installs and
    /// drops nothing there. It keeps the page states, KVM's alias, and the vCPUs that wait.
    pub external: bool,
    /// Keeps discards and installs of one page apart.
    pub gates: Gates,
    /// Held by a call that makes its page ABSENT again (see `calls`): one at a time.
    pub putting_back: Mutex<()>,
    /// How often pages became missing that the resolver had announced. A fill reads it, and asks
    /// for them again.
    pub withdrawn: AtomicU32,
    /// Counters of reader threads, and of calls from threads that are no vCPU's.
    pub stats: Shards,
    slots: ArcSwap<Slots>,
}

impl Memory {
    /// A VM's memory without slots.
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

    /// Registers the VMM's mapping of a new block, for as long as the registration is kept. None
    /// where a userfaultfd of the VMM serves that mapping.
    pub fn try_register<'a>(&'a self, vmm: &'a HostMemory, mode: Mode) -> Result<Option<Registration<'a>>> {
        match self.external {
            true => Ok(None),
            false => self.uffd.try_register(vmm.whole(), mode).map(Some),
        }
    }

    /// Ends the registration of a block's mappings. Before Linux 6.17 UFFDIO_UNREGISTER does not
    /// check whose registration it ends.
    pub fn unregister(&self, block: &Block) {
        if !self.external {
            let _ = self.uffd.unregister(block.whole());
        }
        block.alias.as_ref().map(|alias| self.uffd.unregister(alias.whole()));
    }

    /// A pass for installing pages of `page`'s gate. None if the block is gone: its memory is the
    /// VMM's, and must not be touched. A block that is retired during the pass waits for it
    /// (`have_left`).
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

    /// For the end of a retired block: waits until the passes of its gates that were entered before
    /// it retired have ended. False if an install is still under way at `end`.
    pub fn have_left(&self, block: &Block, end: Instant) -> bool {
        let mut have_left = true;
        for group in runs::gate_groups(0..block.pages.len()) {
            // Each gate is waited for, also after one has not become empty in time.
            have_left &= self.gates.have_left(block.gate_of(group.start), end);
        }
        have_left
    }

    /// The slots at this moment. Lock-free: a fault waits neither for a thread that edits slots nor
    /// for another vCPU.
    pub fn slots(&self) -> Guard<Arc<Slots>> {
        self.slots.load()
    }

    /// Replaces all slots at once. `Vm` has a lock by which editors take turns.
    pub fn replace_slots(&self, slots: Slots) {
        self.slots.store(Arc::new(slots));
    }
}
