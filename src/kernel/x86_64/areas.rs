//! What KVM itself accesses in a guest's memory, outside of guest instructions. Such an access
//! waits for a page as any system call does, but fails on a marker, without a word: so with
//! `poison-trap` those pages must be present before KVM accesses them.

use super::super::address::Gpa;
use super::super::kvm::{iow, VcpuFd, VmFd};
use crate::error::Result;
use kvm_bindings as kb;
use std::ops::Range;

/// An area that KVM writes for a vCPU: an MSR says where, in the bits down to its alignment, and
/// whether (`enable`). See Documentation/virt/kvm/x86/msr.rst. Not here: the older numbers (0x11
/// and 0x12) of the first two, which guests since Linux 2.6.35 don't use.
struct Area {
    msr: u32,
    align: u64,
    len: u64,
    enable: u64,
}

const AREAS: [Area; 5] = [
    // MSR_KVM_WALL_CLOCK_NEW: KVM writes the area when the guest writes the MSR.
    Area { msr: 0x4b56_4d00, align: 1, len: 12, enable: 0 },
    Area { msr: 0x4b56_4d01, align: 4, len: 32, enable: 1 }, // MSR_KVM_SYSTEM_TIME_NEW
    Area { msr: 0x4b56_4d02, align: 64, len: 64, enable: 1 }, // MSR_KVM_ASYNC_PF_EN
    Area { msr: 0x4b56_4d03, align: 64, len: 64, enable: 1 }, // MSR_KVM_STEAL_TIME
    Area { msr: 0x4b56_4d04, align: 4, len: 4, enable: 1 },  // MSR_KVM_PV_EOI_EN
];

/// The MSRs of those areas.
const MSRS: Range<u32> = AREAS[0].msr..AREAS[0].msr + AREAS.len() as u32;

/// Does this MSR register an area?
pub fn is_area_msr(msr: u32) -> bool {
    MSRS.contains(&msr)
}

/// The area that this value of an MSR registers; None if it registers none.
pub fn area_of_msr(msr: u32, value: u64) -> Option<Range<Gpa>> {
    let area = AREAS.iter().find(|area| area.msr == msr)?;
    let start = Gpa(value & !(area.align - 1));
    (value != 0 && value & area.enable == area.enable).then_some(start..start.checked_add(area.len)?)
}

/// System management mode: where KVM saves the registers, from the vCPU's SMBASE on (IA32_SMBASE),
/// in address space 1. If it can't, it declares the VM dead (enter_smm in arch/x86/kvm/smm.c).
const SMBASE: u32 = 0x9e;
const SAVED: Range<u64> = 0xfe00..0x1_0000;
/// SMBASE after a reset.
const FIRST_SMBASE: u64 = 0x3_0000;

/// The areas of this vCPU, as its MSRs say now: address space, and range of guest physical
/// addresses.
pub fn areas(vcpu: &VcpuFd) -> impl Iterator<Item = (u32, Range<Gpa>)> + '_ {
    let shared = MSRS.filter_map(|msr| Some((0, area_of_msr(msr, vcpu.msr(msr)?)?)));
    // A guest that is reset has the first SMBASE again.
    let saved = vcpu.msr(SMBASE).into_iter().flat_map(|smbase| [smbase, FIRST_SMBASE]);
    let saved = saved.map(Gpa);
    shared.chain(saved.filter_map(|smbase| Some((1, smbase.checked_add(SAVED.start)?..smbase.checked_add(SAVED.end)?))))
}

/// Can a guest's registration of an area be made an exit? See `exit_on_area_msrs`.
pub const HAS_AREA_MSRS: bool = true;

const KVM_X86_SET_MSR_FILTER: u64 = iow(0xc6, size_of::<kb::kvm_msr_filter>());

/// Makes guests' writes to the MSRs that register areas end KVM_RUN (KVM_EXIT_X86_WRMSR) instead of
/// being done, or undoes that. In place of the VM's MSR filter.
pub fn exit_on_area_msrs(vm: &VmFd, on: bool) -> Result<()> {
    let mut denied = [0u8; AREAS.len().div_ceil(8)];
    let mut filter = kb::kvm_msr_filter { flags: kb::KVM_MSR_FILTER_DEFAULT_ALLOW, ..Default::default() };
    if on {
        vm.enable_cap(kb::KVM_CAP_X86_USER_SPACE_MSR, kb::KVM_MSR_EXIT_REASON_FILTER.into())?;
        filter.ranges[0] = kb::kvm_msr_filter_range {
            flags: kb::KVM_MSR_FILTER_WRITE,
            nmsrs: MSRS.len() as u32,
            base: MSRS.start,
            bitmap: denied.as_mut_ptr(),
        };
    }
    vm.0.set(KVM_X86_SET_MSR_FILTER, &mut filter, "KVM_X86_SET_MSR_FILTER")
}
