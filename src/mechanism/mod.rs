//! How the library learns of a guest's access to an absent page. Each mechanism has a file;
//! [`MECHANISMS`] lists them in the order in which `auto` tries them.

mod memslot_flag;
mod poison_trap;
pub mod report;
mod userfaultfd;

use crate::error::{Error, Result};
use crate::kernel::abi::Abi;
use crate::kernel::kvm::{Region, VcpuFd, VmFd};
use crate::kernel::mem::Kind;
use crate::kernel::uffd::Mode;
use crate::memory::block::{Block, Shape};
use crate::memory::slots::Slot;
use crate::memory::Memory;
use crate::stats::Stats;
use std::fmt;
use std::os::fd::RawFd;

/// What the kernel of this machine offers, as found out for each VM.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// The row of the ABI table that was proven in a scratch VM.
    pub abi: Option<&'static Abi>,
    /// The UFFD_FEATURE_* bits in force.
    pub features: u64,
}

/// What the VMM asks of a block.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlockRequest {
    /// A userfaultfd of the VMM serves all threads but vCPUs.
    pub external: bool,
    /// Only vCPUs touch absent pages.
    pub vcpu_only: bool,
    /// The slot is read-only for the guest (KVM_MEM_READONLY).
    pub readonly: bool,
    /// All pages are PRESENT at the start.
    pub present: bool,
    /// Where the slot begins in its block, in bytes.
    pub offset: u64,
    /// The file that the block is a mapping of, and where the block begins in it.
    pub file: Option<(RawFd, u64)>,
}

/// One way to learn of a vCPU's fault.
pub trait Mechanism: Sync + fmt::Debug {
    /// The C API's number: KVMFAULT_MECHANISM_*.
    fn number(&self) -> i32;
    /// The name in options and reports.
    fn name(&self) -> &'static str;
    /// Can it serve such memory here? The error says why not, and what would help.
    fn check(&self, host: &Host, kind: Kind, request: &BlockRequest) -> Result<()>;
    /// Can it serve the guest of this vCPU?
    fn check_guest(&self, _vcpu: &VcpuFd) -> Result<()> {
        Ok(())
    }
    /// Makes guests' writes to the MSRs that register areas for KVM exit, if their pages must be
    /// present first. Returns whether they exit.
    fn filter_msrs(&self, _vm: &VmFd) -> Result<bool> {
        Ok(false)
    }
    /// Sets up a block: registers it with userfaultfd, and makes what else KVM needs.
    fn new_block(&self, host: &Host, memory: &Memory, shape: Shape, request: &BlockRequest) -> Result<Block>;
    /// Turns the fast path of a block on or off, apart from the slot's flag.
    fn set_fast(&self, memory: &Memory, block: &Block, on: bool) -> Result<()>;
    /// Does each slot have a fast path of its own (a flag of the slot), so that slots on one block
    /// may differ?
    fn is_per_slot(&self) -> bool {
        false
    }
    /// Adds to a slot's region what KVM is to be told while the fast path is on.
    fn arm(&self, _host: &Host, _slot: &Slot, _region: &mut Region) {}
    /// Maps a PRESENT page on which a vCPU faults.
    fn map_for_kvm(&self, memory: &Memory, block: &Block, page: u64, stats: &Stats) -> Result<()>;
}

/// The C API's number for the best mechanism that works.
pub const AUTO: i32 = 0;
/// The C API's number of `memslot-flag`.
pub const MEMSLOT_FLAG: i32 = 1;
/// The C API's number of `poison-trap`.
pub const POISON_TRAP: i32 = 2;
/// The C API's number of `userfaultfd`.
pub const USERFAULTFD: i32 = 3;

/// All mechanisms, best first.
pub static MECHANISMS: [&dyn Mechanism; 3] =
    [&memslot_flag::MemslotFlag, &poison_trap::PoisonTrap, &userfaultfd::Userfaultfd];

/// The index in `MECHANISMS` of a C API number; None for AUTO; an error for a number that is no
/// mechanism's.
pub fn choice(number: i32) -> Result<Option<usize>> {
    match MECHANISMS.iter().position(|m| m.number() == number) {
        None if number == AUTO => Ok(None),
        None => Err(Error::new(libc::EINVAL, format!("mechanism: {number} is not a KVMFAULT_MECHANISM_*"))),
        found => Ok(found),
    }
}

/// The index of the mechanism for some memory: the forced one, or the first that can serve it.
pub fn choose(host: &Host, forced: Option<usize>, kind: Kind, request: &BlockRequest) -> Result<usize> {
    if let Some(forced) = forced {
        let mechanism = MECHANISMS[forced];
        let reason = |e: Error| e.context(format!("mechanism: {} can't serve this memory", mechanism.name()));
        return mechanism.check(host, kind, request).map(|()| forced).map_err(reason);
    }
    let mut reasons = String::from("mechanism: none can serve this memory");
    for (n, mechanism) in MECHANISMS.iter().enumerate() {
        match mechanism.check(host, kind, request) {
            Ok(()) => return Ok(n),
            Err(e) => reasons.push_str(&format!("; {}: {e}", mechanism.name())),
        }
    }
    Err(Error::new(libc::EOPNOTSUPP, reasons))
}

/// Does userfaultfd report minor faults (in the page cache, not mapped) for such memory? The VMM's
/// mapping is then registered for them, so that a host access to a page whose bytes are still being
/// written waits until it is installed.
pub fn has_minor(features: u64, kind: Kind) -> bool {
    use crate::kernel::uffd::{FEATURE_MINOR_HUGETLBFS, FEATURE_MINOR_SHMEM};
    match kind {
        Kind::Shared => features & FEATURE_MINOR_SHMEM != 0,
        Kind::HugetlbShared => features & FEATURE_MINOR_HUGETLBFS != 0,
        Kind::Anon | Kind::HugetlbPrivate => false,
    }
}

/// What the VMM's mapping of a block is registered for.
fn vmm_mode(features: u64, kind: Kind) -> Mode {
    Mode { minor: has_minor(features, kind), keeps_tables: false }
}

/// Registers a released block again, in which pages may be missing later. They may not be yet: what
/// keeps KVM from the holes must be in place first.
pub fn register_again(memory: &Memory, block: &Block) -> Result<()> {
    memory.uffd.register(block.whole(), vmm_mode(memory.uffd.features(), block.kind))
}
