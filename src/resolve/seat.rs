//! A vCPU as others see it: readers that have bad notice for it, and whoever kicks it.

use super::readahead::Runs;
use super::Waiter;
use crate::error::Error;
use crate::kernel::kvm::ImmediateExit;
use crate::kernel::signal::{self, SignalSet};
use crate::kernel::thread;
use crate::memory::block::Block;
use crate::memory::pause::Backoff;
use crate::memory::wait::{Sleeper, WAITS};
use crate::stats::Stats;
use arc_swap::ArcSwap;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::Release, Ordering::SeqCst,
};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What a reader thread has to notify a vCPU.
#[derive(Debug, Clone)]
pub enum Notice {
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
    /// Kicks so far; the vCPU remembers how many it has acknowledged_kicks.
    kicks: AtomicU32,
    acknowledged_kicks: AtomicU32,
    /// Nudges so far, and those that the vCPU has acknowledged_kicks: see `nudge`.
    nudges: AtomicU32,
    acknowledged_nudges: AtomicU32,
    /// Kicks, notice and nudges under way: whoever is at it may yet write to kvm_run and send the
    /// signal. See `Interrupting`.
    interrupting: AtomicU32,
    /// SIGBUS as the VMM's handler saw it: address, and code + 1 (0 = none).
    bus_address: AtomicU64,
    bus_code: AtomicI32,
    /// The block whose memory the vCPU's thread touches at the moment (its address), or 0: see `touch`.
    touched: AtomicUsize,
    turn: AtomicU32,
    has_notice: AtomicBool,
    notice: Mutex<Option<Notice>>,
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
            acknowledged_kicks: AtomicU32::new(0),
            nudges: AtomicU32::new(0),
            acknowledged_nudges: AtomicU32::new(0),
            interrupting: AtomicU32::new(0),
            bus_address: AtomicU64::new(0),
            bus_code: AtomicI32::new(0),
            touched: AtomicUsize::new(0),
            turn: AtomicU32::new(0),
            has_notice: AtomicBool::new(false),
            notice: Mutex::new(None),
        }
    }

    /// It has a fault here, until what this returns is dropped.
    pub fn begin_fault(&self, hva: u64) -> FaultUnderWay<'_> {
        self.fault.store(hva & !SERVED, Relaxed);
        FaultUnderWay(self)
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
    /// it sees the kick. A vCPU about to enter KVM_RUN has the signal pending (blocked outside KVM_RUN), or `immediate_exit` set. Returns 0, or why
    /// the signal could not be sent.
    pub fn kick(&self) -> i32 {
        let _under_way = Interrupting::begin(self);
        self.kicks.fetch_add(1, SeqCst);
        self.interrupt()
    }

    /// A kick's effect without the kick: the loop looks around.
    fn interrupt(&self) -> i32 {
        if self.by_handler {
            self.immediate_exit.raise();
        }
        WAITS.wake_sleeper(&self.sleeper);
        let thread = self.thread.load(SeqCst);
        // By handler `immediate_exit` is enough for a thread that is here and not in KVM_RUN; and from the handler of the kick signal
        // itself, the signal would come for ever.
        let is_here = self.by_handler && thread == thread::id();
        match thread != 0 && !is_here {
            true => signal::send(thread, self.signal),
            false => 0,
        }
    }

    /// Makes the vCPU leave KVM_RUN for a moment, if it is there; its loop goes back by itself, and
    /// the VMM sees nothing of it. By mask the signal stays pending outside KVM_RUN, and one that
    /// announces nothing is passed over as ever. By handler nothing is left of the signal, so the
    /// count says what it was.
    pub fn nudge(&self) {
        let _under_way = Interrupting::begin(self);
        let thread = self.thread();
        if thread != 0 && !self.sleeper.is_asleep() {
            self.nudges.fetch_add(1, SeqCst);
            signal::send(thread, self.signal);
        }
    }

    /// Were there nudges that the loop hasn't acknowledged_kicks? The handler has run for each of them when this
    /// returns. On the vCPU's thread.
    pub fn acknowledge_nudges(&self) -> bool {
        let nudges = self.nudges.load(SeqCst);
        if !self.by_handler || nudges == self.acknowledged_nudges.load(SeqCst) {
            return false;
        }
        self.acknowledged_nudges.store(nudges, SeqCst);
        self.wait_for_signals();
        true
    }

    /// Its thread's number; 0 while it has none.
    pub fn thread(&self) -> i32 {
        self.thread.load(SeqCst)
    }

    /// What ends the next KVM_RUN is there if the loop has something to see, and not otherwise. On the vCPU's thread.
    ///
    /// By handler, the byte follows from the counts: others add to these first and raise the byte then, so here it is lowered first and the counts
    /// are looked at once more. By mask, the signal may have been taken together with one of another vCPU of this thread.
    #[inline]
    pub fn refresh(&self) {
        if self.has_something_to_report() || self.by_handler && self.immediate_exit.is_raised() {
            self.refresh_exit();
        }
    }

    #[cold]
    fn refresh_exit(&self) {
        if self.by_handler {
            if !self.has_something_to_report() && self.immediate_exit.is_raised() {
                self.immediate_exit.lower();
            }
            if self.has_something_to_report() {
                self.immediate_exit.raise();
            }
        } else if self.has_something_to_report() {
            signal::send(self.thread.load(SeqCst), self.signal);
        }
    }

    /// Is there something that the loop has to see?
    fn has_something_to_report(&self) -> bool {
        self.is_kicked() || self.has_notice()
    }

    /// What the loop has just acknowledged_kicks is over, so that it isn't acknowledged_kicks once more: whoever brought it has sent its signal, and the signal is taken.
    /// On the vCPU's thread.
    fn settle(&self) {
        if self.wait_for_signals() && !self.by_handler {
            while matches!(signal::take(SignalSet::of(&[self.signal])), Ok(Some(_))) {}
        }
        self.refresh();
    }

    /// Waits until all that are interrupting the vCPU have sent their signals; by handler, until it
    /// has run for them. False if that takes too long.
    fn wait_for_signals(&self) -> bool {
        let deadline = Instant::now() + SIGNAL_TIMEOUT;
        let are_sent = self.wait_for_interrupters(|| Instant::now() > deadline);
        if are_sent && self.by_handler {
            thread::id(); // when a system call returns, the handler has run for what was sent before
        }
        are_sent
    }

    /// Waits until all that are interrupting the vCPU are done; false if `enough` says so first.
    fn wait_for_interrupters(&self, enough: impl Fn() -> bool) -> bool {
        let mut backoff = Backoff::default();
        while self.interrupting.load(SeqCst) > 0 {
            if enough() {
                return false;
            }
            backoff.pause();
        }
        true
    }

    /// The vCPU's thread is about to touch a block's memory by itself, and not in a pass of the block's gates:
    /// such an access may wait for a page, and discards don't wait for it. None if the block is gone. A block
    /// that goes before what this returns is dropped waits for that. One at a time.
    pub fn touch(&self, block: &Block) -> Option<Touching<'_>> {
        self.touched.store(address_of(block), SeqCst);
        let touching = Touching(self);
        (!block.is_gone()).then_some(touching)
    }

    /// Does the vCPU's thread touch this block's memory?
    pub fn is_touching(&self, block: &Block) -> bool {
        self.touched.load(SeqCst) == address_of(block)
    }

    /// The vCPU is about to go, and its kvm_run with it. When this returns no kick is under way that knows either, and none will be: its signal was
    /// sent or never will be.
    pub fn detach(&self) {
        self.immediate_exit.detach();
        self.thread.store(0, SeqCst);
        self.wait_for_interrupters(|| false);
    }

    /// Are both the same vCPU? By KVM's number, or where that isn't known by the kvm_run.
    fn is_same(&self, other: &Seat) -> bool {
        self.number >= 0 && self.number == other.number || self.immediate_exit.is_same(&other.immediate_exit)
    }

    /// Is there a kick that the loop hasn't reported?
    pub fn is_kicked(&self) -> bool {
        self.kicks.load(SeqCst) != self.acknowledged_kicks.load(SeqCst)
    }

    /// The loop reports all kicks so far, as one. True if there was any.
    pub fn acknowledge_kicks(&self) -> bool {
        if !self.is_kicked() {
            return false;
        }
        let kicks = self.kicks.load(SeqCst);
        let fresh = kicks.wrapping_sub(self.acknowledged_kicks.swap(kicks, SeqCst));
        if fresh > 0 {
            self.stats.kicks.add(fresh.into());
            self.settle();
        }
        fresh > 0
    }

    /// Called in the VMM's SIGBUS handler: async-signal-safe. False if the same is noted already: a signal that comes again before the loop
    /// has acknowledged_kicks it is not KVM's, but of a thread that touches broken memory itself, and would do so for ever.
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

    /// Which of its runs the vCPU is in; for `notify`.
    pub fn turn(&self) -> u32 {
        self.turn.load(SeqCst)
    }

    /// Tells the vCPU something of a fault that it had in this turn, and makes its loop look. Later than that it is no notice: the vCPU has
    /// left that fault, and if it comes to the page again the resolver is asked again.
    pub fn notify(&self, turn: u32, notice: Notice) {
        let _under_way = Interrupting::begin(self);
        if let Ok(mut slot) = self.notice.lock() {
            if turn != self.turn() {
                return;
            }
            slot.get_or_insert(notice);
            self.has_notice.store(true, SeqCst);
        }
        self.interrupt();
    }

    /// The vCPU leaves the faults that it had.
    pub fn next_turn(&self) {
        let had_notice = match self.notice.lock() {
            Ok(mut slot) => {
                self.turn.fetch_add(1, SeqCst);
                *slot = None;
                self.has_notice.swap(false, SeqCst)
            }
            Err(_) => false,
        };
        if had_notice {
            self.settle();
        }
    }

    /// What it was told.
    #[inline]
    pub fn take_notice(&self) -> Option<Notice> {
        match self.has_notice() {
            true => self.take_notice_now(),
            false => None,
        }
    }

    #[cold]
    fn take_notice_now(&self) -> Option<Notice> {
        self.has_notice.store(false, SeqCst);
        let notice = self.notice.lock().ok()?.take();
        self.settle();
        notice
    }

    /// Is there something to take?
    pub fn has_notice(&self) -> bool {
        self.has_notice.load(SeqCst)
    }
}

const SERVED: u64 = 1;

/// So long the loop waits for whoever interrupts it and was itself interrupted in the middle. After that its signal may come late, and ends a
/// KVM_RUN or a wait for nothing.
const SIGNAL_TIMEOUT: Duration = Duration::from_millis(100);

/// Somebody who is interrupting a vCPU.
struct Interrupting<'a>(&'a Seat);

impl Interrupting<'_> {
    fn begin(seat: &Seat) -> Interrupting<'_> {
        seat.interrupting.fetch_add(1, SeqCst);
        Interrupting(seat)
    }
}

impl Drop for Interrupting<'_> {
    fn drop(&mut self) {
        self.0.interrupting.fetch_sub(1, SeqCst);
    }
}

fn address_of(block: &Block) -> usize {
    std::ptr::from_ref(block) as usize
}

/// A vCPU's thread that touches a block's memory.
pub struct Touching<'a>(&'a Seat);

impl Drop for Touching<'_> {
    fn drop(&mut self) {
        self.0.touched.store(0, Release);
    }
}

/// A fault of a vCPU that is being served.
pub struct FaultUnderWay<'a>(&'a Seat);

impl Drop for FaultUnderWay<'_> {
    fn drop(&mut self) {
        self.0.fault.fetch_or(SERVED, Relaxed);
    }
}

impl Waiter for Seat {
    fn sleeper(&self) -> &Sleeper {
        &self.sleeper
    }

    fn must_leave(&self) -> bool {
        self.has_something_to_report() || self.immediate_exit.is_the_vmms()
    }

    fn was_nudged(&self) -> bool {
        self.acknowledge_nudges()
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
    /// Adds one, unless its vCPU has one already.
    pub fn add(&self, seat: &'static Seat) -> bool {
        let mut is_new = true;
        self.seats.rcu(|seats| {
            is_new = !seats.iter().any(|other| other.is_same(seat));
            match is_new {
                true => Arc::new(seats.iter().copied().chain([seat]).collect::<Vec<_>>()),
                false => seats.clone(),
            }
        });
        is_new
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
