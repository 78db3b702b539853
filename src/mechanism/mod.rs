//! How a guest's access to an absent page comes to the library. One file a mechanism; [`MECHANISMS`] lists them in the order in
//! which `auto` tries them.

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

/// What the kernel of this machine offers; found out once a VM.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// The proven row of the ABI table.
    pub abi: Option<&'static Abi>,
    /// UFFD_FEATURE_* bits in force.
    pub features: u64,
}

/// What the VMM asks for a block.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlockRequest {
    /// A userfaultfd of the VMM's own serves everything but vCPUs.
    pub external: bool,
    /// Only vCPUs touch absent pages.
    pub vcpu_only: bool,
    /// KVM_MEM_READONLY.
    pub readonly: bool,
    /// All pages are present at the start.
    pub present: bool,
    /// Where the slot begins in its block.
    pub offset: u64,
    /// The file that the block is a mapping of, and where it begins there.
    pub file: Option<(RawFd, u64)>,
}

/// One way to learn of a vCPU's fault.
pub trait Mechanism: Sync + fmt::Debug {
    /// The C API's number: KVMFAULT_MECHANISM_*.
    fn number(&self) -> i32;
    /// The name, for options and reports.
    fn name(&self) -> &'static str;
    /// Can it serve such memory here? The error says why not, and what would help.
    fn check(&self, host: &Host, kind: Kind, request: &BlockRequest) -> Result<()>;
    /// Can it serve the guest of this vCPU?
    fn check_guest(&self, _vcpu: &VcpuFd) -> Result<()> {
        Ok(())
    }
    /// Makes guests' writes to the MSRs that register areas for KVM exit, if their pages must be present first. Returns
    /// whether they exit.
    fn filter_msrs(&self, _vm: &VmFd) -> Result<bool> {
        Ok(false)
    }
    /// Sets up a block: registers it with userfaultfd, makes what KVM needs besides.
    fn new_block(&self, host: &Host, memory: &Memory, shape: Shape, request: &BlockRequest) -> Result<Block>;
    /// Turns the fast path of a block on or off, as far as that isn't the slot flag's doing.
    fn set_fast(&self, memory: &Memory, block: &Block, on: bool) -> Result<()>;
    /// Is the fast path each slot's own (a flag of the slot), so that slots on one block may differ?
    fn is_per_slot(&self) -> bool {
        false
    }
    /// What KVM is told of a slot whose fast path is on.
    fn arm(&self, _host: &Host, _slot: &Slot, _region: &mut Region) {}
    /// A PRESENT page faults: it needs mapping, not bytes.
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

/// The place in the table of a C API number; None for AUTO, an error for what is no mechanism.
pub fn choice(number: i32) -> Result<Option<usize>> {
    match MECHANISMS.iter().position(|m| m.number() == number) {
        None if number == AUTO => Ok(None),
        None => Err(Error::new(libc::EINVAL, format!("mechanism: {number} is not a KVMFAULT_MECHANISM_*"))),
        found => Ok(found),
    }
}

/// The mechanism for some memory: the forced one, or the first that can.
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

/// Does userfaultfd report minor faults (page cache, not mapped) for such memory? Then the VMM's mapping is registered for them,
/// so that a host access to a page whose bytes are still being written waits until it is installed.
pub fn has_minor(features: u64, kind: Kind) -> bool {
    use crate::kernel::uffd::{FEATURE_MINOR_HUGETLBFS, FEATURE_MINOR_SHMEM};
    match kind {
        Kind::Shared => features & FEATURE_MINOR_SHMEM != 0,
        Kind::HugetlbShared => features & FEATURE_MINOR_HUGETLBFS != 0,
        Kind::Anon | Kind::HugetlbPrivate => false,
    }
}

/// What the VMM's mapping is registered for.
fn vmm_mode(features: u64, kind: Kind) -> Mode {
    Mode { minor: has_minor(features, kind), keeps_tables: false }
}

/// Memory that was released is to be memory again in which pages can be missing. It is not yet: what keeps KVM from the holes must be there first.
pub fn register_again(memory: &Memory, block: &Block) -> Result<()> {
    memory.uffd.register(block.hva, block.len, vmm_mode(memory.uffd.features(), block.kind))
}
