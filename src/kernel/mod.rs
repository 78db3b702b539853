//! What Linux defines, and nothing else: system calls, layouts, the table of KVM ABIs, and the
//! probe that tells them apart.
//!
//! All `unsafe` of the library lives here and in `capi/`, one reason each. Functions that are not
//! marked so are safe to call: those that change memory take an [`Area`](host_memory::Area), and
//! those that read it have the kernel check the address (EFAULT, not undefined behaviour).
//!
//! # What an architecture provides
//! `arch` is the room of the architecture that the library is built for (`x86_64/`, `aarch64/`),
//! and the only place in this room where it is named. It provides:
//!
//! - `page_size()`: the size of a page, at no cost where the architecture has only one
//! - `WholePage`, `WholePage::zeroed()`: a type as large, and as aligned, as the largest page, and
//!   a value of zeros
//! - `ADDRESSES`: where a process's addresses end
//! - `ABI_V2`: the row of the ABI table that differs between architectures
//! - `KVM_RUN_READS_EXIT_REASON`: whether `kvm_run.exit_reason` is an input of KVM_RUN, too
//! - `space(flags)`: the address space of an exit, by `kvm_run.flags`
//! - `vm_type(check_extension)`: the argument of KVM_CREATE_VM for a scratch VM
//! - `PROBE_CODE`, `PROBE_END`, `start_probe_guest(vm, vcpu, code, data)`: a guest that loads one
//!   byte, the exit that ends it, and how a vCPU is set up for it
//! - `two_dimensional_paging()`, `PAGING_NAME`, `PAGING_REMEDY`: whether the hardware walks guest
//!   page tables, what that is called, and what turns it on
//! - `check_guest(vcpu)`: whether a vCPU's guest can run with markers in its memory
//! - `areas(vcpu)`: the guest memory that KVM itself accesses for a vCPU
//! - `exit_on_area_msrs(vm, on)`: makes a guest's registration of such an area exit; an error where
//!   there is no such exit, as `HAS_AREA_MSRS` says
//!
//! and in `impl VcpuFd` and `impl Run` what its own `vcpu` room uses besides (registers and exits
//! that only it has).

#[cfg(not(target_pointer_width = "64"))]
compile_error!("libkvmfault needs a 64-bit target: page states and guest addresses are 64-bit words");

#[cfg(target_endian = "big")]
compile_error!(
    "libkvmfault needs a little-endian target: guests' registers, page tables and instructions are read as such"
);

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
compile_error!(
    "libkvmfault is not made for this target. It needs Linux with KVM, and for an architecture the rooms src/kernel/ARCH and \
     src/vcpu/ARCH, with what the documentation of src/kernel/mod.rs and src/vcpu/mod.rs lists: page size, addresses, the \
     probe's guest, what KVM itself accesses, and how emulated accesses are completed. See \"To add an architecture\" in \
     docs/architecture.md."
);

pub mod abi;
pub mod address;
pub mod alias;
pub mod buffer;
pub mod clock;
pub mod event;
pub mod file;
pub mod futex;
pub mod host_memory;
pub mod kvm;
pub mod mem;
pub mod page;
pub mod probe;
pub mod process;
pub mod signal;
pub mod surroundings;
pub mod thread;
pub mod uffd;
pub mod unseen;

#[cfg(target_arch = "aarch64")]
pub mod aarch64;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;
#[cfg(target_arch = "aarch64")]
pub use self::aarch64 as arch;
#[cfg(target_arch = "x86_64")]
pub use self::x86_64 as arch;
