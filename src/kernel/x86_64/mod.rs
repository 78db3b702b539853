//! What only x86-64 has, of the kernel's side. See [`super`] for the list of what an architecture
//! provides.

mod areas;
mod guest;
mod probe;
mod registers;
mod run;

pub use self::areas::{area_of_msr, areas, exit_on_area_msrs, is_area_msr, HAS_AREA_MSRS};
pub use self::guest::{check_guest, two_dimensional_paging, PAGING_NAME, PAGING_REMEDY};
pub use self::probe::{start_probe_guest, PROBE_CODE, PROBE_END};
pub use self::run::Mmio;
use super::abi::{Abi, EXIT_38};
use std::sync::atomic::AtomicU64;

/// The size of a page, of which x86-64 has one. A function, since others ask the system.
#[inline(always)]
pub fn page_size() -> u64 {
    4096
}

/// A whole page, whatever its size.
#[repr(C, align(4096))]
pub struct WholePage(pub [AtomicU64; 512]);

impl WholePage {
    /// A page of zeros.
    pub const fn zeroed() -> WholePage {
        WholePage([const { AtomicU64::new(0) }; 512])
    }
}

/// Where a process's addresses end, unless it asks for more.
pub const ADDRESSES: u64 = 1 << 47;

/// KVM_RUN looks at `exit_reason` to know what it has to complete. Here it has its own note of that
/// (`vcpu->arch.complete_userspace_io`).
pub const KVM_RUN_READS_EXIT_REASON: bool = false;

/// The address space of an exit, by the flags in `struct kvm_run`: 1 in system management mode.
pub fn space(flags: u16) -> u32 {
    u32::from(flags) & kvm_bindings::KVM_RUN_X86_SMM
}

/// The argument of KVM_CREATE_VM.
pub fn vm_type(_check_extension: impl Fn(u32) -> i32) -> u64 {
    0
}

/// The revision of the memslot flag that differs between architectures.
pub const ABI_V2: Abi = Abi {
    name: "v2",
    title: "KVM_CAP_MEMORY_FAULT_NOWAIT, RFC v2, March 2023",
    caps: &[227, 228],
    enable: Some((227, 1 << 0 | 1 << 1)), // reasons UNKNOWN and ABSENT_MAPPING
    slot_flag: 1 << 2,
    region: 1,
    bitmap: false,
    no_readonly: true,
    exit: EXIT_38,
    errno: libc::EPERM, // KVM_RUN returns -1
    flags_set: 1 << 1,  // the reason
    access_bits: [0; 3],
};
