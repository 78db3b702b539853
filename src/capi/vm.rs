//! VMs, slots and the VM's counters.

use super::boundary::{clear_out, enter, not_in_callback, put, with, with_wide, Handle, Opaque};
use super::finalizer::Finalizer;
use super::structs::{self, Out};
use super::types::*;
use crate::error::{fail, Result};
use crate::mechanism;
use crate::resolve::{Answer, Fault, Origin, Resolver};
use crate::stats::Stats;
use crate::vm::memslots::{MemoryKind, SlotRequest};
use crate::vm::{Options, Vm};
use std::ffi::{c_char, c_int, c_void, CStr};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicPtr, Ordering::SeqCst};
use std::sync::Arc;
use std::time::Duration;

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

/// Creates, moves or deletes (`len` 0) a memslot, and tells KVM (KVM_SET_USER_MEMORY_REGION or _REGION2). All its pages are absent at
/// the start, unless KVMFAULT_MEMSLOT_PRESENT is given or the memory is known from another slot. What shared memory holds all the same
/// (preallocated, used before) nobody sees until `kvmfault_pages_map` shows it; `kvmfault_pages_install` replaces it.
///
/// Threads may touch the memory while this is under way: they wait for their pages as ever, and the resolver may be called for these before this
/// has returned.
///
/// KVM's ioctl waits for each vCPU that is in the middle of a fault inside KVM_RUN, also of one
/// that sleeps there for a page (`userfaultfd`; a slot whose fast path is off). So that this call,
/// deleting and `kvmfault_memslot_set_fast_only` don't wait for the source of the page, the vCPUs
/// are made to leave KVM_RUN for a moment when the ioctl has taken 10 ms: by their kick signal,
/// which is no kick and which the VMM doesn't see (see `kvmfault_vcpu_options.kick_signal`). Two
/// limits. Before Linux 6.2, and wherever the vCPU sleeps in a copy that KVM makes (an instruction
/// that it emulates: all of CPL 0 on a KVM without hardware virtualisation), the call waits until
/// the page is brought or lost; in such a copy the vCPU's thread uses a CPU meanwhile. And a VMM
/// that does the ioctl itself (`kvmfault_memslot_prepare`) waits likewise: it kicks its vCPUs and
/// keeps them out of KVM_RUN until the ioctl has returned, or does the ioctl on a thread that may
/// wait.
///
/// On an error nothing has changed. Deleting a slot wakes whoever waits for its pages; memory that no other slot shows becomes ordinary
/// memory again, in which absent pages read as zeros (see KVMFAULT_MEMSLOT_KEEP).
///
/// Private memory of a deleted slot can be set again when it has been dropped (MADV_DONTNEED) and no
/// thread touches it until this has returned. A thread that waited for a page of the deleted slot
/// goes on after the deleting call has returned: what it reads then is a page of zeros, which is
/// content (-EEXIST). So wait for such threads before the memory is dropped.
///
/// Errors: -EINVAL (an argument; the message names it), -EEXIST (the guest range overlaps another slot, or there is content already that
/// can't be hidden: in private memory, in memory that is locked, and in any before Linux 5.14), -EFAULT and -EACCES (hva isn't mapped, or
/// not readable and writable), -EBADF (`fd` is closed), -EBUSY (the memory is registered with another userfaultfd), -ENOENT (deleting what
/// is not set), -EOPNOTSUPP (the forced mechanism can't serve this memory), -ESHUTDOWN (the VM was freed meanwhile), the errno of reader
/// threads that can't read (see `kvmfault_vm_new`), or KVM's errno. Any thread; calls take turns; not from callbacks.
///
/// # Safety
/// The pointers are NULL or valid; the slot's memory stays mapped while the slot is set.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_memslot_set(vm: *const kvmfault_vm, slot: *const kvmfault_memslot) -> c_int {
    with("kvmfault_memslot_set", vm, |vm| {
        not_in_callback("kvmfault_memslot_set")?;
        let request = request(&structs::read(slot, "slot")?)?;
        vm.memslot_set(&request).map(|()| 0)
    })
}

/// The same for a VMM that does its own ioctl: registers the slot and fills in *region with what KVM is to be told. From then on the
/// library takes the slot for set. To delete (also before a slot is set anew on other memory): first KVM, then this with `len` 0. If the VMM's ioctl fails, undo with `len` 0.
///
/// Errors as `kvmfault_memslot_set`. Any thread; calls take turns; not from callbacks.
///
/// # Safety
/// The pointers are NULL or valid; the slot's memory stays mapped while the slot is set.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_memslot_prepare(
    vm: *const kvmfault_vm,
    slot: *const kvmfault_memslot,
    region: *mut kvmfault_region,
) -> c_int {
    with("kvmfault_memslot_prepare", vm, |vm| {
        not_in_callback("kvmfault_memslot_prepare")?;
        let out = Out::new(region, "region")?;
        let request = request(&structs::read(slot, "slot")?)?;
        let told = vm.memslot_prepare(&request)?;
        let c = kvmfault_region {
            size: 0,
            ioctl_version: told.version,
            slot: told.slot,
            flags: told.flags,
            reserved: 0,
            guest_phys_addr: told.gpa,
            memory_size: told.len,
            userspace_addr: told.hva,
            userfault_bitmap: told.bitmap,
        };
        out.write(&c);
        Ok(0)
    })
}

fn request(slot: &kvmfault_memslot) -> Result<SlotRequest> {
    let known = KVMFAULT_MEMSLOT_VCPU_ONLY | KVMFAULT_MEMSLOT_PRESENT | KVMFAULT_MEMSLOT_KEEP | KVMFAULT_MEMSLOT_SLOW;
    if slot.flags & !known != 0 {
        fail!(EINVAL, "slot.flags: {:#x} has unknown bits", slot.flags);
    }
    if slot.reserved != 0 {
        fail!(EINVAL, "slot.reserved: is not 0");
    }
    let memory = match slot.memory {
        KVMFAULT_MEMORY_AUTO => MemoryKind::Auto,
        KVMFAULT_MEMORY_ANON => MemoryKind::Anon,
        KVMFAULT_MEMORY_SHARED => MemoryKind::Shared,
        KVMFAULT_MEMORY_HUGETLB => MemoryKind::Hugetlb,
        other => fail!(EINVAL, "slot.memory: {other} is not a KVMFAULT_MEMORY_*"),
    };
    if slot.block_hva.is_null() != (slot.block_len == 0) {
        fail!(EINVAL, "slot.block_len: block_hva and block_len must be given together");
    }
    Ok(SlotRequest {
        slot: slot.slot,
        kvm_flags: slot.kvm_flags,
        gpa: slot.gpa,
        len: slot.len,
        hva: slot.hva as u64,
        block: (!slot.block_hva.is_null()).then_some((slot.block_hva as u64, slot.block_len)),
        memory,
        file: (slot.fd != -1).then_some((slot.fd, slot.fd_offset)),
        vcpu_only: slot.flags & KVMFAULT_MEMSLOT_VCPU_ONLY != 0,
        present: slot.flags & KVMFAULT_MEMSLOT_PRESENT != 0,
        keep: slot.flags & KVMFAULT_MEMSLOT_KEEP != 0,
        slow: slot.flags & KVMFAULT_MEMSLOT_SLOW != 0,
    })
}

/// Turns the fast path of a slot on (1) or off (0) while vCPUs run, as post-copy does when it begins and ends. Off, absent pages are still
/// brought, by classic userfaultfd. `slot` is KVM's number (address space in bits 16-31). With the mechanism `userfaultfd` there is no
/// fast path, and this does nothing.
///
/// With KVMFAULT_VM_EXTERNAL_UFFD, off is the end of a post-copy: when this has returned 0, no thread is in a resolver call any more for a page of
/// the slot's memory that is there (one may have been on its way while the last pages came); if all are, what the resolver looks at can be put
/// away. So don't hold a lock that the resolver takes. -EBUSY: a page is missing (`poison-trap` only), or such a call has not returned for ten
/// seconds (the fast path is off then; call again).
///
/// A vCPU that sleeps for a page doesn't hold it up, with the limits that `kvmfault_memslot_set`
/// names.
///
/// Errors: -ENOENT (no such slot), -EINVAL (`on`), or KVM's errno. Any thread; calls take turns; not from callbacks.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_memslot_set_fast_only(vm: *const kvmfault_vm, slot: u32, on: c_int) -> c_int {
    with("kvmfault_memslot_set_fast_only", vm, |vm| {
        not_in_callback("kvmfault_memslot_set_fast_only")?;
        if !(0..=1).contains(&on) {
            fail!(EINVAL, "on: {on} is neither 0 nor 1");
        }
        vm.memslot_set_fast_only(slot, on == 1).map(|()| 0)
    })
}

/// The mechanism of one slot: KVMFAULT_MECHANISM_*, or -ENOENT. Any thread.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_memslot_mechanism(vm: *const kvmfault_vm, slot: u32) -> c_int {
    with("kvmfault_memslot_mechanism", vm, |vm| Ok(vm.slot_mechanism(slot)?.number()))
}

/// The counters of a VM: the sum over its vCPUs, its reader threads, and calls from outside. Any thread, also in callbacks; -EINVAL for a
/// bad `stats`.
///
/// # Safety
/// The pointers are NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_stats(vm: *const kvmfault_vm, stats: *mut kvmfault_stats) -> c_int {
    with("kvmfault_vm_stats", vm, |vm| {
        let out = Out::new(stats, "stats")?;
        out.write(&stats_of(&vm.stats()));
        Ok(0)
    })
}

/// Counters as C sees them.
pub fn stats_of(stats: &Stats) -> kvmfault_stats {
    kvmfault_stats {
        size: 0,
        faults_vcpu: stats.faults_vcpu.get(),
        faults_host: stats.faults_host.get(),
        faults_prefetch: stats.faults_prefetch.get(),
        resolver_calls: stats.resolver_calls.get(),
        outcome_resolved: stats.outcome_resolved.get(),
        outcome_waited: stats.outcome_waited.get(),
        outcome_mapped: stats.outcome_mapped.get(),
        outcome_lost: stats.outcome_lost.get(),
        outcome_failed: stats.outcome_failed.get(),
        outcome_interrupted: stats.outcome_interrupted.get(),
        outcome_retried: stats.outcome_retried.get(),
        pages_copied: stats.pages_copied.get(),
        pages_zeroed: stats.pages_zeroed.get(),
        pages_mapped: stats.pages_mapped.get(),
        pages_discarded: stats.pages_discarded.get(),
        retries_again: stats.retries_again.get(),
        retries_exist: stats.retries_exist.get(),
        mmio_reads: stats.mmio_reads.get(),
        mmio_writes: stats.mmio_writes.get(),
        kicks: stats.kicks.get(),
        latency_us_log2: std::array::from_fn(|n| stats.latency[n].get()),
        ahead_asked: stats.ahead_asked.get(),
        ahead_failed: stats.ahead_failed.get(),
        pages_empty: stats.pages_empty.get(),
        pages_given_back: stats.pages_given_back.get(),
    }
}
