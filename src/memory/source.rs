//! Where a page's bytes come from, and how they get into the VMM's mapping.

use super::block::Block;
use super::pages::State;
use super::Memory;
use crate::error::{Error, Result};
use crate::kernel::address::Hva;
use crate::kernel::mem::{self, Kind, Mapping};
use crate::kernel::page::{huge_page_size, page_size};
use crate::kernel::uffd::Step;
use once_cell::sync::OnceCell;
use std::cell::Cell;
use std::ops::Range;

/// Where a page's bytes come from.
#[derive(Debug, Clone, Copy)]
pub enum Source {
    /// From this address of this process, page after page.
    Copy(Hva),
    /// They are zeros.
    Zero,
    /// They are in the page cache of shared memory already.
    Map,
    /// The VMM has put them into its mapping already (see `Memory::external`).
    Arrived,
}

impl Source {
    /// The source of the page that is so many pages further on.
    pub(super) fn from(self, block: &Block, pages: u64) -> Source {
        match self {
            Source::Copy(bytes) => Source::Copy(bytes + pages * block.page),
            other => other,
        }
    }
}

/// Zeros to copy where UFFDIO_ZEROPAGE does not work, for pages up to 2 MiB and for larger ones.
static ZEROS: [OnceCell<Mapping>; 2] = [const { OnceCell::new() }; 2];

/// A mapping of zeros for at least one page of this size, and its length. It is tried again after
/// an error.
fn zeros(page: u64) -> Result<(&'static Mapping, u64)> {
    let (zeros, len) =
        if page <= huge_page_size() { (&ZEROS[0], huge_page_size()) } else { (&ZEROS[1], page.max(1 << 30)) };
    Ok((zeros.get_or_try_init(|| Mapping::zeros(len))?, len))
}

thread_local! {
    /// The range that the thread populated last: start and end.
    static POPULATED: Cell<(Hva, Hva)> = const { Cell::new((Hva(0), Hva(0))) };
}

/// Reads the source into memory before a gate is entered. Reading may be slow (a file on a network,
/// memory under another userfaultfd) or never end, and other threads would wait for it in the gate.
/// A buffer that is used many times in a row is populated once. Errors are left to the copy, which
/// says for which page. A page of the source that is dropped again meanwhile is read inside the
/// gate; no thread waits for that without end (see `Gates::enter_discard`).
pub(super) fn populate(bytes: Hva, len: u64) {
    let end = bytes.saturating_add(len);
    let (from, to) = POPULATED.get();
    if bytes < from || end > to {
        let start = Hva(bytes.0 & !(page_size() - 1));
        let _ = mem::populate_read(start, end.0.next_multiple_of(page_size()) - start.0);
        POPULATED.set((bytes, end));
    }
}

/// How often in a row a huge page may be answered with EEXIST before the pool is looked at: the
/// answer is right while another thread installs the page.
pub(super) const MAX_HUGE_TRIES: u32 = 16;

/// Writes a run's bytes into the VMM's mapping.
pub(super) fn write_bytes(memory: &Memory, block: &Block, run: Range<u64>, source: Source) -> Result<Step> {
    let (hva, len) = (block.hva_of(run.start), (run.end - run.start) * block.page);
    match source {
        Source::Copy(bytes) => memory.uffd.copy(block.area(hva, len), bytes, block.page).map_err(|e| match e.errno {
            libc::EFAULT => Error::new(libc::EFAULT, format!("src: the bytes at {bytes:#x} can't be read")),
            _ => explain(e, block, hva),
        }),
        Source::Zero => zero(memory, block, hva, len),
        Source::Map => memory.uffd.map(block.area(hva, len), block.page).map_err(|e| match e.errno {
            libc::EFAULT => Error::new(libc::ENOENT, format!("the page at hva {hva:#x} is not in the page cache")),
            _ => explain(e, block, hva),
        }),
        Source::Arrived => Ok(Step::Done(len)),
    }
}

/// Writes zeros at an address of either mapping of a block.
pub(super) fn zero(memory: &Memory, block: &Block, at: Hva, len: u64) -> Result<Step> {
    // UFFDIO_ZEROPAGE does not replace a marker in private memory, and does not support hugetlb.
    let done = if block.kind == Kind::Shared || block.kind == Kind::Anon && !block.is_marked() {
        memory.uffd.zero(block.area(at, len), block.page)
    } else {
        let (zeros, most) = zeros(block.page)?;
        let len = len.min(most / block.page * block.page).max(block.page);
        memory.uffd.copy(block.area(at, len), zeros.address(), block.page)
    };
    done.map_err(|e| explain(e, block, at))
}

/// After a write of a huge page that ended in EEXIST several times: is nothing there that could be
/// in its way? Then no huge page could be had. The kernel answers EEXIST instead of ENOMEM as soon
/// as the page table has an entry for the page, also an empty one (`hugetlb_mfill_atomic_pte` in
/// mm/hugetlb.c).
pub(super) fn pool_is_empty(block: &Block, page: u64) -> bool {
    // mincore takes a marker for a page before Linux 6.16.
    let may_be_marker = block.alias.is_none() && block.is_marked();
    let is_lost = block.pages.get(page) == State::Lost;
    let is_in = || mem::resident(block.hva_of(page), page_size()).map_or(true, |resident| resident[0]);
    block.page > page_size() && !is_lost && (may_be_marker || !is_in())
}

pub(super) fn no_huge_page(block: &Block, hva: Hva) -> Error {
    explain(Error::new(libc::ENOMEM, "UFFDIO_COPY found no huge page"), block, hva)
}

fn explain(error: Error, block: &Block, hva: Hva) -> Error {
    let why = match error.errno {
        libc::ENOENT => "the memory is no longer mapped as it was when its slot was set",
        libc::ENOMEM | libc::ENOSPC if block.page > page_size() => "the huge page pool is empty (vm.nr_hugepages)",
        _ => return error.context(format!("installing the page at hva {hva:#x}")),
    };
    error.context(format!("installing the page at hva {hva:#x}: {why}"))
}
