//! Signals of the calling thread, and signals to others of this process.

use super::address::Hva;
use super::process;
use crate::error::{Error, Result};
use std::cell::RefCell;

/// Sends `signal` to one thread of this process; async-signal-safe. Returns 0 or an errno. A thread
/// that is gone is not an error.
pub fn send(tid: i32, signal: i32) -> i32 {
    let process = match process::id() {
        Ok(id) => id,
        Err(e) => return e.errno,
    };
    // SAFETY: tgkill takes numbers only; a thread that has ended gives ESRCH.
    match unsafe { libc::syscall(libc::SYS_tgkill, process, tid, signal) } {
        0 => 0,
        _ => match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::ESRCH) => 0,
            errno => errno.unwrap_or(libc::EIO),
        },
    }
}

/// Checks that the calling thread can be sent signals and, if SIGBUS comes by mask, can block and
/// take them. A seccomp filter that refuses one of the calls would otherwise show as kicks that are
/// lost, or as a vCPU that makes no progress.
pub fn check(by_mask: bool) -> Result<()> {
    let pid = process::id()?;
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let (empty, mut mask, null) = (0u64, 0u64, std::ptr::null::<u64>());
    // SAFETY: none of the calls changes anything: no signal is sent, the mask is only read, and of
    // the empty set none is taken. Sets and time are live, and of the size that is stated.
    let results = unsafe {
        let tid = libc::syscall(libc::SYS_gettid);
        let failed = |result: i64| (result < 0).then(std::io::Error::last_os_error);
        [
            ("gettid", failed(tid)),
            ("tgkill", failed(libc::syscall(libc::SYS_tgkill, pid, tid, 0))),
            (
                "rt_sigprocmask",
                failed(libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, null, &mut mask, 8usize)),
            ),
            ("rt_sigtimedwait", failed(libc::syscall(libc::SYS_rt_sigtimedwait, &empty, null, &none, 8usize))),
        ]
    };
    let needed = if by_mask { results.len() } else { 2 };
    for (name, failed) in results.into_iter().take(needed) {
        match failed {
            // Nothing was there to be taken.
            Some(e) if !matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                return Err(Error::from_io(&format!("{name} (refused by a seccomp filter?)"), &e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A set of signals, as the kernel has it: bit (n - 1) is signal n.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SignalSet(pub u64);

impl SignalSet {
    /// The set of these signals.
    pub fn of(signals: &[i32]) -> SignalSet {
        SignalSet(signals.iter().fold(0, |set, s| set | 1 << (s - 1)))
    }

    /// This set without those of `other`.
    pub fn without(self, other: SignalSet) -> SignalSet {
        SignalSet(self.0 & !other.0)
    }

    /// The bits that are set.
    fn iter(self) -> impl Iterator<Item = usize> {
        (0..64).filter(move |bit| self.0 & 1 << bit != 0)
    }
}

/// Blocks (or unblocks) signals in the calling thread; returns the mask as it was.
pub fn set_blocked(set: SignalSet, block: bool) -> Result<SignalSet> {
    let mut old = 0u64;
    let how = if block { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    // SAFETY: both sets are live 8-byte values, the size that the last argument states.
    match unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &set.0, &mut old, 8usize) } {
        0 => Ok(SignalSet(old)),
        _ => Err(Error::last_os("rt_sigprocmask")),
    }
}

/// The signals that are blocked in the calling thread.
pub fn blocked() -> Result<SignalSet> {
    set_blocked(SignalSet::default(), true)
}

/// The signals that the library has blocked in a thread for vCPUs: how many vCPUs want each
/// blocked, and which of them the thread had not blocked itself.
struct Held {
    wanted: [u32; 64],
    unblock: u64,
}

thread_local! {
    static HELD: RefCell<Held> = const { RefCell::new(Held { wanted: [0; 64], unblock: 0 }) };
}

/// Blocks signals in the calling thread until `release` has been called as often as this; returns
/// the mask as it was. (A thread may have several vCPUs.)
pub fn hold(set: SignalSet) -> Result<SignalSet> {
    let before = set_blocked(set, true)?;
    HELD.with_borrow_mut(|held| {
        for signal in set.iter() {
            if held.wanted[signal] == 0 && before.0 & 1 << signal == 0 {
                held.unblock |= 1 << signal;
            }
            held.wanted[signal] += 1;
        }
    });
    Ok(before)
}

/// Undoes one `hold`. Signals that no other vCPU of the thread wants blocked are unblocked, unless
/// the thread had blocked them itself; those that are pending are discarded.
pub fn release(set: SignalSet) {
    let unblock = HELD.with_borrow_mut(|held| {
        let mut unblock = 0;
        for signal in set.iter() {
            held.wanted[signal] = held.wanted[signal].saturating_sub(1);
            if held.wanted[signal] == 0 {
                unblock |= held.unblock & 1 << signal;
            }
        }
        held.unblock &= !unblock;
        SignalSet(unblock)
    });
    while matches!(take(unblock), Ok(Some(_))) {}
    let _ = set_blocked(unblock, false);
}

/// A signal that was pending.
#[derive(Debug, Clone, Copy)]
pub struct Pending {
    /// Its number.
    pub signal: i32,
    /// si_code.
    pub code: i32,
    /// si_addr, for SIGBUS.
    pub address: Hva,
}

/// Takes one pending blocked signal of `set` from the calling thread, without waiting.
pub fn take(set: SignalSet) -> Result<Option<Pending>> {
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: an all-zero siginfo_t is valid; set, info and timeout live during the call, and 8 is
    // the size of the kernel's set. si_addr is a plain field read of a siginfo_t that the kernel
    // filled in.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let signal = libc::syscall(libc::SYS_rt_sigtimedwait, &set.0, &mut info, &none, 8usize) as i32;
        match signal {
            1.. => Ok(Some(Pending { signal, code: info.si_code, address: Hva(info.si_addr() as u64) })),
            _ => match Error::last_os("rt_sigtimedwait") {
                error if [libc::EAGAIN, libc::EINTR].contains(&error.errno) => Ok(None),
                error => Err(error),
            },
        }
    }
}

/// Can a program send and block `signal`? Not SIGKILL and SIGSTOP, which can't be blocked, nor
/// those that the C library reserves.
pub fn is_usable(signal: i32) -> bool {
    const FIRST_REALTIME: i32 = 32;
    (1..=libc::SIGRTMAX()).contains(&signal)
        && ![libc::SIGKILL, libc::SIGSTOP].contains(&signal)
        && !(FIRST_REALTIME..libc::SIGRTMIN()).contains(&signal)
}

/// Does the VMM have a handler for `signal`? (Neither the default action nor ignored.)
pub fn has_handler(signal: i32) -> bool {
    // SAFETY: an all-zero sigaction is valid; a null new action only queries.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0
            && action.sa_sigaction != libc::SIG_DFL
            && action.sa_sigaction != libc::SIG_IGN
    }
}

/// Blocks every signal in the calling thread, which is one of the library's own: the VMM's handlers
/// must not run there.
pub fn block_all() {
    // Where a seccomp filter refuses it, the VMM's handlers may run here.
    let _ = set_blocked(SignalSet(!0), true);
}

#[cfg(test)]
mod tests {
    use super::super::thread::id;
    use super::*;

    #[test]
    fn a_blocked_signal_is_taken_once() {
        let set = SignalSet::of(&[libc::SIGURG]);
        set_blocked(set, true).unwrap();
        assert!(take(set).unwrap().is_none());
        assert_eq!(send(id(), libc::SIGURG), 0);
        assert_eq!(take(set).unwrap().unwrap().signal, libc::SIGURG);
        assert!(take(set).unwrap().is_none());
    }

    #[test]
    fn signals_stay_blocked_until_the_last_vcpu_releases_them() {
        let (own, two) = (SignalSet::of(&[libc::SIGUSR1]), SignalSet::of(&[libc::SIGUSR1, libc::SIGUSR2]));
        let now = || blocked().unwrap();
        set_blocked(own, true).unwrap();
        hold(two).unwrap();
        hold(two).unwrap();
        release(two);
        assert_eq!(two.without(now()), SignalSet::default());
        send(id(), libc::SIGUSR2);
        release(two);
        // The pending one is gone (it would have ended the process), and what the thread had
        // blocked itself still is.
        assert_eq!(two.without(now()), two.without(own));
        set_blocked(own, false).unwrap();
    }
}
