//! The probe's guest: two instructions in real mode, which run natively on hardware and in KVM's
//! emulator alike.

use super::super::address::Gpa;
use super::super::kvm::{VcpuFd, VmFd};
use crate::error::Result;
use kvm_bindings as kb;

/// Loads a byte from the first page of the data, and ends: mov al, [0]; hlt.
pub const PROBE_CODE: &[u8] = &[0xa0, 0x00, 0x00, 0xf4];

/// The exit with which it ends.
pub const PROBE_END: u32 = kb::KVM_EXIT_HLT;

/// Sets a new vCPU up to run it. Both addresses are below 1 MiB, and multiples of a page.
pub fn start_probe_guest(_vm: &VmFd, vcpu: &VcpuFd, code: Gpa, data: Gpa) -> Result<()> {
    let mut sregs = vcpu.sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (code.0, (code.0 >> 4) as u16);
    (sregs.ds.base, sregs.ds.selector) = (data.0, (data.0 >> 4) as u16);
    vcpu.set_sregs(sregs)?;
    vcpu.set_regs(kb::kvm_regs { rflags: 2, ..Default::default() })
}
