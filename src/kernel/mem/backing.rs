//! What the VMM has mapped where: the kind of a range of memory, and its page size.

use crate::error::{fail, Error, Result};
use crate::kernel::address::Hva;
use crate::kernel::host_memory::HostMemory;
use crate::kernel::page::page_size;
use crate::kernel::{file, unseen};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;

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
