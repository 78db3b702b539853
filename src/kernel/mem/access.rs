//! Accesses to this process's memory that fail instead of crashing, and what the kernel says of its
//! pages.

use crate::error::{fail, Error, Result};
use crate::kernel::address::Hva;
use crate::kernel::host_memory::Area;
use crate::kernel::page::page_size;
use crate::kernel::process;

/// MADV_DONTNEED_LOCKED (Linux 5.18), of linux/mman.h.
pub const MADV_DONTNEED_LOCKED: i32 = 24;
/// MADV_COLLAPSE (Linux 6.1).
pub const MADV_COLLAPSE: i32 = 25;

impl Area<'_> {
    /// madvise(2).
    pub fn advise(self, advice: i32, what: &str) -> Result<()> {
        // SAFETY: an area is memory of the library's, or was lent to it to change what is in its
        // pages: HostMemory::new.
        match unsafe { libc::madvise(self.hva().as_ptr(), self.len() as usize, advice) } {
            0 => Ok(()),
            _ => {
                let error = Error::last_os(what);
                let drops = matches!(advice, libc::MADV_DONTNEED | libc::MADV_REMOVE);
                Err(match error.errno {
                    libc::EINVAL if drops => {
                        Error::new(libc::EINVAL, format!("{error}; memory that is locked (mlock) can't be dropped"))
                    }
                    // shmem_fallocate in mm/shmem.c, hugetlbfs_punch_hole in fs/hugetlbfs/inode.c.
                    libc::EPERM if drops => Error::new(
                        libc::EPERM,
                        format!(
                            "{error}; the memory's file is sealed (F_SEAL_WRITE or F_SEAL_FUTURE_WRITE), and nothing can be dropped from it: make the file without that seal"
                        ),
                    ),
                    _ => error,
                })
            }
        }
    }

    /// Makes the memory accessible or not (mprotect(2)).
    pub fn protect(self, accessible: bool) -> Result<()> {
        let rights = if accessible { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
        // SAFETY: as in `advise`; pages that become inaccessible are guest memory, which Rust has
        // no reference to.
        match unsafe { libc::mprotect(self.hva().as_ptr(), self.len() as usize, rights) } {
            0 => Ok(()),
            _ => Err(Error::last_os("mprotect")),
        }
    }

    /// Writes to the area's beginning, as far as it goes; EFAULT where a plain store would crash.
    pub fn write(self, bytes: &[u8]) -> Result<()> {
        let bytes = &bytes[..bytes.len().min(self.len() as usize)];
        // SAFETY: as in `advise`.
        unsafe { write(self.hva(), bytes) }
    }
}

/// Has the kernel fault memory in for reading, as loads would (MADV_POPULATE_READ, Linux 5.14).
pub fn populate_read(hva: Hva, len: u64) -> Result<()> {
    // SAFETY: no byte changes, whatever is there: it is what a load does, but an error instead of a
    // crash.
    match unsafe { libc::madvise(hva.as_ptr(), len as usize, libc::MADV_POPULATE_READ) } {
        0 => Ok(()),
        _ => Err(Error::last_os("madvise(MADV_POPULATE_READ)")),
    }
}

/// Reads this process's memory; EFAULT where a plain load would crash. Waits where userfaultfd
/// makes a load wait.
pub fn read(hva: Hva, bytes: &mut [u8]) -> Result<()> {
    // SAFETY: nothing but `bytes` is written, which is a live buffer.
    unsafe { transfer(hva, bytes.as_mut_ptr(), bytes.len(), false) }
}

/// Writes this process's memory; EFAULT where a plain store would crash.
///
/// # Safety
/// The memory at `hva`, if there is any, may be written: Rust has no reference to it.
pub unsafe fn write(hva: Hva, bytes: &[u8]) -> Result<()> {
    // SAFETY: the caller's promise; `bytes` is only read.
    unsafe { transfer(hva, bytes.as_ptr().cast_mut(), bytes.len(), true) }
}

/// # Safety
/// `local` is a buffer of `len` bytes. The one that is written, `local` or (to `store`) the memory
/// at `hva`, may be.
unsafe fn transfer(hva: Hva, local: *mut u8, len: usize, store: bool) -> Result<()> {
    let local = libc::iovec { iov_base: local.cast(), iov_len: len };
    let remote = libc::iovec { iov_base: hva.as_ptr(), iov_len: len };
    let pid = process::id()?;
    // SAFETY: the caller's promise; the kernel checks the remote address.
    let done = unsafe {
        if store {
            libc::process_vm_writev(pid, &local, 1, &remote, 1, 0)
        } else {
            libc::process_vm_readv(pid, &local, 1, &remote, 1, 0)
        }
    };
    match done {
        n if n == len as isize => Ok(()),
        n if n < 0 => Err(Error::last_os(if store { "process_vm_writev" } else { "process_vm_readv" })),
        _ => fail!(EFAULT, "only part of guest memory at hva {hva:#x} is accessible"),
    }
}

/// Is the page at `hva` broken (madvise(2), EHWPOISON)? Before MADV_POPULATE_READ (Linux 5.14) an
/// inaccessible page can't be told from a broken one.
pub fn is_poisoned(hva: Hva, page: u64) -> bool {
    match populate_read(hva, 0) {
        Ok(()) => matches!(populate_read(hva, page), Err(e) if e.errno == libc::EHWPOISON),
        Err(_) => matches!(read(hva, &mut [0]), Err(e) if e.errno == libc::EFAULT),
    }
}

/// Whether each page has content, as far as mincore(2) shows it: mapped, or in the page cache (of
/// hugetlb it shows only what is mapped).
pub fn resident(hva: Hva, len: u64) -> Result<Vec<bool>> {
    let mut resident = vec![0u8; len.div_ceil(page_size()) as usize];
    // SAFETY: mincore writes one byte a page, for which there is room.
    match unsafe { libc::mincore(hva.as_ptr(), len as usize, resident.as_mut_ptr()) } {
        0 => Ok(resident.iter().map(|r| r & 1 != 0).collect()),
        _ => Err(Error::last_os("mincore")),
    }
}

/// The first page that has content, as far as mincore(2) shows it: see `resident`.
pub fn first_resident(hva: Hva, len: u64) -> Result<Option<Hva>> {
    const CHUNK: u64 = 1 << 16; // pages a call
    let mut resident = vec![0u8; len.div_ceil(page_size()).min(CHUNK) as usize];
    let mut at = hva;
    while at < hva + len {
        let pages = (hva + len - at).div_ceil(page_size()).min(CHUNK);
        // SAFETY: mincore writes one byte a page, for which there is room.
        if unsafe { libc::mincore(at.as_ptr(), (pages * page_size()) as usize, resident.as_mut_ptr()) } != 0 {
            return Err(Error::last_os("mincore"));
        }
        if let Some(page) = resident[..pages as usize].iter().position(|r| r & 1 != 0) {
            return Ok(Some(at + page as u64 * page_size()));
        }
        at += pages * page_size();
    }
    Ok(None)
}
