//! Memory of this process: mappings that the library makes, what the VMM has mapped where, and
//! accesses that fail instead of crashing.

use super::address::Hva;
use super::host_memory::{Area, HostMemory};
use super::page::page_size;
use super::{file, process, unseen};
use crate::error::{fail, Error, Result};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::AtomicU64;

pub use super::arch::ADDRESSES;

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
    fn map(at: u64, len: u64, prot: i32, flags: i32, fd: RawFd, offset: u64, what: &str) -> Result<Mapping> {
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

/// The kind of a piece of this process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory.
    Anon,
    /// Shared memory: memfd, tmpfs, or anonymous.
    Shared,
    /// Private hugetlb memory.
    HugetlbPrivate,
    /// Shared hugetlb memory.
    HugetlbShared,
}

/// What a range of memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backing {
    /// The kind of memory.
    pub kind: Kind,
    /// The page size in bytes: the smallest unit that userfaultfd can install.
    pub page: u64,
}

/// Finds out what memory is; an error says what is wrong with it. `declared` and `fd` are
/// what the VMM says of its kind, and of the file that it is a mapping of.
pub fn inspect(memory: &HostMemory, declared: Option<Kind>, fd: Option<RawFd>) -> Result<Backing> {
    let (hva, len) = (memory.address(), memory.size());
    if let Some(reason) = unseen::reason() {
        return unseen::inspect(memory, declared, fd, &reason);
    }
    let given = fd.map(|fd| Given::new(fd, "fd")).transpose()?;
    let mut found: Option<Backing> = None;
    let mut file = None;
    for map in mappings(hva, len)? {
        if !map.readable || !map.writable {
            fail!(EACCES, "hva: [{:#x}, {:#x}) is not mapped readable and writable", map.start, map.end);
        }
        // Asking for each mapping would be slow: one of a file may be split into many.
        let this_file = (map.inode, map.device, map.shared);
        if file.replace(this_file) == Some(this_file) {
            continue;
        }
        let backing = backing_of(&map, given.as_ref())?;
        if found.is_some_and(|first| first != backing) {
            fail!(EINVAL, "hva: [{hva:#x}, {:#x}) is memory of more than one kind", hva + len);
        }
        found = Some(backing);
    }
    found.ok_or_else(|| Error::new(libc::EINVAL, "len: is 0"))
}

/// The mappings that make up [hva, hva + len), in order; an error if something in it isn't mapped.
pub fn mappings(hva: Hva, len: u64) -> Result<Vec<MapsLine>> {
    let maps = File::open("/proc/self/maps").map_err(|e| Error::from_io("/proc/self/maps", &e))?;
    let (mut at, mut found) = (hva, Vec::new());
    for line in BufReader::new(maps).lines() {
        let line = line.map_err(|e| Error::from_io("reading /proc/self/maps", &e))?;
        let Some(map) = parse_maps_line(&line).filter(|m| m.end > at) else { continue };
        if map.start > at || at >= hva + len {
            break;
        }
        at = map.end;
        found.push(map);
    }
    if at < hva + len {
        fail!(EFAULT, "hva: nothing is mapped at {at:#x}, inside [{hva:#x}, {:#x})", hva + len);
    }
    Ok(found)
}

/// A line of /proc/self/maps: one mapping.
#[derive(Debug)]
pub struct MapsLine {
    /// Its first byte.
    pub start: Hva,
    /// The byte after its last.
    pub end: Hva,
    readable: bool,
    writable: bool,
    shared: bool,
    /// Its offset in the file.
    pub offset: u64,
    /// The file's inode number; 0 if there is no file.
    pub inode: u64,
    /// The file's device.
    pub device: u64,
    name: String,
}

fn parse_maps_line(line: &str) -> Option<MapsLine> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let rights = fields.next()?.as_bytes();
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = libc::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    Some(MapsLine {
        start: Hva(u64::from_str_radix(start, 16).ok()?),
        end: Hva(u64::from_str_radix(end, 16).ok()?),
        readable: rights.first() == Some(&b'r'),
        writable: rights.get(1) == Some(&b'w'),
        shared: rights.get(3) == Some(&b's'),
        offset,
        inode: fields.next()?.parse().ok()?,
        device,
        name: fields.next().unwrap_or("").trim_start().to_owned(),
    })
}

/// The file that memory is a mapping of, as the VMM says.
struct Given {
    inode: u64,
    device: u64,
    fd: RawFd,
}

impl Given {
    fn new(fd: RawFd, name: &str) -> Result<Given> {
        let meta = file::duplicate(fd, name)?.metadata().map_err(|e| Error::from_io(name, &e))?;
        Ok(Given { inode: meta.ino(), device: meta.dev(), fd })
    }
}

fn backing_of(map: &MapsLine, given: Option<&Given>) -> Result<Backing> {
    let of_base_pages = |kind| Ok(Backing { kind, page: page_size() });
    if map.inode == 0 && !map.shared {
        return of_base_pages(Kind::Anon);
    }
    // Where the file is given, its own file system says what it is. Its path may lead elsewhere
    // (chroot), and smaps takes long.
    if let (true, Some(given)) = (map.shared, given.filter(|g| (g.inode, g.device) == (map.inode, map.device))) {
        let page = file::memory(given.fd, "fd")?;
        return Ok(Backing { kind: if page > page_size() { Kind::HugetlbShared } else { Kind::Shared }, page });
    }
    // Is the file of hugetlbfs or of tmpfs? KernelPageSize in smaps says so, and needs no
    // privileges, unlike /proc/self/map_files.
    let page = kernel_page_size(map.start)?;
    if page > page_size() {
        let kind = if map.shared { Kind::HugetlbShared } else { Kind::HugetlbPrivate };
        return Ok(Backing { kind, page });
    }
    let shmem = map.name.starts_with("/memfd:")
        || map.name.starts_with("/dev/zero")
        || map.name.starts_with("/SYSV")
        || map.name.starts_with("/dev/shm/")
        || map.name.starts_with("[anon_shmem:") // named by prctl(PR_SET_VMA_ANON_NAME)
        || is_tmpfs(&map.name);
    match (map.shared, shmem) {
        (true, true) => of_base_pages(Kind::Shared),
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

fn kernel_page_size(start: Hva) -> Result<u64> {
    let smaps = File::open("/proc/self/smaps").map_err(|e| Error::from_io("/proc/self/smaps", &e))?;
    let mut inside = false;
    for line in BufReader::new(smaps).lines() {
        let line = line.map_err(|e| Error::from_io("/proc/self/smaps", &e))?;
        if let Some(map) = parse_maps_line(&line) {
            inside = map.start <= start && start < map.end;
        } else if let (true, Some(size)) = (inside, line.strip_prefix("KernelPageSize:")) {
            let kib: u64 = size.trim().trim_end_matches(" kB").parse().unwrap_or(page_size() / 1024);
            return Ok(kib * 1024);
        }
    }
    Ok(page_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart() {
        let anon = Mapping::anonymous(4 * page_size()).unwrap();
        assert_eq!(
            inspect(&HostMemory::for_test(anon.address(), 4 * page_size()), None, None).unwrap(),
            Backing { kind: Kind::Anon, page: page_size() }
        );
        let text = inspect(
            &HostMemory::for_test(Hva(kinds_are_told_apart as *const () as u64 & !(page_size() - 1)), page_size()),
            None,
            None,
        )
        .unwrap_err();
        assert_eq!(text.errno, libc::EACCES);
        assert_eq!(
            inspect(&HostMemory::for_test(Hva(page_size()), page_size()), None, None).unwrap_err().errno,
            libc::EFAULT
        );
    }

    #[test]
    fn shared_memory_may_have_a_name() {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let memory = Mapping::map(0, page_size(), libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0, "mmap").unwrap();
        // SAFETY: names a live mapping; EINVAL on kernels that don't do that.
        unsafe {
            libc::prctl(libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME, memory.address(), page_size(), c"guest".as_ptr())
        };
        assert_eq!(
            inspect(&HostMemory::for_test(memory.address(), page_size()), None, None).unwrap().kind,
            Kind::Shared
        );
    }

    #[test]
    fn a_bad_address_is_an_error_and_not_a_crash() {
        let mut byte = [0];
        assert_eq!(read(Hva(page_size()), &mut byte).unwrap_err().errno, libc::EFAULT);
        let nowhere = HostMemory::for_test(Hva(page_size()), page_size());
        assert_eq!(nowhere.whole().write(&byte).unwrap_err().errno, libc::EFAULT);
    }
}
