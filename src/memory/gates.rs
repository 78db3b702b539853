//! Keeps discards and installs of a page apart.

use super::pause::Backoff;
use super::wait::{bucket_of, BUCKETS};
use crate::error::{fail, Result};
use crate::kernel::address::Hva;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// The pages that share one gate. A discard of one page waits for installs of all of them, which
/// asks for few; an install enters a gate once for all of them, which asks for many.
pub const GATE_PAGES: u64 = 512;

#[repr(align(64))]
#[derive(Default)]
struct Gate {
    /// The number of installs under way.
    installs: AtomicU32,
    /// Odd while a discard is under way or tries to enter; it has another value after each discard.
    discards: AtomicU32,
}

/// Keeps discards and installs of a page apart. Installs of a page may overlap (the kernel
/// arbitrates). A discard excludes them, as an installer that found the old bytes in place would
/// take them for the new page; it also excludes other discards and what else changes markers.
/// Installs only count themselves; a discard, which is rare, waits.
pub struct Gates {
    gates: Box<[Gate]>,
    closed: AtomicBool,
}

/// How long a discard waits for installs.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);

/// An install or a discard under way.
pub struct Pass<'a> {
    count: &'a AtomicU32,
    at_the_end: u32,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.count.fetch_add(self.at_the_end, SeqCst);
    }
}

impl Gates {
    /// Gates with nothing under way.
    pub fn new() -> Gates {
        Gates { gates: (0..BUCKETS).map(|_| Gate::default()).collect(), closed: AtomicBool::new(false) }
    }

    fn gate(&self, key: Hva) -> &Gate {
        &self.gates[bucket_of(key, 12)]
    }

    /// For installing pages of one gate (see `Block::gate_of`). Waits while one of them is being
    /// discarded, or while a discard tries to enter: for milliseconds, whatever the discard waits
    /// for.
    pub fn enter_install(&self, key: Hva) -> Pass<'_> {
        let gate = self.gate(key);
        let mut backoff = Backoff::default();
        loop {
            gate.installs.fetch_add(1, SeqCst);
            if gate.discards.load(SeqCst) % 2 == 0 {
                return Pass { count: &gate.installs, at_the_end: 1u32.wrapping_neg() };
            }
            gate.installs.fetch_sub(1, SeqCst);
            backoff.pause();
        }
    }

    /// For discarding pages of one gate: when this returns, no install and no other discard is
    /// under way, and none begins.
    ///
    /// Installs are a few system calls that end, but for one whose source does not answer: the
    /// kernel reads the source inside UFFDIO_COPY. Nothing waits for that one without end. A
    /// discard that cannot enter withdraws its claim for as long as it held it, so that installs
    /// pass; after `DISCARD_TIMEOUT` it fails with EBUSY. It fails with ESHUTDOWN at once when the
    /// gates are closed.
    pub fn enter_discard(&self, key: Hva) -> Result<Pass<'_>> {
        self.enter_discard_within(key, DISCARD_TIMEOUT)
    }

    /// Like `enter_discard`, but fails with EBUSY after `at_most`.
    pub fn enter_discard_within(&self, key: Hva, at_most: Duration) -> Result<Pass<'_>> {
        self.claim(key, at_most, true)
    }

    /// For the end of a retired block: waits until the passes that were entered before it retired
    /// have ended. Discards are waited for as long as they take, as they are system calls that end;
    /// installs, whose source may not answer, until `end`. False if an install is still under way.
    pub fn have_left(&self, key: Hva, end: Instant) -> bool {
        let gate = self.gate(key);
        let begun = gate.discards.load(SeqCst);
        let mut backoff = Backoff::default();
        while begun % 2 == 1 && gate.discards.load(SeqCst) == begun {
            backoff.pause();
        }
        let left = || end.saturating_duration_since(Instant::now());
        gate.installs.load(SeqCst) == 0 || self.claim(key, left(), false).is_ok()
    }

    fn claim(&self, key: Hva, at_most: Duration, ends_with_vm: bool) -> Result<Pass<'_>> {
        const LONGEST_CLAIM: Duration = Duration::from_millis(64);
        let gate = self.gate(key);
        let mut claim = Duration::from_millis(1);
        let mut end = None;
        let mut backoff = Backoff::default();
        loop {
            if gate.discards.fetch_update(SeqCst, SeqCst, |n| (n % 2 == 0).then_some(n + 1)).is_ok() {
                if gate.installs.load(SeqCst) == 0 {
                    return Ok(Pass { count: &gate.discards, at_the_end: 1 });
                }
                let claimed = Instant::now();
                while claimed.elapsed() < claim {
                    backoff.pause();
                    if gate.installs.load(SeqCst) == 0 {
                        return Ok(Pass { count: &gate.discards, at_the_end: 1 });
                    }
                }
                // The number before the claim: nothing was discarded.
                gate.discards.fetch_sub(1, SeqCst);
                let opened = Instant::now();
                while opened.elapsed() < claim && gate.installs.load(SeqCst) > 0 {
                    backoff.pause();
                }
                claim = (claim * 2).min(LONGEST_CLAIM);
            } else {
                backoff.pause();
            }
            if ends_with_vm && self.closed.load(SeqCst) {
                fail!(ESHUTDOWN, "the VM was freed meanwhile");
            }
            if Instant::now() > *end.get_or_insert_with(|| Instant::now() + at_most) {
                fail!(
                    EBUSY,
                    "an install near hva {key:#x} has been under way for {at_most:?}: does the source that it reads from answer?"
                );
            }
        }
    }

    /// The VM was freed: discards that would have to wait fail from now on.
    pub fn close(&self) {
        self.closed.store(true, SeqCst);
    }

    /// A number that changes with each discard of pages of one gate; None while one is under way.
    /// For a caller that cannot hold a pass during what it does, but can repeat it: between two
    /// equal numbers nothing was discarded.
    pub fn discard_count(&self, key: Hva) -> Option<u32> {
        Some(self.gate(key).discards.load(SeqCst)).filter(|n| n % 2 == 0)
    }
}

impl Default for Gates {
    fn default() -> Self {
        Gates::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longer than a busy machine keeps a thread from running.
    const FOR_LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_discard_excludes_installs_and_discards() {
        let gates = Gates::new();
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for discard in [false, false, true, true] {
                let (gates, inside) = (&gates, &inside);
                scope.spawn(move || {
                    for _ in 0..500 {
                        if discard {
                            let _pass = gates.enter_discard(Hva(0x20_0000)).unwrap();
                            assert_eq!(inside.fetch_add(1, SeqCst), 0, "a discard is not alone");
                            std::thread::yield_now();
                            inside.fetch_sub(1, SeqCst);
                        } else {
                            let _pass = gates.enter_install(Hva(0x20_0000));
                            inside.fetch_add(1, SeqCst);
                            inside.fetch_sub(1, SeqCst);
                        }
                    }
                });
            }
        });
    }

    /// While an install hangs, a discard fails, other installs pass, and the end of the VM ends the
    /// wait.
    #[test]
    fn nothing_waits_for_an_install_without_end() {
        let gates = Gates::new();
        let hangs = gates.enter_install(Hva(0x20_0000));
        let before = gates.discard_count(Hva(0x20_0000));
        let within = |time| gates.enter_discard_within(Hva(0x20_0000), time).map(drop).map_err(|e| e.errno);
        assert_eq!(within(Duration::from_millis(50)), Err(libc::EBUSY));
        assert_eq!(gates.discard_count(Hva(0x20_0000)), before, "nothing was discarded");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| within(FOR_LONG));
            for _ in 0..100 {
                drop(gates.enter_install(Hva(0x20_0000)));
            }
            assert!(!waits.is_finished());
            gates.close();
            assert_eq!(waits.join().unwrap(), Err(libc::ESHUTDOWN));
        });
        drop(hangs);
        assert_eq!(within(FOR_LONG), Ok(()));
    }
}
