//! A VM: what works for it, and what the VMM does with its pages.

pub mod fill;
pub mod memslots;
mod nudge;

use crate::error::{fail, Error, Result};
use crate::kernel::abi::{Abi, ACCESS_UNKNOWN};
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::arch;
use crate::kernel::event::Flag;
use crate::kernel::kvm::{SystemFd, VcpuFd, VmFd};
use crate::kernel::mem::Kind;
use crate::kernel::page;
use crate::kernel::probe;
use crate::kernel::process::Process;
use crate::kernel::uffd::{Uffd, FEATURE_POISON};
use crate::mechanism::{self, BlockRequest, Host, Mechanism, MECHANISMS};
use crate::memory::block::Block;
use crate::memory::install::install;
use crate::memory::pages::State;
use crate::memory::pause::BoundedBackoff;
use crate::memory::slots::{Slot, Slots};
use crate::memory::source::Source;
use crate::memory::wait::Sleeper;
use crate::memory::{calls, discard, give_back, lose, Memory};
use crate::resolve::fill::Fill;
use crate::resolve::{
    note_failure, pause_before, reader, Engine, Extent, FaultRequest, Origin, Outcome, Resolver, Waiter, MAX_RETRIES,
};
use crate::stats::Stats;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

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
    /// The most pages that one resolver call may be asked for, the one that faults included; 0 for
    /// no readahead.
    pub readahead: u32,
    /// Map pages in stage 2 (KVM_PRE_FAULT_MEMORY) after a vCPU's fault.
    pub pre_fault: bool,
    /// A userfaultfd of the VMM's own serves everything but vCPUs.
    pub external: bool,
    /// The VM's MSR filter is the library's.
    pub filter_msrs: bool,
}

/// A VM whose memory is filled on demand.
pub struct Vm {
    /// /dev/kvm.
    pub system: SystemFd,
    /// The VM.
    pub vm: VmFd,
    /// The memory, and what fetches its pages.
    pub engine: Arc<Engine>,
    /// What the kernel offers.
    pub host: Host,
    /// Map pages in stage 2 after a vCPU's fault, where KVM can.
    pub pre_fault: bool,
    /// Guests' writes to the MSRs that name areas for KVM come as exits.
    pub filters_msrs: bool,
    process: Process,
    forced: Option<usize>,
    stop: Arc<Flag>,
    exits_enabled: AtomicBool,
    /// Held while slots are changed. Faults don't take it.
    editing: Mutex<()>,
    /// Blocks that are gone and may have an install under way (see `memslots`).
    lingering: Mutex<Vec<Arc<Block>>>,
    /// The last fill.
    filling: Mutex<Weak<Fill>>,
}

impl Vm {
    /// Finds out what works here, and starts the reader threads.
    pub fn new(options: &Options<'_>, resolver: impl FnOnce() -> Box<dyn Resolver>) -> Result<Vm> {
        let system = SystemFd::duplicate(options.kvm_fd, "kvm_fd")?;
        let vm = VmFd::duplicate(options.vm_fd, "vm_fd")?;
        let wanted = options.abi.map(|name| Abi::by_name(name).ok_or_else(|| unknown_abi(name))).transpose()?;
        if options.readers > 64 {
            fail!(EINVAL, "reader_threads: {} is more than 64", options.readers);
        }
        let readahead = options.readahead.max(1);
        if readahead > 4096 {
            fail!(EINVAL, "readahead: {readahead} is more than 4096");
        }
        if options.external && options.readers > 0 {
            fail!(EINVAL, "reader_threads: with KVMFAULT_VM_EXTERNAL_UFFD the library reads no userfaultfd");
        }
        if options.filter_msrs && !arch::HAS_AREA_MSRS {
            fail!(
                EOPNOTSUPP,
                "flags: KVMFAULT_VM_FILTER_MSRS is for x86-64: on this architecture guests register no memory by MSRs"
            );
        }
        let uffd = match options.uffd {
            Some(fd) => Uffd::adopt(fd)?,
            None => {
                Uffd::open().map_err(|e| e.context("userfaultfd can't be opened (kvmfault_explain says what to do)"))?
            }
        };
        // The flag's row is looked for only where it may be used: a probe costs a scratch VM.
        let flag_wanted = options.mechanism.is_none_or(|m| MECHANISMS[m].number() == mechanism::MEMSLOT_FLAG);
        let abi = match wanted {
            Some(abi) => {
                probe::prove(&system, abi)
                    .map_err(|e| Error::new(libc::EOPNOTSUPP, format!("abi: {}: {e}", abi.name)))?;
                Some(abi)
            }
            None if flag_wanted => match (probe::find(&system), options.mechanism) {
                (Err(e), Some(_)) => return Err(e),
                (found, _) => found.ok().flatten(),
            },
            None => None,
        };
        page::huge_page_size(); // read now: a thread of the fill may have no /sys
        let host = Host { abi, features: uffd.features() };
        // With the best memory for it; what a slot's memory rules out is said when the slot is set.
        let request = BlockRequest { external: options.external, vcpu_only: true, ..BlockRequest::default() };
        mechanism::choose(&host, options.mechanism, Kind::Shared, &request)?;
        let stop = Arc::new(Flag::new()?);
        let memory = Memory::new(uffd, options.external);
        let engine = Arc::new(Engine::new(memory, resolver(), readahead.into()));
        let classic = options.mechanism.is_some_and(|m| MECHANISMS[m].number() == mechanism::USERFAULTFD);
        let readers = match options.readers {
            _ if options.external => 0,
            0 if classic => 2,
            n => n.max(1),
        };
        // 236 is also EXIT_ON_MISSING of the flag's v7; that kernel's ioctl fails, and the vCPU
        // does not try again.
        let pre_fault = options.pre_fault && vm.check_extension(kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY) > 0;
        let mut made = Vm {
            system,
            vm,
            engine,
            host,
            pre_fault,
            filters_msrs: false,
            process: here(),
            forced: options.mechanism,
            stop,
            exits_enabled: AtomicBool::new(false),
            editing: Mutex::new(()),
            lingering: Mutex::default(),
            filling: Mutex::default(),
        };
        if options.filter_msrs {
            made.filters_msrs = made.mechanism().filter_msrs(&made.vm)?;
        }
        reader::start(&made.engine, &made.stop, readers)?;
        Ok(made)
    }

    /// The mechanism that is forced, or that shared memory gets.
    pub fn mechanism(&self) -> &'static dyn Mechanism {
        let request = BlockRequest { external: self.engine.memory.external, ..BlockRequest::default() };
        let best = self.forced.or_else(|| mechanism::choose(&self.host, None, Kind::Shared, &request).ok());
        MECHANISMS[best.unwrap_or(MECHANISMS.len() - 1)]
    }

    /// Fails if that mechanism can't serve the guest of this vCPU, and says why.
    pub fn check_guest(&self, vcpu: RawFd) -> Result<()> {
        let vcpu = VcpuFd::duplicate(vcpu, "vcpu_fd")?;
        self.mechanism().check_guest(&vcpu)
    }

    /// The mechanism of one slot.
    pub fn slot_mechanism(&self, number: u32) -> Result<&'static dyn Mechanism> {
        Ok(MECHANISMS[self.slot(number)?.block.mechanism])
    }

    /// Enables what the kernel's ABI wants enabled before fault exits come.
    pub fn enable_fault_exits(&self) -> Result<()> {
        let Some((cap, arg)) = self.host.abi.and_then(|abi| abi.enable) else {
            return Ok(());
        };
        if !self.exits_enabled.load(SeqCst) {
            self.vm.enable_cap(cap, arg).map_err(|e| e.context(format!("enabling capability {cap}")))?;
            self.exits_enabled.store(true, SeqCst);
        }
        Ok(())
    }

    /// Keeps slots from being changed, for a test of what faults must not wait for.
    #[cfg(test)]
    pub fn hold_editing(&self) -> MutexGuard<'_, ()> {
        self.start_editing().unwrap()
    }

    /// Waits until no other thread changes slots.
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
    fn pages<'s>(&self, slots: &'s Slots, gpa: Gpa, len: u64) -> Result<(&'s Slot, std::ops::Range<u64>)> {
        let Some(slot) = slots.at_any(gpa) else { fail!(ENOENT, "gpa: {gpa:#x} is in no slot") };
        if len == 0 {
            fail!(EINVAL, "len: is 0");
        }
        check_alignment("gpa", gpa.0, len, slot.block.page)?;
        let page = slot.block.page;
        if len > slot.region.len - (gpa - slot.region.gpa) {
            fail!(EINVAL, "len: [{gpa:#x}, +{len:#x}) goes beyond slot {:#x}", slot.region.slot);
        }
        let first = slot.page_of(gpa);
        Ok((slot, first..first + len / page))
    }

    /// The block and its pages of a range of this process, which must lie in one block.
    fn pages_at<'s>(&self, slots: &'s Slots, hva: Hva, len: u64) -> Result<(&'s Block, std::ops::Range<u64>)> {
        if !self.engine.memory.external {
            fail!(
                EOPNOTSUPP,
                "vm: was made without KVMFAULT_VM_EXTERNAL_UFFD: its pages are the library's to install and to discard"
            );
        }
        // The VMM installs nothing in the library's alias of the memory.
        let found = slots.at_hva(hva).filter(|(block, _)| hva.wrapping_sub(block.hva) < block.len);
        let Some((block, first)) = found else { fail!(ENOENT, "hva: {hva:#x} is in no slot's memory") };
        if len == 0 {
            fail!(EINVAL, "len: is 0");
        }
        check_alignment("hva", hva.0, len, block.page)?;
        if len / block.page > block.pages.len() - first {
            fail!(EINVAL, "len: [{hva:#x}, +{len:#x}) goes beyond the memory registered at {:#x}", block.hva);
        }
        Ok((block, first..first + len / block.page))
    }

    /// Fails if the VMM's mapping is not the library's to install in and to drop pages from.
    fn check_ours(&self) -> Result<()> {
        if self.engine.memory.external {
            fail!(
                EOPNOTSUPP,
                "vm: was made with KVMFAULT_VM_EXTERNAL_UFFD: its pages are the VMM's to install and to drop; kvmfault_pages_arrived and _missing tell the library"
            );
        }
        Ok(())
    }

    /// The VMM has installed these pages in its mapping.
    pub fn arrived(&self, hva: Hva, len: u64) -> Result<()> {
        let slots = self.engine.memory.slots();
        let (block, pages) = self.pages_at(&slots, hva, len)?;
        let memory = &self.engine.memory;
        install(memory, block, pages, Source::Arrived, memory.stats.here()).map(drop)
    }

    /// The VMM's mapping doesn't have these pages.
    pub fn missing(&self, hva: Hva, len: u64) -> Result<()> {
        let slots = self.engine.memory.slots();
        let (block, pages) = self.pages_at(&slots, hva, len)?;
        discard::discard(&self.engine.memory, block, pages, self.engine.memory.stats.here())
    }

    /// Translates an address of either mapping of a block to the VMM's.
    pub fn vmm_address(&self, address: Hva) -> Option<Hva> {
        let slots = self.engine.memory.slots();
        let (block, page) = slots.at_hva(address)?;
        Some(block.hva_of(page) + address % block.page)
    }

    /// Installs pages; EEXIST if all of them were present.
    pub fn install(&self, gpa: Gpa, len: u64, source: Source) -> Result<()> {
        self.check_ours()?;
        // A guard and no clone: a count that all vCPUs' installs bump would be where they meet.
        let slots = self.engine.memory.slots();
        let (slot, pages) = self.pages(&slots, gpa, len)?;
        if matches!(source, Source::Map) && !matches!(slot.block.kind, Kind::Shared | Kind::HugetlbShared) {
            fail!(EINVAL, "gpa: {gpa:#x} is private memory, which is in no page cache");
        }
        if let Source::Copy(src) = source {
            wait_for_source(&slots, src, len)?;
        }
        let memory = &self.engine.memory;
        let installed = install(memory, &slot.block, pages, source, memory.stats.here());
        if installed.is_err() && self.engine.is_shut_down() {
            fail!(ESHUTDOWN, "the VM was freed meanwhile");
        }
        if installed.inspect_err(note_failure)? == 0 {
            fail!(EEXIST, "gpa: all pages of [{gpa:#x}, +{len:#x}) were present already");
        }
        Ok(())
    }

    /// Marks absent pages lost; EEXIST if none of them is absent.
    pub fn lose(&self, gpa: Gpa, len: u64) -> Result<()> {
        let slots = self.engine.memory.slots();
        let (slot, pages) = self.pages(&slots, gpa, len)?;
        if lose::lose(&self.engine.memory, &slot.block, pages)? == 0 {
            fail!(EEXIST, "gpa: all pages of [{gpa:#x}, +{len:#x}) are present or lost already");
        }
        Ok(())
    }

    /// Makes pages absent again.
    pub fn discard(&self, gpa: Gpa, len: u64) -> Result<()> {
        self.check_ours()?;
        let slots = self.engine.memory.slots();
        let (slot, pages) = self.pages(&slots, gpa, len)?;
        discard::discard(&self.engine.memory, &slot.block, pages, self.engine.memory.stats.here())
    }

    /// Gives back what the guest doesn't use: zeros at the next touch.
    pub fn give_back(&self, gpa: Gpa, len: u64) -> Result<()> {
        self.check_ours()?;
        let slots = self.engine.memory.slots();
        let (slot, pages) = self.pages(&slots, gpa, len)?;
        give_back::give_back(&self.engine.memory, &slot.block, pages, self.engine.memory.stats.here())
    }

    /// Makes announced pages absent again, and returns how many there were.
    pub fn withdraw(&self, gpa: Gpa, len: u64) -> Result<u64> {
        let slots = self.engine.memory.slots();
        let (slot, pages) = self.pages(&slots, gpa, len)?;
        discard::withdraw(&self.engine.memory, &slot.block, pages)
    }

    /// Makes a bitmap with a bit for each page, set if its state is in `states` (bit n for state
    /// n), and gives it to `put` in pieces, each with its offset. `size` is the room for it in
    /// bytes. Returns how many bits are set.
    pub fn bitmap(
        &self,
        gpa: Gpa,
        len: u64,
        states: u32,
        size: u64,
        mut put: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<u64> {
        let slots = self.engine.memory.slots();
        let (slot, pages) = self.pages(&slots, gpa, len)?;
        let needed = (pages.end - pages.start).div_ceil(64) * 8;
        if size < needed {
            fail!(EINVAL, "size: {size} bytes are less than the {needed} that {} pages need", pages.end - pages.start);
        }
        let mut set = 0;
        // In pieces: a bitmap may be long, and its place is the VMM's.
        const PIECE: u64 = 64 * 512;
        for start in pages.clone().step_by(PIECE as usize) {
            let mut bytes = [0; PIECE as usize / 8];
            let end = pages.end.min(start + PIECE);
            for page in (start..end).filter(|&page| states >> slot.block.pages.get(page) as u32 & 1 != 0) {
                bytes[((page - start) / 8) as usize] |= 1 << ((page - start) % 8);
                set += 1;
            }
            let bytes = &bytes[..((end - start).div_ceil(64) * 8) as usize];
            put((start - pages.start) / 8, bytes).map_err(|e| e.context("bitmap"))?;
        }
        Ok(set)
    }

    /// Fetches pages through the resolver, on this thread; waits for those that other threads
    /// fetch.
    pub fn resolve(&self, gpa: Gpa, len: u64) -> Result<()> {
        let slots = self.engine.memory.slots();
        let (slot, pages) = self.pages(&slots, gpa, len)?;
        let waiter = Patient(Sleeper::default());
        let request = FaultRequest {
            origin: Origin::Prefetch,
            access: ACCESS_UNKNOWN,
            waiter: Some(&waiter),
            stats: self.engine.memory.stats.here(),
            extent: Extent::UpTo { end: pages.end, most: self.engine.readahead },
        };
        for page in pages {
            let mut retries = 0;
            while slot.block.pages.get(page) != State::Present {
                match self.engine.serve(&slots, &slot.block, page, &request)? {
                    Outcome::Lost => fail!(EHWPOISON, "the page at gpa {:#x} is lost", slot.gpa_of(page)),
                    Outcome::Interrupted => fail!(EINTR, "interrupted by a signal at gpa {:#x}", slot.gpa_of(page)),
                    Outcome::Gone => fail!(ENOENT, "slot {:#x} was deleted meanwhile", slot.region.slot),
                    Outcome::Retry if retries == MAX_RETRIES => {
                        fail!(ELOOP, "the resolver asked for {retries} retries at gpa {:#x}", slot.gpa_of(page))
                    }
                    Outcome::Retry => {
                        std::thread::sleep(pause_before(retries));
                        retries += 1;
                    }
                    Outcome::Installed
                    | Outcome::Waited
                    | Outcome::WasPresent
                    | Outcome::Elsewhere
                    | Outcome::Pending => {}
                }
            }
        }
        Ok(())
    }

    /// The state of the page at an address.
    pub fn state(&self, gpa: Gpa) -> Result<State> {
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
        self.engine.memory.stats.iter().for_each(|shard| sum.absorb(shard));
        self.engine.seats.count(&sum);
        sum
    }

    /// Whether the kernel has UFFDIO_POISON.
    pub fn has_poison(&self) -> bool {
        self.host.features & FEATURE_POISON != 0
    }

    /// ECHILD in a child of the process that made the VM: what it acts on there is the parent's.
    pub fn check_process(&self) -> Result<()> {
        if !self.process.is_here() {
            fail!(ECHILD, "vm: is the parent process's; a forked child can only drop it");
        }
        Ok(())
    }

    /// The descriptors by which a forked child would keep the VM and its userfaultfd alive.
    pub fn descriptors(&self) -> Vec<RawFd> {
        vec![self.vm.as_raw_fd(), self.engine.memory.uffd.as_raw_fd(), self.stop.as_raw_fd()]
    }

    /// Ends everything without waiting: reader threads end when their resolver call is over, and
    /// vCPUs that wait are released. Only the first call does something: the VM may be dropped when
    /// its memory is in other use.
    pub fn shut_down(&self) {
        if !self.engine.shut_down() {
            return;
        }
        self.stop.raise();
        for seat in self.engine.seats.all().iter() {
            let _ = seat.kick();
        }
        self.wake_fill();
        // The userfaultfd is not read any more: no thread must wait for it.
        let memory = &self.engine.memory;
        memory.slots().blocks().for_each(|block| memory.unregister(block));
        if self.filters_msrs {
            // Waits for vCPUs to come out of KVM's page faults; now they do.
            let _ = arch::exit_on_area_msrs(&self.vm, false);
        }
        // Last of all: the VMM's finalizer says that the memory may go.
        self.engine.callbacks.take_away();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // In a forked child it is the parent's: what it would end is shared.
        if self.process.is_here() {
            self.shut_down();
        }
    }
}

/// The calling process, for handles that must know the process that made them.
pub fn here() -> Process {
    Process::here(calls::forget_other_threads)
}

fn check_alignment(name: &str, start: u64, len: u64, page: u64) -> Result<()> {
    if start % page != 0 || len % page != 0 {
        fail!(EINVAL, "{name}: {start:#x} and len {len:#x} must be multiples of the page size {page:#x}");
    }
    Ok(())
}

/// Guest memory is a source only when it is present: copying from absent pages would wait for them,
/// and other installs and discards for the copying. A page that is being fetched may be present a
/// moment later.
fn wait_for_source(slots: &Slots, src: Hva, len: u64) -> Result<()> {
    let mut backoff = BoundedBackoff::default();
    while let Some((page, state)) = slots.not_present_in(src, len) {
        let is_mine = || slots.at_hva(page).is_some_and(|(block, page)| calls::is_own_call(block, page));
        if state != State::Resolving || is_mine() || backoff.wait().is_err() {
            fail!(EFAULT, "src: {page:#x} is guest memory that isn't present itself");
        }
    }
    Ok(())
}

/// Waits without limit, or until a signal handler runs.
struct Patient(Sleeper);

impl Waiter for Patient {
    fn sleeper(&self) -> &Sleeper {
        &self.0
    }

    fn must_leave(&self) -> bool {
        false
    }
}

fn unknown_abi(name: &str) -> Error {
    let known: Vec<_> = crate::kernel::abi::ABIS.iter().map(|abi| abi.name).collect();
    Error::new(libc::EINVAL, format!("abi: {name:?} is not one of {}", known.join(", ")))
}
