//! vCPU: running the guest, its signals, kicks, and memory errors.
//!
//! A VMM either calls `kvmfault_vcpu_run` instead of KVM_RUN, or keeps its own loop: it calls
//! KVM_RUN itself and then `kvmfault_vcpu_handle_exit`, with `kvmfault_vcpu_resume` before each
//! KVM_RUN. All of these belong to the thread that runs the vCPU.

use super::boundary::{clear_out, enter, not_in_callback, put, with, Handle, Opaque};
use super::structs::{self, Out};
use super::vm::kvmfault_vm;
use crate::error::{fail, Error, Result};
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::kvm::Run;
use crate::kernel::page::page_size;
use crate::vcpu::{Exit, Options, Sigbus, Vcpu};
use std::ffi::{c_int, c_void};
use std::os::fd::RawFd;
use std::ptr::NonNull;

/// In `kvmfault_vcpu_options.sigbus`: SIGBUS and the kick signal are blocked in the vCPU's thread
/// and let through only inside KVM_RUN (KVM_SET_SIGNAL_MASK), where they end the run; the library
/// then fetches them with sigtimedwait(2). No signal handler is needed.
pub const KVMFAULT_SIGBUS_BY_MASK: c_int = 0;

/// In `kvmfault_vcpu_options.sigbus`: the VMM has a SIGBUS handler that calls
/// `kvmfault_vcpu_on_sigbus`, and a handler for the kick signal (doing nothing is enough). Neither
/// signal may be blocked in the vCPU's thread.
///
/// kvm_run->immediate_exit is then shared: the library uses bit 1 (the value 2) for its own kicks,
/// and a VMM that kicks by itself writes 1. The VMM may write 0 at any time before
/// `kvmfault_vcpu_run` or `kvmfault_vcpu_resume`, which set the library's bit again if it is due.
/// Between one of these and KVM_RUN, or in a loop of its own without KVMFAULT_VCPU_RESUMES, it
/// clears bit 0 only.
pub const KVMFAULT_SIGBUS_BY_HANDLER: c_int = 1;

/// In `kvmfault_vcpu_options.flags`: the VMM has its own loop and calls `kvmfault_vcpu_resume`
/// before each KVM_RUN.
pub const KVMFAULT_VCPU_RESUMES: u32 = 1 << 0;

/// A vCPU of a VM that the library is attached to. Opaque.
pub struct kvmfault_vcpu {
    _private: [u8; 0],
}

/// What `kvmfault_vcpu_new` needs. Start from KVMFAULT_VCPU_OPTIONS_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_vcpu_options {
    /// Set by KVMFAULT_VCPU_OPTIONS_INIT.
    pub size: usize,
    /// The vCPU (KVM_CREATE_VCPU). Duplicated: the VMM may close its own.
    pub fd: c_int,
    /// KVMFAULT_SIGBUS_BY_MASK or KVMFAULT_SIGBUS_BY_HANDLER.
    pub sigbus: c_int,
    /// The vCPU's struct kvm_run, mapped by the VMM for as long as the handle lives. NULL: the
    /// library maps it.
    pub run: *mut c_void,
    /// The signal that `kvmfault_vcpu_kick` sends to the vCPU's thread, for the library alone in
    /// that thread. 0 means SIGURG (by mask only). By handler it must be given; the library also
    /// sends it for purposes of its own, so system calls of the thread may end with EINTR without a
    /// kick, unless the handler has SA_RESTART. The handler should not set `immediate_exit`.
    pub kick_signal: c_int,
    /// KVMFAULT_VCPU_* bits.
    pub flags: u32,
}

/// Returned by `kvmfault_vcpu_handle_exit`: the library has served the exit; call KVM_RUN again.
pub const KVMFAULT_HANDLED: c_int = 0;

/// Returned by the functions that run a vCPU: the exit is the VMM's. Look at kvm_run, or at
/// KVM_RUN's errno, as without the library.
pub const KVMFAULT_PASS: c_int = 1;

/// Returned by the functions that run a vCPU: a kick or a signal ended the run; kvm_run holds no
/// exit.
pub const KVMFAULT_INTERRUPTED: c_int = 2;

/// Returned by the functions that run a vCPU: the guest touched memory that is lost (KVMFAULT_LOST)
/// or broken (hardware); `kvmfault_vcpu_memory_error` tells where.
pub const KVMFAULT_MEMORY_ERROR: c_int = 3;

/// The memory error that ended a run with KVMFAULT_MEMORY_ERROR. Start from
/// KVMFAULT_MEMORY_ERROR_INFO_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_memory_error_info {
    /// Set by KVMFAULT_MEMORY_ERROR_INFO_INIT.
    pub size: usize,
    /// Guest physical address. UINT64_MAX if the address is in no memslot of the library, or is not
    /// known (before Linux 6.6, if more than one page is lost).
    pub gpa: u64,
    /// Address in this process.
    pub hva: *mut c_void,
    /// Length in bytes of what is concerned: the page.
    pub len: u64,
    /// 1: the VMM has marked the page lost. 0: the kernel reported a broken page (hwpoison) that
    /// was present.
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

/// Attaches to a vCPU. Call it on the thread that runs the vCPU, after its registers and CPUID are
/// set. With KVMFAULT_SIGBUS_BY_MASK it blocks SIGBUS and the kick signal in that thread until
/// `kvmfault_vcpu_free` is called there, and sets the vCPU's KVM_SET_SIGNAL_MASK to the rest of the
/// thread's mask; KVM_SET_SIGNAL_MASK waits while the vCPU is inside KVM_RUN on another thread. A
/// vCPU may move to another thread: the first `kvmfault_vcpu_run` there sets that one up. The
/// thread that it leaves keeps the signals blocked, unless the vCPU is freed there. Nothing of the
/// VM or of its other vCPUs changes.
///
/// `options->fd` must be a vCPU of the VM of `vm`. KVM can't be asked, so this is not checked. A
/// vCPU of another VM does no harm, but its guest finds `vm`'s memory where `vm` has a memslot and
/// its own VM has none; its other exits are passed to the VMM.
///
/// Returns: 0, and *vcpu is the new handle; on an error *vcpu is NULL, and signals and masks are as
///   before.
/// Errors:
///   -EINVAL: an argument; the message names it.
///   -EBADF: `fd` is closed.
///   -EEXIST: the vCPU has a handle already.
///   -E2BIG: `options` has values that this version doesn't know.
///   The errno of a system call, which the message names: also of tgkill, rt_sigtimedwait and
///     rt_sigprocmask, which a vCPU's signals need, if a seccomp filter refuses one
///     (docs/seccomp.md).
/// Threads: the vCPU's.
/// Callbacks: refused with -EDEADLK.
/// Lifetime: free it with `kvmfault_vcpu_free`, before or after the VM. `options->run` stays mapped
///   until then; `options` need not outlive the call.
///
/// # Safety
/// The pointers are NULL or valid; `options->run` is NULL or the vCPU's kvm_run, mapped for as long
/// as the handle lives.
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
        if options.run as u64 % page_size() != 0 {
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

/// Detaches from a vCPU and frees the handle. NULL is allowed; a handle that was freed before is
/// left alone. With KVMFAULT_SIGBUS_BY_MASK the vCPU has no KVM_SET_SIGNAL_MASK afterwards. On the
/// vCPU's own thread the signals are unblocked, unless another vCPU of the thread needs them
/// blocked; on any other thread they stay blocked in the vCPU's. Waits for kicks that are under
/// way.
///
/// Not while `kvmfault_vcpu_run` is under way on another thread: kick it out first. (Otherwise the
/// handle is freed when that call returns.) If the vCPU is to run on without the library, not in
/// the middle of an access that KVM emulates: see `kvmfault_vcpu_run`. A new handle for the vCPU
/// takes over such an access.
///
/// Threads: any; best the vCPU's.
/// Callbacks: allowed.
/// Lifetime: `kvmfault_vcpu_options.run` may be unmapped afterwards.
///
/// # Safety
/// `vcpu` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_free(vcpu: *mut kvmfault_vcpu) {
    Handle::free("kvmfault_vcpu_free", vcpu, |_| {});
}

/// Runs the guest (KVM_RUN) and serves its faults until there is something for the VMM.
///
/// With `poison-trap`, what KVM itself accesses for a guest fails quietly on an absent page. So
/// before the first KVM_RUN this resolves the areas of the wall clock, kvmclock, steal time, PV EOI
/// and async page faults, and the one where system management mode saves the registers, as the
/// vCPU's MSRs name them then. Areas that a guest registers later have mostly been written to
/// before; for the others there is KVMFAULT_VM_FILTER_MSRS. It also resolves the guest's page
/// tables for what RSI and RDI point to, then and after each exit to a device: for the memory of a
/// string instruction (INS, OUTS, MOVS) KVM walks them itself, and takes an absent table for a page
/// that the guest hasn't mapped. What the first word of an OUTS needs cannot be known in advance,
/// if the guest hasn't touched it before. The registers must be set before the first call; in PAE
/// mode the first table is then read anew if it was absent (KVM_SET_SREGS reads it and reports
/// nothing). On arm64 none of this is needed but for the area of stolen time
/// (KVM_ARM_VCPU_PVTIME_CTRL), which must be set before the first call, too.
///
/// INTERRUPTED, MEMORY_ERROR or an error may leave the vCPU in the middle of an access that KVM
/// emulates, or of a filtered write to an MSR. kvm_run->exit_reason is then KVM_EXIT_MMIO or
/// KVM_EXIT_X86_WRMSR until the next call has finished it, and the VMM leaves that exit alone. This
/// state outlives the handle: a new one for the vCPU finishes the access in its first call of this
/// or of `kvmfault_vcpu_resume`. Before the vCPU's state is saved, migrated or reset, or the vCPU
/// runs without the library, do what Documentation/virt/kvm/api.rst says for KVM_EXIT_MMIO: set
/// kvm_run->immediate_exit and call this until the exit reason is neither. If the page will not be
/// supplied, mark it with `kvmfault_pages_lost`.
///
/// After MEMORY_ERROR the next call repeats the access. If the page was discarded meanwhile
/// (`kvmfault_pages_discard`), the resolver is called anew and the guest gets its bytes. If the
/// page is still lost or broken, an access by native code is reported again, but one that KVM
/// emulates is given up in the second call: the guest reads ones, what it wrote is dropped, and a
/// machine check that the VMM has injected is then delivered.
///
/// Returns: KVMFAULT_PASS (an exit in kvm_run), KVMFAULT_INTERRUPTED (a kick; a signal that the VMM
///   handles; or, by mask, a SIGBUS that a process sent) or KVMFAULT_MEMORY_ERROR; never
///   KVMFAULT_HANDLED. After an error the vCPU can be run again: the guest repeats the access.
/// Errors:
///   The resolver's -errno.
///   -EPROTO: the resolver has broken its contract.
///   -EFAULT: KVM can't access a slot's memory in this process and doesn't say where.
///   -ELOOP: a page faults again and again without progress; the message names it.
///   -ESHUTDOWN: the VM was freed.
///   -EBUSY: another thread is in this vCPU's functions.
///   The errno of KVM_RUN, or of a system call that the message names, also one of reader threads
///     (refused by a seccomp filter).
/// Threads: the vCPU's.
/// Callbacks: refused with -EDEADLK.
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

/// For a VMM with its own loop: serves what KVM_RUN has returned with. `ret` is 0 or more if
/// KVM_RUN succeeded, else -errno; -1 means that the errno is in errno, so that ioctl's own result
/// can be passed. Call it after each KVM_RUN, before anything that changes errno.
///
/// After an error and after KVMFAULT_MEMORY_ERROR, a VMM that continues all the same calls
/// `kvmfault_vcpu_resume` until it returns KVMFAULT_HANDLED, and only then KVM_RUN, also without
/// KVMFAULT_VCPU_RESUMES. The guest may be in the middle of an access that KVM emulates: KVM_RUN
/// alone would give it wrong bytes (ones, after a memory error), or lose what it wrote. The same
/// applies to the first KVM_RUN with a handle for a vCPU that was left so.
///
/// Returns: KVMFAULT_HANDLED (the fault is served: call KVM_RUN again), KVMFAULT_PASS (an exit in
///   kvm_run, or KVM_RUN's own errno), KVMFAULT_INTERRUPTED or KVMFAULT_MEMORY_ERROR.
/// Errors:
///   -EBUSY: another thread is in this vCPU's functions. Nothing was looked at: before KVM_RUN,
///     call this again with the same result, as -errno (errno itself may have changed).
///   The others of `kvmfault_vcpu_run`, except KVM_RUN's own errno.
/// Threads: the vCPU's.
/// Callbacks: refused with -EDEADLK.
///
/// # Safety
/// `vcpu` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_handle_exit(vcpu: *mut kvmfault_vcpu, ret: c_int) -> c_int {
    let errno = match ret {
        0.. => None,
        // Revision v2 of the flag fails with EPERM, which is 1: both readings of -1 agree then.
        -1 => Some(std::io::Error::last_os_error().raw_os_error().filter(|&e| e != 0).unwrap_or(libc::EPERM)),
        _ => Some(ret.wrapping_neg()),
    };
    with("kvmfault_vcpu_handle_exit", vcpu, |vcpu| {
        not_in_callback("kvmfault_vcpu_handle_exit")?;
        vcpu.handle_exit(errno).map(number)
    })
}

/// For a VMM with its own loop and KVMFAULT_VCPU_RESUMES: call it before each KVM_RUN. It finishes
/// an access of the guest that KVM emulates, or a filtered write to an MSR, that a
/// KVMFAULT_INTERRUPTED left in the middle: KVM_RUN alone would give the guest wrong bytes.
/// (Without the flag such waits are not interrupted.) It also resolves what `kvmfault_vcpu_run`
/// resolves before KVM_RUN; without the flag the VMM does that itself (`kvmfault_vcpu_resolve`).
///
/// Returns: KVMFAULT_HANDLED: KVM_RUN may be called. Else as `kvmfault_vcpu_handle_exit`.
/// Errors:
///   Those of `kvmfault_vcpu_handle_exit`. After -EBUSY call it again, before KVM_RUN.
/// Threads: the vCPU's.
/// Callbacks: refused with -EDEADLK.
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

/// With KVMFAULT_SIGBUS_BY_HANDLER: reports a SIGBUS from the VMM's handler to the library. `code`
/// and `address` are si_code and si_addr of the handler's siginfo_t. Async-signal-safe; leaves
/// errno alone.
///
/// Returns: 1: the next `kvmfault_vcpu_run` or `kvmfault_vcpu_handle_exit` deals with it. 0: the
///   signal is the VMM's to handle: its code is not BUS_MCEERR_AR; or it repeats one that neither
///   of these functions has seen yet, because the thread itself touches broken memory and would do
///   so for ever.
/// Errors:
///   -EINVAL, -EBADF, -ECHILD: a bad handle, as for every function.
/// Threads: the vCPU's, in a signal handler.
/// Callbacks: allowed.
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
    (code == libc::BUS_MCEERR_AR && seat.note_bus(code, Hva(address as u64))).into()
}

/// Makes `kvmfault_vcpu_run` or `kvmfault_vcpu_handle_exit` of this vCPU return
/// KVMFAULT_INTERRUPTED once, wherever the vCPU is: in the guest, in KVM_RUN, waiting for a page,
/// or about to enter. A kick is never lost; several that come before one is seen count as one.
/// Async-signal-safe; leaves errno alone. May race with `kvmfault_vcpu_free`, which waits for kicks
/// that are under way; with KVMFAULT_SIGBUS_BY_MASK no kick signal is pending afterwards, so the
/// signal needs no handler.
///
/// Three limits:
/// - A resolver that runs on the vCPU's thread is not interrupted, not even inside a system call
///   that reads from a source which doesn't answer (by mask the signal is blocked there). A
///   resolver that must be interruptible reads with a timeout or returns KVMFAULT_PENDING.
/// - With `userfaultfd` a vCPU whose access KVM emulates (CPL 0 on a KVM without hardware
///   virtualization) sleeps inside KVM's copy until its page is installed.
/// - Before Linux 6.2 a vCPU that sleeps in classic userfaultfd is not interrupted either, and
///   doesn't learn that its resolver has failed, until its page is installed.
///
/// Returns: 0.
/// Errors:
///   The errno of tgkill(2) (-EPERM if a seccomp filter refuses it). The kick is then seen when the
///     loop next looks for kicks.
///   -EINVAL, -EBADF, -ECHILD: a bad handle, as for every function.
/// Threads: any, and any signal handler, that of the kick signal included.
/// Callbacks: allowed.
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

/// For a VMM with its own loop: resolves the pages that hold [gpa, gpa + len) on the vCPU's thread,
/// as if the guest had touched them; a kick ends the wait. For what KVM accesses outside of guest
/// instructions, see `kvmfault_pages_resolve`. The range is in address space 0, is rounded outwards
/// to pages, and may span slots.
///
/// Returns: KVMFAULT_HANDLED: all pages are present. KVMFAULT_INTERRUPTED: call it again.
///   KVMFAULT_MEMORY_ERROR: a page is lost.
/// Errors:
///   -ENOENT: a page is in no slot.
///   -EINVAL: `len` is 0 or too large.
///   The others of `kvmfault_vcpu_run`, except KVM_RUN's own errno.
/// Threads: the vCPU's.
/// Callbacks: refused with -EDEADLK.
///
/// # Safety
/// `vcpu` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_resolve(vcpu: *mut kvmfault_vcpu, gpa: u64, len: u64) -> c_int {
    with("kvmfault_vcpu_resolve", vcpu, |vcpu| {
        not_in_callback("kvmfault_vcpu_resolve")?;
        vcpu.resolve(Gpa(gpa), len).map(number)
    })
}

/// Describes the last KVMFAULT_MEMORY_ERROR that a function of this vCPU returned. Doesn't wait.
///
/// Returns: 0, and *info is filled in.
/// Errors:
///   -ENODATA: there was no memory error.
///   -EINVAL: `info` is NULL, or its size is wrong.
/// Threads: any.
/// Callbacks: allowed.
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
            gpa: error.gpa.map_or(u64::MAX, |gpa| gpa.0),
            hva: error.hva.as_ptr(),
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
