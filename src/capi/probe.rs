//! Probe: what works here.

use super::boundary::{enter, not_in_callback};
use super::structs::Out;
use crate::error::{fail, Result};
use crate::kernel::arch::two_dimensional_paging;
use crate::kernel::kvm::SystemFd;
use crate::kernel::mem::Kind;
use crate::mechanism::{report::Report, MECHANISMS};
use std::ffi::{c_char, c_int};
use std::os::fd::RawFd;

/// What the mechanism is chosen by (`kvmfault_vm_options.mechanism`) and what `kvmfault_vm_mechanism` returns.
/// AUTO takes, for each memslot, the first of the others that works for it, in this order.
pub const KVMFAULT_MECHANISM_AUTO: c_int = 0;

/// A KVM memslot flag makes KVM_RUN exit with the faulting address. Needs a kernel that carries one of the revisions of the flag.
pub const KVMFAULT_MECHANISM_MEMSLOT_FLAG: c_int = 1;

/// UFFDIO_POISON markers make KVM send SIGBUS to the vCPU thread. Any Linux from 6.6.
pub const KVMFAULT_MECHANISM_POISON_TRAP: c_int = 2;

/// Classic userfaultfd: reader threads of the library serve the faults. Any Linux from 4.11.
pub const KVMFAULT_MECHANISM_USERFAULTFD: c_int = 3;

/// `kvmfault_probe.mechanisms_*`: bit (1 << KVMFAULT_MECHANISM_x) is set where x works.
pub const KVMFAULT_PROBE_ABI_LEN: usize = 32;

/// Which mechanisms work here. Start from KVMFAULT_PROBE_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_probe {
    /// Set by KVMFAULT_PROBE_INIT.
    pub size: usize,
    /// Bit (1 << KVMFAULT_MECHANISM_x) is set where x works for private anonymous memory (for `poison-trap`:
    /// with KVMFAULT_MEMSLOT_VCPU_ONLY).
    pub mechanisms_anon: u32,
    /// The same for shared memory.
    pub mechanisms_shared: u32,
    /// The same for shared hugetlb memory.
    pub mechanisms_hugetlb: u32,
    /// Always 0.
    pub reserved: u32,
    /// UFFD_FEATURE_* bits that this process can have; 0 if it can't open a userfaultfd.
    pub uffd_features: u64,
    /// The ABI of the memslot flag that was proven in a scratch VM, or an empty string.
    pub abi: [c_char; KVMFAULT_PROBE_ABI_LEN],
    /// 1 if KVM_PRE_FAULT_MEMORY is there.
    pub pre_fault_memory: u32,
    /// 1 if KVM maps guest memory by two-dimensional paging (EPT, NPT) as far as can be told, 0 if it shadows page tables: then
    /// KVM reads the guest's page tables itself, and with `poison-trap` they must be present before the guest uses them.
    pub two_dimensional_paging: u32,
}

fn report(kvm_fd: RawFd) -> Result<Report> {
    not_in_callback("probing")?;
    let system = match kvm_fd {
        -1 => SystemFd::open()?,
        fd => SystemFd::duplicate(fd, "kvm_fd")?,
    };
    Ok(Report::new(&system))
}

/// Which mechanisms work here, for programs. `kvm_fd` is an open /dev/kvm, or -1 to open it. Asks the kernel by doing: it makes scratch
/// VMs and takes some milliseconds. Any thread; not from callbacks.
///
/// Returns 0; -EINVAL or -EBADF (the message names the argument), or the errno of opening /dev/kvm. A mechanism that doesn't work is no
/// error: its bit is not set, and `kvmfault_explain` says why.
///
/// # Safety
/// `probe` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_probe(kvm_fd: c_int, probe: *mut kvmfault_probe) -> c_int {
    enter("kvmfault_probe", || {
        let out = Out::new(probe, "probe")?;
        let report = report(kvm_fd)?;
        let works = |kind| {
            let bit = |n: usize| {
                if report.check(n, kind).is_ok() {
                    1 << MECHANISMS[n].number()
                } else {
                    0
                }
            };
            (0..MECHANISMS.len()).map(bit).fold(0, |set, bit| set | bit)
        };
        let mut abi = [0 as c_char; KVMFAULT_PROBE_ABI_LEN];
        for (to, from) in abi.iter_mut().zip(report.abi().unwrap_or("").bytes()) {
            *to = from as c_char;
        }
        let c = kvmfault_probe {
            size: 0,
            mechanisms_anon: works(Kind::Anon),
            mechanisms_shared: works(Kind::Shared),
            mechanisms_hugetlb: works(Kind::HugetlbShared),
            reserved: 0,
            uffd_features: report.features(),
            abi,
            pre_fault_memory: report.pre_fault().into(),
            two_dimensional_paging: two_dimensional_paging().into(),
        };
        out.write(&c);
        Ok(0)
    })
}

/// The same for people: every path that was tried for KVM and userfaultfd, why it failed, and what to do. Like snprintf(3): writes at most
/// `size` bytes with the terminating 0, and returns the length of the whole text without it (call with NULL and 0 to learn it). Any thread;
/// not from callbacks. Errors as `kvmfault_probe`; -EINVAL if `buf` is NULL and `size` isn't 0.
///
/// # Safety
/// `buf` has room for `size` bytes, or is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_explain(kvm_fd: c_int, buf: *mut c_char, size: usize) -> c_int {
    enter("kvmfault_explain", || {
        if buf.is_null() && size != 0 {
            fail!(EINVAL, "buf: is NULL");
        }
        let text = report(kvm_fd)?.explain();
        if size > 0 {
            let len = text.len().min(size - 1);
            // SAFETY: C says that `size` bytes are there, and len + 1 is at most that.
            unsafe {
                std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buf, len);
                *buf.add(len) = 0;
            }
        }
        Ok(text.len() as c_int)
    })
}
