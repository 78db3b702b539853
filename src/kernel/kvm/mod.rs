//! KVM's ioctls and `struct kvm_run`. See Documentation/virt/kvm/api.rst.
//!
//! KVM has three kinds of descriptor, and each has a type here, so that none can be passed for
//! another. What only one architecture's vCPUs and VMs have (registers, MSRs, CPUID) is in that
//! architecture's room.

mod descriptor;
mod immediate_exit;
mod run;
mod system;
mod vcpu;
mod vm;

pub use self::immediate_exit::ImmediateExit;
pub use self::run::Run;
pub use self::system::SystemFd;
pub use self::vcpu::VcpuFd;
pub use self::vm::{Region, VmFd};

const KVMIO: u64 = 0xAE;

/// The number of an ioctl that takes a number, or nothing.
pub(in crate::kernel) const fn io(nr: u64) -> u64 {
    KVMIO << 8 | nr
}

/// The number of an ioctl that reads a structure of this size.
pub(in crate::kernel) const fn iow(nr: u64, size: usize) -> u64 {
    1 << 30 | (size as u64) << 16 | KVMIO << 8 | nr
}

/// The number of an ioctl that writes one.
pub(in crate::kernel) const fn ior(nr: u64, size: usize) -> u64 {
    2 << 30 | (size as u64) << 16 | KVMIO << 8 | nr
}

/// The number of an ioctl that does both.
pub(in crate::kernel) const fn iowr(nr: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | KVMIO << 8 | nr
}

const KVM_GET_API_VERSION: u64 = io(0x00);
const KVM_CREATE_VM: u64 = io(0x01);
const KVM_CHECK_EXTENSION: u64 = io(0x03);
const KVM_GET_VCPU_MMAP_SIZE: u64 = io(0x04);
const KVM_CREATE_VCPU: u64 = io(0x41);
const KVM_SET_USER_MEMORY_REGION: u64 = iow(0x46, size_of::<kvm_bindings::kvm_userspace_memory_region>());
const KVM_SET_USER_MEMORY_REGION2: u64 = iow(0x49, size_of::<kvm_bindings::kvm_userspace_memory_region2>());
const KVM_RUN: u64 = io(0x80);
const KVM_SET_SIGNAL_MASK: u64 = iow(0x8b, 4);
const KVM_ENABLE_CAP: u64 = iow(0xa3, size_of::<kvm_bindings::kvm_enable_cap>());
const KVM_GET_STATS_FD: u64 = io(0xce);
const KVM_PRE_FAULT_MEMORY: u64 = iowr(0xd5, size_of::<kvm_bindings::kvm_pre_fault_memory>());

#[cfg(test)]
mod tests {
    use super::super::file::tests::shared;
    use super::super::page::page_size;
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    #[test]
    fn descriptors_are_checked() {
        let kvm = needs!(SystemFd::open());
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(3).unwrap();
        let (kvm, vm, vcpu) = (kvm.as_raw_fd(), vm.as_raw_fd(), vcpu.as_raw_fd());
        let system = |fd| SystemFd::duplicate(fd, "x").map(drop).map_err(|e| e.errno);
        let a_vm = |fd| VmFd::duplicate(fd, "x").map(drop).map_err(|e| e.errno);
        let a_vcpu = |fd| VcpuFd::duplicate(fd, "x").map(drop).map_err(|e| e.errno);
        assert_eq!((system(kvm), a_vm(vm), a_vcpu(vcpu)), (Ok(()), Ok(()), Ok(())));
        assert_eq!(VcpuFd::duplicate(vcpu, "fd").unwrap().number(), Some(3));
        let (file, null) = (shared(page_size()), File::open("/dev/null").unwrap());
        let (file, null) = (file.as_raw_fd(), null.as_raw_fd());
        let bad = Err(libc::EINVAL);
        assert_eq!((system(vm), system(vcpu), system(null)), (bad, bad, bad));
        assert_eq!((a_vm(kvm), a_vm(vcpu), a_vm(null), a_vm(0)), (bad, bad, bad, bad));
        assert_eq!((a_vcpu(vm), a_vcpu(kvm), a_vcpu(file), a_vcpu(null)), (bad, bad, bad, bad));
        assert_eq!(a_vm(-1), Err(libc::EBADF));
    }
}
