//! What works here.

use super::boundary::{enter, not_in_callback};
use super::structs::Out;
use super::types::*;
use crate::error::{fail, Result};
use crate::kernel::kvm::{Descriptor, Role};
use crate::kernel::mem::Kind;
use crate::mechanism::{kvm_itself::two_dimensional_paging, report::Report, MECHANISMS};
use std::ffi::{c_char, c_int};
use std::os::fd::RawFd;

fn report(kvm_fd: RawFd) -> Result<Report> {
    not_in_callback("probing")?;
    let system = match kvm_fd {
        -1 => Descriptor::open()?,
        fd => Descriptor::duplicate(fd, Role::System, "kvm_fd")?,
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
