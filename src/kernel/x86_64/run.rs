//! The exits of `struct kvm_run` that only x86 has.

use super::super::kvm::Run;
use kvm_bindings as kb;

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
    /// The write of a KVM_EXIT_X86_WRMSR.
    pub fn msr_write(&self) -> MsrWrite {
        // SAFETY: the structure is mapped for as long as `self` lives; all bit patterns are valid for this member.
        let msr = unsafe { (&raw const (*self.as_ptr()).__bindgen_anon_1.msr).read_volatile() };
        MsrWrite { index: msr.index, data: msr.data, filtered: msr.reason == kb::KVM_MSR_EXIT_REASON_FILTER }
    }

    /// Says whether the write failed: then the guest gets #GP.
    pub fn set_msr_failed(&self, failed: bool) {
        // SAFETY: the structure is mapped for as long as `self` lives.
        unsafe { (&raw mut (*self.as_ptr()).__bindgen_anon_1.msr.error).write_volatile(failed as u8) };
    }
}
