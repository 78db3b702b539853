//! Probe: which mechanisms work on this machine, for programs and for people.
//!
//! A mechanism is the way in which a vCPU's fault reaches the library. docs/choosing-a-mechanism.md
//! compares them. A positive KVM_CHECK_EXTENSION proves nothing here, because numbers of the
//! memslot flag's capabilities collide with those of mainline Linux: the library tries each one in
//! a scratch VM.

use super::boundary::{enter, not_in_callback};
use super::structs::Out;
use crate::error::{fail, Result};
use crate::kernel::arch::two_dimensional_paging;
use crate::kernel::kvm::SystemFd;
use crate::kernel::mem::Kind;
use crate::mechanism::{report::Report, MECHANISMS};
use std::ffi::{c_char, c_int};
use std::os::fd::RawFd;

/// For `kvmfault_vm_options.mechanism` only: for each memslot, the first of the following
/// mechanisms that works for it, in the order of their numbers.
pub const KVMFAULT_MECHANISM_AUTO: c_int = 0;

/// A memslot flag makes KVM_RUN exit with the faulting address. Needs a kernel that carries one of
/// the revisions of that flag; mainline Linux, up to 7.3, has none (docs/kernel.md).
pub const KVMFAULT_MECHANISM_MEMSLOT_FLAG: c_int = 1;

/// UFFDIO_POISON markers (Documentation/admin-guide/mm/userfaultfd.rst) in a mapping for KVM alone:
/// at a marked page KVM sends SIGBUS with BUS_MCEERR_AR to the vCPU's thread
/// (kvm_send_hwpoison_signal), as for broken memory. Any Linux from 6.6.
pub const KVMFAULT_MECHANISM_POISON_TRAP: c_int = 2;

/// Classic userfaultfd (userfaultfd(2)): reader threads of the library serve the faults, while the
/// vCPU sleeps in the kernel. Any Linux from 4.11.
pub const KVMFAULT_MECHANISM_USERFAULTFD: c_int = 3;

/// Size in bytes of `kvmfault_probe.abi`, the terminating 0 included.
pub const KVMFAULT_PROBE_ABI_LEN: usize = 32;

/// What works on this machine. Start from KVMFAULT_PROBE_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_probe {
    /// Set by KVMFAULT_PROBE_INIT.
    pub size: usize,
    /// Private anonymous memory: bit (1 << KVMFAULT_MECHANISM_x) is set if mechanism x works for it
    /// (of `poison-trap`: with KVMFAULT_MEMSLOT_VCPU_ONLY).
    pub mechanisms_anon: u32,
    /// Shared memory (memfd, tmpfs): the same bits.
    pub mechanisms_shared: u32,
    /// Shared hugetlb memory: the same bits.
    pub mechanisms_hugetlb: u32,
    /// Always 0.
    pub reserved: u32,
    /// UFFD_FEATURE_* bits that a userfaultfd of this process has; 0 if it can't open one.
    pub uffd_features: u64,
    /// Revision of the memslot flag that was proven in a scratch VM ("v2", "v7" and so on); "" if
    /// none was.
    pub abi: [c_char; KVMFAULT_PROBE_ABI_LEN],
    /// 1 if KVM has KVM_PRE_FAULT_MEMORY, else 0.
    pub pre_fault_memory: u32,
    /// 1 if KVM maps guest memory by two-dimensional paging (EPT, NPT; always on arm64). 0 if KVM
    /// shadows the guest's page tables, or if /sys/module/kvm_intel or kvm_amd can't be read: KVM
    /// then reads these tables itself, and with `poison-trap` they must be present before the guest
    /// uses them.
    pub two_dimensional_paging: u32,
}

fn report(kvm_fd: RawFd) -> Result<Report> {
    let system = match kvm_fd {
        -1 => SystemFd::open()?,
        fd => SystemFd::duplicate(fd, "kvm_fd")?,
    };
    Ok(Report::new(&system))
}

/// Finds out which mechanisms work here, by trying them in scratch VMs. Takes some milliseconds.
/// `kvm_fd` is an open /dev/kvm, or -1 to open it.
///
/// Returns: 0. A mechanism that doesn't work is no error: its bit is not set, and
///   `kvmfault_explain` says why.
/// Errors:
///   -EINVAL: `kvm_fd` is not /dev/kvm; `probe` is NULL, or its size is wrong.
///   -EBADF: `kvm_fd` is closed.
///   The errno of opening /dev/kvm (`kvm_fd` is -1).
/// Threads: any.
/// Callbacks: refused with -EDEADLK.
///
/// # Safety
/// `probe` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_probe(kvm_fd: c_int, probe: *mut kvmfault_probe) -> c_int {
    enter("kvmfault_probe", || {
        let out = Out::new(probe, "probe")?;
        not_in_callback("kvmfault_probe")?;
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

/// Writes for people what `kvmfault_probe` found out: every way to KVM and to userfaultfd that was
/// tried, why it failed, and what to do about it. Like snprintf(3), it writes at most `size` bytes
/// with the terminating 0, and a call with NULL and 0 tells the length.
///
/// Returns: the length in bytes of the whole text, without the terminating 0.
/// Errors:
///   -EINVAL: `buf` is NULL and `size` is not 0; `kvm_fd` is not /dev/kvm.
///   -EBADF: `kvm_fd` is closed.
///   The errno of opening /dev/kvm (`kvm_fd` is -1).
/// Threads: any.
/// Callbacks: refused with -EDEADLK.
///
/// # Safety
/// `buf` has room for `size` bytes, or is NULL.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_explain(kvm_fd: c_int, buf: *mut c_char, size: usize) -> c_int {
    enter("kvmfault_explain", || {
        if buf.is_null() && size != 0 {
            fail!(EINVAL, "buf: is NULL");
        }
        not_in_callback("kvmfault_explain")?;
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
