//! Which process this is. fork(2) copies handles, and with them userfaultfds and eventfds that act
//! on the parent. So each handle remembers the process that made it, and one load tells whether it
//! is the calling one. A process here is an address space: a child of vfork(2), or of clone(2) with
//! CLONE_VM, shares its parent's, and counts as the same process.

use super::arch;
use super::file::is_anonymous;
use crate::error::{Error, Result};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

/// A page that the kernel zeroes in a forked child (MADV_WIPEONFORK, Linux 4.14). Its first word is
/// the number of this process, its second the process id.
static WIPED: arch::WholePage = arch::WholePage::zeroed();

fn word() -> &'static AtomicU64 {
    &WIPED.0[0]
}

/// The first word while a thread makes the process's first handle.
const BEGINNING: u64 = u64::MAX;

/// A process, distinct from those that it descends from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process(u64);

impl Process {
    /// The calling process. Before its first handle is made, `first` runs once, to clean up what
    /// threads of the parent had begun and no thread here will finish.
    pub fn here(first: impl Fn()) -> Process {
        static LAST: AtomicU64 = AtomicU64::new(0);
        loop {
            match word().load(SeqCst) {
                0 => {
                    wipe_on_fork();
                    if word().compare_exchange(0, BEGINNING, SeqCst, SeqCst).is_ok() {
                        first();
                        // Its descendants copy this number, and count on from it.
                        word().store(LAST.fetch_add(1, SeqCst) + 1, SeqCst);
                    }
                }
                BEGINNING => std::thread::yield_now(),
                number => return Process(number),
            }
        }
    }

    /// The calling process; None before its first handle is made.
    pub fn known() -> Option<Process> {
        Some(word().load(SeqCst)).filter(|number| ![0, BEGINNING].contains(number)).map(Process)
    }

    /// Is it the calling process? Async-signal-safe.
    #[inline]
    pub fn is_here(self) -> bool {
        word().load(Relaxed) == self.0
    }
}

/// The process id. The kernel is asked for it once in a process that uses the library, which spares
/// seccomp filters work. Async-signal-safe.
pub fn id() -> Result<i32> {
    let (known, wiped) = (&WIPED.0[1], !matches!(word().load(SeqCst), 0 | BEGINNING));
    match known.load(Relaxed) as i32 {
        0 => {}
        id => return Ok(id),
    }
    // The system call itself, because glibc's getpid doesn't report a filter's refusal.
    // SAFETY: getpid has no arguments.
    match unsafe { libc::syscall(libc::SYS_getpid) } {
        id if id > 0 => {
            // Only once the page is wiped in a child.
            if wiped {
                known.store(id as u64, Relaxed);
            }
            Ok(id as i32)
        }
        _ => Err(Error::last_os("getpid")),
    }
}

fn wipe_on_fork() {
    // SAFETY: the page is a static of its own, in anonymous memory that holds nothing else; the
    // handler only stores to it.
    unsafe {
        let page = (&raw const WIPED).cast_mut().cast();
        if libc::madvise(page, size_of_val(&WIPED), libc::MADV_WIPEONFORK) != 0 {
            // An older kernel, or a seccomp filter. Then only the C library's fork is noticed.
            libc::pthread_atfork(None, None, Some(wipe));
        }
    }
}

unsafe extern "C" fn wipe() {
    WIPED.0[..2].iter().for_each(|word| word.store(0, SeqCst));
}

/// Closes, in a forked child, its copies of the parent's descriptors. A number that the child has
/// closed already, and reused for a file, socket or pipe, stays open: the library's descriptors are
/// all anonymous inodes.
///
/// # Safety
/// Called in a forked child, where the descriptors' owners are never used nor dropped.
pub unsafe fn close_copies(fds: &[RawFd]) {
    for &fd in fds.iter().filter(|&&fd| is_anonymous(fd).unwrap_or(false)) {
        // SAFETY: the caller promises that no owner uses the descriptor.
        unsafe { libc::close(fd) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `child` returns in a forked child.
    fn forked(child: impl Fn() -> i32) -> i32 {
        let mut status = 0;
        // SAFETY: the child makes no call that could wait for a lock of another thread, and ends.
        unsafe {
            match libc::fork() {
                0 => libc::_exit(child()),
                pid => assert_eq!(libc::waitpid(pid, &mut status, 0), pid),
            }
        }
        libc::WEXITSTATUS(status)
    }

    #[test]
    fn each_process_is_another() {
        let parent = Process::here(|| {});
        assert!(parent.is_here());
        assert_eq!(id().unwrap(), std::process::id() as i32);
        let child = || {
            let before = parent.is_here();
            let child = Process::here(|| {});
            let grandchild = forked(|| (parent.is_here() || child.is_here()).into());
            let told = id().is_ok_and(|id| id == std::process::id() as i32);
            (!told || before || parent.is_here() || !child.is_here() || grandchild != 0).into()
        };
        assert_eq!((forked(child), forked(child)), (0, 0));
        assert!(parent.is_here() && parent == Process::here(|| unreachable!()));
    }

    #[test]
    fn an_older_kernel_is_helped() {
        let parent = Process::here(|| {});
        let child = || {
            let child = Process::here(|| {});
            // SAFETY: as fork(2) would have it called.
            unsafe { wipe() };
            child.is_here().into()
        };
        assert_eq!(forked(child), 0);
        assert!(parent.is_here());
    }
}
