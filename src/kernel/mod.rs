//! What Linux defines, and nothing else: system calls, layouts, the table of KVM ABIs, and the probe that tells them apart.
//!
//! All `unsafe` of the library lives here and in `capi/`, one reason each. The functions are safe to call: what they are
//! given is checked by the kernel (an address that isn't mapped is EFAULT, not undefined behaviour).

pub mod abi;
pub mod alias;
pub mod buffer;
pub mod clock;
pub mod event;
pub mod file;
pub mod futex;
pub mod kvm;
pub mod mem;
pub mod probe;
pub mod process;
pub mod signal;
pub mod surroundings;
pub mod thread;
pub mod uffd;
pub mod unseen;
