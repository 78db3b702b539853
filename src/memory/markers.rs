//! How absent pages get and lose the markers that make a vCPU's access trap.

use super::block::Block;
use super::gates::GATE_PAGES;
use super::pages::State;
use super::pause::BoundedBackoff;
use super::runs::{gate_groups, runs};
use super::Memory;
use crate::error::{fail, Result};
use crate::kernel::mem::{self, advise, Kind, MADV_DONTNEED_LOCKED, PAGE};
use crate::kernel::thread;
use crate::kernel::uffd::Step;
use std::ops::Range;
use std::time::Duration;

/// Less than so many gates' pages (128 MiB of 4 KiB pages, a few milliseconds) are not worth another thread.
const MIN_GROUPS_A_THREAD: u64 = 64;

/// Puts markers on all absent pages of a block, in the mapping that KVM uses. Pages that arrive meanwhile are left alone.
pub fn mark(memory: &Memory, block: &Block) -> Result<()> {
    block.phase.mark();
    thread::in_parallel(0..block.pages.len().div_ceil(GATE_PAGES), MIN_GROUPS_A_THREAD, |groups| {
        let pages = groups.start * GATE_PAGES..(groups.end * GATE_PAGES).min(block.pages.len());
        gate_groups(pages).try_for_each(|group| {
            let _pass = memory.enter_alone(block, group.start)?;
            mark_missing(memory, block, group.clone())?;
            match memory.external {
                true => mark_holes(memory, block, group),
                false => Ok(()),
            }
        })
    })
}

/// Nothing of ours reads a userfaultfd for the alias of an external VMM's memory: a PRESENT page with nothing in it would be waited for without
/// end. It gets a marker, and is mapped when a vCPU comes to it; the same for one that only seems empty (swapped out, or hugetlb that the VMM
/// hasn't mapped).
fn mark_holes(memory: &Memory, block: &Block, group: Range<u64>) -> Result<()> {
    let (hva, len) = (block.hva_of(group.start), (group.end - group.start) * block.page);
    let resident = mem::resident(hva, len)?;
    let is_empty = |page: u64| !resident[((page - group.start) * (block.page / PAGE)) as usize];
    let take = |page| block.pages.get(page) == State::Present && is_empty(page) && block.defer(page);
    let mut empty = runs(group.clone(), take);
    empty.try_for_each(|run| {
        mark_unmapped(memory, block.kvm_hva_of(run.start), (run.end - run.start) * block.page, block.page)
    })
}

/// Puts markers on the absent pages of one gate, in a pass for discards.
pub(super) fn mark_missing(memory: &Memory, block: &Block, group: Range<u64>) -> Result<()> {
    let mut missing = runs(group, |page| block.pages.get(page) != State::Present);
    missing.try_for_each(|run| {
        let len = (run.end - run.start) * block.page;
        mark_unmapped(memory, block.kvm_hva_of(run.start), len, block.page)
    })
}

/// Puts markers where nothing is.
pub(super) fn mark_unmapped(memory: &Memory, at: u64, len: u64, page: u64) -> Result<()> {
    let mut done = 0;
    while done < len {
        done += mark_up_to_mapped(memory, at + done, len - done, page)? + page;
    }
    Ok(())
}

/// Puts markers up to the first page where something is; to how many bytes.
fn mark_up_to_mapped(memory: &Memory, at: u64, len: u64, page: u64) -> Result<u64> {
    let mut backoff = BoundedBackoff::default();
    let mut done = 0;
    while done < len {
        match memory.uffd.poison(at + done, len - done, page)? {
            Step::Done(bytes) => done += bytes,
            Step::Exists => break,
            Step::Again => backoff.wait()?,
        }
    }
    Ok(done)
}

/// Takes the markers away again: vCPUs' faults then go the classic way. LOST pages keep theirs.
pub fn unmark(memory: &Memory, block: &Block) -> Result<()> {
    for group in gate_groups(0..block.pages.len()) {
        let gate = block.gate_of(group.start);
        // Where the slot is gone an install that doesn't end is not waited for: its page has nowhere to go.
        let _pass = match block.is_gone() {
            true => memory.gates.enter_discard_within(gate, Duration::from_millis(100)).ok(),
            false => Some(memory.gates.enter_discard(gate)?),
        };
        for run in runs(group, |page| matches!(block.pages.get(page), State::Absent | State::Resolving)) {
            unmap_for_kvm(block, block.kvm_hva_of(run.start), (run.end - run.start) * block.page)?;
        }
    }
    block.phase.unmarked();
    Ok(())
}

/// Does dropping pages from the file take the markers away, too? From shared memory it doesn't; hugetlb clears whatever isn't a page
/// (__unmap_hugepage_range in mm/hugetlb.c).
pub(super) fn drop_removes_markers(block: &Block) -> bool {
    block.kind == Kind::HugetlbShared && block.is_marked()
}

/// Empties a range of the mapping that KVM uses, and marks it if the block is marked. It may be empty already (KVM has never touched it); and a
/// vCPU may slip in between and map the old page again (it is still in the page cache): then do it over.
pub(super) fn mark_after_drop(memory: &Memory, block: &Block, at: u64, len: u64) -> Result<()> {
    for _ in 0..1000 {
        if block.is_marked() && mark_up_to_mapped(memory, at, len, block.page)? == len {
            return Ok(());
        }
        unmap_for_kvm(block, at, len)?;
        if !block.is_marked() {
            return Ok(());
        }
    }
    fail!(EBUSY, "the pages at {at:#x} are used faster than they can be discarded")
}

/// Unmaps a range of the mapping that KVM uses. The alias is nobody else's: if mlockall(2) has locked it, that doesn't count.
pub(super) fn unmap_for_kvm(block: &Block, at: u64, len: u64) -> Result<()> {
    match block.alias {
        Some(_) => advise(at, len, MADV_DONTNEED_LOCKED, "madvise(MADV_DONTNEED_LOCKED)"),
        None => advise(at, len, libc::MADV_DONTNEED, "madvise(MADV_DONTNEED)"),
    }
}
