//! How pages become absent again (post-copy giving up what pre-copy brought, or a lost page that turned up), and how absent pages get and lose
//! the markers that make a vCPU's access trap. All of it excludes installs of the same pages.

use super::block::Block;
use super::calls::{self, Claim};
use super::gates::GATE_PAGES;
use super::pages::State;
use super::pause::Patience;
use super::wait::WAITS;
use super::Memory;
use crate::error::{fail, Result};
use crate::kernel::mem::{self, advise, protect, Kind, MADV_DONTNEED_LOCKED, PAGE};
use crate::kernel::thread;
use crate::kernel::uffd::{Step, FEATURE_POISON};
use crate::stats::Stats;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Less than so many gates' pages (128 MiB of 4 KiB pages, a few milliseconds) are not worth another thread.
const MARKED_ALONE: u64 = 64;

/// Makes PRESENT and LOST pages absent and gives their memory back. Pages that are being resolved stay so, and PRESENT pages that can't be
/// dropped. A page that came by another way while a resolver call for it is under way is RESOLVING until that call returns, and then absent. Where the VMM's mapping is the VMM's own affair, what is there stays: then this says that the pages are missing, and no more.
pub fn discard(memory: &Memory, block: &Block, pages: Range<u64>, stats: &Stats) -> Result<()> {
    for group in gate_groups(pages) {
        let _pass = memory.enter_alone(block, group.start)?;
        if block.is_released() {
            fail!(
                EBUSY,
                "nothing may be missing in the memory at hva {:#x}: its fast path is off, or a fill has ended there (kvmfault_memslot_set_fast_only turns it on)",
                block.hva
            );
        }
        for from in [State::Present, State::Lost] {
            for run in runs(group.clone(), |page| block.pages.change(page, from, State::Resolving).is_ok()) {
                drop_and_book(memory, block, &run, from, stats)?;
            }
        }
        if memory.external && takes_markers(block) {
            // What was missing already, the VMM may have dropped all the same.
            mark_missing(memory, block, group)?;
        }
    }
    Ok(())
}

/// Drops pages that were `from` and are RESOLVING for as long as this takes, and books each of them as what it is then.
/// A run may be of several mappings for the kernel, which drops those before one that it can't drop (mlock(2), a part
/// that is no longer mapped). So what fails as a whole is done page by page.
fn drop_and_book(memory: &Memory, block: &Block, run: &Range<u64>, from: State, stats: &Stats) -> Result<()> {
    let (hva, len) = (block.hva_of(run.start), (run.end - run.start) * block.page);
    let inaccessible = memory.uffd.features() & FEATURE_POISON == 0 && !memory.external;
    let accessible = if from == State::Lost && inaccessible { protect(hva, len, true) } else { Ok(()) };
    let mut gone = from == State::Lost && accessible.is_ok();
    let dropped = accessible.and_then(|()| drop_run(memory, block, run, &mut gone));
    if dropped.is_err() && !gone && len > block.page {
        let pages = run.clone().map(|page| page..page + 1);
        let mut result = Ok(());
        for page in pages {
            let done = drop_and_book(memory, block, &page, from, stats);
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
    wake(memory, block, run)?;
    dropped?;
    stats.pages_discarded.add(run.end - run.start);
    Ok(())
}

/// Pages that couldn't be dropped are what they were. KVM's alias has them again; where that fails they keep a marker
/// there, and are mapped when a vCPU comes to them.
fn keep(memory: &Memory, block: &Block, run: &Range<u64>, state: State) {
    if state == State::Present {
        if let Some(alias) = block.alias_of(run.start) {
            let _ = memory.uffd.map(alias, (run.end - run.start) * block.page, block.page);
        }
        block.set_exits(run.clone(), false);
    }
    for page in run.clone() {
        let _ = block.pages.change(page, State::Resolving, state);
        WAITS.wake(block.hva_of(page));
    }
}

/// Does dropping pages from the file take the markers away, too? From shared memory it doesn't; hugetlb clears whatever isn't a page
/// (__unmap_hugepage_range in mm/hugetlb.c).
fn takes_markers(block: &Block) -> bool {
    block.kind == Kind::HugetlbShared && block.is_marked()
}

/// Takes the bytes away from everybody, and says so in `gone` where an error may follow. KVM's alias goes first, so that a vCPU never sees the
/// hole before its marker.
fn drop_run(memory: &Memory, block: &Block, run: &Range<u64>, gone: &mut bool) -> Result<()> {
    let (hva, len) = (block.hva_of(run.start), (run.end - run.start) * block.page);
    block.set_exits(run.clone(), true);
    block.take_deferred_runs(run.clone()).for_each(drop);
    if let Some(alias) = block.alias_of(run.start) {
        rearm(memory, block, alias, len)?;
    }
    if memory.external {
        return Ok(());
    }
    advise(hva, len, libc::MADV_DONTNEED, "madvise(MADV_DONTNEED)")?;
    match block.kind {
        // What MADV_DONTNEED took away before was the marker of a LOST page.
        Kind::Shared | Kind::HugetlbShared => {
            remove(block, run)?;
            *gone = true;
            mark_removed(memory, block, run)
        }
        Kind::Anon | Kind::HugetlbPrivate => {
            *gone = true;
            if block.is_marked() {
                rearm(memory, block, hva, len)?;
            }
            Ok(())
        }
    }
}

/// Drops whatever is in the place of a page that isn't PRESENT, in a pass for discards. What KVM sees there stays as it is: absent.
pub fn clear(memory: &Memory, block: &Block, page: u64) -> Result<()> {
    match block.kind {
        Kind::Shared | Kind::HugetlbShared => {
            let run = page..page + 1;
            remove(block, &run)?;
            mark_removed(memory, block, &run)
        }
        Kind::Anon | Kind::HugetlbPrivate => rearm(memory, block, block.hva_of(page), block.page),
    }
}

/// Drops pages from their file, and so from all mappings.
pub(super) fn remove(block: &Block, run: &Range<u64>) -> Result<()> {
    let (hva, len) = (block.hva_of(run.start), (run.end - run.start) * block.page);
    advise(hva, len, libc::MADV_REMOVE, "madvise(MADV_REMOVE)")
}

/// Puts the alias's markers back where that took them. Before anybody may bring the bytes: without a marker a vCPU would see them come.
fn mark_removed(memory: &Memory, block: &Block, run: &Range<u64>) -> Result<()> {
    match block.alias_of(run.start) {
        Some(alias) if takes_markers(block) => rearm(memory, block, alias, (run.end - run.start) * block.page),
        _ => Ok(()),
    }
}

/// Empties a range of the mapping that KVM uses, and marks it if the block is marked. It may be empty already (KVM has never touched it); and a
/// vCPU may slip in between and map the old page again (it is still in the page cache): then do it over.
fn rearm(memory: &Memory, block: &Block, at: u64, len: u64) -> Result<()> {
    for _ in 0..1000 {
        if block.is_marked() && mark_until(memory, at, len, block.page)? == len {
            return Ok(());
        }
        empty(block, at, len)?;
        if !block.is_marked() {
            return Ok(());
        }
    }
    fail!(EBUSY, "the pages at {at:#x} are used faster than they can be discarded")
}

/// Unmaps a range of the mapping that KVM uses. The alias is nobody else's: if mlockall(2) has locked it, that doesn't count.
pub(super) fn empty(block: &Block, at: u64, len: u64) -> Result<()> {
    match block.alias {
        Some(_) => advise(at, len, MADV_DONTNEED_LOCKED, "madvise(MADV_DONTNEED_LOCKED)"),
        None => advise(at, len, libc::MADV_DONTNEED, "madvise(MADV_DONTNEED)"),
    }
}

/// Makes pages LOST that aren't PRESENT, and tells whoever waits for them: a marker makes the kernel answer as it would for a broken page
/// (SIGBUS for threads and vCPUs, EFAULT for system calls). Without UFFDIO_POISON the page becomes inaccessible: SIGSEGV, EFAULT.
/// Returns how many became so.
pub fn lose(memory: &Memory, block: &Block, pages: Range<u64>) -> Result<u64> {
    lose_if(memory, block, pages, || true)
}

/// Makes a page LOST because the resolver said so. Not if its call was overtaken: it was for a page that has gone since.
pub fn lose_claimed(memory: &Memory, block: &Block, page: u64, claim: &Claim<'_>) -> Result<u64> {
    lose_if(memory, block, page..page + 1, || !claim.is_overtaken())
}

/// `is_due` is asked in each gate.
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
            // They are LOST also where that can't be shown: the threads waiting for them are released all the same,
            // and find out from the state (see `show_lost_again`).
            let shown = show_lost(memory, block, &run);
            run.clone().for_each(|page| WAITS.wake(block.hva_of(page)));
            wake(memory, block, &run)?;
            shown?;
        }
    }
    Ok(lost)
}

/// Makes pages ABSENT that a resolver has announced (KVMFAULT_PENDING) and that have not come, so that the resolver is asked for them anew. A page
/// whose resolver call is under way follows when that call returns, whatever it answers. Returns how many there were of both.
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
            wake(memory, block, &run)?;
        }
    }
    Ok(withdrawn)
}

/// RESOLVING pages that no other thread makes PRESENT now become ABSENT, but for those whose resolver call is under way: these do so when it returns.
fn make_absent(block: &Block, run: &Range<u64>) {
    let overtaken = calls::overtake(block, run.clone());
    for page in run.clone().filter(|page| !overtaken.contains(page)) {
        let _ = block.pages.change(page, State::Resolving, State::Absent);
        WAITS.wake(block.hva_of(page));
    }
}

/// Somebody has come to a page that is LOST, and was not told so: it isn't shown any more, as the VMM has dropped it by itself (MADV_DONTNEED).
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
        (true, _) => Ok(()), // vCPUs are told; what others see there is the VMM's affair
        (false, true) => mark_empty(memory, hva, len, block.page),
        (false, false) => protect(hva, len, false),
    };
    let in_kvm = match block.alias_of(run.start) {
        Some(alias) if markers => mark_empty(memory, alias, len, block.page),
        _ => Ok(()),
    };
    in_vmm.and(in_kvm)
}

/// Puts markers on all absent pages of a block, in the mapping that KVM uses. Pages that arrive meanwhile are left alone.
pub fn mark(memory: &Memory, block: &Block) -> Result<()> {
    block.marked.store(true, Ordering::SeqCst);
    block.set_released(false);
    thread::in_parallel(0..block.pages.len().div_ceil(GATE_PAGES), MARKED_ALONE, |groups| {
        let pages = groups.start * GATE_PAGES..(groups.end * GATE_PAGES).min(block.pages.len());
        gate_groups(pages).try_for_each(|group| {
            let _pass = memory.enter_alone(block, group.start)?;
            mark_missing(memory, block, group.clone())?;
            match memory.external {
                true => mark_empty_pages(memory, block, group),
                false => Ok(()),
            }
        })
    })
}

/// Nothing of ours reads a userfaultfd for the alias of an external VMM's memory: a PRESENT page with nothing in it would be waited for without
/// end. It gets a marker, and is mapped when a vCPU comes to it; the same for one that only seems empty (swapped out, or hugetlb that the VMM
/// hasn't mapped).
fn mark_empty_pages(memory: &Memory, block: &Block, group: Range<u64>) -> Result<()> {
    let (hva, len) = (block.hva_of(group.start), (group.end - group.start) * block.page);
    let resident = mem::resident(hva, len)?;
    let is_empty = |page: u64| !resident[((page - group.start) * (block.page / PAGE)) as usize];
    let take = |page| block.pages.get(page) == State::Present && is_empty(page) && block.defer(page);
    let mut empty = runs(group.clone(), take);
    empty.try_for_each(|run| {
        mark_empty(memory, block.kvm_hva_of(run.start), (run.end - run.start) * block.page, block.page)
    })
}

/// Puts markers on the absent pages of one gate, in a pass for discards.
fn mark_missing(memory: &Memory, block: &Block, group: Range<u64>) -> Result<()> {
    let mut missing = runs(group, |page| block.pages.get(page) != State::Present);
    missing.try_for_each(|run| {
        let len = (run.end - run.start) * block.page;
        mark_empty(memory, block.kvm_hva_of(run.start), len, block.page)
    })
}

/// Puts markers where nothing is.
fn mark_empty(memory: &Memory, at: u64, len: u64, page: u64) -> Result<()> {
    let mut done = 0;
    while done < len {
        done += mark_until(memory, at + done, len - done, page)? + page;
    }
    Ok(())
}

/// Puts markers up to the first page where something is; to how many bytes.
fn mark_until(memory: &Memory, at: u64, len: u64, page: u64) -> Result<u64> {
    let mut patience = Patience::default();
    let mut done = 0;
    while done < len {
        match memory.uffd.poison(at + done, len - done, page)? {
            Step::Done(bytes) => done += bytes,
            Step::Exists => break,
            Step::Again => patience.wait()?,
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
            true => memory.gates.discard_within(gate, Duration::from_millis(100)).ok(),
            false => Some(memory.gates.discard(gate)?),
        };
        for run in runs(group, |page| matches!(block.pages.get(page), State::Absent | State::Resolving)) {
            empty(block, block.kvm_hva_of(run.start), (run.end - run.start) * block.page)?;
        }
    }
    block.marked.store(false, Ordering::SeqCst);
    Ok(())
}

/// The end of absence: from now on nothing can become missing. EBUSY, and nothing has changed, if a page is missing.
pub fn close(memory: &Memory, block: &Block) -> Result<()> {
    // First, so that nothing becomes missing behind our back: `discard` looks at it inside the gate.
    block.set_released(true);
    for group in gate_groups(0..block.pages.len()) {
        let _pass = memory.enter_alone(block, group.start)?;
        let missing = |&page: &u64| matches!(block.pages.get(page), State::Absent | State::Resolving);
        if let Some(page) = group.clone().find(missing) {
            block.set_released(false);
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
    block.marked.store(false, Ordering::SeqCst);
    for run in block.take_deferred_runs(0..block.pages.len()) {
        empty(block, block.kvm_hva_of(run.start), (run.end - run.start) * block.page)?;
    }
    memory.uffd.unregister(alias.address(), block.len)
}

/// Wakes threads that userfaultfd has put to sleep on these pages, in either mapping: they look again.
pub fn wake(memory: &Memory, block: &Block, run: &Range<u64>) -> Result<()> {
    let len = (run.end - run.start) * block.page;
    if memory.external {
        return Ok(()); // nobody sleeps in ours
    }
    memory.uffd.wake(block.hva_of(run.start), len)?;
    block.alias_of(run.start).map_or(Ok(()), |alias| memory.uffd.wake(alias, len))
}

pub(super) fn gate_groups(pages: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let first = pages.start / GATE_PAGES;
    let last = pages.end.div_ceil(GATE_PAGES);
    (first..last).map(move |g| (g * GATE_PAGES).max(pages.start)..((g + 1) * GATE_PAGES).min(pages.end))
}

/// Runs of pages for which `take` says yes; asked once a page, in order.
pub(super) fn runs(pages: Range<u64>, take: impl Fn(u64) -> bool) -> impl Iterator<Item = Range<u64>> {
    let mut next = pages.start;
    std::iter::from_fn(move || {
        while next < pages.end && !take(next) {
            next += 1;
        }
        if next == pages.end {
            return None;
        }
        let start = next;
        next += 1;
        while next < pages.end && take(next) {
            next += 1;
        }
        let run = start..next;
        next = (next + 1).min(pages.end); // the page that said no
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_ask_once_and_miss_nothing() {
        let asked = std::cell::RefCell::new(Vec::new());
        let take = |page: u64| {
            asked.borrow_mut().push(page);
            ![3, 4, 9].contains(&page)
        };
        assert_eq!(runs(0..12, take).collect::<Vec<_>>(), [0..3, 5..9, 10..12]);
        assert_eq!(*asked.borrow(), (0..12).collect::<Vec<_>>());
        assert_eq!(runs(5..5, |_| true).count(), 0);
        assert_eq!(runs(0..1, |_| false).count(), 0);
    }

    #[test]
    fn groups_cover_the_range() {
        assert_eq!(gate_groups(500..1100).collect::<Vec<_>>(), [500..512, 512..1024, 1024..1100]);
        assert_eq!((gate_groups(512..1024).next(), gate_groups(512..1024).count()), (Some(512..1024), 1));
        assert_eq!(gate_groups(7..7).filter(|g| !g.is_empty()).count(), 0);
    }
}
