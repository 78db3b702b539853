//! A guest for the unit tests, at EL1 with the MMU off: stores a byte into each of some pages, and
//! ends by a store of that byte to where no memory is. Then it goes on storing there, each time one
//! more.

use super::super::tests::Machine;
use super::super::Exit;
use crate::kernel::address::Gpa;
use crate::kernel::arch::{CORE_PC, CORE_X0};
use crate::kernel::kvm::{VcpuFd, VmFd};
use crate::kernel::page::page_size;
use kvm_bindings as kb;

/// What it stores.
pub const BYTE: u8 = 0x5a;
/// strb w1, [x0]; add x0, x0, x3; subs x4, x4, #1; b.ne the first; strb w1, [x2];
/// add w1, w1, #1; b the strb
pub const CODE: [u8; 28] = [
    0x01, 0x00, 0x00, 0x39, 0x00, 0x00, 0x03, 0x8b, 0x84, 0x04, 0x00, 0xf1, 0xa1, 0xff, 0xff, 0x54, 0x41, 0x00, 0x00,
    0x39, 0x21, 0x04, 0x00, 0x11, 0xfe, 0xff, 0xff, 0x17,
];
/// The exit with which it ends.
pub const END: u32 = kb::KVM_EXIT_MMIO;

/// Where no memory is.
const NOWHERE: u64 = 0x1000_0000;

/// Sets a new vCPU up to run it, on `pages` pages from `data` on. Both addresses are below 256 MiB.
pub fn start(vm: &VmFd, vcpu: &VcpuFd, code: Gpa, data: Gpa, pages: u64) {
    vcpu.init(vm).unwrap();
    let registers = [(0, data.0), (1, BYTE.into()), (2, NOWHERE), (3, page_size()), (4, pages)];
    for (n, value) in registers {
        vcpu.set_core_register(CORE_X0 + n, value).unwrap();
    }
    vcpu.set_core_register(CORE_PC, code.0).unwrap();
}

/// KVM completes a device's access only if kvm_run still says that there was one.
#[test]
fn a_device_sees_each_access_once() {
    let machine = needs!(Machine::new(None, 1));
    let vcpu = machine.attach(0).unwrap();
    let stored = [0; 3].map(|_| {
        assert_eq!(vcpu.run().unwrap(), Exit::Pass);
        assert_eq!(vcpu.run.exit_reason(), END);
        vcpu.run.words()[1] as u8 // kvm_run.mmio.data
    });
    assert_eq!(stored, [BYTE, BYTE + 1, BYTE + 2]);
}
