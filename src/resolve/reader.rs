//! Reader threads: they serve what comes through the userfaultfd. That is every fault of the `userfaultfd` mechanism, and host
//! accesses to absent memory in all of them.

use super::readahead::Runs;
use super::seat::News;
use super::strays::Strays;
use super::{pause_before, Engine, More, Need, Origin, Outcome, MOST_RETRIES};
use crate::error::{Error, Result};
use crate::kernel::thread::{block_all_signals, poll, Flag};
use crate::kernel::uffd::{Message, FEATURE_POISON};
use crate::memory::block::Block;
use crate::memory::pages::State;
use crate::memory::{calls, discard, install};
use std::os::fd::AsRawFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{mpsc, Arc, Mutex};
use std::time::{Duration, Instant};

/// A page that may come without a wake-up, as its resolver failed: whoever waits in userfaultfd is woken at this time, faults again, and so asks
/// anew.
struct Again {
    due: Instant,
    block: Arc<Block>,
    page: u64,
}

/// Starts `count` threads that read until `stop` is raised; returns when they do.
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
                calls::register();
                let callbacks = engine.callbacks.keep();
                let _ = ready.send(());
                read(&engine, &stop, &hosts);
                drop(callbacks);
            })
            .map_err(|e| Error::from_io("starting a reader thread", &e))?;
    }
    drop(ready);
    all.iter().take(count as usize).for_each(drop);
    Ok(())
}

fn read(engine: &Engine, stop: &Flag, hosts: &Mutex<Runs>) {
    block_all_signals();
    // Where two want a page at once one may be put here: faults allocate nothing.
    let mut later: Vec<Again> = Vec::with_capacity(256);
    let mut strays = Strays::new(Instant::now());
    loop {
        let due = later.iter().map(|a| a.due).chain(strays.due()).min();
        let timeout = due.map(|due| due.saturating_duration_since(Instant::now()));
        let [readable, stopped] = poll([engine.memory.uffd.as_raw_fd(), stop.as_raw_fd()], timeout);
        if stopped {
            return;
        }
        wake_due(engine, &mut later);
        strays.wake_due(&engine.memory.uffd, Instant::now());
        if !readable {
            continue;
        }
        match engine.memory.uffd.next() {
            Ok(Some(message)) => {
                // A panic here would leave a thread of the VMM asleep for ever. The page was given back on the way out.
                let served = catch_unwind(AssertUnwindSafe(|| serve(engine, &message, hosts, &mut later, &mut strays)));
                if served.is_err() {
                    let slots = engine.memory.slots();
                    if let Some((block, page)) = slots.at_hva(message.hva) {
                        later.push(Again { due: Instant::now(), block: block.clone(), page });
                    }
                    let error = Error::new(
                        libc::ENOTRECOVERABLE,
                        "a bug in libkvmfault: a reader thread panicked (see stderr)",
                    );
                    engine.seats.all().iter().for_each(|s| s.tell(s.turn(), News::Failed(error.clone())));
                }
            }
            Ok(None) => {}                                           // another reader was faster
            Err(_) => std::thread::sleep(Duration::from_millis(10)), // a broken userfaultfd: don't spin
        }
    }
}

fn wake_due(engine: &Engine, later: &mut Vec<Again>) {
    let now = Instant::now();
    later.retain(|again| {
        if again.due <= now {
            let _ = discard::wake(&engine.memory, &again.block, &(again.page..again.page + 1));
            // It has come by another way, and nobody may ever ask for it again.
            if again.block.pages.get(again.page) != State::Absent {
                engine.forget_failure(again.block.hva_of(again.page));
            }
        }
        again.due > now
    });
}

fn serve(engine: &Engine, message: &Message, hosts: &Mutex<Runs>, later: &mut Vec<Again>, strays: &mut Strays) {
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
    let need = Need {
        origin,
        access: if message.write { 1 << 1 } else { 1 << 0 },
        waiter: None,
        stats: seat.as_ref().map_or(engine.memory.stats.here(), |seat| &seat.stats),
        more: More::Ahead(seat.as_ref().map_or(hosts, |seat| &seat.runs)),
    };
    let serving = seat.map(|seat| seat.faults_at(hva));
    let outcome = engine.resolve(&engine.memory.slots(), &block, page, &need);
    drop(serving);
    let failed = match outcome {
        Ok(Outcome::WasPresent) => map(engine, &block, page, message.hva).err(),
        Ok(Outcome::Lost) => {
            let _ = discard::show_lost_again(&engine.memory, &block, page);
            // Markers tell it where the kernel has them.
            if engine.memory.uffd.features() & FEATURE_POISON == 0 {
                if let Some(seat) = &seat {
                    seat.tell(turn, News::Lost(hva));
                }
            }
            let _ = discard::wake(&engine.memory, &block, &(page..page + 1));
            None
        }
        Ok(Outcome::Retry) => {
            let tries = engine.count_failure(hva);
            if tries > MOST_RETRIES {
                Some(Error::new(
                    libc::ELOOP,
                    format!("the resolver has asked for {tries} retries of the page at hva {hva:#x}"),
                ))
            } else {
                later.push(Again { due: Instant::now() + pause_before(tries), block, page });
                return;
            }
        }
        // No slot shows the page: it was deleted, perhaps to be created anew in another shape (KVMFAULT_MEMSLOT_KEEP).
        Ok(Outcome::Gone) => {
            later.push(Again { due: Instant::now() + Duration::from_millis(10), block, page });
            return;
        }
        // Somebody brings the page, and the kernel wakes with it. But here it has come already: it woke others, was unmapped before it was booked,
        // and comes no more.
        Ok(Outcome::Elsewhere) if message.minor => {
            // One wake-up is for all who sleep there.
            if !later.iter().any(|again| again.page == page && Arc::ptr_eq(&again.block, &block)) {
                later.push(Again { due: Instant::now() + Duration::from_millis(10), block, page });
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
    later.push(Again { due: Instant::now() + pause, block, page });
    if let Some(seat) = seat {
        seat.tell(turn, News::Failed(error));
    }
}

/// A PRESENT page that isn't mapped where it was touched.
fn map(engine: &Engine, block: &Block, page: u64, touched: u64) -> Result<()> {
    let in_vmm = touched.wrapping_sub(block.hva) < block.len;
    match block.alias_of(page) {
        Some(alias) if !in_vmm => {
            install::map_present(&engine.memory, block, page, engine.memory.stats.here())?;
            engine.memory.uffd.wake(alias, block.page)
        }
        _ => install::map_vmm(&engine.memory, block, page, engine.memory.stats.here()),
    }
}
