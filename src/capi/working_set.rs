//! Working set: recording which pages a guest needs, to fetch them first the next time.

use super::boundary::{not_in_callback, with};
use super::vm::kvmfault_vm;
use crate::error::fail;
use std::ffi::c_int;

/// Starts (1) or ends (0) recording which pages are needed, in order. Starting drops what was
/// recorded before, and so does ending. Readahead pages are recorded; background-fill pages are
/// not. Each thread has room for a million faults; further ones are not recorded. Recording costs a
/// few nanoseconds a fault.
///
/// Returns: 0.
/// Errors:
///   -EINVAL: `on` is neither 0 nor 1.
///   -ENOMEM: no memory.
/// Threads: any.
/// Callbacks: refused with -EDEADLK.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_working_set_record(vm: *const kvmfault_vm, on: c_int) -> c_int {
    with("kvmfault_working_set_record", vm, |vm| {
        not_in_callback("kvmfault_working_set_record")?;
        if !(0..=1).contains(&on) {
            fail!(EINVAL, "on: {on} is neither 0 nor 1");
        }
        vm.record_working_set(on == 1).map(|()| 0)
    })
}

/// Writes what was recorded so far to the regular file `fd`, replacing its content, for
/// `kvmfault_fill_options.working_set_fd` of the next restore of the same snapshot. Takes a few
/// bytes a fault. Recording continues.
///
/// Returns: 0.
/// Errors:
///   -ENODATA: no recording is under way.
///   -EBADF: `fd` is closed.
///   -EINVAL: `fd` is not a regular file.
///   -EACCES: `fd` is not open for writing.
///   The errno of writing; the file is then incomplete, and will be refused.
/// Threads: any.
/// Callbacks: refused with -EDEADLK.
/// Lifetime: `fd` may be closed when this returns.
///
/// # Safety
/// `vm` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_working_set_save(vm: *const kvmfault_vm, fd: c_int) -> c_int {
    with("kvmfault_working_set_save", vm, |vm| {
        not_in_callback("kvmfault_working_set_save")?;
        vm.save_working_set(fd).map(|()| 0)
    })
}
