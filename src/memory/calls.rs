//! Which resolver calls are under way, and for which pages. A page has at most one call at a time,
//! and this table ensures it: the state RESOLVING says that a page is taken, a thread's entry in
//! the table says by which call.
//!
//! A thread names the page in its entry before it takes the page (ABSENT -> RESOLVING), and clears
//! the entry once the page's state is settled. Another thread that makes the page missing meanwhile
//! (a discard, a withdrawal) finds the entry, marks it as overtaken, and leaves the page RESOLVING.
//! The page then belongs to that call until the call returns; it then becomes ABSENT, whatever the
//! resolver answers, and is asked for again. Entries are marked in a discard's pass of the page's
//! gate. A page becomes ABSENT again in an installer's pass, one call at a time, so that of several
//! threads with a mark the last one does it.
//!
//! When a page has arrived by another way, the VMM may free what its resolver reads:
//! `wait_for_calls` waits for the calls that are under way.

use super::block::Block;
use super::pages::State;
use super::pause::Backoff;
use super::wait::WAITS;
use super::{discard, Memory};
use crate::error::{Error, Result};
use crate::kernel::address::Hva;
use crate::kernel::buffer;
use once_cell::race::OnceRef;
use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{fence, AtomicBool, AtomicU64};
use std::sync::PoisonError;

/// The page that one thread is calling the resolver for. Each entry has a cache line to itself:
/// threads do not meet here.
#[repr(align(64))]
#[derive(Default)]
struct Entry {
    /// The key of a page (`Pages::key_of`), perhaps with OVERTAKEN, or 0.
    page: AtomicU64,
    /// A thread leases this entry.
    taken: AtomicBool,
    next: OnceRef<'static, Entry>,
}

/// The page was made missing, or was given back, since the thread named it. Keys are even.
const OVERTAKEN: u64 = 1;

/// The first entry in the list of all threads' entries. Entries are never freed, but leased again
/// (see `EntryLease`). There is no lock: one that another thread holds during fork would be held in
/// the child for ever.
static FIRST: OnceRef<'static, Entry> = OnceRef::new();

fn entries() -> impl Iterator<Item = &'static Entry> {
    std::iter::successors(FIRST.get(), |entry| entry.next.get())
}

/// A thread's lease of an entry, which ends with the thread.
struct EntryLease(&'static Entry);

impl EntryLease {
    fn take() -> EntryLease {
        if let Some(free) = entries().find(|entry| !entry.taken.swap(true, Acquire)) {
            return EntryLease(free);
        }
        let entry: &'static Entry = Box::leak(Box::new(Entry { taken: true.into(), ..Entry::default() }));
        let mut end = &FIRST;
        while end.set(entry).is_err() {
            let Some(other) = end.get() else { continue };
            end = &other.next;
        }
        EntryLease(entry)
    }
}

impl Drop for EntryLease {
    fn drop(&mut self) {
        self.0.page.store(0, Release);
        self.0.taken.store(false, Release);
    }
}

thread_local! {
    static ENTRY: EntryLease = EntryLease::take();
}

/// For a forked child: ends the calls of the parent's other threads, which the child does not have.
pub fn forget_other_threads() {
    let _ = ENTRY.try_with(|lease| {
        for entry in entries().filter(|entry| !std::ptr::eq(*entry, lease.0)) {
            entry.page.store(0, Release);
            entry.taken.store(false, Release);
        }
    });
}

/// Allocates what the calling thread needs of its own, so that its first fault allocates nothing.
pub fn prepare_thread() {
    let _ = ENTRY.try_with(|_| {});
    buffer::register();
}

/// Is this page's resolver call one of the calling thread?
pub fn is_own_call(block: &Block, page: u64) -> bool {
    let named = ENTRY.try_with(|lease| lease.0.page.load(Relaxed)).unwrap_or(0);
    named & !OVERTAKEN == block.pages.key_of(page)
}

/// A page that the calling thread has taken and is to fetch. Dropped without `settle` (after
/// errors, and if a resolver panics), it makes the page ABSENT again and wakes the threads that
/// wait for it.
pub struct Claim<'a> {
    memory: &'a Memory,
    block: &'a Block,
    page: u64,
    entry: &'static Entry,
    /// Set if the entry is for this call only: the thread is ending, or is inside a call already.
    _extra: Option<EntryLease>,
    end: End,
    /// Threads asleep in userfaultfd for the page are woken at once, not by a reader thread after a
    /// pause.
    wakes: bool,
}

/// What happens when a claim ends.
#[derive(PartialEq)]
enum End {
    PutBack,
    Settled,
    Over,
}

impl<'a> Claim<'a> {
    /// Takes an ABSENT page. None if the page is no longer ABSENT.
    #[inline]
    pub fn take(memory: &'a Memory, block: &'a Block, page: u64, wakes: bool) -> Option<Claim<'a>> {
        match ENTRY.try_with(|lease| lease.0) {
            Ok(entry) if entry.page.load(Relaxed) == 0 => Claim::take_with(memory, block, page, wakes, entry, None),
            _ => Claim::take_with_extra_entry(memory, block, page, wakes),
        }
    }

    #[cold]
    fn take_with_extra_entry(memory: &'a Memory, block: &'a Block, page: u64, wakes: bool) -> Option<Claim<'a>> {
        let extra = EntryLease::take();
        Claim::take_with(memory, block, page, wakes, extra.0, Some(extra))
    }

    #[inline]
    fn take_with(
        memory: &'a Memory,
        block: &'a Block,
        page: u64,
        wakes: bool,
        entry: &'static Entry,
        extra: Option<EntryLease>,
    ) -> Option<Claim<'a>> {
        entry.page.store(block.pages.key_of(page), Relaxed);
        // Either `wait_for_calls` sees this call, or it has seen the page PRESENT or LOST before,
        // and then `change` below sees that, too.
        fence(SeqCst);
        let mut claim = Claim { memory, block, page, entry, _extra: extra, end: End::PutBack, wakes };
        if block.pages.change(page, State::Absent, State::Resolving).is_ok() {
            return Some(claim);
        }
        claim.end = End::Settled; // by another thread
        None
    }

    /// Has another thread made the page missing, or given it back, since it was taken? The
    /// resolver's answer then concerns a page that no longer exists.
    pub fn is_overtaken(&self) -> bool {
        self.entry.page.load(Acquire) & OVERTAKEN != 0
    }

    /// Like `is_overtaken`, but waits for a discard that is under way to mark the claim. For pages
    /// that were seen neither PRESENT nor LOST.
    pub fn is_overtaken_after_discards(&self) -> bool {
        if !self.is_overtaken() {
            drop(self.memory.gates.enter_install(self.block.gate_of(self.page)));
        }
        self.is_overtaken()
    }

    /// Ends the claim with the page's state as it is: PRESENT, LOST, or RESOLVING if the resolver
    /// has announced the page. False if the call was overtaken: the page is then ABSENT again,
    /// unless it has arrived by another way or was given back.
    #[inline]
    pub fn settle(&mut self) -> bool {
        self.end = End::Settled;
        self.finish()
    }

    #[inline]
    fn finish(&mut self) -> bool {
        let key = self.block.pages.key_of(self.page);
        let end = std::mem::replace(&mut self.end, End::Over);
        if end == End::Settled && self.entry.page.compare_exchange(key, 0, Release, Relaxed).is_ok() {
            return true;
        }
        if end != End::Over {
            self.put_back(key);
        }
        false
    }

    #[cold]
    fn put_back(&self, key: u64) {
        let overtaken = self.is_overtaken();
        let is_back = {
            // In this pass no discard of the page is under way.
            let _pass = self.memory.gates.enter_install(self.block.gate_of(self.page));
            let _turn = self.memory.putting_back.lock().unwrap_or_else(PoisonError::into_inner);
            let others = entries().any(|p| !std::ptr::eq(p, self.entry) && p.page.load(Acquire) == key | OVERTAKEN);
            let is_back = !others && self.block.pages.change(self.page, State::Resolving, State::Absent).is_ok();
            self.entry.page.store(0, Release);
            is_back
        };
        if is_back {
            if overtaken {
                self.memory.withdrawn.fetch_add(1, Relaxed);
            }
            WAITS.wake(self.block.hva_of(self.page));
            if self.wakes || overtaken {
                // Threads asleep in userfaultfd fault again, and so call the resolver again. An
                // error means that the memory is gone, and its sleepers with it.
                let _ = discard::wake_sleepers(self.memory, self.block, &(self.page..self.page + 1));
            }
        }
    }
}

impl Drop for Claim<'_> {
    #[inline]
    fn drop(&mut self) {
        self.finish();
    }
}

/// Marks the calls that are under way for RESOLVING pages of a range as overtaken, in a discard's
/// pass; their answers count for nothing. Returns their pages: those that are made missing must
/// stay RESOLVING until the call returns, and then become ABSENT; those that are given back become
/// PRESENT at once.
pub fn overtake(block: &Block, pages: Range<u64>) -> Vec<u64> {
    let mut overtaken = Vec::new();
    fence(SeqCst);
    for entry in entries() {
        let key = entry.page.load(Acquire);
        let Some(page) = block.pages.page_of_key(key & !OVERTAKEN).filter(|page| pages.contains(page)) else {
            continue;
        };
        let mark = || entry.page.compare_exchange(key, key | OVERTAKEN, SeqCst, SeqCst).is_ok();
        if key & OVERTAKEN != 0 || mark() {
            overtaken.push(page);
        }
    }
    overtaken
}

/// Waits until no call is under way for a page of this block that is PRESENT or LOST, or until
/// `enough` returns an error for such a page.
pub fn wait_for_calls(block: &Block, enough: impl Fn(Hva) -> Option<Error>) -> Result<()> {
    let is_there = |&page: &u64| matches!(block.pages.get(page), State::Present | State::Lost);
    fence(SeqCst);
    for entry in entries() {
        let mut backoff = Backoff::default();
        let page = || block.pages.page_of_key(entry.page.load(Acquire) & !OVERTAKEN).filter(is_there);
        while let Some(page) = page() {
            if let Some(error) = enough(block.hva_of(page)) {
                return Err(error);
            }
            backoff.pause();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::host_memory::HostMemory;
    use crate::kernel::mem::{Kind, Mapping};
    use crate::kernel::page::page_size;
    use crate::kernel::uffd::{Mode, Uffd};
    use crate::memory::block::Shape;
    use crate::memory::install::install;
    use crate::memory::lose;
    use crate::memory::source::Source;
    use crate::stats::Stats;
    use std::sync::atomic::AtomicU32;
    use std::time::{Duration, Instant};

    const PAGES: u64 = 4;

    fn memory_and_block() -> Result<(Memory, Mapping, Block)> {
        let memory = Memory::new(Uffd::open()?, false);
        let ram = Mapping::anonymous(PAGES * page_size())?;
        memory.uffd.register(ram.whole(), Mode::default())?;
        let shape = Shape {
            memory: HostMemory::for_test(ram.address(), PAGES * page_size()),
            page: page_size(),
            kind: Kind::Anon,
            mechanism: 0,
        };
        let block = Block::new(shape, None, false, false)?;
        Ok((memory, ram, block))
    }

    /// Threads call for pages while others push, discard, lose and withdraw them: a page never has
    /// two calls at a time, and no page stays RESOLVING without a call or an announcement.
    #[test]
    fn a_page_has_one_call_at_a_time() {
        let (memory, _ram, block) = needs!(memory_and_block());
        let (memory, block) = (&memory, &block);
        let (stop, most, calls, overtaken) =
            (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
        let inside: Vec<_> = (0..PAGES).map(|_| AtomicU32::new(0)).collect();
        let bytes = Mapping::anonymous(page_size()).unwrap();
        let source = Source::Copy(bytes.address());
        std::thread::scope(|scope| {
            for seed in 0..3u64 {
                let (stop, most, calls, overtaken, inside) = (&stop, &most, &calls, &overtaken, &inside);
                scope.spawn(move || {
                    let mut random = seed;
                    while !stop.load(SeqCst) {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let (page, what) = ((random >> 40) % PAGES, (random >> 50) % 4);
                        let Some(mut claim) = Claim::take(memory, block, page, true) else { continue };
                        most.fetch_max(inside[page as usize].fetch_add(1, SeqCst) + 1, SeqCst);
                        (0..(random >> 45) % 32).for_each(|_| std::thread::yield_now());
                        if what == 0 {
                            let _ = install(memory, block, page..page + 1, source, &Stats::default());
                        }
                        inside[page as usize].fetch_sub(1, SeqCst);
                        calls.fetch_add(1, SeqCst);
                        overtaken.fetch_add(claim.is_overtaken().into(), SeqCst);
                        match what {
                            0 if block.pages.get(page) == State::Present => drop(claim.settle()),
                            1 => drop(claim.settle()), // announced
                            2 => drop(lose::lose_claimed(memory, block, page, &claim)),
                            _ => drop(claim), // failed
                        }
                    }
                });
            }
            for seed in 10..12u64 {
                let stop = &stop;
                scope.spawn(move || {
                    let mut random = seed;
                    while !stop.load(SeqCst) {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let page = (random >> 40) % PAGES;
                        let pages = page..page + 1;
                        let _ = match (random >> 50) % 4 {
                            0 => install(memory, block, pages, source, &Stats::default()).map(drop),
                            1 => lose::lose(memory, block, pages).map(drop),
                            2 => discard::withdraw(memory, block, 0..PAGES).map(drop),
                            _ => discard::discard(memory, block, 0..PAGES, &Stats::default()),
                        };
                    }
                });
            }
            let begin = Instant::now();
            let enough = || calls.load(SeqCst) > 5_000 && overtaken.load(SeqCst) > 50;
            while begin.elapsed() < Duration::from_secs(1) || !enough() && begin.elapsed() < Duration::from_secs(30) {
                std::thread::sleep(Duration::from_millis(10));
            }
            stop.store(true, SeqCst);
        });
        discard::withdraw(memory, block, 0..PAGES).unwrap();
        assert_eq!(most.load(SeqCst), 1, "calls at a time for one page, of {} in all", calls.load(SeqCst));
        assert!(overtaken.load(SeqCst) > 0, "of {} calls none was overtaken", calls.load(SeqCst));
        assert_eq!(block.pages.count(0..PAGES, State::Resolving), 0, "pages that no call will ever give back");
    }

    /// A call inside a call has an entry of its own, and so has a thread that is about to end.
    #[test]
    fn calls_may_be_nested() {
        let (memory, _ram, block) = needs!(memory_and_block());
        let outer = Claim::take(&memory, &block, 0, false).unwrap();
        let mut inner = Claim::take(&memory, &block, 1, false).unwrap();
        assert!(is_own_call(&block, 0) && Claim::take(&memory, &block, 1, false).is_none());
        assert_eq!(discard::withdraw(&memory, &block, 0..2), Ok(2));
        assert!(outer.is_overtaken() && inner.is_overtaken());
        assert!(!inner.settle());
        assert_eq!((block.pages.get(0), block.pages.get(1)), (State::Resolving, State::Absent));
        drop(outer);
        assert_eq!(block.pages.get(0), State::Absent);
        // An announced page has no call, and there is nothing to wait for.
        assert!(Claim::take(&memory, &block, 0, false).unwrap().settle());
        assert_eq!(discard::withdraw(&memory, &block, 0..2), Ok(1));
        assert_eq!(block.pages.get(0), State::Absent);
    }
}
