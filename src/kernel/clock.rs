//! The clock that latencies are measured with.

/// Nanoseconds of the monotonic clock. Read twice a fault, and cheaper than `Instant`, which splits
/// and checks the number.
#[inline]
pub fn nanoseconds() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: clock_gettime writes to a live timespec. CLOCK_MONOTONIC can't fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
