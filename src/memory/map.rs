//! How a PRESENT page is mapped: in the alias that KVM uses, and in the VMM's mapping.

use super::block::Block;
use super::gates::Pass;
use super::pages::State;
use super::pause::BoundedBackoff;
use super::source::{no_huge_page, pool_is_empty, zero, MAX_HUGE_TRIES};
use super::Memory;
use crate::error::{fail, Result};
use crate::kernel::address::Hva;
use crate::kernel::mem::{self, Kind};
use crate::kernel::page::page_size;
use crate::kernel::uffd::Step;
use crate::stats::Stats;
use std::ops::Range;

/// Maps a PRESENT page in the alias for a vCPU that touched it, and deferred pages around it. A
/// page that was discarded meanwhile is left alone; the vCPU faults again if it still needs it.
pub fn map_for_kvm(memory: &Memory, block: &Block, page: u64, stats: &Stats) -> Result<()> {
    let Some(_pass) = enter_if_present(memory, block, page) else { return Ok(()) };
    if block.is_deferred(page) {
        map_deferred(memory, block, block.word_of(page), stats)?;
    }
    map_in_alias(memory, block, page..page + 1, Hole::Zero, stats)
}

/// A pass during which a page stays PRESENT; None if it is no longer PRESENT, or if its block is
/// gone. It must not be mapped then: the next install would take what is mapped for the page.
fn enter_if_present<'m>(memory: &'m Memory, block: &Block, page: u64) -> Option<Pass<'m>> {
    let pass = memory.enter(block, page)?;
    (block.pages.get(page) == State::Present).then_some(pass)
}

/// Maps the deferred pages of a range. No discard of them may be under way.
pub(super) fn map_deferred(memory: &Memory, block: &Block, pages: Range<u64>, stats: &Stats) -> Result<()> {
    block.take_deferred_runs(pages).try_for_each(|run| map_in_alias(memory, block, run, Hole::Defer, stats))
}

/// Maps a PRESENT page in the VMM's mapping, for threads that wait there in userfaultfd.
pub fn map_in_vmm(memory: &Memory, block: &Block, page: u64, stats: &Stats) -> Result<()> {
    let hva = block.hva_of(page);
    if let Some(_pass) = enter_if_present(memory, block, page) {
        let is_file = matches!(block.kind, Kind::Shared | Kind::HugetlbShared);
        let mut tries = 0;
        loop {
            match is_file.then(|| memory.uffd.map(block.area(hva, block.page), block.page)) {
                Some(Ok(_)) => break,
                // No longer registered: that has woken the threads that slept there.
                Some(Err(e)) if e.errno == libc::ENOENT && !block.phase.is_registered() => break,
                // EINVAL: the kernel has no UFFDIO_CONTINUE. It has no minor faults either, so that
                // nothing waits for pages of the page cache.
                Some(Err(e)) if !matches!(e.errno, libc::EFAULT | libc::EINVAL) => return Err(e),
                Some(Err(_)) | None => {}
            }
            match zero_hole(memory, block, hva, stats)? {
                Step::Exists if pool_is_empty(block, page) => tries += 1,
                _ => break,
            }
            if tries > MAX_HUGE_TRIES {
                return Err(no_huge_page(block, hva));
            }
        }
    }
    memory.uffd.wake(hva, block.page)
}

/// Is a PRESENT page broken (hwpoison), as its mapping at `hva` shows? A page that is discarded
/// meanwhile is not, though its marker looks the same. No pass is held while looking at it, which
/// may wait (userfaultfd's minor faults): discards would wait, too.
pub fn is_broken(memory: &Memory, block: &Block, page: u64, hva: Hva) -> bool {
    let discards = memory.gates.discard_count(block.gate_of(page));
    discards.is_some()
        && block.pages.get(page) == State::Present
        && mem::is_poisoned(hva, block.page)
        && memory.gates.discard_count(block.gate_of(page)) == discards
}

/// What becomes of a PRESENT page with nothing in it, when it is to be mapped for KVM.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Hole {
    /// It gets zeros.
    Zero,
    /// Where pages can be deferred, it keeps a marker, and gets its zeros when a vCPU touches it.
    Defer,
}

/// How often in a row a page may be missing from the page cache and yet there when zeros are
/// written.
const MAX_ZERO_TRIES: u32 = 100;

/// Maps pages of the page cache in KVM's alias, over markers; does nothing without an alias.
pub(super) fn map_in_alias(memory: &Memory, block: &Block, run: Range<u64>, empty: Hole, stats: &Stats) -> Result<()> {
    let Some(alias) = block.alias_of(run.start) else {
        return Ok(());
    };
    let end = alias + (run.end - run.start) * block.page;
    let mut at = alias;
    let mut backoff = BoundedBackoff::default();
    let mut tries = 0;
    while at < end {
        let step = match memory.uffd.map(block.area(at, end - at), block.page) {
            // No longer registered: nothing is missing in the alias, so that it needs no help.
            Err(e) if e.errno == libc::ENOENT && !block.phase.is_registered() => return Ok(()),
            Err(e) if e.errno == libc::EFAULT => {
                let page = run.start + (at - alias) / block.page;
                if empty == Hole::Defer && block.defer(page) {
                    memory.uffd.poison(block.area(at, block.page), block.page)?;
                    at += block.page;
                    continue;
                }
                match zero_hole(memory, block, at, stats)? {
                    // Another thread was faster, and the page is in the page cache now, unless it
                    // is dropped at the same rate.
                    Step::Exists if tries < MAX_ZERO_TRIES => {
                        tries += 1;
                        if tries > MAX_HUGE_TRIES && block.page > page_size() {
                            return Err(no_huge_page(block, at));
                        }
                        continue;
                    }
                    Step::Exists => {
                        fail!(EBUSY, "the page at hva {:#x} is dropped as fast as it is installed", block.hva_of(page))
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
                backoff.wait()?;
            }
        }
    }
    Ok(())
}

/// Writes zeros into a PRESENT page with nothing in it, which reads as zeros without userfaultfd,
/// too: a hole in memory that was set with all pages PRESENT, or a page that the VMM dropped
/// without telling the library.
fn zero_hole(memory: &Memory, block: &Block, at: Hva, stats: &Stats) -> Result<Step> {
    let step = zero(memory, block, at, block.page)?;
    if let Step::Done(_) = step {
        stats.pages_empty.add(1);
    }
    Ok(step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::host_memory::HostMemory;
    use crate::kernel::mem::Mapping;
    use crate::kernel::uffd::{Mode, Uffd};
    use crate::memory::block::Shape;
    use crate::memory::install::install;
    use crate::memory::source::Source;
    use crate::memory::testing::{byte, memory_and_block};

    /// A thread that has seen a page PRESENT maps it a moment later. If the page was discarded
    /// meanwhile it must stay missing, or zeros would be taken for it.
    #[test]
    fn what_was_discarded_meanwhile_is_not_mapped() {
        let (anon_memory, _ram, anon) = needs!(memory_and_block(2));
        let memory = Memory::new(Uffd::open().unwrap(), false);
        let file = crate::kernel::file::tests::shared(2 * page_size());
        let ram = Mapping::shared(std::os::fd::AsRawFd::as_raw_fd(&file), 0, 2 * page_size(), true).unwrap();
        memory.uffd.register(ram.whole(), Mode::default()).unwrap();
        let shape = Shape {
            memory: HostMemory::for_test(ram.address(), 2 * page_size()),
            page: page_size(),
            kind: Kind::Shared,
            mechanism: 0,
        };
        let shared = Block::new(shape, None, false, false).unwrap();
        let bytes = Mapping::anonymous(page_size()).unwrap();
        bytes.whole().write(&vec![1; page_size() as usize]).unwrap();
        for (memory, block) in [(&anon_memory, &anon), (&memory, &shared)] {
            let stats = Stats::default();
            map_in_vmm(memory, block, 0, &stats).unwrap();
            assert_eq!(install(memory, block, 0..1, Source::Copy(bytes.address()), &stats), Ok(1));
            assert_eq!(byte(block.hva), 1, "{:?}", block.kind);
            // A PRESENT page is mapped: here with zeros, as nothing is in it.
            block.pages.make_present(1);
            map_in_vmm(memory, block, 1, &stats).unwrap();
            assert_eq!(byte(block.hva_of(1)), 0, "{:?}", block.kind);
        }
    }

    /// A reader may serve a fault in memory whose slot is deleted meanwhile. Unregistering has
    /// woken the thread, so that there is nothing to map, and no error either.
    #[test]
    fn a_page_of_a_retired_block_needs_no_mapping() {
        let (memory, _ram, block) = needs!(memory_and_block(1));
        block.pages.make_present(0);
        memory.unregister(&block);
        let map = || map_in_vmm(&memory, &block, 0, &Stats::default()).map_err(|e| e.errno);
        assert_eq!(map(), Err(libc::ENOENT));
        block.phase.retire();
        assert_eq!(map(), Ok(()));
    }
}
