//! Which guests can run with markers in their memory.

use super::super::kvm::VcpuFd;
use crate::error::{fail, Result};
use kvm_bindings::kvm_cpuid_entry2;

/// What two-dimensional paging is called here.
pub const PAGING_NAME: &str = "EPT, NPT";
/// What turns it on.
pub const PAGING_REMEDY: &str = "kvm_intel.ept=1 or kvm_amd.npt=1 where the hardware can";

/// Does the hardware walk the guest's page tables? What the module parameters of kvm_intel and
/// kvm_amd say; other KVMs (pvm) shadow.
pub fn two_dimensional_paging() -> bool {
    ["/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt"]
        .iter()
        .any(|path| std::fs::read_to_string(path).is_ok_and(|value| matches!(value.trim(), "Y" | "1")))
}

/// A word of CPUID (of EAX, EBX, ECX, EDX) that tells what a guest may use: some bits of it have
/// this value. See KVM_SET_CPUID2 in Documentation/virt/kvm/api.rst, and the Hypervisor Top Level
/// Functional Specification for "Hv#1".
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

/// May the guest of this vCPU run with markers in its memory? It may not be offered what makes KVM
/// access its memory, nor may KVM walk its page tables.
pub fn check_guest(vcpu: &VcpuFd) -> Result<()> {
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
