//! Background fill of a VM: what is checked before it starts, and what its end means for memory.

use super::Vm;
use crate::error::{fail, Error, Result};
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::file::{self, Use};
use crate::kernel::mem::{self, Kind};
use crate::kernel::page::huge_page_size;
use crate::kernel::page::page_size;
use crate::memory::block::Block;
use crate::memory::slots::{Slot, Slots};
use crate::memory::{calls, Memory};
use crate::resolve::fill::{self, Fill, Report, Scope};
use crate::resolve::working_set::{self, Recorder, Shape};
use std::ops::Range;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

/// A fill as the VMM asks for it.
pub struct FillRequest {
    /// 1 to 64; 0 for the usual number.
    pub threads: u32,
    /// Most pages that the resolver is asked for together, 1 to 4096; 0 for the usual number.
    pub batch: u32,
    /// 0: no limit.
    pub bytes_per_second: u64,
    /// The first guest physical address.
    pub gpa: Gpa,
    /// The length in bytes from there; 0 for all memory.
    pub len: u64,
    /// The file of a working set, which is fetched first.
    pub working_set: Option<RawFd>,
    /// Fetch the working set and nothing else.
    pub only_first: bool,
    /// Memory stays as it is at the end.
    pub keep_armed: bool,
    /// Memory stays in the small pages that it came in.
    pub no_collapse: bool,
    /// The time between two calls of `report`.
    pub interval: Duration,
    /// The progress callback.
    pub report: Box<Report>,
}

impl Vm {
    /// Begins to record the working set anew; or ends that, and forgets what was recorded.
    pub fn record_working_set(&self, on: bool) -> Result<()> {
        self.engine.check_begun()?;
        let recorder = if on { Some(Recorder::new()?) } else { None };
        self.engine.record(recorder);
        Ok(())
    }

    /// Writes what was recorded until now to a file, over what is in it.
    pub fn save_working_set(&self, fd: RawFd) -> Result<()> {
        let Some(recorder) = self.engine.recorder() else { fail!(ENODATA, "vm: no working set is being recorded") };
        let slots = self.engine.memory.slots();
        let bytes = recorder.records(&slots).and_then(|records| working_set::encode(Shape::of(&slots), &records));
        let bytes = bytes.map_err(|e| e.context("vm: the working set"))?;
        let (file, _) = file::regular(fd, "fd", Use::Write)?;
        let written = file.set_len(0).and_then(|()| file.write_all_at(&bytes, 0));
        written.map_err(|e| Error::from_io("fd: writing", &e))
    }

    /// Starts a fill; EBUSY if one is under way.
    pub fn fill(self: &Arc<Vm>, request: FillRequest) -> Result<Arc<Fill>> {
        self.check_ours()?;
        self.engine.check_begun()?;
        if request.threads > 64 {
            fail!(EINVAL, "threads: {} is more than 64", request.threads);
        }
        if request.batch > 4096 {
            fail!(EINVAL, "batch: {} is more than 4096", request.batch);
        }
        let slots = self.engine.memory.slots();
        let scope = scope_of(&slots, request.gpa, request.len)?;
        let poisoned = |_| Error::new(libc::ENOTRECOVERABLE, "an earlier call panicked while it started a fill");
        let mut under_way = self.filling.lock().map_err(poisoned)?;
        if under_way.upgrade().is_some_and(|fill| !fill.has_ended()) {
            fail!(EBUSY, "vm: a fill is under way");
        }
        let first = request.working_set.map_or(Ok(Vec::new()), |fd| read_working_set(fd, &slots))?;
        let in_vmm = |gpa: &Range<Gpa>| {
            let slot = slots.at_any(gpa.start)?;
            let end = gpa.end.min(slot.region.gpa + slot.region.len);
            Some(slot.vmm_hva(gpa.start)..slot.vmm_hva(gpa.start) + (end - gpa.start))
        };
        let (vm, collapse) = (Arc::downgrade(self), !request.no_collapse);
        // Where a part of the memory is there, nothing can be said of its blocks.
        let keep_armed = request.keep_armed || request.len != 0;
        let finish = move |is_stopped: &dyn Fn() -> bool| match keep_armed {
            true => Ok(()),
            false => make_ordinary(&vm, collapse, is_stopped),
        };
        let fill = Fill::start(
            &self.engine,
            fill::Options {
                threads: request.threads.max(1),
                batch: if request.batch == 0 { 64 } else { request.batch.into() },
                bytes_per_second: request.bytes_per_second,
                scope,
                first: first.iter().filter_map(in_vmm).collect(),
                only_first: request.only_first,
                interval: request.interval,
                finish: Box::new(finish),
            },
            request.report,
        )?;
        *under_way = Arc::downgrade(&fill);
        Ok(fill)
    }

    /// The engine was shut down: a fill that is paused ends.
    pub(super) fn wake_fill(&self) {
        let under_way = self.filling.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(fill) = under_way {
            fill.note_shutdown();
        }
    }
}

/// The memory at a range of guest physical addresses; with `len` 0 all memory.
fn scope_of(slots: &Slots, gpa: Gpa, len: u64) -> Result<Scope> {
    if len == 0 && gpa == Gpa(0) {
        return Ok(Scope::default());
    }
    if gpa % page_size() != 0 {
        fail!(EINVAL, "gpa: {gpa:#x} is no multiple of {}", page_size());
    }
    if len == 0 || len % page_size() != 0 {
        fail!(EINVAL, "len: {len:#x}, for gpa {gpa:#x}, is 0 or no multiple of {}", page_size());
    }
    let Some(end) = gpa.checked_add(len) else { fail!(EINVAL, "len: gpa {gpa:#x} plus {len:#x} wraps around") };
    let parts = slots.parts_of(gpa..end);
    if parts.is_empty() {
        fail!(ENOENT, "gpa: no slot holds any of [{gpa:#x}, +{len:#x})");
    }
    // A huge page comes as a whole or not at all.
    for (slot, part) in &parts {
        let page = slot.block.page;
        if part.start == gpa && gpa % page != 0 {
            fail!(EINVAL, "gpa: {gpa:#x} is inside a page of {page:#x} bytes (slot {:#x})", slot.region.slot);
        }
        if part.end == end && end % page != 0 {
            fail!(EINVAL, "len: {end:#x}, the end, is inside a page of {page:#x} bytes (slot {:#x})", slot.region.slot);
        }
    }
    let in_vmm = |(slot, part): (&Arc<Slot>, Range<Gpa>)| {
        let hva = slot.vmm_hva(part.start);
        hva..hva + (part.end - part.start)
    };
    Ok(Scope::of(parts.into_iter().map(in_vmm).collect()))
}

fn read_working_set(fd: RawFd, slots: &Slots) -> Result<Vec<Range<Gpa>>> {
    let (file, len) = file::regular(fd, "working_set_fd", Use::Read)?;
    let longest = working_set::longest_file(Shape::of(slots));
    if len > longest {
        fail!(
            EINVAL,
            "working_set_fd: the file has {len} bytes, and one of this VM's memory at most {longest}; that is no working set of it"
        );
    }
    let bytes = file::read_start(&file, len).map_err(|e| Error::from_io("working_set_fd: reading", &e))?;
    let records = working_set::decode(&bytes, Shape::of(slots)).map_err(working_set::about_the_file)?;
    working_set::plan(&records).map_err(working_set::about_the_file)
}

/// Nothing is absent any more: memory becomes what it would be without the library.
fn make_ordinary(vm: &Weak<Vm>, collapse: bool, is_stopped: &dyn Fn() -> bool) -> Result<()> {
    let Some(vm) = vm.upgrade() else { fail!(ESHUTDOWN, "the VM was freed") };
    let blocks = vm.release()?;
    let engine = vm.engine.clone();
    drop(vm);
    let stopped = || Error::new(libc::ECANCELED, "the fill was stopped");
    blocks.iter().try_for_each(|block| calls::wait_for_calls(block, |_| is_stopped().then(stopped)))?;
    if collapse {
        blocks.iter().for_each(|block| recover_huge_pages(&engine.memory, block, is_stopped));
    }
    Ok(())
}

/// Installing page by page leaves small pages, and KVM maps what it finds. Best effort: there may
/// be no huge pages, or none wanted (/sys/kernel/mm/transparent_hugepage). What has holes stays as
/// it is: a huge page would allocate anew what the guest has given back.
fn recover_huge_pages(memory: &Memory, block: &Block, is_stopped: &dyn Fn() -> bool) {
    if !matches!(block.kind, Kind::Anon | Kind::Shared) {
        return;
    }
    let huge = huge_page_size();
    let (start, end) = (block.hva.0.next_multiple_of(huge), block.hva.0 + block.len);
    for at in (start..end).step_by(huge as usize).take_while(|at| at + huge <= end).map(Hva) {
        // A block that goes waits for this pass, and for what is done in it.
        let pass = memory.enter(block, (at - block.hva) / block.page);
        if is_stopped() || pass.is_none() {
            return;
        }
        let is_whole = |resident: Vec<bool>| resident.iter().all(|&there| there);
        if !mem::resident(at, huge).is_ok_and(is_whole) {
            continue;
        }
        match block.area(at, huge).advise(mem::MADV_COLLAPSE, "madvise(MADV_COLLAPSE)") {
            // Not in this kernel (before Linux 6.1), not for this memory, or not wanted.
            Err(e) if e.errno == libc::EINVAL => return,
            // Just this one: pinned, or no huge page free.
            _ => {}
        }
    }
}
