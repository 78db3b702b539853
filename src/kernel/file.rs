//! Files that the VMM names by descriptor.

use crate::error::{fail, Error, Result};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

/// Opens the regular file behind a descriptor anew, with a position of its own; and its size.
pub fn reopen(fd: RawFd, name: &str, writable: bool) -> Result<(File, u64)> {
    let path = format!("/proc/self/fd/{fd}");
    // Looked at before it is opened: that could wait for ever (a pipe), or have effects (a device).
    let meta = std::fs::metadata(&path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::new(libc::EBADF, format!("{name}: descriptor {fd} is not open")),
        _ => Error::from_io(name, &e),
    })?;
    if !meta.is_file() {
        let kind = if meta.file_type().is_block_device() { "a block device" } else { "not a file" };
        fail!(EINVAL, "{name}: must be a regular file; {fd} is {kind}");
    }
    let file = File::options().read(!writable).write(writable).open(&path).map_err(|e| Error::from_io(name, &e))?;
    Ok((file, meta.size()))
}

/// lseek(2) with SEEK_DATA or SEEK_HOLE; None past the last.
pub fn seek(file: &File, from: u64, whence: i32) -> Result<Option<u64>> {
    // SAFETY: lseek takes numbers only.
    match unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) } {
        at if at >= 0 => Ok(Some(at as u64)),
        _ => match std::io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            e => Err(Error::from_io("lseek", &e)),
        },
    }
}

/// For tests everywhere.
#[cfg(test)]
pub mod tests {
    use std::fs::File;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    /// A file in tmpfs that nobody else knows.
    pub fn shared(len: u64) -> File {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let path = format!("/dev/shm/kvmfault-test-{}-{}", std::process::id(), LAST.fetch_add(1, Relaxed));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(len).unwrap();
        file
    }
}
