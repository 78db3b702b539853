//! The exits of `struct kvm_run` that are completed only on x86.

use super::super::address::Gpa;
use super::super::kvm::Run;
use kvm_bindings as kb;

/// An access that KVM asks userspace to complete (KVM_EXIT_MMIO).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mmio {
    /// Guest physical address.
    pub gpa: Gpa,
    /// What is written, or room for what is read.
    pub data: [u8; 8],
    /// 1 to 8 bytes.
    pub len: usize,
    /// Is it a write?
    pub write: bool,
}

/// A guest's write to an MSR that userspace is asked to do (KVM_EXIT_X86_WRMSR).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsrWrite {
    /// The MSR.
    pub index: u32,
    /// What is written.
    pub data: u64,
    /// The VM's filter denied it to KVM.
    pub filtered: bool,
}

impl Run {
    /// The access of a KVM_EXIT_MMIO.
    pub fn mmio(&self) -> Mmio {
        // SAFETY: the structure is mapped for as long as `self` lives; all bit patterns are valid
        // for this member.
        let mmio = unsafe { (&raw const (*self.as_ptr()).__bindgen_anon_1.mmio).read_volatile() };
        Mmio { gpa: Gpa(mmio.phys_addr), data: mmio.data, len: (mmio.len as usize).min(8), write: mmio.is_write != 0 }
    }

    /// The bytes that the guest's read of a KVM_EXIT_MMIO gets.
    pub fn set_mmio_data(&self, data: [u8; 8]) {
        // SAFETY: the structure is mapped for as long as `self` lives.
        unsafe { (&raw mut (*self.as_ptr()).__bindgen_anon_1.mmio.data).write_volatile(data) };
    }

    /// The write of a KVM_EXIT_X86_WRMSR.
    pub fn msr_write(&self) -> MsrWrite {
        // SAFETY: the structure is mapped for as long as `self` lives; all bit patterns are valid
        // for this member.
        let msr = unsafe { (&raw const (*self.as_ptr()).__bindgen_anon_1.msr).read_volatile() };
        MsrWrite { index: msr.index, data: msr.data, filtered: msr.reason == kb::KVM_MSR_EXIT_REASON_FILTER }
    }

    /// Says whether the write failed: then the guest gets #GP.
    pub fn set_msr_failed(&self, failed: bool) {
        // SAFETY: the structure is mapped for as long as `self` lives.
        unsafe { (&raw mut (*self.as_ptr()).__bindgen_anon_1.msr.error).write_volatile(failed as u8) };
    }
}
