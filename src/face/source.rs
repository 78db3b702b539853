//! The built-in resolver: guest memory in a snapshot file.

use super::resolver::{Answer, Fault, Resolver};
use super::vm::Vm;
use crate::error::Result;
use crate::resolve::file_source;
use std::os::fd::{AsRawFd, BorrowedFd};

pub use crate::resolve::file_source::FileRange;

/// A snapshot of guest memory in a regular file or a block device, as a [`Resolver`]. Holes of a
/// file are pages of zeros, without any I/O.
///
/// The file must not change while the source lives. It is mapped; where that is not possible it is
/// read with pread(2). `EIO` is the error of a page whose bytes can't be read.
///
/// ```no_run
/// # use std::os::fd::BorrowedFd;
/// # fn descriptors() -> (BorrowedFd<'static>, BorrowedFd<'static>) { unimplemented!() }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let (kvm, vm) = descriptors();
/// use kvmfault::{FileRange, FileSource, Vm};
/// use std::os::fd::AsFd;
///
/// let snapshot = std::fs::File::open("memory.snapshot")?;
/// let range = FileRange { gpa: 0x4000_0000, len: 1 << 30, offset: 0 };
/// let source = FileSource::new(snapshot.as_fd(), &[range])?;
/// let vm = Vm::options(kvm, vm).readahead(64).attach(source)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct FileSource(file_source::FileSource);

impl FileSource {
    /// Where ranges of guest memory are in the file. `EINVAL` if they overlap, aren't multiples of
    /// 4096, or are not in the file; `EACCES` if `file` is not open for reading. It isn't needed
    /// afterwards.
    pub fn new(file: BorrowedFd<'_>, ranges: &[FileRange]) -> Result<FileSource> {
        file_source::FileSource::new(file.as_raw_fd(), ranges).map(FileSource)
    }
}

impl Resolver for FileSource {
    fn resolve(&self, vm: &Vm, fault: &Fault<'_>) -> Answer {
        let fault = fault.inner();
        let resolved = vm.inner().and_then(|vm| {
            self.0.resolve(fault.gpa, fault.len, &fault.window, |gpa, len, source| vm.install(gpa, len, source))
        });
        resolved.into()
    }
}
