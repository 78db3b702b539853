//! How absent pages get and lose the poison markers on which a vCPU's access traps.

use super::block::Block;
use super::gates::GATE_PAGES;
use super::pages::State;
use super::pause::BoundedBackoff;
use super::runs::{gate_groups, runs};
use super::Memory;
use crate::error::{fail, Result};
use crate::kernel::address::Hva;
use crate::kernel::host_memory::Area;
use crate::kernel::mem::{self, Kind, MADV_DONTNEED_LOCKED};
use crate::kernel::page::page_size;
use crate::kernel::thread;
use crate::kernel::uffd::Step;
use std::ops::Range;
use std::time::Duration;

/// A thread of its own is worth while for at least this many gates' pages (128 MiB of 4 KiB pages,
/// a few milliseconds).
const MIN_GROUPS_A_THREAD: u64 = 64;

/// Marks all absent pages of a block, in the mapping that KVM uses. Pages that arrive meanwhile are
/// left alone.
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

/// Marks PRESENT pages that have nothing in them, for an external VMM. The library reads no
/// userfaultfd for its alias, so that a vCPU would wait for such a page without end. A marked page
/// is mapped when a vCPU touches it; that is also right for a page that only seems empty (swapped
/// out, or hugetlb memory that the VMM has not mapped).
fn mark_holes(memory: &Memory, block: &Block, group: Range<u64>) -> Result<()> {
    let (hva, len) = (block.hva_of(group.start), (group.end - group.start) * block.page);
    let resident = mem::resident(hva, len)?;
    let is_empty = |page: u64| !resident[((page - group.start) * (block.page / page_size())) as usize];
    let take = |page| block.pages.get(page) == State::Present && is_empty(page) && block.defer(page);
    let mut empty = runs(group.clone(), take);
    empty.try_for_each(|run| {
        let len = (run.end - run.start) * block.page;
        mark_unmapped(memory, block.area(block.kvm_hva_of(run.start), len), block.page)
    })
}

/// Marks the absent pages of one gate, in a discard's pass.
pub(super) fn mark_missing(memory: &Memory, block: &Block, group: Range<u64>) -> Result<()> {
    let mut missing = runs(group, |page| block.pages.get(page) != State::Present);
    missing.try_for_each(|run| {
        let len = (run.end - run.start) * block.page;
        mark_unmapped(memory, block.area(block.kvm_hva_of(run.start), len), block.page)
    })
}

/// Marks the pages of a range that are not mapped.
pub(super) fn mark_unmapped(memory: &Memory, area: Area<'_>, page: u64) -> Result<()> {
    let mut done = 0;
    while done < area.len() {
        done += mark_up_to_mapped(memory, area.after(done), page)? + page;
    }
    Ok(())
}

/// Marks pages up to the first one that is mapped or marked. Returns the number of bytes marked.
fn mark_up_to_mapped(memory: &Memory, area: Area<'_>, page: u64) -> Result<u64> {
    let mut backoff = BoundedBackoff::default();
    let mut done = 0;
    while done < area.len() {
        match memory.uffd.poison(area.after(done), page)? {
            Step::Done(bytes) => done += bytes,
            Step::Exists => break,
            Step::Again => backoff.wait()?,
        }
    }
    Ok(done)
}

/// Removes the markers of absent pages: vCPUs then fault by way of userfaultfd. LOST pages keep
/// theirs.
pub fn unmark(memory: &Memory, block: &Block) -> Result<()> {
    for group in gate_groups(0..block.pages.len()) {
        let gate = block.gate_of(group.start);
        // Without a slot, an install that does not end has no page to install: it is not waited
        // for.
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

/// Does dropping pages from the file remove the alias's markers, too? Not with shared memory; with
/// hugetlb it removes every entry that is no page (__unmap_hugepage_range in mm/hugetlb.c).
pub(super) fn drop_removes_markers(block: &Block) -> bool {
    block.kind == Kind::HugetlbShared && block.is_marked()
}

/// Unmaps a range of the mapping that KVM uses, and marks it if the block is marked. The range may
/// be unmapped already (KVM has never touched it). A vCPU may map the old page again between the
/// two steps, as it is still in the page cache: then both are repeated.
pub(super) fn mark_after_drop(memory: &Memory, block: &Block, at: Hva, len: u64) -> Result<()> {
    for _ in 0..1000 {
        if block.is_marked() && mark_up_to_mapped(memory, block.area(at, len), block.page)? == len {
            return Ok(());
        }
        unmap_for_kvm(block, at, len)?;
        if !block.is_marked() {
            return Ok(());
        }
    }
    fail!(EBUSY, "the pages at {at:#x} are used faster than they can be discarded")
}

/// Unmaps a range of the mapping that KVM uses. Only the library uses the alias, so that it is
/// unmapped even if mlockall(2) has locked it.
pub(super) fn unmap_for_kvm(block: &Block, at: Hva, len: u64) -> Result<()> {
    match block.alias {
        Some(_) => block.area(at, len).advise(MADV_DONTNEED_LOCKED, "madvise(MADV_DONTNEED_LOCKED)"),
        None => block.area(at, len).advise(libc::MADV_DONTNEED, "madvise(MADV_DONTNEED)"),
    }
}
