//! File source: the built-in resolver, for guest memory in a snapshot file.

use super::boundary::{clear_out, enter, put, with, Handle, Opaque};
use super::pages::{kvmfault_pages_install, kvmfault_pages_zero};
use super::resolver::{kvmfault_fault, KVMFAULT_RESOLVED};
use super::structs;
use super::vm::kvmfault_vm;
use crate::error::{fail, Error, Result};
use crate::kernel::address::Gpa;
use crate::kernel::page::page_size;
use crate::memory::source::Source;
use crate::resolve::file_source::{FileRange, FileSource};
use std::ffi::{c_int, c_void};

/// A snapshot file that guest memory is restored from. Opaque.
pub struct kvmfault_file_source {
    _private: [u8; 0],
}

/// Where a range of guest memory lies in the snapshot file. Start from KVMFAULT_FILE_RANGE_INIT.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvmfault_file_range {
    /// Set by KVMFAULT_FILE_RANGE_INIT.
    pub size: usize,
    /// Guest physical address; a multiple of 4096.
    pub gpa: u64,
    /// Length in bytes; a multiple of 4096.
    pub len: u64,
    /// Offset in the file in bytes; a multiple of 4096.
    pub offset: u64,
}

impl Opaque for kvmfault_file_source {
    type Inner = FileSource;
    const NAME: &'static str = "source";
    const MAGIC: u64 = 0x6b76_6d66_7372_6365; // "kvmfsrce"
}

/// The largest number of ranges that a source takes.
const MOST_RANGES: usize = 4096;

/// Opens a snapshot: `count` ranges of guest memory (1 to 4096, all with the same `size`) in `fd`,
/// a regular file or a block device. Holes of a file are pages of zeros, without any I/O; a block
/// device has no holes. To use the source as the resolver of a VM:
///
///     struct kvmfault_file_source *source;
///     kvmfault_file_source_new(fd, &range, 1, &source);
///     options.resolver = kvmfault_file_source_resolve;
///     options.opaque = source;
///     options.finalizer = kvmfault_file_source_finalize;
///
/// `fd` is used as it is given: no path is opened, and no permission but its own is needed. If it
/// can't be opened anew (no /proc, no permission), the search for holes moves its file position,
/// which is restored before this returns: no other thread or process may use the position
/// meanwhile.
///
/// The file is mapped. If mmap(2) fails, whatever the reason (a file system without it, or a limit
/// of the process such as RLIMIT_AS), the source keeps a duplicate of `fd` and reads pages with
/// pread(2) into a buffer of each thread that serves faults: of 1 MiB, or of one page of the
/// guest's memory if that is larger. That costs one more copy, and one more system call for each
/// MiB or piece of the file. What has no bytes at offsets is refused: a pipe, a socket, a
/// directory, a character device.
///
/// A page whose bytes can't be read stays absent, and its fault ends with an error: -EIO if the
/// file is shorter than it was, or pread's errno.
///
/// Returns: 0, and *source is the new handle; on an error *source is NULL.
/// Errors:
///   -EINVAL: an argument, which the message names; or `fd` has no bytes at offsets.
///   -EBADF: `fd` is closed.
///   -EACCES: `fd` is not open for reading.
///   -ENOMEM: no memory.
/// Threads: any.
/// Callbacks: allowed.
/// Lifetime: free it with `kvmfault_file_source_free`, or give `kvmfault_file_source_finalize` to
///   the VM. `fd` may be closed when this returns; the file must not change while the source lives.
///
/// # Safety
/// The pointers are NULL or valid; `ranges` holds `count` elements, each of the size that the first
/// one states.
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
        let list = structs::read_array(ranges, count, "ranges")?;
        let list: Vec<_> = list.iter().map(|r| FileRange { gpa: r.gpa, len: r.len, offset: r.offset }).collect();
        put(source, Handle::expose(FileSource::new(fd, &list)?));
        Ok(0)
    })
}

/// The resolver of a snapshot file, for `kvmfault_vm_options.resolver`; `opaque` is the source.
/// Installs the readahead window as far as the file has it. A resolver of the VMM's own may call it
/// for part of its memory.
///
/// Returns: KVMFAULT_RESOLVED, as a resolver does.
/// Errors:
///   -EIO: the page's bytes can't be read.
///   -ENXIO: no range of the source holds the page.
///   -EINVAL: `fault` is not one page inside its window, or the file doesn't have the page in one
///     piece.
///   The errno of pread(2), or of `kvmfault_pages_install`.
/// Threads: any.
/// Callbacks: allowed; it is a resolver.
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
        let fault = checked(structs::read(fault, "fault")?)?;
        if vm.is_null() {
            fail!(EINVAL, "vm: is NULL");
        }
        let install = |Gpa(gpa), len, from: Source| {
            // SAFETY: `vm` is what the library passed to the resolver; the kernel copies what the
            // source has.
            let result = unsafe {
                match from {
                    Source::Copy(address) => kvmfault_pages_install(vm, gpa, address.as_ptr(), len),
                    _ => kvmfault_pages_zero(vm, gpa, len),
                }
            };
            match result {
                0 => Ok(()),
                errno => Err(Error::new(-errno, "kvmfault_pages_install")),
            }
        };
        let window = Gpa(fault.window_gpa)..Gpa(fault.window_gpa + fault.window_len);
        source.resolve(Gpa(fault.gpa), fault.len, &window, install)?;
        Ok(KVMFAULT_RESOLVED)
    })
}

/// Checks a fault: a resolver of the VMM's own may pass one that it has made itself.
fn checked(fault: kvmfault_fault) -> Result<kvmfault_fault> {
    let kvmfault_fault { gpa, len, window_gpa, window_len, .. } = fault;
    if len < page_size() || !len.is_power_of_two() {
        fail!(EINVAL, "fault->len: {len:#x} is not a power of two from {} on", page_size());
    }
    if gpa % len != 0 || gpa.checked_add(len).is_none() {
        fail!(EINVAL, "fault->gpa: {gpa:#x} is not the address of a page of {len:#x} bytes");
    }
    let holds_it = window_gpa <= gpa && gpa - window_gpa < window_len;
    if !holds_it || (window_gpa | window_len) % len != 0 || window_gpa.checked_add(window_len).is_none() {
        fail!(
            EINVAL,
            "fault->window_gpa: [{window_gpa:#x}, +{window_len:#x}) are not whole pages of {len:#x} bytes with {gpa:#x} among them"
        );
    }
    Ok(fault)
}

/// Frees a source, as a finalizer for `kvmfault_vm_options.finalizer`; `opaque` is the source. For
/// the rest it is `kvmfault_file_source_free`.
///
/// Threads: any.
/// Callbacks: allowed; it is a finalizer.
///
/// # Safety
/// `opaque` is NULL or a source.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_file_source_finalize(opaque: *mut c_void) {
    Handle::free("kvmfault_file_source_finalize", opaque.cast::<kvmfault_file_source>(), |_| {});
}

/// Frees a source that no VM owns. NULL is allowed.
///
/// Threads: any.
/// Callbacks: allowed.
/// Lifetime: calls of `kvmfault_file_source_resolve` that are under way finish with it; later ones
///   return -EBADF.
///
/// # Safety
/// `source` is NULL or a handle of this library.
#[no_mangle]
pub unsafe extern "C" fn kvmfault_file_source_free(source: *mut kvmfault_file_source) {
    Handle::free("kvmfault_file_source_free", source, |_| {});
}
