//! LOST pages: how they become so, and how threads that touch them are told.

use super::block::Block;
use super::calls::Claim;
use super::discard::wake_sleepers;
use super::markers::mark_unmapped;
use super::pages::State;
use super::runs::{gate_groups, runs};
use super::wait::WAITS;
use super::Memory;
use crate::error::Result;
use crate::kernel::uffd::FEATURE_POISON;
use std::ops::Range;

/// Makes pages LOST that are not PRESENT, and tells the threads that wait for them. With a marker
/// the kernel answers as for a broken page (SIGBUS for threads and vCPUs, EFAULT for system calls).
/// Without UFFDIO_POISON the page becomes inaccessible (SIGSEGV, EFAULT). Returns how many pages
/// became LOST.
pub fn lose(memory: &Memory, block: &Block, pages: Range<u64>) -> Result<u64> {
    lose_if(memory, block, pages, || true)
}

/// Makes a page LOST because the resolver said so, unless its call was overtaken: the answer was
/// then for a page that has gone since.
pub fn lose_claimed(memory: &Memory, block: &Block, page: u64, claim: &Claim<'_>) -> Result<u64> {
    lose_if(memory, block, page..page + 1, || !claim.is_overtaken())
}

/// Makes pages LOST. `is_due` is asked in each gate, before anything changes there.
fn lose_if(memory: &Memory, block: &Block, pages: Range<u64>, is_due: impl Fn() -> bool) -> Result<u64> {
    let mut lost = 0;
    for group in gate_groups(pages) {
        let _pass = memory.enter_alone(block, group.start)?;
        if !is_due() {
            continue;
        }
        let take = |page| {
            let taken = |from| block.pages.change(page, from, State::Lost).is_ok();
            taken(State::Absent) || taken(State::Resolving)
        };
        for run in runs(group, take) {
            lost += run.end - run.start;
            // The pages are LOST even where that cannot be shown: the threads that wait for them
            // are released, and read the state (see `show_lost_again`).
            let shown = show_lost(memory, block, &run);
            run.clone().for_each(|page| WAITS.wake(block.hva_of(page)));
            wake_sleepers(memory, block, &run)?;
            shown?;
        }
    }
    Ok(lost)
}

/// Shows once more that a page is LOST, to a thread that has touched it without being told: the VMM
/// has dropped the marker by itself (MADV_DONTNEED).
pub fn show_lost_again(memory: &Memory, block: &Block, page: u64) -> Result<()> {
    let _pass = memory.enter_alone(block, page)?;
    match block.pages.get(page) {
        State::Lost => show_lost(memory, block, &(page..page + 1)),
        _ => Ok(()),
    }
}

pub(super) fn show_lost(memory: &Memory, block: &Block, run: &Range<u64>) -> Result<()> {
    let (hva, len) = (block.hva_of(run.start), (run.end - run.start) * block.page);
    let markers = memory.uffd.features() & FEATURE_POISON != 0;
    let in_vmm = match (memory.external, markers) {
        (true, _) => Ok(()), // vCPUs are told; the VMM shows it to others
        (false, true) => mark_unmapped(memory, block.area(hva, len), block.page),
        (false, false) => block.area(hva, len).protect(false),
    };
    let in_kvm = match block.alias_of(run.start) {
        Some(alias) if markers => mark_unmapped(memory, block.area(alias, len), block.page),
        _ => Ok(()),
    };
    in_vmm.and(in_kvm)
}
