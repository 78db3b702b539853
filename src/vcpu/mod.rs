//! The vCPU's exit loop: which exits are faults, and what becomes of them.

mod areas;
mod broken;
mod emulated;
mod signals;
mod tables;
#[cfg(test)]
mod tests;

use self::emulated::Deaf;
use crate::error::{fail, Error, Result};
use crate::kernel::abi::Access;
use crate::kernel::kvm::{Run, VcpuFd};
use crate::kernel::signal::{self, SignalSet};
use crate::mechanism::MECHANISMS;
use crate::memory::block::Block;
use crate::memory::install;
use crate::memory::pages::State;
use crate::memory::slots::{Slot, Slots};
use crate::memory::wait::{look_around, WAITS};
use crate::resolve::readahead::{self, Plan};
use crate::resolve::seat::Seat;
use crate::resolve::{pause_before, More, Need, Origin, Outcome, Waiter, MOST_RETRIES};
use crate::vm::Vm;
use kvm_bindings as kb;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Instant;

/// So many faults in a row of one vCPU at one page that is PRESENT, and the fault is an error.
const MOST_MAPS: u32 = 64;

/// How SIGBUS comes to the library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sigbus {
    /// Blocked outside KVM_RUN; fetched with sigtimedwait.
    ByMask,
    /// By the VMM's handler.
    ByHandler,
}

/// What a vCPU is made from.
pub struct Options {
    /// The vCPU.
    pub fd: RawFd,
    /// Its kvm_run, if the VMM has mapped it.
    pub run: Option<Run>,
    /// How SIGBUS comes.
    pub sigbus: Sigbus,
    /// The kick signal; None for the usual one.
    pub signal: Option<i32>,
    /// The VMM calls `resume` before each KVM_RUN of its own.
    pub resumes: bool,
}

/// What became of an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// KVM_RUN again.
    Handled,
    /// It is the VMM's.
    Pass,
    /// A kick or signal.
    Interrupted,
    /// See `memory_error`.
    MemoryError,
}

/// A memory error for the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryError {
    /// None if the address is in no slot.
    pub gpa: Option<u64>,
    /// In this process.
    pub hva: u64,
    /// Bytes.
    pub len: u64,
    /// The VMM said so itself (LOST), not the hardware.
    pub lost: bool,
}

/// A vCPU.
pub struct Vcpu {
    vm: Arc<Vm>,
    fd: VcpuFd,
    run: Run,
    seat: &'static Seat,
    sigbus: Sigbus,
    resumes: bool,
    /// SIGBUS and the kick signal.
    signals: SignalSet,
    own: Mutex<Own>,
    /// The last one; readable while another thread is in the vCPU's functions.
    memory_error: Mutex<Option<MemoryError>>,
}

/// What only the vCPU's thread uses.
#[derive(Default)]
struct Own {
    /// The thread that runs the vCPU: see `thread::token`.
    attached: Option<u64>,
    /// The threads where the library has blocked its signals.
    holds: Vec<u64>,
    /// The VMM has its own loop, and something else to do at the moment.
    is_away: bool,
    /// What KVM itself accesses is there.
    prepared: bool,
    /// KVM may be in the middle of a string instruction: see `tables`.
    tables_due: bool,
    walked: [tables::Walked; 2],
    /// kvm_run has been looked at for what an earlier handle left.
    has_looked: bool,
    /// kvm_run has an in-slot MMIO exit, or a write to an MSR that names an area, whose page isn't there yet.
    unfinished: bool,
    /// The page (by hva) of the unfinished access that the VMM knows can't be had.
    told: Option<u64>,
    /// The page of the last fault that made no progress, and how often in a row.
    stuck_at: u64,
    stuck: u32,
    /// What the page's gate said of discards when `stuck_present` came to it last.
    discards: Option<u32>,
    /// KVM_PRE_FAULT_MEMORY doesn't work for this vCPU.
    no_pre_fault: bool,
}

impl Vcpu {
    /// Takes a vCPU into the VM's care, on the thread that runs it.
    pub fn new(vm: &Arc<Vm>, options: Options) -> Result<Vcpu> {
        let fd = VcpuFd::duplicate(options.fd, "fd")?;
        let number = fd.number().unwrap_or(-1);
        let signal = match (options.signal, options.sigbus) {
            (Some(signal), _) if !signal::is_usable(signal) || signal == libc::SIGBUS => {
                fail!(EINVAL, "kick_signal: {signal} is not a signal that can be used for kicks")
            }
            (Some(signal), Sigbus::ByHandler) if !signal::has_handler(signal) => {
                fail!(EINVAL, "kick_signal: signal {signal} has no handler, which KVMFAULT_SIGBUS_BY_HANDLER requires")
            }
            (None, Sigbus::ByHandler) => fail!(EINVAL, "kick_signal: must be given with KVMFAULT_SIGBUS_BY_HANDLER"),
            (signal, _) => signal.unwrap_or(libc::SIGURG),
        };
        let run = match options.run {
            Some(run) => run,
            None => Run::map(&vm.system, &fd)?,
        };
        let by_handler = options.sigbus == Sigbus::ByHandler;
        let seat = Box::leak(Box::new(Seat::new(number, run.immediate_exit(), signal, by_handler)));
        let signals = SignalSet::of(&[libc::SIGBUS, signal]);
        if !vm.engine.seats.add(seat) {
            fail!(EEXIST, "fd: vCPU {number} has a handle already");
        }
        // From here on `drop` undoes what was done.
        let vcpu = Vcpu {
            vm: vm.clone(),
            fd,
            run,
            seat,
            sigbus: options.sigbus,
            resumes: options.resumes,
            signals,
            own: Mutex::default(),
            memory_error: Mutex::default(),
        };
        vcpu.attach(&mut *vcpu.own()?)?;
        vm.engine.check_begun()?;
        Ok(vcpu)
    }

    fn own(&self) -> Result<MutexGuard<'_, Own>> {
        match self.own.try_lock() {
            Ok(own) => Ok(own),
            Err(TryLockError::WouldBlock) => fail!(EBUSY, "this vCPU is in use by another thread"),
            Err(TryLockError::Poisoned(_)) => fail!(ENOTRECOVERABLE, "an earlier call on this vCPU panicked"),
        }
    }

    /// The descriptor by which a forked child would keep the VM alive.
    pub fn descriptor(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Its place among the others; for what may be called from any thread.
    pub fn seat(&self) -> &'static Seat {
        self.seat
    }

    /// Runs the guest until an exit that is the VMM's.
    pub fn run(&self) -> Result<Exit> {
        let mut own = self.own()?;
        self.attach(&mut own)?;
        self.seat.next_turn();
        self.seat.see_nudges(); // whose signals came in the VMM's own code
        self.seat.refresh();
        match self.before_run(&mut own)? {
            Exit::Handled => {}
            other => return Ok(other),
        }
        loop {
            self.check_open()?;
            // A kick's signal may be over. KVM_RUN then still completes what the last exit left, and returns at once.
            self.seat.refresh();
            self.run.clear_exit_reason();
            let ret = self.fd.run();
            match (self.exit(&mut own, ret, true)?, ret) {
                (Exit::Handled, _) => {}
                // No exit that a caller could look at: the errno is all there is.
                (Exit::Pass, Err(errno)) if self.run.exit_reason() == kb::KVM_EXIT_UNKNOWN => {
                    return Err(Error::from_io("KVM_RUN", &std::io::Error::from_raw_os_error(errno)));
                }
                (other, _) => return Ok(other),
            }
        }
    }

    /// For a VMM with its own loop: what KVM_RUN's return means. `errno` is None if it succeeded.
    pub fn handle_exit(&self, errno: Option<i32>) -> Result<Exit> {
        let mut own = self.own()?;
        self.attach(&mut own)?;
        self.check_open()?;
        let exit = self.exit(&mut own, errno.map_or(Ok(()), Err), self.resumes);
        if let Ok(Exit::Handled) = exit {
            self.run.clear_exit_reason();
        }
        self.back_to_vmm(&mut own, &exit);
        exit
    }

    /// The end of a call of a VMM with its own loop. A turn lasts until the VMM has something to do, as with `run`: what is told later of a fault
    /// that the vCPU had before is no news.
    #[inline]
    fn back_to_vmm(&self, own: &mut Own, exit: &Result<Exit>) {
        own.is_away = !matches!(exit, Ok(Exit::Handled));
        if own.is_away {
            self.seat.next_turn();
        }
        self.seat.refresh();
    }

    /// For a VMM with its own loop: what is to be done before KVM_RUN.
    pub fn resume(&self) -> Result<Exit> {
        let mut own = self.own()?;
        self.attach(&mut own)?;
        self.check_open()?;
        if own.is_away {
            // Its thread may have touched memory as the VMM's meanwhile.
            self.seat.next_turn();
            self.seat.see_nudges();
        }
        let exit = self.before_run(&mut own);
        self.back_to_vmm(&mut own, &exit);
        exit
    }

    /// Finishes what an interruption left; brings what KVM itself accesses, before the first KVM_RUN and after a device's exit.
    fn before_run(&self, own: &mut Own) -> Result<Exit> {
        if !own.has_looked {
            own.has_looked = true;
            own.unfinished = self.is_left_unfinished();
        }
        if own.unfinished {
            let exit = match self.run.exit_reason() {
                kb::KVM_EXIT_MMIO => self.finish(own, true)?,
                _ => self.name_area(own, true)?,
            };
            if exit != Exit::Handled {
                return Ok(exit);
            }
        }
        if !own.prepared {
            match self.bring_areas(own)? {
                Exit::Handled => {}
                other => return Ok(other),
            }
            match self.load_first_table(own)? {
                Exit::Handled => {}
                other => return Ok(other),
            }
            own.prepared = true;
            own.tables_due = true;
        }
        if own.tables_due {
            return self.bring_tables(own);
        }
        Ok(Exit::Handled)
    }

    /// For a VMM with its own loop: brings the pages that hold a range, as if the guest had touched them.
    pub fn resolve(&self, gpa: u64, len: u64) -> Result<Exit> {
        let mut own = self.own()?;
        self.attach(&mut own)?;
        self.check_open()?;
        let end = match gpa.checked_add(len) {
            Some(end) if len > 0 => end,
            _ => fail!(EINVAL, "len: is 0, or gpa {gpa:#x} plus {len:#x} wraps around"),
        };
        self.bring_range(&mut own, 0, gpa, end, true)
    }

    fn bring_range(&self, own: &mut Own, space: u32, gpa: u64, end: u64, interruptible: bool) -> Result<Exit> {
        let deaf = Deaf(&self.seat.sleeper);
        let waiter: &dyn Waiter = if interruptible { self.seat } else { &deaf };
        let slots = self.vm.engine.memory.slots();
        let mut at = gpa;
        while at < end {
            let Some(slot) = slots.at(space, at) else { fail!(ENOENT, "gpa: {at:#x} is in no slot") };
            let page = slot.page_of(at);
            if slot.block.is_deferred(page) {
                install::map_present(&self.vm.engine.memory, &slot.block, page, &self.seat.stats)?;
            }
            if slot.block.pages.get(page) != State::Present {
                let exit = match self.bring(&slots, &slot.block, page, 0, waiter)? {
                    Outcome::Retry => self.again(own, slot, page, interruptible)?,
                    Outcome::Interrupted if !interruptible => continue,
                    Outcome::Gone => fail!(ENOENT, "slot {:#x} was deleted meanwhile", slot.region.slot),
                    outcome => self.settled(own, slot, page, outcome)?,
                };
                if exit != Exit::Handled {
                    return Ok(exit);
                }
                continue;
            }
            at = slot.gpa_of(page) + slot.block.page;
        }
        Ok(Exit::Handled)
    }

    /// The last memory error.
    pub fn memory_error(&self) -> Result<Option<MemoryError>> {
        Ok(*self.memory_error.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Was its VM freed?
    pub fn has_ended(&self) -> bool {
        self.vm.engine.is_shut_down()
    }

    fn check_open(&self) -> Result<()> {
        if self.vm.engine.is_shut_down() {
            fail!(ESHUTDOWN, "the VM was freed");
        }
        Ok(())
    }

    fn exit(&self, own: &mut Own, ret: std::result::Result<(), i32>, interruptible: bool) -> Result<Exit> {
        let run = &self.run;
        // KVM has ended whatever was unfinished.
        (own.has_looked, own.unfinished, own.told) = (true, false, None);
        if ret != Err(libc::EINTR) {
            self.seat.forget_bus();
        }
        match ret {
            Err(libc::EINTR) => self.interrupted(own),
            Err(errno) => {
                if let Some(fault) = self.vm.host.abi.and_then(|abi| abi.decode(errno, run)) {
                    return self.fault_at_gpa(own, fault.gpa, fault.access);
                }
                if let Some(news) = self.seat.take_news() {
                    return self.receive(news);
                }
                if let Some(exit) = (errno == libc::EFAULT).then(|| self.lost_somewhere()).flatten() {
                    return Ok(exit);
                }
                match errno {
                    libc::EFAULT if run.exit_reason() != kb::KVM_EXIT_MEMORY_FAULT => fail!(
                        EFAULT,
                        "KVM_RUN failed with EFAULT and did not say where: a memslot's host memory can't be accessed (unmapped, or not writable?)"
                    ),
                    _ => Ok(Exit::Pass),
                }
            }
            Ok(()) => match run.exit_reason() {
                kb::KVM_EXIT_MMIO => {
                    let exit = self.finish(own, interruptible)?;
                    own.tables_due |= exit == Exit::Pass;
                    Ok(exit)
                }
                kb::KVM_EXIT_IO => {
                    (own.stuck, own.tables_due) = (0, true);
                    Ok(Exit::Pass)
                }
                kb::KVM_EXIT_X86_WRMSR if self.vm.filters_msrs => self.name_area(own, interruptible),
                kb::KVM_EXIT_INTERNAL_ERROR if run.words()[0] as u32 == kb::KVM_INTERNAL_ERROR_EMULATION => {
                    self.emulation_failed(own)
                }
                _ => {
                    own.stuck = 0;
                    Ok(Exit::Pass)
                }
            },
        }
    }

    fn fault_at_gpa(&self, own: &mut Own, gpa: u64, access: Access) -> Result<Exit> {
        let slots = self.vm.engine.memory.slots();
        match slots.at(self.run.space(), gpa) {
            Some(slot) => self.fault(own, &slots, slot, gpa, access, false),
            None => Ok(Exit::Pass), // the VMM's: private/shared conversion, or a slot that isn't ours
        }
    }

    /// A page that the guest needs.
    fn fault(&self, own: &mut Own, slots: &Slots, slot: &Slot, gpa: u64, access: Access, broken: bool) -> Result<Exit> {
        let (block, page) = (&slot.block, slot.page_of(gpa));
        let outcome = self.bring(slots, block, page, access, self.seat)?;
        match outcome {
            Outcome::WasPresent => self.map(own, slot, page, broken),
            Outcome::Retry => self.again(own, slot, page, true),
            other => {
                if self.vm.pre_fault && matches!(other, Outcome::Installed | Outcome::Waited) {
                    self.pre_fault(own, slot, page);
                }
                self.settled(own, slot, page, other)
            }
        }
    }

    /// Maps in stage 2 what has just become present: the page, and what the resolver installed beside it. A help and no more: if it fails,
    /// the guest's retry does the same.
    fn pre_fault(&self, own: &mut Own, slot: &Slot, page: u64) {
        if own.no_pre_fault {
            return;
        }
        let plan = self.seat.runs.try_lock().map_or(Plan::ALONE, |runs| runs.last());
        let window = match plan.is_contiguous() {
            true => readahead::window(slot, page, &plan),
            false => page..page + 1,
        };
        let is_there = |&p: &u64| slot.block.pages.get(p) == State::Present;
        let end = page + 1 + (page + 1..window.end).take_while(is_there).count() as u64;
        let start = page - (window.start..page).rev().take_while(is_there).count() as u64;
        match self.fd.pre_fault(slot.gpa_of(start), (end - start) * slot.block.page) {
            Err(e) if ![libc::EAGAIN, libc::EINTR, libc::EFAULT, libc::ENOENT].contains(&e.errno) => {
                own.no_pre_fault = true
            }
            _ => {}
        }
    }

    fn bring(
        &self,
        slots: &Slots,
        block: &Arc<Block>,
        page: u64,
        access: Access,
        waiter: &dyn Waiter,
    ) -> Result<Outcome> {
        let need = Need {
            origin: Origin::Vcpu(self.seat.number),
            access,
            waiter: Some(waiter),
            stats: &self.seat.stats,
            more: More::Ahead(&self.seat.runs),
        };
        let _serving = self.seat.faults_at(block.hva_of(page));
        self.vm.engine.resolve(slots, block, page, &need)
    }

    /// Outcomes that need nothing more.
    #[inline]
    fn settled(&self, own: &mut Own, slot: &Slot, page: u64, outcome: Outcome) -> Result<Exit> {
        match outcome {
            Outcome::Lost | Outcome::Interrupted => self.settled_badly(slot, page, outcome),
            _ => {
                own.stuck = 0;
                Ok(Exit::Handled)
            }
        }
    }

    #[cold]
    fn settled_badly(&self, slot: &Slot, page: u64, outcome: Outcome) -> Result<Exit> {
        match outcome {
            Outcome::Lost => {
                let (gpa, hva) = (Some(slot.gpa_of(page)), slot.block.hva_of(page));
                Ok(self.report(MemoryError { gpa, hva, len: slot.block.page, lost: true }))
            }
            _ => self.look_up(),
        }
    }

    /// PRESENT and still faulting: map it, unless it is broken. Again and again, and somebody works against us.
    fn map(&self, own: &mut Own, slot: &Slot, page: u64, broken: bool) -> Result<Exit> {
        let block = &slot.block;
        let times = self.stuck_present(own, block, page);
        if times >= MOST_MAPS {
            own.stuck = 0;
            fail!(
                ELOOP,
                "vCPU {} faults at gpa {:#x} again and again ({times} times), though the page is present",
                self.seat.number,
                slot.gpa_of(page)
            );
        }
        let mechanism = MECHANISMS[block.mechanism];
        match mechanism.map_present(&self.vm.engine.memory, block, page, &self.seat.stats) {
            Ok(()) if !broken => Ok(Exit::Handled),
            Err(e) if e.errno == libc::EFAULT => Err(e.context(format!(
                "gpa {:#x} is present but its memory is gone (dropped without kvmfault_pages_discard?)",
                slot.gpa_of(page)
            ))),
            Err(e) if e.errno != libc::EHWPOISON => Err(e),
            // Broken, or what told so (SIGBUS; with the flag, which brings none, the attempt to map it) met the marker that it had a moment
            // ago.
            _ if self.is_broken(block, page, block.kvm_hva_of(page)) => Ok(self.report_broken(own, slot, page)),
            _ => Ok(Exit::Handled),
        }
    }

    /// The resolver wants to be asked again: after a pause that a kick ends, if the caller can come back.
    fn again(&self, own: &mut Own, slot: &Slot, page: u64, interruptible: bool) -> Result<Exit> {
        let hva = slot.block.hva_of(page);
        let times = self.stuck_at(own, hva);
        if times > MOST_RETRIES {
            own.stuck = 0;
            fail!(
                ELOOP,
                "the resolver asked vCPU {} for {times} retries at gpa {:#x}",
                self.seat.number,
                slot.gpa_of(page)
            );
        }
        let until = Instant::now() + pause_before(times);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if interruptible && self.seat.must_leave() {
                return self.look_up();
            }
            if left.is_zero() {
                return Ok(Exit::Handled);
            }
            WAITS.wait(hva, &self.seat.sleeper, left.min(look_around()), || !(interruptible && self.seat.must_leave()));
        }
    }

    /// How often in a row this vCPU has come to this page without progress.
    fn stuck_at(&self, own: &mut Own, hva: u64) -> u32 {
        own.stuck = if own.stuck_at == hva { own.stuck + 1 } else { 1 };
        own.stuck_at = hva;
        own.stuck
    }

    /// The same for a page that is PRESENT. That others take pages away is progress, too.
    fn stuck_present(&self, own: &mut Own, block: &Block, page: u64) -> u32 {
        let discards = self.vm.engine.memory.gates.discards(block.gate_of(page));
        if discards.is_none() || discards != own.discards {
            own.stuck = 0;
        }
        own.discards = discards;
        self.stuck_at(own, block.hva_of(page))
    }

    fn report(&self, error: MemoryError) -> Exit {
        *self.memory_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        Exit::MemoryError
    }
}
