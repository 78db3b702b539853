//! Waiting for a page: a hash table of futex words, without allocation or registration.

use crate::kernel::address::Hva;
use crate::kernel::futex::{self, Wake};
use once_cell::sync::Lazy;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

/// After this time a sleeper wakes by itself and checks what it waits for. This is for the one
/// event without a wake-up: a signal that arrived between the last check and the sleep, and left
/// only `immediate_exit` set.
///
/// Nothing else needs it. With KVMFAULT_TEST_NO_LOOK_AROUND in the environment, which is read once,
/// it is an hour, so that tests see a lost wake-up.
pub fn recheck_interval() -> Duration {
    static RECHECK_INTERVAL: Lazy<Duration> = Lazy::new(|| match std::env::var_os("KVMFAULT_TEST_NO_LOOK_AROUND") {
        None => Duration::from_millis(20),
        Some(_) => Duration::from_secs(3600),
    });
    *RECHECK_INTERVAL
}

pub(super) const BUCKETS: usize = 1024;

/// The bucket of a page, by its address in the VMM's mapping, which is unique in the process.
pub(super) fn bucket_of(hva: Hva, shift: u32) -> usize {
    // Fibonacci hashing spreads neighbours.
    ((hva.0 >> shift).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 54) as usize
}

#[repr(align(64))]
struct Bucket {
    sequence: AtomicU32,
    sleepers: AtomicU32,
}

/// The threads that sleep for pages.
pub struct WaitTable {
    buckets: [Bucket; BUCKETS],
}

/// One table for the process: a kick may come from a signal handler after its VM was freed, and
/// still finds the table.
pub static WAITS: WaitTable = WaitTable::new();

/// The place where one thread sleeps at the moment, by which a kick finds it.
#[derive(Debug, Default)]
pub struct Sleeper {
    /// The index of the bucket plus one; 0 while the thread does not sleep.
    bucket: AtomicU32,
}

impl Sleeper {
    /// Does the thread sleep for a page, or is it about to?
    pub fn is_asleep(&self) -> bool {
        self.bucket.load(SeqCst) != 0
    }
}

impl WaitTable {
    /// A table without sleepers.
    pub const fn new() -> WaitTable {
        WaitTable { buckets: [const { Bucket { sequence: AtomicU32::new(0), sleepers: AtomicU32::new(0) } }; BUCKETS] }
    }

    /// Sleeps until the page may have changed. `still` says whether there is anything to wait for;
    /// it is called once `wake` and `wake_sleeper` can find the sleeper, so that neither is missed.
    pub fn wait(&self, hva: Hva, sleeper: &Sleeper, at_most: Duration, still: impl Fn() -> bool) -> Wake {
        let number = bucket_of(hva, 12);
        let bucket = &self.buckets[number];
        bucket.sleepers.fetch_add(1, SeqCst);
        let sequence = bucket.sequence.load(SeqCst);
        sleeper.bucket.store(number as u32 + 1, SeqCst);
        let wake = if still() { futex::wait(&bucket.sequence, sequence, at_most) } else { Wake::Woken };
        sleeper.bucket.store(0, SeqCst);
        bucket.sleepers.fetch_sub(1, SeqCst);
        wake
    }

    /// Wakes the threads that sleep for a page, as it has changed. Only a load if there are none.
    pub fn wake(&self, hva: Hva) {
        self.wake_bucket(&self.buckets[bucket_of(hva, 12)]);
    }

    /// Wakes one sleeper, whatever it waits for, and those in the same bucket, which check and
    /// sleep again. Async-signal-safe.
    pub fn wake_sleeper(&self, sleeper: &Sleeper) {
        if let Some(number) = sleeper.bucket.load(SeqCst).checked_sub(1) {
            self.wake_bucket(&self.buckets[number as usize]);
        }
    }

    /// Wakes all sleepers.
    pub fn wake_all(&self) {
        self.buckets.iter().for_each(|b| self.wake_bucket(b));
    }

    fn wake_bucket(&self, bucket: &Bucket) {
        if bucket.sleepers.load(SeqCst) > 0 {
            bucket.sequence.fetch_add(1, SeqCst);
            futex::wake_all(&bucket.sequence);
        }
    }
}

impl Default for WaitTable {
    fn default() -> Self {
        WaitTable::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::Instant;

    /// Longer than a busy machine keeps a thread from running.
    const FOR_LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_wake_or_a_poke_ends_a_wait_at_once() {
        for wake_sleeper in [false, true] {
            let (table, sleeper, done) = (WaitTable::new(), Sleeper::default(), AtomicBool::new(false));
            std::thread::scope(|scope| {
                let waiter = scope.spawn(|| {
                    let mut rounds = 0;
                    while !done.load(SeqCst) {
                        table.wait(Hva(0x1000), &sleeper, FOR_LONG, || !done.load(SeqCst));
                        rounds += 1;
                    }
                    rounds
                });
                while sleeper.bucket.load(SeqCst) == 0 {
                    std::thread::yield_now();
                }
                done.store(true, SeqCst);
                let start = Instant::now();
                if wake_sleeper {
                    table.wake_sleeper(&sleeper)
                } else {
                    table.wake(Hva(0x1000))
                }
                assert!(waiter.join().unwrap() >= 1);
                assert!(start.elapsed() < FOR_LONG / 2, "only its own time ended it");
            });
        }
    }
}
