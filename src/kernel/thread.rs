//! Threads, signals and futexes.

use super::process;
use crate::error::{Error, Result};
use once_cell::sync::Lazy;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

/// The kernel's number of the calling thread.
pub fn id() -> i32 {
    // SAFETY: gettid has no arguments and can't fail.
    unsafe { libc::gettid() }
}

/// Tells the calling thread from all others that there have ever been in this process; no system call, unlike `id`.
pub fn token() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    thread_local! { static TOKEN: Cell<u64> = const { Cell::new(0) } }
    if TOKEN.get() == 0 {
        TOKEN.set(LAST.fetch_add(1, SeqCst) + 1);
    }
    TOKEN.get()
}

/// For tests: so many fill threads can be started, and then no more.
static MOST_THREADS: Lazy<Option<u32>> = Lazy::new(|| std::env::var("KVMFAULT_TEST_MOST_THREADS").ok()?.parse().ok());

/// Starts a thread.
pub fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    static STARTED: AtomicU32 = AtomicU32::new(0);
    if MOST_THREADS.is_some_and(|most| STARTED.fetch_add(1, SeqCst) >= most) {
        return Err(std::io::Error::from_raw_os_error(libc::EAGAIN));
    }
    std::thread::Builder::new().name(name).spawn(work)
}

/// Sends `signal` to one thread of this process; async-signal-safe. Returns 0 or an errno. A thread that
/// is gone is not an error.
pub fn send_signal(tid: i32, signal: i32) -> i32 {
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

/// May the calling thread be sent signals and, if SIGBUS comes by mask, block and take them? A seccomp
/// filter that refuses one of the calls would show as kicks that are lost, or as a vCPU that makes no
/// progress.
pub fn check_signals(by_mask: bool) -> Result<()> {
    let pid = process::id()?;
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let (empty, mut mask, null) = (0u64, 0u64, std::ptr::null::<u64>());
    // SAFETY: none of the calls changes anything: no signal is sent, the mask is only read, and of the empty set none is taken. Sets and time are
    // live, and of the size that is stated.
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

/// The monotonic clock. Twice on each fault: `Instant` checks and splits what is one number to us.
#[inline]
pub fn nanoseconds() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to a live timespec. CLOCK_MONOTONIC can't fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Why a wait on a futex ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// Woken, or the word had changed already, or for no reason.
    Woken,
    /// A signal handler ran.
    Signal,
    /// The time is over.
    Timeout,
}

/// Sleeps while `word` is `expected`, at most `timeout`.
pub fn futex_wait(word: &AtomicU32, expected: u32, timeout: Duration) -> Wake {
    let timeout = libc::timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
    // SAFETY: the word and the timeout live during the call; FUTEX_WAIT only reads them.
    let result = unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, expected, &timeout)
    };
    match (result, std::io::Error::last_os_error().raw_os_error()) {
        (0, _) => Wake::Woken,
        (_, Some(libc::EINTR)) => Wake::Signal,
        (_, Some(libc::ETIMEDOUT)) => Wake::Timeout,
        (_, Some(libc::EAGAIN)) => Wake::Woken,
        // Refused (a seccomp filter): callers look again and come back, and must not spin.
        _ => {
            std::thread::sleep(Duration::from_millis(1));
            Wake::Woken
        }
    }
}

/// Wakes all that sleep on `word`; async-signal-safe.
pub fn futex_wake_all(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE uses the address as a key and does not access it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX) };
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

    /// The numbers of its bits.
    fn iter(self) -> impl Iterator<Item = usize> {
        (0..64).filter(move |bit| self.0 & 1 << bit != 0)
    }
}

/// Blocks (or unblocks) signals in the calling thread; returns the mask as it was.
pub fn mask_signals(set: SignalSet, block: bool) -> Result<SignalSet> {
    let mut old = 0u64;
    let how = if block { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    // SAFETY: both sets are live 8-byte values, the size that the last argument states.
    match unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &set.0, &mut old, 8usize) } {
        0 => Ok(SignalSet(old)),
        _ => Err(Error::last_os("rt_sigprocmask")),
    }
}

/// The signals that are blocked in the calling thread.
pub fn mask() -> Result<SignalSet> {
    mask_signals(SignalSet::default(), true)
}

/// Which signals are blocked in this thread for vCPUs: how many of them want it, and which the thread had not blocked itself.
struct Held {
    wanted: [u32; 64],
    unblock: u64,
}

thread_local! {
    static HELD: RefCell<Held> = const { RefCell::new(Held { wanted: [0; 64], unblock: 0 }) };
}

/// Blocks signals in the calling thread until `release` has been called as often; returns the mask as it was. A thread may have several vCPUs.
pub fn hold(set: SignalSet) -> Result<SignalSet> {
    let before = mask_signals(set, true)?;
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

/// Takes `hold` back. Those that no other vCPU of the thread wants are unblocked if the thread hadn't blocked them itself, and lost if they are
/// pending.
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
    while matches!(take_signal(unblock), Ok(Some(_))) {}
    let _ = mask_signals(unblock, false);
}

/// A signal that was pending.
#[derive(Debug, Clone, Copy)]
pub struct Pending {
    /// Its number.
    pub signal: i32,
    /// si_code.
    pub code: i32,
    /// si_addr, for SIGBUS.
    pub address: u64,
}

/// Takes one pending blocked signal of `set` from the calling thread, without waiting.
pub fn take_signal(set: SignalSet) -> Result<Option<Pending>> {
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: an all-zero siginfo_t is valid; set, info and timeout live during the call, and 8 is the size of the kernel's set.
    // si_addr is a plain field read of a siginfo_t that the kernel filled in.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let signal = libc::syscall(libc::SYS_rt_sigtimedwait, &set.0, &mut info, &none, 8usize) as i32;
        match signal {
            1.. => Ok(Some(Pending { signal, code: info.si_code, address: info.si_addr() as u64 })),
            _ => match Error::last_os("rt_sigtimedwait") {
                error if [libc::EAGAIN, libc::EINTR].contains(&error.errno) => Ok(None),
                error => Err(error),
            },
        }
    }
}

/// Can a program send and block `signal`? Not the two that nothing blocks, nor those that the C library keeps for itself.
pub fn is_usable_signal(signal: i32) -> bool {
    const FIRST_REALTIME: i32 = 32;
    (1..=libc::SIGRTMAX()).contains(&signal)
        && ![libc::SIGKILL, libc::SIGSTOP].contains(&signal)
        && !(FIRST_REALTIME..libc::SIGRTMIN()).contains(&signal)
}

/// Has the VMM a handler for `signal`? (Neither the default action nor ignored.)
pub fn has_handler(signal: i32) -> bool {
    // SAFETY: an all-zero sigaction is valid; a null new action only queries.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0
            && action.sa_sigaction != libc::SIG_DFL
            && action.sa_sigaction != libc::SIG_IGN
    }
}

/// An eventfd that stays readable once it was raised.
#[derive(Debug)]
pub struct Flag(OwnedFd);

impl Flag {
    /// A flag that isn't raised.
    pub fn new() -> Result<Flag> {
        // SAFETY: eventfd returns a new descriptor, which is ours alone, or -1.
        unsafe {
            match libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) {
                -1 => Err(Error::last_os("eventfd")),
                fd => Ok(Flag(OwnedFd::from_raw_fd(fd))),
            }
        }
    }

    /// Raises it for all who poll it.
    pub fn raise(&self) {
        let one = 1u64;
        // SAFETY: writes 8 bytes from a live variable to our own descriptor.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }
}

impl AsRawFd for Flag {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Waits until one of the descriptors is readable (or broken); tells which are. None of them after the timeout, or a signal.
pub fn poll<const N: usize>(fds: [i32; N], timeout: Option<Duration>) -> Result<[bool; N]> {
    let mut set = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    let millis = timeout.map_or(-1, |t| t.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32);
    // SAFETY: `set` is a live array of N pollfds.
    match unsafe { libc::poll(set.as_mut_ptr(), N as _, millis) } {
        -1 => match Error::last_os("poll") {
            error if error.errno == libc::EINTR => Ok([false; N]),
            error => Err(error),
        },
        _ => Ok(set.map(|p| p.revents != 0)),
    }
}

/// Sleeps. By a system call that all programs with threads need, so that no seccomp filter refuses it: nanosleep may be missing.
pub fn pause(time: Duration) {
    futex_wait(&AtomicU32::new(0), 0, time);
}

/// Blocks every signal in the calling thread: the VMM's handlers are not for the library's own threads.
pub fn block_all_signals() {
    // Where a filter refuses it the VMM's handlers run here, too.
    let _ = mask_signals(SignalSet(!0), true);
}

/// The calling thread gives way to others of the process: `nice` from 0 (as it was) to 19.
pub fn set_nice(nice: i32) {
    // SAFETY: takes numbers only. On Linux it is the thread's own value; raising it is always allowed.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, id() as libc::id_t, nice) };
}

/// Has a range worked on in pieces, of `least` at least, by as many threads as there are CPUs for this process. The first error of a piece.
pub fn in_parallel(
    range: Range<u64>,
    least: u64,
    work: impl Fn(Range<u64>) -> crate::error::Result<()> + Sync,
) -> crate::error::Result<()> {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let pieces = ((range.end - range.start) / least).clamp(1, cpus);
    let edge = |n: u64| range.start + (range.end - range.start) * n / pieces;
    let piece = |n: u64| work(edge(n)..edge(n + 1));
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..pieces)
            .map(|n| {
                let own = std::thread::Builder::new().name("kvmfault-arm".into());
                let spawned = own.spawn_scoped(scope, move || {
                    block_all_signals();
                    piece(n)
                });
                spawned.map_err(|_| n)
            })
            .collect();
        let mut result = piece(0);
        for other in others {
            let done = match other {
                // A panic there goes on here.
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(n) => piece(n), // no thread to be had
            };
            result = result.and(done);
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_signal_is_taken_once() {
        let set = SignalSet::of(&[libc::SIGURG]);
        mask_signals(set, true).unwrap();
        assert!(take_signal(set).unwrap().is_none());
        assert_eq!(send_signal(id(), libc::SIGURG), 0);
        assert_eq!(take_signal(set).unwrap().unwrap().signal, libc::SIGURG);
        assert!(take_signal(set).unwrap().is_none());
    }

    #[test]
    fn signals_stay_blocked_until_the_last_vcpu_releases_them() {
        let (own, two) = (SignalSet::of(&[libc::SIGUSR1]), SignalSet::of(&[libc::SIGUSR1, libc::SIGUSR2]));
        let blocked = || mask().unwrap();
        mask_signals(own, true).unwrap();
        hold(two).unwrap();
        hold(two).unwrap();
        release(two);
        assert_eq!(two.without(blocked()), SignalSet::default());
        send_signal(id(), libc::SIGUSR2);
        release(two);
        // The pending one is gone (it would have ended the process), and what the thread had blocked itself still is.
        assert_eq!(two.without(blocked()), two.without(own));
        mask_signals(own, false).unwrap();
    }

    /// The kernel gives the number of a thread that has ended to another one; then a vCPU would take that for its own, with SIGBUS blocked.
    #[test]
    fn threads_are_told_apart_also_from_those_that_have_ended() {
        let mine = token();
        let theirs: Vec<_> = (0..100).map(|_| std::thread::spawn(|| [token(), token()]).join().unwrap()).collect();
        assert!(theirs.iter().all(|[first, again]| first == again && *first != mine));
        assert!((1..theirs.len()).all(|n| !theirs[..n].contains(&theirs[n])));
        assert_eq!(token(), mine);
    }

    #[test]
    fn every_piece_is_worked_on_once() {
        for (len, least) in [(0, 1), (1, 1), (7, 1), (1000, 64), (1000, 2000)] {
            let done: Vec<_> = (0..len).map(|_| AtomicU32::new(0)).collect();
            let work = |range: Range<u64>| {
                range.for_each(|n| {
                    done[n as usize].fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                });
                Ok(())
            };
            in_parallel(0..len, least, work).unwrap();
            assert!(done.iter().all(|n| n.load(std::sync::atomic::Ordering::SeqCst) == 1));
        }
        let fails = |range: Range<u64>| match range.contains(&999) {
            true => Err(Error::new(libc::EIO, "the last")),
            false => Ok(()),
        };
        assert_eq!(in_parallel(0..1000, 1, fails).unwrap_err().errno, libc::EIO);
    }

    #[test]
    fn a_flag_stays_raised() {
        let flag = Flag::new().unwrap();
        assert_eq!(poll([flag.as_raw_fd()], Some(Duration::ZERO)).unwrap(), [false]);
        flag.raise();
        assert_eq!(poll([flag.as_raw_fd()], None).unwrap(), [true]);
        assert_eq!(poll([flag.as_raw_fd()], None).unwrap(), [true]);
    }
}
