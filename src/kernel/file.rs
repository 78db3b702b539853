//! Files that the VMM names by descriptor. The library uses the descriptor as it is: opening the
//! file anew (/proc/self/fd/N) needs a /proc, and permissions that a VMM in a jail has dropped.

use super::page::page_size;
use crate::error::{fail, Error, Result};
use std::fs::{File, Metadata};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

/// What the library needs a file for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// To read it.
    Read,
    /// To write it.
    Write,
}

/// A duplicate of a descriptor of any kind.
pub fn duplicate(fd: RawFd, name: &str) -> Result<File> {
    // SAFETY: F_DUPFD_CLOEXEC gives a new descriptor, which is ours alone, or -1 (EBADF for a bad
    // number).
    match unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) } {
        -1 => match Error::last_os("fcntl(F_DUPFD_CLOEXEC)") {
            e if e.errno == libc::EBADF => fail!(EBADF, "{name}: descriptor {fd} is not open"),
            e => Err(e.context(format!("{name}: descriptor {fd}"))),
        },
        // SAFETY: `copy` is a new descriptor, which is ours alone.
        copy => Ok(unsafe { File::from_raw_fd(copy) }),
    }
}

/// Is the descriptor an anonymous inode? KVM's VMs and vCPUs, userfaultfds and eventfds are; their
/// inodes have no file type.
pub fn is_anonymous(fd: RawFd) -> std::io::Result<bool> {
    // SAFETY: an all-zero stat is a valid value, and live during the call.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        match libc::fstat(fd, &mut stat) {
            0 => Ok(stat.st_mode & libc::S_IFMT == 0),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

/// A duplicate of the descriptor of a regular file, and the file's size. The file position is
/// shared with the VMM, so the library reads and writes at offsets only.
pub fn regular(fd: RawFd, name: &str, wanted: Use) -> Result<(File, u64)> {
    let file = duplicate(fd, name)?;
    let meta = metadata(&file, name)?;
    if !meta.is_file() {
        fail!(EINVAL, "{name}: must be a regular file; {fd} is {}", kind(&meta));
    }
    check_mode(&file, fd, name, wanted)?;
    Ok((file, meta.size()))
}

/// A duplicate of the descriptor of a regular file or a block device, open for reading, and its
/// size. No other kind of file has a size and can be read at any offset.
pub fn with_offsets(fd: RawFd, name: &str) -> Result<(File, u64)> {
    let file = duplicate(fd, name)?;
    let meta = metadata(&file, name)?;
    let is_device = meta.file_type().is_block_device();
    if !meta.is_file() && !is_device {
        let kind = kind(&meta);
        fail!(
            EINVAL,
            "{name}: must be a regular file or a block device; {fd} is {kind}, which has no bytes at offsets"
        );
    }
    check_mode(&file, fd, name, Use::Read)?;
    let size = if is_device { device_size(&file, name)? } else { meta.size() };
    Ok((file, size))
}

fn metadata(file: &File, name: &str) -> Result<Metadata> {
    file.metadata().map_err(|e| Error::from_io(&format!("{name}: fstat"), &e))
}

/// The kind of a file that isn't a regular one, for messages.
fn kind(meta: &Metadata) -> &'static str {
    match meta.mode() & libc::S_IFMT {
        libc::S_IFBLK => "a block device",
        libc::S_IFCHR => "a character device",
        libc::S_IFDIR => "a directory",
        libc::S_IFIFO => "a pipe",
        libc::S_IFSOCK => "a socket",
        _ => "not a file",
    }
}

/// BLKGETSIZE64, of linux/fs.h.
const BLKGETSIZE64: u64 = 0x8008_1272;

/// A block device's size in bytes. Seeking to the end would move the file position, which is shared
/// with the VMM, so that is done only where the ioctl is refused (by Landlock, for devices that are
/// opened under it).
fn device_size(file: &File, name: &str) -> Result<u64> {
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64, which is live. The descriptor is a block device's.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64 as _, &mut size) } == 0 {
        return Ok(size);
    }
    let position = Position::of(file)?;
    position
        .seek(0, libc::SEEK_END)?
        .ok_or_else(|| Error::new(libc::EINVAL, format!("{name}: a device without an end")))
}

/// Checks that the descriptor is open for what the library needs it for.
fn check_mode(file: &File, fd: RawFd, name: &str, wanted: Use) -> Result<()> {
    // SAFETY: F_GETFL takes no argument.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    let (refused, how) = match wanted {
        Use::Read => (libc::O_WRONLY, "reading"),
        Use::Write => (libc::O_RDONLY, "writing"),
    };
    if flags & libc::O_PATH != 0 || flags & libc::O_ACCMODE == refused {
        fail!(EACCES, "{name}: descriptor {fd} is not open for {how}");
    }
    Ok(())
}

/// The page size of a file in memory: tmpfs (also memfd) or hugetlbfs.
pub fn memory(fd: RawFd, name: &str) -> Result<u64> {
    let file = duplicate(fd, name)?;
    // SAFETY: an all-zero statfs is a valid value, and live during the call.
    let (done, fs) = unsafe {
        let mut fs: libc::statfs = std::mem::zeroed();
        (libc::fstatfs(file.as_raw_fd(), &mut fs), fs)
    };
    match fs.f_type {
        _ if done != 0 => Err(Error::last_os(&format!("{name}: fstatfs"))),
        libc::TMPFS_MAGIC => Ok(page_size()),
        libc::HUGETLBFS_MAGIC => Ok(fs.f_bsize as u64),
        _ => fail!(EINVAL, "{name}: is neither of tmpfs (memfd) nor of hugetlbfs; userfaultfd serves no other files"),
    }
}

/// Is the file one of hugetlbfs?
pub fn is_hugetlb(fd: RawFd) -> bool {
    // SAFETY: an all-zero statfs is a valid value, and lives during the call.
    unsafe {
        let mut fs: libc::statfs = std::mem::zeroed();
        libc::fstatfs(fd, &mut fs) == 0 && fs.f_type == libc::HUGETLBFS_MAGIC
    }
}

/// The first `len` bytes of a file, or all of them if it has fewer.
pub fn read_start(file: &File, len: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len as usize).map_err(|_| std::io::Error::from_raw_os_error(libc::ENOMEM))?;
    bytes.resize(len as usize, 0);
    let (done, error) = read_at(file, &mut bytes, 0);
    match error {
        Some(error) => Err(error),
        None => {
            bytes.truncate(done);
            Ok(bytes)
        }
    }
}

/// Reads from an offset on until `to` is full, the file ends (no error), or reading fails. Returns
/// how many bytes were read, also with an error. A single read may be short before the end: sysfs
/// reads a page at a time.
pub fn read_at(file: &File, to: &mut [u8], offset: u64) -> (usize, Option<std::io::Error>) {
    let mut done = 0;
    while done < to.len() {
        match file.read_at(&mut to[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return (done, Some(e)),
        }
    }
    (done, None)
}

/// Can the file be read at offsets? An error if not. Reads nothing.
pub fn check_reads(file: &File) -> std::io::Result<()> {
    file.read_at(&mut [], 0).map(drop)
}

/// The ranges of a file of `size` bytes that hold data, in order; all else is holes. Searching for
/// holes moves the file position, and Linux has no other call for it. So the file is opened anew
/// where that is possible; elsewhere the position is restored. Files that don't know their holes
/// count as data: block devices (a search fails with EINVAL), and some of procfs.
pub fn data(file: &File, size: u64) -> Result<Vec<Range<u64>>> {
    if file.metadata().is_ok_and(|meta| meta.file_type().is_block_device()) {
        return Ok(std::iter::once(0..size).collect());
    }
    match holes_left_out(file, size) {
        Err(e) if matches!(e.errno, libc::EINVAL | libc::ESPIPE | libc::EOPNOTSUPP) => {
            Ok(std::iter::once(0..size).collect())
        }
        other => other,
    }
}

fn holes_left_out(file: &File, size: u64) -> Result<Vec<Range<u64>>> {
    let anew = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok();
    let position = Position::of(anew.as_ref().unwrap_or(file))?;
    let (mut data, mut at) = (Vec::new(), 0);
    while let Some(start) = position.seek(at, libc::SEEK_DATA)? {
        let end = position.seek(start, libc::SEEK_HOLE)?.unwrap_or(size);
        data.push(start..end);
        at = end;
    }
    Ok(data)
}

/// A file's position, restored on drop.
struct Position<'a> {
    file: &'a File,
    before: u64,
}

impl Position<'_> {
    fn of(file: &File) -> Result<Position<'_>> {
        let before = seek(file, 0, libc::SEEK_CUR).map_err(|e| Error::from_io("lseek", &e))?;
        Ok(Position { file, before })
    }

    /// SEEK_DATA or SEEK_HOLE; None where there is no more.
    fn seek(&self, from: u64, whence: i32) -> Result<Option<u64>> {
        match seek(self.file, from, whence) {
            Ok(at) => Ok(Some(at)),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(e) => Err(Error::from_io("lseek", &e)),
        }
    }
}

impl Drop for Position<'_> {
    fn drop(&mut self) {
        let _ = seek(self.file, self.before, libc::SEEK_SET);
    }
}

/// lseek(2); std's doesn't know SEEK_DATA.
fn seek(file: &File, from: u64, whence: i32) -> std::io::Result<u64> {
    // SAFETY: lseek takes numbers only.
    match unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) } {
        at if at >= 0 => Ok(at as u64),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Also helpers for the tests of other rooms.
#[cfg(test)]
pub mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    /// A new file in tmpfs, without a name.
    pub fn shared(len: u64) -> File {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let path = format!("/dev/shm/kvmfault-test-{}-{}", std::process::id(), LAST.fetch_add(1, Relaxed));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn a_descriptor_must_be_open_for_what_it_is_wanted_for() {
        let file = shared(4096);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let [read_only, write_only] = [true, false].map(|r| File::options().read(r).write(!r).open(&path).unwrap());
        let errno = |file: &File, wanted| regular(file.as_raw_fd(), "fd", wanted).map_err(|e| e.errno).err();
        assert_eq!((errno(&read_only, Use::Read), errno(&write_only, Use::Write)), (None, None));
        let refused = Some(libc::EACCES);
        assert_eq!((errno(&read_only, Use::Write), errno(&write_only, Use::Read)), (refused, refused));
        assert_eq!(regular(-1, "fd", Use::Read).unwrap_err().errno, libc::EBADF);
        assert_eq!(regular(shared(8192).as_raw_fd(), "fd", Use::Read).unwrap().1, 8192);
    }

    #[test]
    fn a_search_for_holes_puts_the_position_back() {
        let file = shared(16 << 20);
        file.write_all_at(&[1], 8 << 20).unwrap();
        seek(&file, 77, libc::SEEK_SET).unwrap();
        {
            let position = Position::of(&file).unwrap();
            assert_eq!(position.seek(0, libc::SEEK_DATA).unwrap(), Some(8 << 20));
        }
        assert_eq!(seek(&file, 0, libc::SEEK_CUR).unwrap(), 77);
        assert_eq!(data(&file, 16 << 20).unwrap().len(), 1);
        assert_eq!(seek(&file, 0, libc::SEEK_CUR).unwrap(), 77);
    }
}
