//! A vCPU's registers, model-specific registers and CPUID.

use super::super::address::Gpa;
use super::super::kvm::{ior, iow, iowr, VcpuFd};
use crate::error::Result;
use kvm_bindings as kb;

const KVM_GET_REGS: u64 = ior(0x81, size_of::<kb::kvm_regs>());
const KVM_SET_REGS: u64 = iow(0x82, size_of::<kb::kvm_regs>());
const KVM_GET_SREGS: u64 = ior(0x83, size_of::<kb::kvm_sregs>());
const KVM_SET_SREGS: u64 = iow(0x84, size_of::<kb::kvm_sregs>());
const KVM_TRANSLATE: u64 = iowr(0x85, size_of::<kb::kvm_translation>());
const KVM_GET_MSRS: u64 = iowr(0x88, size_of::<kb::kvm_msrs>());
const KVM_SET_MSRS: u64 = iow(0x89, size_of::<kb::kvm_msrs>());
const KVM_GET_CPUID2: u64 = iowr(0x91, size_of::<kb::kvm_cpuid2>());
const KVM_GET_VCPU_EVENTS: u64 = ior(0x9f, size_of::<kb::kvm_vcpu_events>());
const KVM_SET_VCPU_EVENTS: u64 = iow(0xa0, size_of::<kb::kvm_vcpu_events>());
const KVM_GET_SREGS2: u64 = ior(0xcc, size_of::<kb::kvm_sregs2>());

impl VcpuFd {
    /// The vCPU's general registers.
    pub fn regs(&self) -> Result<kb::kvm_regs> {
        self.0.get(KVM_GET_REGS, "KVM_GET_REGS")
    }

    /// Sets the general registers.
    pub fn set_regs(&self, mut regs: kb::kvm_regs) -> Result<()> {
        self.0.set(KVM_SET_REGS, &mut regs, "KVM_SET_REGS")
    }

    /// The vCPU's segment and control registers.
    pub fn sregs(&self) -> Result<kb::kvm_sregs> {
        self.0.get(KVM_GET_SREGS, "KVM_GET_SREGS")
    }

    /// Sets the segment and control registers.
    pub fn set_sregs(&self, mut sregs: kb::kvm_sregs) -> Result<()> {
        self.0.set(KVM_SET_SREGS, &mut sregs, "KVM_SET_SREGS")
    }

    /// KVM's copies of the first page table's entries, in PAE mode; None in other modes, and before
    /// Linux 5.14.
    pub fn pdptrs(&self) -> Option<[u64; 4]> {
        let sregs: kb::kvm_sregs2 = self.0.get(KVM_GET_SREGS2, "KVM_GET_SREGS2").ok()?;
        (sregs.flags & u64::from(kb::KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0).then_some(sregs.pdptrs)
    }

    /// The vCPU's pending exceptions and interrupts.
    pub fn vcpu_events(&self) -> Result<kb::kvm_vcpu_events> {
        self.0.get(KVM_GET_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS")
    }

    /// Sets pending exceptions and interrupts.
    pub fn set_vcpu_events(&self, mut events: kb::kvm_vcpu_events) -> Result<()> {
        self.0.set(KVM_SET_VCPU_EVENTS, &mut events, "KVM_SET_VCPU_EVENTS")
    }

    /// One of the vCPU's model-specific registers; None if it doesn't have it.
    pub fn msr(&self, index: u32) -> Option<u64> {
        let mut one = OneMsr::new(index, 0);
        // KVM_GET_MSRS returns how many it has read.
        (self.0.exchange(KVM_GET_MSRS, &mut one, "KVM_GET_MSRS").ok()? == 1).then_some(one.1.data)
    }

    /// Sets one; false if the vCPU doesn't have it, or it can't have this value.
    pub fn set_msr(&self, index: u32, data: u64) -> Result<bool> {
        Ok(self.0.exchange(KVM_SET_MSRS, &mut OneMsr::new(index, data), "KVM_SET_MSRS")? == 1)
    }

    /// What KVM_SET_CPUID2 told the vCPU; nothing if it wasn't called.
    pub fn cpuid(&self) -> Result<Vec<kb::kvm_cpuid_entry2>> {
        const MOST: usize = 256; // KVM_MAX_CPUID_ENTRIES
        #[repr(C)]
        struct Many(kb::kvm_cpuid2, [kb::kvm_cpuid_entry2; MOST]);
        let head = kb::kvm_cpuid2 { nent: MOST as u32, ..Default::default() };
        let mut many = Many(head, [Default::default(); MOST]);
        self.0.exchange(KVM_GET_CPUID2, &mut many, "KVM_GET_CPUID2")?;
        Ok(many.1[..many.0.nent as usize].to_vec())
    }

    /// Guest virtual to guest physical address, by the vCPU's page tables; None if not mapped.
    pub fn translate(&self, linear: u64) -> Option<Gpa> {
        let mut arg = kb::kvm_translation { linear_address: linear, ..Default::default() };
        self.0.exchange(KVM_TRANSLATE, &mut arg, "KVM_TRANSLATE").ok()?;
        (arg.valid != 0).then_some(Gpa(arg.physical_address))
    }
}

/// What KVM_GET_MSRS and KVM_SET_MSRS take.
#[repr(C)]
struct OneMsr(kb::kvm_msrs, kb::kvm_msr_entry);

impl OneMsr {
    fn new(index: u32, data: u64) -> OneMsr {
        let head = kb::kvm_msrs { nmsrs: 1, ..Default::default() };
        OneMsr(head, kb::kvm_msr_entry { index, data, ..Default::default() })
    }
}
