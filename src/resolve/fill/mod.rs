//! Background fill: threads that fetch pages through the VMM's resolver before the guest needs
//! them, until no page is absent.

mod order;
mod pace;
mod pause;
mod scope;
mod start;
mod worker;

use super::Engine;
use crate::error::{fail, Error, Result};
use crate::kernel::address::Hva;
use crate::kernel::signal;
use crate::kernel::thread::{set_nice, spawn};
use crate::memory::block::Block;
use crate::memory::pages::State;
use crate::memory::slots::Slots;
use order::Order;
use pace::Limit;
use pause::Pause;
pub use scope::Scope;
use start::{EndOnPanic, Gate};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// The nice value of fill threads: the guest's threads come first.
const NICE: i32 = 10;

/// The parameters of a fill.
pub struct Options {
    /// The number of threads.
    pub threads: u32,
    /// The most pages in one resolver call.
    pub batch: u64,
    /// The most bytes a second; 0 for no limit.
    pub bytes_per_second: u64,
    /// The memory that is fetched and counted.
    pub scope: Scope,
    /// What to fetch first: addresses in the VMM's mapping.
    pub first: Vec<Range<Hva>>,
    /// Fetches `first` only.
    pub only_first: bool,
    /// How often `report` is called.
    pub interval: Duration,
    /// What to do when no page is absent any more.
    pub finish: Box<Finish>,
}

/// The callback for progress reports.
pub type Report = dyn Fn(&Progress) + Send;

/// The callback at the end; EBUSY if a page is absent again. Its argument says whether the fill is
/// to stop.
pub type Finish = dyn Fn(&dyn Fn() -> bool) -> Result<()> + Send + Sync;

/// The progress of a fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Pages that were absent when the fill began.
    pub total: u64,
    /// Pages that are absent now.
    pub left: u64,
    /// Tries that failed.
    pub failed: u64,
    /// Bytes a second that were installed since the last report, by the fill or otherwise.
    pub bytes_per_second: u64,
    /// The time until no page is absent, at this rate; None if it cannot be told.
    pub eta: Option<Duration>,
    /// What is fetched first is PRESENT, or was tried.
    pub first_done: bool,
    /// The fill is over.
    pub ended: bool,
    /// The fill is paused.
    pub paused: bool,
    /// Threads that are in a resolver call, or about to enter one. 0 in a pause means that no call
    /// is under way and none begins.
    pub calling: u32,
}

/// A fill, under way or over.
pub struct Fill {
    engine: Arc<Engine>,
    options: Options,
    begin: Instant,
    order: Mutex<Order>,
    limit: Limit,
    pause: Pause,
    stop: AtomicBool,
    /// Pages that were absent when the fill began, and their bytes.
    total: u64,
    total_bytes: u64,
    /// What is fetched first, for `Ends::first`.
    first: Vec<Range<Hva>>,
    failed: AtomicU64,
    /// Tries in a row that failed, of all threads.
    failures_in_a_row: AtomicU32,
    /// Threads that have a piece; and threads that have a piece of what is fetched first.
    busy: AtomicU32,
    busy_first: AtomicU32,
    /// Threads that are in a resolver call, or about to enter one.
    calling: AtomicU32,
    last_error: Mutex<Option<Error>>,
    /// Whether the fill is over, and whether what is fetched first is PRESENT.
    state: Mutex<Ends>,
    changed: Condvar,
}

#[derive(Debug, Default, Clone)]
struct Ends {
    first: bool,
    all: Option<Result<()>>,
}

impl Fill {
    /// Starts the threads. `report` is dropped after its last call.
    pub fn start(engine: &Arc<Engine>, mut options: Options, report: Box<Report>) -> Result<Arc<Fill>> {
        let mut report = Some(report);
        let first = std::mem::take(&mut options.first);
        let first: Vec<_> = first.into_iter().flat_map(|range| options.scope.within(range)).collect();
        let slots = engine.memory.slots();
        let absent = |(b, pages): (&Arc<Block>, _)| b.pages.count(pages, State::Absent) * b.page;
        let fill = Arc::new(Fill {
            engine: engine.clone(),
            begin: Instant::now(),
            order: Mutex::new(Order::new(first.clone(), options.only_first, options.scope.clone())),
            limit: Limit::new(options.bytes_per_second),
            pause: Pause::default(),
            stop: AtomicBool::new(false),
            total: left_of(&options.scope, &slots),
            total_bytes: options.scope.pages(&slots).map(absent).sum(),
            first,
            failed: AtomicU64::new(0),
            failures_in_a_row: AtomicU32::new(0),
            busy: AtomicU32::new(0),
            busy_first: AtomicU32::new(0),
            calling: AtomicU32::new(0),
            last_error: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
            options,
        });
        // The threads begin when all of them exist: if one cannot be started, the others must call
        // nothing.
        let mut threads = Vec::new();
        let gate = Arc::new(Gate::default());
        for n in 0..fill.options.threads {
            let (mine, callbacks, report) = (fill.clone(), engine.callbacks.keep(), report.take());
            let waits_at = gate.clone();
            let work = move || {
                // Dropped after the fill: the VM is not over while this thread may use its memory.
                let _callbacks = callbacks;
                let _guard = EndOnPanic(&mine);
                signal::block_all();
                if !waits_at.wait() {
                    return;
                }
                set_nice(NICE);
                match report {
                    Some(report) => mine.lead(&*report),
                    None => mine.follow(),
                }
            };
            match spawn(format!("kvmfault-fill/{n}"), work) {
                Ok(thread) => threads.push(thread),
                Err(e) => {
                    gate.open(false);
                    threads.into_iter().for_each(|thread| drop(thread.join()));
                    return Err(Error::from_io("starting a fill thread", &e));
                }
            }
        }
        gate.open(true);
        Ok(fill)
    }

    /// Asks the threads to stop, without waiting. A resolver call that is under way is not
    /// interrupted.
    pub fn stop(&self) {
        self.stop.store(true, SeqCst);
        self.pause.wake();
    }

    /// Lets no resolver call begin until `resume`, without waiting.
    pub fn pause(&self) {
        self.pause.ask();
    }

    /// Ends a pause.
    pub fn resume(&self) {
        // What failed before the pause may work now.
        if self.pause.is_asked() {
            self.failures_in_a_row.store(0, SeqCst);
        }
        self.pause.end();
    }

    /// Ends a pause because the engine was shut down.
    pub fn note_shutdown(&self) {
        self.pause.wake();
    }

    /// Waits for the end, or with `first` for what is fetched first. ETIMEDOUT after `timeout`.
    pub fn wait(&self, first: bool, timeout: Option<Duration>) -> Result<()> {
        let poisoned = || Error::new(libc::ENOTRECOVERABLE, "a fill thread panicked (see stderr)");
        let not_yet = |ends: &mut Ends| !(ends.all.is_some() || first && ends.first);
        let ends = self.state.lock().map_err(|_| poisoned())?;
        let ends = match timeout {
            None => self.changed.wait_while(ends, not_yet).map_err(|_| poisoned())?,
            Some(timeout) => self.changed.wait_timeout_while(ends, timeout, not_yet).map_err(|_| poisoned())?.0,
        };
        match (&ends.all, ends.first && first) {
            (_, true) => Ok(()),
            (Some(result), _) => result.clone(),
            _ => fail!(ETIMEDOUT, "{} of {} pages are still absent", self.left(), self.total),
        }
    }

    /// Is the fill over?
    pub fn has_ended(&self) -> bool {
        self.state.lock().map_or(true, |ends| ends.all.is_some())
    }

    /// The progress of the fill, with the average rate.
    pub fn status(&self) -> Progress {
        self.progress(self.begin, self.total)
    }

    /// Pages that are ABSENT or RESOLVING.
    fn left(&self) -> u64 {
        left_of(&self.options.scope, &self.engine.memory.slots())
    }

    /// The progress of the fill, with the rate since `since`, when `left_then` pages were absent.
    fn progress(&self, since: Instant, left_then: u64) -> Progress {
        let left = self.left();
        let page = self.total_bytes as f64 / self.total.max(1) as f64;
        let rate = left_then.saturating_sub(left) as f64 * page / since.elapsed().as_secs_f64().max(1e-3);
        let ends = self.state.lock().map(|s| s.clone()).unwrap_or_default();
        let asked = self.pause.is_asked(); // before `calling`: see `call`
        Progress {
            total: self.total,
            left,
            failed: self.failed.load(Relaxed),
            bytes_per_second: rate as u64,
            eta: Duration::try_from_secs_f64(left as f64 * page / rate).ok(),
            first_done: ends.first,
            paused: asked && ends.all.is_none(),
            ended: ends.all.is_some(),
            calling: self.calling.load(SeqCst),
        }
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(SeqCst) || self.engine.is_shut_down()
    }

    fn end(&self, result: Result<()>) {
        if let Ok(mut ends) = self.state.lock() {
            ends.all.get_or_insert(result);
        }
        self.changed.notify_all();
        self.stop();
    }
}

/// Pages of a scope that are ABSENT or RESOLVING.
fn left_of(scope: &Scope, slots: &Slots) -> u64 {
    scope.count(slots, State::Absent) + scope.count(slots, State::Resolving)
}
