//! /dev/kvm.

use super::super::arch;
use super::descriptor::{Descriptor, Role};
use super::vm::VmFd;
use super::{KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE};
use crate::error::{Error, Result};
use std::os::fd::{AsRawFd, RawFd};

/// An open /dev/kvm.
#[derive(Debug)]
pub struct SystemFd(Descriptor);

impl SystemFd {
    /// Opens /dev/kvm.
    pub fn open() -> Result<SystemFd> {
        let file = std::fs::File::options().read(true).write(true).open("/dev/kvm");
        file.map(|f| SystemFd(Descriptor(f.into()))).map_err(|e| Error::from_io("/dev/kvm", &e))
    }

    /// A duplicate of the VMM's; an error that names it `name` if it is something else.
    pub fn duplicate(fd: RawFd, name: &str) -> Result<SystemFd> {
        Descriptor::duplicate(fd, Role::System, name).map(SystemFd)
    }

    /// A new VM.
    pub fn create_vm(&self) -> Result<VmFd> {
        let vm_type = arch::vm_type(|cap| self.check_extension(cap));
        self.0.create(KVM_CREATE_VM, vm_type, "KVM_CREATE_VM").map(VmFd)
    }

    /// KVM_CHECK_EXTENSION; 0 for what the kernel doesn't know. Proves nothing of the numbers in
    /// the ABI table.
    pub fn check_extension(&self, cap: u32) -> i32 {
        self.0.check_extension(cap)
    }

    /// How many bytes of a vCPU's descriptor can be mapped.
    pub(super) fn vcpu_mmap_size(&self) -> Result<u64> {
        let size = self.0.call(KVM_GET_VCPU_MMAP_SIZE, 0);
        size.map(|size| size as u64).map_err(|e| Error::from_io("KVM_GET_VCPU_MMAP_SIZE", &e))
    }
}

impl AsRawFd for SystemFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0 .0.as_raw_fd()
    }
}
