//! Which resolver calls are under way, and for which pages. A page has at most one call at a time, and this table is what
//! keeps it so: the state RESOLVING says that a page is taken, a thread's entry in the table says by which call.
//!
//! A thread names the page in its entry before it takes the page (ABSENT -> RESOLVING), and clears the entry after the page's
//! state is settled. Another thread that makes the page missing meanwhile (a discard, a withdrawal) finds the entry, marks it as
//! overtaken, and leaves the page in RESOLVING. Then the page belongs to that call until it returns; when it does, the page is
//! ABSENT, whatever the resolver answers, and is asked for anew. Marks are set in a discard's pass of the page's gate. A page is
//! put back in an installer's pass, one at a time, so that of several threads with a mark the last one does it.
//!
//! The VMM may put away what its resolver looks at when a page has come by another way: `wait_for_calls` waits for calls that are under way.

use super::block::Block;
use super::pages::State;
use super::pause::Backoff;
use super::wait::WAITS;
use super::{discard, Memory};
use crate::error::{Error, Result};
use crate::kernel::buffer;
use once_cell::race::OnceRef;
use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{fence, AtomicBool, AtomicU64};
use std::sync::PoisonError;

/// What one thread is calling for. Alone in its cache line: threads don't meet here.
#[repr(align(64))]
#[derive(Default)]
struct Entry {
    /// A page (`Pages::key_of`, and OVERTAKEN), or 0.
    page: AtomicU64,
    /// A thread has it.
    taken: AtomicBool,
    next: OnceRef<'static, Entry>,
}

/// The page was made missing, or was given back, since the thread named it. Keys are even.
const OVERTAKEN: u64 = 1;

/// The entries of all threads. They are never freed, but used again (see `EntryLease`). No lock: a child that is forked while another thread holds one
/// can never take it, and the child's threads come and go, too.
static FIRST: OnceRef<'static, Entry> = OnceRef::new();

fn entries() -> impl Iterator<Item = &'static Entry> {
    std::iter::successors(FIRST.get(), |entry| entry.next.get())
}

/// A thread's entry, for as long as there is the thread.
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

/// In a forked child: the parent's other threads are not here, and end no call.
pub fn forget_other_threads() {
    let _ = ENTRY.try_with(|lease| {
        for entry in entries().filter(|entry| !std::ptr::eq(*entry, lease.0)) {
            entry.page.store(0, Release);
            entry.taken.store(false, Release);
        }
    });
}

/// Gives the calling thread its entry, and what else a thread has to itself, which allocates: so that its first fault needn't.
pub fn prepare_thread() {
    let _ = ENTRY.try_with(|_| {});
    buffer::register();
}

/// Is the calling thread's own call the one for this page?
pub fn is_own_call(block: &Block, page: u64) -> bool {
    let named = ENTRY.try_with(|lease| lease.0.page.load(Relaxed)).unwrap_or(0);
    named & !OVERTAKEN == block.pages.key_of(page)
}

/// A page that is the calling thread's to bring. Dropped without `settle`, the page is ABSENT again and threads that wait for it are
/// woken: after errors, and should a resolver panic.
pub struct Claim<'a> {
    memory: &'a Memory,
    block: &'a Block,
    page: u64,
    entry: &'static Entry,
    /// The entry is for this call only: the thread is ending, or is in a call already.
    _extra: Option<EntryLease>,
    end: End,
    /// Threads asleep in userfaultfd for the page are to be woken now, and not by the reader thread after a pause.
    wakes: bool,
}

/// What is to become of a claim when it ends.
#[derive(PartialEq)]
enum End {
    PutBack,
    Settled,
    Over,
}

impl<'a> Claim<'a> {
    /// Takes an ABSENT page. None if it isn't ABSENT any more.
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
        // Then `wait_for_calls` either sees this call, or has seen the page come before, and so does the change below.
        fence(SeqCst);
        let mut claim = Claim { memory, block, page, entry, _extra: extra, end: End::PutBack, wakes };
        if block.pages.change(page, State::Absent, State::Resolving).is_ok() {
            return Some(claim);
        }
        claim.end = End::Settled; // by another thread
        None
    }

    /// Was the page made missing, or given back, by another thread since it was taken? Then whatever the resolver answers is of the past.
    pub fn is_overtaken(&self) -> bool {
        self.entry.page.load(Acquire) & OVERTAKEN != 0
    }

    /// The same, and a discard that is under way has said so: the page was seen neither PRESENT nor LOST.
    pub fn is_overtaken_after_discards(&self) -> bool {
        if !self.is_overtaken() {
            drop(self.memory.gates.enter_install(self.block.gate_of(self.page)));
        }
        self.is_overtaken()
    }

    /// The page's state is as it is to stay: PRESENT, LOST, or RESOLVING if the resolver has announced it. False if the call was overtaken: then
    /// the page is ABSENT again, unless it has come by another way or was given back.
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
            // No discard of the page is under way.
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
                // Threads asleep in userfaultfd look again, and so ask the resolver anew. Nothing to do if the memory is gone.
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

/// Pages of a range, all RESOLVING, are taken away in a pass for discards: for which of them a call is under way, whose answer now counts for nothing.
/// Those that are made missing must stay RESOLVING until it returns; then they become ABSENT. Those that were given back are PRESENT at once.
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

/// Waits until no call is under way for a page of this block that is there, or until `enough` says why it should wait no longer.
pub fn wait_for_calls(block: &Block, enough: impl Fn(u64) -> Option<Error>) -> Result<()> {
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
    use crate::kernel::mem::{Kind, Mapping, PAGE};
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
        let ram = Mapping::anonymous(PAGES * PAGE)?;
        memory.uffd.register(ram.address(), PAGES * PAGE, Mode::default())?;
        let shape = Shape { hva: ram.address(), len: PAGES * PAGE, page: PAGE, kind: Kind::Anon, mechanism: 0 };
        let block = Block::new(shape, None, false, false)?;
        Ok((memory, ram, block))
    }

    /// Threads that call for pages, threads that push, discard, give up and withdraw them: a page never has two calls at a time, and none is left
    /// RESOLVING without a call or an announcement.
    #[test]
    fn a_page_has_one_call_at_a_time() {
        let (memory, _ram, block) = needs!(memory_and_block());
        let (memory, block) = (&memory, &block);
        let (stop, most, calls, overtaken) =
            (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
        let inside: Vec<_> = (0..PAGES).map(|_| AtomicU32::new(0)).collect();
        let bytes = Mapping::anonymous(PAGE).unwrap();
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

    /// A call inside a call has a entry of its own, and so has a thread that is about to end.
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
        // Announced: there is no call, and nothing to wait for.
        assert!(Claim::take(&memory, &block, 0, false).unwrap().settle());
        assert_eq!(discard::withdraw(&memory, &block, 0..2), Ok(1));
        assert_eq!(block.pages.get(0), State::Absent);
    }
}
