//! The vCPU's exit loop: which exits are faults, and how they are served.
//!
//! # What an architecture provides
//! `arch` is the room of the architecture that the library is built for (`x86_64/`, `aarch64/`),
//! and the only place in this room where it is named. Its part of the loop is:
//!
//! - `State`: what the architecture remembers from one KVM_RUN to the next; `Default`
//! - `Vcpu::other_exit(state, interruptible)`: serves an exit that is no memory fault (accesses
//!   that KVM could not complete), or passes it to the VMM
//! - `Vcpu::is_left_unfinished()`: whether kvm_run has such an exit that an earlier handle left in
//!   the middle
//! - `Vcpu::finish_exit(state, interruptible)`: goes on with it
//! - `Vcpu::prepare(state)`: makes present, before the first KVM_RUN, what KVM reads of guest
//!   memory beside `kernel::arch::areas`
//! - `Vcpu::resolve_walks(state)`: makes present, after a device's exit, the page tables that KVM
//!   may walk
//! - `Vcpu::sigbus_outside(state, slots, address)`: serves a SIGBUS at an address in no slot, if
//!   the architecture knows what it means
//! - `test_guest`: a guest for the unit tests

mod areas;
mod broken;
mod exit;
mod fault;
mod signals;
mod state;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "aarch64")]
use self::aarch64 as arch;
#[cfg(target_arch = "x86_64")]
use self::x86_64 as arch;

use self::state::{Due, LoopState};
use crate::error::{fail, Error, Result};
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::kvm::{Run, VcpuFd};
use crate::kernel::signal::{self, SignalSet};
use crate::resolve::seat::Seat;
use crate::vm::Vm;
use kvm_bindings as kb;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

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
    /// The vCPU's descriptor.
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

/// What an exit means to the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It was a fault, and is served: KVM_RUN again.
    Handled,
    /// It is the VMM's.
    Pass,
    /// A kick or a signal ended KVM_RUN, or a wait.
    Interrupted,
    /// The guest needs a page that can't be had: see `memory_error`.
    MemoryError,
}

/// A memory error for the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryError {
    /// None if the address is in no slot.
    pub gpa: Option<Gpa>,
    /// The address in this process.
    pub hva: Hva,
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
    state: Mutex<LoopState>,
    /// The last one; readable while another thread is in the vCPU's functions.
    memory_error: Mutex<Option<MemoryError>>,
}

impl Vcpu {
    /// Attaches to a vCPU, on the thread that runs it.
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
        let seat = Box::leak(Box::new(Seat::new(number, run.immediate_exit().clone(), signal, by_handler)));
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
            state: Mutex::default(),
            memory_error: Mutex::default(),
        };
        vcpu.attach(&mut *vcpu.state()?)?;
        vm.engine.check_begun()?;
        Ok(vcpu)
    }

    #[inline]
    fn state(&self) -> Result<MutexGuard<'_, LoopState>> {
        self.state.try_lock().map_err(unavailable)
    }

    /// ECHILD in a child of the process that made the vCPU's VM.
    pub fn check_process(&self) -> Result<()> {
        self.vm.check_process()
    }

    /// The descriptor by which a forked child would keep the VM alive.
    pub fn descriptor(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The part of the vCPU that any thread may use.
    pub fn seat(&self) -> &'static Seat {
        self.seat
    }

    /// Runs the guest until an exit that is the VMM's.
    pub fn run(&self) -> Result<Exit> {
        let mut state = self.state()?;
        self.attach(&mut state)?;
        self.seat.next_turn();
        self.seat.acknowledge_nudges(); // whose signals came in the VMM's own code
        self.seat.refresh(&self.run);
        match self.before_run(&mut state)? {
            Exit::Handled => {}
            other => return Ok(other),
        }
        loop {
            self.check_open()?;
            // A kick's signal may be over. KVM_RUN then still completes what the last exit left,
            // and returns at once.
            self.seat.refresh(&self.run);
            self.run.clear_exit_reason();
            let ret = self.fd.run();
            match (self.exit(&mut state, ret, true)?, ret) {
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
        let mut state = self.state()?;
        self.attach(&mut state)?;
        self.check_open()?;
        let exit = self.exit(&mut state, errno.map_or(Ok(()), Err), self.resumes);
        if let Ok(Exit::Handled) = exit {
            self.run.clear_exit_reason();
        }
        self.back_to_vmm(&mut state, &exit);
        exit
    }

    /// The end of a call of a VMM with its own loop. A turn lasts until the VMM has something to
    /// do, as with `run`: what is reported later of a fault that the vCPU had before is outdated.
    #[inline]
    fn back_to_vmm(&self, state: &mut LoopState, exit: &Result<Exit>) {
        state.is_away = !matches!(exit, Ok(Exit::Handled));
        if state.is_away {
            self.seat.next_turn();
        }
        self.seat.refresh(&self.run);
    }

    /// For a VMM with its own loop: what is to be done before KVM_RUN.
    pub fn resume(&self) -> Result<Exit> {
        let mut state = self.state()?;
        self.attach(&mut state)?;
        self.check_open()?;
        if state.is_away {
            // Meanwhile its thread may have touched memory in the VMM's own code.
            self.seat.next_turn();
            self.seat.acknowledge_nudges();
        }
        let exit = self.before_run(&mut state);
        self.back_to_vmm(&mut state, &exit);
        exit
    }

    /// Does what is due. The VMM gets any exit that keeps the guest from running.
    fn before_run(&self, state: &mut LoopState) -> Result<Exit> {
        loop {
            let (exit, done): (Exit, fn(&mut Due)) = match state.due {
                Due::Nothing => return Ok(Exit::Handled),
                Due::Look => {
                    state.due.looked(self.is_left_unfinished());
                    continue;
                }
                // It calls `finished` itself.
                Due::Finish { .. } => (self.finish_exit(state, true)?, |_| {}),
                Due::Prepare => match self.resolve_areas(state)? {
                    Exit::Handled => (self.prepare(state)?, Due::prepared),
                    other => return Ok(other),
                },
                Due::Walk => (self.resolve_walks(state)?, Due::walked),
            };
            match exit {
                Exit::Handled => done(&mut state.due),
                other => return Ok(other),
            }
        }
    }

    /// For a VMM with its own loop: makes the pages that hold a range present, as if the guest had
    /// touched them.
    pub fn resolve(&self, gpa: Gpa, len: u64) -> Result<Exit> {
        let mut state = self.state()?;
        self.attach(&mut state)?;
        self.check_open()?;
        let end = match gpa.checked_add(len) {
            Some(end) if len > 0 => end,
            _ => fail!(EINVAL, "len: is 0, or gpa {gpa:#x} plus {len:#x} wraps around"),
        };
        self.resolve_range(&mut state, 0, gpa, end, true)
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

    fn report(&self, error: MemoryError) -> Exit {
        *self.memory_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        Exit::MemoryError
    }
}

#[cold]
fn unavailable(error: TryLockError<MutexGuard<'_, LoopState>>) -> Error {
    match error {
        TryLockError::WouldBlock => Error::new(libc::EBUSY, "this vCPU is in use by another thread"),
        TryLockError::Poisoned(_) => Error::new(libc::ENOTRECOVERABLE, "an earlier call on this vCPU panicked"),
    }
}
