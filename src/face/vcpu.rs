//! vCPUs.

use super::vm::Vm;
use crate::error::Result;
use crate::kernel::address::{Gpa, Hva};
use crate::resolve::not_in_callback;
use crate::resolve::seat::Seat;
use crate::stats::snapshot::Stats;
use crate::vcpu::{self, Sigbus};
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

/// How a [`Vcpu`] is set up. Made by [`Vcpu::options`].
#[derive(Debug, Clone)]
#[must_use = "options do nothing until `attach` is called"]
pub struct VcpuOptions<'a> {
    fd: BorrowedFd<'a>,
    kick_signal: Option<i32>,
    by_handler: bool,
    resumes: bool,
}

impl<'a> VcpuOptions<'a> {
    /// The signal that [`Kicker::kick`] sends to the vCPU's thread; the library's alone in that
    /// thread. Without, SIGURG.
    pub fn kick_signal(self, signal: i32) -> VcpuOptions<'a> {
        VcpuOptions { kick_signal: Some(signal), ..self }
    }

    /// The VMM has a SIGBUS handler that calls [`Kicker::on_sigbus`], and a handler for
    /// `kick_signal` (doing nothing is enough). Without this, both signals are blocked in the
    /// vCPU's thread, and no handler is needed.
    pub fn by_handler(self, kick_signal: i32) -> VcpuOptions<'a> {
        VcpuOptions { kick_signal: Some(kick_signal), by_handler: true, ..self }
    }

    /// The VMM has its own loop, and calls [`Vcpu::resume`] before each `KVM_RUN`.
    pub fn resumes(self) -> VcpuOptions<'a> {
        VcpuOptions { resumes: true, ..self }
    }

    /// Attaches to the vCPU, which must be one of this VM. Call it on the thread that runs the
    /// vCPU: without [`by_handler`](Self::by_handler) it blocks SIGBUS and the kick signal there
    /// until the handle is dropped there. Not from callbacks.
    pub fn attach(self, vm: &Vm) -> Result<Vcpu> {
        let vm = vm.outside_callbacks("VcpuOptions::attach")?;
        let options = vcpu::Options {
            fd: self.fd.as_raw_fd(),
            run: None,
            sigbus: if self.by_handler { Sigbus::ByHandler } else { Sigbus::ByMask },
            signal: self.kick_signal,
            resumes: self.resumes,
        };
        vcpu::Vcpu::new(vm, options).map(|inner| Vcpu { inner })
    }
}

/// What became of a run or an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// The exit was the library's, and is served: call `KVM_RUN` again. [`Vcpu::run`] never returns
    /// it.
    Handled,
    /// The exit is the VMM's: look at `kvm_run`, or at `KVM_RUN`'s errno, as if the library were
    /// not there.
    Pass,
    /// A kick or a signal ended the run; `kvm_run` holds no exit.
    Interrupted,
    /// The guest touched memory that is lost or broken.
    MemoryError(MemoryError),
}

/// Memory that the guest can't have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryError {
    /// Guest physical address; `None` if it is in no memslot of the library, or can't be known.
    pub gpa: Option<u64>,
    /// The address in this process.
    pub hva: u64,
    /// The page's size in bytes.
    pub len: u64,
    /// True: the resolver or [`Vm::lose`](crate::Vm::lose) said that the page is lost. False: the
    /// hardware broke.
    pub lost: bool,
}

/// A vCPU whose faults the library serves on the vCPU's own thread.
///
/// [`run`](Self::run) and [`handle_exit`](Self::handle_exit) are for the thread that runs the vCPU;
/// another thread that calls them meanwhile gets `EBUSY`.
///
/// ```no_run
/// # use std::os::fd::BorrowedFd;
/// # fn vcpu() -> (kvmfault::Vm, BorrowedFd<'static>) { unimplemented!() }
/// # fn main() -> Result<(), kvmfault::Error> {
/// # let (vm, fd) = vcpu();
/// use kvmfault::{Exit, Vcpu};
///
/// let vcpu = Vcpu::options(fd).attach(&vm)?;
/// loop {
///     match vcpu.run()? {
///         Exit::Pass => break, // an exit for the VMM: look at kvm_run
///         Exit::MemoryError(error) => panic!("the guest needs memory that is lost: {error:?}"),
///         _ => {} // a kick
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct Vcpu {
    inner: vcpu::Vcpu,
}

impl Vcpu {
    /// What a vCPU is made from: the descriptor that `KVM_CREATE_VCPU` returned. It is duplicated.
    pub fn options(fd: BorrowedFd<'_>) -> VcpuOptions<'_> {
        VcpuOptions { fd, kick_signal: None, by_handler: false, resumes: false }
    }

    fn outside_callbacks(&self, name: &str) -> Result<&vcpu::Vcpu> {
        not_in_callback(name)?;
        self.inner.check_process().map(|()| &self.inner)
    }

    fn exit(&self, exit: vcpu::Exit) -> Result<Exit> {
        Ok(match exit {
            vcpu::Exit::Handled => Exit::Handled,
            vcpu::Exit::Pass => Exit::Pass,
            vcpu::Exit::Interrupted => Exit::Interrupted,
            vcpu::Exit::MemoryError => {
                let error = self.inner.memory_error()?.expect("the exit says that there is one");
                let vcpu::MemoryError { gpa, hva, len, lost } = error;
                Exit::MemoryError(MemoryError { gpa: gpa.map(|gpa| gpa.0), hva: hva.0, len, lost })
            }
        })
    }

    /// Runs the guest (`KVM_RUN`) and serves its faults until there is something for the VMM. The
    /// registers must be set before the first call. Not from callbacks.
    ///
    /// [`Exit::Interrupted`], [`Exit::MemoryError`] or an error may leave the vCPU in the middle of
    /// an access that KVM emulates: before its state is saved, or it runs without the library, set
    /// `kvm_run.immediate_exit` and call this until `kvm_run.exit_reason` is neither
    /// `KVM_EXIT_MMIO` nor `KVM_EXIT_X86_WRMSR`.
    ///
    /// Fails with what the resolver returned; `ELOOP` (a page faults again and again without
    /// progress); `EFAULT` (KVM could not access a memslot's memory, and did not say where);
    /// `ESHUTDOWN` (the VM was closed); or the errno of `KVM_RUN`. The vCPU can be run again: the
    /// guest repeats the access.
    pub fn run(&self) -> Result<Exit> {
        let exit = self.outside_callbacks("Vcpu::run")?.run()?;
        self.exit(exit)
    }

    /// For a VMM with its own loop: what `KVM_RUN`'s return means; `errno` is `None` if it
    /// succeeded. Call it after each `KVM_RUN`, on the same thread, before anything of `kvm_run` is
    /// used: what a wrapper of `KVM_RUN` returns borrows from `kvm_run`, which this may write, so
    /// drop it first. Not from callbacks.
    pub fn handle_exit(&self, errno: Option<i32>) -> Result<Exit> {
        let exit = self.outside_callbacks("Vcpu::handle_exit")?.handle_exit(errno)?;
        self.exit(exit)
    }

    /// For a VMM with its own loop and [`VcpuOptions::resumes`]: call it before each `KVM_RUN`.
    /// [`Exit::Handled`] if `KVM_RUN` may be called. Not from callbacks.
    pub fn resume(&self) -> Result<Exit> {
        let exit = self.outside_callbacks("Vcpu::resume")?.resume()?;
        self.exit(exit)
    }

    /// For a VMM with its own loop: fetches the pages that hold a range, as if the guest had
    /// touched them; a kick ends the wait. [`Exit::Handled`] when all are present. Not from
    /// callbacks.
    pub fn resolve(&self, gpa: u64, len: u64) -> Result<Exit> {
        let exit = self.outside_callbacks("Vcpu::resolve")?.resolve(Gpa(gpa), len)?;
        self.exit(exit)
    }

    /// What ends this vCPU's runs from other threads and from signal handlers.
    pub fn kicker(&self) -> Kicker {
        Kicker { seat: self.inner.seat() }
    }

    /// The counters of this vCPU.
    pub fn stats(&self) -> Stats {
        self.inner.seat().stats.snapshot()
    }
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu").field("number", &self.inner.seat().number).finish_non_exhaustive()
    }
}

/// Kicks a vCPU, from any thread and from signal handlers. It may outlive the [`Vcpu`].
#[derive(Clone, Copy)]
pub struct Kicker {
    seat: &'static Seat,
}

impl Kicker {
    /// Makes the vCPU's [`run`](Vcpu::run) or [`handle_exit`](Vcpu::handle_exit) return
    /// [`Exit::Interrupted`] once, wherever it is: in the guest, waiting for a page, or about to
    /// enter. Never lost; kicks that come before one is seen count as one. Async-signal-safe. Does
    /// nothing once the vCPU is dropped.
    pub fn kick(&self) {
        let _ = self.seat.kick();
    }

    /// With [`VcpuOptions::by_handler`]: tells the library of a SIGBUS, from the VMM's handler on
    /// the vCPU's thread. `code` and `address` are the `si_code` and `si_addr` of its `siginfo_t`.
    /// False: the signal is the VMM's to handle. Async-signal-safe.
    pub fn on_sigbus(&self, code: i32, address: u64) -> bool {
        code == libc::BUS_MCEERR_AR && self.seat.note_bus(code, Hva(address))
    }
}

impl fmt::Debug for Kicker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kicker").field("vcpu", &self.seat.number).finish()
    }
}
