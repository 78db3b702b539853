//! Counters: each vCPU has its own, so that counting never makes vCPUs meet; readers and outside callers share the VM's.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

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
}

impl Stats {
    /// Counts a fault's service time.
    pub fn served_in(&self, time: Duration) {
        let us = time.as_micros() as u64;
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
            stats.served_in(Duration::from_micros(us));
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
