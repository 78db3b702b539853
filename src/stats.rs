//! Counters. Each vCPU has its own, so that vCPUs share no cache line for counting; reader threads
//! and callers from outside share those of the VM.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Number of latency buckets: below 1 us, then one for each power of two of a microsecond.
pub const LATENCY_BUCKETS: usize = 32;

/// A counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// The counters of one vCPU, or of threads that are none. A [`snapshot`] has their values.
        #[repr(align(128))]
        #[derive(Debug, Default)]
        #[allow(rustdoc::private_intra_doc_links)]
        pub struct Stats {
            $($(#[$doc])* pub $name: Counter,)+
            /// Faults by service time.
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

            /// The values of the counters.
            pub fn snapshot(&self) -> snapshot::Stats {
                let latency_us_log2 = std::array::from_fn(|n| self.latency[n].get());
                snapshot::Stats { $($name: self.$name.get(),)+ latency_us_log2 }
            }
        }

        /// The values of counters.
        pub mod snapshot {
            /// Counters of a VM or a vCPU, since it was attached to.
            #[derive(Debug, Clone, Copy, PartialEq, Eq)]
            #[non_exhaustive]
            pub struct Stats {
                $($(#[$doc])* pub $name: u64,)+
                /// Faults by service time: bucket 0 below 1 us, bucket n from 2^(n-1) us up to 2^n
                /// us.
                pub latency_us_log2: [u64; super::LATENCY_BUCKETS],
            }
        }
    };
}

counters! {
    /// Faults of vCPUs, however they arrived.
    faults_vcpu,
    /// Faults of host threads and system calls.
    faults_host,
    /// Pages that [`Vm::resolve`](crate::Vm::resolve) asked for and that were not present.
    faults_prefetch,
    /// Calls of the resolver: for faults, and for pages of strided runs ahead of them.
    resolver_calls,
    /// Faults that ended with the page installed by their own resolver call.
    outcome_resolved,
    /// Faults that waited for another resolver call, or for a page that was announced.
    outcome_waited,
    /// Faults on pages that were present already and only had to be mapped.
    outcome_mapped,
    /// Faults that ended in a memory error.
    outcome_lost,
    /// Faults that ended in an error.
    outcome_failed,
    /// Faults left by a kick or a signal.
    outcome_interrupted,
    /// Faults that a resolver sent back with [`Answer::Retry`](crate::Answer::Retry).
    outcome_retried,
    /// Pages installed by copying.
    pages_copied,
    /// Pages installed as zeros.
    pages_zeroed,
    /// Pages installed from the page cache.
    pages_mapped,
    /// Pages made absent again.
    pages_discarded,
    /// Installs repeated because the address space was changing (`EAGAIN`).
    retries_again,
    /// Installs that found the page there already (`EEXIST`).
    retries_exist,
    /// Reads in memslots that KVM left to userspace to complete.
    mmio_reads,
    /// Writes in memslots that KVM left to userspace to complete.
    mmio_writes,
    /// Kicks that ended a run.
    kicks,
    /// Pages that resolvers were asked for by readahead, besides those that were needed.
    ahead_asked,
    /// Of them, those for which the resolver failed.
    ahead_failed,
    /// Pages that were present and had nothing in them when they were touched; they read as zeros.
    pages_empty,
    /// Pages given back by [`Vm::give_back`](crate::Vm::give_back).
    pages_given_back,
}

/// Counters for threads that are no vCPUs, or are inside a callback: several sets of them, so that
/// threads which install pages at the same time rarely share a cache line.
#[derive(Debug)]
pub struct Shards(Box<[Stats]>);

/// Number of sets of counters.
pub const SHARDS: usize = 64;

/// The number of the calling thread's set.
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
    /// The calling thread's set.
    pub fn here(&self) -> &Stats {
        &self.0[shard()]
    }

    /// All sets.
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
