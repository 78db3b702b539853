//! Mappings that the library makes.

use crate::error::{Error, Result};
use crate::kernel::address::Hva;
use crate::kernel::file;
use crate::kernel::host_memory::Area;
use crate::kernel::page::page_size;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicU64;

const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// A mapping that this library made; unmapped on drop. None is locked, whatever the process does
/// with its own memory (mlockall(2)).
#[derive(Debug)]
pub struct Mapping {
    address: Hva,
    len: u64,
}

impl Mapping {
    /// Anonymous zeroed memory, not reserved in advance: only touched pages cost anything.
    pub fn anonymous(len: u64) -> Result<Mapping> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        Mapping::grown(len, prot, PRIVATE, -1, "mmap of anonymous memory")
    }

    /// Zeros to read, which take no memory: the kernel maps its page of zeros everywhere.
    pub fn zeros(len: u64) -> Result<Mapping> {
        Mapping::grown(len, libc::PROT_READ, PRIVATE, -1, "mmap of zeros")
    }

    /// A shared mapping of `fd`.
    pub fn shared(fd: RawFd, offset: u64, len: u64, writable: bool) -> Result<Mapping> {
        let prot = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        Mapping::map(0, len, prot, libc::MAP_SHARED, fd, offset, "mmap of a shared mapping")
    }

    /// A readable mapping of a file of `len` bytes.
    pub fn of_file(fd: RawFd, len: u64) -> Result<Mapping> {
        // A hugetlb mapping can't grow.
        match file::is_hugetlb(fd) {
            true => Mapping::shared(fd, 0, len, false),
            false => Mapping::grown(len, libc::PROT_READ, libc::MAP_SHARED, fd, "mmap of a file"),
        }
    }

    /// A mapping that the process's mlockall(MCL_FUTURE) doesn't lock, and that its RLIMIT_MEMLOCK
    /// doesn't count: one page, which is unlocked and then grown. The kernel locks, fills and
    /// counts a mapping when it is made; one that grows keeps its properties.
    fn grown(len: u64, prot: i32, flags: i32, fd: RawFd, what: &str) -> Result<Mapping> {
        let first = Mapping::map(0, page_size(), prot, flags, fd, 0, what)?;
        if len <= page_size() {
            return Ok(first);
        }
        // SAFETY: the page is ours, and nothing refers to it. It moves to a range that the kernel
        // picks, or grows into an unused one.
        let address =
            unsafe { libc::mremap(first.address.as_ptr(), page_size() as usize, len as usize, libc::MREMAP_MAYMOVE) };
        if address == libc::MAP_FAILED {
            let error = Error::last_os("mremap of a mapping to its length");
            drop(first);
            // A driver's mapping may not grow.
            return match error.errno {
                libc::EFAULT | libc::EINVAL => Mapping::map(0, len, prot, flags, fd, 0, what),
                _ => Err(error.context(what)),
            };
        }
        std::mem::forget(first);
        Ok(Mapping { address: Hva(address as u64), len })
    }

    /// A mapping of the whole length at once. It is made inaccessible, because mlockall(MCL_FUTURE)
    /// would fill it, then unlocked, then made accessible.
    pub(super) fn map(at: u64, len: u64, prot: i32, flags: i32, fd: RawFd, offset: u64, what: &str) -> Result<Mapping> {
        // SAFETY: without MAP_FIXED the kernel picks an unused range; nothing that exists is
        // touched.
        let address = unsafe { libc::mmap(at as *mut _, len as usize, libc::PROT_NONE, flags, fd, offset as i64) };
        if address == libc::MAP_FAILED {
            return Err(Error::last_os(what));
        }
        let mapping = Mapping { address: Hva(address as u64), len };
        mapping.open(0, len, prot, what)?;
        Ok(mapping)
    }

    /// Makes a part that is still inaccessible accessible, and not locked.
    fn open(&self, at: u64, len: u64, prot: i32, what: &str) -> Result<()> {
        let address = (self.address + at).as_ptr();
        // SAFETY: the range is ours, and nothing refers to it.
        let done = unsafe {
            libc::munlock(address, len as usize);
            prot == libc::PROT_NONE || libc::mprotect(address, len as usize, prot) == 0
        };
        match done {
            true => Ok(()),
            false => Err(Error::last_os("mprotect").context(what)),
        }
    }

    /// Inaccessible room for a mapping of `len` bytes. Its address and `like` are equal modulo
    /// `align`, so that huge pages fit in both alike.
    pub fn room(len: u64, like: Hva, align: u64) -> Result<Mapping> {
        let mut room = Mapping::grown(len + align, libc::PROT_NONE, PRIVATE, -1, "mmap of room for a mapping")?;
        let before = like.wrapping_sub(room.address) % align;
        drop(room.split_off(before + len));
        Ok(room.split_off(before))
    }

    /// Cuts off what begins at an offset, as a mapping of its own.
    fn split_off(&mut self, offset: u64) -> Mapping {
        let rest = Mapping { address: self.address + offset, len: self.len - offset };
        self.len = offset;
        rest
    }

    /// Replaces a part by a shared mapping of `fd`. It reserves no huge pages: those that the VMM's
    /// mapping has reserved belong to the file and serve this mapping too, and a VMM that maps with
    /// MAP_NORESERVE may have more memory than the pool has pages.
    pub fn fill_from_file(&mut self, at: u64, len: u64, fd: RawFd, offset: u64) -> Result<()> {
        assert!(at % page_size() == 0 && at + len <= self.len);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let to = self.address + at;
        // SAFETY: what is replaced is ours, and Rust holds no reference to it (`self` is borrowed
        // exclusively).
        let done = unsafe { libc::mmap(to.as_ptr(), len as usize, libc::PROT_NONE, flags, fd, offset as i64) };
        self.filled(done, "mmap of a shared mapping")?;
        self.open(at, len, prot, "mmap of a shared mapping")
    }

    /// Replaces a part by a second mapping of shared memory, which is one mapping, without knowing
    /// its file: mremap(2) with an old size of 0. The kernel does this for shared mappings only,
    /// and not for hugetlb.
    pub fn fill_from_mapping(&mut self, at: u64, memory: Area<'_>) -> Result<()> {
        let (hva, len) = (memory.hva(), memory.len());
        assert!(at % page_size() == 0 && at + len <= self.len);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: with an old size of 0 the old mapping stays as it is; what is replaced is ours,
        // and Rust holds no reference to it (`self` is borrowed exclusively).
        let done =
            unsafe { libc::mremap(hva.as_ptr(), 0, len as usize, flags, (self.address + at).as_ptr::<libc::c_void>()) };
        self.filled(done, "mremap to a second mapping")
    }

    fn filled(&mut self, result: *mut libc::c_void, what: &str) -> Result<()> {
        if result != libc::MAP_FAILED {
            return Ok(());
        }
        let error = Error::last_os(what);
        // The kernel may have made a hole before it failed, and another thread may have mapped
        // something there since: so nothing of it is ever unmapped.
        self.len = 0;
        Err(error)
    }

    /// Its first address.
    pub fn address(&self) -> Hva {
        self.address
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Undoes the locking of new mappings (mlockall(2)) and of duplicates of locked ones
    /// (mlock(2)): locked pages can't be dropped.
    pub fn unlock(&self) {
        // SAFETY: the range is ours; this changes what the kernel may do with its pages, and not
        // what is in them.
        unsafe { libc::munlock(self.address.as_ptr(), self.len as usize) };
    }

    /// Releases the memory, but never the addresses: KVM may still have them (as a memslot's), and
    /// would access what is mapped there next. They stay inaccessible, and cost no memory.
    pub fn keep_addresses(self) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: the range is ours, and no reference outlives `self`. If it fails the mapping
        // stays as it is, which keeps the addresses as well.
        unsafe { libc::mmap(self.address.as_ptr(), self.len as usize, libc::PROT_NONE, flags, -1, 0) };
        std::mem::forget(self);
    }

    /// The mapping as 64-bit atomics; zero at first if it is anonymous.
    pub fn atomics(&self) -> &[AtomicU64] {
        // SAFETY: the range is mapped readable and writable, page-aligned, and lives as long as
        // `self`; atomics may be shared.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr::<AtomicU64>(), self.len as usize / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours alone; no reference outlives `self` (see `atomics`). An empty
        // one is EINVAL.
        unsafe { libc::munmap(self.address.as_ptr(), self.len as usize) };
    }
}
