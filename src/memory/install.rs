//! How a page becomes present. The only place where that happens, whoever brings it: a resolver on a vCPU's thread, a
//! reader thread, the VMM's receiving thread.
//!
//! The order is what makes it right: bytes into the VMM's mapping; then the mapping that KVM uses; then KVM's bitmap; then
//! the state; then whoever waits. At each point a guest that looks sees either "absent" or the right bytes.

use super::block::Block;
use super::gates::{Pass, GATE_PAGES};
use super::pages::State;
use super::pause::Patience;
use super::wait::WAITS;
use super::{discard, Memory};
use crate::error::{fail, Error, Result};
use crate::kernel::mem::{self, Kind, Mapping, HUGE_PAGE, PAGE};
use crate::kernel::uffd::Step;
use crate::stats::Stats;
use once_cell::sync::OnceCell;
use std::cell::{Cell, RefCell};
use std::ops::Range;

/// How a page's bytes come.
#[derive(Debug, Clone, Copy)]
pub enum Source {
    /// From this address of this process, page after page.
    Copy(u64),
    /// They are zeros.
    Zero,
    /// They are in the page cache of shared memory already.
    Map,
    /// The VMM has put them into its mapping already (see `Memory::external`).
    Arrived,
}

impl Source {
    /// What comes so many pages later.
    fn from(self, block: &Block, pages: u64) -> Source {
        match self {
            Source::Copy(bytes) => Source::Copy(bytes + pages * block.page),
            other => other,
        }
    }
}

/// Zeros to copy where UFFDIO_ZEROPAGE doesn't work, for pages up to 2 MiB and for those that are larger.
static ZEROS: [OnceCell<Mapping>; 2] = [const { OnceCell::new() }; 2];

/// As many zeros as a page of this size needs, at least; an error is not kept.
fn zeros(page: u64) -> Result<(&'static Mapping, u64)> {
    let (zeros, len) = if page <= HUGE_PAGE { (&ZEROS[0], HUGE_PAGE) } else { (&ZEROS[1], page.max(1 << 30)) };
    Ok((zeros.get_or_try_init(|| Mapping::zeros(len))?, len))
}

/// So often in a row something may be in an absent page's place.
const MOST_IN_THE_WAY: u32 = 1000;

thread_local! {
    /// What the thread installed from last: start and end.
    static FETCHED: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    /// Why the last install failed that a resolver called for on this thread.
    static FAILED: RefCell<Option<Error>> = const { RefCell::new(None) };
}

/// Has the source read into memory before a gate is entered. It may be slow (a file on a network, memory under another userfaultfd), or never
/// answer, and then others would wait for it in the gate. A buffer that is used again and again is there already. Errors are the copy's to tell: it
/// says which page. A page that goes again meanwhile is read inside the gate; no wait for that is without end (see `Gates::discard`).
fn fetch(bytes: u64, len: u64) {
    let end = bytes.saturating_add(len);
    let (from, to) = FETCHED.get();
    if bytes < from || end > to {
        let start = bytes & !(PAGE - 1);
        let _ = mem::advise(start, end.next_multiple_of(PAGE) - start, libc::MADV_POPULATE_READ, "");
        FETCHED.set((bytes, end));
    }
}

/// An install that a resolver called for failed: its errno is all that the resolver can return.
pub fn note_failure(error: &Error) {
    FAILED.set(Some(error.clone()));
}

/// Why the last install failed that a resolver called for on this thread, if that had this errno.
pub fn take_failure(errno: i32) -> Option<Error> {
    FAILED.take().filter(|error| error.errno == errno)
}

/// Makes pages of a block present; pages that are so already are skipped. Returns how many became present by this call.
/// On an error the pages before the failing one stay installed.
pub fn install(memory: &Memory, block: &Block, pages: Range<u64>, source: Source, stats: &Stats) -> Result<u64> {
    let mut installed = 0;
    let mut page = pages.start;
    let mut blocked = (page, 0);
    while page < pages.end {
        let end = pages.end.min((page / GATE_PAGES + 1) * GATE_PAGES);
        if let Source::Copy(bytes) = source.from(block, page - pages.start) {
            fetch(bytes, (end - page) * block.page);
        }
        // While this lasts no page of the gate becomes LOST or is discarded: what the states say below stays true.
        let Some(pass) = memory.enter(block, page) else {
            fail!(ENOENT, "the slot that showed the page at hva {:#x} was deleted", block.hva_of(page))
        };
        while page < end {
            match block.pages.get(page) {
                State::Present => {
                    // The VMM may have dropped what was there: then KVM's mapping, which had it, has nothing.
                    if matches!(source, Source::Arrived) && !block.is_deferred(page) {
                        map_alias(memory, block, page..page + 1, Empty::Defer, stats)?;
                    }
                    page += 1;
                }
                State::Lost => fail!(EHWPOISON, "the page at hva {:#x} is lost; discard it first", block.hva_of(page)),
                _ => {
                    let run_end = (page + 1..end)
                        .find(|&p| matches!(block.pages.get(p), State::Present | State::Lost))
                        .unwrap_or(end);
                    let source = source.from(block, page - pages.start);
                    page = install_run(memory, block, page..run_end, source, stats, &mut installed)?;
                    if page < run_end {
                        break;
                    }
                }
            }
        }
        drop(pass);
        if page < end {
            blocked = (page, if blocked.0 == page { blocked.1 + 1 } else { 1 });
            if blocked.1 > MOST_IN_THE_WAY {
                let hva = block.hva_of(page);
                fail!(EBUSY, "the page at hva {hva:#x} is absent, and something else writes to it again and again");
            }
            make_room(memory, block, page)?;
        }
    }
    Ok(installed)
}

/// Pages of one gate that were absent a moment ago. Returns the end, or the first page in whose place something is already.
fn install_run(
    memory: &Memory,
    block: &Block,
    run: Range<u64>,
    source: Source,
    stats: &Stats,
    installed: &mut u64,
) -> Result<u64> {
    let mut at = run.start;
    let mut patience = Patience::default();
    while at < run.end {
        match bring(memory, block, at..run.end, source.from(block, at - run.start))? {
            Step::Done(bytes) => {
                let end = at + bytes / block.page;
                publish(memory, block, at..end, source, stats, installed)?;
                at = end;
            }
            Step::Exists => {
                stats.retries_exist.add(1);
                if matches!(source, Source::Copy(_) | Source::Zero) {
                    return Ok(at);
                }
                // Another installer was first; its wake-up may have been before the waiter's sleep.
                publish(memory, block, at..at + 1, source, stats, installed)?;
                memory.uffd.wake(block.hva_of(at), block.page)?;
                at += 1;
            }
            Step::Again => {
                stats.retries_again.add(1);
                patience.wait()?;
            }
        }
    }
    Ok(run.end)
}

/// Something was in an absent page's place. Another installer's bytes, mostly: then the page is PRESENT once that installer is through. If it
/// isn't, nobody has installed what is there: the memory was populated before its slot was set (preallocated, or used before), or was written
/// behind our back, or dropping it failed. Nobody may take that for the page, so it goes. The bytes come in an ordinary pass again: reading
/// them may take whoever installs in this gate.
fn make_room(memory: &Memory, block: &Block, page: u64) -> Result<()> {
    let _pass = memory.enter_alone(block, page)?;
    match block.pages.get(page) {
        State::Absent | State::Resolving => discard::clear(memory, block, page),
        // The other installer's wake-up may have been before the waiter's sleep.
        State::Present | State::Lost => memory.uffd.wake(block.hva_of(page), block.page),
    }
}

/// Bytes into the VMM's mapping.
fn bring(memory: &Memory, block: &Block, run: Range<u64>, source: Source) -> Result<Step> {
    let (hva, len) = (block.hva_of(run.start), (run.end - run.start) * block.page);
    match source {
        Source::Copy(bytes) => memory.uffd.copy(hva, bytes, len, block.page).map_err(|e| match e.errno {
            libc::EFAULT => Error::new(libc::EFAULT, format!("src: the bytes at {bytes:#x} can't be read")),
            _ => explain(e, block, hva),
        }),
        Source::Zero => zero(memory, block, hva, len),
        Source::Map => memory.uffd.map(hva, len, block.page).map_err(|e| match e.errno {
            libc::EFAULT => Error::new(libc::ENOENT, format!("the page at hva {hva:#x} is not in the page cache")),
            _ => explain(e, block, hva),
        }),
        Source::Arrived => Ok(Step::Done(len)),
    }
}

/// Zeros to an address in either mapping of a block.
fn zero(memory: &Memory, block: &Block, at: u64, len: u64) -> Result<Step> {
    // UFFDIO_ZEROPAGE doesn't replace a marker in private memory, and doesn't know hugetlb.
    let done = if block.kind == Kind::Shared || block.kind == Kind::Anon && !block.is_marked() {
        memory.uffd.zero(at, len, block.page)
    } else {
        let (zeros, most) = zeros(block.page)?;
        let len = len.min(most / block.page * block.page).max(block.page);
        memory.uffd.copy(at, zeros.address(), len, block.page)
    };
    done.map_err(|e| explain(e, block, at))
}

fn explain(error: Error, block: &Block, hva: u64) -> Error {
    let why = match error.errno {
        libc::ENOENT => "the memory is no longer mapped as it was when its slot was set",
        libc::ENOMEM | libc::ENOSPC if block.page > PAGE => "the huge page pool is empty (vm.nr_hugepages)",
        _ => return error.context(format!("installing the page at hva {hva:#x}")),
    };
    error.context(format!("installing the page at hva {hva:#x}: {why}"))
}

/// The bytes are in the VMM's mapping: show them to KVM, then to everybody. Host threads have them from now on, so the pages are PRESENT even if
/// mapping them for KVM fails: were they absent, the next install would drop them, with what was written to them meanwhile. A page that isn't mapped
/// for KVM keeps its marker, and is mapped when a vCPU comes to it.
fn publish(
    memory: &Memory,
    block: &Block,
    run: Range<u64>,
    source: Source,
    stats: &Stats,
    installed: &mut u64,
) -> Result<()> {
    if matches!(source, Source::Arrived) {
        return arrive(memory, block, run, stats, installed);
    }
    let mapped = map_alias(memory, block, run.clone(), Empty::Fill, stats);
    block.set_exits(run.clone(), false);
    let before = *installed;
    for page in run {
        *installed += block.pages.make_present(page) as u64;
        WAITS.wake(block.hva_of(page));
    }
    match source {
        Source::Copy(_) => stats.pages_copied.add(*installed - before),
        Source::Zero => stats.pages_zeroed.add(*installed - before),
        Source::Map | Source::Arrived => stats.pages_mapped.add(*installed - before),
    }
    mapped
}

/// The VMM has brought pages into its mapping, mostly such as nobody has asked for. A system call for each of them would slow the VMM's stream
/// down; so they are mapped in the alias when all 64 pages of a word are there, or when a vCPU comes to one of the word that is. Pages that
/// somebody waits for are mapped at once. A page with nothing in it (the VMM has dropped what was there) takes no memory before a vCPU comes to it.
fn arrive(memory: &Memory, block: &Block, run: Range<u64>, stats: &Stats, installed: &mut u64) -> Result<()> {
    let before = *installed;
    block.set_exits(run.clone(), false);
    for page in run.clone() {
        let unasked = block.pages.get(page) == State::Absent && block.defer(page);
        if unasked && block.pages.change(page, State::Absent, State::Present).is_ok() {
            *installed += 1;
        } else {
            block.take_deferred_runs(page..page + 1).for_each(drop);
            map_alias(memory, block, page..page + 1, Empty::Defer, stats)?;
            *installed += block.pages.make_present(page) as u64;
        }
        WAITS.wake(block.hva_of(page));
        let word = block.word_of(page);
        if page + 1 == word.end.min(run.end) && block.pages.count(word.clone(), State::Present) == word.end - word.start
        {
            map_deferred(memory, block, word, stats)?;
        }
    }
    stats.pages_mapped.add(*installed - before);
    Ok(())
}

/// Maps what is deferred of a range. No discard of the pages may be under way.
fn map_deferred(memory: &Memory, block: &Block, pages: Range<u64>, stats: &Stats) -> Result<()> {
    block.take_deferred_runs(pages).try_for_each(|run| map_alias(memory, block, run, Empty::Defer, stats))
}

/// A page stays PRESENT for as long as this pass is held; None if it isn't PRESENT any more, or its block is gone. Then it must be left alone: what
/// were mapped there now, the next install would take for the page.
fn keep_present<'m>(memory: &'m Memory, block: &Block, page: u64) -> Option<Pass<'m>> {
    let pass = memory.enter(block, page)?;
    (block.pages.get(page) == State::Present).then_some(pass)
}

/// Maps a PRESENT page in the alias for a vCPU that came to it, and what is deferred around it. A page that was discarded meanwhile is left
/// alone; whoever wants it comes again.
pub fn map_present(memory: &Memory, block: &Block, page: u64, stats: &Stats) -> Result<()> {
    let Some(_pass) = keep_present(memory, block, page) else { return Ok(()) };
    if block.is_deferred(page) {
        map_deferred(memory, block, block.word_of(page), stats)?;
    }
    map_alias(memory, block, page..page + 1, Empty::Fill, stats)
}

/// Is a PRESENT page broken (hwpoison) at `hva`, which shows it? A page that is discarded meanwhile isn't, though its marker looks the same.
/// No pass is held while looking, which may wait (userfaultfd's minor faults), and discards would wait for it.
pub fn is_broken(memory: &Memory, block: &Block, page: u64, hva: u64) -> bool {
    let discards = memory.gates.discards(block.gate_of(page));
    discards.is_some()
        && block.pages.get(page) == State::Present
        && mem::is_poisoned(hva, block.page)
        && memory.gates.discards(block.gate_of(page)) == discards
}

/// Maps a PRESENT page in the VMM's mapping, for threads that wait there in userfaultfd.
pub fn map_vmm(memory: &Memory, block: &Block, page: u64, stats: &Stats) -> Result<()> {
    let hva = block.hva_of(page);
    if let Some(_pass) = keep_present(memory, block, page) {
        let mapped = match block.kind {
            Kind::Shared | Kind::HugetlbShared => memory.uffd.map(hva, block.page, block.page),
            Kind::Anon | Kind::HugetlbPrivate => fill(memory, block, hva, stats),
        };
        match mapped {
            // EINVAL: the kernel has no UFFDIO_CONTINUE. What is in the page cache needs none there.
            Err(e) if matches!(e.errno, libc::EFAULT | libc::EINVAL) => {
                fill(memory, block, hva, stats)?;
            }
            // No longer registered: whoever slept was woken by that.
            Err(e) if e.errno == libc::ENOENT && block.is_released() => {}
            other => {
                other?;
            }
        }
    }
    memory.uffd.wake(hva, block.page)
}

/// What becomes of a PRESENT page with nothing in it, when it is to be mapped for KVM.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Empty {
    /// It gets zeros.
    Fill,
    /// Where pages can be deferred it keeps a marker, and gets its zeros when a vCPU comes to it.
    Defer,
}

/// So often in a row a page may be neither in the page cache nor possible to put there.
const MOST_FILLS: u32 = 100;

/// Maps pages of the page cache in KVM's alias, over markers; does nothing without an alias.
fn map_alias(memory: &Memory, block: &Block, run: Range<u64>, empty: Empty, stats: &Stats) -> Result<()> {
    let Some(alias) = block.alias_of(run.start) else {
        return Ok(());
    };
    let end = alias + (run.end - run.start) * block.page;
    let mut at = alias;
    let mut patience = Patience::default();
    let mut fills = 0;
    while at < end {
        let step = match memory.uffd.map(at, end - at, block.page) {
            // No longer registered: the alias needs no help any more. (While a page is missing it is.)
            Err(e) if e.errno == libc::ENOENT && block.is_released() => return Ok(()),
            Err(e) if e.errno == libc::EFAULT => {
                let page = run.start + (at - alias) / block.page;
                if empty == Empty::Defer && block.defer(page) {
                    memory.uffd.poison(at, block.page, block.page)?;
                    at += block.page;
                    continue;
                }
                match fill(memory, block, at, stats)? {
                    // Others were faster, and it is in the page cache now. Unless it goes as fast as it comes.
                    Step::Exists if fills < MOST_FILLS => {
                        fills += 1;
                        continue;
                    }
                    Step::Exists => {
                        fail!(EBUSY, "the page at hva {:#x} is dropped as fast as it comes", block.hva_of(page))
                    }
                    step => step,
                }
            }
            step => step.map_err(|e| e.context("mapping a page for KVM"))?,
        };
        match step {
            Step::Done(bytes) => at += bytes,
            Step::Exists => {
                memory.uffd.wake(at, block.page)?;
                at += block.page;
            }
            Step::Again => {
                stats.retries_again.add(1);
                patience.wait()?;
            }
        }
    }
    Ok(())
}

/// A PRESENT page with nothing in it reads as zeros, as it would without userfaultfd: a hole of memory that was set with all pages present, or a
/// page that the VMM dropped without telling.
fn fill(memory: &Memory, block: &Block, at: u64, stats: &Stats) -> Result<Step> {
    let step = zero(memory, block, at, block.page)?;
    if let Step::Done(_) = step {
        stats.pages_empty.add(1);
    }
    Ok(step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::uffd::{Mode, Uffd};
    use crate::memory::block::Shape;
    use crate::memory::discard;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
    use std::time::{Duration, Instant};

    fn memory_and_block(pages: u64) -> Result<(Memory, Mapping, Block)> {
        let memory = Memory::new(Uffd::open()?, false);
        let ram = Mapping::anonymous(pages * PAGE).unwrap();
        memory.uffd.register(ram.address(), pages * PAGE, Mode::default()).unwrap();
        let shape = Shape { hva: ram.address(), len: pages * PAGE, page: PAGE, kind: Kind::Anon, mechanism: 0 };
        let block = Block::new(shape, None, false, false).unwrap();
        Ok((memory, ram, block))
    }

    fn byte(hva: u64) -> u8 {
        let mut byte = [0xee];
        mem::read(hva, &mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn present_pages_are_skipped_and_keep_their_bytes() {
        let (memory, ram, block) = needs!(memory_and_block(1030));
        let stats = Stats::default();
        let bytes = Mapping::anonymous(1030 * PAGE).unwrap();
        mem::write(bytes.address(), &[1; 1030 * PAGE as usize]).unwrap();
        assert_eq!(install(&memory, &block, 600..601, Source::Zero, &stats), Ok(1));
        assert_eq!(install(&memory, &block, 0..1030, Source::Copy(bytes.address()), &stats), Ok(1029));
        assert_eq!(install(&memory, &block, 0..1030, Source::Copy(bytes.address()), &stats), Ok(0));
        assert_eq!((byte(ram.address() + 600 * PAGE), byte(ram.address() + 601 * PAGE)), (0, 1));
        assert_eq!((stats.pages_copied.get(), stats.pages_zeroed.get()), (1029, 1));
    }

    #[test]
    fn over_markers_zeros_are_copied() {
        let (memory, ram, block) = needs!(memory_and_block(4));
        if memory.uffd.features() & crate::kernel::uffd::FEATURE_POISON == 0 {
            return eprintln!("skipped: the kernel has no UFFDIO_POISON (Linux 6.6 and later have)");
        }
        memory.uffd.poison(ram.address(), 4 * PAGE, PAGE).unwrap();
        block.marked.store(true, std::sync::atomic::Ordering::SeqCst);
        assert_eq!(mem::read(ram.address(), &mut [0]).unwrap_err().errno, libc::EFAULT);
        assert_eq!(install(&memory, &block, 0..4, Source::Zero, &Stats::default()), Ok(4));
        assert_eq!(byte(ram.address() + 3 * PAGE), 0);
    }

    /// Who has seen a page PRESENT maps it a moment later; discarded since, it must stay missing, or zeros would be taken for it.
    #[test]
    fn what_was_discarded_meanwhile_is_not_mapped() {
        let (anon_memory, _ram, anon) = needs!(memory_and_block(2));
        let memory = Memory::new(Uffd::open().unwrap(), false);
        let file = crate::kernel::file::tests::shared(2 * PAGE);
        let ram = Mapping::shared(std::os::fd::AsRawFd::as_raw_fd(&file), 0, 2 * PAGE, true).unwrap();
        memory.uffd.register(ram.address(), 2 * PAGE, Mode::default()).unwrap();
        let shape = Shape { hva: ram.address(), len: 2 * PAGE, page: PAGE, kind: Kind::Shared, mechanism: 0 };
        let shared = Block::new(shape, None, false, false).unwrap();
        let bytes = Mapping::anonymous(PAGE).unwrap();
        mem::write(bytes.address(), &[1; PAGE as usize]).unwrap();
        for (memory, block) in [(&anon_memory, &anon), (&memory, &shared)] {
            let stats = Stats::default();
            map_vmm(memory, block, 0, &stats).unwrap();
            assert_eq!(install(memory, block, 0..1, Source::Copy(bytes.address()), &stats), Ok(1));
            assert_eq!(byte(block.hva), 1, "{:?}", block.kind);
            // One that is PRESENT is mapped: here with zeros, as it was dropped behind our back.
            block.pages.make_present(1);
            map_vmm(memory, block, 1, &stats).unwrap();
            assert_eq!(byte(block.hva_of(1)), 0, "{:?}", block.kind);
        }
    }

    /// The memory of a block that is gone is the VMM's: nothing is done there any more.
    #[test]
    fn a_gone_block_is_left_alone() {
        let (memory, ram, block) = needs!(memory_and_block(4));
        let stats = Stats::default();
        assert_eq!(install(&memory, &block, 0..1, Source::Zero, &stats), Ok(1));
        mem::write(ram.address(), &[7]).unwrap();
        block.gone.store(true, SeqCst);
        let errno = |done: Result<u64>| done.map_err(|e| e.errno);
        assert_eq!(errno(install(&memory, &block, 0..2, Source::Zero, &stats)), Err(libc::ENOENT));
        assert_eq!(errno(discard::lose(&memory, &block, 0..2)), Err(libc::ENOENT));
        assert_eq!(errno(discard::discard(&memory, &block, 0..2, &stats).map(|()| 0)), Err(libc::ENOENT));
        let given_back = crate::memory::give_back::give_back(&memory, &block, 0..2, &stats);
        assert_eq!(errno(given_back.map(|()| 0)), Err(libc::ENOENT));
        block.pages.make_present(1);
        map_vmm(&memory, &block, 1, &stats).unwrap();
        assert_eq!(mem::resident(ram.address(), 2 * PAGE), Ok(vec![true, false]));
        assert_eq!(byte(ram.address()), 7);
    }

    /// Passes that were entered before are waited for: a discard's as long as it takes, an install's for a while.
    #[test]
    fn a_block_that_goes_waits_for_passes() {
        let (memory, _ram, block) = needs!(memory_and_block(1030));
        let pass = memory.enter(&block, 1029).unwrap();
        block.gone.store(true, SeqCst);
        assert!(memory.enter(&block, 1029).is_none());
        assert!(!memory.have_left(&block, Instant::now() + Duration::from_millis(20)));
        drop(pass);
        assert!(memory.have_left(&block, Instant::now()));
        let (pass, is_dropped) = (memory.gates.discard(block.gate_of(600)).unwrap(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| (memory.have_left(&block, Instant::now()), is_dropped.load(SeqCst)));
            std::thread::sleep(Duration::from_millis(20));
            is_dropped.store(true, SeqCst);
            drop(pass);
            assert_eq!(waiter.join().unwrap(), (true, true));
        });
    }

    /// Whoever comes first: a LOST page is never readable, and one that came is not called lost.
    #[test]
    fn installing_and_losing_exclude_each_other() {
        let (memory, _ram, block) = needs!(memory_and_block(1));
        if memory.uffd.features() & crate::kernel::uffd::FEATURE_POISON == 0 {
            return eprintln!("skipped: the kernel has no UFFDIO_POISON (Linux 6.6 and later have)");
        }
        let bytes = Mapping::anonymous(PAGE).unwrap();
        mem::write(bytes.address(), &[1; PAGE as usize]).unwrap();
        let (stats, stop) = (Stats::default(), AtomicBool::new(false));
        let (mut lost, mut came, mut wrong) = (0, 0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(SeqCst) {
                    let _ = install(&memory, &block, 0..1, Source::Copy(bytes.address()), &stats);
                }
            });
            let (begin, mut round) = (Instant::now(), 0);
            while begin.elapsed() < Duration::from_millis(500)
                || (lost == 0 || came == 0) && begin.elapsed() < Duration::from_secs(10)
            {
                round += 1;
                (0..round % 64).for_each(|_| std::hint::spin_loop());
                let _ = discard::lose(&memory, &block, 0..1);
                if block.pages.get(0) == State::Lost {
                    wrong += mem::read(block.hva, &mut [0]).is_ok() as u32;
                    lost += 1;
                } else {
                    came += 1;
                }
                let _ = discard::discard(&memory, &block, 0..1, &stats);
            }
            stop.store(true, SeqCst);
        });
        assert_eq!(wrong, 0, "{lost} times lost, {came} times there");
        assert!(lost > 0 && came > 0, "{lost} times lost, {came} times there: they never met");
    }

    /// A LOST page has its marker, whatever was discarded meanwhile: without it, whoever touches the page would wait for ever.
    #[test]
    fn discarding_and_losing_exclude_each_other() {
        let (memory, _ram, block) = needs!(memory_and_block(1));
        if memory.uffd.features() & crate::kernel::uffd::FEATURE_POISON == 0 {
            return eprintln!("skipped: the kernel has no UFFDIO_POISON (Linux 6.6 and later have)");
        }
        let bytes = Mapping::anonymous(PAGE).unwrap();
        let (stats, round, done, mut wrong, mut lost) = (Stats::default(), AtomicU32::new(0), AtomicU32::new(0), 0, 0);
        const END: u32 = u32::MAX;
        let begin = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 1.. {
                    while round.load(SeqCst) < n {
                        std::thread::yield_now();
                    }
                    if round.load(SeqCst) == END {
                        return;
                    }
                    let _ = discard::discard(&memory, &block, 0..1, &Stats::default());
                    done.store(n, SeqCst);
                }
            });
            // In an emulated machine a round takes milliseconds.
            for n in 1..=1000 {
                if lost > 10 && begin.elapsed() > Duration::from_secs(1) {
                    break;
                }
                let _ = install(&memory, &block, 0..1, Source::Copy(bytes.address()), &stats);
                round.store(n, SeqCst);
                while done.load(SeqCst) < n {
                    let _ = discard::lose(&memory, &block, 0..1);
                }
                if block.pages.get(0) == State::Lost {
                    lost += 1;
                    wrong += (memory.uffd.poison(block.hva, PAGE, PAGE) != Ok(Step::Exists)) as u32;
                }
                let _ = discard::discard(&memory, &block, 0..1, &stats);
            }
            round.store(END, SeqCst);
        });
        assert_eq!(wrong, 0, "of {lost} times lost");
        assert!(lost > 0, "the discard was always last");
    }

    #[test]
    fn errors_leave_absent_what_they_did_not_bring() {
        let (memory, _ram, block) = needs!(memory_and_block(4));
        let stats = Stats::default();
        let error = install(&memory, &block, 0..2, Source::Copy(PAGE), &stats).unwrap_err();
        assert_eq!(error.errno, libc::EFAULT);
        assert!(error.message.starts_with("src:"), "{error}");
        assert_eq!(block.pages.get(0), State::Absent);
        block.pages.change(2, State::Absent, State::Lost).unwrap();
        assert_eq!(install(&memory, &block, 2..3, Source::Zero, &stats).unwrap_err().errno, libc::EHWPOISON);
    }
}
