//! Pages that the guest has given back (a balloon, free page reporting, memory that is unplugged).
//! Their memory is freed, and they are PRESENT with nothing in them: no resolver is called for
//! them, and the next touch reads zeros (see `map`).

use super::block::Block;
use super::calls;
use super::discard::{remove, wake_sleepers};
use super::gates::GATE_PAGES;
use super::lose::show_lost;
use super::markers::unmap_for_kvm;
use super::pages::State;
use super::runs::{gate_groups, runs};
use super::wait::WAITS;
use super::Memory;
use crate::error::Result;
use crate::kernel::mem::Kind;
use crate::kernel::uffd::FEATURE_POISON;
use crate::stats::Stats;
use std::ops::Range;

/// Gives pages back, whatever their state. On an error, pages that could not be dropped keep their
/// state and their bytes.
///
/// The pages of a gate are RESOLVING while they are dropped, so that no resolver is called for
/// them; the pass excludes installs and mappings. A page whose resolver call is under way becomes
/// PRESENT like the others, and the call is overtaken: its answer counts for nothing, and what it
/// installs is skipped.
pub fn give_back(memory: &Memory, block: &Block, pages: Range<u64>, stats: &Stats) -> Result<()> {
    for group in gate_groups(pages) {
        let _pass = memory.enter_alone(block, group.start)?;
        let mut before = [State::Resolving; GATE_PAGES as usize];
        group.clone().zip(&mut before).for_each(|(page, before)| *before = take(block, page));
        let was_lost = |page: u64| before[(page - group.start) as usize] == State::Lost;
        let given = match drop_bytes(memory, block, &group, was_lost) {
            Ok(()) => finish(block, &group, stats),
            // It is not known how far the kernel got. Pages that it has dropped can be dropped once
            // more.
            Err(_) => {
                let mut all = Ok(());
                for (page, before) in group.clone().zip(before) {
                    all = all.and(give_back_page(memory, block, page, before, stats));
                }
                all
            }
        };
        wake_sleepers(memory, block, &group)?;
        given?;
    }
    Ok(())
}

/// Gives back a page that was taken. One that cannot be dropped keeps its former state.
fn give_back_page(memory: &Memory, block: &Block, page: u64, before: State, stats: &Stats) -> Result<()> {
    let run = page..page + 1;
    match drop_bytes(memory, block, &run, |_| before == State::Lost) {
        Ok(()) => finish(block, &run, stats),
        Err(e) => {
            keep(memory, block, page, before);
            Err(e.context(format!("the page at hva {:#x}", block.hva_of(page))))
        }
    }
}

/// Makes a page RESOLVING, whatever its state; returns the former state.
fn take(block: &Block, page: u64) -> State {
    loop {
        let state = block.pages.get(page);
        if state == State::Resolving || block.pages.change(page, state, State::Resolving).is_ok() {
            return state;
        }
    }
}

/// Drops what the VMM's mapping and the page cache hold. The alias then has nothing but markers.
fn drop_bytes(memory: &Memory, block: &Block, run: &Range<u64>, was_lost: impl Fn(u64) -> bool) -> Result<()> {
    if memory.uffd.features() & FEATURE_POISON == 0 {
        for lost in runs(run.clone(), was_lost) {
            block.area(block.hva_of(lost.start), (lost.end - lost.start) * block.page).protect(true)?;
        }
    }
    let (hva, len) = (block.hva_of(run.start), (run.end - run.start) * block.page);
    block.area(hva, len).advise(libc::MADV_DONTNEED, "madvise(MADV_DONTNEED)")?;
    match block.kind {
        Kind::Shared | Kind::HugetlbShared => remove(block, run),
        Kind::Anon | Kind::HugetlbPrivate => Ok(()),
    }
}

/// Makes pages PRESENT whose bytes are gone. An error means that markers could not be removed; a
/// page is mapped when a vCPU meets its marker.
fn finish(block: &Block, run: &Range<u64>, stats: &Stats) -> Result<()> {
    let len = (run.end - run.start) * block.page;
    let cleared = block.alias_of(run.start).map_or(Ok(()), |alias| unmap_for_kvm(block, alias, len));
    block.take_deferred_runs(run.clone()).for_each(drop);
    block.set_exits(run.clone(), false);
    calls::overtake(block, run.clone());
    for page in run.clone() {
        block.pages.make_present(page);
        WAITS.wake(block.hva_of(page));
    }
    stats.pages_given_back.add(run.end - run.start);
    cleared
}

/// Gives a page that could not be dropped its former state.
fn keep(memory: &Memory, block: &Block, page: u64, before: State) {
    if before == State::Lost {
        // Its marker may be gone.
        let _ = show_lost(memory, block, &(page..page + 1));
    }
    let _ = block.pages.change(page, State::Resolving, before);
    WAITS.wake(block.hva_of(page));
}
