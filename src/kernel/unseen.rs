//! Memory of this process where /proc/self/maps can't be read: in a chroot without /proc, or under
//! Landlock. The library believes what the VMM declares, unless a system call shows otherwise.

use super::address::Hva;
use super::file;
use super::host_memory::HostMemory;
use super::mem::{Backing, Kind, Mapping, ADDRESSES};
use super::page::page_size;
use crate::error::{fail, Error, Result};
use std::fs::File;
use std::os::fd::RawFd;

/// Why /proc/self/maps can't be read; None if it can.
pub fn reason() -> Option<Error> {
    let error = File::open("/proc/self/maps").err()?;
    let lacking = [libc::ENOENT, libc::ENOTDIR, libc::EACCES, libc::EPERM, libc::ENOSYS];
    // Any other error (too many open files) may be gone the next time.
    lacking.contains(&error.raw_os_error()?).then(|| Error::from_io("/proc/self/maps can't be read", &error))
}

/// The kind and page size of [hva, hva + len), from what the VMM declares.
pub fn inspect(memory: &HostMemory, declared: Option<Kind>, fd: Option<RawFd>, reason: &Error) -> Result<Backing> {
    let (hva, len) = (memory.address(), memory.size());
    // SAFETY: with MS_ASYNC msync only checks that the range is mapped.
    if unsafe { libc::msync(hva.as_ptr(), len as usize, libc::MS_ASYNC) } != 0 {
        fail!(EFAULT, "hva: something inside [{hva:#x}, {:#x}) is not mapped", hva + len);
    }
    let kind = match declared {
        Some(kind) => kind,
        None => guess(memory, fd, reason)?,
    };
    let of_file = fd.map(|fd| file::memory(fd, "fd")).transpose()?;
    let page = match (kind, of_file) {
        (Kind::HugetlbShared | Kind::HugetlbPrivate, Some(page)) if page > page_size() => page,
        (Kind::HugetlbShared | Kind::HugetlbPrivate, Some(_)) => fail!(EINVAL, "fd: is not a file of huge pages"),
        (Kind::HugetlbShared | Kind::HugetlbPrivate, None) => {
            fail!(EINVAL, "fd: the page size at hva {hva:#x} can't be looked up ({reason}): give slot.fd")
        }
        (Kind::Anon | Kind::Shared, Some(page)) if page > page_size() => {
            fail!(EINVAL, "memory: the file has huge pages")
        }
        _ if pieces(hva, len) == Pieces::Huge => fail!(EINVAL, "memory: hva {hva:#x} has huge pages"),
        (Kind::Shared, _) if !is_shared(memory)? => fail!(EINVAL, "memory: hva {hva:#x} is not shared memory"),
        _ => page_size(),
    };
    Ok(Backing { kind, page })
}

/// The kind of memory that the VMM doesn't declare. It can be found out of a single mapping.
fn guess(memory: &HostMemory, fd: Option<RawFd>, reason: &Error) -> Result<Kind> {
    let (hva, len) = (memory.address(), memory.size());
    match pieces(hva, len) {
        Pieces::Huge if fd.is_some() => Ok(Kind::HugetlbShared),
        Pieces::Huge => fail!(EINVAL, "fd: the page size at hva {hva:#x} can't be looked up ({reason}): give slot.fd"),
        Pieces::Several => fail!(
            EINVAL,
            "memory: what the mappings at hva {hva:#x} are can't be looked up ({reason}): give slot.memory, and slot.fd for shared memory"
        ),
        Pieces::One if is_shared(memory)? => Ok(Kind::Shared),
        // This drops nothing of private memory: madvise_remove refuses it, because there is no file
        // or because its mapping is private.
        Pieces::One => match memory.whole().first(page_size()).advise(libc::MADV_REMOVE, "madvise(MADV_REMOVE)") {
            Err(e) if e.errno == libc::EACCES => {
                fail!(EINVAL, "hva: {hva:#x} is a private file mapping; use MAP_SHARED or anonymous memory")
            }
            _ => Ok(Kind::Anon),
        },
    }
}

/// Maps shared memory a second time.
pub fn duplicate(
    room: &mut Mapping,
    memory: &HostMemory,
    kind: Kind,
    file: Option<(RawFd, u64)>,
    reason: &Error,
) -> Result<()> {
    let (hva, len) = (memory.address(), memory.size());
    match (kind, pieces(hva, len), file) {
        (Kind::Shared, Pieces::One, _) => room.fill_from_mapping(0, memory.whole()),
        (_, _, Some((fd, offset))) => room.fill_from_file(0, len, fd, offset),
        _ => fail!(
            EINVAL,
            "fd: the memory at hva {hva:#x} may be several mappings, which can't be looked up ({reason}): give slot.fd, or one mapping"
        ),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Pieces {
    One,
    /// Several mappings, or one that can't grow.
    Several,
    /// Hugetlb, in one mapping or several.
    Huge,
}

/// How many mappings a range is. mremap(2) is asked to grow it beyond the end of the address space.
/// That fails, and the error says what the kernel found wrong first (vma_to_resize in mm/mremap.c,
/// check_prep_vma since 6.17).
fn pieces(hva: Hva, len: u64) -> Pieces {
    // SAFETY: without MREMAP_MAYMOVE the mapping stays where it is, and there is no room for it to
    // grow there: nothing changes.
    let result = unsafe { libc::mremap(hva.as_ptr(), len as usize, (ADDRESSES - 2 * page_size()) as usize, 0) };
    debug_assert_eq!(result, libc::MAP_FAILED);
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::EFAULT) => Pieces::Several,
        Some(libc::EINVAL) => Pieces::Huge,
        _ => Pieces::One,
    }
}

/// Is it shared memory? Only that can be mapped a second time without its file.
fn is_shared(memory: &HostMemory) -> Result<bool> {
    match Mapping::room(page_size(), Hva(0), page_size())?.fill_from_mapping(0, memory.whole().first(page_size())) {
        Ok(()) => Ok(true),
        Err(e) if e.errno == libc::EINVAL => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::shared;
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn what_is_declared_is_checked() {
        let why = Error::new(libc::ENOENT, "no /proc");
        let look = |hva, declared, fd| {
            inspect(&HostMemory::for_test(hva, 4 * page_size()), declared, fd, &why)
                .map(|b| b.page)
                .map_err(|e| e.errno)
        };
        let anon = Mapping::anonymous(4 * page_size()).unwrap();
        let file = shared(8 * page_size());
        let memory = Mapping::shared(file.as_raw_fd(), 0, 4 * page_size(), true).unwrap();
        assert_eq!(look(anon.address(), Some(Kind::Anon), None), Ok(page_size()));
        assert_eq!(look(anon.address(), Some(Kind::Shared), None), Err(libc::EINVAL));
        assert_eq!(look(memory.address(), Some(Kind::Shared), None), Ok(page_size()));
        assert_eq!(look(memory.address(), Some(Kind::Shared), Some(file.as_raw_fd())), Ok(page_size()));
        assert_eq!(look(memory.address(), None, None), Ok(page_size()));
        assert_eq!(look(anon.address(), None, None), Ok(page_size()));
        let kind = |hva| inspect(&HostMemory::for_test(hva, 4 * page_size()), None, None, &why).map(|b| b.kind);
        assert_eq!((kind(memory.address()), kind(anon.address())), (Ok(Kind::Shared), Ok(Kind::Anon)));
        // SAFETY: a private mapping of a file of our own, which stays mapped.
        let private = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4 * page_size() as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            )
        };
        assert_eq!(look(Hva(private as u64), None, None), Err(libc::EINVAL));
        assert_eq!(look(memory.address(), Some(Kind::HugetlbShared), None), Err(libc::EINVAL));
        assert_eq!(look(memory.address(), Some(Kind::HugetlbShared), Some(file.as_raw_fd())), Err(libc::EINVAL));
        assert_eq!(look(Hva(page_size()), Some(Kind::Anon), None), Err(libc::EFAULT));
    }

    #[test]
    fn one_mapping_is_told_from_several() {
        let [one, two] = [4, 4].map(|pages| shared(pages * page_size()));
        let mut memory = Mapping::room(8 * page_size(), Hva(0), page_size()).unwrap();
        memory.fill_from_file(0, 4 * page_size(), one.as_raw_fd(), 0).unwrap();
        memory.fill_from_file(4 * page_size(), 4 * page_size(), two.as_raw_fd(), 0).unwrap();
        let hva = memory.address();
        let lent = HostMemory::for_test(hva, 8 * page_size());
        let undeclared = inspect(&lent, None, None, &Error::new(libc::ENOENT, "no /proc")).unwrap_err();
        assert!(undeclared.message.contains("slot.memory"), "{undeclared}");
        assert_eq!((pieces(hva, 4 * page_size()), pieces(hva + page_size(), page_size())), (Pieces::One, Pieces::One));
        assert_eq!(pieces(hva + 3 * page_size(), 2 * page_size()), Pieces::Several);
        let why = Error::new(libc::ENOENT, "no /proc");
        let try_all = |file| {
            let mut room = Mapping::room(8 * page_size(), Hva(0), page_size()).unwrap();
            duplicate(&mut room, &lent, Kind::Shared, file, &why).map_err(|e| e.errno)
        };
        assert_eq!(try_all(None), Err(libc::EINVAL));
        assert_eq!(try_all(Some((one.as_raw_fd(), 0))), Ok(()));
    }
}
