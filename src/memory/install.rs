//! How a page becomes PRESENT. This is the only place where that happens, whichever thread
//! installs: a vCPU's in the resolver, a reader thread, the VMM's receiving thread.
//!
//! The order makes it correct: the bytes are written into the VMM's mapping; then the page is
//! mapped for KVM; then KVM's bitmap changes; then the state; then waiting threads are woken. At
//! each point a guest that touches the page finds it absent or finds the right bytes.

use super::arrive::install_arrived;
use super::block::Block;
use super::gates::GATE_PAGES;
use super::map::{map_in_alias, Hole};
use super::pages::State;
use super::pause::BoundedBackoff;
use super::source::{no_huge_page, pool_is_empty, populate, write_bytes, Source, MAX_HUGE_TRIES};
use super::wait::WAITS;
use super::{discard, Memory};
use crate::error::{fail, Result};
use crate::kernel::uffd::Step;
use crate::stats::Stats;
use std::ops::Range;

/// How often in a row an absent page may be found with something in its place.
const MAX_OBSTRUCTIONS: u32 = 1000;

/// Makes pages of a block PRESENT; those that are PRESENT already are skipped. Returns how many
/// became PRESENT by this call. On an error, the pages before the failing one stay installed.
pub fn install(memory: &Memory, block: &Block, pages: Range<u64>, source: Source, stats: &Stats) -> Result<u64> {
    let mut installed = 0;
    let mut page = pages.start;
    let mut blocked = (page, 0);
    while page < pages.end {
        let end = pages.end.min((page / GATE_PAGES + 1) * GATE_PAGES);
        if let Source::Copy(bytes) = source.from(block, page - pages.start) {
            populate(bytes, (end - page) * block.page);
        }
        // During this pass no page of the gate becomes LOST or is discarded: a state that is read
        // below stays true.
        let Some(pass) = memory.enter(block, page) else {
            fail!(ENOENT, "the slot that showed the page at hva {:#x} was deleted", block.hva_of(page))
        };
        while page < end {
            match block.pages.get(page) {
                State::Present => {
                    // The VMM may have dropped what was there, and with it KVM's mapping of it.
                    if matches!(source, Source::Arrived) && !block.is_deferred(page) {
                        map_in_alias(memory, block, page..page + 1, Hole::Defer, stats)?;
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
            if blocked.1 > MAX_HUGE_TRIES && pool_is_empty(block, page) {
                return Err(no_huge_page(block, block.hva_of(page)));
            }
            if blocked.1 > MAX_OBSTRUCTIONS {
                let hva = block.hva_of(page);
                fail!(EBUSY, "the page at hva {hva:#x} is absent, and something else writes to it again and again");
            }
            clear_obstruction(memory, block, page)?;
        }
    }
    Ok(installed)
}

/// Installs pages of one gate that were absent a moment ago. Returns the end, or the first page
/// that has something in its place already.
fn install_run(
    memory: &Memory,
    block: &Block,
    run: Range<u64>,
    source: Source,
    stats: &Stats,
    installed: &mut u64,
) -> Result<u64> {
    let mut at = run.start;
    let mut backoff = BoundedBackoff::default();
    while at < run.end {
        match write_bytes(memory, block, at..run.end, source.from(block, at - run.start))? {
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
                // Another installer was first; its wake-up may have come before the waiter's sleep.
                publish(memory, block, at..at + 1, source, stats, installed)?;
                memory.uffd.wake(block.hva_of(at), block.page)?;
                at += 1;
            }
            Step::Again => {
                stats.retries_again.add(1);
                backoff.wait()?;
            }
        }
    }
    Ok(run.end)
}

/// Drops what was found in the place of an absent page. Mostly it is another installer's page,
/// which is PRESENT once that installer is done: then it stays. Otherwise no installer wrote it:
/// the memory was populated before its slot was set (preallocated, or used before), the VMM wrote
/// to it without telling the library, or dropping it failed. It must not be taken for the page. The
/// page is installed in an ordinary pass later, as reading its source may call for an install in
/// this gate.
fn clear_obstruction(memory: &Memory, block: &Block, page: u64) -> Result<()> {
    let _pass = memory.enter_alone(block, page)?;
    match block.pages.get(page) {
        State::Absent | State::Resolving => discard::clear_page(memory, block, page),
        // The other installer's wake-up may have come before the waiter's sleep.
        State::Present | State::Lost => memory.uffd.wake(block.hva_of(page), block.page),
    }
}

/// Shows bytes that are in the VMM's mapping to KVM, then to all threads. Host threads see them
/// already, so that the pages become PRESENT even if mapping them for KVM fails: if they were
/// absent, the next install would drop them, with what was written to them meanwhile. A page that
/// is not mapped for KVM keeps its marker, and is mapped when a vCPU touches it.
fn publish(
    memory: &Memory,
    block: &Block,
    run: Range<u64>,
    source: Source,
    stats: &Stats,
    installed: &mut u64,
) -> Result<()> {
    if matches!(source, Source::Arrived) {
        return install_arrived(memory, block, run, stats, installed);
    }
    let mapped = map_in_alias(memory, block, run.clone(), Hole::Zero, stats);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::address::Hva;
    use crate::kernel::mem::{self, Mapping};
    use crate::kernel::page::page_size;
    use crate::memory::lose;
    use crate::memory::map::map_in_vmm;
    use crate::memory::testing::{byte, memory_and_block};
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
    use std::time::{Duration, Instant};

    #[test]
    fn present_pages_are_skipped_and_keep_their_bytes() {
        let (memory, ram, block) = needs!(memory_and_block(1030));
        let stats = Stats::default();
        let bytes = Mapping::anonymous(1030 * page_size()).unwrap();
        bytes.whole().write(&vec![1; 1030 * page_size() as usize]).unwrap();
        assert_eq!(install(&memory, &block, 600..601, Source::Zero, &stats), Ok(1));
        assert_eq!(install(&memory, &block, 0..1030, Source::Copy(bytes.address()), &stats), Ok(1029));
        assert_eq!(install(&memory, &block, 0..1030, Source::Copy(bytes.address()), &stats), Ok(0));
        assert_eq!((byte(ram.address() + 600 * page_size()), byte(ram.address() + 601 * page_size())), (0, 1));
        assert_eq!((stats.pages_copied.get(), stats.pages_zeroed.get()), (1029, 1));
    }

    #[test]
    fn over_markers_zeros_are_copied() {
        let (memory, ram, block) = needs!(memory_and_block(4));
        if memory.uffd.features() & crate::kernel::uffd::FEATURE_POISON == 0 {
            return eprintln!("skipped: the kernel has no UFFDIO_POISON (Linux 6.6 and later have)");
        }
        memory.uffd.poison(ram.whole(), page_size()).unwrap();
        block.phase.mark();
        assert_eq!(mem::read(ram.address(), &mut [0]).unwrap_err().errno, libc::EFAULT);
        assert_eq!(install(&memory, &block, 0..4, Source::Zero, &Stats::default()), Ok(4));
        assert_eq!(byte(ram.address() + 3 * page_size()), 0);
    }

    /// The memory of a block that is gone is the VMM's: no call changes it.
    #[test]
    fn a_gone_block_is_left_alone() {
        let (memory, ram, block) = needs!(memory_and_block(4));
        let stats = Stats::default();
        assert_eq!(install(&memory, &block, 0..1, Source::Zero, &stats), Ok(1));
        ram.whole().write(&[7]).unwrap();
        block.phase.retire();
        let errno = |done: Result<u64>| done.map_err(|e| e.errno);
        assert_eq!(errno(install(&memory, &block, 0..2, Source::Zero, &stats)), Err(libc::ENOENT));
        assert_eq!(errno(lose::lose(&memory, &block, 0..2)), Err(libc::ENOENT));
        assert_eq!(errno(discard::discard(&memory, &block, 0..2, &stats).map(|()| 0)), Err(libc::ENOENT));
        let given_back = crate::memory::give_back::give_back(&memory, &block, 0..2, &stats);
        assert_eq!(errno(given_back.map(|()| 0)), Err(libc::ENOENT));
        block.pages.make_present(1);
        map_in_vmm(&memory, &block, 1, &stats).unwrap();
        assert_eq!(mem::resident(ram.address(), 2 * page_size()), Ok(vec![true, false]));
        assert_eq!(byte(ram.address()), 7);
    }

    /// Passes that were entered before a block retires are waited for: those of discards for as
    /// long as it takes, those of installs for a while.
    #[test]
    fn a_block_that_goes_waits_for_passes() {
        let (memory, _ram, block) = needs!(memory_and_block(1030));
        let pass = memory.enter(&block, 1029).unwrap();
        block.phase.retire();
        assert!(memory.enter(&block, 1029).is_none());
        assert!(!memory.have_left(&block, Instant::now() + Duration::from_millis(20)));
        drop(pass);
        assert!(memory.have_left(&block, Instant::now()));
        let (pass, is_dropped) = (memory.gates.enter_discard(block.gate_of(600)).unwrap(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| (memory.have_left(&block, Instant::now()), is_dropped.load(SeqCst)));
            std::thread::sleep(Duration::from_millis(20));
            is_dropped.store(true, SeqCst);
            drop(pass);
            assert_eq!(waiter.join().unwrap(), (true, true));
        });
    }

    /// A page that became LOST first is never readable; one that was installed first is not LOST.
    #[test]
    fn installing_and_losing_exclude_each_other() {
        let (memory, _ram, block) = needs!(memory_and_block(1));
        if memory.uffd.features() & crate::kernel::uffd::FEATURE_POISON == 0 {
            return eprintln!("skipped: the kernel has no UFFDIO_POISON (Linux 6.6 and later have)");
        }
        let bytes = Mapping::anonymous(page_size()).unwrap();
        bytes.whole().write(&vec![1; page_size() as usize]).unwrap();
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
                let _ = lose::lose(&memory, &block, 0..1);
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

    /// A LOST page has its marker, whatever was discarded meanwhile: without it, a thread that
    /// touches the page would wait for ever.
    #[test]
    fn discarding_and_losing_exclude_each_other() {
        let (memory, _ram, block) = needs!(memory_and_block(1));
        if memory.uffd.features() & crate::kernel::uffd::FEATURE_POISON == 0 {
            return eprintln!("skipped: the kernel has no UFFDIO_POISON (Linux 6.6 and later have)");
        }
        let bytes = Mapping::anonymous(page_size()).unwrap();
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
                    let _ = lose::lose(&memory, &block, 0..1);
                }
                if block.pages.get(0) == State::Lost {
                    lost += 1;
                    wrong += (memory.uffd.poison(block.whole(), page_size()) != Ok(Step::Exists)) as u32;
                }
                let _ = discard::discard(&memory, &block, 0..1, &stats);
            }
            round.store(END, SeqCst);
        });
        assert_eq!(wrong, 0, "of {lost} times lost");
        assert!(lost > 0, "the discard was always last");
    }

    #[test]
    fn errors_leave_absent_what_they_did_not_install() {
        let (memory, _ram, block) = needs!(memory_and_block(4));
        let stats = Stats::default();
        let error = install(&memory, &block, 0..2, Source::Copy(Hva(page_size())), &stats).unwrap_err();
        assert_eq!(error.errno, libc::EFAULT);
        assert!(error.message.starts_with("src:"), "{error}");
        assert_eq!(block.pages.get(0), State::Absent);
        block.pages.change(2, State::Absent, State::Lost).unwrap();
        assert_eq!(install(&memory, &block, 2..3, Source::Zero, &stats).unwrap_err().errno, libc::EHWPOISON);
    }
}
