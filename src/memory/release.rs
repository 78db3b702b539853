//! The end of absence: memory in which nothing may be missing any more.

use super::block::Block;
use super::markers::unmap_for_kvm;
use super::pages::State;
use super::runs::gate_groups;
use super::Memory;
use crate::error::{fail, Result};

/// The end of absence: from now on nothing can become missing. EBUSY, and nothing has changed, if a page is missing.
pub fn close(memory: &Memory, block: &Block) -> Result<()> {
    // First, so that nothing becomes missing behind our back: `discard` looks at it inside the gate.
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

/// The same with a userfaultfd of the VMM's own: the alias needs no marker any more, and no registration. All pages are PRESENT or LOST; without
/// its marker KVM would read zeros in one that is missing.
pub fn release(memory: &Memory, block: &Block) -> Result<()> {
    let Some(alias) = &block.alias else { return Ok(()) };
    close(memory, block)?;
    block.phase.unmarked();
    for run in block.take_deferred_runs(0..block.pages.len()) {
        unmap_for_kvm(block, block.kvm_hva_of(run.start), (run.end - run.start) * block.page)?;
    }
    memory.uffd.unregister(alias.address(), block.len)
}
