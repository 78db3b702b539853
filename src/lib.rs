//! libkvmfault: guest page faults served on the faulting vCPU's own thread. The C API is the product (`include/kvmfault.h`); this is the
//! map of the house behind it. Arrows go down only:
//!
//! | room | what is in it |
//! |---|---|
//! | `capi` | the C surface: checks, conversions, the panic boundary; no logic |
//! | `vcpu` | the exit loop: which exits are faults, kicks, in-slot MMIO |
//! | `vm` | slots as the VMM sets them, and what it does with pages |
//! | `mechanism` | how a fault comes to us: one file a way, and the table of them |
//! | `resolve` | who brings a page: the resolver's calls, reader threads, readahead, fill, working sets, the file source |
//! | `memory` | slots, page states, install and discard, waiting |
//! | `kernel` | what Linux defines: ioctls, the table of KVM ABIs, the probe |
//!
//! `unsafe` lives in `kernel` and `capi` only.

/// What a test needs of the machine. Without it the test ends, and `make test` counts it as skipped, for this reason.
#[cfg(test)]
macro_rules! needs {
    ($result:expr) => {
        match $result {
            Ok(found) => found,
            Err(why) => return eprintln!("skipped: {why}"),
        }
    };
}

pub(crate) mod capi;
pub(crate) mod error;
#[deny(clippy::undocumented_unsafe_blocks)]
pub(crate) mod kernel;
#[forbid(unsafe_code)]
pub(crate) mod mechanism;
#[forbid(unsafe_code)]
pub(crate) mod memory;
#[forbid(unsafe_code)]
pub(crate) mod resolve;
#[forbid(unsafe_code)]
pub(crate) mod stats;
#[forbid(unsafe_code)]
pub(crate) mod vcpu;
#[forbid(unsafe_code)]
pub(crate) mod vm;

/// What `bench/scaling.rs` measures: page states and waiting, which reach no guest memory.
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals {
    pub use crate::memory::pages::{Pages, State};
    pub use crate::memory::wait::{Sleeper, WAITS};
}
