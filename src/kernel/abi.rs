//! The revisions of KVM's fast-only memslot flag, as data.
//!
//! The feature was posted many times from 2023 on and never merged; vendors and forks carry one
//! revision or another. The capability numbers collide with unrelated ones of mainline (236 is
//! KVM_CAP_PRE_FAULT_MEMORY there), so a row is used only after a scratch VM behaved as it says
//! (see [`super::probe`]). Only rows that were proven on a kernel are listed.

use super::address::{Gpa, Hva};
use super::arch;
use super::kvm::{Region, Run};

/// Access bits as in the C API.
pub type Access = u32;

/// The kernel doesn't say what the access is.
pub const ACCESS_UNKNOWN: Access = 0;
/// A read.
pub const ACCESS_READ: Access = 1 << 0;
/// A write.
pub const ACCESS_WRITE: Access = 1 << 1;
/// The fetch of an instruction.
#[allow(dead_code)] // used where KVM has an instruction emulator
pub const ACCESS_EXEC: Access = 1 << 2;

/// One revision of the flag.
#[derive(Debug)]
pub struct Abi {
    /// The name, for options and reports.
    pub name: &'static str,
    /// What it was called on the mailing list, and when.
    pub title: &'static str,
    /// Capability numbers that the kernel reports.
    pub caps: &'static [u32],
    /// What must be enabled on the VM: capability and its first argument.
    pub enable: Option<(u32, u64)>,
    /// The bit in the memslot's flags.
    pub slot_flag: u32,
    /// Which ioctl takes it: 1 KVM_SET_USER_MEMORY_REGION, 2 _REGION2.
    pub region: u32,
    /// The slot carries a bitmap: bit set = exit.
    pub bitmap: bool,
    /// The flag is no good for KVM_MEM_READONLY: v7 refuses it; v2 to v4 accept it, and then exit
    /// for ever, because the fast path looks at writable mappings only.
    pub no_readonly: bool,
    /// `kvm_run.exit_reason`.
    pub exit: u32,
    /// The errno of KVM_RUN; 0 if it succeeds.
    pub errno: i32,
    /// Bits of the exit's first word that must all be set.
    pub flags_set: u64,
    /// Bits of the exit's first word for read, write and execute; 0 where the revision has none.
    pub access_bits: [u64; 3],
}

/// KVM_EXIT_MEMORY_FAULT before mainline took 38 for something else.
pub const EXIT_38: u32 = 38;
/// KVM_EXIT_MEMORY_FAULT of mainline.
const EXIT_39: u32 = kvm_bindings::KVM_EXIT_MEMORY_FAULT;

/// All revisions, oldest first.
pub static ABIS: &[Abi] = &[
    arch::ABI_V2,
    Abi {
        name: "v3",
        title: "KVM_CAP_ABSENT_MAPPING_FAULT, v3, April 2023",
        caps: &[227, 228],
        enable: Some((227, 1)),
        slot_flag: 1 << 2,
        region: 1,
        bitmap: false,
        no_readonly: true,
        exit: EXIT_38,
        errno: libc::EFAULT,
        flags_set: 0,
        access_bits: [0; 3],
    },
    Abi {
        name: "v4",
        title: "KVM_CAP_NOWAIT_ON_FAULT, v4, June 2023",
        caps: &[228, 229],
        enable: None,
        slot_flag: 1 << 2,
        region: 1,
        bitmap: false,
        no_readonly: true,
        exit: EXIT_38,
        errno: libc::EFAULT,
        flags_set: 0,
        access_bits: [0, 1 << 0, 1 << 1],
    },
    Abi {
        name: "v7",
        title: "KVM_CAP_EXIT_ON_MISSING, v6 and v7, November 2023 and February 2024",
        caps: &[232, 236],
        enable: None,
        slot_flag: 1 << 3,
        region: 1,
        bitmap: false,
        no_readonly: true,
        exit: EXIT_39,
        errno: libc::EFAULT,
        flags_set: 0,
        access_bits: [1 << 0, 1 << 1, 1 << 2],
    },
    Abi {
        name: "userfault-v3",
        title: "KVM_CAP_USERFAULT (KVM Userfault), v3, June 2025",
        caps: &[232, 243],
        enable: None,
        slot_flag: 1 << 3,
        region: 2,
        bitmap: true,
        no_readonly: false,
        exit: EXIT_39,
        errno: libc::EFAULT,
        flags_set: 1 << 4,
        access_bits: [0; 3],
    },
];

/// A memory-fault exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultExit {
    /// Guest physical address.
    pub gpa: Gpa,
    /// What the kernel says of the access.
    pub access: Access,
}

impl Abi {
    /// Finds a row by its name.
    pub fn by_name(name: &str) -> Option<&'static Abi> {
        ABIS.iter().find(|abi| abi.name == name)
    }

    /// Does the kernel report the row's capabilities? Necessary, not sufficient.
    pub fn is_reported(&self, check: impl Fn(u32) -> i32) -> bool {
        self.caps.iter().all(|&cap| check(cap) > 0)
    }

    /// Reads the exit of a KVM_RUN that ended with `errno` (0 if it succeeded), if it is a memory
    /// fault as this row has it. The exit reason alone proves nothing: it may be left from an
    /// earlier exit.
    pub fn decode(&self, errno: i32, run: &Run) -> Option<FaultExit> {
        if errno != self.errno || run.exit_reason() != self.exit {
            return None;
        }
        let [flags, gpa, _len] = run.words();
        if flags & self.flags_set != self.flags_set {
            return None;
        }
        let bits = self.access_bits.iter().enumerate();
        let access = bits.filter(|(_, &bit)| flags & bit != 0).fold(0, |access, (n, _)| access | 1 << n);
        Some(FaultExit { gpa: Gpa(gpa), access })
    }

    /// Makes a region fast-only.
    pub fn arm(&self, region: &mut Region, bitmap: Hva) {
        region.flags |= self.slot_flag;
        region.version = region.version.max(self.region);
        region.bitmap = if self.bitmap { bitmap } else { Hva(0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for abi in ABIS {
            assert!(std::ptr::eq(Abi::by_name(abi.name).unwrap(), abi));
        }
        assert!(Abi::by_name("v1").is_none());
    }
}
