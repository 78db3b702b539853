//! Slots as the VMM sets them: everything is checked before anything changes, and faults never wait
//! for it.

use super::Vm;
use crate::error::{fail, Error, Result};
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::host_memory::HostMemory;
use crate::kernel::kvm::Region;
use crate::kernel::mem::{self, Kind, ADDRESSES};
use crate::kernel::page::page_size;
use crate::mechanism::{self, BlockRequest, MECHANISMS};
use crate::memory::block::{Block, Shape};
use crate::memory::pages::State;
use crate::memory::pause::Backoff;
use crate::memory::slots::{Slot, Slots};
use crate::memory::wait::WAITS;
use crate::memory::{calls, markers, release};
use crate::resolve::Engine;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// A memslot as the VMM asks for it.
#[derive(Debug, Clone)]
pub struct SlotRequest {
    /// Id and address space.
    pub slot: u32,
    /// KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY.
    pub kvm_flags: u32,
    /// First guest physical address.
    pub gpa: Gpa,
    /// Bytes; 0 deletes.
    pub len: u64,
    /// The memory.
    pub hva: Hva,
    /// The block that it is a window of.
    pub host: HostMemory,
    /// What the VMM says the memory is.
    pub memory: MemoryKind,
    /// The block's file, and where the block begins in it.
    pub file: Option<(RawFd, u64)>,
    /// Only vCPUs touch absent pages.
    pub vcpu_only: bool,
    /// All pages are present at the start.
    pub present: bool,
    /// When deleting: keep the page states.
    pub keep: bool,
    /// Begin with the fast path off.
    pub slow: bool,
}

/// What the VMM says that memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// Not said: what is found is accepted.
    Auto,
    /// Private anonymous.
    Anon,
    /// memfd, tmpfs, shared anonymous.
    Shared,
    /// hugetlb.
    Hugetlb,
}

impl MemoryKind {
    /// The kind that is declared, if any.
    fn kind(self) -> Option<Kind> {
        match self {
            MemoryKind::Auto => None,
            MemoryKind::Anon => Some(Kind::Anon),
            MemoryKind::Shared => Some(Kind::Shared),
            MemoryKind::Hugetlb => Some(Kind::HugetlbShared),
        }
    }

    fn admits(self, kind: Kind) -> bool {
        match self {
            MemoryKind::Auto => true,
            MemoryKind::Anon => kind == Kind::Anon,
            MemoryKind::Shared => kind == Kind::Shared,
            MemoryKind::Hugetlb => matches!(kind, Kind::HugetlbPrivate | Kind::HugetlbShared),
        }
    }
}

/// Which side does the ioctl.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ioctl {
    Library,
    Vmm,
}

/// KVM_MEM_* bits that a VMM may pass: LOG_DIRTY_PAGES and READONLY.
const KVM_FLAGS: u32 = kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES | kvm_bindings::KVM_MEM_READONLY;

impl Vm {
    /// Creates, moves or deletes a slot, and tells KVM.
    pub fn memslot_set(&self, request: &SlotRequest) -> Result<()> {
        self.edit(request, Ioctl::Library).map(|_| ())
    }

    /// Creates, moves or deletes a slot without telling KVM; returns what the VMM is to tell it.
    pub fn memslot_prepare(&self, request: &SlotRequest) -> Result<Region> {
        self.edit(request, Ioctl::Vmm)
    }

    fn edit(&self, request: &SlotRequest, ioctl: Ioctl) -> Result<Region> {
        let _editing = self.start_editing()?;
        let slots = self.engine.memory.slots();
        if request.len == 0 {
            return self.delete(&slots, request, ioctl);
        }
        self.engine.check_begun()?;
        let (slot, fresh) = self.plan(&slots, request)?;
        let old = slots.numbered(request.slot).cloned();
        let region = slot.region;
        let (before, meanwhile) = ((**slots).clone(), slots.with(slot.clone(), true));
        let after = slots.with(slot.clone(), false);
        drop(slots);
        // Published first: threads of the VMM may touch the memory while it is armed, which takes
        // seconds a TiB, and a vCPU may fault the moment KVM knows the slot. What goes is retired
        // last: KVM may refuse.
        self.publish(meanwhile);
        let done = self.arm(&slot, fresh).and_then(|()| match ioctl {
            Ioctl::Library => self.set_region(old.as_deref(), &slot),
            Ioctl::Vmm => Ok(()),
        });
        match &done {
            Ok(()) => {
                self.publish(after);
                // A VMM that replaces a slot by `prepare` has yet to tell KVM.
                old.iter().filter(|_| ioctl == Ioctl::Library).for_each(|old| self.not_in_kvm(&old.block));
            }
            Err(_) => {
                self.publish(before);
                self.not_in_kvm(&slot.block);
            }
        }
        done.map(|()| region)
    }

    /// KVM has lost a slot of this block.
    fn not_in_kvm(&self, block: &Arc<Block>) {
        let is_shown = self.engine.memory.slots().iter().any(|s| Arc::ptr_eq(&s.block, block));
        block.in_kvm.store(is_shown, SeqCst);
    }

    /// Has the fast path of a slot that is published made ready. If the VM is freed meanwhile, that
    /// is an error: no thread would serve the memory.
    fn arm(&self, slot: &Slot, fresh: bool) -> Result<()> {
        let armed = match slot.fast_only || fresh {
            true => MECHANISMS[slot.block.mechanism].set_fast(&self.engine.memory, &slot.block, slot.fast_only),
            false => Ok(()),
        };
        self.engine.check_begun().and(armed)
    }

    /// KVM moves a slot (guest address, flags) in place, but takes another size or host address
    /// only after a delete.
    fn set_region(&self, old: Option<&Slot>, new: &Slot) -> Result<()> {
        let set = |slot: &Slot| self.set_in_kvm(&slot.region, &slot.block);
        if let Some(old) = old.filter(|o| o.region.len != new.region.len || o.region.hva != new.region.hva) {
            self.delete_in_kvm(&old.region)?;
            return set(new).inspect_err(|_| {
                let _ = set(old); // as it was
            });
        }
        set(new)
    }

    fn delete(&self, slots: &Slots, request: &SlotRequest, ioctl: Ioctl) -> Result<Region> {
        let Some(old) = slots.numbered(request.slot).cloned() else {
            fail!(ENOENT, "slot: {:#x} is not set", request.slot);
        };
        let region = Region { len: 0, ..old.region };
        if ioctl == Ioctl::Library {
            self.delete_in_kvm(&region)?;
        }
        self.publish(slots.without(request.slot, request.keep));
        self.not_in_kvm(&old.block);
        Ok(region)
    }

    /// Replaces the slots; blocks that are no longer among them release their sleepers.
    fn publish(&self, new: Slots) {
        let memory = &self.engine.memory;
        let before = memory.slots().clone();
        let kept = |b: &Arc<Block>| new.blocks().any(|n| Arc::ptr_eq(n, b));
        let gone: Vec<_> = before.blocks().filter(|b| !kept(b)).cloned().collect();
        new.iter().for_each(|slot| slot.block.in_kvm.store(true, SeqCst));
        memory.replace_slots(new);
        gone.iter().for_each(|block| self.retire(block));
    }

    /// Makes a block's memory ordinary again: threads waiting for a page are released, and absent
    /// pages read as zeros.
    fn retire(&self, block: &Arc<Block>) {
        let memory = &self.engine.memory;
        block.phase.retire();
        WAITS.wake_all();
        if block.alias.is_none() && block.is_marked() {
            let _ = markers::unmark(memory, block);
        }
        memory.unregister(block);
        self.wait_for_others(block);
    }

    /// The VMM may unmap a gone block's memory, or use it for something else, as soon as it is told
    /// so: waits for the threads that touch it at the moment. Others don't begin to. What sleeps
    /// there for a page was woken.
    fn wait_for_others(&self, block: &Arc<Block>) {
        /// For what waits for foreign I/O.
        const ENOUGH: Duration = Duration::from_secs(1);
        let Engine { memory, seats, .. } = &*self.engine;
        let end = Instant::now() + ENOUGH;
        if !memory.have_left(block, end) {
            // It can't touch the memory, which is not registered; but must not be there when it is
            // again.
            self.lingering.lock().unwrap_or_else(PoisonError::into_inner).push(block.clone());
        }
        // Here the VMM's own userfaultfd is waited in (MADV_POPULATE_WRITE), which changes no
        // bytes.
        let is_external = memory.external && block.alias.is_none();
        let mut backoff = Backoff::default();
        while seats.all().iter().any(|seat| seat.is_touching(block)) && !(is_external && Instant::now() > end) {
            backoff.pause();
        }
    }

    /// EBUSY if an install that began when an earlier block was there may yet write to this range.
    fn check_lingering(&self, hva: Hva, len: u64) -> Result<()> {
        let mut lingering = self.lingering.lock().unwrap_or_else(PoisonError::into_inner);
        lingering.retain(|block| !self.engine.memory.have_left(block, Instant::now()));
        match lingering.iter().any(|block| block.hva < hva + len && hva < block.hva + block.len) {
            false => Ok(()),
            true => fail!(
                EBUSY,
                "hva: an install that was under way when an earlier slot was deleted has not ended in [{hva:#x}, +{len:#x}): does the source that it reads from answer?"
            ),
        }
    }

    /// The slot to be, and whether its block is new. Checks everything before anything changes.
    fn plan(&self, slots: &Slots, request: &SlotRequest) -> Result<(Slot, bool)> {
        let SlotRequest { slot: number, gpa, len, hva, .. } = *request;
        self.check_number(number)?;
        if request.kvm_flags & !KVM_FLAGS != 0 {
            fail!(EINVAL, "kvm_flags: {:#x} has bits besides LOG_DIRTY_PAGES and READONLY", request.kvm_flags);
        }
        if request.keep {
            fail!(EINVAL, "flags: KVMFAULT_MEMSLOT_KEEP is for deleting");
        }
        if hva == Hva(0) {
            fail!(EINVAL, "hva: is NULL");
        }
        check_range("gpa", gpa.0, len, 1 << 52)?;
        check_range("hva", hva.0, len, ADDRESSES)?;
        let (block_hva, block_len) = (request.host.address(), request.host.size());
        check_range("block_hva", block_hva.0, block_len, ADDRESSES)?;
        if hva < block_hva || hva + len > block_hva + block_len {
            fail!(EINVAL, "block_hva: [{block_hva:#x}, +{block_len:#x}) does not hold the slot's memory at {hva:#x}");
        }
        let wanted = Region { slot: number, gpa, len, ..Default::default() };
        if let Some(other) = slots.overlapping(&wanted) {
            fail!(
                EEXIST,
                "gpa: [{gpa:#x}, +{len:#x}) overlaps slot {:#x} at {:#x}",
                other.region.slot,
                other.region.gpa
            );
        }
        let mut over = slots.blocks_in(block_hva, block_len);
        let existing = over.next().cloned();
        let offset = hva - block_hva;
        let (block, fresh) = match existing {
            Some(block) if block.hva <= hva && hva + len <= block.hva + block.len => (block, false),
            Some(block) => fail!(
                EINVAL,
                "hva: [{hva:#x}, +{len:#x}) overlaps memory registered as [{:#x}, +{:#x}) without lying in it; name the whole as block_hva and block_len",
                block.hva,
                block.len
            ),
            None => (Arc::new(self.new_block(offset, request)?), true),
        };
        let slot = self.slot_on(&block, &wanted, request, fresh);
        if slot.is_err() && fresh {
            self.retire(&block);
        }
        slot.map(|slot| (slot, fresh))
    }

    /// The slot as a window of its block, and what KVM is to be told of it.
    fn slot_on(&self, block: &Arc<Block>, wanted: &Region, request: &SlotRequest, fresh: bool) -> Result<Slot> {
        let Region { gpa, len, .. } = *wanted;
        let hva = request.hva;
        let offset = hva - block.hva;
        for (name, value) in [("gpa", gpa.0), ("len", len), ("hva", offset)] {
            if value % block.page != 0 {
                fail!(EINVAL, "{name}: is not a multiple of the memory's page size {:#x}", block.page);
            }
        }
        if !request.memory.admits(block.kind) {
            fail!(
                EINVAL,
                "memory: the slot is declared {:?}, but the memory at hva {hva:#x} is {:?}",
                request.memory,
                block.kind
            );
        }
        let mechanism = MECHANISMS[block.mechanism];
        let mut fast_only = !request.slow;
        if !fresh {
            match mechanism.check(&self.host, block.kind, &block_request(request, offset)) {
                // A window that can't have the flag (read-only ones: QEMU's PAM regions) does
                // without, on the classic path.
                Err(_) if mechanism.is_per_slot() => fast_only = false,
                checked => checked?,
            }
        }
        let region = Region { version: 1, flags: request.kvm_flags, hva: block.kvm_hva() + offset, ..*wanted };
        // Where a fill has ended nothing can be missing, until the VMM turns the fast path on.
        let fast_only = fast_only && (!block.phase.is_closed() || self.engine.memory.external);
        let mut slot = Slot { region, block: block.clone(), offset, fast_only };
        if slot.fast_only {
            self.enable_fault_exits()?;
            mechanism.arm(&self.host, &slot.clone(), &mut slot.region);
        }
        Ok(slot)
    }

    fn check_number(&self, number: u32) -> Result<()> {
        let (space, id) = (number >> 16, number & 0xffff);
        let slots = self.vm.check_extension(kvm_bindings::KVM_CAP_NR_MEMSLOTS).max(32) as u32;
        let spaces = self.vm.check_extension(kvm_bindings::KVM_CAP_MULTI_ADDRESS_SPACE).max(1) as u32;
        if id >= slots {
            fail!(EINVAL, "slot: id {id} is not below the kernel's limit of {slots}");
        }
        if space >= spaces {
            fail!(EINVAL, "slot: address space {space} is not below the kernel's limit of {spaces}");
        }
        Ok(())
    }

    fn new_block(&self, offset: u64, request: &SlotRequest) -> Result<Block> {
        let (hva, len) = (request.host.address(), request.host.size());
        self.engine.readers.check()?;
        self.check_lingering(hva, len)?;
        let backing = mem::inspect(&request.host, request.memory.kind(), request.file.map(|(fd, _)| fd))?;
        if hva % backing.page != 0 || len % backing.page != 0 {
            fail!(
                EINVAL,
                "hva: {hva:#x} and len {len:#x} must be multiples of the memory's page size {:#x}",
                backing.page
            );
        }
        if !request.memory.admits(backing.kind) {
            fail!(
                EINVAL,
                "memory: the slot is declared {:?}, but the memory at hva {hva:#x} is {:?}",
                request.memory,
                backing.kind
            );
        }
        let block_request = BlockRequest { external: self.engine.memory.external, ..block_request(request, offset) };
        let n = mechanism::choose(&self.host, self.forced, backing.kind, &block_request)?;
        let shape = Shape { memory: request.host.clone(), page: backing.page, kind: backing.kind, mechanism: n };
        let block = MECHANISMS[n].new_block(&self.host, &self.engine.memory, shape, &block_request)?;
        if !request.present && !self.engine.memory.external {
            self.hide(&block).inspect_err(|_| self.engine.memory.unregister(&block))?;
        }
        Ok(block)
    }

    /// An access to an absent page must fault: nothing may be mapped in its place, nor come from
    /// the page cache by itself.
    fn hide(&self, block: &Block) -> Result<()> {
        let Block { hva, len, kind, .. } = *block;
        if mechanism::has_minor(self.host.features, kind) {
            match block.whole().advise(libc::MADV_DONTNEED, "hva: madvise(MADV_DONTNEED)") {
                // Locked memory, or hugetlb before Linux 5.18: if nothing is there, nothing need
                // go.
                Err(e) if e.errno == libc::EINVAL => {}
                done => return done,
            }
        }
        if let Some(at) = mem::first_resident(hva, len)? {
            fail!(
                EEXIST,
                "hva: the page at {at:#x} has content already: drop it (MADV_DONTNEED, MADV_REMOVE; munlock before), or use KVMFAULT_MEMSLOT_PRESENT"
            );
        }
        Ok(())
    }

    /// Turns the fast path of a live slot on or off.
    pub fn memslot_set_fast_only(&self, number: u32, on: bool) -> Result<()> {
        let editing = self.start_editing()?;
        self.switch(number, on)?;
        let block = self.slot(number)?.block.clone();
        drop(editing);
        if on || !self.engine.memory.external {
            return Ok(());
        }
        const ENOUGH: Duration = Duration::from_secs(10);
        let end = Instant::now() + ENOUGH;
        let too_long = |hva| {
            Error::new(
                libc::EBUSY,
                format!("the resolver has been at hva {hva:#x} for {ENOUGH:?}, and the page is there"),
            )
        };
        calls::wait_for_calls(&block, |hva| (Instant::now() > end).then(|| too_long(hva)))
    }

    fn switch(&self, number: u32, on: bool) -> Result<()> {
        let old = self.slot(number)?;
        if old.fast_only == on {
            return Ok(());
        }
        let switched = self.switch_slot(&old, on);
        // Both ways register memory. If the VM is freed meanwhile, no thread reads its faults.
        self.engine.check_begun().inspect_err(|_| self.engine.memory.unregister(&old.block))?;
        switched
    }

    fn switch_slot(&self, old: &Slot, on: bool) -> Result<()> {
        let (memory, number) = (&self.engine.memory, old.region.slot);
        let mechanism = MECHANISMS[old.block.mechanism];
        let mut slot = old.clone();
        slot.fast_only = on;
        slot.region = Region { version: 1, flags: old.region.flags & KVM_FLAGS, bitmap: Hva(0), ..old.region };
        if on {
            if mechanism.is_per_slot() {
                let readonly = old.is_readonly();
                let block_request =
                    BlockRequest { vcpu_only: true, readonly, offset: old.offset, ..BlockRequest::default() };
                mechanism.check(&self.host, old.block.kind, &block_request)?;
            }
            if old.block.phase.is_closed() && !memory.external {
                mechanism::register_again(memory, &old.block)?;
            }
            self.enable_fault_exits()?;
            mechanism.arm(&self.host, &slot.clone(), &mut slot.region);
        }
        // Markers belong to the block: they stay while another slot of it is fast.
        let others =
            memory.slots().iter().any(|s| s.region.slot != number && s.fast_only && Arc::ptr_eq(&s.block, &old.block));
        let region = slot.region;
        if region != old.region {
            // The same ioctl that is good for the flag is good for its removal.
            let region = Region { version: region.version.max(old.region.version), ..region };
            self.set_in_kvm(&region, &slot.block)?;
        }
        if on || !others {
            mechanism.set_fast(memory, &slot.block, on)?;
        }
        if on {
            // Last of all: from now on pages may go.
            old.block.phase.reopen();
        }
        let new = memory.slots().with(slot, false);
        memory.replace_slots(new);
        Ok(())
    }

    /// The end of absence: memory in which nothing is missing becomes memory like any other, and
    /// its slots lose what made vCPUs leave. EBUSY, and nothing has changed, if a page is missing.
    /// Memory with LOST pages is left as it is: they may be wanted again. Returns the blocks.
    pub fn release(&self) -> Result<Vec<Arc<Block>>> {
        let _editing = self.start_editing()?;
        let memory = &self.engine.memory;
        let slots = memory.slots().clone();
        let is_whole = |b: &&Arc<Block>| !b.phase.is_closed() && b.pages.count(0..b.pages.len(), State::Lost) == 0;
        let blocks: Vec<_> = slots.blocks().filter(is_whole).cloned().collect();
        for (n, block) in blocks.iter().enumerate() {
            release::close(memory, block).inspect_err(|_| blocks[..n].iter().for_each(|b| b.phase.reopen()))?;
        }
        let mut released = slots.iter().filter(|s| blocks.iter().any(|b| Arc::ptr_eq(b, &s.block)));
        let switched = released.try_for_each(|slot| self.switch(slot.region.slot, false));
        switched.inspect_err(|_| blocks.iter().for_each(|b| b.phase.reopen()))?;
        blocks.iter().for_each(|block| memory.unregister(block));
        Ok(blocks)
    }
}

fn block_request(request: &SlotRequest, offset: u64) -> BlockRequest {
    BlockRequest {
        vcpu_only: request.vcpu_only,
        readonly: request.kvm_flags & kvm_bindings::KVM_MEM_READONLY != 0,
        present: request.present,
        offset,
        file: request.file,
        ..BlockRequest::default()
    }
}

fn check_range(name: &str, start: u64, len: u64, limit: u64) -> Result<()> {
    if start % page_size() != 0 {
        fail!(EINVAL, "{name}: {start:#x} is not a multiple of {}", page_size());
    }
    if len == 0 || len % page_size() != 0 {
        fail!(EINVAL, "len: {len:#x} is not a multiple of {}, or 0", page_size());
    }
    if start.checked_add(len).is_none_or(|end| end > limit) {
        fail!(EINVAL, "{name}: [{start:#x}, +{len:#x}) goes beyond {limit:#x}");
    }
    Ok(())
}
