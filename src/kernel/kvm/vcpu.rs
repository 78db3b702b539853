//! A vCPU of KVM's.

use super::super::address::Gpa;
use super::super::signal::SignalSet;
use super::descriptor::{Descriptor, Role};
use super::{KVM_GET_STATS_FD, KVM_PRE_FAULT_MEMORY, KVM_RUN, KVM_SET_SIGNAL_MASK};
use crate::error::{Error, Result};
use kvm_bindings as kb;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;

/// What KVM_CREATE_VCPU returned.
#[derive(Debug)]
pub struct VcpuFd(pub(in crate::kernel) Descriptor);

impl VcpuFd {
    /// A duplicate of the VMM's; an error that names it `name` if it is something else.
    pub fn duplicate(fd: RawFd, name: &str) -> Result<VcpuFd> {
        Descriptor::duplicate(fd, Role::Vcpu, name).map(VcpuFd)
    }

    /// The number that KVM_CREATE_VCPU gave this vCPU, if it can be known: from /proc, or since
    /// Linux 5.14 from KVM's statistics.
    pub fn number(&self) -> Option<i32> {
        let from_link = || self.0.link()?.rsplit(':').next()?.parse().ok();
        from_link().or_else(|| self.stats_id()?.rsplit('-').next()?.parse().ok())
    }

    /// Whose the statistics are: "kvm-PID/vcpu-NUMBER" (struct kvm_stats_header).
    fn stats_id(&self) -> Option<String> {
        // SAFETY: the ioctl returns a new descriptor, which is ours alone.
        let stats = unsafe { File::from_raw_fd(self.0.call(KVM_GET_STATS_FD, 0).ok()?) };
        let mut header = [0; size_of::<kb::kvm_stats_header>()];
        stats.read_exact_at(&mut header, 0).ok()?;
        let field = |n: usize| u32::from_ne_bytes(std::array::from_fn(|b| header[4 * n + b]));
        let mut id = vec![0; field(1).min(256) as usize]; // name_size
        stats.read_exact_at(&mut id, field(3).into()).ok()?; // id_offset
        Some(CStr::from_bytes_until_nul(&id).ok()?.to_str().ok()?.to_owned())
    }

    /// KVM_RUN; the errno if it fails.
    pub fn run(&self) -> std::result::Result<(), i32> {
        match self.0.call(KVM_RUN, 0) {
            Ok(_) => Ok(()),
            Err(e) => Err(e.raw_os_error().unwrap_or(libc::EIO)),
        }
    }

    /// Sets the signals that are blocked inside KVM_RUN (KVM_SET_SIGNAL_MASK).
    pub fn set_signal_mask(&self, mask: SignalSet) -> Result<()> {
        // struct kvm_signal_mask { u32 len; u8 sigset[8]; }
        let mut arg = [8u32, mask.0 as u32, (mask.0 >> 32) as u32];
        self.0.set(KVM_SET_SIGNAL_MASK, &mut arg, "KVM_SET_SIGNAL_MASK")
    }

    /// Undoes `set_signal_mask`: inside KVM_RUN the thread's own mask holds again.
    pub fn reset_signal_mask(&self) -> Result<()> {
        self.0.call(KVM_SET_SIGNAL_MASK, 0).map(drop).map_err(|e| Error::from_io("KVM_SET_SIGNAL_MASK", &e))
    }

    /// KVM_PRE_FAULT_MEMORY: maps guest memory in stage 2 without an exit.
    ///
    /// Never while a memslot of the VM may change: deleting one makes the vCPU's page-table root
    /// obsolete, a fault on an obsolete root is retried (is_page_fault_stale), only KVM_RUN
    /// replaces the root, and kvm_tdp_map_page retries until a signal. Seen to 7.3, in spite of
    /// "Check and free obsolete roots in kvm_mmu_reload()" (6.15), which helps only before the
    /// first try.
    pub fn pre_fault(&self, gpa: Gpa, len: u64) -> Result<()> {
        let mut arg = kb::kvm_pre_fault_memory { gpa: gpa.0, size: len, ..Default::default() };
        self.0.set(KVM_PRE_FAULT_MEMORY, &mut arg, "KVM_PRE_FAULT_MEMORY")
    }
}

impl AsRawFd for VcpuFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0 .0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::super::SystemFd;

    #[test]
    fn statistics_tell_the_number() {
        let kvm = needs!(SystemFd::open());
        let vcpu = kvm.create_vm().unwrap().create_vcpu(3).unwrap();
        let number = vcpu.stats_id().and_then(|id| Some(id.rsplit_once('-')?.1.to_owned()));
        assert_eq!(number.as_deref().unwrap_or("3"), "3"); // no statistics before Linux 5.14
    }
}
