//! The built-in resolver: guest memory in a snapshot file.

use super::boundary::{self, clear_out, enter, put, with, Handle, Opaque};
use super::types::*;
use crate::error::{fail, Error};
use crate::resolve::file_source::{Bytes, FileRange, FileSource};
use std::ffi::{c_int, c_void};

impl Opaque for kvmfault_file_source {
    type Inner = FileSource;
    const NAME: &'static str = "source";
    const MAGIC: u64 = 0x6b76_6d66_7372_6365; // "kvmfsrce"
}

/// Most ranges that a source takes.
const MOST_RANGES: usize = 4096;

/// Opens a snapshot: `count` ranges of guest memory (all with the same `size`) in the regular file `fd`. Holes of the file are zero pages, without any I/O. The
/// file must not change while the source lives; the descriptor may be closed at once. It is used as it is given: no path is opened, and no permission but
/// the descriptor's own is needed. Where it can't be opened anew (no /proc, no permission) the search for holes moves its file position, which is back
/// where it was when this returns: no other thread or process may use the position meanwhile. Use the source as the resolver:
///
///     struct kvmfault_file_source *source;
///     kvmfault_file_source_new(fd, &range, 1, &source);
///     options.resolver = kvmfault_file_source_resolve;
///     options.opaque = source;
///     options.finalizer = kvmfault_file_source_finalize;
///
/// On success *source is the new handle; on an error it is NULL. Errors: -EINVAL (the message names it), -EBADF (`fd` is closed), -EACCES (it
/// is not open for reading), -ENOMEM. Any thread.
///
/// # Safety
/// The pointers are NULL or valid; `ranges` holds `count` elements, each of the size that the first one states.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_file_source_new(
    fd: c_int,
    ranges: *const kvmfault_file_range,
    count: usize,
    source: *mut *mut kvmfault_file_source,
) -> c_int {
    enter("kvmfault_file_source_new", || {
        clear_out(source, "source")?;
        if ranges.is_null() || count == 0 || count > MOST_RANGES {
            fail!(EINVAL, "ranges: must be 1 to {MOST_RANGES} elements, not {count} at {ranges:p}");
        }
        let stride = boundary::read(ranges, "ranges[0]").and_then(|_| boundary::stated_size(ranges))?;
        let mut list = Vec::with_capacity(count);
        for n in 0..count {
            let range = boundary::read(ranges.cast::<u8>().wrapping_add(n * stride).cast(), "ranges")?;
            let range: kvmfault_file_range = range;
            if range.size != stride {
                fail!(EINVAL, "ranges[{n}].size: is {}, but that of ranges[0] is {stride}", range.size);
            }
            list.push(FileRange { gpa: range.gpa, len: range.len, offset: range.offset });
        }
        put(source, Handle::expose(FileSource::new(fd, &list)?));
        Ok(0)
    })
}

/// The resolver of a snapshot file, for `kvmfault_vm_options.resolver`; `opaque` is the source. Installs the readahead window as far as the file
/// has it. Also callable from a resolver of the VMM's own, for part of its memory.
///
/// # Safety
/// As any resolver: called by the library, or with what it was called with.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_file_source_resolve(
    opaque: *mut c_void,
    vm: *mut kvmfault_vm,
    fault: *const kvmfault_fault,
) -> c_int {
    with("kvmfault_file_source_resolve", opaque.cast::<kvmfault_file_source>().cast_const(), |source| {
        if fault.is_null() {
            fail!(EINVAL, "fault: is NULL");
        }
        // SAFETY: not NULL: what the library passed to the resolver.
        let fault = unsafe { &*fault };
        // One piece, all data or all hole, as far as it goes.
        let bring = |gpa: u64, end: u64| {
            let (bytes, len) = source.find(gpa, end - gpa)?;
            let len = len / fault.len * fault.len;
            if len == 0 {
                fail!(EINVAL, "the page of {:#x} bytes at gpa {gpa:#x} is not in one piece in the snapshot", fault.len);
            }
            // SAFETY: what the library passed to the resolver, and bytes of the source's mapping.
            let result = unsafe {
                match bytes {
                    Bytes::At(address) => super::pages::kvmfault_pages_install(vm, gpa, address as *const c_void, len),
                    Bytes::Hole => super::pages::kvmfault_pages_zero(vm, gpa, len),
                }
            };
            match result {
                0 => Ok(len),
                e if e == -libc::EEXIST => Ok(len),
                // The file's own bytes could not be read: the disk failed, or the file was cut short.
                e if e == -libc::EFAULT => {
                    Err(Error::new(libc::EIO, format!("the snapshot can't be read for gpa {gpa:#x}")))
                }
                e => Err(Error::new(-e, "installing a page of the snapshot")),
            }
        };
        let end = fault.window_gpa + fault.window_len;
        let first = bring(fault.gpa, end)?;
        // The rest of the window is welcome, not needed: what can't be had stays absent.
        for (mut at, end) in [(fault.gpa + first, end), (fault.window_gpa, fault.gpa)] {
            while at < end {
                let Ok(len) = bring(at, end) else { break };
                at += len;
            }
        }
        Ok(KVMFAULT_RESOLVED)
    })
}

/// Frees a source; for `kvmfault_vm_options.finalizer`. The same as `kvmfault_file_source_free`, with a finalizer's argument.
///
/// # Safety
/// `opaque` is NULL or a source.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_file_source_finalize(opaque: *mut c_void) {
    Handle::free("kvmfault_file_source_finalize", opaque.cast::<kvmfault_file_source>(), |_| {});
}

/// Frees a source that no VM owns. NULL is allowed.
///
/// # Safety
/// `source` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_file_source_free(source: *mut kvmfault_file_source) {
    Handle::free("kvmfault_file_source_free", source, |_| {});
}
