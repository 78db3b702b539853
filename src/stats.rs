//! Counters: each vCPU has its own, so that counting never makes vCPUs meet; readers and outside callers share the VM's.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Number of latency buckets: below 1 us, then powers of two of a microsecond.
pub const LATENCY_BUCKETS: usize = 32;

/// One counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// The counters of a vCPU, or of all that isn't one. Meanings: see `kvmfault_stats` in the header.
        #[repr(align(128))]
        #[derive(Debug, Default)]
        #[allow(missing_docs)]
        pub struct Stats {
            $($(#[$doc])* pub $name: Counter,)+
            pub latency: [Counter; LATENCY_BUCKETS],
        }

        impl Stats {
            /// Adds another's counters to these.
            pub fn absorb(&self, other: &Stats) {
                $(self.$name.add(other.$name.get());)+
                for (mine, others) in self.latency.iter().zip(&other.latency) {
                    mine.add(others.get());
                }
            }
        }
    };
}

counters! {
    faults_vcpu,
    faults_host,
    faults_prefetch,
    resolver_calls,
    outcome_resolved,
    outcome_waited,
    outcome_mapped,
    outcome_lost,
    outcome_failed,
    outcome_interrupted,
    outcome_retried,
    pages_copied,
    pages_zeroed,
    pages_mapped,
    pages_discarded,
    retries_again,
    retries_exist,
    mmio_reads,
    mmio_writes,
    kicks,
    ahead_asked,
    ahead_failed,
    pages_empty,
    pages_given_back,
}

/// Counters for whoever isn't a vCPU, or is one inside a callback: a set for each of so many threads, so that threads which install pages at
/// the same time don't meet at one cache line.
#[derive(Debug)]
pub struct Shards(Box<[Stats]>);

/// So many.
pub const SHARDS: usize = 64;

/// The calling thread's number among so many.
pub fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    if MINE.get() == usize::MAX {
        MINE.set(NEXT.fetch_add(1, Relaxed) % SHARDS);
    }
    MINE.get()
}

impl Default for Shards {
    fn default() -> Self {
        Shards((0..SHARDS).map(|_| Stats::default()).collect())
    }
}

impl Shards {
    /// The calling thread's.
    pub fn here(&self) -> &Stats {
        &self.0[shard()]
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Stats> {
        self.0.iter()
    }
}

impl Stats {
    /// Counts a fault's service time, in nanoseconds.
    pub fn served_in(&self, time: u64) {
        let us = time / 1000;
        let bucket = (64 - us.leading_zeros() as usize).min(LATENCY_BUCKETS - 1);
        self.latency[bucket].add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_powers_of_two() {
        let stats = Stats::default();
        for us in [0, 1, 2, 3, 4, 1000] {
            stats.served_in(us * 1000);
        }
        let counts: Vec<u64> = stats.latency.iter().map(Counter::get).collect();
        assert_eq!(&counts[..4], &[1, 1, 2, 1]);
        assert_eq!(counts[10], 1);
        let sum = Stats::default();
        sum.absorb(&stats);
        sum.absorb(&stats);
        assert_eq!(sum.latency[2].get(), 4);
    }
}
