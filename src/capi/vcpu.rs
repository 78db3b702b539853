//! vCPUs.

use super::boundary::{clear_out, enter, not_in_callback, put, with, Handle, Opaque};
use super::structs::{self, Out};
use super::vm::kvmfault_vm;
use crate::error::{fail, Error, Result};
use crate::kernel::kvm::Run;
use crate::vcpu::{Exit, Options, Sigbus, Vcpu};
use std::ffi::{c_int, c_void};
use std::os::fd::RawFd;
use std::ptr::NonNull;

/// `kvmfault_vcpu_options.sigbus`: SIGBUS and the kick signal are blocked in the vCPU's thread and let through only inside
/// KVM_RUN (KVM_SET_SIGNAL_MASK), where they end the run and are fetched with sigtimedwait(2). No signal handler is needed.
pub const KVMFAULT_SIGBUS_BY_MASK: c_int = 0;

/// `kvmfault_vcpu_options.sigbus`: the VMM has a SIGBUS handler that calls `kvmfault_vcpu_on_sigbus`, and a handler
/// (doing nothing is enough) for the kick signal. Neither may be blocked in the vCPU's thread.
///
/// kvm_run->immediate_exit is then shared: the library has bit 1 (the value 2) for its own kicks, and a VMM that kicks by itself writes 1. It may write
/// 0 at any time before `kvmfault_vcpu_run` or `kvmfault_vcpu_resume`, which set the library's bit again where it is due; between one of these and
/// KVM_RUN, or with a loop of its own without KVMFAULT_VCPU_RESUMES, it clears bit 0 only.
pub const KVMFAULT_SIGBUS_BY_HANDLER: c_int = 1;

/// `kvmfault_vcpu_options.flags`: the VMM has its own loop and calls `kvmfault_vcpu_resume` before each KVM_RUN.
pub const KVMFAULT_VCPU_RESUMES: u32 = 1 << 0;

/// A vCPU of such a VM. Opaque. `run` and `handle_exit` belong to the vCPU's thread; what takes it `const` may be called
/// from any thread.
pub struct kvmfault_vcpu {
    _private: [u8; 0],
}

/// What `kvmfault_vcpu_new` needs. Start from KVMFAULT_VCPU_OPTIONS_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_vcpu_options {
    /// Set by KVMFAULT_VCPU_OPTIONS_INIT.
    pub size: usize,
    /// The vCPU (KVM_CREATE_VCPU). Duplicated.
    pub fd: c_int,
    /// KVMFAULT_SIGBUS_BY_MASK or KVMFAULT_SIGBUS_BY_HANDLER.
    pub sigbus: c_int,
    /// The vCPU's struct kvm_run, mapped by the VMM for as long as the handle lives; NULL: the library maps it.
    pub run: *mut c_void,
    /// The signal that `kvmfault_vcpu_kick` sends to the vCPU's thread; the library's alone in that thread.
    /// 0 means SIGURG (by mask); by handler it must be given, and the handler runs for the library's own purposes too, so that system calls
    /// of the thread may end with EINTR without a kick (SA_RESTART avoids that). It shouldn't set `immediate_exit`.
    pub kick_signal: c_int,
    /// KVMFAULT_VCPU_* bits.
    pub flags: u32,
}

/// What `kvmfault_vcpu_handle_exit` returns: the exit was the library's; call KVM_RUN again.
pub const KVMFAULT_HANDLED: c_int = 0;

/// The exit is the VMM's: look at kvm_run (or at KVM_RUN's errno) as if the library were not there.
pub const KVMFAULT_PASS: c_int = 1;

/// A kick or a signal ended the run; kvm_run holds no exit.
pub const KVMFAULT_INTERRUPTED: c_int = 2;

/// The guest touched memory that is lost (KVMFAULT_LOST) or broken (hardware): `kvmfault_vcpu_memory_error` tells which.
pub const KVMFAULT_MEMORY_ERROR: c_int = 3;

/// The memory error that ended a run with KVMFAULT_MEMORY_ERROR. Start from KVMFAULT_MEMORY_ERROR_INFO_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_memory_error_info {
    /// Set by KVMFAULT_MEMORY_ERROR_INFO_INIT.
    pub size: usize,
    /// Guest physical address, or UINT64_MAX if the address lies in no memslot of the library, or (lost pages before Linux 6.6, more than
    /// one) is not known.
    pub gpa: u64,
    /// The address in this process.
    pub hva: *mut c_void,
    /// Bytes concerned: the page.
    pub len: u64,
    /// 1: the page is LOST, as the VMM said. 0: the kernel reported a broken page (hwpoison) that was PRESENT.
    pub lost: c_int,
    /// Always 0.
    pub reserved: u32,
}

impl Opaque for kvmfault_vcpu {
    type Inner = Vcpu;
    const NAME: &'static str = "vcpu";
    const MAGIC: u64 = 0x6b76_6d66_7663_7075; // "kvmfvcpu"
    fn has_ended(vcpu: &Vcpu) -> bool {
        vcpu.has_ended()
    }

    fn descriptors(vcpu: &Vcpu) -> Vec<RawFd> {
        vec![vcpu.descriptor()]
    }
}

/// Takes a vCPU into the library's care. Call it on the thread that runs the vCPU: with KVMFAULT_SIGBUS_BY_MASK it blocks SIGBUS and the
/// kick signal there until `kvmfault_vcpu_free` is called there, and sets the vCPU's KVM_SET_SIGNAL_MASK to the rest of the
/// thread's mask. (A vCPU may move: the first `kvmfault_vcpu_run` on another thread sets that one up too. A thread that it leaves keeps the signals
/// blocked, unless the vCPU is freed there.) KVM_SET_SIGNAL_MASK waits while the vCPU is inside KVM_RUN on another thread.
///
/// On success *vcpu is the new handle; on an error it is NULL. Not from callbacks. Nothing of the VM or of its other vCPUs is changed or asked.
///
/// `options->fd` must be a vCPU of the VM that `vm` was made for. KVM has no way to ask, so this isn't checked. A vCPU of another VM does no harm, but
/// its guest finds `vm`'s memory where `vm` has a memslot and its own VM has none; its other exits are passed.
///
/// Errors: -EINVAL (an argument; the message names it), -EBADF (`fd` is closed, or `vm` was freed), -EEXIST (the vCPU has a handle already), -E2BIG
/// (see `size`), or the errno of a system call that the message names: of tgkill, rt_sigtimedwait and rt_sigprocmask, which vCPUs' signals need, if
/// a seccomp filter refuses one (docs/seccomp.md lists them). After an error signals and masks are as they were.
///
/// # Safety
/// The pointers are NULL or valid; `options->run` is NULL or the vCPU's kvm_run, mapped for as long as the handle lives.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_new(
    vm: *const kvmfault_vm,
    options: *const kvmfault_vcpu_options,
    vcpu: *mut *mut kvmfault_vcpu,
) -> c_int {
    let cleared = enter("kvmfault_vcpu_new", || clear_out(vcpu, "vcpu").map(|()| 0));
    if cleared < 0 {
        return cleared;
    }
    with("kvmfault_vcpu_new", vm, |vm| {
        not_in_callback("kvmfault_vcpu_new")?;
        let options = structs::read(options, "options")?;
        if options.flags & !KVMFAULT_VCPU_RESUMES != 0 {
            fail!(EINVAL, "options.flags: {:#x} has unknown bits", options.flags);
        }
        let sigbus = match options.sigbus {
            KVMFAULT_SIGBUS_BY_MASK => Sigbus::ByMask,
            KVMFAULT_SIGBUS_BY_HANDLER => Sigbus::ByHandler,
            other => fail!(EINVAL, "options.sigbus: {other} is not a KVMFAULT_SIGBUS_*"),
        };
        if options.run as usize % 4096 != 0 {
            fail!(EINVAL, "options.run: {:p} is not the start of a mapping", options.run);
        }
        let made = Vcpu::new(
            vm,
            Options {
                fd: options.fd,
                // SAFETY: the header asks for the vCPU's kvm_run, mapped while the handle lives.
                run: NonNull::new(options.run.cast()).map(|run| unsafe { Run::borrow(run) }),
                sigbus,
                signal: (options.kick_signal != 0).then_some(options.kick_signal),
                resumes: options.flags & KVMFAULT_VCPU_RESUMES != 0,
            },
        )?;
        put(vcpu, Handle::expose_vcpu(made));
        Ok(0)
    })
}

/// Gives a vCPU back. With KVMFAULT_SIGBUS_BY_MASK the vCPU has no KVM_SET_SIGNAL_MASK after it, and on its own thread what was blocked there is
/// unblocked, unless another vCPU of the thread needs it; on any other thread the vCPU's own keeps it blocked. Waits for kicks that are under way. NULL is allowed; a handle that was freed before is left
/// alone. Not while `run` is under way elsewhere: kick it out first (if you do, it is freed when that call returns). If the vCPU is to run on
/// without the library, not in the middle of an access that KVM emulates: see `kvmfault_vcpu_run`. A new handle of the vCPU takes such an access over.
///
/// # Safety
/// `vcpu` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_free(vcpu: *mut kvmfault_vcpu) {
    Handle::free("kvmfault_vcpu_free", vcpu, |_| {});
}

/// Runs the guest (KVM_RUN) and serves its faults until there is something for the VMM: KVMFAULT_PASS (an exit in kvm_run),
/// KVMFAULT_INTERRUPTED (a kick, a signal that the VMM handles, or by mask a SIGBUS that a process sent),
/// KVMFAULT_MEMORY_ERROR, or -errno. Never KVMFAULT_HANDLED. On the
/// vCPU's thread; not from callbacks.
///
/// With `poison-trap`, what KVM itself writes for a guest fails quietly on an absent page. So the areas of the wall clock, kvmclock, steal time, PV EOI
/// and async page faults, and where system management mode saves the registers, are brought before the first KVM_RUN, as the vCPU's MSRs are
/// then. Those that a guest names later it has mostly written to before; for others there is KVMFAULT_VM_FILTER_MSRS.
/// So are the guest's page tables for what RSI and RDI point to, then and after each exit to a device: for the memory of a string instruction
/// (INS, OUTS, MOVS) KVM walks them itself, and takes an absent one for a page that the guest hasn't mapped. Not known in time is
/// what the first word of an OUTS needs that the guest hasn't touched before. The registers must be set before the first call; in PAE
/// mode the first table is read anew then if it was absent (KVM_SET_SREGS reads it, and says nothing).
///
/// INTERRUPTED, an error or MEMORY_ERROR may leave the vCPU in the middle of an access that KVM emulates, or of a filtered write to an MSR. Then
/// kvm_run->exit_reason is KVM_EXIT_MMIO or KVM_EXIT_X86_WRMSR, until the next call has finished it; the VMM leaves that exit in kvm_run alone. It
/// outlives the handle: one that is made anew for the vCPU finishes it in its first call of this or of `kvmfault_vcpu_resume`. Before the vCPU's state is
/// saved, migrated or reset, or the vCPU runs without the library, do as KVM's documentation says for KVM_EXIT_MMIO: set kvm_run->immediate_exit and
/// call this until the exit reason is neither. If the page won't come, `kvmfault_pages_lost` gives it up.
///
/// KVMFAULT_MEMORY_ERROR: `kvmfault_vcpu_memory_error` tells where. The next call repeats the access: if the page was discarded meanwhile
/// (`kvmfault_pages_discard`) the resolver is asked anew, and the guest gets its bytes. If the page is lost or broken still, an access of native code is
/// told again, but one that KVM emulates is given up in the second call: the guest reads ones, what it wrote is dropped, and a machine check that the
/// VMM has injected is delivered then.
///
/// Errors: what the resolver returned; -EPROTO (the resolver broke its contract); -EFAULT (KVM could not access a slot's host
/// memory, and did not say where); -ELOOP (a page faults again and again without progress); -ESHUTDOWN (the VM was freed); -EBUSY (another
/// thread is in this vCPU's functions); or the errno of KVM_RUN, or of a system call that the message names (refused by a seccomp filter; to
/// reader threads, too). After an error the vCPU can be run again: the guest repeats the access.
///
/// # Safety
/// `vcpu` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_run(vcpu: *mut kvmfault_vcpu) -> c_int {
    with("kvmfault_vcpu_run", vcpu, |vcpu| {
        not_in_callback("kvmfault_vcpu_run")?;
        vcpu.run().map(number)
    })
}

/// For a VMM with its own loop: what KVM_RUN's return means. `ret` is 0 or more if KVM_RUN succeeded, else -errno (-1 is taken as "see
/// errno", so that ioctl's own result may be passed). Call it after each KVM_RUN, on the same thread, before anything that changes errno.
///
/// Returns KVMFAULT_HANDLED (the fault is served: KVM_RUN again), KVMFAULT_PASS (the VMM's: exits in kvm_run, or KVM_RUN's own errno),
/// KVMFAULT_INTERRUPTED, KVMFAULT_MEMORY_ERROR, or -errno as `kvmfault_vcpu_run`. With KVMFAULT_VCPU_RESUMES see `kvmfault_vcpu_resume`. Not
/// from callbacks.
///
/// After an error and after KVMFAULT_MEMORY_ERROR, a VMM that goes on all the same calls `kvmfault_vcpu_resume` until it returns KVMFAULT_HANDLED, and
/// KVM_RUN only then, also without KVMFAULT_VCPU_RESUMES: the guest may be in the middle of an access that KVM emulates, and KVM_RUN alone would give
/// it wrong bytes (ones, after a memory error), or lose what it wrote. The same holds for the first KVM_RUN of a handle made for a vCPU that was left so.
///
/// -EBUSY: another thread is in this vCPU's functions. Nothing was looked at: call this again with the same `ret`, before KVM_RUN.
///
/// # Safety
/// `vcpu` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_handle_exit(vcpu: *mut kvmfault_vcpu, ret: c_int) -> c_int {
    let errno = match ret {
        0.. => None,
        // v2 of the flag fails with EPERM, which is 1: then both readings agree.
        -1 => Some(std::io::Error::last_os_error().raw_os_error().filter(|&e| e != 0).unwrap_or(libc::EPERM)),
        _ => Some(ret.wrapping_neg()),
    };
    with("kvmfault_vcpu_handle_exit", vcpu, |vcpu| {
        not_in_callback("kvmfault_vcpu_handle_exit")?;
        vcpu.handle_exit(errno).map(number)
    })
}

/// For a VMM with its own loop and KVMFAULT_VCPU_RESUMES: call it before each KVM_RUN. It finishes an access of the guest that KVM emulates
/// (or a filtered write to an MSR) and that an INTERRUPTED left in the middle; KVM_RUN without that would give the guest wrong bytes. (Without the flag such waits are not
/// interrupted.) And it brings what `kvmfault_vcpu_run` brings before KVM_RUN; without the flag that is the VMM's to do
/// (`kvmfault_vcpu_resolve`). Returns KVMFAULT_HANDLED if KVM_RUN may be called, or else as `kvmfault_vcpu_handle_exit`.
///
/// # Safety
/// `vcpu` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_resume(vcpu: *mut kvmfault_vcpu) -> c_int {
    with("kvmfault_vcpu_resume", vcpu, |vcpu| {
        not_in_callback("kvmfault_vcpu_resume")?;
        vcpu.resume().map(number)
    })
}

/// With KVMFAULT_SIGBUS_BY_HANDLER: tells the library of a SIGBUS, from the VMM's handler on the vCPU's thread. Returns 1 if the next
/// `run` or `handle_exit` will see to it, 0 if the signal is none of KVM's for a vCPU (its code is not BUS_MCEERR_AR; or it is the same as one
/// that neither has seen yet: the thread touches broken memory itself, and would so for ever) and is the VMM's to handle, -EINVAL, -EBADF or -ECHILD for
/// a bad handle. `code` and `address` are si_code and si_addr of the handler's siginfo_t. Async-signal-safe; leaves errno alone.
///
/// # Safety
/// `vcpu` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_on_sigbus(
    vcpu: *const kvmfault_vcpu,
    code: c_int,
    address: *const c_void,
) -> c_int {
    let seat = match Handle::<Vcpu>::seat_of(vcpu) {
        Ok(seat) => seat,
        Err(error) => return error,
    };
    (code == libc::BUS_MCEERR_AR && seat.note_bus(code, address as u64)).into()
}

/// Makes `run` or `handle_exit` of this vCPU return KVMFAULT_INTERRUPTED once, wherever the vCPU is: in the guest, in KVM_RUN, waiting for
/// a page, or about to enter. Never lost; kicks that come before one is seen count as one. Any thread, any signal handler (that of the kick
/// signal, too), also in callbacks: async-signal-safe, and leaves errno alone. Returns 0, -EINVAL (NULL), -EBADF (freed), -ECHILD, or the errno of tgkill(2)
/// (-EPERM where a seccomp filter refuses it): then the kick is seen when the loop looks next.
///
/// May race with `kvmfault_vcpu_free`, which waits for kicks that are under way. With KVMFAULT_SIGBUS_BY_MASK no kick signal is left when it
/// returns, so the signal needs no handler.
///
/// Three limits: a resolver that runs on the vCPU's thread is not interrupted, also not where it hangs in the kernel because the source that it reads
/// doesn't answer (the signal is blocked there by mask; a resolver that must be left reads with a timeout, or answers KVMFAULT_PENDING); with `userfaultfd` a vCPU whose access KVM emulates (CPL 0
/// on a KVM without hardware virtualisation) sleeps inside KVM's copy until its page comes; and before Linux 6.2 a vCPU that sleeps in
/// classic userfaultfd is not either, nor told of its resolver's failure, until its page comes.
///
/// # Safety
/// `vcpu` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_kick(vcpu: *const kvmfault_vcpu) -> c_int {
    let seat = match Handle::<Vcpu>::seat_of(vcpu) {
        Ok(seat) => seat,
        Err(error) => return error,
    };
    // SAFETY: errno is this thread's own.
    let errno = unsafe { *libc::__errno_location() };
    let failed = seat.kick();
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    -failed
}

/// For a VMM with its own loop: brings the pages that hold [gpa, gpa + len), through the resolver, on the vCPU's thread, as if the guest had touched
/// them; a kick ends the wait. For what KVM itself accesses outside of guest instructions, see `kvmfault_pages_resolve`. Address space 0; the range is rounded outwards to pages, and may span slots.
///
/// Returns KVMFAULT_HANDLED when all are present, KVMFAULT_INTERRUPTED (call it again), KVMFAULT_MEMORY_ERROR, or -errno as `kvmfault_vcpu_run`;
/// -ENOENT if a page is in no slot, -EINVAL for `len`. Not from callbacks.
///
/// # Safety
/// `vcpu` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_resolve(vcpu: *mut kvmfault_vcpu, gpa: u64, len: u64) -> c_int {
    with("kvmfault_vcpu_resolve", vcpu, |vcpu| {
        not_in_callback("kvmfault_vcpu_resolve")?;
        vcpu.resolve(gpa, len).map(number)
    })
}

/// Tells of the last memory error of `run`, `handle_exit`, `resume` or `resolve`: 0, or -ENODATA if there was none. Any thread; it doesn't wait.
///
/// # Safety
/// The pointers are NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_memory_error(
    vcpu: *const kvmfault_vcpu,
    info: *mut kvmfault_memory_error_info,
) -> c_int {
    with("kvmfault_vcpu_memory_error", vcpu, |vcpu| -> Result<c_int> {
        let out = Out::new(info, "info")?;
        let error = vcpu.memory_error()?.ok_or_else(|| Error::new(libc::ENODATA, "this vCPU had no memory error"))?;
        let c = kvmfault_memory_error_info {
            size: 0,
            gpa: error.gpa.unwrap_or(u64::MAX),
            hva: error.hva as *mut _,
            len: error.len,
            lost: error.lost.into(),
            reserved: 0,
        };
        out.write(&c);
        Ok(0)
    })
}

fn number(exit: Exit) -> c_int {
    match exit {
        Exit::Handled => KVMFAULT_HANDLED,
        Exit::Pass => KVMFAULT_PASS,
        Exit::Interrupted => KVMFAULT_INTERRUPTED,
        Exit::MemoryError => KVMFAULT_MEMORY_ERROR,
    }
}
