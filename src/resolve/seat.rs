//! What other threads know of a vCPU: readers that notify it of a failed fault, and threads that
//! kick it.

use super::readahead::Runs;
use super::Waiter;
use crate::error::Error;
use crate::kernel::address::Hva;
use crate::kernel::kvm::{ImmediateExit, Run};
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

/// What a reader thread notifies a vCPU of.
#[derive(Debug, Clone)]
pub enum Notice {
    /// The vCPU's fault failed.
    Failed(Error),
    /// The page at this address of the VMM's mapping is LOST.
    Lost(Hva),
}

/// One vCPU. A seat is never freed (it takes less than a kilobyte, and vCPUs are few): a kick may
/// come from a signal handler at any time, even when the vCPU has just been freed.
#[derive(Debug)]
pub struct Seat {
    /// KVM's number.
    pub number: i32,
    /// The byte of its kvm_run that keeps KVM_RUN from entering the guest.
    pub immediate_exit: Arc<ImmediateExit>,
    /// Its thread; 0 while it has none.
    pub thread: AtomicI32,
    /// Where it sleeps.
    pub sleeper: Sleeper,
    /// Its counters.
    pub stats: Stats,
    /// The runs that its faults form. It has one fault at a time, so that the lock is free.
    pub runs: Mutex<Runs>,
    /// Where its last fault was, in the VMM's mapping, for background fill. Bit 0 is set once the
    /// fault was served.
    fault: AtomicU64,
    /// The signal that ends KVM_RUN.
    pub signal: i32,
    /// The signal runs a handler, which may be over before KVM_RUN begins: `immediate_exit` must be
    /// set, too.
    pub by_handler: bool,
    /// The number of kicks, and how many of them the vCPU has acknowledged.
    kicks: AtomicU32,
    acknowledged_kicks: AtomicU32,
    /// The number of nudges, and how many of them the vCPU has acknowledged (see `nudge`).
    nudges: AtomicU32,
    acknowledged_nudges: AtomicU32,
    /// Kicks, notices and nudges under way: their threads may yet write to kvm_run and send the
    /// signal. See `Interrupting`.
    interrupting: AtomicU32,
    /// SIGBUS as the VMM's handler saw it: the address, and the code plus one (0 for none).
    bus_address: AtomicU64,
    bus_code: AtomicI32,
    /// The address of the block whose memory the vCPU's thread touches at the moment, or 0 (see
    /// `touch`).
    touched: AtomicUsize,
    turn: AtomicU32,
    has_notice: AtomicBool,
    notice: Mutex<Option<Notice>>,
}

impl Seat {
    /// A vCPU without a thread.
    pub fn new(number: i32, immediate_exit: Arc<ImmediateExit>, signal: i32, by_handler: bool) -> Seat {
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

    /// Notes that the vCPU has a fault here, until the result is dropped.
    pub fn begin_fault(&self, hva: Hva) -> FaultUnderWay<'_> {
        self.fault.store(hva.0 & !SERVED, Relaxed);
        FaultUnderWay(self)
    }

    /// Is the vCPU waiting for a page?
    pub fn is_waiting(&self) -> bool {
        self.fault.load(Relaxed) & SERVED == 0
    }

    /// Where its last fault was; None if it has had none.
    pub fn last_fault(&self) -> Option<Hva> {
        Some(self.fault.load(Relaxed) & !SERVED).filter(|&hva| hva != 0).map(Hva)
    }

    /// Makes the vCPU's loop return, wherever it is: async-signal-safe, and never lost. The count
    /// changes first, so that a loop that checks later sees the kick. A vCPU about to enter KVM_RUN
    /// has the signal pending (blocked outside KVM_RUN), or `immediate_exit` set. Returns 0, or the
    /// errno of sending the signal.
    pub fn kick(&self) -> i32 {
        let _under_way = Interrupting::begin(self);
        self.kicks.fetch_add(1, SeqCst);
        self.interrupt()
    }

    /// Makes the loop check what it has to acknowledge.
    fn interrupt(&self) -> i32 {
        if self.by_handler {
            self.immediate_exit.raise();
        }
        WAITS.wake_sleeper(&self.sleeper);
        let thread = self.thread.load(SeqCst);
        // By handler, `immediate_exit` is enough for the calling thread itself, which is not in
        // KVM_RUN. From the handler of the kick signal, the signal would be sent for ever.
        let is_here = self.by_handler && thread == thread::id();
        match thread != 0 && !is_here {
            true => signal::send(thread, self.signal),
            false => 0,
        }
    }

    /// Makes the vCPU leave KVM_RUN for a moment, if it is there. Its loop enters KVM_RUN again,
    /// and the VMM does not see it. By mask the signal stays pending outside KVM_RUN, and the loop
    /// ignores a signal without a kick or a notice. By handler the signal leaves no trace, so that
    /// it is counted.
    pub fn nudge(&self) {
        let _under_way = Interrupting::begin(self);
        let thread = self.thread();
        if thread != 0 && !self.sleeper.is_asleep() {
            self.nudges.fetch_add(1, SeqCst);
            signal::send(thread, self.signal);
        }
    }

    /// Acknowledges nudges; false if there were none. When this returns, the handler has run for
    /// each of them. On the vCPU's thread.
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

    /// Ensures that the next KVM_RUN ends at once if the loop has something to acknowledge, and
    /// only then. On the vCPU's thread.
    ///
    /// By handler, the byte follows from the counts: other threads change the counts first and
    /// raise the byte then, so that here it is lowered first and the counts are read again after
    /// that. By mask, the signal may have been taken together with that of another vCPU of this
    /// thread.
    #[inline]
    pub fn refresh(&self, run: &Run) {
        if self.has_something_to_report() || self.by_handler && run.is_exit_raised() {
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

    /// Is there something that the loop has to acknowledge?
    fn has_something_to_report(&self) -> bool {
        self.is_kicked() || self.has_notice()
    }

    /// Ends what the loop has just acknowledged, so that it is not seen twice: the threads that
    /// interrupted the vCPU have sent their signals, and the signals are taken. On the vCPU's
    /// thread.
    fn settle(&self) {
        if self.wait_for_signals() && !self.by_handler {
            while matches!(signal::take(SignalSet::of(&[self.signal])), Ok(Some(_))) {}
        }
        self.refresh_exit();
    }

    /// Waits until all threads that interrupt the vCPU have sent their signals, and by handler
    /// until it has run for them. False if that takes too long.
    fn wait_for_signals(&self) -> bool {
        let deadline = Instant::now() + SIGNAL_TIMEOUT;
        let are_sent = self.wait_for_interrupters(|| Instant::now() > deadline);
        if are_sent && self.by_handler {
            // When a system call returns, the handler has run for what was sent before.
            thread::id();
        }
        are_sent
    }

    /// Waits until all threads that interrupt the vCPU are done; false if `enough` returns true
    /// first.
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

    /// Notes that the vCPU's thread touches a block's memory, until the result is dropped, outside
    /// of the block's gates: such an access may wait for a page, and discards must not wait for it.
    /// None if the block is gone. A block that is retired meanwhile waits for the result to be
    /// dropped. The vCPU touches one block at a time.
    pub fn touch(&self, block: &Block) -> Option<Touching<'_>> {
        self.touched.store(address_of(block), SeqCst);
        let touching = Touching(self);
        (!block.is_gone()).then_some(touching)
    }

    /// Does the vCPU's thread touch this block's memory?
    pub fn is_touching(&self, block: &Block) -> bool {
        self.touched.load(SeqCst) == address_of(block)
    }

    /// Ends interruptions before the vCPU and its kvm_run go away. When this returns, no kick is
    /// under way that knows either of them, and none will be: each has sent its signal or never
    /// will.
    pub fn detach(&self) {
        self.immediate_exit.detach();
        self.thread.store(0, SeqCst);
        self.wait_for_interrupters(|| false);
    }

    /// Are both the same vCPU? By KVM's number, or where that is not known by the kvm_run.
    fn is_same(&self, other: &Seat) -> bool {
        self.number >= 0 && self.number == other.number || self.immediate_exit.is_same(&other.immediate_exit)
    }

    /// Is there a kick that the loop has not acknowledged?
    pub fn is_kicked(&self) -> bool {
        self.kicks.load(SeqCst) != self.acknowledged_kicks.load(SeqCst)
    }

    /// Acknowledges all kicks so far, as one. True if there was any.
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

    /// Notes a SIGBUS, in the VMM's handler: async-signal-safe. False if the same one is noted
    /// already: then it is not KVM's, but of a thread that touches broken memory itself, and would
    /// do so for ever.
    pub fn note_bus(&self, code: i32, address: Hva) -> bool {
        let code = code.wrapping_add(1);
        if self.bus_code.load(SeqCst) == code && self.bus_address.load(SeqCst) == address.0 {
            return false;
        }
        self.bus_address.store(address.0, SeqCst);
        self.bus_code.store(code, SeqCst);
        true
    }

    /// Forgets a SIGBUS, as KVM_RUN ended for another reason: the guest will touch the broken page
    /// again.
    pub fn forget_bus(&self) {
        if self.bus_code.load(SeqCst) != 0 {
            self.bus_code.store(0, SeqCst);
        }
    }

    /// Takes the SIGBUS that the handler noted: code and address.
    pub fn take_bus(&self) -> Option<(i32, Hva)> {
        let code = self.bus_code.swap(0, SeqCst);
        (code != 0).then(|| (code.wrapping_sub(1), Hva(self.bus_address.load(SeqCst))))
    }

    /// The number of the run that the vCPU is in, for `notify`.
    pub fn turn(&self) -> u32 {
        self.turn.load(SeqCst)
    }

    /// Notifies the vCPU of a fault that it had in this turn, and makes its loop check. In a later
    /// turn this does nothing: the vCPU has left that fault, and the resolver is called again if
    /// the vCPU touches the page again.
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

    /// Begins a new turn: the vCPU leaves the faults that it had.
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

    /// Takes the notice, if there is one.
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

    /// Is there a notice to take?
    pub fn has_notice(&self) -> bool {
        self.has_notice.load(SeqCst)
    }
}

const SERVED: u64 = 1;

/// How long the loop waits for a thread that was itself interrupted while it interrupts the vCPU.
/// After that its signal may come late, and end a KVM_RUN or a wait without a reason.
const SIGNAL_TIMEOUT: Duration = Duration::from_millis(100);

/// A thread that is interrupting a vCPU.
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
    /// Seats of vCPUs that were freed. Their counters still count: a reader may be about to count a
    /// fault of theirs.
    gone: ArcSwap<Vec<&'static Seat>>,
}

impl Seats {
    /// Adds a seat; false if its vCPU has one already.
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

    /// Removes a seat; its counts stay.
    pub fn remove(&self, seat: &'static Seat) {
        self.gone.rcu(|gone| gone.iter().copied().chain([seat]).collect::<Vec<_>>());
        self.seats.rcu(|seats| seats.iter().copied().filter(|s| !std::ptr::eq(*s, seat)).collect::<Vec<_>>());
    }

    /// The seat of the vCPU whose thread this is.
    pub fn of_thread(&self, thread: i32) -> Option<&'static Seat> {
        self.seats.load().iter().find(|s| s.thread.load(SeqCst) == thread).copied()
    }

    /// Adds up the counters of all seats, those of freed vCPUs included.
    pub fn count(&self, sum: &Stats) {
        // In this order: a seat that leaves meanwhile is in both lists, and counted once.
        let here = self.all();
        let gone = self.gone.load();
        let left = gone.iter().filter(|g| !here.iter().any(|h| std::ptr::eq(*h, **g)));
        here.iter().chain(left).for_each(|seat| sum.absorb(&seat.stats));
    }

    /// All seats at this moment.
    pub fn all(&self) -> Arc<Vec<&'static Seat>> {
        self.seats.load_full()
    }
}
