//! What KVM itself accesses in a guest's memory, outside of guest instructions. Such an access
//! waits for a page as any system call does, but fails on a marker: so with `poison-trap` those
//! pages must be present before KVM accesses them.
//!
//! Of a vCPU that is its stolen time (arch/arm64/kvm/pvtime.c): KVM zeroes the structure once, and
//! adds to it as the vCPU is scheduled. What the interrupt controller accesses (the tables of an
//! ITS, and of LPIs) belongs to a device of the VMM's, which the library does not see: see
//! `kvmfault_vm_check_guest`.

use super::super::address::Gpa;
use super::super::kvm::{iow, VcpuFd, VmFd};
use crate::error::{fail, Result};
use kvm_bindings as kb;
use std::ops::Range;

const KVM_GET_DEVICE_ATTR: u64 = iow(0xe2, size_of::<kb::kvm_device_attr>());

/// The length of `struct pvclock_vcpu_stolen_time`, to which KVM aligns it
/// (Documentation/virt/kvm/arm/pvtime.rst).
const STOLEN_TIME: u64 = 64;

/// The areas of this vCPU: address space, and range of guest physical addresses.
pub fn areas(vcpu: &VcpuFd) -> impl Iterator<Item = (u32, Range<Gpa>)> + '_ {
    vcpu.stolen_time().into_iter().filter_map(|start| Some((0, start..start.checked_add(STOLEN_TIME)?)))
}

impl VcpuFd {
    /// Where the VMM told KVM to keep the vCPU's stolen time; None if nowhere, or before Linux
    /// 5.10.
    fn stolen_time(&self) -> Option<Gpa> {
        const NOWHERE: u64 = u64::MAX; // INVALID_GPA
        let mut gpa = NOWHERE;
        let mut attribute = kb::kvm_device_attr {
            group: kb::KVM_ARM_VCPU_PVTIME_CTRL,
            attr: kb::KVM_ARM_VCPU_PVTIME_IPA.into(),
            addr: &raw mut gpa as u64,
            ..Default::default()
        };
        self.0.set(KVM_GET_DEVICE_ATTR, &mut attribute, "KVM_GET_DEVICE_ATTR").ok()?;
        (gpa != NOWHERE).then_some(Gpa(gpa))
    }
}

/// Can a guest's registration of an area be made an exit? Here guests register none: the VMM says
/// where stolen time is.
pub const HAS_AREA_MSRS: bool = false;

/// There are no MSRs.
pub fn exit_on_area_msrs(_vm: &VmFd, _on: bool) -> Result<()> {
    fail!(EOPNOTSUPP, "arm64 guests register no memory for KVM while they run: there are no such MSRs")
}
