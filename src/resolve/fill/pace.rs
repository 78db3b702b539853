//! The rate of a fill: within its limit, and behind the guest's own faults.

use crate::resolve::seat::Seats;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long a fill waits before each of its pieces while vCPUs have faults. No longer, as the fill
/// must end, too.
const GIVE_WAY: Duration = Duration::from_millis(2);
/// How often a fill checks whether vCPUs still wait.
const LOOK: Duration = Duration::from_micros(50);

/// A limit of bytes a second, for all threads of a fill together.
#[derive(Debug)]
pub struct Limit {
    bytes_per_second: u64,
    /// When the bytes that were allowed so far are used up.
    until: Mutex<Instant>,
}

impl Limit {
    /// A limit; 0 for none.
    pub fn new(bytes_per_second: u64) -> Limit {
        Limit { bytes_per_second, until: Mutex::new(Instant::now()) }
    }

    /// How long to wait before `bytes` more, which count as used.
    pub fn delay(&self, bytes: u64) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        let Ok(mut until) = self.until.lock() else { return Duration::ZERO };
        let now = Instant::now();
        let begin = (*until).max(now);
        *until = begin + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        begin - now
    }

    /// Takes back bytes of `delay` that were not fetched. `delay` is called again when they are:
    /// after a wait that was cut short, or a pause, no more is allowed than before.
    pub fn give_back(&self, bytes: u64) {
        if self.bytes_per_second == 0 {
            return;
        }
        if let Ok(mut until) = self.until.lock() {
            let time = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
            *until = until.checked_sub(time).unwrap_or(*until);
        }
    }
}

/// Waits until no vCPU waits for a page, for a short time at most.
pub fn give_way(seats: &Seats) {
    let seats = seats.all();
    let begin = Instant::now();
    while seats.iter().any(|seat| seat.is_waiting()) && begin.elapsed() < GIVE_WAY {
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::address::Hva;
    use crate::kernel::kvm::ImmediateExit;
    use crate::resolve::seat::Seat;

    #[test]
    fn a_limit_is_for_all_together() {
        let limit = Limit::new(1 << 20);
        let begin = Instant::now();
        assert_eq!(limit.delay(1 << 20), Duration::ZERO, "the first goes at once");
        for n in 1..3 {
            let (most, delay) = (Duration::from_secs(n), limit.delay(1 << 20));
            assert!(delay <= most && delay + begin.elapsed() >= most, "{n}: {delay:?}");
        }
        assert_eq!(Limit::new(0).delay(u64::MAX), Duration::ZERO);
    }

    #[test]
    fn what_is_given_back_is_asked_for_anew() {
        let limit = Limit::new(1 << 20);
        let begin = Instant::now();
        assert_eq!(limit.delay(100 << 20), Duration::ZERO);
        limit.give_back(99 << 20);
        assert!(limit.delay(1 << 20) <= Duration::from_secs(1), "one second is used up");
        // Two seconds are used up, and given back three times over, which gives no credit.
        (0..3).for_each(|_| limit.give_back(2 << 20));
        assert_eq!(limit.delay(1 << 20), Duration::ZERO);
        assert!(limit.delay(1) + begin.elapsed() >= Duration::from_secs(1));
        Limit::new(0).give_back(u64::MAX);
    }

    #[test]
    fn faults_go_first_but_not_for_ever() {
        let seats = Seats::default();
        let seat: &'static Seat = Box::leak(Box::new(Seat::new(0, ImmediateExit::none(), libc::SIGURG, false)));
        seats.add(seat);
        // The shortest of many: on a busy machine each of them may take long.
        let waits = || {
            let wait = || {
                let begin = Instant::now();
                give_way(&seats);
                begin.elapsed()
            };
            (0..100).map(|_| wait()).min() >= Some(GIVE_WAY)
        };
        assert!(!waits());
        let under_way = seat.begin_fault(Hva(0x1000));
        assert!(waits());
        drop(under_way);
        assert!(!waits());
        assert_eq!(seat.last_fault(), Some(Hva(0x1000)));
    }
}
