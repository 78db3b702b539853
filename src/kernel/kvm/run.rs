//! `struct kvm_run`, by which KVM says why KVM_RUN returned.

use super::super::arch;
use super::super::mem::Mapping;
use super::super::process::Process;
use super::immediate_exit::LIBRARY_BIT;
use super::{ImmediateExit, SystemFd, VcpuFd};
use crate::error::{Error, Result};
use kvm_bindings as kb;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::sync::Arc;

/// A vCPU's `struct kvm_run`, which it shares with the kernel, and its `immediate_exit` byte with
/// every thread that kicks.
#[derive(Debug)]
pub struct Run {
    run: NonNull<kb::kvm_run>,
    immediate_exit: Arc<ImmediateExit>,
    /// The process that made it; None if that can't be known.
    process: Option<Process>,
    _mapping: Option<Mapping>,
}

// SAFETY: all access is by single volatile reads and writes of plain fields; the kernel may write
// them at any time.
unsafe impl Send for Run {}
// SAFETY: as for Send: the only reference into the structure that is made is to an atomic byte.
unsafe impl Sync for Run {}

impl Drop for Run {
    fn drop(&mut self) {
        match self.process {
            Some(process) if !process.is_here() => self.immediate_exit.forget(),
            _ => self.immediate_exit.detach(),
        }
    }
}

impl Run {
    /// Maps a vCPU's.
    pub fn map(system: &SystemFd, vcpu: &VcpuFd) -> Result<Run> {
        let size = system.vcpu_mmap_size()?;
        let mapping = Mapping::shared(vcpu.as_raw_fd(), 0, size, true).map_err(|e| e.context("kvm_run"))?;
        let run = NonNull::new(mapping.address().as_ptr()).ok_or_else(|| Error::new(libc::EFAULT, "kvm_run"))?;
        // SAFETY: the mapping becomes the result's.
        let mut run = unsafe { Run::borrow(run) };
        run._mapping = Some(mapping);
        Ok(run)
    }

    /// Uses the VMM's mapping.
    ///
    /// # Safety
    /// `address` is the start of a mapping of the vCPU's descriptor that stays for as long as the
    /// result lives.
    pub unsafe fn borrow(address: NonNull<kb::kvm_run>) -> Run {
        // SAFETY: the structure is mapped for as long as the result lives, which detaches this
        // before it ends.
        let immediate_exit = unsafe { ImmediateExit::at((&raw mut (*address.as_ptr()).immediate_exit).cast()) };
        Run { run: address, immediate_exit: Arc::new(immediate_exit), process: Process::known(), _mapping: None }
    }

    /// The structure, of which only the address is used: fields are read and written by
    /// `read_volatile` and `write_volatile`.
    pub(in crate::kernel) fn as_ptr(&self) -> *mut kb::kvm_run {
        self.run.as_ptr()
    }

    /// Why KVM_RUN returned.
    pub fn exit_reason(&self) -> u32 {
        // SAFETY: the structure is mapped (see the constructors).
        unsafe { (&raw const (*self.as_ptr()).exit_reason).read_volatile() }
    }

    /// Forgets the last exit, so that a KVM_RUN which fails without setting a reason can't be
    /// mistaken for it. Where KVM_RUN reads the reason, an access that it has yet to complete
    /// stays.
    pub fn clear_exit_reason(&self) {
        if arch::KVM_RUN_READS_EXIT_REASON && self.exit_reason() == kb::KVM_EXIT_MMIO {
            return;
        }
        // SAFETY: the structure is mapped (see the constructors).
        unsafe { (&raw mut (*self.as_ptr()).exit_reason).write_volatile(kb::KVM_EXIT_UNKNOWN) };
    }

    /// The byte that keeps KVM_RUN from beginning, for threads that kick.
    pub fn immediate_exit(&self) -> &Arc<ImmediateExit> {
        &self.immediate_exit
    }

    /// Is the library's bit of that byte set? Costs a load, and less than asking the byte itself,
    /// which may be detached meanwhile.
    #[inline]
    pub fn is_exit_raised(&self) -> bool {
        // SAFETY: the structure is mapped (see the constructors).
        let byte = unsafe { (&raw const (*self.as_ptr()).immediate_exit).cast::<AtomicU8>().as_ref() };
        byte.is_some_and(|byte| byte.load(SeqCst) & LIBRARY_BIT != 0)
    }

    /// The address space of the exit.
    pub fn space(&self) -> u32 {
        // SAFETY: the structure is mapped (see the constructors).
        arch::space(unsafe { (&raw const (*self.as_ptr()).flags).read_volatile() })
    }

    /// The first three words of the exit's own data: flags, gpa and size in all ABIs of
    /// memory-fault exits.
    pub fn words(&self) -> [u64; 3] {
        // SAFETY: the structure is mapped (see the constructors); the union is 256 bytes of plain
        // data.
        unsafe { (&raw const (*self.as_ptr()).__bindgen_anon_1).cast::<[u64; 3]>().read_volatile() }
    }
}
