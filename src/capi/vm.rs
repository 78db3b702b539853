//! VM: attaching the library to a VM of KVM's, and detaching it.

use super::boundary::{clear_out, enter, not_in_callback, put, with, with_wide, Handle, Opaque};
use super::finalizer::Finalizer;
use super::resolver::*;
use super::structs;
use crate::error::{fail, Result};
use crate::kernel::address::{Gpa, Hva};
use crate::mechanism;
use crate::resolve::{Answer, Fault, Origin, Resolver};
use crate::vm::{Options, Vm};
use std::ffi::{c_char, c_int, c_void, CStr};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicPtr, Ordering::SeqCst};
use std::sync::Arc;
use std::time::Duration;

/// In `kvmfault_vm_options.flags`: after a vCPU's fault, call KVM_PRE_FAULT_MEMORY (Linux 6.11, x86
/// with EPT or NPT) for the page and for what the resolver installed behind it in the readahead
/// window. One system call then replaces a guest exit a page.
///
/// Only for a VMM that changes no memslot of the VM, through the library or by itself, while a vCPU
/// with absent pages runs: in kernels up to 7.3 the call may then retry without end
/// (kvm_tdp_map_page), and the change of memslots waits for it.
pub const KVMFAULT_VM_PRE_FAULT: u64 = 1 << 0;

/// In `kvmfault_vm_options.flags`: the VMM has a userfaultfd of its own on its memory and serves
/// all faults there, as QEMU's post-copy does; the library serves vCPUs only, which then don't go
/// through that userfaultfd. The library registers, installs and drops nothing in the VMM's
/// mappings and has no reader threads: the VMM tells it what is there, by `kvmfault_pages_missing`
/// and `kvmfault_pages_arrived`.
///
/// The resolver requests the page and returns KVMFAULT_PENDING, or calls `kvmfault_pages_arrived`
/// and returns KVMFAULT_RESOLVED. When post-copy is over, call `kvmfault_memslot_set_fast_only(vm,
/// slot, 0)` for each slot; with `poison-trap` all pages must be present by then.
///
/// Memory that no mechanism can take away from userfaultfd (private memory with `poison-trap`) is
/// refused with -EOPNOTSUPP: leave such slots as they are, and the VMM's userfaultfd goes on
/// serving vCPUs there. `kvmfault_vm_new` fails with -EOPNOTSUPP if that is so of all kinds of
/// memory.
pub const KVMFAULT_VM_EXTERNAL_UFFD: u64 = 1 << 1;

/// In `kvmfault_vm_options.flags`: also resolve areas that the guest registers at run time. A guest
/// writes MSRs (0x4b564d00 to 0x4b564d04, Documentation/virt/kvm/x86/msr.rst) to tell KVM where to
/// write the wall clock, kvmclock, steal time, async page faults and PV EOI. With `poison-trap`
/// such a write by KVM fails quietly on an absent page, and the guest reads old values: for example
/// when a restored guest brings a CPU online, or wakes from suspend, and hasn't touched the page
/// since.
///
/// With this flag, and if `poison-trap` is in use, the library sets the VM's MSR filter
/// (KVM_X86_SET_MSR_FILTER and KVM_CAP_X86_USER_SPACE_MSR, Linux 5.10) for writes to those MSRs;
/// `kvmfault_vcpu_run` and `kvmfault_vcpu_handle_exit` serve the exits (KVM_EXIT_X86_WRMSR): they
/// resolve the page and set the MSR. `kvmfault_vm_free` removes the filter. KVM has one filter a
/// VM, so this is for a VMM without one of its own; a VMM that has one adds those MSRs to it and,
/// at such an exit, calls `kvmfault_vcpu_resolve` for the area and then KVM_SET_MSRS.
///
/// Setting and removing the filter may wait for a vCPU that sleeps inside KVM for a page which only
/// a userfaultfd of the VMM's own supplies, as a change of memslots does.
///
/// x86-64 only: on arm64 `kvmfault_vm_new` fails with -EOPNOTSUPP, because guests there have no
/// such MSRs.
pub const KVMFAULT_VM_FILTER_MSRS: u64 = 1 << 2;

/// For `kvmfault_vm_enable`: KVM's memory-fault exits, in whichever way the kernel's ABI enables
/// them.
pub const KVMFAULT_CAP_FAULT_EXITS: u64 = 1 << 0;

/// A VM whose memory the library manages. Opaque.
pub struct kvmfault_vm {
    _private: [u8; 0],
}

/// What `kvmfault_vm_new` needs. Start from KVMFAULT_VM_OPTIONS_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_vm_options {
    /// Set by KVMFAULT_VM_OPTIONS_INIT.
    pub size: usize,
    /// An open /dev/kvm. Duplicated, like the other descriptors: the VMM may close its own at any
    /// time.
    pub kvm_fd: c_int,
    /// The VM (KVM_CREATE_VM). The duplicate keeps the VM alive until `kvmfault_vm_free`.
    pub vm_fd: c_int,
    /// KVMFAULT_MECHANISM_*. Any but AUTO is forced: where it can't work, `kvmfault_vm_new` or
    /// `kvmfault_memslot_set` fails with -EOPNOTSUPP, and `kvmfault_last_error` has the reason.
    pub mechanism: c_int,
    /// -1: the library opens a userfaultfd. Or an open /dev/userfaultfd (Linux 6.1), also one
    /// passed by another process, from which the library makes a userfaultfd. Or a userfaultfd that
    /// this process opened, for example before it gave up the privilege: one from another process,
    /// or from before a fork, can't work, because it serves the memory of its creator. UFFDIO_API
    /// may have been called on it (without events and without UFFD_FEATURE_SIGBUS) or not.
    /// O_NONBLOCK is set on it.
    pub uffd: c_int,
    /// NULL, or the revision of the memslot flag to use ("v2", "v3", "v4", "v7", "userfault-v3")
    /// without asking KVM_CHECK_EXTENSION: for a kernel with capability numbers of its own. It is
    /// still proven in a scratch VM; -EOPNOTSUPP if the kernel behaves otherwise.
    pub abi: *const c_char,
    /// Called for each page that is needed and absent. Required.
    pub resolver: kvmfault_resolver,
    /// First argument of the callbacks.
    pub opaque: *mut c_void,
    /// NULL, or frees `opaque`. Not called if `kvmfault_vm_new` fails: `opaque` is the caller's
    /// then.
    pub finalizer: kvmfault_finalizer,
    /// NULL, or reports writes by the library: see `kvmfault_written`.
    pub written: kvmfault_written,
    /// Threads that read the userfaultfd, 1 to 64. 0 means 1 (2 if `userfaultfd` is forced). With
    /// KVMFAULT_VM_EXTERNAL_UFFD there are none, and any value but 0 is -EINVAL.
    pub reader_threads: u32,
    /// Most pages in the window of one resolver call, 1 to 4096. 0 means 1: no readahead. The
    /// window adapts to each vCPU: faults in sequence, upwards or downwards, get 4 pages, then 8,
    /// and so on up to this limit; faults without a pattern get their page alone. If faults are a
    /// constant step apart, the resolver is also called, on the same thread, for the pages expected
    /// next (with KVMFAULT_ORIGIN_PREFETCH; for 200 us at most, unless it returns
    /// KVMFAULT_PENDING). 64 is a good value for memory and files, more if a call is slow.
    pub readahead: u32,
    /// KVMFAULT_VM_* bits.
    pub flags: u64,
}

impl Opaque for kvmfault_vm {
    type Inner = Vm;
    const NAME: &'static str = "vm";
    const MAGIC: u64 = 0x6b76_6d66_0000_766d; // "kvmf", "vm"
    const HAS_CALLBACKS: bool = true;
    fn has_ended(vm: &Vm) -> bool {
        vm.engine.is_shut_down()
    }

    fn descriptors(vm: &Vm) -> Vec<RawFd> {
        vm.descriptors()
    }
}

/// The VMM's callbacks, and what they are called with.
struct Callbacks {
    resolver: unsafe extern "C" fn(*mut c_void, *mut kvmfault_vm, *const kvmfault_fault) -> c_int,
    opaque: *mut c_void,
    written: kvmfault_written,
    /// The handle that callbacks get. It is set before the first fault can come.
    vm: Arc<AtomicPtr<kvmfault_vm>>,
    _finalizer: Finalizer,
}

// SAFETY: the header says that several threads call the callbacks, with this opaque pointer.
unsafe impl Send for Callbacks {}

// SAFETY: as above.
unsafe impl Sync for Callbacks {}

impl Resolver for Callbacks {
    fn resolve(&self, fault: &Fault) -> Answer {
        let (origin, vcpu) = match fault.origin {
            Origin::Vcpu(number) => (KVMFAULT_ORIGIN_VCPU, number),
            Origin::Host => (KVMFAULT_ORIGIN_HOST, -1),
            Origin::Prefetch => (KVMFAULT_ORIGIN_PREFETCH, -1),
            Origin::Fill => (KVMFAULT_ORIGIN_FILL, -1),
        };
        let fault = kvmfault_fault {
            size: size_of::<kvmfault_fault>(),
            gpa: fault.gpa.0,
            len: fault.len,
            hva: fault.hva.as_ptr(),
            slot: fault.slot,
            access: fault.access,
            origin,
            vcpu,
            window_gpa: fault.window.start.0,
            window_len: fault.window.end - fault.window.start,
        };
        // SAFETY: the VMM's function, called as the header says; `fault` lives during the call.
        let answer = unsafe { (self.resolver)(self.opaque, self.vm.load(SeqCst), &fault) };
        match answer {
            KVMFAULT_RESOLVED => Answer::Resolved,
            KVMFAULT_PENDING => Answer::Pending,
            KVMFAULT_LOST => Answer::Lost,
            KVMFAULT_RETRY => Answer::Retry,
            -4095..=-1 => Answer::Failed(-answer),
            other => Answer::Garbage(other),
        }
    }

    fn written(&self, gpa: Gpa, len: u64) {
        if let Some(written) = self.written {
            // SAFETY: the VMM's function, called as the header says.
            unsafe { written(self.opaque, gpa.0, len) };
        }
    }
}

/// Attaches to a VM: finds out what this kernel can do, opens a userfaultfd and starts the reader
/// threads. `kvmfault_memslot_set` or `_prepare` then adds memory, and `kvmfault_vcpu_new` adds
/// vCPUs.
///
/// A new process needs a new handle: in a child of fork(2) this one is refused (see *fork* at the
/// top of this file). In a jail (chroot, Landlock, a user namespace, no /proc) pass open
/// descriptors in `options`; a seccomp filter must allow the system calls of docs/seccomp.md. If
/// such a filter later refuses read(2) to all reader threads, then while a page is waited for, the
/// calls that run vCPUs return its errno, and `kvmfault_memslot_set` refuses new memory with it; a
/// thread of the VMM that sleeps for a page can't be told.
///
/// Returns: 0, and *vm is the new handle; on an error *vm is NULL.
/// Errors:
///   -EINVAL: an argument; the message names it.
///   -EBADF: a descriptor is closed.
///   -EPERM, -EACCES: userfaultfd isn't permitted (`kvmfault_explain` says what would permit it),
///     or a seccomp filter refuses read(2) to the reader threads.
///   -EOPNOTSUPP: the forced mechanism or revision of the flag can't work here.
///   -E2BIG: `options` has values that this version doesn't know.
///   Another errno of a system call, which the message names.
/// Threads: any.
/// Callbacks: refused with -EDEADLK.
/// Lifetime: free it with `kvmfault_vm_close` or `kvmfault_vm_free`. `options` need not outlive the
///   call.
///
/// # Safety
/// The pointers are NULL or valid, and the callbacks are as the header says.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_new(options: *const kvmfault_vm_options, vm: *mut *mut kvmfault_vm) -> c_int {
    enter("kvmfault_vm_new", || {
        clear_out(vm, "vm")?;
        not_in_callback("kvmfault_vm_new")?;
        let options = structs::read(options, "options")?;
        let Some(resolver) = options.resolver else { fail!(EINVAL, "options.resolver: is NULL") };
        if options.flags & !(KVMFAULT_VM_PRE_FAULT | KVMFAULT_VM_EXTERNAL_UFFD | KVMFAULT_VM_FILTER_MSRS) != 0 {
            fail!(EINVAL, "options.flags: {:#x} has unknown bits", options.flags);
        }
        let handle = Arc::new(AtomicPtr::default());
        let (finalizer, arm) = Finalizer::new(options.finalizer, options.opaque);
        let callbacks = Callbacks {
            resolver,
            opaque: options.opaque,
            written: options.written,
            vm: handle.clone(),
            _finalizer: finalizer,
        };
        let abi = string(options.abi, "options.abi")?;
        let config = Options {
            kvm_fd: options.kvm_fd,
            vm_fd: options.vm_fd,
            mechanism: mechanism::choice(options.mechanism)?,
            uffd: (options.uffd != -1).then_some(options.uffd),
            abi: abi.as_deref(),
            readers: options.reader_threads,
            readahead: options.readahead,
            pre_fault: options.flags & KVMFAULT_VM_PRE_FAULT != 0,
            external: options.flags & KVMFAULT_VM_EXTERNAL_UFFD != 0,
            filter_msrs: options.flags & KVMFAULT_VM_FILTER_MSRS != 0,
        };
        let made = Vm::new(&config, || Box::new(callbacks))?;
        let exposed = Handle::expose(made);
        handle.store(exposed, SeqCst);
        put(vm, exposed);
        arm.arm();
        Ok(0)
    })
}

/// Reads a string from C; None if it is NULL.
fn string(pointer: *const c_char, name: &str) -> Result<Option<String>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: not NULL; the header asks for a NUL-terminated string.
    match unsafe { CStr::from_ptr(pointer) }.to_str() {
        Ok(text) => Ok(Some(text.to_owned())),
        Err(_) => fail!(EINVAL, "{name}: is not UTF-8"),
    }
}

/// Detaches from a VM and frees the handle, without waiting for anything (but see
/// KVMFAULT_VM_FILTER_MSRS). NULL is allowed. A handle that was freed before is left alone;
/// `kvmfault_last_error` then says so.
///
/// `kvmfault_vcpu_run` returns -ESHUTDOWN on every vCPU, threads that wait for a page are woken,
/// and resolver calls that are under way end in their own time. The finalizer runs after the last
/// of them. Calls on the VM that other threads are in return -ESHUTDOWN if they can't be finished,
/// and what they have begun (setting a slot, say) is undone; calls from a callback that is under
/// way return -ESHUTDOWN as well. Calls that begin later return -EBADF.
///
/// Call it when the guest has stopped, or after deleting the slots. Afterwards absent pages are no
/// longer resolved: they read as zeros, and private ones that `poison-trap` has marked raise SIGBUS
/// until they are unmapped. Slots of KVM's that use the library's mapping lose their memory; the
/// addresses of that mapping stay reserved and inaccessible for the life of the process, so that a
/// guest that still runs gets an error and never sees what is mapped there next. If the slots were
/// deleted before, nothing stays reserved.
///
/// Threads: any.
/// Callbacks: allowed; from a resolver, the finalizer runs after that resolver has returned.
/// Lifetime: `opaque` must stay until the finalizer has run. The slots' memory must stay mapped
///   until then too, and until calls of the VMM's own have returned, those of its vCPUs among them:
///   an install that is under way writes to it. vCPU and fill handles stay valid, and their
///   functions return -ESHUTDOWN; free them too, before or after. To wait for the end, use
///   `kvmfault_vm_close`.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_free(vm: *mut kvmfault_vm) {
    Handle::free("kvmfault_vm_free", vm, Vm::shut_down);
}

/// Detaches from a VM as `kvmfault_vm_free` does, waits until that is over, and then frees the
/// handle. Over means: no callback of the VM is under way and none will come, the finalizer has
/// run, and no thread of the library uses the slots' memory. Waits `timeout_ms` milliseconds at
/// most; a negative value means without limit.
///
/// It waits for resolver calls that are under way and for nothing else, so the caller must not hold
/// a lock that the resolver takes. It doesn't wait for announced pages (KVMFAULT_PENDING).
///
/// Returns: 0, and `vm` is freed.
/// Errors:
///   -ETIMEDOUT: the VM is shut down, but a callback has not returned. The handle still exists; its
///     functions return -ESHUTDOWN, except that slots can be deleted and statistics read. Call this
///     again, or `kvmfault_vm_free`.
///   -EDEADLK: called in a callback; nothing has changed.
/// Threads: any.
/// Callbacks: refused with -EDEADLK.
/// Lifetime: after 0 `opaque` may be freed, and the slots' memory may be unmapped once the VMM's
///   own calls have returned (`kvmfault_vcpu_run` returns -ESHUTDOWN).
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_close(vm: *mut kvmfault_vm, timeout_ms: i64) -> c_int {
    let closed = with("kvmfault_vm_close", vm, |vm| {
        not_in_callback("kvmfault_vm_close")?;
        vm.shut_down();
        let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        vm.engine.callbacks.wait_for_end(timeout).map(|()| 0)
    });
    if closed == 0 {
        Handle::free("kvmfault_vm_close", vm, |_| {});
    }
    closed
}

/// The mechanism in use. With KVMFAULT_MECHANISM_AUTO it is the one that shared memory gets;
/// `kvmfault_memslot_mechanism` tells that of one slot.
///
/// Returns: KVMFAULT_MECHANISM_*, never AUTO.
/// Errors: common errors only.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_mechanism(vm: *const kvmfault_vm) -> c_int {
    with("kvmfault_vm_mechanism", vm, |vm| Ok(vm.mechanism().number()))
}

/// Checks by the CPUID of a vCPU whether the mechanism that `kvmfault_vm_mechanism` tells can serve
/// its guest. For a VMM that has another way to serve it: nothing else in the library asks. With
/// `poison-trap` KVM must not access the guest's memory by itself, which fails quietly on an absent
/// page. KVM does so if it has no EPT or NPT, and for guests with nested virtualization or with
/// Hyper-V or Xen enlightenments. (kvmclock, steal time, PV EOI and async page faults are no
/// obstacle: see `kvmfault_vcpu_run`.)
///
/// On arm64 this refuses a vCPU with KVM_ARM_VCPU_HAS_EL2. It can't see an interrupt controller:
/// with an ITS in KVM the VMM itself resolves (`kvmfault_pages_resolve`) the tables of the ITS and
/// the property and pending tables of LPIs before it restores or saves them
/// (KVM_DEV_ARM_ITS_RESTORE_TABLES and the others fail with EFAULT on an absent page) and before
/// the guest runs. So it does for pages whose tags it copies (KVM_ARM_MTE_COPY_TAGS).
///
/// `vcpu_fd` is a vCPU on which KVM_SET_CPUID2 (arm64: KVM_ARM_VCPU_INIT) was called. The ioctl
/// that asks it waits while that vCPU is inside KVM_RUN: call this before it runs.
///
/// Returns: 0: it can.
/// Errors:
///   -EOPNOTSUPP: it can't; `kvmfault_last_error` says why.
///   -ENOEXEC: arm64: KVM_ARM_VCPU_INIT was not called.
///   -EINVAL: `vcpu_fd` is not a vCPU.
///   -EBADF: `vcpu_fd` is closed.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_check_guest(vm: *const kvmfault_vm, vcpu_fd: c_int) -> c_int {
    with("kvmfault_vm_check_guest", vm, |vm| vm.check_guest(vcpu_fd).map(|()| 0))
}

/// Translates an address of this process that the kernel reported (si_addr of a SIGBUS for broken
/// hardware, say) into the VMM's own mapping. KVM may know the memory by a mapping of the
/// library's, which the VMM has never seen.
///
/// Returns: the address in the VMM's mapping. NULL if `address` is in no slot's memory, and for a
///   handle that is NULL, freed or the parent process's.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// `vm` is NULL or a handle of this library. `address` is only compared.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_address(vm: *const kvmfault_vm, address: *const c_void) -> *mut c_void {
    let found = with_wide("kvmfault_vm_address", vm, |vm| match vm.vmm_address(Hva(address as u64)) {
        Some(Hva(address)) => Ok(address as i64),
        None => fail!(ENOENT, "address: {address:p} is in no slot's memory"),
    });
    found.max(0) as *mut c_void
}

/// Enables what KVM's ABI wants enabled before its fault exits work. Optional: setting a slot does
/// it as well. Best called before the first vCPU runs, because KVM's maintainers ask for fault
/// information from the start. Does nothing for mechanisms that need nothing. `caps` is a set of
/// KVMFAULT_CAP_* bits, or 0 for all.
///
/// Returns: 0.
/// Errors:
///   -EINVAL: `caps` has unknown bits.
///   The errno of KVM_ENABLE_CAP.
/// Threads: any.
/// Callbacks: refused with -EDEADLK.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_enable(vm: *const kvmfault_vm, caps: u64) -> c_int {
    with("kvmfault_vm_enable", vm, |vm| {
        not_in_callback("kvmfault_vm_enable")?;
        if caps & !KVMFAULT_CAP_FAULT_EXITS != 0 {
            fail!(EINVAL, "caps: {caps:#x} has unknown bits");
        }
        vm.enable_fault_exits().map(|()| 0)
    })
}
