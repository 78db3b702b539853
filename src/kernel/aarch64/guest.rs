//! Which guests can run with markers in their memory.

use super::super::kvm::VcpuFd;
use crate::error::{fail, Error, Result};

/// What two-dimensional paging is called here.
pub const PAGING_NAME: &str = "stage 2";
/// What turns it on.
pub const PAGING_REMEDY: &str = "KVM on arm64 always has it";

/// Does the hardware walk the guest's page tables? KVM has no other way here.
pub fn two_dimensional_paging() -> bool {
    true
}

/// HCR_EL2, which only a vCPU with an EL2 of its own (KVM_ARM_VCPU_HAS_EL2) shows (el2_visibility
/// in arch/arm64/kvm/sys_regs.c).
const HCR_EL2: u64 = super::registers::system_register(3, 4, 1, 1, 0);

/// May the guest of this vCPU run with markers in its memory? It may not be a hypervisor itself:
/// KVM walks the page tables of its guests. An error before KVM_ARM_VCPU_INIT, too.
pub fn check_guest(vcpu: &VcpuFd) -> Result<()> {
    match vcpu.register(HCR_EL2) {
        Ok(_) => fail!(
            EOPNOTSUPP,
            "the guest is offered nested virtualization (KVM_ARM_VCPU_HAS_EL2): KVM accesses its memory itself, which fails on an absent page"
        ),
        Err(e) if e.errno == libc::ENOENT => Ok(()),
        Err(e) if e.errno == libc::ENOEXEC => {
            Err(Error::new(e.errno, "the vCPU is not initialized yet: call KVM_ARM_VCPU_INIT first"))
        }
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::kvm::SystemFd;
    use super::*;

    #[test]
    fn a_guest_without_el2_can_run_once_its_vcpu_is_initialized() {
        let vm = needs!(SystemFd::open()).create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!(check_guest(&vcpu).unwrap_err().errno, libc::ENOEXEC);
        vcpu.init(&vm).unwrap();
        check_guest(&vcpu).unwrap();
    }
}
