//! What the threads of a fill do.

use super::order::Piece;
use super::pace::give_way;
use super::{Fill, Report};
use crate::error::{Error, Result};
use crate::kernel::abi::ACCESS_UNKNOWN;
use crate::kernel::address::Hva;
use crate::memory::block::Block;
use crate::memory::pages::State;
use crate::resolve::{Extent, FaultRequest, Origin, Outcome, MAX_RETRIES};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{Ordering::Relaxed, Ordering::SeqCst};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most pages of each thread that a resolver has announced (KVMFAULT_PENDING) and not
/// installed.
const MAX_PENDING: usize = 64;
/// How long a thread with nothing to do sleeps, and so how soon it sees that it is to stop.
const IDLE_PAUSE: Duration = Duration::from_millis(1);
/// The longest pause after tries that failed.
const MAX_PAUSE: Duration = Duration::from_millis(10);
/// After this many failed tries in a row the fill fails: the resolver is dead.
const MAX_FAILURES: u32 = 1000;

impl Fill {
    /// The first thread: works like the others, and also reports, and ends the fill.
    pub(super) fn lead(&self, report: &Report) {
        let mut worker = Worker::default();
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
            if self.failures_in_a_row.load(SeqCst) >= MAX_FAILURES {
                self.end(Err(self.why(self.left())));
                break;
            }
            if self.work(&mut worker) {
                continue;
            }
            // Pages that were announced and withdrawn are fetched again, whatever else is left.
            let now = self.engine.memory.withdrawn.load(Relaxed);
            if std::mem::replace(&mut withdrawn, now) != now {
                self.order.lock().map(|mut order| order.start_again()).unwrap_or_default();
                continue;
            }
            // The pass is over once the other threads are done with their pieces.
            if self.busy.load(SeqCst) > 0 || worker.has_pending() {
                std::thread::sleep(IDLE_PAUSE);
                continue;
            }
            let left = self.left();
            idle = if left < left_before { 0 } else { idle + 1 };
            left_before = left;
            if let Some(result) = self.result_of_pass(left, idle) {
                self.end(result);
                break;
            }
            self.order.lock().map(|mut order| order.start_again()).unwrap_or_default();
            self.sleep((IDLE_PAUSE * (1 << idle.min(10))).min(MAX_PAUSE));
        }
        let why = match self.engine.is_shut_down() {
            true => Error::new(libc::ESHUTDOWN, "the VM was freed"),
            false => Error::new(libc::ECANCELED, "the fill was stopped"),
        };
        self.end(Err(why));
        report(&self.progress(reported, left_then));
    }

    /// The result of the fill, if it ends with this pass: the `idle`-th in a row after which no
    /// fewer pages were left.
    fn result_of_pass(&self, left: u64, idle: u32) -> Option<Result<()>> {
        if self.options.only_first {
            self.note_first();
            return self.state.lock().is_ok_and(|ends| ends.first).then_some(Ok(()));
        }
        if left == 0 {
            return match (self.options.finish)(&|| self.is_stopped()) {
                // A page was discarded meanwhile.
                Err(e) if e.errno == libc::EBUSY => None,
                // `lead` tells whether the fill was stopped or the VM freed.
                Err(_) if self.is_stopped() => None,
                result => Some(result),
            };
        }
        let slots = self.engine.memory.slots();
        let is_coming = self.options.scope.count(&slots, State::Resolving) > 0;
        let has_failed = self.last_error.lock().is_ok_and(|error| error.is_some());
        let is_over = idle > if has_failed { 1 } else { MAX_RETRIES };
        (is_over && !is_coming).then(|| Err(self.why(left)))
    }

    /// The error that says why `left` pages are left.
    fn why(&self, left: u64) -> Error {
        let error = self.last_error.lock().ok().and_then(|mut error| error.take());
        let error = error.unwrap_or(Error::new(libc::ELOOP, "the resolver asks for retries without end"));
        error.context(format!("{left} pages could not be fetched"))
    }

    pub(super) fn follow(&self) {
        let mut worker = Worker::default();
        while !self.is_stopped() {
            if self.pause.is_asked() {
                self.pause.wait(None, || self.is_stopped());
            } else if !self.work(&mut worker) {
                std::thread::sleep(IDLE_PAUSE);
            }
        }
    }

    /// Sleeps; false if a pause or the end of the fill came first.
    fn sleep(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        while !self.is_stopped() && !self.pause.is_asked() {
            match until.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return true,
                left => std::thread::sleep(left.min(10 * IDLE_PAUSE)),
            }
        }
        false
    }

    /// Fetches one piece; false if there is none now.
    fn work(&self, worker: &mut Worker) -> bool {
        if worker.is_full() {
            return false;
        }
        give_way(&self.engine.seats);
        let mut piece = match worker.rest.take() {
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
        let rest = if is_time { self.fetch(&piece, worker) } else { Some(piece.pages.start) };
        if let Some(rest) = rest {
            // The thread still counts as busy with it: no other thread takes these pages, and what
            // is fetched first is not complete without them.
            piece.pages.start = rest;
            self.limit.give_back(piece.bytes());
            worker.rest = Some(piece);
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

    /// Notes when what is fetched first is complete: no thread has a piece of it, and no page of it
    /// is announced.
    fn note_first(&self) {
        let is_taken =
            || self.order.lock().is_ok_and(|order| order.is_past_first() && self.busy_first.load(SeqCst) == 0);
        let Ok(ends) = self.state.lock() else { return };
        if ends.first || !is_taken() {
            return;
        }
        drop(ends);
        let slots = self.engine.memory.slots();
        let is_coming = |range: &Range<Hva>| {
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

    /// Fetches one page, and those around it; None while the fill is paused. A thread counts itself
    /// as calling before it checks whether it may call: a caller of `pause` that sees none calling
    /// afterwards has seen the last call.
    fn call(&self, block: &Arc<Block>, page: u64, request: &FaultRequest<'_>) -> Option<Result<Outcome>> {
        self.calling.fetch_add(1, SeqCst);
        let answer = (!self.pause.is_asked()).then(|| self.engine.serve_fill(block, page, request));
        self.calling.fetch_sub(1, SeqCst);
        answer
    }

    /// Fetches the pages of a piece. If a pause begins, returns the page that is next.
    fn fetch(&self, piece: &Piece, worker: &mut Worker) -> Option<u64> {
        let stats = self.engine.memory.stats.here();
        let (block, end) = (&piece.block, piece.pages.end);
        let extent = Extent::UpTo { end, most: self.options.batch };
        let request = FaultRequest { origin: Origin::Fill, access: ACCESS_UNKNOWN, waiter: None, stats, extent };
        let mut page = piece.pages.start;
        while let Some(next) = block.pages.first_absent(page..end) {
            if self.is_stopped() {
                return None;
            }
            let Some(answer) = self.call(block, next, &request) else { return Some(next) };
            page = next + 1;
            match answer {
                // The resolver was told the whole piece; what it does not install is fetched in the
                // next pass.
                Ok(Outcome::Pending) => {
                    worker.remember(block, next);
                    return None;
                }
                Ok(Outcome::Gone) => return None,
                Ok(Outcome::Retry) => drop(self.sleep(IDLE_PAUSE)),
                Ok(_) => self.failures_in_a_row.store(0, SeqCst),
                Err(e) => {
                    self.failed.fetch_add(1, Relaxed);
                    self.last_error.lock().map(|mut last| *last = Some(e)).unwrap_or_default();
                    // A single bad page must not cost time; where nothing works there is no hurry.
                    match self.failures_in_a_row.fetch_add(1, SeqCst) {
                        0..8 => {}
                        n => drop(self.sleep((Duration::from_micros(10) * n).min(MAX_PAUSE))),
                    }
                    if self.failures_in_a_row.load(SeqCst) >= MAX_FAILURES {
                        return None;
                    }
                }
            }
        }
        None
    }
}

/// The state of one thread.
#[derive(Default)]
struct Worker {
    /// Pages that the resolver has announced.
    pending: VecDeque<(Arc<Block>, u64)>,
    /// The rest of its piece, which was not fetched when a pause began.
    rest: Option<Piece>,
}

impl Worker {
    fn remember(&mut self, block: &Arc<Block>, page: u64) {
        self.pending.push_back((block.clone(), page));
    }

    fn settle(&mut self) {
        self.pending.retain(|(block, page)| block.pages.get(*page) == State::Resolving && !block.phase.is_retired());
    }

    fn has_pending(&mut self) -> bool {
        self.settle();
        !self.pending.is_empty()
    }

    fn is_full(&mut self) -> bool {
        if self.pending.len() >= MAX_PENDING {
            self.settle();
        }
        self.pending.len() >= MAX_PENDING
    }
}
