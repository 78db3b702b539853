//! A vCPU as others see it: readers that have bad news for it, and whoever kicks it.

use super::readahead::Runs;
use super::Waiter;
use crate::error::Error;
use crate::kernel::kvm::ImmediateExit;
use crate::kernel::thread::{self, send_signal};
use crate::memory::wait::{Sleeper, WAITS};
use crate::stats::Stats;
use arc_swap::ArcSwap;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

/// What a reader thread has to tell a vCPU.
#[derive(Debug, Clone)]
pub enum News {
    /// Its fault failed.
    Failed(Error),
    /// The page at this address of the VMM's mapping is lost.
    Lost(u64),
}

/// One vCPU. A seat is never freed (it is less than a kilobyte, and vCPUs are few): a kick may come from a signal handler at any time,
/// also when the vCPU has just gone.
#[derive(Debug)]
pub struct Seat {
    /// KVM's number.
    pub number: i32,
    /// The byte of its kvm_run that keeps KVM_RUN from beginning.
    pub immediate_exit: ImmediateExit,
    /// Its thread; 0 while it has none.
    pub thread: AtomicI32,
    /// Where it sleeps.
    pub sleeper: Sleeper,
    /// Its counters.
    pub stats: Stats,
    /// The runs that its faults form. It has one fault at a time, whoever serves it: nobody meets here.
    pub runs: Mutex<Runs>,
    /// Where its last fault was, in the VMM's mapping: for whoever fills memory in the background. Bit 0 is set when it has been served.
    fault: AtomicU64,
    /// The signal that ends KVM_RUN.
    pub signal: i32,
    /// The signal runs a handler, so it may be over before KVM_RUN begins: `immediate_exit` must be set too.
    pub by_handler: bool,
    /// Kicks so far; the vCPU remembers how many it has seen.
    kicks: AtomicU32,
    seen: AtomicU32,
    /// SIGBUS as the VMM's handler saw it: address, and code + 1 (0 = none).
    bus_address: AtomicU64,
    bus_code: AtomicI32,
    turn: AtomicU32,
    has_news: AtomicBool,
    news: Mutex<Option<News>>,
}

impl Seat {
    /// A vCPU without a thread.
    pub fn new(number: i32, immediate_exit: ImmediateExit, signal: i32, by_handler: bool) -> Seat {
        Seat {
            number,
            immediate_exit,
            thread: AtomicI32::new(0),
            sleeper: Sleeper::default(),
            stats: Stats::default(),
            runs: Mutex::default(),
            fault: AtomicU64::new(SERVED),
            signal,
            by_handler,
            kicks: AtomicU32::new(0),
            seen: AtomicU32::new(0),
            bus_address: AtomicU64::new(0),
            bus_code: AtomicI32::new(0),
            turn: AtomicU32::new(0),
            has_news: AtomicBool::new(false),
            news: Mutex::new(None),
        }
    }

    /// It has a fault here, until what this returns is dropped.
    pub fn faults_at(&self, hva: u64) -> Serving<'_> {
        self.fault.store(hva & !SERVED, Relaxed);
        Serving(self)
    }

    /// Is it waiting for a page to be brought?
    pub fn is_waiting(&self) -> bool {
        self.fault.load(Relaxed) & SERVED == 0
    }

    /// Where its last fault was; None if it has had none.
    pub fn last_fault(&self) -> Option<u64> {
        Some(self.fault.load(Relaxed) & !SERVED).filter(|&hva| hva != 0)
    }

    /// Makes the vCPU's loop return, wherever it is: async-signal-safe, and never lost. The count goes first: whoever looks after
    /// it sees the kick. A vCPU about to enter KVM_RUN has the signal pending (blocked outside KVM_RUN), or `immediate_exit` set.
    pub fn kick(&self) {
        self.kicks.fetch_add(1, SeqCst);
        self.interrupt();
    }

    /// A kick's effect without the kick: the loop looks around.
    fn interrupt(&self) {
        if self.by_handler {
            self.immediate_exit.set(true);
        }
        WAITS.poke(&self.sleeper);
        let thread = self.thread.load(SeqCst);
        // By handler `immediate_exit` is enough for a thread that is here and not in KVM_RUN; and from the handler of the kick signal
        // itself, the signal would come for ever.
        let is_here = self.by_handler && thread == thread::id();
        if thread != 0 && !is_here {
            send_signal(thread, self.signal);
        }
    }

    /// Is there a kick that the loop hasn't reported?
    pub fn is_kicked(&self) -> bool {
        self.kicks.load(SeqCst) != self.seen.load(SeqCst)
    }

    /// The loop reports all kicks so far, as one. True if there was any.
    pub fn see_kicks(&self) -> bool {
        let kicks = self.kicks.load(SeqCst);
        let fresh = kicks.wrapping_sub(self.seen.swap(kicks, SeqCst));
        if fresh > 0 {
            self.stats.kicks.add(fresh.into());
            if self.by_handler {
                self.immediate_exit.set(false);
                // A kick since the load above may have set it just before: it is counted already, then, and gets it back.
                if self.is_kicked() {
                    self.immediate_exit.set(true);
                }
            }
        }
        fresh > 0
    }

    /// Called in the VMM's SIGBUS handler: async-signal-safe. False if the same is noted already: a signal that comes again before the loop
    /// has seen it is not KVM's, but of a thread that touches broken memory itself, and would do so for ever.
    pub fn note_bus(&self, code: i32, address: u64) -> bool {
        let code = code.wrapping_add(1);
        if self.bus_code.load(SeqCst) == code && self.bus_address.load(SeqCst) == address {
            return false;
        }
        self.bus_address.store(address, SeqCst);
        self.bus_code.store(code, SeqCst);
        true
    }

    /// KVM_RUN ended for something else: the guest comes to what is broken again.
    pub fn forget_bus(&self) {
        if self.bus_code.load(SeqCst) != 0 {
            self.bus_code.store(0, SeqCst);
        }
    }

    /// The SIGBUS that the handler saw: code and address.
    pub fn take_bus(&self) -> Option<(i32, u64)> {
        let code = self.bus_code.swap(0, SeqCst);
        (code != 0).then(|| (code.wrapping_sub(1), self.bus_address.load(SeqCst)))
    }

    /// Which of its runs the vCPU is in; for `tell`.
    pub fn turn(&self) -> u32 {
        self.turn.load(SeqCst)
    }

    /// Tells the vCPU something of a fault that it had in this turn, and makes its loop look. Later than that it is no news: the vCPU has
    /// left that fault, and if it comes to the page again the resolver is asked again.
    pub fn tell(&self, turn: u32, news: News) {
        if let Ok(mut slot) = self.news.lock() {
            if turn != self.turn() {
                return;
            }
            slot.get_or_insert(news);
            self.has_news.store(true, SeqCst);
        }
        self.interrupt();
    }

    /// The vCPU leaves the faults that it had.
    pub fn next_turn(&self) {
        if let Ok(mut slot) = self.news.lock() {
            self.turn.fetch_add(1, SeqCst);
            self.has_news.store(false, SeqCst);
            *slot = None;
        }
    }

    /// What it was told.
    pub fn take_news(&self) -> Option<News> {
        if !self.has_news.swap(false, SeqCst) {
            return None;
        }
        self.news.lock().ok()?.take()
    }

    /// Is there something to take?
    pub fn has_news(&self) -> bool {
        self.has_news.load(SeqCst)
    }
}

const SERVED: u64 = 1;

/// A fault of a vCPU that is being served.
pub struct Serving<'a>(&'a Seat);

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.fault.fetch_or(SERVED, Relaxed);
    }
}

impl Waiter for Seat {
    fn sleeper(&self) -> &Sleeper {
        &self.sleeper
    }

    fn must_leave(&self) -> bool {
        self.is_kicked() || self.has_news() || self.immediate_exit.get()
    }
}

/// All vCPUs of a VM.
#[derive(Default)]
pub struct Seats {
    seats: ArcSwap<Vec<&'static Seat>>,
    /// Those that are gone. Their counters still count: a reader may be about to book a fault of theirs.
    gone: ArcSwap<Vec<&'static Seat>>,
}

impl Seats {
    /// Adds one.
    pub fn add(&self, seat: &'static Seat) {
        self.seats.rcu(|seats| seats.iter().copied().chain([seat]).collect::<Vec<_>>());
    }

    /// Removes one; its counts stay.
    pub fn remove(&self, seat: &'static Seat) {
        self.gone.rcu(|gone| gone.iter().copied().chain([seat]).collect::<Vec<_>>());
        self.seats.rcu(|seats| seats.iter().copied().filter(|s| !std::ptr::eq(*s, seat)).collect::<Vec<_>>());
    }

    /// The one whose thread this is.
    pub fn of_thread(&self, thread: i32) -> Option<&'static Seat> {
        self.seats.load().iter().find(|s| s.thread.load(SeqCst) == thread).copied()
    }

    /// Adds up the counters of all that are here or gone.
    pub fn count(&self, sum: &Stats) {
        // In this order: a seat that leaves meanwhile is in both, and counted once.
        let here = self.all();
        let gone = self.gone.load();
        let left = gone.iter().filter(|g| !here.iter().any(|h| std::ptr::eq(*h, **g)));
        here.iter().chain(left).for_each(|seat| sum.absorb(&seat.stats));
    }

    /// All of them now.
    pub fn all(&self) -> Arc<Vec<&'static Seat>> {
        self.seats.load_full()
    }
}
