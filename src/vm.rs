//! A VM: its slots, and what the VMM does with their pages.

use crate::error::{fail, Error, Result};
use crate::kernel::kvm::{Descriptor, Region, Role};
use crate::kernel::mem::{self, Kind, PAGE};
use crate::kernel::thread::Flag;
use crate::kernel::uffd::{Uffd, FEATURE_POISON};
use crate::kernel::{abi::Abi, probe};
use crate::mechanism::{self, Host, Mechanism, Wish, MECHANISMS};
use crate::memory::block::{Block, Shape};
use crate::memory::install::{install, Source};
use crate::memory::pages::State;
use crate::memory::slots::{Slot, Slots};
use crate::memory::wait::{Sleeper, WAITS};
use crate::memory::{discard, Memory};
use crate::resolve::{pause_before, reader, Engine, Origin, Outcome, Resolver, Waiter, MOST_RETRIES};
use crate::stats::Stats;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};

/// What a VM is made from.
pub struct Options<'a> {
    /// /dev/kvm.
    pub kvm_fd: RawFd,
    /// The VM.
    pub vm_fd: RawFd,
    /// A place in [`MECHANISMS`], or None for the best.
    pub mechanism: Option<usize>,
    /// A userfaultfd that is open already.
    pub uffd: Option<RawFd>,
    /// A row of the ABI table by name.
    pub abi: Option<&'a str>,
    /// Reader threads; 0 for the usual number.
    pub readers: u32,
    /// Readahead window in pages; 0 for none.
    pub readahead: u32,
}

/// A memslot as the VMM asks for it.
#[derive(Debug, Clone, Copy)]
pub struct SlotRequest {
    /// Id and address space.
    pub slot: u32,
    /// KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY.
    pub kvm_flags: u32,
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes; 0 deletes.
    pub len: u64,
    /// The memory.
    pub hva: u64,
    /// The block that it is a window of: start and bytes.
    pub block: Option<(u64, u64)>,
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
    /// Whatever it is.
    Auto,
    /// Private anonymous.
    Anon,
    /// memfd, tmpfs, shared anonymous.
    Shared,
    /// hugetlb.
    Hugetlb,
}

impl MemoryKind {
    fn admits(self, kind: Kind) -> bool {
        match self {
            MemoryKind::Auto => true,
            MemoryKind::Anon => kind == Kind::Anon,
            MemoryKind::Shared => kind == Kind::Shared,
            MemoryKind::Hugetlb => matches!(kind, Kind::HugetlbPrivate | Kind::HugetlbShared),
        }
    }
}

/// Who does the ioctl.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ioctl {
    Library,
    Vmm,
}

/// A VM whose memory the library looks after.
pub struct Vm {
    /// /dev/kvm.
    pub system: Descriptor,
    /// The VM.
    pub vm: Descriptor,
    /// The memory and who fills it.
    pub engine: Arc<Engine>,
    /// What the kernel offers.
    pub host: Host,
    forced: Option<usize>,
    stop: Arc<Flag>,
    exits_enabled: AtomicBool,
    /// Editors of the slots take turns; faults don't care.
    editing: Mutex<()>,
}

/// KVM_MEM_* bits that a VMM may pass: LOG_DIRTY_PAGES and READONLY.
const KVM_FLAGS: u32 = kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES | kvm_bindings::KVM_MEM_READONLY;

impl Vm {
    /// Finds out what works here, and starts the reader threads.
    pub fn new(options: &Options<'_>, resolver: impl FnOnce() -> Box<dyn Resolver>) -> Result<Vm> {
        let system = Descriptor::duplicate(options.kvm_fd, Role::System, "kvm_fd")?;
        let vm = Descriptor::duplicate(options.vm_fd, Role::Vm, "vm_fd")?;
        let wanted = options
            .abi
            .map(|name| Abi::by_name(name).ok_or_else(|| unknown_abi(name)))
            .transpose()?;
        if options.readers > 64 {
            fail!(EINVAL, "reader_threads: {} is more than 64", options.readers);
        }
        let readahead = options.readahead.max(1);
        if !readahead.is_power_of_two() || readahead > 4096 {
            fail!(EINVAL, "readahead: {readahead} is not a power of two up to 4096");
        }
        let uffd = match options.uffd {
            Some(fd) => Uffd::adopt(fd)?,
            None => {
                Uffd::open().map_err(|e| e.context("userfaultfd can't be opened (kvmfault_explain says what to do)"))?
            }
        };
        // The flag's row is looked for only where it may be used: a probe costs a scratch VM.
        let flag_wanted = options.mechanism.is_none_or(|m| MECHANISMS[m].number() == 1);
        let abi = match wanted {
            Some(abi) => {
                probe::prove(&system, abi)
                    .map_err(|e| Error::new(libc::EOPNOTSUPP, format!("abi: {}: {e}", abi.name)))?;
                Some(abi)
            }
            None if flag_wanted => probe::find(&system),
            None => None,
        };
        let host = Host {
            abi,
            features: uffd.features(),
        };
        if let Some(forced) = options.mechanism {
            // With the best memory for it; what a slot's memory rules out is said when the slot is set.
            let wish = Wish {
                vcpu_only: true,
                readonly: false,
                present: false,
                offset: 0,
                file: None,
            };
            mechanism::choose(&host, Some(forced), Kind::Shared, &wish)?;
        }
        let stop = Arc::new(Flag::new()?);
        let engine = Arc::new(Engine::new(Memory::new(uffd), resolver(), readahead.into()));
        let classic = options.mechanism.is_some_and(|m| MECHANISMS[m].number() == 3);
        let readers = match options.readers {
            0 if classic => 2,
            n => n.max(1),
        };
        let made = Vm {
            system,
            vm,
            engine,
            host,
            forced: options.mechanism,
            stop,
            exits_enabled: AtomicBool::new(false),
            editing: Mutex::new(()),
        };
        reader::start(&made.engine, &made.stop, readers)?;
        Ok(made)
    }

    /// What is used, or would be, for shared memory.
    pub fn mechanism(&self) -> &'static dyn Mechanism {
        let wish = Wish {
            vcpu_only: false,
            readonly: false,
            present: false,
            offset: 0,
            file: None,
        };
        let best = self
            .forced
            .or_else(|| mechanism::choose(&self.host, None, Kind::Shared, &wish).ok());
        MECHANISMS[best.unwrap_or(MECHANISMS.len() - 1)]
    }

    /// The mechanism of one slot.
    pub fn slot_mechanism(&self, number: u32) -> Result<&'static dyn Mechanism> {
        Ok(MECHANISMS[self.slot(number)?.block.mechanism])
    }

    /// Switches on what the kernel's ABI wants switched on before fault exits come.
    pub fn enable_fault_exits(&self) -> Result<()> {
        let Some((cap, arg)) = self.host.abi.and_then(|abi| abi.enable) else {
            return Ok(());
        };
        if !self.exits_enabled.load(SeqCst) {
            self.vm
                .enable_cap(cap, arg)
                .map_err(|e| e.context(format!("enabling capability {cap}")))?;
            self.exits_enabled.store(true, SeqCst);
        }
        Ok(())
    }

    /// Creates, moves or deletes a slot, and tells KVM.
    pub fn memslot_set(&self, request: &SlotRequest) -> Result<()> {
        self.edit(request, Ioctl::Library).map(|_| ())
    }

    /// The same without telling KVM; returns what the VMM is to tell it.
    pub fn memslot_prepare(&self, request: &SlotRequest) -> Result<Region> {
        self.edit(request, Ioctl::Vmm)
    }

    fn edit(&self, request: &SlotRequest, ioctl: Ioctl) -> Result<Region> {
        let _editing = self.start_editing()?;
        let slots = self.engine.memory.slots();
        if request.len == 0 {
            return self.delete(&slots, request, ioctl);
        }
        let slot = self.plan(&slots, request)?;
        let old = slots.numbered(request.slot).cloned();
        let region = slot.region;
        let new = slots.with(slot);
        drop(slots);
        // Published first: a vCPU may fault the moment KVM knows the slot.
        let before = self.engine.memory.slots().clone();
        self.publish(new);
        if ioctl == Ioctl::Library {
            if let Err(e) = self.set_region(old.as_deref(), &region) {
                self.publish((*before).clone());
                return Err(e);
            }
        }
        Ok(region)
    }

    /// KVM moves a slot (guest address, flags) in place, but takes another size or host address only after a delete.
    fn set_region(&self, old: Option<&Slot>, region: &Region) -> Result<()> {
        if let Some(old) = old.filter(|o| o.region.len != region.len || o.region.hva != region.hva) {
            self.vm.set_region(&Region { len: 0, ..old.region })?;
        }
        self.vm.set_region(region)
    }

    fn delete(&self, slots: &Slots, request: &SlotRequest, ioctl: Ioctl) -> Result<Region> {
        let Some(old) = slots.numbered(request.slot).cloned() else {
            fail!(ENOENT, "slot: {:#x} is not set", request.slot);
        };
        let region = Region { len: 0, ..old.region };
        if ioctl == Ioctl::Library {
            self.vm.set_region(&region)?;
        }
        self.publish(slots.without(request.slot, request.keep));
        Ok(region)
    }

    /// Replaces the slots; blocks that are no longer among them release their sleepers.
    fn publish(&self, new: Slots) {
        let memory = &self.engine.memory;
        let before = memory.slots().clone();
        let kept = |b: &Arc<Block>| new.blocks().any(|n| Arc::ptr_eq(n, b));
        let gone: Vec<_> = before.blocks().filter(|b| !kept(b)).cloned().collect();
        memory.replace_slots(new);
        gone.iter().for_each(|block| self.retire(block));
    }

    /// Makes a block's memory ordinary again: whoever waits goes on, and absent pages read as zeros.
    fn retire(&self, block: &Block) {
        let memory = &self.engine.memory;
        block.gone.store(true, SeqCst);
        WAITS.wake_all();
        if block.alias.is_none() && block.is_marked() {
            let _ = discard::unmark(memory, block);
        }
        let _ = memory.uffd.unregister(block.hva, block.len);
    }

    /// The slot to be. Checks everything before anything changes.
    fn plan(&self, slots: &Slots, request: &SlotRequest) -> Result<Slot> {
        let SlotRequest {
            slot: number,
            gpa,
            len,
            hva,
            ..
        } = *request;
        self.check_number(number)?;
        if request.kvm_flags & !KVM_FLAGS != 0 {
            fail!(
                EINVAL,
                "kvm_flags: {:#x} has bits besides LOG_DIRTY_PAGES and READONLY",
                request.kvm_flags
            );
        }
        if request.keep {
            fail!(EINVAL, "flags: KVMFAULT_MEMSLOT_KEEP is for deleting");
        }
        if hva == 0 {
            fail!(EINVAL, "hva: is NULL");
        }
        check_range("gpa", gpa, len, 1 << 52)?;
        check_range("hva", hva, len, 1 << 47)?;
        let (block_hva, block_len) = request.block.unwrap_or((hva, len));
        check_range("block_hva", block_hva, block_len, 1 << 47)?;
        if hva < block_hva || hva + len > block_hva + block_len {
            fail!(
                EINVAL,
                "block_hva: [{block_hva:#x}, +{block_len:#x}) does not hold the slot's memory at {hva:#x}"
            );
        }
        let wanted = Region {
            slot: number,
            gpa,
            len,
            ..Default::default()
        };
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
            None => (Arc::new(self.new_block(block_hva, block_len, offset, request)?), true),
        };
        let slot = self.slot_on(&block, &wanted, request, fresh);
        if slot.is_err() && fresh {
            self.retire(&block);
        }
        slot
    }

    /// The slot as a window of its block, armed.
    fn slot_on(&self, block: &Arc<Block>, wanted: &Region, request: &SlotRequest, fresh: bool) -> Result<Slot> {
        let Region { gpa, len, .. } = *wanted;
        let hva = request.hva;
        let offset = hva - block.hva;
        for (name, value) in [("gpa", gpa), ("len", len), ("hva", offset)] {
            if value % block.page != 0 {
                fail!(
                    EINVAL,
                    "{name}: is not a multiple of the memory's page size {:#x}",
                    block.page
                );
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
        if !fresh {
            mechanism.check(&self.host, block.kind, &wish_of(request, offset))?;
        }
        let region = Region {
            version: 1,
            flags: request.kvm_flags,
            hva: block.kvm_hva() + offset,
            ..*wanted
        };
        let mut slot = Slot {
            region,
            block: block.clone(),
            offset,
            fast_only: !request.slow,
        };
        if slot.fast_only {
            self.enable_fault_exits()?;
            mechanism.arm(&self.host, &slot.clone(), &mut slot.region);
            mechanism.set_fast(&self.engine.memory, &slot.block, true)?;
        }
        Ok(slot)
    }

    fn check_number(&self, number: u32) -> Result<()> {
        let (space, id) = (number >> 16, number & 0xffff);
        let slots = self.vm.check_extension(kvm_bindings::KVM_CAP_NR_MEMSLOTS).max(32) as u32;
        let spaces = self
            .vm
            .check_extension(kvm_bindings::KVM_CAP_MULTI_ADDRESS_SPACE)
            .max(1) as u32;
        if id >= slots {
            fail!(EINVAL, "slot: id {id} is not below the kernel's limit of {slots}");
        }
        if space >= spaces {
            fail!(
                EINVAL,
                "slot: address space {space} is not below the kernel's limit of {spaces}"
            );
        }
        Ok(())
    }

    fn new_block(&self, hva: u64, len: u64, offset: u64, request: &SlotRequest) -> Result<Block> {
        let backing = mem::inspect(hva, len)?;
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
        if backing.kind == Kind::Anon && !request.present {
            if let Some(at) = mem::first_resident(hva, len)? {
                fail!(
                    EEXIST,
                    "hva: the page at {at:#x} has content already: MADV_DONTNEED it, or use KVMFAULT_MEMSLOT_PRESENT"
                );
            }
        }
        let wish = wish_of(request, offset);
        let n = mechanism::choose(&self.host, self.forced, backing.kind, &wish)?;
        let shape = Shape {
            hva,
            len,
            page: backing.page,
            kind: backing.kind,
            mechanism: n,
        };
        let memory = &self.engine.memory;
        let made = MECHANISMS[n].new_block(&self.host, memory, shape, &wish);
        made.inspect_err(|_| {
            let _ = memory.uffd.unregister(hva, len);
        })
    }

    /// Turns the fast path of a live slot on or off.
    pub fn memslot_set_fast_only(&self, number: u32, on: bool) -> Result<()> {
        let _editing = self.start_editing()?;
        let memory = &self.engine.memory;
        let old = self.slot(number)?;
        if old.fast_only == on {
            return Ok(());
        }
        let mechanism = MECHANISMS[old.block.mechanism];
        let mut slot = (*old).clone();
        slot.fast_only = on;
        slot.region = Region {
            version: 1,
            flags: old.region.flags & KVM_FLAGS,
            bitmap: 0,
            ..old.region
        };
        if on {
            self.enable_fault_exits()?;
            mechanism.arm(&self.host, &slot.clone(), &mut slot.region);
        }
        // Markers belong to the block: they stay while another slot of it is fast.
        let others = memory
            .slots()
            .iter()
            .any(|s| s.region.slot != number && s.fast_only && Arc::ptr_eq(&s.block, &old.block));
        let region = slot.region;
        if region != old.region {
            // The same ioctl that is good for the flag is good for its removal.
            self.vm.set_region(&Region {
                version: region.version.max(old.region.version),
                ..region
            })?;
        }
        if on || !others {
            mechanism.set_fast(memory, &slot.block, on)?;
        }
        let new = memory.slots().with(slot);
        memory.replace_slots(new);
        Ok(())
    }

    fn start_editing(&self) -> Result<MutexGuard<'_, ()>> {
        self.editing
            .lock()
            .map_err(|_| Error::new(libc::ENOTRECOVERABLE, "an earlier call panicked while it edited slots"))
    }

    fn slot(&self, number: u32) -> Result<Arc<Slot>> {
        match self.engine.memory.slots().numbered(number) {
            Some(slot) => Ok(slot.clone()),
            None => fail!(ENOENT, "slot: {number:#x} is not set"),
        }
    }

    /// The block's pages of a guest range, which must lie in one slot.
    fn pages(&self, gpa: u64, len: u64) -> Result<(Arc<Slot>, std::ops::Range<u64>)> {
        let slots = self.engine.memory.slots();
        let Some(slot) = slots.at_any(gpa) else {
            fail!(ENOENT, "gpa: {gpa:#x} is in no slot")
        };
        if len == 0 {
            fail!(EINVAL, "len: is 0");
        }
        let page = slot.block.page;
        if gpa % page != 0 || len % page != 0 {
            fail!(
                EINVAL,
                "gpa: {gpa:#x} and len {len:#x} must be multiples of the page size {page:#x}"
            );
        }
        if len > slot.region.len - (gpa - slot.region.gpa) {
            fail!(
                EINVAL,
                "len: [{gpa:#x}, +{len:#x}) goes beyond slot {:#x}",
                slot.region.slot
            );
        }
        let first = slot.page_of(gpa);
        Ok((slot.clone(), first..first + len / page))
    }

    /// Installs pages; EEXIST if all of them were present.
    pub fn install(&self, gpa: u64, len: u64, source: Source) -> Result<()> {
        let (slot, pages) = self.pages(gpa, len)?;
        if matches!(source, Source::Map) && !matches!(slot.block.kind, Kind::Shared | Kind::HugetlbShared) {
            fail!(EINVAL, "gpa: {gpa:#x} is private memory, which is in no page cache");
        }
        let memory = &self.engine.memory;
        if install(memory, &slot.block, pages, source, &memory.stats)? == 0 {
            fail!(EEXIST, "gpa: all pages of [{gpa:#x}, +{len:#x}) were present already");
        }
        Ok(())
    }

    /// Gives pages up.
    pub fn lose(&self, gpa: u64, len: u64) -> Result<()> {
        let (slot, pages) = self.pages(gpa, len)?;
        if discard::lose(&self.engine.memory, &slot.block, pages)? == 0 {
            fail!(
                EEXIST,
                "gpa: all pages of [{gpa:#x}, +{len:#x}) are present or lost already"
            );
        }
        Ok(())
    }

    /// Makes pages absent again.
    pub fn discard(&self, gpa: u64, len: u64) -> Result<()> {
        let (slot, pages) = self.pages(gpa, len)?;
        discard::discard(&self.engine.memory, &slot.block, pages, &self.engine.memory.stats)
    }

    /// Brings pages through the resolver, on this thread; waits for those that others are bringing.
    pub fn resolve(&self, gpa: u64, len: u64) -> Result<()> {
        let (slot, pages) = self.pages(gpa, len)?;
        let waiter = Patient(Sleeper::default());
        let stats = &self.engine.memory.stats;
        for page in pages {
            let mut retries = 0;
            while slot.block.pages.get(page) != State::Present {
                match self
                    .engine
                    .resolve(&slot.block, page, Origin::Prefetch, 0, Some(&waiter), stats)?
                {
                    Outcome::Lost => fail!(EHWPOISON, "the page at gpa {:#x} is lost", slot.gpa_of(page)),
                    Outcome::Interrupted => fail!(EINTR, "interrupted by a signal at gpa {:#x}", slot.gpa_of(page)),
                    Outcome::Gone => fail!(ENOENT, "slot {:#x} was deleted meanwhile", slot.region.slot),
                    Outcome::Retry if retries == MOST_RETRIES => {
                        fail!(
                            ELOOP,
                            "the resolver asked for {retries} retries at gpa {:#x}",
                            slot.gpa_of(page)
                        )
                    }
                    Outcome::Retry => {
                        std::thread::sleep(pause_before(retries));
                        retries += 1;
                    }
                    Outcome::Installed | Outcome::Waited | Outcome::WasPresent | Outcome::Elsewhere => {}
                }
            }
        }
        Ok(())
    }

    /// The state of the page at an address.
    pub fn state(&self, gpa: u64) -> Result<State> {
        let slots = self.engine.memory.slots();
        match slots.at_any(gpa) {
            Some(slot) => Ok(slot.block.pages.get(slot.page_of(gpa))),
            None => fail!(ENOENT, "gpa: {gpa:#x} is in no slot"),
        }
    }

    /// Pages that are not yet present (nor lost).
    pub fn absent(&self) -> u64 {
        self.engine.memory.slots().absent()
    }

    /// The sum of all counters.
    pub fn stats(&self) -> Stats {
        let sum = Stats::default();
        sum.absorb(&self.engine.memory.stats);
        sum.absorb(&self.engine.seats.gone);
        self.engine.seats.all().iter().for_each(|seat| sum.absorb(&seat.stats));
        sum
    }

    /// Is UFFDIO_POISON there?
    pub fn has_poison(&self) -> bool {
        self.host.features & FEATURE_POISON != 0
    }

    /// Ends everything without waiting for anything: reader threads go when their resolver call is over; vCPUs that wait are told.
    pub fn shut_down(&self) {
        self.engine.shut_down();
        self.stop.raise();
        for seat in self.engine.seats.all().iter() {
            seat.kick();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// Waits as long as it takes, or until a signal handler runs.
struct Patient(Sleeper);

impl Waiter for Patient {
    fn sleeper(&self) -> &Sleeper {
        &self.0
    }

    fn must_leave(&self) -> bool {
        false
    }
}

fn wish_of(request: &SlotRequest, offset: u64) -> Wish {
    Wish {
        vcpu_only: request.vcpu_only,
        readonly: request.kvm_flags & kvm_bindings::KVM_MEM_READONLY != 0,
        present: request.present,
        offset,
        file: request.file,
    }
}

fn check_range(name: &str, start: u64, len: u64, limit: u64) -> Result<()> {
    if start % PAGE != 0 {
        fail!(EINVAL, "{name}: {start:#x} is not a multiple of 4096");
    }
    if len == 0 || len % PAGE != 0 {
        fail!(EINVAL, "len: {len:#x} is not a multiple of 4096, or 0");
    }
    if start.checked_add(len).is_none_or(|end| end > limit) {
        fail!(EINVAL, "{name}: [{start:#x}, +{len:#x}) goes beyond {limit:#x}");
    }
    Ok(())
}

fn unknown_abi(name: &str) -> Error {
    let known: Vec<_> = crate::kernel::abi::ABIS.iter().map(|abi| abi.name).collect();
    Error::new(
        libc::EINVAL,
        format!("abi: {name:?} is not one of {}", known.join(", ")),
    )
}
