//! Futexes: sleeping on a word of memory.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Why a wait on a futex ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// A wake-up, a word that had changed already, or a spurious return.
    Woken,
    /// A signal handler ran.
    Signal,
    /// The timeout has passed.
    Timeout,
}

/// Sleeps while `word` is `expected`, at most `timeout`.
pub fn wait(word: &AtomicU32, expected: u32, timeout: Duration) -> Wake {
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
        // A seccomp filter refuses the call. Callers check their condition and wait again: this
        // keeps them from spinning.
        _ => {
            std::thread::sleep(Duration::from_millis(1));
            Wake::Woken
        }
    }
}

/// Wakes all that sleep on `word`; async-signal-safe.
pub fn wake_all(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE uses the address as a key and does not access it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX) };
}
