//! Memory of this process as the kernel shows it: mappings, what is mapped where, and access that can't crash.

use crate::error::{fail, Error, Result};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::AtomicU64;

/// The base page size of x86-64.
pub const PAGE: u64 = 4096;
/// Where a process's addresses end, unless it asks for more.
pub const ADDRESSES: u64 = 1 << 47;

/// A mapping that this library made; unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    address: u64,
    len: u64,
}

impl Mapping {
    /// Anonymous zeroed memory, not reserved in advance: only touched pages cost anything.
    pub fn anonymous(len: u64) -> Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Mapping::map(0, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0, "mmap of anonymous memory")
    }

    /// A shared mapping of `fd`.
    pub fn shared(fd: RawFd, offset: u64, len: u64, writable: bool) -> Result<Mapping> {
        let prot = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        Mapping::map(0, len, prot, libc::MAP_SHARED, fd, offset, "mmap of a shared mapping")
    }

    fn map(at: u64, len: u64, prot: i32, flags: i32, fd: RawFd, offset: u64, what: &str) -> Result<Mapping> {
        // SAFETY: without MAP_FIXED the kernel picks an unused range; nothing that exists is touched.
        let address = unsafe { libc::mmap(at as *mut _, len as usize, prot, flags, fd, offset as i64) };
        if address == libc::MAP_FAILED {
            return Err(Error::last_os(what));
        }
        Ok(Mapping { address: address as u64, len })
    }

    /// A second mapping of the shared memory at `hva`, without knowing its file: mremap(2) with an old size of 0.
    /// The kernel does this for shared mappings only, and not for hugetlb.
    pub fn duplicate(hva: u64, len: u64) -> Result<Mapping> {
        // SAFETY: with an old size of 0 the old mapping stays as it is, and without MREMAP_FIXED the new range is unused.
        let address = unsafe { libc::mremap(hva as *mut _, 0, len as usize, libc::MREMAP_MAYMOVE) };
        if address == libc::MAP_FAILED {
            return Err(Error::last_os("mremap to a second mapping"));
        }
        Ok(Mapping { address: address as u64, len })
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Undoes what mlockall(2) does to new mappings, and mlock(2) to duplicates of locked ones: what is locked can't be dropped.
    pub fn unlock(&self) {
        // SAFETY: the range is ours; this changes what the kernel may do with its pages, and not what is in them.
        unsafe { libc::munlock(self.address as *const _, self.len as usize) };
    }

    /// The mapping as 64-bit atomics; zero at first if it is anonymous.
    pub fn atomics(&self) -> &[AtomicU64] {
        // SAFETY: the range is mapped readable and writable, page-aligned, and lives as long as `self`; atomics may be shared.
        unsafe { std::slice::from_raw_parts(self.address as *const AtomicU64, self.len as usize / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours alone; no reference outlives `self` (see `atomics`).
        unsafe { libc::munmap(self.address as *mut _, self.len as usize) };
    }
}

/// MADV_COLLAPSE (Linux 6.1), of linux/mman.h.
pub const MADV_COLLAPSE: i32 = 25;

/// madvise(2) on a range that the caller owns.
pub fn advise(hva: u64, len: u64, advice: i32, what: &str) -> Result<()> {
    // SAFETY: the advice values used here drop or populate pages of guest memory, which Rust holds no reference to.
    match unsafe { libc::madvise(hva as *mut _, len as usize, advice) } {
        0 => Ok(()),
        _ => {
            let error = Error::last_os(what);
            let drops = matches!(advice, libc::MADV_DONTNEED | libc::MADV_REMOVE);
            Err(match error.errno {
                libc::EINVAL if drops => {
                    Error::new(libc::EINVAL, format!("{error}; memory that is locked (mlock) can't be dropped"))
                }
                _ => error,
            })
        }
    }
}

/// Makes guest memory accessible or not (mprotect(2)).
pub fn protect(hva: u64, len: u64, accessible: bool) -> Result<()> {
    let rights = if accessible { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
    // SAFETY: the range is guest memory, which Rust holds no reference to.
    match unsafe { libc::mprotect(hva as *mut _, len as usize, rights) } {
        0 => Ok(()),
        _ => Err(Error::last_os("mprotect")),
    }
}

/// Reads this process's memory; EFAULT where a plain load would crash. Waits where userfaultfd makes a load wait.
pub fn read(hva: u64, bytes: &mut [u8]) -> Result<()> {
    transfer(hva, bytes.as_mut_ptr(), bytes.len(), false)
}

/// Writes this process's memory; EFAULT where a plain store would crash.
pub fn write(hva: u64, bytes: &[u8]) -> Result<()> {
    transfer(hva, bytes.as_ptr().cast_mut(), bytes.len(), true)
}

fn transfer(hva: u64, local: *mut u8, len: usize, store: bool) -> Result<()> {
    let local = libc::iovec { iov_base: local.cast(), iov_len: len };
    let remote = libc::iovec { iov_base: hva as *mut _, iov_len: len };
    // SAFETY: `local` is a live buffer of `len` bytes (only read when storing); the kernel checks the remote address, which is
    // guest memory that Rust holds no reference to.
    let done = unsafe {
        let pid = libc::getpid();
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

/// Is the page at `hva` broken (madvise(2), EHWPOISON)? Before MADV_POPULATE_READ (Linux 5.14) one that is inaccessible can't be told from it.
pub fn is_poisoned(hva: u64, page: u64) -> bool {
    let populate = |len| advise(hva, len, libc::MADV_POPULATE_READ, "madvise(MADV_POPULATE_READ)");
    match populate(0) {
        Ok(()) => matches!(populate(page), Err(e) if e.errno == libc::EHWPOISON),
        Err(_) => matches!(read(hva, &mut [0]), Err(e) if e.errno == libc::EFAULT),
    }
}

/// The first page that has content, if any has: mapped, or in the page cache (but for hugetlb, of which only what is mapped shows).
pub fn first_resident(hva: u64, len: u64) -> Result<Option<u64>> {
    const CHUNK: u64 = 1 << 16; // pages a call
    let mut resident = vec![0u8; (len / PAGE).min(CHUNK) as usize];
    let mut at = hva;
    while at < hva + len {
        let pages = ((hva + len - at) / PAGE).min(CHUNK);
        // SAFETY: mincore writes one byte a page, for which there is room.
        if unsafe { libc::mincore(at as *mut _, (pages * PAGE) as usize, resident.as_mut_ptr()) } != 0 {
            return Err(Error::last_os("mincore"));
        }
        if let Some(page) = resident[..pages as usize].iter().position(|r| r & 1 != 0) {
            return Ok(Some(at + page as u64 * PAGE));
        }
        at += pages * PAGE;
    }
    Ok(None)
}

/// What a piece of this process's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// MAP_PRIVATE | MAP_ANONYMOUS.
    Anon,
    /// memfd, tmpfs or shared anonymous memory.
    Shared,
    /// hugetlb, private.
    HugetlbPrivate,
    /// hugetlb, shared.
    HugetlbShared,
}

/// A range of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backing {
    /// Its kind.
    pub kind: Kind,
    /// The page size in bytes: the smallest unit that userfaultfd can install.
    pub page: u64,
}

/// Looks up [hva, hva + len) in /proc/self/smaps' short form; an error names what is wrong with it.
pub fn inspect(hva: u64, len: u64) -> Result<Backing> {
    let maps = File::open("/proc/self/maps").map_err(|e| Error::from_io("/proc/self/maps", &e))?;
    let mut at = hva;
    let mut found: Option<(Kind, Option<u64>)> = None;
    for line in BufReader::new(maps).lines() {
        let line = line.map_err(|e| Error::from_io("/proc/self/maps", &e))?;
        let Some(map) = parse_maps_line(&line) else { continue };
        if map.end <= at || map.start >= hva + len {
            continue;
        }
        if map.start > at {
            break;
        }
        if !map.readable || !map.writable {
            fail!(EACCES, "hva: [{:#x}, {:#x}) is not mapped readable and writable", map.start, map.end);
        }
        let kind = kind_of(&map)?;
        if found.is_some_and(|first| first != kind) {
            fail!(EINVAL, "hva: [{hva:#x}, {:#x}) is memory of more than one kind", hva + len);
        }
        found.get_or_insert(kind);
        at = map.end;
    }
    match found {
        Some((kind, page)) if at >= hva + len => Ok(Backing { kind, page: page.unwrap_or(PAGE) }),
        _ => fail!(EFAULT, "hva: nothing is mapped at {at:#x}, inside [{hva:#x}, {:#x})", hva + len),
    }
}

/// A line of /proc/self/maps.
struct MapsLine<'a> {
    start: u64,
    end: u64,
    readable: bool,
    writable: bool,
    shared: bool,
    offset: u64,
    inode: u64,
    device: u64,
    name: &'a str,
}

fn parse_maps_line(line: &str) -> Option<MapsLine<'_>> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let rights = fields.next()?.as_bytes();
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = libc::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    Some(MapsLine {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        readable: rights.first() == Some(&b'r'),
        writable: rights.get(1) == Some(&b'w'),
        shared: rights.get(3) == Some(&b's'),
        offset,
        inode: fields.next()?.parse().ok()?,
        device,
        name: fields.next().unwrap_or("").trim_start(),
    })
}

/// The kind of a mapping, and its page size if that isn't the base page.
fn kind_of(map: &MapsLine<'_>) -> Result<(Kind, Option<u64>)> {
    if map.inode == 0 && !map.shared {
        return Ok((Kind::Anon, None));
    }
    // A file: hugetlbfs or tmpfs, told apart by the file system's magic number. /proc/self/map_files needs privileges;
    // KernelPageSize in smaps doesn't.
    let page = kernel_page_size(map.start)?;
    if page > PAGE {
        let kind = if map.shared { Kind::HugetlbShared } else { Kind::HugetlbPrivate };
        return Ok((kind, Some(page)));
    }
    let shmem = map.name.starts_with("/memfd:")
        || map.name.starts_with("/dev/zero")
        || map.name.starts_with("/SYSV")
        || map.name.starts_with("/dev/shm/")
        || map.name.starts_with("[anon_shmem:") // named by prctl(PR_SET_VMA_ANON_NAME)
        || is_tmpfs(map.name);
    match (map.shared, shmem) {
        (true, true) => Ok((Kind::Shared, None)),
        (true, false) => fail!(
            EINVAL,
            "hva: {} is a shared file mapping; userfaultfd serves memfd, tmpfs and hugetlb only",
            map.name
        ),
        (false, _) => fail!(EINVAL, "hva: {} is a private file mapping; use MAP_SHARED or anonymous memory", map.name),
    }
}

fn is_tmpfs(name: &str) -> bool {
    let Ok(path) = std::ffi::CString::new(name.trim_end_matches(" (deleted)")) else {
        return false;
    };
    // SAFETY: an all-zero statfs is a valid value, and the path is a NUL-terminated string.
    unsafe {
        let mut fs: libc::statfs = std::mem::zeroed();
        libc::statfs(path.as_ptr(), &mut fs) == 0 && fs.f_type == libc::TMPFS_MAGIC
    }
}

fn kernel_page_size(start: u64) -> Result<u64> {
    let smaps = File::open("/proc/self/smaps").map_err(|e| Error::from_io("/proc/self/smaps", &e))?;
    let mut inside = false;
    for line in BufReader::new(smaps).lines() {
        let line = line.map_err(|e| Error::from_io("/proc/self/smaps", &e))?;
        if let Some(map) = parse_maps_line(&line) {
            inside = map.start <= start && start < map.end;
        } else if let (true, Some(size)) = (inside, line.strip_prefix("KernelPageSize:")) {
            let kib: u64 = size.trim().trim_end_matches(" kB").parse().unwrap_or(4);
            return Ok(kib * 1024);
        }
    }
    Ok(PAGE)
}

/// A second shared mapping of the hugetlb memory at `hva`. mremap(2) can't duplicate it, so `fd` must be its file; without one
/// /proc/self/map_files is tried, which needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
pub fn duplicate_by_file(hva: u64, len: u64, fd: Option<(RawFd, u64)>) -> Result<Mapping> {
    if let Some((fd, offset)) = fd {
        check_file(hva, fd, offset)?;
        return Mapping::shared(fd, offset, len, true);
    }
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(|e| Error::from_io("/proc/self/maps", &e))?;
    let map = maps.lines().filter_map(parse_maps_line).find(|m| m.start <= hva && hva < m.end);
    let Some(MapsLine { start, end, offset, .. }) = map else { fail!(EFAULT, "hva: nothing is mapped at {hva:#x}") };
    let range = format!("{start:x}-{end:x}");
    let file = File::options().read(true).write(true).open(format!("/proc/self/map_files/{range}"));
    let file = file.map_err(|e| {
        Error::from_io("hugetlb memory can be mapped a second time only with its descriptor (kvmfault_memslot.fd); /proc/self/map_files", &e)
    })?;
    Mapping::shared(file.as_raw_fd(), offset + (hva - start), len, true)
}

/// Is the memory at `hva` a mapping of the file `fd`, from `offset` on?
fn check_file(hva: u64, fd: RawFd, offset: u64) -> Result<()> {
    let file = std::fs::metadata(format!("/proc/self/fd/{fd}"))
        .map_err(|e| Error::new(libc::EBADF, format!("fd: descriptor {fd} is not open: {e}")))?;
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(|e| Error::from_io("/proc/self/maps", &e))?;
    let map = maps.lines().filter_map(parse_maps_line).find(|m| m.start <= hva && hva < m.end);
    match map.filter(|m| m.inode == file.ino() && m.device == file.dev()) {
        Some(map) if map.offset + (hva - map.start) == offset => Ok(()),
        Some(map) => fail!(
            EINVAL,
            "fd_offset: hva {hva:#x} is a mapping of the file from {:#x} on, not from {offset:#x}",
            map.offset + (hva - map.start)
        ),
        None => fail!(EINVAL, "fd: {fd} is not the file that is mapped at hva {hva:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart() {
        let anon = Mapping::anonymous(4 * PAGE).unwrap();
        assert_eq!(inspect(anon.address(), 4 * PAGE).unwrap(), Backing { kind: Kind::Anon, page: PAGE });
        let text = inspect(kinds_are_told_apart as *const () as u64 & !(PAGE - 1), PAGE).unwrap_err();
        assert_eq!(text.errno, libc::EACCES);
        assert_eq!(inspect(PAGE, PAGE).unwrap_err().errno, libc::EFAULT);
    }

    #[test]
    fn shared_memory_may_have_a_name() {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let memory = Mapping::map(0, PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0, "mmap").unwrap();
        // SAFETY: names a live mapping; EINVAL on kernels that don't do that.
        unsafe { libc::prctl(libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME, memory.address(), PAGE, c"guest".as_ptr()) };
        assert_eq!(inspect(memory.address(), PAGE).unwrap().kind, Kind::Shared);
    }

    #[test]
    fn a_bad_address_is_an_error_and_not_a_crash() {
        let mut byte = [0];
        assert_eq!(read(PAGE, &mut byte).unwrap_err().errno, libc::EFAULT);
        assert_eq!(write(PAGE, &byte).unwrap_err().errno, libc::EFAULT);
    }

    #[test]
    fn a_duplicate_shows_the_same_memory() {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let one = Mapping::map(0, PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0, "mmap").unwrap();
        assert_eq!(inspect(one.address(), PAGE).unwrap().kind, Kind::Shared);
        let two = Mapping::duplicate(one.address(), PAGE).unwrap();
        write(one.address(), &[42]).unwrap();
        let mut byte = [0];
        read(two.address(), &mut byte).unwrap();
        assert_eq!(byte, [42]);
    }
}
