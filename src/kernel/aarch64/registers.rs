//! How a vCPU is initialized, and its registers.

use super::super::kvm::{ior, iow, VcpuFd, VmFd};
use crate::error::Result;
use kvm_bindings as kb;

const KVM_GET_ONE_REG: u64 = iow(0xab, size_of::<kb::kvm_one_reg>());
const KVM_SET_ONE_REG: u64 = iow(0xac, size_of::<kb::kvm_one_reg>());
const KVM_ARM_VCPU_INIT: u64 = iow(0xae, size_of::<kb::kvm_vcpu_init>());
const KVM_ARM_PREFERRED_TARGET: u64 = ior(0xaf, size_of::<kb::kvm_vcpu_init>());

/// Of 64-bit registers.
const REGISTER: u64 = kb::KVM_REG_ARM64 | kb::KVM_REG_SIZE_U64;

/// For `set_core_register`: x0; x1 and the others follow.
pub const CORE_X0: u64 = 0;
/// For `set_core_register`: the program counter.
pub const CORE_PC: u64 = 32;

/// The id of a system register for KVM_GET_ONE_REG, by the fields of the instruction that reads it
/// (ARM64_SYS_REG in arch/arm64/include/uapi/asm/kvm.h).
pub(super) const fn system_register(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    REGISTER | kb::KVM_REG_ARM64_SYSREG as u64 | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

impl VcpuFd {
    /// Initializes a new vCPU, without optional features. Before that it can't run.
    pub fn init(&self, vm: &VmFd) -> Result<()> {
        let mut target: kb::kvm_vcpu_init = vm.0.get(KVM_ARM_PREFERRED_TARGET, "KVM_ARM_PREFERRED_TARGET")?;
        self.0.set(KVM_ARM_VCPU_INIT, &mut target, "KVM_ARM_VCPU_INIT")
    }

    /// Sets a general register, by its place in `struct user_pt_regs` in 64-bit words.
    pub fn set_core_register(&self, word: u64, value: u64) -> Result<()> {
        // KVM counts in 32-bit words.
        let id = REGISTER | u64::from(kb::KVM_REG_ARM_CORE) | (word * 2);
        let mut one = kb::kvm_one_reg { id, addr: &raw const value as u64 };
        self.0.set(KVM_SET_ONE_REG, &mut one, "KVM_SET_ONE_REG")
    }

    /// A register; ENOENT if the vCPU doesn't have it.
    pub(super) fn register(&self, id: u64) -> Result<u64> {
        let mut value = 0u64;
        let mut one = kb::kvm_one_reg { id, addr: &raw mut value as u64 };
        self.0.set(KVM_GET_ONE_REG, &mut one, "KVM_GET_ONE_REG")?;
        Ok(value)
    }
}
