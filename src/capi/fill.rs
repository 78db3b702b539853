//! Background fill: resolving what is absent while the guest runs.

use super::boundary::{clear_out, not_in_callback, put, with, Handle, Opaque};
use super::finalizer::Finalizer;
use super::resolver::kvmfault_finalizer;
use super::structs::{self, Out};
use super::vm::kvmfault_vm;
use crate::error::fail;
use crate::kernel::address::Gpa;
use crate::resolve::fill::{Fill, Progress};
use crate::vm::fill::FillRequest;
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::Duration;

/// In `kvmfault_fill_options.flags`: memory stays as it is when no page is absent any more, for a
/// VMM that goes on to discard pages and to have them fetched again.
pub const KVMFAULT_FILL_KEEP_ARMED: u32 = 1 << 0;

/// In `kvmfault_fill_options.flags`: don't recover huge pages at the end (MADV_COLLAPSE).
pub const KVMFAULT_FILL_NO_COLLAPSE: u32 = 1 << 1;

/// In `kvmfault_fill_options.flags`: resolve the working set only, and leave the other pages
/// absent.
pub const KVMFAULT_FILL_WORKING_SET_ONLY: u32 = 1 << 2;

/// A background fill. Opaque.
pub struct kvmfault_fill {
    _private: [u8; 0],
}

/// Progress of a fill. Start from KVMFAULT_FILL_PROGRESS_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_fill_progress {
    /// Set by KVMFAULT_FILL_PROGRESS_INIT; in the callback, sizeof(struct kvmfault_fill_progress)
    /// as the library knows it.
    pub size: usize,
    /// Pages of the fill's range that were absent when it began; of all memory, if it has no range.
    pub pages_total: u64,
    /// Pages of the fill's range that are absent now; of all memory, if it has no range.
    pub pages_left: u64,
    /// Calls of the resolver that failed. Their pages are tried again.
    pub failures: u64,
    /// Rate at which pages became present since the last report, whichever thread installed them;
    /// in `kvmfault_fill_status`, since the fill began, pauses included.
    pub bytes_per_second: u64,
    /// Milliseconds until no page is absent, at this rate; -1 if not known.
    pub eta_ms: i64,
    /// 1 if the working set is present, or none was given.
    pub working_set_done: u32,
    /// 1 if the fill is over, in whichever way: `kvmfault_fill_wait` tells.
    pub ended: u32,
    /// 1 between `kvmfault_fill_pause` and `kvmfault_fill_resume`; 0 if the fill is over.
    pub paused: u32,
    /// Threads of the fill that are in a call of the resolver, or about to make one. If this is 0
    /// and `paused` is 1, no call is under way for the fill, and none begins before
    /// `kvmfault_fill_resume`. Pages that the resolver has announced (KVMFAULT_PENDING) may still
    /// be outstanding.
    pub threads_calling: u32,
}

/// Fill progress callback: called every `interval_ms` and at the end. `progress` is valid during
/// the call.
///
/// Threads: one of the library's.
/// Callbacks: those that say "allowed".
pub type kvmfault_fill_callback =
    Option<unsafe extern "C" fn(opaque: *mut c_void, progress: *const kvmfault_fill_progress)>;

/// What `kvmfault_fill_start` needs; every field is optional. Start from
/// KVMFAULT_FILL_OPTIONS_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_fill_options {
    /// Set by KVMFAULT_FILL_OPTIONS_INIT.
    pub size: usize,
    /// Threads that call the resolver, 1 to 64; 0 means 1. They run with a nice value of 10.
    pub threads: u32,
    /// Most pages in the window of one resolver call, 1 to 4096; 0 means 64.
    pub batch: u32,
    /// Rate limit for all threads together; 0 means none. Pages of the guest's own faults don't
    /// count.
    pub bytes_per_second: u64,
    /// NULL, or the progress callback.
    pub progress: kvmfault_fill_callback,
    /// First argument of the callback.
    pub opaque: *mut c_void,
    /// NULL, or frees `opaque`.
    pub finalizer: kvmfault_finalizer,
    /// Milliseconds between reports; 0 means 1000.
    pub interval_ms: u32,
    /// KVMFAULT_FILL_* bits.
    pub flags: u32,
    /// -1, or a file that `kvmfault_working_set_save` wrote: its pages are resolved first, in the
    /// order in which they were needed then. A file that is damaged, of another version, or of a VM
    /// with other memory is refused with -EINVAL and the reason; start without it then.
    pub working_set_fd: c_int,
    /// Must be 0.
    pub reserved: u32,
    /// With `len`: the guest physical range to fill, [gpa, gpa + len). It may span slots and holes
    /// between them; what is in no slot is skipped. Both are multiples of 4096; in hugetlb memory a
    /// range begins and ends between two pages. An address at which several address spaces have
    /// memory means the first of them, as for `kvmfault_pages_state`. The fill is for the memory
    /// that is there when it starts: memory that slots show later isn't added, and a slot that is
    /// deleted is left out. Must be 0 if `len` is 0.
    pub gpa: u64,
    /// Length of the range in bytes; 0 means all memory. Nothing outside of the range is resolved:
    /// pages of the working set outside of it are left out. Memory that is shown at a second
    /// address, too, may be asked for there. At the end of a fill with a range memory stays as with
    /// KVMFAULT_FILL_KEEP_ARMED, whatever the range holds: after the last of them, a fill without a
    /// range makes the memory ordinary.
    pub len: u64,
}

impl Opaque for kvmfault_fill {
    type Inner = Arc<Fill>;
    const NAME: &'static str = "fill";
    const MAGIC: u64 = 0x6b76_6d66_6669_6c6c; // "kvmffill"
}

/// The VMM's progress callback, and what it is called with.
struct Reporter {
    progress: kvmfault_fill_callback,
    opaque: *mut c_void,
    _finalizer: Finalizer,
}

// SAFETY: the header says that a thread of the library calls `progress`, with this opaque pointer.
unsafe impl Send for Reporter {}

impl Reporter {
    fn report(&self, progress: &Progress) {
        if let Some(callback) = self.progress {
            let progress = progress_of(progress);
            // SAFETY: the VMM's function, called as the header says; `progress` lives during the
            // call.
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

/// Starts to resolve all absent pages, or those of a range (`options.gpa`, `options.len`), in the
/// background while the guest runs: threads of the library call the VM's resolver, with
/// KVMFAULT_ORIGIN_FILL, for windows of up to `options.batch` pages. Pages after the vCPUs' latest
/// faults come first, and a fault of the guest's own takes precedence. A resolver may install the
/// window or a part of it; it is called again for the rest. The fill waits for announced pages
/// (KVMFAULT_PENDING), with up to 64 windows outstanding a thread.
///
/// When no page is absent any more, the memory becomes ordinary (unless KVMFAULT_FILL_KEEP_ARMED or
/// a range is given): fast-only flags and markers are removed, userfaultfd is unregistered, and
/// huge pages are recovered (MADV_COLLAPSE, Linux 6.1), so that the guest runs as if its memory had
/// never been absent. Then `kvmfault_pages_discard` fails with -EBUSY (`kvmfault_pages_give_back`
/// still works), and a slot that is set anew on that memory is an ordinary one, until
/// `kvmfault_memslot_set_fast_only(.., 1)`. Memory with lost pages stays as it is.
///
/// Returns: 0, and *fill is the new handle; on an error *fill is NULL, and `finalizer` is not
///   called.
/// Errors:
///   -EINVAL: an argument; the message names it.
///   -ENOENT: no slot holds any of the range.
///   -EBUSY: a fill of this VM is under way.
///   -EOPNOTSUPP: the VM has KVMFAULT_VM_EXTERNAL_UFFD.
///   -EAGAIN: no thread can be started.
///   -EBADF, -EACCES: `working_set_fd` is closed, or not open for reading.
/// Threads: any.
/// Callbacks: refused with -EDEADLK.
/// Lifetime: free it with `kvmfault_fill_free`, before or after the VM. `options` need not outlive
///   the call; `opaque` stays until the finalizer has run.
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
            gpa: Gpa(options.gpa),
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

/// Waits for the end of a fill, `timeout_ms` milliseconds at most; a negative value means without
/// limit.
///
/// Returns: 0: no page is absent any more, the memory is ordinary, and no resolver call is under
///   way for it (a thread may have been in one while the last pages arrived): what the resolver
///   reads from may be closed. With a range, KVMFAULT_FILL_KEEP_ARMED or
///   KVMFAULT_FILL_WORKING_SET_ONLY: that part has been resolved, no more.
/// Errors:
///   -ETIMEDOUT: not yet; while it is paused, a fill doesn't end (`kvmfault_fill_pause`).
///   -ECANCELED: it was stopped.
///   -ESHUTDOWN: the VM was freed.
///   The -errno of the resolver that kept the other pages from being installed: they are absent as
///     before, and another fill may be started.
/// Threads: any, several at once too.
/// Callbacks: refused with -EDEADLK.
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

/// Waits until the working set (`options.working_set_fd`) is present, which is a good time to start
/// the guest. `timeout_ms` is as for `kvmfault_fill_wait`. Pages of it for which the resolver
/// failed are not waited for.
///
/// Returns: 0: the working set is present.
/// Errors:
///   Those of `kvmfault_fill_wait`.
/// Threads: any, several at once too.
/// Callbacks: refused with -EDEADLK.
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

/// Tells the progress of a fill.
///
/// Returns: 0, and *progress is filled in.
/// Errors:
///   -EINVAL: `progress` is NULL, or its size is wrong.
/// Threads: any.
/// Callbacks: allowed.
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

/// Pauses a fill, without waiting: a resolver call that is under way ends in its own time, and what
/// it installs is present; no further one begins for the fill until `kvmfault_fill_resume`.
/// `kvmfault_fill_status` tells when the last one has ended (`threads_calling` is 0). The guest's
/// own faults are served as always. The fill's threads sleep.
///
/// A fill doesn't end by itself while it is paused, not even if other threads install what is
/// absent: `kvmfault_fill_wait` waits on, to its timeout. (If no page was absent before this call,
/// the end may be under way, and memory may become ordinary.) Reports continue, with `paused` set.
/// Stopping and freeing the fill, and freeing or closing the VM, end it as always.
///
/// Returns: 0, also if the fill is paused already or over.
/// Errors: common errors only.
/// Threads: any.
/// Callbacks: allowed.
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

/// Resumes a paused fill where it was. One call is enough, however often `kvmfault_fill_pause` was
/// called. `options.bytes_per_second` counts from now on: the pause earns no higher rate. Pages for
/// which the resolver failed before are tried again before the fill gives up on them.
///
/// Returns: 0, also if the fill isn't paused or is over.
/// Errors: common errors only.
/// Threads: any.
/// Callbacks: allowed.
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

/// Asks a fill to stop, without waiting: a resolver call that is under way ends in its own time.
/// Pages that were not installed are absent as before, and another fill may be started when this
/// one has ended (`kvmfault_fill_wait` tells).
///
/// Returns: 0.
/// Errors: common errors only.
/// Threads: any.
/// Callbacks: allowed.
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

/// Stops a fill if it isn't over, and frees the handle, without waiting. NULL is allowed. Until a
/// resolver call that is under way has ended, another fill is refused (-EBUSY).
///
/// Threads: any.
/// Callbacks: allowed.
/// Lifetime: `opaque` stays until the finalizer has run, which is when the last call of `progress`
///   (with `ended` set) has returned: the finalizer doesn't wait for this function.
///
/// # Safety
/// `fill` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_fill_free(fill: *mut kvmfault_fill) {
    Handle::free("kvmfault_fill_free", fill, |fill| fill.stop());
}
