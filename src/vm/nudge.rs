//! Telling KVM about a slot does not wait for a page.
//!
//! KVM_SET_USER_MEMORY_REGION waits until each vCPU has left what it was doing with the old slots
//! (synchronize_srcu in `kvm_swap_active_memslots`, virt/kvm/kvm_main.c), and a vCPU that sleeps in
//! userfaultfd for a page is in the middle of that. It need not stay out: only readers that began
//! before the change count, and one that comes back is a new reader.

use super::Vm;
use crate::error::Result;
use crate::kernel::kvm::Region;
use crate::kernel::{signal, thread};
use crate::memory::block::Block;
use crate::resolve::seat::{Seat, Seats};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::Duration;

/// The ioctl has returned by then, unless a vCPU sleeps.
const ENOUGH: Duration = Duration::from_millis(10);

/// The longest pause between two nudges. A vCPU that no signal wakes (before Linux 6.2, or in a
/// copy of KVM's own) is nudged for as long as it sleeps.
const MOST_PAUSE: Duration = Duration::from_millis(50);

impl Vm {
    /// Tells KVM of a slot on this block.
    pub(super) fn set_in_kvm(&self, region: &Region, block: &Block) -> Result<()> {
        nudging(&self.engine.seats, || self.vm.set_region(region, block.area(region.hva, region.len)))
    }

    /// Has KVM delete a slot.
    pub(super) fn delete_in_kvm(&self, region: &Region) -> Result<()> {
        nudging(&self.engine.seats, || self.vm.delete_region(region))
    }
}

/// Makes a call that waits for vCPUs. While it does, those that are in KVM_RUN leave it now and
/// then for a moment.
fn nudging<T>(seats: &Seats, call: impl FnOnce() -> T) -> T {
    let myself = thread::id();
    let is_another = |seat: &Seat| ![0, myself].contains(&seat.thread());
    if !seats.all().iter().any(|seat| is_another(seat)) {
        return call();
    }
    std::thread::scope(|scope| {
        let (done, is_done) = channel::<()>();
        let helper = std::thread::Builder::new().name("kvmfault-nudge".into());
        // Where no thread can be had the call may take longer.
        let _ = helper.spawn_scoped(scope, move || {
            signal::block_all();
            let (mut pause, mut next) = (ENOUGH, Duration::from_millis(2));
            while is_done.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                seats.all().iter().filter(|seat| is_another(seat)).for_each(|seat| seat.nudge());
                (pause, next) = (next, (next * 2).min(MOST_PAUSE));
            }
        });
        let result = call();
        drop(done);
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::kvm::ImmediateExit;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::time::Instant;

    #[test]
    fn a_call_that_waits_has_vcpus_nudged() {
        let (seats, ready) = (Seats::default(), AtomicBool::new(false));
        let seat: &'static Seat = Box::leak(Box::new(Seat::new(1, ImmediateExit::none(), libc::SIGURG, true)));
        assert!(seats.add(seat));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                seat.thread.store(thread::id(), SeqCst);
                ready.store(true, SeqCst);
                while !seat.acknowledge_nudges() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                ready.store(false, SeqCst);
                seat.thread.store(0, SeqCst);
            });
            while !ready.load(SeqCst) {
                std::thread::yield_now();
            }
            nudging(&seats, || {
                let begin = Instant::now();
                while ready.load(SeqCst) && begin.elapsed() < Duration::from_secs(60) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                assert!(!ready.load(SeqCst), "the call waits for ever");
            });
        });
        assert!(!seat.is_kicked() && !seat.acknowledge_nudges());
    }
}
