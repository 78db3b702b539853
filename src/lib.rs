//! Guest page faults of KVM virtual machines, served on the faulting vCPU's own thread.
//!
//! A [`Vm`] whose memory is absent at first runs at once: when the guest touches an absent page,
//! the VMM's [`Resolver`] is called on that vCPU's thread, installs the page ([`Vm::install`]), and
//! the guest goes on. That is what post-copy migration and lazy snapshot restore need. How the
//! fault comes to the library, a [`Mechanism`] decides, which depends on the kernel: [`probe`]
//! tells what works.
//!
//! In short: open `/dev/kvm` and create a VM, by whichever crate; attach to it ([`Vm::options`])
//! with a resolver; set memslots ([`Vm::set_memslot`]) on memory that is lent to the library
//! ([`HostMemory::new`], the only `unsafe` function); attach to each vCPU on its thread
//! ([`Vcpu::options`]), and call [`Vcpu::run`] in a loop.
//!
//! ```no_run
//! use kvmfault::{Exit, FileRange, FileSource, HostMemory, Memslot, Vcpu, Vm};
//! use std::os::fd::{AsFd, BorrowedFd};
//!
//! /// Runs the first vCPU of a VM on a snapshot file, which is read as the guest needs pages.
//! fn restore(
//!     kvm: BorrowedFd,
//!     vm: BorrowedFd,
//!     vcpu: BorrowedFd,
//!     snapshot: &std::fs::File,
//! ) -> Result<(), kvmfault::Error> {
//!     const GPA: u64 = 0x4000_0000;
//!     const LEN: usize = 256 << 20;
//!     let range = FileRange { gpa: GPA, len: LEN as u64, offset: 0 };
//!     let source = FileSource::new(snapshot.as_fd(), &[range])?;
//!     let vm = Vm::options(kvm, vm).readahead(64).attach(source)?;
//!
//!     let start: *mut u8 = map_shared_memory(LEN);
//!     // SAFETY: the mapping is never undone, and no reference to it is ever made.
//!     let memory = unsafe { HostMemory::new(start, LEN) };
//!     vm.set_memslot(&Memslot::new(1, GPA, &memory))?;
//!
//!     let vcpu = Vcpu::options(vcpu).attach(&vm)?;
//!     loop {
//!         match vcpu.run()? {
//!             Exit::Pass => return Ok(()), // an exit that is not the library's: see kvm_run
//!             Exit::MemoryError(error) => panic!("{error:?}"),
//!             _ => {}
//!         }
//!     }
//! }
//! # fn map_shared_memory(_: usize) -> *mut u8 { unimplemented!() }
//! ```
//!
//! A whole program is `examples/restore.rs`. The functions' behaviour is that of the C API
//! (`include/kvmfault.h`), which says more about each.
//!
//! Nothing here is a type of another crate than std: a VMM may use any version of kvm-ioctls or
//! kvm-bindings, or none. Where a function is "not from callbacks", it fails with `EDEADLK` when a
//! [`Resolver`] or a fill's progress callback calls it. In a child of fork(2), functions fail with
//! `ECHILD`.

// Where the code is. Arrows go down only:
//
// face, capi    what Rust and C programs see: checks and conversions, no logic
// vcpu          the exit loop: which exits are faults, kicks, accesses that KVM emulates
// vm            memslots as the VMM sets them, and what it does with pages
// mechanism     how a fault comes to the library: a file for each way, and the table of them
// resolve       who fetches a page: resolver calls, reader threads, readahead, fill, working sets
// memory        slots, page states, install and discard, waiting
// kernel        what Linux defines: ioctls, the table of KVM ABIs, the probe; and lent memory
//
// `unsafe` is in `kernel` and `capi` only. Nothing but `face` is public (tests/public_items.rs).

#![warn(missing_docs)]

/// What a test needs of the machine. Without it the test ends, and `make test` counts it as
/// skipped, for this reason.
#[cfg(test)]
macro_rules! needs {
    ($result:expr) => {
        match $result {
            Ok(found) => found,
            Err(why) => return eprintln!("skipped: {why}"),
        }
    };
}

// Its comments are the C header's: their examples are C.
#[cfg(not(doctest))]
mod capi;
#[cfg(doctest)]
mod compile_fail;
mod error;
#[forbid(unsafe_code)]
mod face;
#[deny(clippy::undocumented_unsafe_blocks)]
mod kernel;
#[forbid(unsafe_code)]
mod mechanism;
#[forbid(unsafe_code)]
mod memory;
#[forbid(unsafe_code)]
mod resolve;
#[forbid(unsafe_code)]
mod stats;
#[forbid(unsafe_code)]
mod vcpu;
#[forbid(unsafe_code)]
mod vm;

pub use face::*;

/// What `bench/scaling.rs` measures: page states and waiting, which reach no guest memory.
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals {
    pub use crate::kernel::address::Hva;
    pub use crate::memory::pages::{Pages, State};
    pub use crate::memory::wait::{Sleeper, WAITS};
}
