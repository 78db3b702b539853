//! Pages that the VMM has put into its mapping itself (see `Memory::external`).

use super::block::Block;
use super::map::{map_deferred, map_in_alias, Hole};
use super::pages::State;
use super::wait::WAITS;
use super::Memory;
use crate::error::Result;
use crate::stats::Stats;
use std::ops::Range;

/// Makes pages PRESENT that the VMM has put into its mapping. Mostly no thread waits for them, and
/// a system call for each would slow the VMM's stream down: so they are mapped in the alias when
/// all 64 pages of a word are PRESENT, or when a vCPU touches one of them. A page that is waited
/// for is mapped at once. A page with nothing in it (the VMM has dropped it since) takes no memory
/// before a vCPU touches it.
pub(super) fn install_arrived(
    memory: &Memory,
    block: &Block,
    run: Range<u64>,
    stats: &Stats,
    installed: &mut u64,
) -> Result<()> {
    let before = *installed;
    block.set_exits(run.clone(), false);
    for page in run.clone() {
        let unasked = block.pages.get(page) == State::Absent && block.defer(page);
        if unasked && block.pages.change(page, State::Absent, State::Present).is_ok() {
            *installed += 1;
        } else {
            block.take_deferred_runs(page..page + 1).for_each(drop);
            map_in_alias(memory, block, page..page + 1, Hole::Defer, stats)?;
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
