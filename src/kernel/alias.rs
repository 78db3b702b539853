//! A second mapping of shared memory, made of the same pieces as the first. What is one block to
//! the VMM may be several files side by side to the kernel, or one mapping that was split (madvise,
//! mbind and mlock do that).

use super::address::Hva;
use super::host_memory::HostMemory;
use super::mem::{mappings, Kind, Mapping, MapsLine};

use super::page::huge_page_size;
use super::{file, unseen};
use crate::error::{fail, Error, Result};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;

/// Maps memory a second time. `file` is the file that it is a mapping of, and the
/// offset at which it begins there. Only hugetlb needs it; without it /proc/self/map_files is
/// tried, which needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
pub fn duplicate(memory: &HostMemory, page: u64, kind: Kind, file: Option<(RawFd, u64)>) -> Result<Mapping> {
    let (hva, len) = (memory.address(), memory.size());
    // Huge pages need addresses and file offsets that agree in a huge page's low bits.
    let mut alias = Mapping::room(len, hva, huge_page_size().max(page))?;
    if let Some(reason) = unseen::reason() {
        unseen::duplicate(&mut alias, memory, kind, file, &reason)?;
        return Ok(alias);
    }
    for map in mappings(hva, len)? {
        let (start, end) = (map.start.max(hva), map.end.min(hva + len));
        let (at, len) = (start - hva, end - start);
        let offset = map.offset + (start - map.start);
        match (kind, file) {
            (Kind::HugetlbShared, Some((fd, first))) => {
                check_file(&map, start, fd, first + at)?;
                alias.fill_from_file(at, len, fd, offset)?;
            }
            (Kind::HugetlbShared, None) => alias.fill_from_file(at, len, open(&map)?.as_raw_fd(), offset)?,
            _ => alias.fill_from_mapping(at, memory.whole().after(at).first(len))?,
        }
    }
    Ok(alias)
}

/// Opens the file of a mapping.
fn open(map: &MapsLine) -> Result<File> {
    let path = format!("/proc/self/map_files/{:x}-{:x}", map.start, map.end);
    File::options().read(true).write(true).open(path).map_err(|e| {
        Error::from_io("hugetlb memory can be mapped a second time only with its descriptor (kvmfault_memslot.fd); /proc/self/map_files", &e)
    })
}

/// Checks that this mapping shows, at `hva`, the file `fd` from `offset` on.
fn check_file(map: &MapsLine, hva: Hva, fd: RawFd, offset: u64) -> Result<()> {
    let file = file::duplicate(fd, "fd")?.metadata().map_err(|e| Error::from_io("fd: fstat", &e))?;
    if (map.inode, map.device) != (file.ino(), file.dev()) {
        fail!(EINVAL, "fd: {fd} is not the file that is mapped at hva {hva:#x}");
    }
    let begins = map.offset + (hva - map.start);
    if begins != offset {
        fail!(EINVAL, "fd_offset: hva {hva:#x} is a mapping of the file from {begins:#x} on, not from {offset:#x}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::file::tests;
    use super::super::mem::{inspect, read};
    use super::super::page::page_size;
    use super::*;

    #[test]
    fn a_duplicate_shows_the_same_memory() {
        let [one, two] = [8, 8].map(|pages| tests::shared(pages * page_size()));
        // The second file, the first from its fourth page on, and the first from its beginning:
        // they don't merge.
        let mut memory = Mapping::room(9 * page_size(), Hva(page_size()), huge_page_size()).unwrap();
        for (n, (file, offset)) in [(&two, 0), (&one, 4 * page_size()), (&one, 0)].into_iter().enumerate() {
            memory.fill_from_file(n as u64 * 3 * page_size(), 3 * page_size(), file.as_raw_fd(), offset).unwrap();
        }
        // The range begins and ends inside of mappings.
        let (hva, len) = (memory.address() + page_size(), 7 * page_size());
        let lent = HostMemory::for_test(hva, len);
        assert_eq!((mappings(hva, len).unwrap().len(), inspect(&lent, None, None).unwrap().kind), (3, Kind::Shared));
        let alias = duplicate(&lent, page_size(), Kind::Shared, None).unwrap();
        assert_eq!(alias.address() % huge_page_size(), hva % huge_page_size());
        for page in 0..7 {
            lent.area(hva + page * page_size(), 1).unwrap().write(&[page as u8 + 1]).unwrap();
            let mut byte = [0];
            read(alias.address() + page * page_size(), &mut byte).unwrap();
            assert_eq!(byte, [page as u8 + 1]);
        }
    }
}
