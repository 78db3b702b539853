//! Reader threads: they serve what comes through the userfaultfd. That is every fault of the `userfaultfd` mechanism, and host
//! accesses to absent memory in all of them.

use super::readahead::Runs;
use super::seat::Notice;
use super::strays::Strays;
use super::{pause_before, Engine, Extent, FaultRequest, Origin, Outcome, MAX_RETRIES};
use crate::error::{fail, Error, Result};
use crate::kernel::abi::{ACCESS_READ, ACCESS_WRITE};
use crate::kernel::event::{poll, Flag};
use crate::kernel::signal;
use crate::kernel::thread::pause;
use crate::kernel::uffd::{Message, FEATURE_POISON};
use crate::memory::block::Block;
use crate::memory::pages::State;
use crate::memory::{calls, discard, lose, map};
use std::os::fd::AsRawFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{mpsc, Arc, Mutex};
use std::time::{Duration, Instant};

/// A page that may come without a wake-up, as its resolver failed: whoever waits in userfaultfd is woken at this time, faults again, and so asks
/// anew.
struct DelayedWake {
    due: Instant,
    block: Arc<Block>,
    page: u64,
}

/// Can the reader threads read? A seccomp filter that came after them may refuse it. As long as one of them can, messages are served.
#[derive(Default)]
pub struct Readers {
    count: AtomicU32,
    unable: AtomicU32,
    /// What the last one that became unable was told.
    why: Mutex<Option<Error>>,
}

impl Readers {
    /// An error if there are readers and none of them can read.
    pub fn check(&self) -> Result<()> {
        if self.count.load(SeqCst) == 0 || self.unable.load(SeqCst) < self.count.load(SeqCst) {
            return Ok(());
        }
        match self.why.lock().map(|why| why.clone()) {
            Ok(Some(error)) => Err(error.context("no reader thread can work (refused by a seccomp filter?)")),
            _ => fail!(EIO, "no reader thread can work"),
        }
    }
}

/// What one reader knows of itself.
struct Ability<'a> {
    readers: &'a Readers,
    is_unable: bool,
}

impl Ability<'_> {
    fn has_read(&mut self) {
        if std::mem::take(&mut self.is_unable) {
            self.readers.unable.fetch_sub(1, SeqCst);
        }
    }

    fn has_failed(&mut self, error: Error) {
        if let Ok(mut why) = self.readers.why.lock() {
            *why = Some(error);
        }
        if !std::mem::replace(&mut self.is_unable, true) {
            self.readers.unable.fetch_add(1, SeqCst);
        }
    }
}

/// Starts `count` threads that read until `stop` is raised; returns when they do. An error if they can't read.
pub fn start(engine: &Arc<Engine>, stop: &Arc<Flag>, count: u32) -> Result<()> {
    let (ready, all) = mpsc::channel();
    // A host thread's faults come to whichever reader is free: its runs are of all of them.
    let hosts = Arc::new(Mutex::default());
    for n in 0..count {
        let (engine, stop, hosts, ready) = (engine.clone(), stop.clone(), hosts.clone(), ready.clone());
        std::thread::Builder::new()
            .name(format!("kvmfault/{n}"))
            .spawn(move || {
                // What arc-swap allocates for a thread that uses it for the first time is not for a fault to wait for.
                drop(engine.memory.slots());
                calls::prepare_thread();
                let callbacks = engine.callbacks.keep();
                let able = engine.memory.uffd.check_readable();
                let is_able = able.is_ok();
                let _ = ready.send(able);
                if is_able {
                    read(&engine, &stop, &hosts);
                }
                drop(callbacks);
            })
            .map_err(|e| Error::from_io("starting a reader thread", &e))?;
    }
    drop(ready);
    engine.readers.count.store(count, SeqCst);
    all.iter().take(count as usize).collect()
}

fn read(engine: &Engine, stop: &Flag, hosts: &Mutex<Runs>) {
    signal::block_all();
    // Where two want a page at once one may be put here: faults allocate nothing.
    let mut delayed: Vec<DelayedWake> = Vec::with_capacity(256);
    let mut strays = Strays::new(Instant::now());
    let mut ability = Ability { readers: &engine.readers, is_unable: false };
    loop {
        let due = delayed.iter().map(|a| a.due).chain(strays.due()).min();
        let timeout = due.map(|due| due.saturating_duration_since(Instant::now()));
        let [readable, stopped] = match poll([engine.memory.uffd.as_raw_fd(), stop.as_raw_fd()], timeout) {
            Ok(ready) => ready,
            // Refused, perhaps by a seccomp filter: then it looks by reading, again and wake.
            Err(_) => {
                pause(POLL_FALLBACK);
                [true, engine.is_shut_down()]
            }
        };
        if stopped {
            return;
        }
        wake_due(engine, &mut delayed);
        strays.wake_due(&engine.memory.uffd, Instant::now());
        if !readable {
            continue;
        }
        let next = engine.memory.uffd.next();
        if next.is_ok() {
            ability.has_read();
        }
        match next {
            Ok(Some(message)) => {
                // A panic here would leave a thread of the VMM asleep for ever. The page was given back on the way out.
                let served =
                    catch_unwind(AssertUnwindSafe(|| serve(engine, &message, hosts, &mut delayed, &mut strays)));
                if served.is_err() {
                    let slots = engine.memory.slots();
                    if let Some((block, page)) = slots.at_hva(message.hva) {
                        delayed.push(DelayedWake { due: Instant::now(), block: block.clone(), page });
                    }
                    let error = Error::new(
                        libc::ENOTRECOVERABLE,
                        "a bug in libkvmfault: a reader thread panicked (see stderr)",
                    );
                    notify_all(engine, &error);
                }
            }
            Ok(None) => {} // another reader was faster
            Err(e) if e.errno == libc::EINTR => {}
            // A thread waits for a page, and which one is in the message. vCPUs are told, each time until it is served; a host thread that sleeps
            // can't be told anything.
            Err(e) => {
                ability.has_failed(e);
                if let Err(error) = engine.readers.check() {
                    notify_all(engine, &error);
                }
                pause(READ_RETRY);
            }
        }
    }
}

/// So often a reader looks that can't poll.
const POLL_FALLBACK: Duration = Duration::from_millis(1);

/// So often a reader tries that can't read.
const READ_RETRY: Duration = Duration::from_millis(100);

fn notify_all(engine: &Engine, error: &Error) {
    engine.seats.all().iter().for_each(|s| s.notify(s.turn(), Notice::Failed(error.clone())));
}

fn wake_due(engine: &Engine, delayed: &mut Vec<DelayedWake>) {
    let now = Instant::now();
    delayed.retain(|wake| {
        if wake.due <= now {
            let _ = discard::wake_sleepers(&engine.memory, &wake.block, &(wake.page..wake.page + 1));
            // It has come by another way, and nobody may ever ask for it wake.
            if wake.block.pages.get(wake.page) != State::Absent {
                engine.forget_failure(wake.block.hva_of(wake.page));
            }
        }
        wake.due > now
    });
}

fn serve(engine: &Engine, message: &Message, hosts: &Mutex<Runs>, delayed: &mut Vec<DelayedWake>, strays: &mut Strays) {
    let slots = engine.memory.slots();
    let Some((block, page)) = slots.at_hva(message.hva) else {
        return strays.keep(message.hva, Instant::now());
    };
    let (block, hva) = (block.clone(), block.hva_of(page));
    drop(slots);
    let seat = message.thread.and_then(|t| engine.seats.of_thread(t));
    let turn = seat.map_or(0, |seat| seat.turn());
    // A vCPU's thread may also fault as a host thread, in a device model; what it touches is the same page either way.
    let origin = seat.as_ref().map_or(Origin::Host, |seat| Origin::Vcpu(seat.number));
    let request = FaultRequest {
        origin,
        access: if message.write { ACCESS_WRITE } else { ACCESS_READ },
        waiter: None,
        stats: seat.as_ref().map_or(engine.memory.stats.here(), |seat| &seat.stats),
        extent: Extent::Readahead(seat.as_ref().map_or(hosts, |seat| &seat.runs)),
    };
    let under_way = seat.map(|seat| seat.begin_fault(hva));
    let outcome = engine.serve(&engine.memory.slots(), &block, page, &request);
    drop(under_way);
    let failed = match outcome {
        Ok(Outcome::WasPresent) => {
            map_where_touched(engine, &block, page, message.hva).err().filter(|_| !block.is_gone())
        }
        Ok(Outcome::Lost) => {
            let _ = lose::show_lost_again(&engine.memory, &block, page);
            // Markers tell it where the kernel has them.
            if engine.memory.uffd.features() & FEATURE_POISON == 0 {
                if let Some(seat) = &seat {
                    seat.notify(turn, Notice::Lost(hva));
                }
            }
            let _ = discard::wake_sleepers(&engine.memory, &block, &(page..page + 1));
            None
        }
        Ok(Outcome::Retry) => {
            let tries = engine.count_failure(hva);
            if tries > MAX_RETRIES {
                Some(Error::new(
                    libc::ELOOP,
                    format!("the resolver has asked for {tries} retries of the page at hva {hva:#x}"),
                ))
            } else {
                delayed.push(DelayedWake { due: Instant::now() + pause_before(tries), block, page });
                return;
            }
        }
        // No slot shows the page: it was deleted, perhaps to be created anew in another shape (KVMFAULT_MEMSLOT_KEEP).
        Ok(Outcome::Gone) => {
            delayed.push(DelayedWake { due: Instant::now() + Duration::from_millis(10), block, page });
            return;
        }
        // Somebody brings the page, and the kernel wakes with it. But here it has come already: it woke others, was unmapped before it was booked,
        // and comes no more.
        Ok(Outcome::Elsewhere) if message.minor => {
            // One wake-up is for all who sleep there.
            if !delayed.iter().any(|wake| wake.page == page && Arc::ptr_eq(&wake.block, &block)) {
                delayed.push(DelayedWake { due: Instant::now() + Duration::from_millis(10), block, page });
            }
            return engine.forget_failure(hva);
        }
        Ok(_) => None,
        Err(e) => Some(e),
    };
    let Some(error) = failed else {
        return engine.forget_failure(hva);
    };
    // A host thread has no error to return: it waits on, and the resolver is asked again, less and less often.
    let tries = engine.count_failure(hva);
    let pause = Duration::from_millis(1 << tries.min(10)).min(Duration::from_secs(1));
    delayed.push(DelayedWake { due: Instant::now() + pause, block, page });
    if let Some(seat) = seat {
        seat.notify(turn, Notice::Failed(error));
    }
}

/// A PRESENT page that isn't mapped where it was touched.
fn map_where_touched(engine: &Engine, block: &Block, page: u64, touched: u64) -> Result<()> {
    let in_vmm = touched.wrapping_sub(block.hva) < block.len;
    match block.alias_of(page) {
        Some(alias) if !in_vmm => {
            map::map_for_kvm(&engine.memory, block, page, engine.memory.stats.here())?;
            engine.memory.uffd.wake(alias, block.page)
        }
        _ => map::map_in_vmm(&engine.memory, block, page, engine.memory.stats.here()),
    }
}
