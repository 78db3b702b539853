//! What KVM itself accesses in a guest's memory, outside of guest instructions. Such accesses wait for a page as any system call does, but
//! fail on a marker, and quietly: so with `poison-trap` those pages must be there before the vCPU runs, or the guest is none for it.

use crate::error::{fail, Result};
use crate::kernel::kvm::Descriptor;
use kvm_bindings::kvm_cpuid_entry2;
use std::ops::Range;

/// An area that KVM writes for a vCPU: an MSR says where, in the bits down to its alignment, and whether (`enable`). See
/// Documentation/virt/kvm/x86/msr.rst. Not here: the older numbers (0x11 and 0x12) of the first two, which guests since Linux 2.6.35 don't use.
struct Area {
    msr: u32,
    align: u64,
    len: u64,
    enable: u64,
}

const AREAS: [Area; 5] = [
    Area { msr: 0x4b56_4d00, align: 1, len: 12, enable: 0 }, // MSR_KVM_WALL_CLOCK_NEW: written when the MSR is
    Area { msr: 0x4b56_4d01, align: 4, len: 32, enable: 1 }, // MSR_KVM_SYSTEM_TIME_NEW
    Area { msr: 0x4b56_4d02, align: 64, len: 64, enable: 1 }, // MSR_KVM_ASYNC_PF_EN
    Area { msr: 0x4b56_4d03, align: 64, len: 64, enable: 1 }, // MSR_KVM_STEAL_TIME
    Area { msr: 0x4b56_4d04, align: 4, len: 4, enable: 1 },  // MSR_KVM_PV_EOI_EN
];

/// The MSRs of those: what `named` knows.
pub const NAMING: Range<u32> = AREAS[0].msr..AREAS[0].msr + AREAS.len() as u32;

/// The area that a value of an MSR names, if it does.
pub fn named(msr: u32, value: u64) -> Option<Range<u64>> {
    let area = AREAS.iter().find(|area| area.msr == msr)?;
    let start = value & !(area.align - 1);
    (value != 0 && value & area.enable == area.enable).then_some(start..start.checked_add(area.len)?)
}

/// System management mode: where KVM saves the registers, from the vCPU's SMBASE on (IA32_SMBASE), in address space 1. If it can't, it declares the
/// VM dead (enter_smm in arch/x86/kvm/smm.c).
const SMBASE: u32 = 0x9e;
const SAVED: Range<u64> = 0xfe00..0x1_0000;
/// SMBASE after a reset.
const FIRST_SMBASE: u64 = 0x3_0000;

/// The areas of this vCPU, as its MSRs say now: address space, and where in guest physical memory.
pub fn areas(vcpu: &Descriptor) -> impl Iterator<Item = (u32, Range<u64>)> + '_ {
    let shared = NAMING.filter_map(|msr| Some((0, named(msr, vcpu.msr(msr)?)?)));
    // A guest that is reset finds the first one again.
    let saved = vcpu.msr(SMBASE).into_iter().flat_map(|smbase| [smbase, FIRST_SMBASE]);
    shared.chain(saved.filter_map(|smbase| Some((1, smbase.checked_add(SAVED.start)?..smbase.checked_add(SAVED.end)?))))
}

/// Does the hardware walk the guest's page tables? What the module parameters of kvm_intel and kvm_amd say; other KVMs (pvm) shadow.
pub fn two_dimensional_paging() -> bool {
    ["/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt"]
        .iter()
        .any(|path| std::fs::read_to_string(path).is_ok_and(|value| matches!(value.trim(), "Y" | "1")))
}

/// A word of CPUID (of EAX, EBX, ECX, EDX) that tells what a guest may use: some bits of it have this value. See KVM_SET_CPUID2 in
/// Documentation/virt/kvm/api.rst, and the Hypervisor Top Level Functional Specification for "Hv#1".
struct Offer {
    leaf: u32,
    word: usize,
    mask: u32,
    value: u32,
    what: &'static str,
}

const FORBIDDEN: [Offer; 4] = [
    Offer { leaf: 1, word: 2, mask: 1 << 5, value: 1 << 5, what: "nested virtualization (VMX)" },
    Offer { leaf: 0x8000_0001, word: 2, mask: 1 << 2, value: 1 << 2, what: "nested virtualization (SVM)" },
    Offer { leaf: 0x4000_0001, word: 0, mask: !0, value: u32::from_le_bytes(*b"Hv#1"), what: "Hyper-V enlightenments" },
    Offer { leaf: 0x4000_0000, word: 1, mask: !0, value: u32::from_le_bytes(*b"XenV"), what: "Xen enlightenments" },
];

/// May the guest of this vCPU run with markers in its memory? It may not be offered what makes KVM access it, nor may KVM walk its page tables.
pub fn check(vcpu: &Descriptor) -> Result<()> {
    let leaves = vcpu.cpuid()?;
    let words = |leaf: &kvm_cpuid_entry2| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx];
    for Offer { leaf, word, mask, value, what } in FORBIDDEN {
        if leaves.iter().any(|l| l.function == leaf && words(l)[word] & mask == value) {
            fail!(
                EOPNOTSUPP,
                "the guest is offered {what}: KVM accesses its memory itself, which fails quietly on an absent page"
            );
        }
    }
    if !two_dimensional_paging() {
        fail!(
            EOPNOTSUPP,
            "KVM reads the guest's page tables itself (no EPT or NPT), which fails quietly on an absent page"
        );
    }
    Ok(())
}
