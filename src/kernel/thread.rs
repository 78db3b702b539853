//! Threads of this process.

use super::{futex, signal};
use once_cell::sync::Lazy;
use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

/// The kernel's number of the calling thread.
pub fn id() -> i32 {
    // SAFETY: gettid has no arguments and can't fail.
    unsafe { libc::gettid() }
}

/// A number that no other thread of this process has, or ever had. No system call, unlike `id`.
pub fn token() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    thread_local! { static TOKEN: Cell<u64> = const { Cell::new(0) } }
    if TOKEN.get() == 0 {
        TOKEN.set(LAST.fetch_add(1, SeqCst) + 1);
    }
    TOKEN.get()
}

/// For tests: the number of fill threads that can be started before starting one fails.
static MOST_THREADS: Lazy<Option<u32>> = Lazy::new(|| std::env::var("KVMFAULT_TEST_MOST_THREADS").ok()?.parse().ok());

/// Starts a thread.
pub fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    static STARTED: AtomicU32 = AtomicU32::new(0);
    if MOST_THREADS.is_some_and(|most| STARTED.fetch_add(1, SeqCst) >= most) {
        return Err(std::io::Error::from_raw_os_error(libc::EAGAIN));
    }
    std::thread::Builder::new().name(name).spawn(work)
}

/// Sleeps, by the system call that every program with threads needs: a seccomp filter may refuse
/// nanosleep.
pub fn pause(time: Duration) {
    futex::wait(&AtomicU32::new(0), 0, time);
}

/// Lowers the calling thread's priority: `nice` is from 0 (no change) to 19.
pub fn set_nice(nice: i32) {
    // SAFETY: setpriority takes numbers only. On Linux it sets the thread's own value, and raising
    // it is always allowed.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, id() as libc::id_t, nice) };
}

/// Calls `work` on all pieces of a range, each at least `least` long, on as many threads as there
/// are CPUs for this process. Returns the first piece's error.
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
                    signal::block_all();
                    piece(n)
                });
                spawned.map_err(|_| n)
            })
            .collect();
        let mut result = piece(0);
        for other in others {
            let done = match other {
                // A panic of that thread continues here.
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(n) => piece(n), // no thread could be started
            };
            result = result.and(done);
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    /// The kernel reuses the number of a thread that has ended. By that number a vCPU would take
    /// another thread for its own, and for one with SIGBUS blocked.
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
}
