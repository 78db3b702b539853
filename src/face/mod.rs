//! The crate's interface for Rust: types of its own and of std, and no logic. It shares all of the
//! inside with the C API.

mod fill;
mod kinds;
mod memslot;
mod pages;
mod probe;
mod resolver;
mod source;
mod vcpu;
mod vm;

pub use fill::{Fill, FillOptions, FillProgress};
pub use kinds::{Mechanism, MemoryKind};
pub use memslot::{Memslot, Region};
pub use pages::PageState;
pub use probe::{probe, Probe};
pub use resolver::{Access, Answer, Fault, Origin, Resolver};
pub use source::{FileRange, FileSource};
pub use vcpu::{Exit, Kicker, MemoryError, Vcpu, VcpuOptions};
pub use vm::{Vm, VmOptions};

pub use crate::error::{Error, Result};
pub use crate::kernel::host_memory::HostMemory;
pub use crate::stats::snapshot::Stats;
