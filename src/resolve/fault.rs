//! The vocabulary: a fault, where it comes from, what the resolver answers, and how the fault ends.

use super::readahead::Runs;
use crate::kernel::abi::Access;
use crate::kernel::address::{Gpa, Hva};
use crate::memory::wait::Sleeper;
use crate::stats::Stats;
use std::ops::Range;
use std::sync::Mutex;
use std::time::Duration;

/// Where a fault comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A vCPU, by KVM's number.
    Vcpu(i32),
    /// A host thread or system call.
    Host,
    /// `kvmfault_pages_resolve`, or readahead.
    Prefetch,
    /// Background fill.
    Fill,
}

/// A fault, as the resolver sees it.
#[derive(Debug, Clone)]
pub struct Fault {
    /// KVM's number of the slot.
    pub slot: u32,
    /// The page's guest physical address.
    pub gpa: Gpa,
    /// The page's size in bytes.
    pub len: u64,
    /// The page's address in the VMM's mapping.
    pub hva: Hva,
    /// The access, as far as the kernel tells.
    pub access: Access,
    /// Where the fault comes from.
    pub origin: Origin,
    /// Guest physical addresses around the page that the resolver may install with it.
    pub window: Range<Gpa>,
}

/// A fault to be served.
#[derive(Clone, Copy)]
pub struct FaultRequest<'a> {
    /// Where the fault comes from.
    pub origin: Origin,
    /// The access, as far as the kernel tells.
    pub access: Access,
    /// The thread that waits while another one fetches the page. None if the caller does not wait.
    pub waiter: Option<&'a dyn Waiter>,
    /// The counters of the thread that has the fault.
    pub stats: &'a Stats,
    /// The pages that may be fetched with this one.
    pub extent: Extent<'a>,
}

/// The pages that may be fetched with a page.
#[derive(Clone, Copy)]
pub enum Extent<'a> {
    /// Those that the runs of these faults suggest.
    Readahead(&'a Mutex<Runs>),
    /// Those that follow it.
    UpTo {
        /// The end, a page of the block.
        end: u64,
        /// The most pages together, the one that is needed included.
        most: u64,
    },
}

impl Extent<'_> {
    /// The page and no other.
    pub const ONE_PAGE: Self = Extent::UpTo { end: 0, most: 1 };
}

/// What a resolver answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The page is installed.
    Resolved,
    /// The page is installed later.
    Pending,
    /// The page can never be installed.
    Lost,
    /// The resolver is to be called again.
    Retry,
    /// The resolver failed, with a positive errno.
    Failed(i32),
    /// A value that is no answer.
    Garbage(i32),
}

/// The callbacks that fetch pages.
pub trait Resolver: Send + Sync {
    /// Installs the page, or says why not.
    fn resolve(&self, fault: &Fault) -> Answer;
    /// The library wrote guest memory on behalf of the guest, which KVM's dirty log does not show.
    fn written(&self, _gpa: Gpa, _len: u64) {}
}

/// How a fault ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The call of this fault installed the page.
    Installed,
    /// Another call installed the page while this fault waited.
    Waited,
    /// The page was PRESENT.
    WasPresent,
    /// The page is LOST.
    Lost,
    /// A kick or a signal ended the wait.
    Interrupted,
    /// The resolver asked to be called again.
    Retry,
    /// Another call fetches the page, and this caller does not wait.
    Elsewhere,
    /// The resolver has announced the page, and this caller does not wait.
    Pending,
    /// The slot was deleted meanwhile.
    Gone,
}

/// A thread that waits, and when it must stop waiting.
pub trait Waiter {
    /// Where a kick finds the thread.
    fn sleeper(&self) -> &Sleeper;
    /// Must the thread stop waiting, for a kick?
    fn must_leave(&self) -> bool;
    /// Was the signal that ended the wait a nudge (`Seat::nudge`), after which the thread may go on
    /// waiting?
    fn was_nudged(&self) -> bool {
        false
    }
}

/// How often in a row a resolver may answer KVMFAULT_RETRY for one page; then the fault fails.
pub const MAX_RETRIES: u32 = 1000;

/// The pause before the n-th try in a row: doubling from 1 us to 10 ms.
pub fn pause_before(retry: u32) -> Duration {
    Duration::from_micros(1 << retry.min(14)).min(Duration::from_millis(10))
}
