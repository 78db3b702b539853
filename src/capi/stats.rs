//! Statistics: counters of a VM and of a vCPU.

use super::boundary::with;
use super::structs::Out;
use super::vcpu::kvmfault_vcpu;
use super::vm::kvmfault_vm;
use crate::stats::Stats;
use std::ffi::c_int;

/// Number of buckets of `kvmfault_stats.latency_us_log2`.
pub const KVMFAULT_LATENCY_BUCKETS: usize = 32;

/// Counters of a VM or a vCPU since its handle was made. Start from KVMFAULT_STATS_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_stats {
    /// Set by KVMFAULT_STATS_INIT.
    pub size: usize,
    /// Faults of vCPUs, by whichever mechanism they arrived.
    pub faults_vcpu: u64,
    /// Faults of threads and system calls of this process.
    pub faults_host: u64,
    /// Pages that `kvmfault_pages_resolve` was called for and that were not present.
    pub faults_prefetch: u64,
    /// Calls of the resolver: for faults, and for pages of strided runs ahead of them.
    pub resolver_calls: u64,
    /// Faults whose own resolver call installed the page.
    pub outcome_resolved: u64,
    /// Faults that waited for another thread's resolver call, or for an announced page
    /// (KVMFAULT_PENDING).
    pub outcome_waited: u64,
    /// Faults on pages that were present already and only had to be mapped.
    pub outcome_mapped: u64,
    /// Faults that ended in a memory error.
    pub outcome_lost: u64,
    /// Faults that ended in an error.
    pub outcome_failed: u64,
    /// Faults that a kick or a signal interrupted.
    pub outcome_interrupted: u64,
    /// Faults that ended with the resolver's KVMFAULT_RETRY.
    pub outcome_retried: u64,
    /// Pages installed by copying.
    pub pages_copied: u64,
    /// Pages installed as zeros.
    pub pages_zeroed: u64,
    /// Pages installed from the page cache.
    pub pages_mapped: u64,
    /// Pages that `kvmfault_pages_discard` made absent.
    pub pages_discarded: u64,
    /// Installs repeated because the address space was changing (EAGAIN).
    pub retries_again: u64,
    /// Installs that found the page installed already (EEXIST).
    pub retries_exist: u64,
    /// Reads completed for KVM's emulator (KVM_EXIT_MMIO inside a memslot).
    pub mmio_reads: u64,
    /// Writes completed for KVM's emulator (KVM_EXIT_MMIO inside a memslot).
    pub mmio_writes: u64,
    /// Kicks that `kvmfault_vcpu_run` or `kvmfault_vcpu_handle_exit` has seen.
    pub kicks: u64,
    /// Faults by service time: bucket 0 is below 1 us, bucket n is from 2^(n-1) us to below 2^n us.
    pub latency_us_log2: [u64; KVMFAULT_LATENCY_BUCKETS],
    /// Pages that readahead asked resolvers for, besides those that were needed.
    pub ahead_asked: u64,
    /// Pages that readahead asked resolvers for, and for which the resolver failed: each is still
    /// absent, or was resolved by a fault of its own.
    pub ahead_failed: u64,
    /// Pages that were present and had no memory when they were touched: holes of memory that was
    /// set with KVMFAULT_MEMSLOT_PRESENT, pages that were given back (`kvmfault_pages_give_back`),
    /// and pages that the VMM took away without telling the library. They read as zeros. Without
    /// that flag, a number above `pages_given_back` means that the VMM has lost pages by a
    /// madvise(2) or fallocate(2) of its own. (With `memslot-flag`, KVM's own fault may supply such
    /// a page, which is then not counted.)
    pub pages_empty: u64,
    /// Pages given back by `kvmfault_pages_give_back`; a page counts each time.
    pub pages_given_back: u64,
}

/// Reads the counters of a VM: the sum over its vCPUs, its reader threads, and other threads'
/// calls.
///
/// Returns: 0, and *stats is filled in.
/// Errors:
///   -EINVAL: `stats` is NULL, or its size is wrong.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// The pointers are NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vm_stats(vm: *const kvmfault_vm, stats: *mut kvmfault_stats) -> c_int {
    with("kvmfault_vm_stats", vm, |vm| {
        let out = Out::new(stats, "stats")?;
        out.write(&stats_of(&vm.stats()));
        Ok(0)
    })
}

/// Reads the counters of a vCPU.
///
/// Returns: 0, and *stats is filled in.
/// Errors:
///   -EINVAL: `stats` is NULL, or its size is wrong.
/// Threads: any.
/// Callbacks: allowed.
///
/// # Safety
/// The pointers are NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_vcpu_stats(vcpu: *const kvmfault_vcpu, stats: *mut kvmfault_stats) -> c_int {
    with("kvmfault_vcpu_stats", vcpu, |vcpu| {
        let out = Out::new(stats, "stats")?;
        out.write(&stats_of(&vcpu.seat().stats));
        Ok(0)
    })
}

/// Converts counters for C.
pub fn stats_of(stats: &Stats) -> kvmfault_stats {
    kvmfault_stats {
        size: 0,
        faults_vcpu: stats.faults_vcpu.get(),
        faults_host: stats.faults_host.get(),
        faults_prefetch: stats.faults_prefetch.get(),
        resolver_calls: stats.resolver_calls.get(),
        outcome_resolved: stats.outcome_resolved.get(),
        outcome_waited: stats.outcome_waited.get(),
        outcome_mapped: stats.outcome_mapped.get(),
        outcome_lost: stats.outcome_lost.get(),
        outcome_failed: stats.outcome_failed.get(),
        outcome_interrupted: stats.outcome_interrupted.get(),
        outcome_retried: stats.outcome_retried.get(),
        pages_copied: stats.pages_copied.get(),
        pages_zeroed: stats.pages_zeroed.get(),
        pages_mapped: stats.pages_mapped.get(),
        pages_discarded: stats.pages_discarded.get(),
        retries_again: stats.retries_again.get(),
        retries_exist: stats.retries_exist.get(),
        mmio_reads: stats.mmio_reads.get(),
        mmio_writes: stats.mmio_writes.get(),
        kicks: stats.kicks.get(),
        latency_us_log2: std::array::from_fn(|n| stats.latency[n].get()),
        ahead_asked: stats.ahead_asked.get(),
        ahead_failed: stats.ahead_failed.get(),
        pages_empty: stats.pages_empty.get(),
        pages_given_back: stats.pages_given_back.get(),
    }
}
