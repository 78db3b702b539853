//! The built-in resolver: guest memory in a snapshot file. Pages are copied straight from a mapping
//! of the file, without a buffer between; holes are zero pages, without any I/O. A file that cannot
//! be mapped is read.

use crate::error::{fail, Error, Result};
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::mem::Mapping;
use crate::kernel::page::page_size;
use crate::kernel::{buffer, file};
use crate::memory::source::Source;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};

/// A range of guest memory, and its place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRange {
    /// The guest physical address.
    pub gpa: u64,
    /// The length in bytes.
    pub len: u64,
    /// The offset in the file.
    pub offset: u64,
}

/// Where the bytes of a page are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bytes {
    /// At this address of this process.
    At(Hva),
    /// At this offset of the file, for `FileSource::read`.
    InFile(u64),
    /// In a hole: they are zeros.
    Hole,
}

/// How the file's bytes are read.
#[derive(Debug)]
enum Access {
    Mapped(Mapping),
    /// By pread(2): for file systems without mmap, and processes that may map no more.
    Read(File),
}

/// A snapshot file.
#[derive(Debug)]
pub struct FileSource {
    access: Access,
    /// The file's data extents, sorted; all else is holes.
    data: Vec<Range<u64>>,
    /// The ranges, sorted by gpa.
    ranges: Vec<FileRange>,
}

impl FileSource {
    /// Maps the file, which must not change, or keeps it open. `fd` is not needed afterwards.
    pub fn new(fd: RawFd, ranges: &[FileRange]) -> Result<FileSource> {
        let (file, size) = file::with_offsets(fd, "fd")?;
        let mut ranges = ranges.to_vec();
        ranges.sort_by_key(|r| r.gpa);
        for r in &ranges {
            if r.len == 0 || (r.gpa | r.len | r.offset) % page_size() != 0 {
                fail!(
                    EINVAL,
                    "ranges: gpa {:#x}, len {:#x} and offset {:#x} must be multiples of {}, and len not 0",
                    r.gpa,
                    r.len,
                    r.offset,
                    page_size()
                );
            }
            if r.offset.checked_add(r.len).is_none_or(|end| end > size) || r.gpa.checked_add(r.len).is_none() {
                fail!(
                    EINVAL,
                    "ranges: gpa {:#x}, len {:#x}, offset {:#x}: the file has {size:#x} bytes",
                    r.gpa,
                    r.len,
                    r.offset
                );
            }
        }
        if let Some(pair) = ranges.windows(2).find(|p| p[0].gpa + p[0].len > p[1].gpa) {
            fail!(EINVAL, "ranges: gpa {:#x} is in two of them", pair[1].gpa);
        }
        let data = extents(&file, size)?;
        let access = match Mapping::of_file(file.as_raw_fd(), size.max(1)) {
            Ok(mapping) => Access::Mapped(mapping),
            Err(unmapped) => match file::check_reads(&file) {
                Ok(()) => Access::Read(file),
                Err(e) => return Err(unmapped.context(format!("fd: can't be read at offsets ({e}), nor mapped"))),
            },
        };
        Ok(FileSource { access, data, ranges })
    }

    /// Calls `install` for the page of `len` bytes at `gpa`, and for the rest of `window`, which
    /// holds the page, as far as the file has it. Only the page itself must be installed.
    pub fn resolve(
        &self,
        gpa: Gpa,
        len: u64,
        window: &Range<Gpa>,
        install: impl Fn(Gpa, u64, Source) -> Result<()>,
    ) -> Result<()> {
        let first = self.install_piece(gpa..window.end, len, &install)?;
        for (mut at, end) in [(gpa + first, window.end), (window.start, gpa)] {
            while at < end {
                let Ok(installed) = self.install_piece(at..end, len, &install) else { break };
                at += installed;
            }
        }
        Ok(())
    }

    /// Calls `install` for one piece from the start of a range on: whole pages of `page` bytes, all
    /// data or all hole. Returns the length of the piece.
    fn install_piece(
        &self,
        range: Range<Gpa>,
        page: u64,
        install: &impl Fn(Gpa, u64, Source) -> Result<()>,
    ) -> Result<u64> {
        let gpa = range.start;
        let (bytes, len) = self.find(gpa, range.end - gpa)?;
        let len = len / page * page;
        if len == 0 {
            fail!(EINVAL, "the page of {page:#x} bytes at gpa {gpa:#x} is not in one piece in the snapshot");
        }
        let install = |len, source| match install(gpa, len, source) {
            Err(e) if e.errno != libc::EEXIST => Err(e),
            _ => Ok(len),
        };
        let installed = match bytes {
            // A page that cannot be read fails the whole piece, and need not be the first.
            Bytes::At(address) => match install(len, Source::Copy(address)) {
                Err(e) if e.errno == libc::EFAULT && len > page => install(page, Source::Copy(address)),
                other => other,
            },
            Bytes::InFile(offset) => self.read(gpa, offset, len, page, |pages| {
                install(pages.len() as u64, Source::Copy(Hva(pages.as_ptr() as u64)))
            })?,
            Bytes::Hole => install(len, Source::Zero),
        };
        installed.map_err(|e| match e.errno {
            // The file's own bytes could not be read: the disk failed, or the file was cut short.
            libc::EFAULT => Error::new(libc::EIO, format!("the snapshot can't be read for gpa {gpa:#x}")),
            _ => e.context("installing a page of the snapshot"),
        })
    }

    /// Finds the longest piece from `gpa` on, up to `len` bytes, that is all data or all hole.
    pub fn find(&self, gpa: Gpa, len: u64) -> Result<(Bytes, u64)> {
        let after = self.ranges.partition_point(|r| r.gpa <= gpa.0);
        let range = after.checked_sub(1).map(|n| &self.ranges[n]).filter(|r| gpa.0 - r.gpa < r.len);
        let Some(range) = range else { fail!(ENXIO, "the snapshot has no page for gpa {gpa:#x}") };
        let within = gpa.0 - range.gpa;
        let (offset, len) = (range.offset + within, len.min(range.len - within));
        let next = self.data.partition_point(|d| d.end <= offset);
        Ok(match self.data.get(next) {
            Some(data) if data.start <= offset => {
                let bytes = match &self.access {
                    Access::Mapped(mapping) => Bytes::At(mapping.address() + offset),
                    Access::Read(_) => Bytes::InFile(offset),
                };
                (bytes, len.min(data.end - offset))
            }
            Some(data) => (Bytes::Hole, len.min(data.start - offset)),
            None => (Bytes::Hole, len),
        })
    }

    /// Reads the bytes at `offset`, which belong to `gpa`, into a buffer of the thread, and calls
    /// `work` with as many whole pages of `page` bytes as could be read, up to `len` bytes. Less
    /// than one page is an error.
    pub fn read<R>(&self, gpa: Gpa, offset: u64, len: u64, page: u64, work: impl FnOnce(&[u8]) -> R) -> Result<R> {
        let Access::Read(file) = &self.access else { fail!(EINVAL, "the snapshot is mapped") };
        let len = len.min(buffer::USUAL.max(page));
        buffer::with(len, |buffer| {
            let (done, error) = file::read_at(file, buffer, offset);
            let whole = done / page as usize * page as usize;
            match error {
                _ if whole > 0 => Ok(work(&buffer[..whole])),
                Some(e) => Err(Error::from_io(&format!("the snapshot can't be read for gpa {gpa:#x}: pread"), &e)),
                None => fail!(EIO, "the snapshot can't be read for gpa {gpa:#x}: it ends before {:#x}", offset + page),
            }
        })?
    }
}

/// The file's data extents, rounded outwards to pages.
fn extents(file: &File, size: u64) -> Result<Vec<Range<u64>>> {
    let mut data: Vec<Range<u64>> = Vec::new();
    for piece in file::data(file, size)? {
        let (first, last) = (piece.start / page_size() * page_size(), piece.end.next_multiple_of(page_size()));
        match data.last_mut() {
            Some(before) if before.end >= first => before.end = last,
            _ => data.push(first..last),
        }
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::mem;
    use std::os::unix::fs::FileExt;

    fn temporary() -> File {
        let path = std::env::temp_dir().join(format!(
            "kvmfault-test-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }

    #[test]
    fn data_and_holes_are_told_apart() {
        let file = temporary();
        file.set_len(64 * page_size()).unwrap();
        file.write_all_at(&vec![9; page_size() as usize], 16 * page_size()).unwrap();
        let range = FileRange { gpa: 0x4000_0000, len: 32 * page_size(), offset: 8 * page_size() };
        let source = FileSource::new(file.as_raw_fd(), &[range]).unwrap();
        let (bytes, len) = source.find(Gpa(0x4000_0000), 32 * page_size()).unwrap();
        assert_eq!((bytes, len), (Bytes::Hole, 8 * page_size()));
        let (bytes, len) = source.find(Gpa(0x4000_0000) + 8 * page_size(), page_size()).unwrap();
        let Bytes::At(address) = bytes else { panic!("{bytes:?}") };
        let mut byte = [0];
        mem::read(address, &mut byte).unwrap();
        assert_eq!((byte, len), ([9], page_size()));
        assert_eq!(
            source.find(Gpa(0x4000_0000) + 9 * page_size(), 64 * page_size()).unwrap(),
            (Bytes::Hole, 23 * page_size())
        );
        assert_eq!(source.find(Gpa(0x3fff_f000), page_size()).unwrap_err().errno, libc::ENXIO);
        assert_eq!(source.find(Gpa(0x4000_0000) + 32 * page_size(), page_size()).unwrap_err().errno, libc::ENXIO);
    }

    #[test]
    fn what_the_file_does_not_have_is_refused() {
        let file = temporary();
        file.set_len(4 * page_size()).unwrap();
        let new = |ranges: &[FileRange]| FileSource::new(file.as_raw_fd(), ranges).map_err(|e| e.errno).err();
        let range = |gpa, len, offset| FileRange { gpa, len, offset };
        assert_eq!(new(&[range(0, 4 * page_size(), 0)]), None);
        for bad in [
            range(0, 5 * page_size(), 0),
            range(0, page_size(), u64::MAX - page_size() + 1),
            range(1, page_size(), 0),
            range(0, 0, 0),
        ] {
            assert_eq!(new(&[bad]), Some(libc::EINVAL), "{bad:?}");
        }
        assert_eq!(new(&[range(0, 2 * page_size(), 0), range(page_size(), page_size(), 0)]), Some(libc::EINVAL));
    }
}
