//! The words of the room: a fault, who has it, what the resolver answers, and how it ends.

use super::readahead::Runs;
use crate::kernel::abi::Access;
use crate::memory::wait::Sleeper;
use crate::stats::Stats;
use std::ops::Range;
use std::sync::Mutex;
use std::time::Duration;

/// Who needs the page.
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
    pub gpa: u64,
    /// The page's size.
    pub len: u64,
    /// The page in the VMM's mapping.
    pub hva: u64,
    /// What the kernel says of the access.
    pub access: Access,
    /// Who needs it.
    pub origin: Origin,
    /// What is welcome besides: guest addresses around the page.
    pub window: Range<u64>,
}

/// Who comes with a fault, and what for.
#[derive(Clone, Copy)]
pub struct FaultRequest<'a> {
    /// Who needs the page.
    pub origin: Origin,
    /// What the kernel says of the access.
    pub access: Access,
    /// Whoever waits if somebody else is bringing the page; without one nobody waits.
    pub waiter: Option<&'a dyn Waiter>,
    /// Where it is counted.
    pub stats: &'a Stats,
    /// What may be brought besides.
    pub extent: Extent<'a>,
}

/// What may be brought with a page.
#[derive(Clone, Copy)]
pub enum Extent<'a> {
    /// What the runs of these faults suggest.
    Readahead(&'a Mutex<Runs>),
    /// What follows.
    UpTo {
        /// The end, a page of the block.
        end: u64,
        /// So many pages together, the needed one included.
        most: u64,
    },
}

impl Extent<'_> {
    /// Nothing.
    pub const ONE_PAGE: Self = Extent::UpTo { end: 0, most: 1 };
}

/// What a resolver answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Installed.
    Resolved,
    /// Somebody installs it later.
    Pending,
    /// Nobody ever will.
    Lost,
    /// Ask again.
    Retry,
    /// A positive errno.
    Failed(i32),
    /// None of these.
    Garbage(i32),
}

/// What the VMM provides.
pub trait Resolver: Send + Sync {
    /// Brings the page, or says why not.
    fn resolve(&self, fault: &Fault) -> Answer;
    /// The library wrote guest memory for the guest; KVM's dirty log doesn't know.
    fn written(&self, _gpa: u64, _len: u64) {}
}

/// How a fault ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Our own call installed the page.
    Installed,
    /// Somebody else's did while we waited.
    Waited,
    /// It was there already.
    WasPresent,
    /// It can't be had.
    Lost,
    /// A kick or a signal ended the wait.
    Interrupted,
    /// The resolver wants to be asked again.
    Retry,
    /// Somebody else is at it, and we don't wait.
    Elsewhere,
    /// The resolver has it installed later, and we don't wait.
    Pending,
    /// The slot was deleted meanwhile.
    Gone,
}

/// Who waits, and when it must stop waiting.
pub trait Waiter {
    /// Where a kick finds it.
    fn sleeper(&self) -> &Sleeper;
    /// Is there a kick?
    fn must_leave(&self) -> bool;
    /// Was a signal that ended its wait a nudge (`Seat::nudge`), and so for nothing?
    fn was_nudged(&self) -> bool {
        false
    }
}

/// After so many KVMFAULT_RETRY in a row for one page the fault is an error.
pub const MAX_RETRIES: u32 = 1000;

/// How long to wait before the n-th try in a row: doubling from 1 us to 10 ms.
pub fn pause_before(retry: u32) -> Duration {
    Duration::from_micros(1 << retry.min(14)).min(Duration::from_millis(10))
}
