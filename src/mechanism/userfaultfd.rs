//! `userfaultfd`: KVM's slow path sleeps in the kernel until a reader thread has installed the
//! page.

use super::{vmm_mode, BlockRequest, Host, Mechanism};
use crate::error::{fail, Result};
use crate::kernel::mem::Kind;
use crate::kernel::uffd::Registration;
use crate::memory::block::{Block, Shape};
use crate::memory::{map, Memory};
use crate::stats::Stats;

#[derive(Debug)]
pub struct Userfaultfd;

impl Mechanism for Userfaultfd {
    fn number(&self) -> i32 {
        super::USERFAULTFD
    }

    fn name(&self) -> &'static str {
        "userfaultfd"
    }

    fn check(&self, _host: &Host, _kind: Kind, request: &BlockRequest) -> Result<()> {
        if request.external {
            fail!(EOPNOTSUPP, "the VMM has its own userfaultfd (KVMFAULT_VM_EXTERNAL_UFFD)");
        }
        Ok(()) // without a userfaultfd there is no VM at all
    }

    fn new_block(&self, host: &Host, memory: &Memory, shape: Shape, request: &BlockRequest) -> Result<Block> {
        let vmm = shape.memory.clone();
        let registration = memory.try_register(&vmm, vmm_mode(host.features, shape.kind))?;
        let block = Block::new(shape, None, false, request.present)?;
        registration.into_iter().for_each(Registration::keep);
        Ok(block)
    }

    fn set_fast(&self, _memory: &Memory, _block: &Block, _on: bool) -> Result<()> {
        Ok(()) // there is no fast path to turn
    }

    fn map_for_kvm(&self, memory: &Memory, block: &Block, page: u64, stats: &Stats) -> Result<()> {
        map::map_in_vmm(memory, block, page, stats)
    }
}
