//! A second mapping of shared memory, made of the same pieces as the first: to the VMM a block is one, to the kernel it may be several files side by
//! side, or one mapping that was cut (madvise, mbind and mlock do that to parts).

use super::mem::{mappings, Kind, Mapping, MapsLine, HUGE_PAGE};
use super::{file, unseen};
use crate::error::{fail, Error, Result};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;

/// Maps the memory at `hva` a second time. `file` is the file that it is a mapping of, and where it begins there: used for hugetlb only, which can't be
/// duplicated without; if it isn't given, /proc/self/map_files is tried, which needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
pub fn duplicate(hva: u64, len: u64, page: u64, kind: Kind, file: Option<(RawFd, u64)>) -> Result<Mapping> {
    // A mapping that begins elsewhere in a huge page than its file does can't have such, and nor can the guest.
    let mut alias = Mapping::room(len, hva, HUGE_PAGE.max(page))?;
    if let Some(reason) = unseen::reason() {
        unseen::duplicate(&mut alias, hva, len, kind, file, &reason)?;
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
            _ => alias.fill_from_mapping(at, len, start)?,
        }
    }
    Ok(alias)
}

/// The file of a mapping.
fn open(map: &MapsLine) -> Result<File> {
    let path = format!("/proc/self/map_files/{:x}-{:x}", map.start, map.end);
    File::options().read(true).write(true).open(path).map_err(|e| {
        Error::from_io("hugetlb memory can be mapped a second time only with its descriptor (kvmfault_memslot.fd); /proc/self/map_files", &e)
    })
}

/// Is what begins at `hva` in this mapping the file `fd`, from `offset` on?
fn check_file(map: &MapsLine, hva: u64, fd: RawFd, offset: u64) -> Result<()> {
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
    use super::super::mem::{inspect, read, write, PAGE};
    use super::*;

    #[test]
    fn a_duplicate_shows_the_same_memory() {
        let [one, two] = [8, 8].map(|pages| tests::shared(pages * PAGE));
        // The second file, the first from its fourth page on, and the first from its beginning: they don't merge.
        let mut memory = Mapping::room(9 * PAGE, PAGE, HUGE_PAGE).unwrap();
        for (n, (file, offset)) in [(&two, 0), (&one, 4 * PAGE), (&one, 0)].into_iter().enumerate() {
            memory.fill_from_file(n as u64 * 3 * PAGE, 3 * PAGE, file.as_raw_fd(), offset).unwrap();
        }
        // And begins and ends inside of mappings.
        let (hva, len) = (memory.address() + PAGE, 7 * PAGE);
        assert_eq!((mappings(hva, len).unwrap().len(), inspect(hva, len, None, None).unwrap().kind), (3, Kind::Shared));
        let alias = duplicate(hva, len, PAGE, Kind::Shared, None).unwrap();
        assert_eq!(alias.address() % HUGE_PAGE, hva % HUGE_PAGE);
        for page in 0..7 {
            write(hva + page * PAGE, &[page as u8 + 1]).unwrap();
            let mut byte = [0];
            read(alias.address() + page * PAGE, &mut byte).unwrap();
            assert_eq!(byte, [page as u8 + 1]);
        }
    }
}
