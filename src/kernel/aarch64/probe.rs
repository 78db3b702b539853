//! The probe's guest: two instructions at EL1 with the MMU off.

use super::super::address::Gpa;
use super::super::kvm::{VcpuFd, VmFd};
use super::registers::{CORE_PC, CORE_X0};
use crate::error::Result;
use kvm_bindings as kb;

/// Loads a byte from the first page of the data, and ends by a store to where no memory is: ldrb
/// w1, [x0]; str w1, [x2].
pub const PROBE_CODE: &[u8] = &[0x01, 0x00, 0x40, 0x39, 0x41, 0x00, 0x00, 0xb9];

/// The exit with which it ends.
pub const PROBE_END: u32 = kb::KVM_EXIT_MMIO;

/// Where no memory is: above all that the probe has, and below 32 bits.
const NOWHERE: u64 = 0x1000_0000;

/// Sets a new vCPU up to run it. Both addresses are below 1 MiB, and multiples of a page.
pub fn start_probe_guest(vm: &VmFd, vcpu: &VcpuFd, code: Gpa, data: Gpa) -> Result<()> {
    vcpu.init(vm)?;
    vcpu.set_core_register(CORE_PC, code.0)?;
    vcpu.set_core_register(CORE_X0, data.0)?;
    vcpu.set_core_register(CORE_X0 + 2, NOWHERE)
}
