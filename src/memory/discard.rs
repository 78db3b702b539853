//! How pages become absent again: discarded by the VMM, or withdrawn after the resolver has
//! announced them. Installs of the same pages are excluded meanwhile.

use super::block::Block;
use super::calls;
use super::markers::{drop_removes_markers, mark_after_drop, mark_missing};
use super::pages::State;
use super::runs::{gate_groups, runs};
use super::wait::WAITS;
use super::Memory;
use crate::error::{fail, Result};
use crate::kernel::mem::Kind;
use crate::kernel::uffd::FEATURE_POISON;
use crate::stats::Stats;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Makes PRESENT and LOST pages ABSENT and frees their memory. RESOLVING pages stay so, and PRESENT
/// pages that cannot be dropped stay PRESENT. A page that arrived by another way while a resolver
/// call for it is under way is RESOLVING until that call returns, and then ABSENT. Where a
/// userfaultfd of the VMM serves the VMM's mapping, that mapping keeps its content: the VMM only
/// says that the pages are missing.
pub fn discard(memory: &Memory, block: &Block, pages: Range<u64>, stats: &Stats) -> Result<()> {
    for group in gate_groups(pages) {
        let _pass = memory.enter_alone(block, group.start)?;
        if block.phase.is_closed() {
            fail!(
                EBUSY,
                "nothing may be missing in the memory at hva {:#x}: its fast path is off, or a fill has ended there (kvmfault_memslot_set_fast_only turns it on)",
                block.hva
            );
        }
        for from in [State::Present, State::Lost] {
            for run in runs(group.clone(), |page| block.pages.change(page, from, State::Resolving).is_ok()) {
                drop_and_record(memory, block, &run, from, stats)?;
            }
        }
        if memory.external && drop_removes_markers(block) {
            // The VMM may have dropped pages that were missing already, and their markers with
            // them.
            mark_missing(memory, block, group)?;
        }
    }
    Ok(())
}

/// Drops pages that were `from` and are RESOLVING meanwhile, and then sets the state of each. A run
/// may consist of several mappings for the kernel, which drops the ones before a mapping that it
/// cannot drop (locked by mlock(2), or no longer there). A run that fails as a whole is therefore
/// dropped page by page.
fn drop_and_record(memory: &Memory, block: &Block, run: &Range<u64>, from: State, stats: &Stats) -> Result<()> {
    let (hva, len) = (block.hva_of(run.start), (run.end - run.start) * block.page);
    let inaccessible = memory.uffd.features() & FEATURE_POISON == 0 && !memory.external;
    let accessible = if from == State::Lost && inaccessible { block.area(hva, len).protect(true) } else { Ok(()) };
    let mut gone = from == State::Lost && accessible.is_ok();
    let dropped = accessible.and_then(|()| drop_run(memory, block, run, &mut gone));
    if dropped.is_err() && !gone && len > block.page {
        let pages = run.clone().map(|page| page..page + 1);
        let mut result = Ok(());
        for page in pages {
            let done = drop_and_record(memory, block, &page, from, stats);
            result =
                result.and(done.map_err(|e| e.context(format!("the page at hva {:#x}", block.hva_of(page.start)))));
        }
        return result;
    }
    if dropped.is_ok() || gone {
        make_absent(block, run);
    } else {
        keep(memory, block, run, from);
    }
    wake_sleepers(memory, block, run)?;
    dropped?;
    stats.pages_discarded.add(run.end - run.start);
    Ok(())
}

/// Gives pages that could not be dropped their former state. The alias maps them again; where that
/// fails they keep a marker there, and are mapped when a vCPU touches them.
fn keep(memory: &Memory, block: &Block, run: &Range<u64>, state: State) {
    if state == State::Present {
        if let Some(alias) = block.alias_of(run.start) {
            let _ = memory.uffd.map(block.area(alias, (run.end - run.start) * block.page), block.page);
        }
        block.set_exits(run.clone(), false);
    }
    for page in run.clone() {
        let _ = block.pages.change(page, State::Resolving, state);
        WAITS.wake(block.hva_of(page));
    }
}

/// Drops the bytes of a run from all mappings, and sets `gone` once they are gone, as an error may
/// follow. KVM's alias is first, so that no vCPU sees the hole before its marker.
fn drop_run(memory: &Memory, block: &Block, run: &Range<u64>, gone: &mut bool) -> Result<()> {
    let (hva, len) = (block.hva_of(run.start), (run.end - run.start) * block.page);
    block.set_exits(run.clone(), true);
    block.take_deferred_runs(run.clone()).for_each(drop);
    if let Some(alias) = block.alias_of(run.start) {
        mark_after_drop(memory, block, alias, len)?;
    }
    if memory.external {
        return Ok(());
    }
    block.area(hva, len).advise(libc::MADV_DONTNEED, "madvise(MADV_DONTNEED)")?;
    match block.kind {
        // If the page was LOST, MADV_DONTNEED has removed its marker only; the bytes are in the
        // file.
        Kind::Shared | Kind::HugetlbShared => {
            remove(block, run)?;
            *gone = true;
            mark_removed(memory, block, run)
        }
        Kind::Anon | Kind::HugetlbPrivate => {
            *gone = true;
            if block.is_marked() {
                mark_after_drop(memory, block, hva, len)?;
            }
            Ok(())
        }
    }
}

/// Drops what is in the place of a page that is not PRESENT, in a discard's pass. For KVM the page
/// stays absent throughout.
pub fn clear_page(memory: &Memory, block: &Block, page: u64) -> Result<()> {
    match block.kind {
        Kind::Shared | Kind::HugetlbShared => {
            let run = page..page + 1;
            remove(block, &run)?;
            mark_removed(memory, block, &run)
        }
        Kind::Anon | Kind::HugetlbPrivate => mark_after_drop(memory, block, block.hva_of(page), block.page),
    }
}

/// Drops pages from their file, and so from all mappings.
pub(super) fn remove(block: &Block, run: &Range<u64>) -> Result<()> {
    let (hva, len) = (block.hva_of(run.start), (run.end - run.start) * block.page);
    block.area(hva, len).advise(libc::MADV_REMOVE, "madvise(MADV_REMOVE)")
}

/// Places the markers in the alias again that `remove` has removed with the pages. Needed before
/// the page is installed: without its marker a vCPU would see the bytes being written.
fn mark_removed(memory: &Memory, block: &Block, run: &Range<u64>) -> Result<()> {
    match block.alias_of(run.start) {
        Some(alias) if drop_removes_markers(block) => {
            mark_after_drop(memory, block, alias, (run.end - run.start) * block.page)
        }
        _ => Ok(()),
    }
}

/// Makes pages ABSENT that a resolver has announced (KVMFAULT_PENDING) and that have not arrived,
/// so that the resolver is called for them again. A page whose resolver call is under way follows
/// when that call returns, whatever it answers. Returns the number of both.
pub fn withdraw(memory: &Memory, block: &Block, pages: Range<u64>) -> Result<u64> {
    let mut withdrawn = 0;
    for group in gate_groups(pages) {
        if block.pages.count(group.clone(), State::Resolving) == 0 {
            continue;
        }
        let _pass = memory.enter_alone(block, group.start)?;
        for run in runs(group, |page| block.pages.get(page) == State::Resolving) {
            withdrawn += run.end - run.start;
            make_absent(block, &run);
            memory.withdrawn.fetch_add(1, Ordering::Relaxed);
            wake_sleepers(memory, block, &run)?;
        }
    }
    Ok(withdrawn)
}

/// Makes RESOLVING pages ABSENT that no other thread is about to make PRESENT. Those whose resolver
/// call is under way become ABSENT when it returns.
fn make_absent(block: &Block, run: &Range<u64>) {
    let overtaken = calls::overtake(block, run.clone());
    for page in run.clone().filter(|page| !overtaken.contains(page)) {
        let _ = block.pages.change(page, State::Resolving, State::Absent);
        WAITS.wake(block.hva_of(page));
    }
}

/// Wakes threads that sleep in userfaultfd for these pages, in either mapping: they fault again.
pub fn wake_sleepers(memory: &Memory, block: &Block, run: &Range<u64>) -> Result<()> {
    let len = (run.end - run.start) * block.page;
    if memory.external {
        return Ok(()); // no thread sleeps in the library's userfaultfd
    }
    memory.uffd.wake(block.hva_of(run.start), len)?;
    block.alias_of(run.start).map_or(Ok(()), |alias| memory.uffd.wake(alias, len))
}
