//! Background fill: threads that bring what the guest hasn't asked for yet, through the VMM's resolver, until nothing is absent.

mod order;
mod pace;
mod pause;
mod scope;

use super::{Engine, More, Need, Origin, Outcome, MOST_RETRIES};
use crate::error::{fail, Error, Result};
use crate::kernel::signal;
use crate::kernel::thread::{set_nice, spawn};
use crate::memory::block::Block;
use crate::memory::pages::State;
use crate::memory::slots::Slots;
use order::{Order, Piece};
use pace::{give_way, Limit};
use pause::Pause;
pub use scope::Scope;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So many pages that a resolver has announced (KVMFAULT_PENDING) may be outstanding for each thread.
const MOST_PENDING: usize = 64;
/// A thread that has nothing to do looks again after this time; so it sees soon that it is to stop.
const LOOK: Duration = Duration::from_millis(1);
/// The pause after tries without success grows to this.
const LONGEST_PAUSE: Duration = Duration::from_millis(10);
/// So many tries in a row that failed are the end: the resolver is dead.
const MOST_FAILURES: u32 = 1000;
/// Fill threads have this nice value: the guest's threads come first.
const NICE: i32 = 10;

/// What a fill is to do.
pub struct Options {
    /// Threads.
    pub threads: u32,
    /// Most pages that the resolver is asked for together.
    pub batch: u64,
    /// 0: no limit.
    pub bytes_per_second: u64,
    /// Nothing outside of it is brought or counted.
    pub scope: Scope,
    /// What comes first: addresses in the VMM's mapping.
    pub first: Vec<Range<u64>>,
    /// And nothing else.
    pub only_first: bool,
    /// How often `report` is called.
    pub interval: Duration,
    /// What to do when nothing is absent any more.
    pub finish: Box<Finish>,
}

/// Told how it goes.
pub type Report = dyn Fn(&Progress) + Send;

/// EBUSY if something is absent again. It may ask now and then whether it is to stop.
pub type Finish = dyn Fn(&dyn Fn() -> bool) -> Result<()> + Send + Sync;

/// How it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Pages that were absent when it began.
    pub total: u64,
    /// Pages that are absent now.
    pub left: u64,
    /// Tries that failed.
    pub failed: u64,
    /// That came since the last report, whoever brought them.
    pub bytes_per_second: u64,
    /// Until nothing is absent, at this rate; None if it can't be told.
    pub eta: Option<Duration>,
    /// What was to come first is there, or was tried.
    pub first_done: bool,
    /// It is over.
    pub ended: bool,
    /// It is paused.
    pub paused: bool,
    /// Threads that are in a resolver call, or on their way to one. None while it is paused: none
    /// will be.
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
    /// Pages that were absent when it began, and their bytes.
    total: u64,
    total_bytes: u64,
    /// What comes first, for `Ends::first`.
    first: Vec<Range<u64>>,
    failed: AtomicU64,
    /// Tries without success in a row, of all threads.
    in_vain: AtomicU32,
    /// Threads that are in the middle of a piece; of one that comes first.
    busy: AtomicU32,
    busy_first: AtomicU32,
    /// Threads that are in a resolver call, or on their way to one.
    calling: AtomicU32,
    last_error: Mutex<Option<Error>>,
    /// The end, and that what comes first is there.
    state: Mutex<Ends>,
    changed: Condvar,
}

#[derive(Debug, Default, Clone)]
struct Ends {
    first: bool,
    all: Option<Result<()>>,
}

impl Fill {
    /// Starts the threads. `report` is dropped after its last call, whoever has the fill then.
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
            in_vain: AtomicU32::new(0),
            busy: AtomicU32::new(0),
            busy_first: AtomicU32::new(0),
            calling: AtomicU32::new(0),
            last_error: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
            options,
        });
        // Threads begin when all of them are there: one that can't be started must leave none that calls anything.
        let mut threads = Vec::new();
        let gate = Arc::new(Gate::default());
        for n in 0..fill.options.threads {
            let (mine, callbacks, report) = (fill.clone(), engine.callbacks.keep(), report.take());
            let waits_at = gate.clone();
            let work = move || {
                // Dropped last of the two: a VM isn't over while this thread may be at its memory.
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

    /// Asks it to stop; waits for nothing. A resolver call that is under way ends when it ends.
    pub fn stop(&self) {
        self.stop.store(true, SeqCst);
        self.pause.wake();
    }

    /// Begins no more resolver calls until `resume`; waits for nothing.
    pub fn pause(&self) {
        self.pause.ask();
    }

    /// Goes on where it was.
    pub fn resume(&self) {
        // What failed before may work now: that is what pauses are for.
        if self.pause.is_asked() {
            self.in_vain.store(0, SeqCst);
        }
        self.pause.end();
    }

    /// The engine was shut down: threads that wait for the end of a pause go, too.
    pub fn note_shutdown(&self) {
        self.pause.wake();
    }

    /// Waits for the end, or only for what comes first. ETIMEDOUT if it isn't there in time.
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

    /// Is it over?
    pub fn has_ended(&self) -> bool {
        self.state.lock().map_or(true, |ends| ends.all.is_some())
    }

    /// How it goes; the rate is the average.
    pub fn status(&self) -> Progress {
        self.progress(self.begin, self.total)
    }

    /// Pages that are absent now, or being brought.
    fn left(&self) -> u64 {
        left_of(&self.options.scope, &self.engine.memory.slots())
    }

    /// How it goes; the rate is that since `since`, when so many pages were absent.
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

    /// The first thread: works like the others, and besides reports, and sees the end.
    fn lead(&self, report: &Report) {
        let mut hand = Hand::default();
        let (mut reported, mut left_then) = (Instant::now(), self.total);
        let (mut idle, mut left_before) = (0, u64::MAX);
        let mut withdrawn = self.engine.memory.withdrawn.load(Relaxed);
        while !self.is_stopped() {
            if reported.elapsed() >= self.options.interval {
                let progress = self.progress(reported, left_then);
                (reported, left_then) = (Instant::now(), progress.left);
                report(&progress);
            }
            if self.pause.is_asked() {
                self.pause.wait(reported.checked_add(self.options.interval), || self.is_stopped());
                (idle, left_before) = (0, u64::MAX);
                continue;
            }
            self.note_first();
            if self.in_vain.load(SeqCst) >= MOST_FAILURES {
                self.end(Err(self.why(self.left())));
                break;
            }
            if self.work(&mut hand) {
                continue;
            }
            // What was announced and withdrawn is asked for again, whatever is still to come.
            let now = self.engine.memory.withdrawn.load(Relaxed);
            if std::mem::replace(&mut withdrawn, now) != now {
                self.order.lock().map(|mut order| order.start_again()).unwrap_or_default();
                continue;
            }
            // The pass is over as soon as the others are done with what they have.
            if self.busy.load(SeqCst) > 0 || hand.has_pending() {
                std::thread::sleep(LOOK);
                continue;
            }
            let left = self.left();
            idle = if left < left_before { 0 } else { idle + 1 };
            left_before = left;
            if let Some(result) = self.judge(left, idle) {
                self.end(result);
                break;
            }
            self.order.lock().map(|mut order| order.start_again()).unwrap_or_default();
            self.sleep((LOOK * (1 << idle.min(10))).min(LONGEST_PAUSE));
        }
        let why = match self.engine.is_shut_down() {
            true => Error::new(libc::ESHUTDOWN, "the VM was freed"),
            false => Error::new(libc::ECANCELED, "the fill was stopped"),
        };
        self.end(Err(why));
        report(&self.progress(reported, left_then));
    }

    /// At the end of a pass, the `idle`-th in a row after which no less was left: is that the end?
    fn judge(&self, left: u64, idle: u32) -> Option<Result<()>> {
        if self.options.only_first {
            self.note_first();
            return self.state.lock().is_ok_and(|ends| ends.first).then_some(Ok(()));
        }
        if left == 0 {
            return match (self.options.finish)(&|| self.is_stopped()) {
                // A page was discarded meanwhile.
                Err(e) if e.errno == libc::EBUSY => None,
                // Whether it was stopped or the VM freed, `lead` says.
                Err(_) if self.is_stopped() => None,
                result => Some(result),
            };
        }
        let slots = self.engine.memory.slots();
        let is_coming = self.options.scope.count(&slots, State::Resolving) > 0;
        let has_failed = self.last_error.lock().is_ok_and(|error| error.is_some());
        let is_over = idle > if has_failed { 1 } else { MOST_RETRIES };
        (is_over && !is_coming).then(|| Err(self.why(left)))
    }

    /// Why so many pages are left.
    fn why(&self, left: u64) -> Error {
        let error = self.last_error.lock().ok().and_then(|mut error| error.take());
        let error = error.unwrap_or(Error::new(libc::ELOOP, "the resolver asks for retries without end"));
        error.context(format!("{left} pages could not be brought"))
    }

    fn follow(&self) {
        let mut hand = Hand::default();
        while !self.is_stopped() {
            if self.pause.is_asked() {
                self.pause.wait(None, || self.is_stopped());
            } else if !self.work(&mut hand) {
                std::thread::sleep(LOOK);
            }
        }
    }

    /// False if a pause or the end came before the time was over.
    fn sleep(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        while !self.is_stopped() && !self.pause.is_asked() {
            match until.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return true,
                left => std::thread::sleep(left.min(10 * LOOK)),
            }
        }
        false
    }

    /// Brings one piece; false if there is none now.
    fn work(&self, hand: &mut Hand) -> bool {
        if hand.is_full() {
            return false;
        }
        give_way(&self.engine.seats);
        let mut piece = match hand.rest.take() {
            Some(rest) => rest,
            None => {
                self.busy.fetch_add(1, SeqCst);
                let Some(piece) = self.take() else {
                    self.busy.fetch_sub(1, SeqCst);
                    return false;
                };
                piece
            }
        };
        let is_time = self.sleep(self.limit.delay(piece.bytes()));
        let rest = if is_time { self.bring(&piece, hand) } else { Some(piece.pages.start) };
        if let Some(rest) = rest {
            // The thread is still busy with it: no other thread takes its pages, and
            // without them what comes first isn't there.
            piece.pages.start = rest;
            self.limit.give_back(piece.bytes());
            hand.rest = Some(piece);
            return true;
        }
        self.busy_first.fetch_sub(piece.is_first.into(), SeqCst);
        self.busy.fetch_sub(1, SeqCst);
        true
    }

    fn take(&self) -> Option<Piece> {
        let mut order = self.order.lock().ok()?;
        let piece = order.next(&self.engine.memory, &self.engine.seats, self.options.batch)?;
        self.busy_first.fetch_add(piece.is_first.into(), SeqCst);
        Some(piece)
    }

    /// Is what comes first there? Nobody has a piece of it in hand, and no page of it is announced.
    fn note_first(&self) {
        let is_taken =
            || self.order.lock().is_ok_and(|order| order.is_past_first() && self.busy_first.load(SeqCst) == 0);
        let Ok(ends) = self.state.lock() else { return };
        if ends.first || !is_taken() {
            return;
        }
        drop(ends);
        let slots = self.engine.memory.slots();
        let is_coming = |range: &Range<u64>| {
            let blocks = slots.blocks_in(range.start, range.end - range.start);
            blocks.into_iter().any(|b| b.pages.count(b.pages_in(range), State::Resolving) > 0)
        };
        if !self.first.iter().any(is_coming) {
            if let Ok(mut ends) = self.state.lock() {
                ends.first = true;
            }
            self.changed.notify_all();
        }
    }

    /// One page, and what comes with it; None while the fill is paused. A thread counts itself as
    /// calling before it looks whether it may call. So a caller of `pause` that sees none calling
    /// afterwards has seen the last call.
    fn call(&self, block: &Arc<Block>, page: u64, need: &Need<'_>) -> Option<Result<Outcome>> {
        self.calling.fetch_add(1, SeqCst);
        let answer = (!self.pause.is_asked()).then(|| self.engine.fill(block, page, need));
        self.calling.fetch_sub(1, SeqCst);
        answer
    }

    /// Brings the pages of a piece; if a pause comes in between: the page that is next.
    fn bring(&self, piece: &Piece, hand: &mut Hand) -> Option<u64> {
        let stats = self.engine.memory.stats.here();
        let (block, end) = (&piece.block, piece.pages.end);
        let more = More::UpTo { end, most: self.options.batch };
        let need = Need { origin: Origin::Fill, access: 0, waiter: None, stats, more };
        let mut page = piece.pages.start;
        while let Some(next) = block.pages.first_absent(page..end) {
            if self.is_stopped() {
                return None;
            }
            let Some(answer) = self.call(block, next, &need) else { return Some(next) };
            page = next + 1;
            match answer {
                // The resolver has been told the whole piece; what it doesn't bring is for the next pass.
                Ok(Outcome::Pending) => {
                    hand.remember(block, next);
                    return None;
                }
                Ok(Outcome::Gone) => return None,
                Ok(Outcome::Retry) => drop(self.sleep(LOOK)),
                Ok(_) => self.in_vain.store(0, SeqCst),
                Err(e) => {
                    self.failed.fetch_add(1, Relaxed);
                    self.last_error.lock().map(|mut last| *last = Some(e)).unwrap_or_default();
                    // A single bad page must not cost time; where nothing works there is no hurry.
                    match self.in_vain.fetch_add(1, SeqCst) {
                        0..8 => {}
                        n => drop(self.sleep((Duration::from_micros(10) * n).min(LONGEST_PAUSE))),
                    }
                    if self.in_vain.load(SeqCst) >= MOST_FAILURES {
                        return None;
                    }
                }
            }
        }
        None
    }
}

/// Pages that are absent, or being brought.
fn left_of(scope: &Scope, slots: &Slots) -> u64 {
    scope.count(slots, State::Absent) + scope.count(slots, State::Resolving)
}

/// Where threads wait until it is known whether all of them could be started.
#[derive(Default)]
struct Gate {
    all_there: Mutex<Option<bool>>,
    changed: Condvar,
}

impl Gate {
    fn open(&self, all_there: bool) {
        *self.all_there.lock().unwrap_or_else(PoisonError::into_inner) = Some(all_there);
        self.changed.notify_all();
    }

    fn wait(&self) -> bool {
        let answer = self.all_there.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = self.changed.wait_while(answer, |a| a.is_none()).unwrap_or_else(PoisonError::into_inner);
        *answer == Some(true)
    }
}

/// Should a thread panic, nobody must wait for it.
struct EndOnPanic<'a>(&'a Fill);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(Err(Error::new(libc::ENOTRECOVERABLE, "a fill thread panicked (see stderr)")));
        }
    }
}

/// What one thread has in hand.
#[derive(Default)]
struct Hand {
    /// Pages that were announced.
    pending: VecDeque<(Arc<Block>, u64)>,
    /// What of its piece was not brought when a pause came.
    rest: Option<Piece>,
}

impl Hand {
    fn remember(&mut self, block: &Arc<Block>, page: u64) {
        self.pending.push_back((block.clone(), page));
    }

    fn settle(&mut self) {
        self.pending.retain(|(block, page)| block.pages.get(*page) == State::Resolving && !block.gone.load(SeqCst));
    }

    fn has_pending(&mut self) -> bool {
        self.settle();
        !self.pending.is_empty()
    }

    fn is_full(&mut self) -> bool {
        if self.pending.len() >= MOST_PENDING {
            self.settle();
        }
        self.pending.len() >= MOST_PENDING
    }
}
