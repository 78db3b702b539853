//! What only arm64 has, of the kernel's side. See [`super`] for the list of what an architecture
//! provides.

mod areas;
mod guest;
mod probe;
mod registers;

pub use self::areas::{areas, exit_on_area_msrs, HAS_AREA_MSRS};
pub use self::guest::{check_guest, two_dimensional_paging, PAGING_NAME, PAGING_REMEDY};
pub use self::probe::{start_probe_guest, PROBE_CODE, PROBE_END};
#[cfg(test)]
pub use self::registers::{CORE_PC, CORE_X0};
use super::abi::{Abi, EXIT_38};
use kvm_bindings as kb;
use once_cell::sync::Lazy;
use std::sync::atomic::AtomicU64;

/// The largest page that an arm64 kernel can be built for (CONFIG_ARM64_64K_PAGES).
const LARGEST_PAGE: usize = 64 << 10;

/// The size of a page: 4, 16 or 64 KiB, as the kernel was built. Asked once.
#[inline]
pub fn page_size() -> u64 {
    static SIZE: Lazy<u64> = Lazy::new(|| {
        // SAFETY: sysconf takes a number.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        assert!(
            [4 << 10, 16 << 10, LARGEST_PAGE as i64].contains(&size),
            "the system's page size is {size}; arm64 has pages of 4, 16 and 64 KiB"
        );
        size as u64
    });
    *SIZE
}

/// Room for a whole page of any size, aligned to it.
#[repr(C, align(65536))]
pub struct WholePage(pub [AtomicU64; LARGEST_PAGE / 8]);

impl WholePage {
    /// A page of zeros.
    pub const fn zeroed() -> WholePage {
        WholePage([const { AtomicU64::new(0) }; LARGEST_PAGE / 8])
    }
}

/// Where a process's addresses end, unless it asks for more: also where the kernel has 52-bit
/// addresses, it gives those from here on only to an mmap(2) that hints at them
/// (Documentation/arch/arm64/memory.rst).
pub const ADDRESSES: u64 = 1 << 48;

/// KVM_RUN completes a device's access, which gives the guest its result and moves it on, only if
/// `exit_reason` still says KVM_EXIT_MMIO (kvm_arch_vcpu_ioctl_run in arch/arm64/kvm/arm.c).
/// Otherwise the guest repeats the access.
pub const KVM_RUN_READS_EXIT_REASON: bool = true;

/// The address space of an exit: there is one. (The flags in `struct kvm_run` are about debugging.)
pub fn space(_flags: u16) -> u32 {
    0
}

/// The argument of KVM_CREATE_VM: how many bits guest physical addresses have. 0 stands for 40,
/// which KVM refuses where the hardware has fewer.
pub fn vm_type(check_extension: impl Fn(u32) -> i32) -> u64 {
    match check_extension(kb::KVM_CAP_ARM_VM_IPA_SIZE) {
        bits @ 32..40 => bits as u64,
        _ => 0,
    }
}

/// The revision of the memslot flag that differs between architectures. Here it has one capability,
/// KVM_RUN succeeds, and the exit has no flags.
pub const ABI_V2: Abi = Abi {
    name: "v2",
    title: "KVM_CAP_MEMORY_FAULT_NOWAIT, RFC v2, March 2023",
    caps: &[228],
    enable: None,
    slot_flag: 1 << 2,
    region: 1,
    bitmap: false,
    no_readonly: true,
    exit: EXIT_38,
    errno: 0,
    flags_set: 0,
    access_bits: [0; 3],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_has_as_many_address_bits_as_the_hardware() {
        // 0: KVM does not tell (before Linux 4.20), and has 40.
        let types = [0, 32, 36, 39, 40, 48, 52].map(|bits| vm_type(|_| bits));
        assert_eq!(types, [0, 32, 36, 39, 0, 0, 0]);
    }
}
