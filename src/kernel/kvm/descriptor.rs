//! What the three kinds of KVM's descriptors have in common: how one is checked and duplicated, and
//! how ioctls are made on it.

use super::super::file::is_anonymous;
use super::super::mem::Mapping;
use super::super::page::page_size;
use super::{KVM_CHECK_EXTENSION, KVM_GET_API_VERSION};
use crate::error::{fail, Error, Result};
use kvm_bindings as kb;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A request that no driver has: its type belongs neither to KVM nor to any other.
const FOREIGN: u64 = 0xFFFF;

/// Which of KVM's descriptors one is meant to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// /dev/kvm.
    System,
    /// What KVM_CREATE_VM returned.
    Vm,
    /// What KVM_CREATE_VCPU returned.
    Vcpu,
}

/// A descriptor of KVM's that the library owns: a checked duplicate of the VMM's, or one that it
/// made.
#[derive(Debug)]
pub(in crate::kernel) struct Descriptor(pub(super) OwnedFd);

impl Descriptor {
    /// Duplicates `fd` after checking that it is what `role` says; errors name it `name`. The check
    /// asks the descriptor itself, because a jail may have no /proc.
    pub(super) fn duplicate(fd: RawFd, role: Role, name: &str) -> Result<Descriptor> {
        // SAFETY: F_DUPFD_CLOEXEC gives a new descriptor or -1 (EBADF for a bad number).
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        if copy < 0 {
            return Err(Error::last_os(&format!("{name}: descriptor {fd}: fcntl(F_DUPFD_CLOEXEC)")));
        }
        // SAFETY: `copy` is open and ours alone.
        let copy = Descriptor(unsafe { OwnedFd::from_raw_fd(copy) });
        let answered = copy.is(role);
        if matches!(answered, Ok(true)) {
            return Ok(copy);
        }
        let is = match answered {
            // KVM_CHECK_EXTENSION, like all others, fails in an address space that is not that of
            // the VM's maker.
            Err(e) if e.errno == libc::EIO => "another process's (or its VM is dead)".into(),
            // A seccomp filter's answer, which says nothing of the descriptor.
            Err(e) if matches!(e.errno, libc::EPERM | libc::EACCES | libc::ENOSYS) => {
                return Err(e.context(format!("{name}: descriptor {fd} can't be asked what it is")));
            }
            _ => copy.link().unwrap_or_else(|| "something else".into()),
        };
        let wanted = match role {
            Role::System => "/dev/kvm",
            Role::Vm => "a VM of KVM's",
            Role::Vcpu => "a vCPU of KVM's",
        };
        fail!(EINVAL, "{name}: descriptor {fd} is {is}, not {wanted}")
    }

    /// Does the descriptor have this role? Only a vCPU's can be mapped, which is found out first:
    /// most ioctls of a vCPU wait while it runs.
    fn is(&self, role: Role) -> Result<bool> {
        let fd = self.0.as_raw_fd();
        let ask = |request, arg, what: &str| self.call(request, arg).map_err(|e| Error::from_io(what, &e));
        let is_device = !is_anonymous(fd).map_err(|e| Error::from_io("fstat", &e))?;
        if is_device || role == Role::System {
            // Other files aren't mapped: for a device that may have an effect.
            return Ok(is_device
                && role == Role::System
                && ask(KVM_GET_API_VERSION, 0, "ioctl(KVM_GET_API_VERSION)")? == 12);
        }
        let mapped = match Mapping::shared(fd, 0, page_size(), false) {
            Err(e) if matches!(e.errno, libc::EPERM | libc::ENOSYS) => return Err(e),
            mapped => mapped.is_ok(),
        };
        match (role, mapped) {
            (Role::Vm, false) if self.call(KVM_GET_API_VERSION, 0).is_err() => {
                Ok(ask(KVM_CHECK_EXTENSION, kb::KVM_CAP_USER_MEMORY.into(), "ioctl(KVM_CHECK_EXTENSION)")? > 0)
            }
            // A request that isn't KVM's gets ENOTTY from others, and EINVAL from a vCPU, which
            // does not wait for it (kvm_vcpu_ioctl).
            (Role::Vcpu, true) => match ask(FOREIGN, 0, "ioctl") {
                Err(e) if e.errno == libc::EINVAL => Ok(true),
                other => other.map(|_| false),
            },
            _ => Ok(false),
        }
    }

    /// What /proc/self/fd says of it, where there is a /proc.
    pub(super) fn link(&self) -> Option<String> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", self.0.as_raw_fd())).ok()?;
        Some(link.to_string_lossy().into_owned())
    }

    /// KVM_CREATE_VM or KVM_CREATE_VCPU. The first fails with EINTR when a signal comes in the
    /// middle.
    pub(super) fn create(&self, request: u64, arg: u64, what: &str) -> Result<Descriptor> {
        let fd = loop {
            match self.call(request, arg) {
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                other => break other.map_err(|e| Error::from_io(what, &e))?,
            }
        };
        // SAFETY: the ioctl returned a new descriptor, which is ours alone.
        Ok(Descriptor(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// KVM_CHECK_EXTENSION; 0 for what the kernel doesn't know.
    pub(super) fn check_extension(&self, cap: u32) -> i32 {
        self.call(KVM_CHECK_EXTENSION, cap.into()).unwrap_or(0)
    }

    /// An ioctl that fills in a structure.
    pub(in crate::kernel) fn get<T: Default>(&self, request: u64, what: &str) -> Result<T> {
        let mut value = T::default();
        self.exchange(request, &mut value, what)?;
        Ok(value)
    }

    /// An ioctl that is given a structure.
    pub(in crate::kernel) fn set<T>(&self, request: u64, arg: &mut T, what: &str) -> Result<()> {
        self.exchange(request, arg, what).map(drop)
    }

    /// An ioctl on a structure; what it returned.
    pub(in crate::kernel) fn exchange<T>(&self, request: u64, arg: &mut T, what: &str) -> Result<i32> {
        // SAFETY: `arg` is live, and every caller passes the structure that `request` is defined
        // on, followed by as many entries as its head says if it is one with entries; what it
        // points to is live as well. Guest memory that it names is an area that the library may
        // change (VmFd::set_region).
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, &raw mut *arg) } {
            r if r < 0 => Err(Error::last_os(what)),
            r => Ok(r),
        }
    }

    /// An ioctl that takes a number.
    pub(in crate::kernel) fn call(&self, request: u64, arg: u64) -> std::io::Result<i32> {
        // SAFETY: the requests passed here take no pointer, or (KVM_SET_SIGNAL_MASK) NULL.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, arg) } {
            r if r < 0 => Err(std::io::Error::last_os_error()),
            r => Ok(r),
        }
    }
}
