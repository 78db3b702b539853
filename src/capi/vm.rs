//! VM.

use super::boundary::{clear_out, enter, not_in_callback, put, with, with_wide, Handle, Opaque};
use super::finalizer::Finalizer;
use super::resolver::*;
use super::structs;
use crate::error::{fail, Result};
use crate::mechanism;
use crate::resolve::{Answer, Fault, Origin, Resolver};
use crate::vm::{Options, Vm};
use std::ffi::{c_char, c_int, c_void, CStr};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicPtr, Ordering::SeqCst};
use std::sync::Arc;
use std::time::Duration;

/// `kvmfault_vm_options.flags`: after serving a vCPU's fault, call KVM_PRE_FAULT_MEMORY (Linux 6.11, x86 with EPT or NPT) for the page and for
/// what the resolver installed behind it in the readahead window: one system call instead of a guest exit a page.
///
/// Only for a VMM that changes no memslot of the VM (through the library or by itself) while a vCPU with absent pages runs: all kernels
/// to 7.3 may then retry inside that call without end, and with it the change of memslots waits.
pub const KVMFAULT_VM_PRE_FAULT: u64 = 1 << 0;

/// `kvmfault_vm_options.flags`: the VMM has a userfaultfd of its own on its memory and serves all faults there with it, as QEMU's post-copy
/// does; the library serves vCPUs only, and spares them that way. It registers, installs and drops nothing in the VMM's mappings, has no reader
/// threads, and learns from the VMM what is there: `kvmfault_pages_missing`, `kvmfault_pages_arrived`. Memory that no mechanism can take
/// away from userfaultfd (private memory with `poison-trap`) is refused with -EOPNOTSUPP: leave its slots as they are, and the VMM's
/// userfaultfd serves vCPUs there too. `kvmfault_vm_new` fails with -EOPNOTSUPP where this is so of all memory.
///
/// The resolver asks for the page and returns KVMFAULT_PENDING (or calls `kvmfault_pages_arrived` and returns KVMFAULT_RESOLVED).
/// `kvmfault_memslot_set_fast_only(vm, slot, 0)`, for each slot, is the end of it: with `poison-trap` it needs all pages there.
pub const KVMFAULT_VM_EXTERNAL_UFFD: u64 = 1 << 1;

/// `kvmfault_vm_options.flags`: areas that a guest names while it runs come too. A guest tells KVM by MSRs (0x4b564d00 to 0x4b564d04) where to write
/// the wall clock, kvmclock, steal time, async page faults and PV EOI; with `poison-trap` KVM's write fails quietly on an absent page, and the
/// guest reads old time. That can be when a guest that was restored brings a CPU online or wakes from suspend, and has not touched the page since.
///
/// With this flag, and where `poison-trap` is in use, the library sets the VM's MSR filter (KVM_X86_SET_MSR_FILTER, with
/// KVM_CAP_X86_USER_SPACE_MSR) for writes to those, and `kvmfault_vcpu_run` and `kvmfault_vcpu_handle_exit` serve the exits (KVM_EXIT_X86_WRMSR):
/// they bring the page and set the MSR. `kvmfault_vm_free` takes the filter away. For a VMM with no MSR filter of its own, which KVM would forget; one
/// that has one adds those MSRs, and at such an exit calls `kvmfault_vcpu_resolve` for the area, and KVM_SET_MSRS. Linux 5.10.
///
/// Setting it, and taking it away, waits as a change of memslots does for a vCPU that sleeps in KVM for a page which only a userfaultfd of the
/// VMM's own brings.
pub const KVMFAULT_VM_FILTER_MSRS: u64 = 1 << 2;

/// `kvmfault_vm_enable`: KVM's memory-fault exits, by whatever way the kernel's ABI enables them.
pub const KVMFAULT_CAP_FAULT_EXITS: u64 = 1 << 0;

/// A VM whose memory the library looks after. Opaque. Functions that take it `const` may be called from any thread at any
/// time, also concurrently.
pub struct kvmfault_vm {
    _private: [u8; 0],
}

/// What `kvmfault_vm_new` needs. Start from KVMFAULT_VM_OPTIONS_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_vm_options {
    /// Set by KVMFAULT_VM_OPTIONS_INIT.
    pub size: usize,
    /// An open /dev/kvm. Duplicated, like the other descriptors: the VMM may close its own at any time.
    pub kvm_fd: c_int,
    /// The VM (KVM_CREATE_VM). The duplicate keeps the VM alive until `kvmfault_vm_free`.
    pub vm_fd: c_int,
    /// KVMFAULT_MECHANISM_*. Anything but AUTO is forced: `kvmfault_vm_new` or `kvmfault_memslot_set` fails with
    /// -EOPNOTSUPP, and the reason in `kvmfault_last_error`, where it can't work.
    pub mechanism: c_int,
    /// -1: the library opens a userfaultfd. Or an open /dev/userfaultfd (Linux 6.1), which another process may have passed: one is made from it. Or a
    /// userfaultfd that this process opened, before it gave up the privileges for it: one of another process, or of before a fork, can't work, as it
    /// serves the memory of its creator. Its UFFDIO_API may have been done (without events, and without UFFD_FEATURE_SIGBUS) or not. O_NONBLOCK is set on it.
    pub uffd: c_int,
    /// NULL, or the name of an ABI of the memslot flag ("v2", "v3", "v4", "v7", "userfault-v3") to use without asking
    /// KVM_CHECK_EXTENSION, for a kernel with numbers of its own. It is still proven in a scratch VM:
    /// -EOPNOTSUPP where the kernel doesn't behave so.
    pub abi: *const c_char,
    /// Called for every page that is needed and absent. Required.
    pub resolver: kvmfault_resolver,
    /// First argument of the callbacks.
    pub opaque: *mut c_void,
    /// NULL, or frees `opaque`. If `kvmfault_vm_new` fails it is not called: `opaque` is still the caller's.
    pub finalizer: kvmfault_finalizer,
    /// NULL, or see `kvmfault_written`.
    pub written: kvmfault_written,
    /// Threads that read the userfaultfd, 1 to 64; 0 means 1 (2 for a forced `userfaultfd` mechanism). 0 with KVMFAULT_VM_EXTERNAL_UFFD, which has
    /// no such threads (else -EINVAL).
    pub reader_threads: u32,
    /// Readahead: so many pages, 1 to 4096, may be in the window of one resolver call; 0 means 1, no readahead. The window adapts itself, for each vCPU:
    /// faults in a row, up or down, get 4 pages, then 8, and so on up to this; faults without a pattern get their page and nothing more. Where
    /// faults are a constant step apart the resolver is called, on the same thread, for the pages that will follow as well (with
    /// KVMFAULT_ORIGIN_PREFETCH, and for 200 us at most unless it answers KVMFAULT_PENDING). 64 is a good value for memory and files, more where a
    /// call is slow.
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

/// The VMM's callbacks.
struct Callbacks {
    resolver: unsafe extern "C" fn(*mut c_void, *mut kvmfault_vm, *const kvmfault_fault) -> c_int,
    opaque: *mut c_void,
    written: kvmfault_written,
    /// The handle that callbacks get; set before the first fault can come.
    vm: Arc<AtomicPtr<kvmfault_vm>>,
    _finalizer: Finalizer,
}

// SAFETY: the header says that the callbacks are called from several threads, with this opaque pointer.
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
            gpa: fault.gpa,
            len: fault.len,
            hva: fault.hva as *mut c_void,
            slot: fault.slot,
            access: fault.access,
            origin,
            vcpu,
            window_gpa: fault.window.start,
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

    fn written(&self, gpa: u64, len: u64) {
        if let Some(written) = self.written {
            // SAFETY: the VMM's function, called as the header says.
            unsafe { written(self.opaque, gpa, len) };
        }
    }
}

/// Takes a VM into the library's care: finds out what this kernel can do, opens a userfaultfd and starts the reader threads. Memory comes
/// with `kvmfault_memslot_set` or `_prepare`, vCPUs with `kvmfault_vcpu_new`.
///
/// On success *vm is the new handle, to be freed with `kvmfault_vm_free`; on an error it is NULL. Not from callbacks.
///
/// Errors: -EINVAL (an argument; the message names it), -EBADF (a descriptor is closed), -EPERM or -EACCES (userfaultfd isn't
/// permitted: `kvmfault_explain` says what to do; or a seccomp filter refuses read(2) to the reader threads), -EOPNOTSUPP (the forced mechanism or ABI
/// can't work here), -E2BIG (see `size`).
///
/// Should a seccomp filter refuse read(2) to all reader threads later, calls that run vCPUs return its errno while a thread waits for a page, and
/// `kvmfault_memslot_set` refuses new memory with it; a host thread that sleeps can't be told (docs/seccomp.md).
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

/// A string from C; None if NULL.
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

/// Gives the VM back. NULL is allowed; a handle that was freed before is left alone (and `kvmfault_last_error` says so).
///
/// Waits for nothing (but see KVMFAULT_VM_FILTER_MSRS): vCPUs inside `kvmfault_vcpu_run` return -ESHUTDOWN, whoever waits for a page goes, and resolver calls under way end
/// when they end. The finalizer runs after the last of them, on the thread where that is, whatever handles are left; only then may `opaque` go
/// (`kvmfault_vm_close` waits for it). From a resolver: after that resolver has returned. vCPU and fill handles stay valid and return -ESHUTDOWN;
/// free them too, before or after.
///
/// Calls on the VM that are under way in other threads return -ESHUTDOWN if they can't be finished; what they have begun (a slot that is being set,
/// say) is undone. A callback that is under way gets -ESHUTDOWN from each call on its VM, too. Calls that begin later on other threads return
/// -EBADF, as on any freed handle.
///
/// The memory of its slots must stay mapped until then too, and until calls of the VMM's own have returned, those of its vCPUs among them: an
/// install under way writes to it.
///
/// Free it when the guest has stopped, or after deleting the slots: absent pages are no longer brought (private ones that `poison-trap`
/// has marked stay SIGBUS until they are unmapped), and KVM's slots that use the library's private alias lose their memory. Their addresses stay
/// taken, inaccessible, for as long as the process lives, so that a guest that runs on gets an error and never what is mapped there next; where the
/// slots were deleted before, nothing is kept. Any thread; also from callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_free(vm: *mut kvmfault_vm) {
    Handle::free("kvmfault_vm_free", vm, Vm::shut_down);
}

/// As `kvmfault_vm_free`, and waits until it is over, `timeout_ms` milliseconds at most (negative: for as long as it takes): no callback of the VM
/// is under way, none will come, the finalizer has run, and no thread of the library uses the slots' memory any more. Then `opaque` may go, and the
/// memory too once the VMM's own calls have returned (a vCPU's `kvmfault_vcpu_run` does so with -ESHUTDOWN).
///
/// It waits for nothing but resolver calls that are under way, so don't hold a lock that the resolver takes. Pages that were announced
/// (KVMFAULT_PENDING) are not waited for.
///
/// Returns 0: `vm` is freed. -ETIMEDOUT: the VM is shut down, and a callback has not returned yet; the handle is still there, calls on it return
/// -ESHUTDOWN (deleting slots and statistics still work), and this may be called again, or `kvmfault_vm_free`. -EDEADLK: from a callback; nothing
/// has changed. -EINVAL (NULL), -EBADF. Any thread.
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

/// The mechanism in use: KVMFAULT_MECHANISM_*, never AUTO. With AUTO it is what shared memory gets; `kvmfault_memslot_mechanism` tells
/// of a single slot. Else -EBADF or -EINVAL. Any thread.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_mechanism(vm: *const kvmfault_vm) -> c_int {
    with("kvmfault_vm_mechanism", vm, |vm| Ok(vm.mechanism().number()))
}

/// Can the mechanism that `kvmfault_vm_mechanism` tells serve the guest of this vCPU, as far as its CPUID says? For a VMM that has another way:
/// nothing else asks. With `poison-trap`, KVM must not access the guest's memory itself, which fails quietly on an absent page; it does so where it
/// has no EPT or NPT, and for guests with nested virtualization or with Hyper-V or Xen enlightenments. (kvmclock, steal time, PV EOI and async
/// page faults are no obstacle: see `kvmfault_vcpu_run`.) `vcpu_fd` is a vCPU on which KVM_SET_CPUID2 was called. Its CPUID is
/// read (KVM_GET_CPUID2), which waits while the vCPU is inside KVM_RUN: ask before it runs.
///
/// Returns 0; -EOPNOTSUPP, and `kvmfault_last_error` says why; -EINVAL or -EBADF for `vm` or `vcpu_fd`. Any thread, also in callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_check_guest(vm: *const kvmfault_vm, vcpu_fd: c_int) -> c_int {
    with("kvmfault_vm_check_guest", vm, |vm| vm.check_guest(vcpu_fd).map(|()| 0))
}

/// An address of this process that the kernel named (si_addr of a SIGBUS for broken hardware, say) as one of the VMM's own mapping: KVM may
/// know the memory by the library's private alias, of which the VMM knows nothing. NULL if it is in no slot's memory, or `vm` is no VM. Any
/// thread, also in callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library. `address` is only compared.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_address(vm: *const kvmfault_vm, address: *const c_void) -> *mut c_void {
    let found = with_wide("kvmfault_vm_address", vm, |vm| match vm.vmm_address(address as u64) {
        Some(address) => Ok(address as i64),
        None => fail!(ENOENT, "address: {address:p} is in no slot's memory"),
    });
    found.max(0) as *mut c_void
}

/// Enables what KVM's ABI wants enabled before the fast-only flag works; best before the first vCPU runs (KVM's maintainers ask
/// for fault information from the start). Slots enable it as well when they are first set, so calling this is optional. `caps` is a set of
/// KVMFAULT_CAP_* bits, or 0 for all. Does nothing for mechanisms that need nothing.
///
/// Returns 0; -EINVAL for unknown bits, or the errno of KVM_ENABLE_CAP. Any thread; not from callbacks.
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
