//! `memslot-flag`: KVM_RUN exits with the address where the flag forbids the slow path. The VMM's
//! mapping keeps userfaultfd for all others: host threads, KVM's own copy_to_user, vhost.

use super::{vmm_mode, BlockRequest, Host, Mechanism};
use crate::error::{fail, Result};
use crate::kernel::kvm::Region;
use crate::kernel::mem::Kind;
use crate::kernel::page::page_size;
use crate::kernel::uffd::Registration;
use crate::memory::block::{Block, Shape};
use crate::memory::slots::Slot;
use crate::memory::{map, Memory};
use crate::stats::Stats;

#[derive(Debug)]
pub struct MemslotFlag;

impl Mechanism for MemslotFlag {
    fn number(&self) -> i32 {
        super::MEMSLOT_FLAG
    }

    fn name(&self) -> &'static str {
        "memslot-flag"
    }

    fn check(&self, host: &Host, _kind: Kind, request: &BlockRequest) -> Result<()> {
        let Some(abi) = host.abi else {
            fail!(EOPNOTSUPP, "this kernel's KVM has none of the known fast-only memslot flags (see kvmfault_explain)");
        };
        if abi.no_readonly && request.readonly {
            fail!(EOPNOTSUPP, "the flag of {} does not work together with KVM_MEM_READONLY", abi.name);
        }
        if abi.bitmap && request.offset % (8 * page_size()) != 0 {
            let unit = 8 * page_size() / 1024;
            fail!(EOPNOTSUPP, "with {} a slot must begin at a multiple of {unit} KiB in its block", abi.name);
        }
        Ok(())
    }

    fn new_block(&self, host: &Host, memory: &Memory, shape: Shape, request: &BlockRequest) -> Result<Block> {
        let vmm = shape.memory.clone();
        let registration = memory.try_register(&vmm, vmm_mode(host.features, shape.kind))?;
        let bitmap = host.abi.is_some_and(|abi| abi.bitmap);
        let block = Block::new(shape, None, bitmap, request.present)?;
        registration.into_iter().for_each(Registration::keep);
        Ok(block)
    }

    fn set_fast(&self, _memory: &Memory, _block: &Block, _on: bool) -> Result<()> {
        Ok(()) // the slot's flag is all
    }

    fn is_per_slot(&self) -> bool {
        true
    }

    fn arm(&self, host: &Host, slot: &Slot, region: &mut Region) {
        if let Some(abi) = host.abi {
            abi.arm(region, slot.block.bitmap_at(slot.offset));
        }
    }

    /// Populates the page for writing, as the slow path that the flag forbids would have done. The
    /// page may be PRESENT and not mapped, or mapped and not writable, and KVM's fast path asks for
    /// write access even where the guest reads (hva_to_pfn_fast in virt/kvm). The zero page is
    /// replaced by a page of its own.
    fn map_for_kvm(&self, memory: &Memory, block: &Block, page: u64, stats: &Stats) -> Result<()> {
        let (hva, len) = (block.hva_of(page), block.page);
        if matches!(block.kind, Kind::Shared | Kind::HugetlbShared) && !memory.external {
            // Where minor faults are registered, populating would wait for them.
            map::map_in_vmm(memory, block, page, stats)?;
        }
        match block.area(hva, len).advise(libc::MADV_POPULATE_WRITE, "madvise(MADV_POPULATE_WRITE)") {
            Err(e) if e.errno == libc::ENOMEM => fail!(EFAULT, "the memory at hva {hva:#x} is no longer mapped"),
            Err(e) if e.errno == libc::EINVAL => {
                fail!(
                    EFAULT,
                    "the memory at hva {hva:#x} is not writable (or the kernel has no MADV_POPULATE_WRITE: Linux 5.14)"
                )
            }
            other => other,
        }
    }
}
