//! The end of absence: memory in which nothing may be missing any more.

use super::block::Block;
use super::markers::unmap_for_kvm;
use super::pages::State;
use super::runs::gate_groups;
use super::Memory;
use crate::error::{fail, Result};

/// Ends absence in a block: from now on nothing can become missing. EBUSY, with nothing changed, if
/// a page is missing.
pub fn close(memory: &Memory, block: &Block) -> Result<()> {
    // Before the pages are looked at: `discard` checks the phase inside its gate.
    block.phase.close();
    for group in gate_groups(0..block.pages.len()) {
        let _pass = memory.enter_alone(block, group.start)?;
        let missing = |&page: &u64| matches!(block.pages.get(page), State::Absent | State::Resolving);
        if let Some(page) = group.clone().find(missing) {
            block.phase.reopen();
            fail!(EBUSY, "the page at hva {:#x} is still missing", block.hva_of(page));
        }
    }
    Ok(())
}

/// Ends absence where a userfaultfd of the VMM serves the VMM's mapping: the alias needs neither
/// markers nor a registration any more. All pages are PRESENT or LOST; a missing page would read as
/// zeros for KVM without its marker.
pub fn release(memory: &Memory, block: &Block) -> Result<()> {
    let Some(alias) = &block.alias else { return Ok(()) };
    close(memory, block)?;
    block.phase.unmarked();
    for run in block.take_deferred_runs(0..block.pages.len()) {
        unmap_for_kvm(block, block.kvm_hva_of(run.start), (run.end - run.start) * block.page)?;
    }
    memory.uffd.unregister(alias.whole())
}
