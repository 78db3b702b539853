//! Background fill, and working sets.

use super::vm::Vm;
use crate::error::{fail, Result};
use crate::kernel::address::Gpa;
use crate::resolve::{self, fill, not_in_callback};
use crate::vm::fill::FillRequest;
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// How a [`Fill`] goes about its work: for [`Vm::fill`].
#[derive(Debug, Clone, Default)]
#[must_use = "options do nothing until Vm::fill gets them"]
pub struct FillOptions<'a> {
    threads: u32,
    batch: u32,
    bytes_per_second: u64,
    range: Option<(u64, u64)>,
    working_set: Option<BorrowedFd<'a>>,
    working_set_only: bool,
    keep_armed: bool,
    no_collapse: bool,
    interval: Option<Duration>,
}

impl<'a> FillOptions<'a> {
    /// The usual: one thread, windows of 64 pages, no limit, all memory.
    pub fn new() -> FillOptions<'a> {
        FillOptions::default()
    }

    /// How many threads call the resolver, 1 to 64.
    pub fn threads(self, threads: u32) -> FillOptions<'a> {
        FillOptions { threads, ..self }
    }

    /// Most pages in the window of one resolver call, 1 to 4096.
    pub fn batch(self, pages: u32) -> FillOptions<'a> {
        FillOptions { batch: pages, ..self }
    }

    /// A limit for all threads together. Pages that the guest's own faults need don't count.
    pub fn bytes_per_second(self, limit: u64) -> FillOptions<'a> {
        FillOptions { bytes_per_second: limit, ..self }
    }

    /// Only the memory at these guest physical addresses. At the end memory stays as it is, as with
    /// [`keep_armed`](Self::keep_armed).
    pub fn range(self, gpa: u64, len: u64) -> FillOptions<'a> {
        FillOptions { range: Some((gpa, len)), ..self }
    }

    /// A file of [`Vm::save_working_set`]: its pages are fetched first, in the order in which they
    /// were needed.
    pub fn working_set(self, file: BorrowedFd<'a>) -> FillOptions<'a> {
        FillOptions { working_set: Some(file), ..self }
    }

    /// Fetches the working set, and leaves the rest absent.
    pub fn working_set_only(self) -> FillOptions<'a> {
        FillOptions { working_set_only: true, ..self }
    }

    /// Memory stays as it is when nothing is absent any more, for a VMM that goes on to discard
    /// pages.
    pub fn keep_armed(self) -> FillOptions<'a> {
        FillOptions { keep_armed: true, ..self }
    }

    /// Does not recover huge pages at the end.
    pub fn no_collapse(self) -> FillOptions<'a> {
        FillOptions { no_collapse: true, ..self }
    }

    /// The time between two calls of the progress callback; a second without this.
    pub fn interval(self, interval: Duration) -> FillOptions<'a> {
        FillOptions { interval: Some(interval), ..self }
    }
}

impl Vm {
    /// Starts to fetch all absent pages in the background, while the guest runs: threads of the
    /// library call the resolver, with [`Origin::Fill`](crate::Origin::Fill). When nothing is
    /// absent any more the memory becomes ordinary, and huge pages are recovered. `EBUSY` if a fill
    /// is under way. Not from callbacks.
    ///
    /// `progress` is called from a thread of the library, now and then and at the end; it may do
    /// what a resolver may.
    ///
    /// ```no_run
    /// # fn example(vm: &kvmfault::Vm) -> Result<(), kvmfault::Error> {
    /// use kvmfault::FillOptions;
    ///
    /// let options = FillOptions::new().threads(2).bytes_per_second(1 << 30);
    /// let fill = vm.fill(options, |progress| eprintln!("{} pages left", progress.pages_left))?;
    /// fill.wait(None)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn fill(&self, options: FillOptions<'_>, progress: impl Fn(&FillProgress) + Send + 'static) -> Result<Fill> {
        let vm = self.outside_callbacks("Vm::fill")?;
        if options.working_set_only && options.working_set.is_none() {
            fail!(EINVAL, "working_set: must be given with working_set_only");
        }
        let (gpa, len) = match options.range {
            Some((gpa, 0)) => fail!(EINVAL, "range: at {gpa:#x} is empty"),
            range => range.unwrap_or((0, 0)),
        };
        let report = move |now: &fill::Progress| {
            let now = FillProgress::of(now);
            resolve::callback(|| progress(&now));
        };
        let request = FillRequest {
            threads: options.threads,
            batch: options.batch,
            bytes_per_second: options.bytes_per_second,
            gpa: Gpa(gpa),
            len,
            working_set: options.working_set.map(|fd| fd.as_raw_fd()),
            only_first: options.working_set_only,
            keep_armed: options.keep_armed,
            no_collapse: options.no_collapse,
            interval: options.interval.unwrap_or(Duration::from_secs(1)),
            report: Box::new(report),
        };
        Ok(Fill { inner: vm.fill(request)? })
    }

    /// Starts to record anew which pages are needed, in which order; or ends it, and forgets what
    /// was recorded. Not from callbacks.
    pub fn record_working_set(&self, on: bool) -> Result<()> {
        self.outside_callbacks("Vm::record_working_set")?.record_working_set(on)
    }

    /// Writes what was recorded until now to a regular file, over what is in it, for
    /// [`FillOptions::working_set`] of the next restore of the same snapshot. `ENODATA` if nothing
    /// is being recorded. Not from callbacks.
    pub fn save_working_set(&self, file: BorrowedFd<'_>) -> Result<()> {
        self.outside_callbacks("Vm::save_working_set")?.save_working_set(file.as_raw_fd())
    }
}

/// A background fill. Dropping it stops it, without waiting.
pub struct Fill {
    inner: Arc<fill::Fill>,
}

impl Fill {
    /// Waits for the end, for `timeout` at most: nothing is absent any more, and no resolver call
    /// is under way. `ETIMEDOUT`: not yet. `ECANCELED`: it was stopped. `ESHUTDOWN`: the VM was
    /// closed. Else the error of the resolver that kept the rest from being fetched. Not from
    /// callbacks.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<()> {
        not_in_callback("Fill::wait")?;
        self.inner.wait(false, timeout)
    }

    /// Waits until the working set is there: a good time to start the guest. Not from callbacks.
    pub fn wait_working_set(&self, timeout: Option<Duration>) -> Result<()> {
        not_in_callback("Fill::wait_working_set")?;
        self.inner.wait(true, timeout)
    }

    /// How far it is; the rate is the average since it began.
    pub fn progress(&self) -> FillProgress {
        FillProgress::of(&self.inner.status())
    }

    /// Pauses it, without waiting: no further resolver call begins until [`resume`](Self::resume).
    pub fn pause(&self) {
        self.inner.pause();
    }

    /// Continues where it was paused.
    pub fn resume(&self) {
        self.inner.resume();
    }

    /// Asks it to stop, without waiting. Pages that were not fetched stay absent.
    pub fn stop(&self) {
        self.inner.stop();
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.inner.stop();
    }
}

impl fmt::Debug for Fill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fill").field("progress", &self.progress()).finish()
    }
}

/// How far a [`Fill`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FillProgress {
    /// Pages that were absent when it began.
    pub pages_total: u64,
    /// Pages that are absent now.
    pub pages_left: u64,
    /// Calls of the resolver that failed. The pages are tried again.
    pub failures: u64,
    /// At which rate memory came since the last report, whichever thread fetched it.
    pub bytes_per_second: u64,
    /// Until nothing is absent, at this rate; `None` if that can't be told.
    pub eta: Option<Duration>,
    /// The working set is there, or none was given.
    pub working_set_done: bool,
    /// It is over: [`Fill::wait`] tells how.
    pub ended: bool,
    /// It is paused.
    pub paused: bool,
    /// Threads that are in a call of the resolver, or on their way to one.
    pub threads_calling: u32,
}

impl FillProgress {
    fn of(progress: &fill::Progress) -> FillProgress {
        FillProgress {
            pages_total: progress.total,
            pages_left: progress.left,
            failures: progress.failed,
            bytes_per_second: progress.bytes_per_second,
            eta: progress.eta,
            working_set_done: progress.first_done,
            ended: progress.ended,
            paused: progress.paused,
            threads_calling: progress.calling,
        }
    }
}
