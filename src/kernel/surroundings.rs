//! What confines this process, as far as it can be known: for `kvmfault_explain`.

use super::unseen;
use crate::error::Error;
use std::os::unix::fs::MetadataExt;

/// PROC_USER_INIT_INO of include/linux/proc_ns.h.
const INITIAL_USER_NAMESPACE: u64 = 0xEFFF_FFFD;

/// What `look` has found.
#[derive(Debug, Default)]
pub struct Surroundings {
    /// Why /proc/self/maps can't be read; None if it can.
    pub maps: Option<Error>,
    /// Is this the initial user namespace? Capabilities in others don't count for userfaultfd. None
    /// if it can't be known.
    pub initial_user_namespace: Option<bool>,
    /// Is a seccomp filter in force? None if it can't be known.
    pub seccomp: Option<bool>,
}

/// Finds out what confines this process.
pub fn look() -> Surroundings {
    let status = std::fs::read_to_string("/proc/self/status").ok();
    let seccomp = |text: &str| Some(text.lines().find_map(|line| line.strip_prefix("Seccomp:"))?.trim() != "0");
    Surroundings {
        maps: unseen::reason(),
        initial_user_namespace: std::fs::metadata("/proc/self/ns/user").ok().map(|m| m.ino() == INITIAL_USER_NAMESPACE),
        seccomp: status.as_deref().and_then(seccomp),
    }
}

/// The kernel's release, by uname(2).
pub fn kernel_release() -> String {
    // SAFETY: an all-zero utsname is a valid value; the kernel ends the strings in it with a NUL.
    unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        libc::uname(&mut name);
        std::ffi::CStr::from_ptr(name.release.as_ptr()).to_string_lossy().into_owned()
    }
}
