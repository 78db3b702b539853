//! What may become of a block's absent pages, and what marks them: one value, changed only here.
//!
//! ```text
//!        pages may be missing                nothing is missing, and nothing may be
//!
//!                       ---- close --->
//!           Unmarked                          Released
//!                       <--- reopen ---
//!           |      ^                           |     ^
//!         mark   unmarked                    mark  unmarked
//!           v      |                           v     |
//!                       ---- close --->
//!           Marked                            Closing        (`mark` leads from Released to
//!                       <--- reopen ---                       Marked: it reopens the block)
//!
//!           any of them ---- retire ---> Retiring -- unmarked --> Retired
//!                                        (markers are left)      (none are)
//! ```
//!
//! `Marked`, `Closing` and `Retiring` say that there may be markers: the value changes before the
//! first one is placed, and again after the last one is removed.

use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

/// The phase of a block's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Pages may be missing; nothing marks them.
    Unmarked = 0,
    /// Pages may be missing, and carry poison markers in the mapping that KVM uses.
    Marked = 1,
    /// Ordinary memory: nothing is missing, and nothing is registered for it.
    Released = 2,
    /// Nothing is missing and nothing may be; markers (of LOST pages) and registrations are on
    /// their way out.
    Closing = 3,
    /// No slot shows the block and nothing keeps it: threads that wait for its pages are released,
    /// and none begins to touch its memory (see `Memory::enter` and `Seat::touch`).
    Retired = 4,
    /// Retired, with markers left. Those in an alias go when the alias is unmapped.
    Retiring = 5,
}

use Phase::{Closing, Marked, Released, Retired, Retiring, Unmarked};

impl Phase {
    #[inline]
    fn from_bits(bits: u8) -> Phase {
        match bits {
            0 => Unmarked,
            1 => Marked,
            2 => Released,
            3 => Closing,
            4 => Retired,
            _ => Retiring,
        }
    }

    fn may_have_markers(self) -> bool {
        matches!(self, Marked | Closing | Retiring)
    }

    /// `mark`: markers are about to be placed. An end that was announced is off.
    fn mark(self) -> Phase {
        match self {
            Unmarked | Marked | Released | Closing => Marked,
            Retired | Retiring => Retiring,
        }
    }

    /// `unmarked`: the last marker of an absent page is gone.
    fn unmarked(self) -> Phase {
        match self {
            Unmarked | Marked => Unmarked,
            Released | Closing => Released,
            Retired | Retiring => Retired,
        }
    }

    /// `close`: from now on nothing may become missing.
    fn close(self) -> Phase {
        match self {
            Unmarked | Released => Released,
            Marked | Closing => Closing,
            Retired | Retiring => self,
        }
    }

    /// `reopen`: pages may be missing again.
    fn reopen(self) -> Phase {
        match self {
            Unmarked | Released => Unmarked,
            Marked | Closing => Marked,
            Retired | Retiring => self,
        }
    }

    /// `retire`: the last slot is gone. There is no way back.
    fn retire(self) -> Phase {
        match self.may_have_markers() {
            true => Retiring,
            false => Retired,
        }
    }
}

/// A block's phase, read without a lock by every fault.
#[derive(Debug)]
pub struct AtomicPhase(AtomicU8);

impl AtomicPhase {
    /// A block that begins in this phase.
    pub fn new(phase: Phase) -> AtomicPhase {
        AtomicPhase(AtomicU8::new(phase as u8))
    }

    /// The phase at this moment.
    #[inline]
    pub fn get(&self) -> Phase {
        Phase::from_bits(self.0.load(SeqCst))
    }

    /// May absent pages carry markers?
    #[inline]
    pub fn is_marked(&self) -> bool {
        self.get().may_have_markers()
    }

    /// Is it certain that nothing is missing, and that nothing will be?
    #[inline]
    pub fn is_closed(&self) -> bool {
        matches!(self.get(), Released | Closing)
    }

    /// Are the VMM's mapping and the alias registered with userfaultfd, and to stay so?
    #[inline]
    pub fn is_registered(&self) -> bool {
        matches!(self.get(), Unmarked | Marked)
    }

    /// Has the last slot gone?
    #[inline]
    pub fn is_retired(&self) -> bool {
        matches!(self.get(), Retired | Retiring)
    }

    /// Markers are about to be placed on absent pages; the block is open.
    pub fn mark(&self) {
        self.change(Phase::mark);
    }

    /// No absent page carries a marker any more.
    pub fn unmarked(&self) {
        self.change(Phase::unmarked);
    }

    /// From now on nothing may become missing.
    pub fn close(&self) {
        self.change(Phase::close);
    }

    /// Pages may be missing again.
    pub fn reopen(&self) {
        self.change(Phase::reopen);
    }

    /// The last slot is gone: threads that wait for the block's pages leave.
    pub fn retire(&self) {
        self.change(Phase::retire);
    }

    fn change(&self, transition: fn(Phase) -> Phase) {
        let next = |bits| Some(transition(Phase::from_bits(bits)) as u8);
        let _ = self.0.fetch_update(SeqCst, SeqCst, next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRANSITIONS: [fn(Phase) -> Phase; 5] =
        [Phase::mark, Phase::unmarked, Phase::close, Phase::reopen, Phase::retire];

    const ALL: [Phase; 6] = [Unmarked, Marked, Released, Closing, Retired, Retiring];

    #[test]
    fn phases_are_stored_as_numbers() {
        assert!(ALL.iter().all(|&phase| Phase::from_bits(phase as u8) == phase));
    }

    #[test]
    fn retired_blocks_stay_retired() {
        for phase in [Retired, Retiring] {
            for transition in TRANSITIONS {
                assert!(matches!(transition(phase), Retired | Retiring), "{phase:?}");
            }
        }
    }

    /// Closing, reopening and retiring keep what is known of markers; only `mark` and `unmarked`
    /// change it.
    #[test]
    fn only_two_transitions_change_markers() {
        for phase in ALL {
            for transition in [Phase::close, Phase::reopen, Phase::retire] {
                assert_eq!(transition(phase).may_have_markers(), phase.may_have_markers(), "{phase:?}");
            }
            assert!(phase.mark().may_have_markers());
            assert!(!phase.unmarked().may_have_markers());
        }
    }

    /// The life of a block under `poison-trap` whose fill ends, and whose fast path is turned on
    /// again.
    #[test]
    fn a_block_is_filled_released_and_marked_again() {
        let phase = AtomicPhase::new(Unmarked);
        let mut seen = Vec::new();
        let steps: [fn(&AtomicPhase); 6] = [
            AtomicPhase::mark,
            AtomicPhase::close,
            AtomicPhase::unmarked,
            AtomicPhase::mark,
            AtomicPhase::retire,
            AtomicPhase::unmarked,
        ];
        for step in steps {
            step(&phase);
            seen.push(phase.get());
        }
        assert_eq!(seen, [Marked, Closing, Released, Marked, Retiring, Retired]);
    }

    /// An end that fails, and the beginning of absence in ordinary memory.
    #[test]
    fn a_block_is_reopened() {
        let phase = AtomicPhase::new(Marked);
        phase.close();
        assert!(phase.is_closed() && phase.is_marked());
        phase.reopen();
        assert!(!phase.is_closed() && phase.is_marked());
        let phase = AtomicPhase::new(Released);
        phase.reopen();
        assert_eq!(phase.get(), Unmarked);
    }
}
