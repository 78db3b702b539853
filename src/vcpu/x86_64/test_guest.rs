//! A guest for the unit tests, in real mode: stores a byte into each of some pages, and halts.

use crate::kernel::address::Gpa;
use crate::kernel::kvm::{VcpuFd, VmFd};
use kvm_bindings as kb;

/// What it stores.
pub const BYTE: u8 = 0x5a;
/// mov byte [bx], 0x5a; add bx, 4096; dec cx; jnz the first; hlt
pub const CODE: [u8; 11] = [0xc6, 0x07, BYTE, 0x81, 0xc3, 0x00, 0x10, 0x49, 0x75, 0xf6, 0xf4];
/// The exit with which it ends.
pub const END: u32 = kb::KVM_EXIT_HLT;

/// Sets a new vCPU up to run it, on `pages` pages from `data` on. Both addresses are below 1 MiB.
pub fn start(_vm: &VmFd, vcpu: &VcpuFd, code: Gpa, data: Gpa, pages: u64) {
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (code.0, (code.0 >> 4) as u16);
    (sregs.ds.base, sregs.ds.selector) = (data.0, (data.0 >> 4) as u16);
    vcpu.set_sregs(sregs).unwrap();
    vcpu.set_regs(kb::kvm_regs { rflags: 2, rcx: pages, ..Default::default() }).unwrap();
}
