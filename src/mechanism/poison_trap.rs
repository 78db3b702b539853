//! `poison-trap`: absent pages carry UFFDIO_POISON markers, on which get_user_pages fails at once
//! with EHWPOISON; KVM answers by sending SIGBUS to the vCPU's thread, with the address
//! (kvm_send_hwpoison_signal in virt/kvm and arch/x86/kvm/mmu).
//!
//! All other threads that touch a marker fail instead of waiting. Shared memory therefore has a
//! second mapping, the alias, which only KVM uses and which carries the markers; the VMM's own
//! mapping keeps userfaultfd. Private memory cannot be mapped twice: there the VMM must declare
//! that only vCPUs touch absent pages.

use super::{has_minor, vmm_mode, BlockRequest, Host, Mechanism};
use crate::error::{fail, Result};
use crate::kernel::alias;
use crate::kernel::arch;
use crate::kernel::kvm::{VcpuFd, VmFd};
use crate::kernel::mem::Kind;
use crate::kernel::uffd::{Mode, Registration, FEATURE_POISON};
use crate::memory::block::{Block, Shape};
use crate::memory::{map, markers, release, Memory};
use crate::stats::Stats;

#[derive(Debug)]
pub struct PoisonTrap;

impl Mechanism for PoisonTrap {
    fn number(&self) -> i32 {
        super::POISON_TRAP
    }

    fn name(&self) -> &'static str {
        "poison-trap"
    }

    fn check(&self, host: &Host, kind: Kind, request: &BlockRequest) -> Result<()> {
        if host.features & FEATURE_POISON == 0 {
            fail!(EOPNOTSUPP, "the kernel has no UFFDIO_POISON (Linux 6.6 and later have)");
        }
        match kind {
            Kind::Shared | Kind::HugetlbShared => Ok(()),
            Kind::Anon | Kind::HugetlbPrivate if request.vcpu_only && !request.external => Ok(()),
            Kind::Anon | Kind::HugetlbPrivate if request.external => {
                fail!(EOPNOTSUPP, "private memory can't be mapped twice: use shared memory (memfd)")
            }
            Kind::Anon | Kind::HugetlbPrivate => fail!(
                EOPNOTSUPP,
                "private memory can't be mapped twice: use shared memory (memfd), or KVMFAULT_MEMSLOT_VCPU_ONLY if only vCPUs touch absent pages"
            ),
        }
    }

    fn check_guest(&self, vcpu: &VcpuFd) -> Result<()> {
        arch::check_guest(vcpu)
    }

    fn filter_msrs(&self, vm: &VmFd) -> Result<bool> {
        arch::exit_on_area_msrs(vm, true)?;
        Ok(true)
    }

    fn new_block(&self, host: &Host, memory: &Memory, shape: Shape, request: &BlockRequest) -> Result<Block> {
        let (vmm, page, kind) = (shape.memory.clone(), shape.page, shape.kind);
        let alias = match kind {
            Kind::Shared | Kind::HugetlbShared => Some(alias::duplicate(&vmm, page, kind, request.file)?),
            Kind::Anon | Kind::HugetlbPrivate => None,
        };
        let registration = memory.try_register(&vmm, vmm_mode(host.features, kind))?;
        if let Some(alias) = &alias {
            // The alias belongs neither in forked children nor in core dumps.
            alias.whole().advise(libc::MADV_DONTFORK, "madvise(MADV_DONTFORK)")?;
            alias.whole().advise(libc::MADV_DONTDUMP, "madvise(MADV_DONTDUMP)")?;
            // Not for minor faults: a PRESENT page that is not mapped yet needs no help, and an
            // absent one has its marker.
            memory.uffd.register(alias.whole(), Mode { minor: false, keeps_tables: true })?;
            // With mlockall(MCL_FUTURE) the alias was populated when it was made.
            alias.unlock();
            alias.whole().advise(libc::MADV_DONTNEED, "madvise(MADV_DONTNEED)")?;
        }
        let block = Block::new(shape, alias, false, request.present)?;
        let block = if memory.external { block.with_deferral()? } else { block };
        if memory.external {
            block.phase.close(); // until the fast path is on
        }
        registration.into_iter().for_each(Registration::keep);
        Ok(block)
    }

    fn set_fast(&self, memory: &Memory, block: &Block, on: bool) -> Result<()> {
        if memory.external && !on {
            return release::release(memory, block);
        }
        // Without markers, absent pages whose bytes are in the page cache are minor faults: the
        // alias is registered for them before the markers are removed, until all are placed. With a
        // userfaultfd of the VMM no reader thread would serve them.
        let minor = !memory.external && has_minor(memory.uffd.features(), block.kind);
        match (on, block.is_marked()) {
            (true, false) => {
                register_alias(memory, block, minor)?;
                markers::mark(memory, block).inspect_err(|_| drop(markers::unmark(memory, block)))?;
                register_alias(memory, block, false)
            }
            (false, true) => {
                register_alias(memory, block, minor)?;
                markers::unmark(memory, block)
            }
            (true, true) => Ok(()),
            (false, false) => register_alias(memory, block, minor),
        }
    }

    fn map_for_kvm(&self, memory: &Memory, block: &Block, page: u64, stats: &Stats) -> Result<()> {
        map::map_for_kvm(memory, block, page, stats)
    }
}

fn register_alias(memory: &Memory, block: &Block, minor: bool) -> Result<()> {
    match &block.alias {
        Some(alias) => memory.uffd.register(alias.whole(), Mode { minor, keeps_tables: true }),
        None => Ok(()),
    }
}
