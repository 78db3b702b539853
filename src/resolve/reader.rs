//! Reader threads: they serve the userfaultfd's messages. These are all faults of the `userfaultfd`
//! mechanism, and host accesses to absent memory in every mechanism.

use super::readahead::Runs;
use super::seat::Notice;
use super::strays::Strays;
use super::{pause_before, Engine, Extent, FaultRequest, Origin, Outcome, MAX_RETRIES};
use crate::error::{fail, Error, Result};
use crate::kernel::abi::{ACCESS_READ, ACCESS_WRITE};
use crate::kernel::address::Hva;
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

/// A page that may be installed without a wake-up, as its resolver call failed. At this time the
/// threads that wait for it in userfaultfd are woken; they fault again, and so call the resolver
/// again.
struct DelayedWake {
    due: Instant,
    block: Arc<Block>,
    page: u64,
}

/// Whether the reader threads can read: a seccomp filter that was installed later may refuse it.
/// While one of them can, messages are served.
#[derive(Default)]
pub struct Readers {
    count: AtomicU32,
    unable: AtomicU32,
    /// The error of the last thread that became unable to read.
    why: Mutex<Option<Error>>,
}

impl Readers {
    /// An error if there are reader threads and none of them can read.
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

/// Whether one reader thread can read.
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

/// Starts `count` threads that read until `stop` is raised. Returns when they read, or an error if
/// they cannot.
pub fn start(engine: &Arc<Engine>, stop: &Arc<Flag>, count: u32) -> Result<()> {
    let (ready, all) = mpsc::channel();
    // A host thread's faults are read by any reader thread: all of them share the runs.
    let hosts = Arc::new(Mutex::default());
    for n in 0..count {
        let (engine, stop, hosts, ready) = (engine.clone(), stop.clone(), hosts.clone(), ready.clone());
        std::thread::Builder::new()
            .name(format!("kvmfault/{n}"))
            .spawn(move || {
                // arc-swap allocates when a thread uses it for the first time: before a fault waits
                // for it.
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
    // Two threads that want one page at once may add to this: faults must not allocate.
    let mut delayed: Vec<DelayedWake> = Vec::with_capacity(256);
    let mut strays = Strays::new(Instant::now());
    let mut ability = Ability { readers: &engine.readers, is_unable: false };
    loop {
        let due = delayed.iter().map(|a| a.due).chain(strays.due()).min();
        let timeout = due.map(|due| due.saturating_duration_since(Instant::now()));
        let [readable, stopped] = match poll([engine.memory.uffd.as_raw_fd(), stop.as_raw_fd()], timeout) {
            Ok(ready) => ready,
            // Refused, perhaps by a seccomp filter: the thread polls by reading.
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
                // After a panic a thread of the VMM would sleep for ever. The claim has made the
                // page ABSENT again.
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
            // A thread waits for a page that the message would name. vCPUs are notified, each time
            // until their fault is served; a host thread that sleeps cannot be notified.
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

/// How often a reader thread tries to read that cannot poll.
const POLL_FALLBACK: Duration = Duration::from_millis(1);

/// How often a reader thread tries to read that could not.
const READ_RETRY: Duration = Duration::from_millis(100);

fn notify_all(engine: &Engine, error: &Error) {
    engine.seats.all().iter().for_each(|s| s.notify(s.turn(), Notice::Failed(error.clone())));
}

fn wake_due(engine: &Engine, delayed: &mut Vec<DelayedWake>) {
    let now = Instant::now();
    delayed.retain(|wake| {
        if wake.due <= now {
            let _ = discard::wake_sleepers(&engine.memory, &wake.block, &(wake.page..wake.page + 1));
            // The page was installed by another way, and perhaps no thread will touch it again.
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
    // A vCPU's thread may also fault as a host thread, in a device model; both need the same page.
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
            // Where the kernel has markers, they tell the vCPU.
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
        // No slot shows the page: it was deleted, perhaps to be created again in another shape
        // (KVMFAULT_MEMSLOT_KEEP).
        Ok(Outcome::Gone) => {
            delayed.push(DelayedWake { due: Instant::now() + Duration::from_millis(10), block, page });
            return;
        }
        // Another call fetches the page, and installing it wakes its waiters. But a minor fault
        // says that its bytes are there: that wake-up has happened, the page was unmapped before
        // its state changed, and no other wake-up follows.
        Ok(Outcome::Elsewhere) if message.minor => {
            // One wake-up is enough for all threads that sleep there.
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
    // A host thread has no error to return: it waits, and the resolver is called again, less and
    // less often.
    let tries = engine.count_failure(hva);
    let pause = Duration::from_millis(1 << tries.min(10)).min(Duration::from_secs(1));
    delayed.push(DelayedWake { due: Instant::now() + pause, block, page });
    if let Some(seat) = seat {
        seat.notify(turn, Notice::Failed(error));
    }
}

/// Maps a PRESENT page in the mapping where it was touched.
fn map_where_touched(engine: &Engine, block: &Block, page: u64, touched: Hva) -> Result<()> {
    let in_vmm = touched.wrapping_sub(block.hva) < block.len;
    match block.alias_of(page) {
        Some(alias) if !in_vmm => {
            map::map_for_kvm(&engine.memory, block, page, engine.memory.stats.here())?;
            engine.memory.uffd.wake(alias, block.page)
        }
        _ => map::map_in_vmm(&engine.memory, block, page, engine.memory.stats.here()),
    }
}
