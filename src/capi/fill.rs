//! Background fill.

use super::boundary::{clear_out, not_in_callback, put, with, Handle, Opaque};
use super::finalizer::Finalizer;
use super::resolver::kvmfault_finalizer;
use super::structs::{self, Out};
use super::vm::kvmfault_vm;
use crate::error::fail;
use crate::resolve::fill::{Fill, Progress};
use crate::vm::fill::FillRequest;
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::Duration;

/// `kvmfault_fill_options.flags`: memory stays as it is when nothing is absent any more, for a VMM that goes on to discard pages and have them
/// brought again.
pub const KVMFAULT_FILL_KEEP_ARMED: u32 = 1 << 0;

/// `kvmfault_fill_options.flags`: huge pages are not recovered at the end.
pub const KVMFAULT_FILL_NO_COLLAPSE: u32 = 1 << 1;

/// `kvmfault_fill_options.flags`: bring the working set, and leave the rest absent.
pub const KVMFAULT_FILL_WORKING_SET_ONLY: u32 = 1 << 2;

/// A background fill. Opaque. What takes it `const` may be called from any thread.
pub struct kvmfault_fill {
    _private: [u8; 0],
}

/// How a fill goes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_fill_progress {
    /// Set by KVMFAULT_FILL_PROGRESS_INIT; in the callback, sizeof(struct kvmfault_fill_progress) as the library knows it.
    pub size: usize,
    /// Pages that were absent when it began; of the fill's range, if it has one (`options.len`).
    pub pages_total: u64,
    /// Pages that are absent now; of the fill's range, if it has one.
    pub pages_left: u64,
    /// Calls of the resolver that failed. The pages are tried again.
    pub failures: u64,
    /// At which rate memory came since the last report, whoever brought it.
    pub bytes_per_second: u64,
    /// Milliseconds until nothing is absent, at this rate; -1 if that can't be told.
    pub eta_ms: i64,
    /// 1 when the working set is there (or none was given).
    pub working_set_done: u32,
    /// 1 when the fill is over, one way or another: `kvmfault_fill_wait` tells which.
    pub ended: u32,
    /// 1 between `kvmfault_fill_pause` and `kvmfault_fill_resume`; 0 when the fill is over.
    pub paused: u32,
    /// Threads of the fill that are in a call of the resolver, or on their way to one. When this is
    /// 0 and `paused` 1, no call is under way for the fill, and none begins before
    /// `kvmfault_fill_resume`. Pages that the resolver has announced (KVMFAULT_PENDING) may still
    /// be on their way.
    pub threads_calling: u32,
}

/// Told how a fill goes, every `interval_ms` and at the end, on a thread of the library. It may call what a resolver may, and the functions on
/// fills except `_start` and `_wait`. `progress` lives during the call.
pub type kvmfault_fill_callback =
    Option<unsafe extern "C" fn(opaque: *mut c_void, progress: *const kvmfault_fill_progress)>;

/// What `kvmfault_fill_start` needs. Start from KVMFAULT_FILL_OPTIONS_INIT; all of it is optional.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_fill_options {
    /// Set by KVMFAULT_FILL_OPTIONS_INIT.
    pub size: usize,
    /// Threads that call the resolver, 1 to 64; 0 means 1. They run with a nice value of 10.
    pub threads: u32,
    /// Most pages in the window of one resolver call, 1 to 4096; 0 means 64.
    pub batch: u32,
    /// A limit for all threads together; 0: none. Pages that the guest's own faults bring don't count.
    pub bytes_per_second: u64,
    /// NULL, or told how it goes.
    pub progress: kvmfault_fill_callback,
    /// First argument of the callback.
    pub opaque: *mut c_void,
    /// NULL, or frees `opaque`.
    pub finalizer: kvmfault_finalizer,
    /// Milliseconds between reports; 0 means 1000.
    pub interval_ms: u32,
    /// KVMFAULT_FILL_* bits.
    pub flags: u32,
    /// -1, or a file that `kvmfault_working_set_save` wrote: those pages come first, in the order in which they were needed. A file that is
    /// damaged, of another version, or of a VM with other memory is refused with -EINVAL and the reason; start without it then.
    pub working_set_fd: c_int,
    /// Must be 0.
    pub reserved: u32,
    /// With `len`: the memory to fill, [gpa, gpa + len), guest physical, in bytes. The range may
    /// span several slots, and holes between them; what is in no slot is skipped. Both are
    /// multiples of 4096; a range that begins or ends in hugetlb memory does so between two pages
    /// of it. An address that several address spaces have memory at is that of the first of them,
    /// as for `kvmfault_pages_state`. It is the memory that is there when the fill starts: what
    /// slots show later isn't added, and a slot that is deleted is left out. 0 if `len` is 0.
    pub gpa: u64,
    /// Length of the range; 0: all memory. Nothing outside of the range is brought, also not by the
    /// working set (its pages outside are left out) or by what follows the vCPUs' faults. Memory
    /// that is shown at a second address, too, may be asked for there. At the end of a fill with a
    /// range memory stays as it is, as with KVMFAULT_FILL_KEEP_ARMED, whatever the range holds:
    /// when the last of them is over, a fill without a range makes the memory ordinary.
    pub len: u64,
}

impl Opaque for kvmfault_fill {
    type Inner = Arc<Fill>;
    const NAME: &'static str = "fill";
    const MAGIC: u64 = 0x6b76_6d66_6669_6c6c; // "kvmffill"
}

/// The VMM's callback, and what it is called with.
struct Reporter {
    progress: kvmfault_fill_callback,
    opaque: *mut c_void,
    _finalizer: Finalizer,
}

// SAFETY: the header says that `progress` is called from a thread of the library, with this opaque pointer.
unsafe impl Send for Reporter {}

impl Reporter {
    fn report(&self, progress: &Progress) {
        if let Some(callback) = self.progress {
            let progress = progress_of(progress);
            // SAFETY: the VMM's function, called as the header says; `progress` lives during the call.
            crate::resolve::callback(|| unsafe { callback(self.opaque, &progress) });
        }
    }
}

fn progress_of(progress: &Progress) -> kvmfault_fill_progress {
    kvmfault_fill_progress {
        size: size_of::<kvmfault_fill_progress>(),
        pages_total: progress.total,
        pages_left: progress.left,
        failures: progress.failed,
        bytes_per_second: progress.bytes_per_second,
        eta_ms: progress.eta.map_or(-1, |eta| i64::try_from(eta.as_millis()).unwrap_or(-1)),
        working_set_done: progress.first_done.into(),
        ended: progress.ended.into(),
        paused: progress.paused.into(),
        threads_calling: progress.calling,
    }
}

/// Starts to bring all absent pages (or those of a range: `options.gpa`, `options.len`) in the
/// background, while the guest runs: threads of the library call the VM's resolver, with
/// KVMFAULT_ORIGIN_FILL, for windows of up to `options.batch` pages. What follows the vCPUs' latest faults comes first; a fault of the guest's own
/// goes before the fill. A resolver may install the window or a part of it; it is asked again for the rest. A page that it announces
/// (KVMFAULT_PENDING) is waited for, with up to 64 windows a thread under way.
///
/// When nothing is absent any more the memory becomes ordinary (unless KVMFAULT_FILL_KEEP_ARMED or
/// a range is given): fast-only flags and traps are
/// taken away, userfaultfd is unregistered, and huge pages are recovered (MADV_COLLAPSE), so that the guest runs as if its memory had never been
/// absent. `kvmfault_pages_discard` then fails with -EBUSY (`kvmfault_pages_give_back` works on), and a slot that is set anew on that memory is an ordinary one, until
/// `kvmfault_memslot_set_fast_only(.., 1)`. Memory with lost pages stays as it is.
///
/// On success *fill is the new handle, to be freed with `kvmfault_fill_free`; on an error it is NULL, and `finalizer` is not called. Errors: -EINVAL
/// (an argument; the message names it), -ENOENT (no slot holds any of the range), -EBUSY (a fill of
/// this VM is under way), -EOPNOTSUPP (KVMFAULT_VM_EXTERNAL_UFFD), -EAGAIN (no thread can be
/// started), -EBADF. Any thread; not from callbacks.
///
/// # Safety
/// The pointers are NULL or valid, and the callbacks are as the header says.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_fill_start(
    vm: *const kvmfault_vm,
    options: *const kvmfault_fill_options,
    fill: *mut *mut kvmfault_fill,
) -> c_int {
    with("kvmfault_fill_start", vm, |vm| {
        clear_out(fill, "fill")?;
        not_in_callback("kvmfault_fill_start")?;
        let options = structs::read(options, "options")?;
        let known = KVMFAULT_FILL_KEEP_ARMED | KVMFAULT_FILL_NO_COLLAPSE | KVMFAULT_FILL_WORKING_SET_ONLY;
        if options.flags & !known != 0 {
            fail!(EINVAL, "options.flags: {:#x} has unknown bits", options.flags);
        }
        if options.reserved != 0 {
            fail!(EINVAL, "options.reserved: is not 0");
        }
        let only_first = options.flags & KVMFAULT_FILL_WORKING_SET_ONLY != 0;
        if only_first && options.working_set_fd == -1 {
            fail!(EINVAL, "options.working_set_fd: must be given with KVMFAULT_FILL_WORKING_SET_ONLY");
        }
        let (finalizer, arm) = Finalizer::new(options.finalizer, options.opaque);
        let reporter = Reporter { progress: options.progress, opaque: options.opaque, _finalizer: finalizer };
        let request = FillRequest {
            threads: options.threads,
            batch: options.batch,
            bytes_per_second: options.bytes_per_second,
            gpa: options.gpa,
            len: options.len,
            working_set: (options.working_set_fd != -1).then_some(options.working_set_fd),
            only_first,
            keep_armed: options.flags & KVMFAULT_FILL_KEEP_ARMED != 0,
            no_collapse: options.flags & KVMFAULT_FILL_NO_COLLAPSE != 0,
            interval: Duration::from_millis(if options.interval_ms == 0 { 1000 } else { options.interval_ms.into() }),
            report: Box::new(move |progress| reporter.report(progress)),
        };
        let started = vm.fill(request)?;
        put(fill, Handle::expose(started));
        arm.arm();
        Ok(0)
    })
}

/// Waits for the end of a fill, `timeout_ms` milliseconds at most (negative: for as long as it takes).
///
/// Returns 0: nothing is absent any more, the memory is ordinary, and no resolver call is under way for it (a thread may have been on its way while
/// the last pages came): what the resolver reads from can be put away. With a range,
/// KVMFAULT_FILL_KEEP_ARMED or _WORKING_SET_ONLY only that it was brought. -ETIMEDOUT: not yet, and
/// not while the fill is paused (`kvmfault_fill_pause`). -ECANCELED: it was stopped. -ESHUTDOWN:
/// the VM was freed. Else
/// the error of the resolver that kept the rest from being brought; those pages are absent as before, and another fill may be started. Any thread,
/// several at once too; not from callbacks.
///
/// # Safety
/// `fill` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_fill_wait(fill: *const kvmfault_fill, timeout_ms: i64) -> c_int {
    with("kvmfault_fill_wait", fill, |fill| {
        not_in_callback("kvmfault_fill_wait")?;
        let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        fill.wait(false, timeout).map(|()| 0)
    })
}

/// The same, but waits only until the working set is there (`options.working_set_fd`): a good time to start the guest. Pages of it that the
/// resolver failed for are not waited for.
///
/// # Safety
/// `fill` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_fill_wait_working_set(fill: *const kvmfault_fill, timeout_ms: i64) -> c_int {
    with("kvmfault_fill_wait_working_set", fill, |fill| {
        not_in_callback("kvmfault_fill_wait_working_set")?;
        let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        fill.wait(true, timeout).map(|()| 0)
    })
}

/// How a fill goes; the rate is the average since it began, pauses included. Any thread, also in
/// callbacks.
///
/// # Safety
/// The pointers are NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_fill_status(
    fill: *const kvmfault_fill,
    progress: *mut kvmfault_fill_progress,
) -> c_int {
    with("kvmfault_fill_status", fill, |fill| {
        let out = Out::new(progress, "progress")?;
        out.write(&progress_of(&fill.status()));
        Ok(0)
    })
}

/// Pauses a fill, and waits for nothing: a resolver call that is under way ends when it ends, and
/// what it brings is there; no further one begins for the fill until `kvmfault_fill_resume`.
/// `kvmfault_fill_status` tells when the last one has ended (`threads_calling` is 0). The guest's
/// own faults are served as ever.
///
/// A fill that is paused doesn't end by itself, also if other threads bring what is absent:
/// `kvmfault_fill_wait` goes on waiting, to its timeout. (If nothing was absent any more before
/// this call, the end, and memory that becomes ordinary, may be on their way.) Reports go on to
/// come, with `paused` set. Stopping and freeing it, and freeing or closing the VM, end it as ever.
/// Its threads sleep.
///
/// Returns 0, also if the fill is paused already or over; -EINVAL (NULL), -EBADF. Any thread, also
/// in callbacks.
///
/// # Safety
/// `fill` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_fill_pause(fill: *const kvmfault_fill) -> c_int {
    with("kvmfault_fill_pause", fill, |fill| {
        fill.pause();
        Ok(0)
    })
}

/// Has a fill that is paused go on where it was. One call is enough, however often
/// `kvmfault_fill_pause` was called. `options.bytes_per_second` counts from now on: time in which
/// nothing came allows no more later. Pages for which the resolver failed before are tried again
/// before the fill gives up for them.
///
/// Returns 0, also if the fill isn't paused or is over; -EINVAL (NULL), -EBADF. Any thread, also in
/// callbacks.
///
/// # Safety
/// `fill` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_fill_resume(fill: *const kvmfault_fill) -> c_int {
    with("kvmfault_fill_resume", fill, |fill| {
        fill.resume();
        Ok(0)
    })
}

/// Asks a fill to stop, and waits for nothing: a resolver call that is under way ends when it ends. Nothing is lost: what was not brought is absent as
/// before, and another fill may be started when this one has ended (`kvmfault_fill_wait` tells). Any thread, also in callbacks.
///
/// # Safety
/// `fill` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_fill_stop(fill: *const kvmfault_fill) -> c_int {
    with("kvmfault_fill_stop", fill, |fill| {
        fill.stop();
        Ok(0)
    })
}

/// Stops a fill, if it isn't over, and gives its handle back. NULL is allowed. Waits for nothing; until a resolver call that is under way has ended
/// another fill is refused (-EBUSY). Any thread, also from callbacks.
///
/// The finalizer doesn't wait for this call: it runs when the last call of `progress` (with `ended` set) has returned.
///
/// # Safety
/// `fill` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_fill_free(fill: *mut kvmfault_fill) {
    Handle::free("kvmfault_fill_free", fill, |fill| fill.stop());
}
