//! A VM of KVM's.

use super::super::address::{Gpa, Hva};
use super::super::host_memory::Area;
use super::descriptor::{Descriptor, Role};
use super::vcpu::VcpuFd;
use super::{KVM_CREATE_VCPU, KVM_ENABLE_CAP, KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2};
use crate::error::{fail, Result};
use kvm_bindings as kb;
use std::os::fd::{AsRawFd, RawFd};

/// What KVM_CREATE_VM returned.
#[derive(Debug)]
pub struct VmFd(pub(in crate::kernel) Descriptor);

impl VmFd {
    /// A duplicate of the VMM's; an error that names it `name` if it is something else.
    pub fn duplicate(fd: RawFd, name: &str) -> Result<VmFd> {
        Descriptor::duplicate(fd, Role::Vm, name).map(VmFd)
    }

    /// A new vCPU of this VM.
    pub fn create_vcpu(&self, number: u64) -> Result<VcpuFd> {
        self.0.create(KVM_CREATE_VCPU, number, "KVM_CREATE_VCPU").map(VcpuFd)
    }

    /// KVM_CHECK_EXTENSION; 0 for what the kernel doesn't know.
    pub fn check_extension(&self, cap: u32) -> i32 {
        self.0.check_extension(cap)
    }

    /// KVM_ENABLE_CAP.
    pub fn enable_cap(&self, cap: u32, arg: u64) -> Result<()> {
        let mut enable = kb::kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = arg;
        self.0.set(KVM_ENABLE_CAP, &mut enable, "KVM_ENABLE_CAP")
    }

    /// Creates, moves or changes a memslot, which shows `memory`: the memory that `region` names.
    ///
    /// KVM keeps the address until the memslot is deleted, or the VM ends, and the guest writes
    /// there. Memory that was lent to the library stays for that time (`HostMemory::new`); a
    /// mapping of the library's is not dropped, or keeps its addresses (`Mapping::keep_addresses`).
    pub fn set_region(&self, region: &Region, memory: Area<'_>) -> Result<()> {
        if (memory.hva(), memory.len()) != (region.hva, region.len) {
            fail!(EFAULT, "the memory of slot {:#x} is not what it is said to show", region.slot);
        }
        self.tell(region)
    }

    /// Deletes a memslot.
    pub fn delete_region(&self, region: &Region) -> Result<()> {
        self.tell(&Region { len: 0, ..*region })
    }

    /// KVM_SET_USER_MEMORY_REGION or _REGION2. KVM only reads the bitmap.
    fn tell(&self, region: &Region) -> Result<()> {
        match region.version {
            1 => {
                let mut arg = kb::kvm_userspace_memory_region {
                    slot: region.slot,
                    flags: region.flags,
                    guest_phys_addr: region.gpa.0,
                    memory_size: region.len,
                    userspace_addr: region.hva.0,
                };
                self.0.set(KVM_SET_USER_MEMORY_REGION, &mut arg, "KVM_SET_USER_MEMORY_REGION")
            }
            _ => {
                let mut arg = kb::kvm_userspace_memory_region2 {
                    slot: region.slot,
                    flags: region.flags,
                    guest_phys_addr: region.gpa.0,
                    memory_size: region.len,
                    userspace_addr: region.hva.0,
                    ..Default::default()
                };
                arg.pad2[0] = region.bitmap.0; // `userfault_bitmap` of the KVM Userfault series
                self.0.set(KVM_SET_USER_MEMORY_REGION2, &mut arg, "KVM_SET_USER_MEMORY_REGION2")
            }
        }
    }
}

impl AsRawFd for VmFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0 .0.as_raw_fd()
    }
}

/// A memslot as KVM gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Region {
    /// 1 or 2: which ioctl.
    pub version: u32,
    /// Id and address space.
    pub slot: u32,
    /// KVM_MEM_* and the fast-only flag.
    pub flags: u32,
    /// First guest physical address.
    pub gpa: Gpa,
    /// Bytes; 0 deletes.
    pub len: u64,
    /// Where KVM finds the memory in this process.
    pub hva: Hva,
    /// `userfault_bitmap`, for the ABI that has it.
    pub bitmap: Hva,
}

#[cfg(test)]
mod tests {
    use super::super::super::mem::Mapping;
    use super::super::super::page::page_size;
    use super::super::SystemFd;
    use super::*;

    /// Whatever a region says: the guest gets the memory that is shown, or none.
    #[test]
    fn no_memory_but_what_is_given() {
        let vm = needs!(SystemFd::open()).create_vm().unwrap();
        let memory = Mapping::anonymous(2 * page_size()).unwrap();
        let region = |page, pages| Region {
            version: 1,
            hva: memory.address() + page * page_size(),
            len: pages * page_size(),
            ..Default::default()
        };
        let first = memory.whole().first(page_size());
        for foreign in [region(1, 1), region(0, 2)] {
            assert_eq!(vm.set_region(&foreign, first).unwrap_err().errno, libc::EFAULT);
        }
        vm.set_region(&region(0, 1), first).unwrap();
        vm.delete_region(&region(0, 1)).unwrap();
        assert_eq!(vm.delete_region(&region(0, 1)).unwrap_err().errno, libc::EINVAL, "it is deleted already");
    }
}
