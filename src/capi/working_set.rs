//! Working set.

use super::boundary::{not_in_callback, with};
use super::vm::kvmfault_vm;
use crate::error::fail;
use std::ffi::c_int;

/// Records which pages are needed from now on, in which order: 1 begins anew, 0 ends it and forgets. Pages that readahead brings along are taken
/// down too, what a fill brings isn't. Each thread has room for a million faults; what comes after is left out. A fault costs a few nanoseconds more.
///
/// Returns 0; -EINVAL (`on`), -ENOMEM. Any thread; not from callbacks.
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

/// Writes what was recorded until now to the regular file `fd`, over what is in it, for `kvmfault_fill_options.working_set_fd` of the next restore
/// of the same snapshot; a few bytes a fault. Recording goes on.
///
/// Returns 0; -ENODATA if nothing is being recorded; -EBADF, -EINVAL (`fd`), -EACCES (`fd` is not open for writing), or the errno of writing, with an incomplete file that will be refused.
/// Any thread; not from callbacks.
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
