//! Serves faults: one caller has the resolver fetch the page, all others wait for it.

use super::call::{callback, Callback};
use super::callbacks::Holder;
use super::fault::{Answer, Extent, Fault, FaultRequest, Origin, Outcome, Resolver, Waiter, MAX_RETRIES};
use super::readahead::{self, Plan};
use super::reader::Readers;
use super::seat::Seats;
use super::working_set::Recorder;
use crate::error::{fail, Error, Result};
use crate::kernel::abi::ACCESS_UNKNOWN;
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::clock;
use crate::kernel::futex::Wake;
use crate::memory::block::Block;
use crate::memory::calls::Claim;
use crate::memory::pages::State;
use crate::memory::slots::{Slot, Slots};
use crate::memory::wait::{recheck_interval, WAITS};
use crate::memory::{lose, Memory};
use crate::stats::Stats;
use arc_swap::ArcSwapOption;
use std::collections::HashMap;
use std::sync::atomic::{fence, AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// For how long a vCPU waits while the further pages of a strided run are fetched, one by one: a
/// slow resolver must not hold it up.
const STRIDED_AT_MOST: Duration = Duration::from_micros(200);

/// How a resolver call ended.
enum Fetched {
    /// The fault is over.
    Ended(Outcome),
    /// The resolver has announced the page.
    Pending,
    /// The call was overtaken (see `calls`), or the VM was shut down: the fault begins again.
    Anew,
}

/// The memory of a VM, together with what fetches its pages.
pub struct Engine {
    /// The memory.
    pub memory: Memory,
    /// The vCPUs, as far as other threads need them.
    pub seats: Seats,
    /// The resolver, until the VM is shut down.
    pub callbacks: Holder,
    /// How many pages may be fetched together, the one that is needed included.
    pub readahead: u64,
    /// Whether the reader threads can work.
    pub readers: Readers,
    shutdown: AtomicBool,
    /// Pages whose last try for a host thread failed, and how often in a row. Touched after
    /// failures only (see `failing_len`).
    failing: Mutex<HashMap<Hva, u32>>,
    failing_len: AtomicUsize,
    /// The recorder of the working set; `records` says whether there is one, which costs less to
    /// read.
    recorder: ArcSwapOption<Recorder>,
    records: AtomicBool,
}

impl Engine {
    /// An engine whose resolver calls ask for at most `readahead` pages, the one that is needed
    /// included.
    pub fn new(memory: Memory, resolver: Box<dyn Resolver>, readahead: u64) -> Engine {
        recheck_interval(); // reads the environment, before a fault has to
        Engine {
            memory,
            seats: Seats::default(),
            callbacks: Holder::new(resolver),
            readahead,
            readers: Readers::default(),
            shutdown: AtomicBool::new(false),
            failing: Mutex::default(),
            failing_len: AtomicUsize::new(0),
            recorder: ArcSwapOption::empty(),
            records: AtomicBool::new(false),
        }
    }

    /// Ends resolver calls: none begins, and threads that wait leave with ESHUTDOWN. False if the
    /// engine was shut down already.
    pub fn shut_down(&self) -> bool {
        let first = !self.shutdown.swap(true, SeqCst);
        fence(SeqCst); // with `check_begun`
        self.memory.gates.close();
        WAITS.wake_all();
        first
    }

    /// For calls that have begun what `shut_down` and its callers end (such as registering memory
    /// whose block is published). Called after the beginning: either the end has seen what was
    /// begun, or this returns ESHUTDOWN and the caller undoes it.
    pub fn check_begun(&self) -> Result<()> {
        fence(SeqCst);
        if self.is_shut_down() {
            fail!(ESHUTDOWN, "the VM was freed meanwhile");
        }
        Ok(())
    }

    /// Was the engine shut down?
    pub fn is_shut_down(&self) -> bool {
        self.shutdown.load(SeqCst)
    }

    /// Begins to record the working set from scratch, or ends recording.
    pub fn record(&self, recorder: Option<Recorder>) {
        self.records.store(recorder.is_some(), SeqCst);
        self.recorder.store(recorder.map(Arc::new));
    }

    /// The recorder of the working set, if it is being recorded.
    pub fn recorder(&self) -> Option<Arc<Recorder>> {
        self.recorder.load_full()
    }

    /// Tells the VMM of a write that the library did for the guest.
    #[allow(dead_code)] // used where KVM has an instruction emulator
    pub fn written(&self, gpa: Gpa, len: u64) {
        if let Some(callbacks) = self.callbacks.get().as_ref() {
            callback(|| callbacks.resolver().written(gpa, len));
        }
    }

    /// Serves one fault, and counts it. `slots` are those in which the caller found the page a
    /// moment ago.
    pub fn serve(&self, slots: &Slots, block: &Arc<Block>, page: u64, request: &FaultRequest<'_>) -> Result<Outcome> {
        let start = clock::nanoseconds();
        let stats = request.stats;
        match request.origin {
            Origin::Vcpu(_) => stats.faults_vcpu.add(1),
            Origin::Host => stats.faults_host.add(1),
            Origin::Prefetch => stats.faults_prefetch.add(1),
            Origin::Fill => {} // is served by `serve_fill`
        }
        let outcome = self.resolve_page(slots, block, page, request);
        match outcome {
            Ok(Outcome::Installed) => stats.outcome_resolved.add(1),
            Ok(Outcome::Waited | Outcome::Elsewhere | Outcome::Pending | Outcome::Gone) => stats.outcome_waited.add(1),
            Ok(Outcome::WasPresent) => stats.outcome_mapped.add(1),
            Ok(Outcome::Lost) => stats.outcome_lost.add(1),
            Ok(Outcome::Interrupted) => stats.outcome_interrupted.add(1),
            Ok(Outcome::Retry) => stats.outcome_retried.add(1),
            Err(_) => stats.outcome_failed.add(1),
        }
        stats.served_in(clock::nanoseconds().saturating_sub(start));
        outcome
    }

    /// Serves background fill, which is not counted as a fault: no thread waits for the page.
    pub fn serve_fill(&self, block: &Arc<Block>, page: u64, request: &FaultRequest<'_>) -> Result<Outcome> {
        self.resolve_page(&self.memory.slots(), block, page, request)
    }

    fn resolve_page(
        &self,
        slots: &Slots,
        block: &Arc<Block>,
        page: u64,
        request: &FaultRequest<'_>,
    ) -> Result<Outcome> {
        let hva = block.hva_of(page);
        let mut waited = false;
        loop {
            if self.is_shut_down() {
                fail!(ESHUTDOWN, "the VM was freed while a fault at hva {hva:#x} was under way");
            }
            if block.phase.is_retired() {
                return Ok(Outcome::Gone);
            }
            match block.pages.get(page) {
                State::Present if waited => return Ok(Outcome::Waited),
                State::Present => return Ok(Outcome::WasPresent),
                State::Lost => return Ok(Outcome::Lost),
                State::Resolving => {
                    let Some(waiter) = request.waiter else {
                        return Ok(Outcome::Elsewhere);
                    };
                    waited = true;
                    let still = || {
                        block.pages.get(page) == State::Resolving
                            && !waiter.must_leave()
                            && !self.is_shut_down()
                            && !block.phase.is_retired()
                    };
                    let wake = WAITS.wait(hva, waiter.sleeper(), recheck_interval(), still);
                    let unsettled = block.pages.get(page) == State::Resolving;
                    if unsettled && (waiter.must_leave() || wake == Wake::Signal && !waiter.was_nudged()) {
                        return Ok(Outcome::Interrupted);
                    }
                }
                State::Absent => {
                    let wakes = request.waiter.is_some() || request.origin == Origin::Fill;
                    let Some(mut claim) = Claim::take(&self.memory, block, page, wakes) else { continue };
                    let Some(slot) = slots.showing(block, page) else {
                        return Ok(Outcome::Gone);
                    };
                    let plan = self.plan(slot, page, request.extent);
                    let fetched = self.fetch(&mut claim, slot, page, request, &plan)?;
                    drop(claim);
                    if !plan.is_contiguous() {
                        self.fetch_strided(slot, page, request, plan);
                    }
                    match fetched {
                        Fetched::Ended(outcome) => return Ok(outcome),
                        Fetched::Pending if request.waiter.is_none() => return Ok(Outcome::Pending),
                        Fetched::Pending => waited = true,
                        Fetched::Anew if request.waiter.is_some_and(Waiter::must_leave) => {
                            return Ok(Outcome::Interrupted)
                        }
                        Fetched::Anew => {}
                    }
                }
            }
        }
    }

    /// The pages to fetch with a page.
    fn plan(&self, slot: &Slot, page: u64, extent: Extent<'_>) -> Plan {
        match extent {
            Extent::UpTo { most, .. } => Plan { step: 1, count: most.max(1) },
            // The runs are locked only where two reader threads serve one vCPU, or host threads, at
            // once.
            Extent::Readahead(runs) if self.readahead > 1 => match runs.try_lock() {
                Ok(mut runs) => runs.next(slot.block.hva_of(page).0 / slot.block.page, self.readahead),
                Err(_) => Plan::ALONE,
            },
            Extent::Readahead(_) => Plan::ALONE,
        }
    }

    /// Has the resolver fetch a claimed page, and the absent pages around it that the plan names.
    /// If that fails, it is called for the page alone: pages that no thread needs must not cost the
    /// guest the one that it needs.
    fn fetch(
        &self,
        claim: &mut Claim<'_>,
        slot: &Slot,
        page: u64,
        request: &FaultRequest<'_>,
        plan: &Plan,
    ) -> Result<Fetched> {
        let block = &slot.block;
        let mut window = match plan.count {
            1 => page..page + 1,
            _ if plan.is_contiguous() => {
                let wanted = readahead::window(slot, page, plan);
                let end = match request.extent {
                    Extent::UpTo { end, .. } => wanted.end.min(end).max(page + 1),
                    Extent::Readahead(_) => wanted.end,
                };
                block.pages.absent_down(page, wanted.start)..block.pages.absent_up(page + 1, end)
            }
            _ => page..page + 1,
        };
        let ahead = window.end - window.start - 1;
        let mut fault = Fault {
            slot: slot.region.slot,
            gpa: slot.gpa_of(page),
            len: block.page,
            hva: block.hva_of(page),
            access: request.access,
            origin: request.origin,
            window: slot.gpa_of(window.start)..slot.gpa_of(window.end),
        };
        let counted = if matches!(request.extent, Extent::Readahead(_)) { ahead } else { 0 };
        request.stats.ahead_asked.add(counted);
        let (mut answer, mut why) = self.ask(block, page, &fault, request.stats);
        let is_ours = || !claim.is_overtaken() && block.pages.get(page) == State::Resolving;
        if ahead > 0 && matches!(answer, Answer::Failed(_)) && is_ours() {
            request.stats.ahead_failed.add(counted);
            window = page..page + 1;
            fault.window = fault.gpa..fault.gpa + fault.len;
            (answer, why) = self.ask(block, page, &fault, request.stats);
        }
        if self.is_shut_down() {
            // The answer does not count: without its VM, the resolver could not do what it meant
            // to.
            return Ok(Fetched::Anew);
        }
        let fetched = self.conclude(claim, block, page, answer, why, &fault)?;
        let is_needed =
            request.origin != Origin::Fill && matches!(fetched, Fetched::Pending | Fetched::Ended(Outcome::Installed));
        if is_needed && self.records.load(SeqCst) {
            if let Some(recorder) = self.recorder.load().as_ref() {
                recorder.note(block, &window);
            }
        }
        Ok(fetched)
    }

    /// Calls the resolver once, unless the page has become PRESENT in the meantime. Returns the
    /// answer, and with an errno the error of an install that the resolver called for.
    fn ask(&self, block: &Block, page: u64, fault: &Fault, stats: &Stats) -> (Answer, Option<Box<Error>>) {
        if block.pages.get(page) == State::Present {
            return (Answer::Resolved, None);
        }
        let callbacks = self.callbacks.get();
        let Some(callbacks) = callbacks.as_ref() else { return (Answer::Failed(libc::ESHUTDOWN), None) };
        stats.resolver_calls.add(1);
        let call = Callback::enter();
        match callbacks.resolver().resolve(fault) {
            Answer::Failed(errno) => (Answer::Failed(errno), call.failure(errno)),
            answer => (answer, None),
        }
    }

    /// Fetches the further pages of a strided run with a call each, until that takes too long or
    /// the vCPU is kicked. A page that fails stays ABSENT.
    fn fetch_strided(&self, slot: &Slot, page: u64, request: &FaultRequest<'_>, plan: Plan) {
        let start = Instant::now();
        let prefetch = FaultRequest {
            origin: Origin::Prefetch,
            access: ACCESS_UNKNOWN,
            waiter: None,
            extent: Extent::ONE_PAGE,
            ..*request
        };
        for page in plan.beyond(page, slot.pages()) {
            let must_leave = request.waiter.is_some_and(Waiter::must_leave);
            if must_leave || self.is_shut_down() || start.elapsed() > STRIDED_AT_MOST {
                return;
            }
            let block = &slot.block;
            if let Some(mut claim) = Claim::take(&self.memory, block, page, true) {
                request.stats.ahead_asked.add(1);
                let fetched = self.fetch(&mut claim, slot, page, &prefetch, &Plan::ALONE);
                drop(claim);
                match fetched {
                    Ok(Fetched::Pending | Fetched::Ended(Outcome::Installed)) => {}
                    _ => request.stats.ahead_failed.add(1),
                }
            }
        }
    }

    /// What the resolver's answer means for the claimed page.
    fn conclude(
        &self,
        claim: &mut Claim<'_>,
        block: &Block,
        page: u64,
        answer: Answer,
        why: Option<Box<Error>>,
        fault: &Fault,
    ) -> Result<Fetched> {
        let is_present = block.pages.get(page) == State::Present;
        let at = || format!("gpa {:#x} (slot {:#x})", fault.gpa, fault.slot);
        match answer {
            Answer::Resolved | Answer::Failed(libc::EEXIST) if is_present => {
                claim.settle();
                Ok(Fetched::Ended(Outcome::Installed))
            }
            Answer::Pending => Ok(if claim.settle() { Fetched::Pending } else { Fetched::Anew }),
            // LOST meanwhile (kvmfault_pages_lost); all answers follow from that.
            _ if block.pages.get(page) == State::Lost => {
                claim.settle();
                Ok(Fetched::Ended(Outcome::Lost))
            }
            // Installed, and discarded since: the guest faults again if it still needs the page.
            Answer::Resolved | Answer::Failed(libc::EEXIST) if claim.is_overtaken_after_discards() => {
                Ok(Fetched::Ended(Outcome::Installed))
            }
            _ if claim.is_overtaken_after_discards() => Ok(Fetched::Anew),
            Answer::Lost => {
                match lose::lose_claimed(&self.memory, block, page, claim) {
                    Err(_) if block.is_gone() => return Ok(Fetched::Anew),
                    lost => lost?,
                };
                Ok(match block.pages.get(page) {
                    State::Lost => Fetched::Ended(Outcome::Lost),
                    State::Present => Fetched::Ended(Outcome::Installed),
                    _ => Fetched::Anew,
                })
            }
            Answer::Retry => Ok(Fetched::Ended(Outcome::Retry)),
            // The slot that the resolver was called for no longer shows the page.
            Answer::Resolved | Answer::Failed(_) if !self.is_shown(block, page, fault) => {
                let elsewhere = self.memory.slots().showing(block, page).is_some();
                Ok(Fetched::Ended(if elsewhere { Outcome::Retry } else { Outcome::Gone }))
            }
            Answer::Resolved => fail!(EPROTO, "the resolver said KVMFAULT_RESOLVED but installed nothing at {}", at()),
            Answer::Failed(errno) => {
                let why = match why {
                    Some(error) => error.to_string(),
                    None => std::io::Error::from_raw_os_error(errno).to_string(),
                };
                Err(Error::new(errno, format!("the resolver failed at {}: {why}", at())))
            }
            Answer::Garbage(value) => {
                fail!(
                    EPROTO,
                    "the resolver returned {value}, which is neither a KVMFAULT_* answer nor -errno, at {}",
                    at()
                )
            }
        }
    }

    /// Does the slot of a fault still show the page where it did?
    fn is_shown(&self, block: &Block, page: u64, fault: &Fault) -> bool {
        let slots = self.memory.slots();
        slots.numbered(fault.slot).is_some_and(|s| std::ptr::eq(&*s.block, block) && s.gpa_of(page) == fault.gpa)
    }

    /// For a test of the locks that faults must not take.
    #[cfg(test)]
    pub fn hold_failing(&self) -> std::sync::MutexGuard<'_, HashMap<Hva, u32>> {
        self.failing.lock().unwrap()
    }

    /// Counts a failed try for a host thread at this page. Returns the number in a row.
    pub(super) fn count_failure(&self, hva: Hva) -> u32 {
        let Ok(mut failing) = self.failing.lock() else {
            return MAX_RETRIES;
        };
        let tries = failing.entry(hva).or_insert(0);
        *tries += 1;
        let tries = *tries;
        self.failing_len.store(failing.len(), SeqCst);
        tries
    }

    pub(super) fn forget_failure(&self, hva: Hva) {
        if self.failing_len.load(SeqCst) == 0 {
            return;
        }
        if let Ok(mut failing) = self.failing.lock() {
            failing.remove(&hva);
            self.failing_len.store(failing.len(), SeqCst);
        }
    }
}
