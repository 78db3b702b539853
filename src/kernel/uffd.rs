//! userfaultfd: opening, registering (both through the `userfaultfd` crate), and the ioctls that
//! the crate lacks or gets wrong: it reads a COPY that ends with EAGAIN as a huge count, and has no
//! POISON. See userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst and fs/userfaultfd.c.

use super::address::Hva;
use super::file;
use super::host_memory::Area;
use super::mem::Mapping;
use super::page::page_size;
use crate::error::{fail, Error, Result};
use std::fmt::Write;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use userfaultfd::{Event, FaultKind, FeatureFlags, ReadWrite, RegisterMode, UffdBuilder};

/// UFFD_FEATURE_POISON, Linux 6.6.
pub const FEATURE_POISON: u64 = 1 << 14;
/// UFFD_FEATURE_MINOR_SHMEM, Linux 5.14.
pub const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
/// UFFD_FEATURE_MINOR_HUGETLBFS, Linux 5.13.
pub const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
/// UFFD_FEATURE_THREAD_ID, Linux 4.14.
pub const FEATURE_THREAD_ID: u64 = 1 << 8;
/// Features that the library can't use: events, for which a thread that changes the memory waits
/// until one is read, perhaps while a reader waits for that thread; and SIGBUS, with which no fault
/// is reported.
const UNFIT: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 7;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;

/// Sets of features to ask for, best first: a kernel refuses a whole set for one feature that it
/// doesn't know.
const FEATURE_SETS: [u64; 4] = {
    let shared = FEATURE_MISSING_SHMEM | FEATURE_MISSING_HUGETLBFS;
    let minor = shared | FEATURE_THREAD_ID | FEATURE_MINOR_SHMEM | FEATURE_MINOR_HUGETLBFS;
    [minor | FEATURE_POISON, minor, shared | FEATURE_THREAD_ID, shared]
};

const UFFD_API: u64 = 0xAA;

/// `_IOWR(0xAA, nr, struct of size bytes)`.
const fn iowr(nr: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | 0xAA << 8 | nr
}
const UFFDIO_API: u64 = iowr(0x3F, 24);
const UFFDIO_WAKE: u64 = 2 << 30 | 16 << 16 | 0xAA << 8 | 0x02; // _IOR
/// The request that makes a userfaultfd from /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: u64 = 0xAA << 8;
const UFFDIO_COPY: u64 = iowr(0x03, 40);
const UFFDIO_ZEROPAGE: u64 = iowr(0x04, 32);
const UFFDIO_CONTINUE: u64 = iowr(0x07, 32);
const UFFDIO_POISON: u64 = iowr(0x08, 32);

/// What an install ioctl has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// This many bytes from the start are done (perhaps not all that was asked), and their waiters
    /// are awake.
    Done(u64),
    /// The first page is present already. Its waiters, if any, are still asleep.
    Exists,
    /// The address space is changing (another thread in mmap, fork, madvise, ...): try again.
    Again,
}

/// What a range is registered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mode {
    /// Faults at pages that are in the page cache and not mapped, too; otherwise only those where
    /// there is no page.
    pub minor: bool,
    /// The range carries markers, so the kernel must keep its page tables. When the kernel makes
    /// huge pages of the page cache it drops the page tables of shared memory
    /// (retract_page_tables in mm/khugepaged.c), and it shares those of hugetlb; but neither in
    /// ranges that are registered for write protection, too. No page is write-protected. A range
    /// stays registered so until it is unregistered: registering it without is EBUSY (Linux 7.3).
    pub keeps_tables: bool,
}

/// A fault that the kernel reported through the userfaultfd.
#[derive(Debug, Clone, Copy)]
pub struct Message {
    /// The address that was touched; memory may have several mappings.
    pub hva: Hva,
    /// Was it a write?
    pub write: bool,
    /// The page is in the page cache and only has to be mapped.
    pub minor: bool,
    /// The thread that waits, where the kernel tells (UFFD_FEATURE_THREAD_ID).
    pub thread: Option<i32>,
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd {
    uffd: userfaultfd::Uffd,
    features: u64,
}

/// A range's registration that is undone on drop, unless it is kept.
#[must_use = "a registration that is dropped is undone"]
#[derive(Debug)]
pub struct Registration<'a> {
    uffd: &'a Uffd,
    area: Area<'a>,
}

impl Registration<'_> {
    /// Makes the registration last.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        let _ = self.uffd.unregister(self.area);
    }
}

impl Uffd {
    /// Opens one with the best features that the kernel has, also for faults in kernel mode, as
    /// KVM's are.
    pub fn open() -> Result<Uffd> {
        let mut tried = String::new();
        for features in FEATURE_SETS {
            match UffdBuilder::new()
                .close_on_exec(true)
                .non_blocking(true)
                .user_mode_only(false)
                .require_features(FeatureFlags::from_bits_retain(features))
                .create()
            {
                Ok(uffd) => return Ok(Uffd { uffd, features }),
                Err(e) => {
                    tried.clear();
                    let _ = write!(tried, "/dev/userfaultfd or the system call: {e}");
                }
            }
        }
        // The crate doesn't try the system call where the device exists but is not accessible.
        // SAFETY: the system call takes flags only, and returns a new descriptor, which is ours
        // alone.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) } as RawFd;
        if fd < 0 {
            let error = std::io::Error::last_os_error();
            let _ = write!(tried, "; userfaultfd(2): {error}");
            return Err(Error::new(error.raw_os_error().unwrap_or(libc::EPERM), tried));
        }
        // SAFETY: `fd` is open and ours.
        Uffd::handshake(unsafe { userfaultfd::Uffd::from_raw_fd(fd) }, fd)
    }

    /// Takes one that the VMM opened, or makes one from an open /dev/userfaultfd (Linux 6.1); `fd`
    /// is duplicated. The descriptor itself is asked what it is: a jail may have no /proc.
    pub fn adopt(fd: RawFd) -> Result<Uffd> {
        let given = file::duplicate(fd, "uffd")?;
        let meta = given.metadata().map_err(|e| Error::from_io("uffd: fstat", &e))?;
        if meta.file_type().is_char_device() {
            // SAFETY: the request takes flags only; other devices don't know it.
            let made =
                unsafe { libc::ioctl(given.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) };
            if made < 0 {
                fail!(
                    EINVAL,
                    "uffd: descriptor {fd} is a device, but not /dev/userfaultfd: {}",
                    std::io::Error::last_os_error()
                );
            }
            // SAFETY: the ioctl returned a new descriptor, which is ours alone.
            return Uffd::handshake(unsafe { userfaultfd::Uffd::from_raw_fd(made) }, fd);
        }
        // SAFETY: `given` is ours alone; F_SETFL sets the flag that poll(2) needs.
        let uffd = unsafe {
            libc::fcntl(
                given.as_raw_fd(),
                libc::F_SETFL,
                libc::fcntl(given.as_raw_fd(), libc::F_GETFL) | libc::O_NONBLOCK,
            );
            userfaultfd::Uffd::from_raw_fd(given.into_raw_fd())
        };
        let adopted = Uffd::handshake(uffd, fd)?;
        adopted.check_process(fd)?;
        Ok(adopted)
    }

    /// Checks that the userfaultfd serves this process, by registering a page: it serves the
    /// address space of the process that made it, even if another process has the descriptor.
    fn check_process(&self, fd: RawFd) -> Result<()> {
        let page = Mapping::anonymous(page_size())?;
        match self.try_register(page.whole(), Mode::default()).map(drop) {
            Ok(()) => Ok(()),
            Err(e) => Err(e.context(format!("uffd: descriptor {fd} serves no memory of this process: who made it?"))),
        }
    }

    /// UFFDIO_API. If every set is refused, it was done before, or this is no userfaultfd. /proc,
    /// if there is one, shows which features were asked for then. POISON and minor faults don't
    /// have to be asked for: the one is tried, the other assumed.
    fn handshake(uffd: userfaultfd::Uffd, fd: RawFd) -> Result<Uffd> {
        for features in FEATURE_SETS {
            let mut api = [UFFD_API, features, 0];
            if ioctl(&uffd, UFFDIO_API, &mut api).is_ok() {
                return Ok(Uffd { uffd, features });
            }
        }
        // This has no effect: no thread waits for a page of our own.
        let page = Mapping::anonymous(page_size())?;
        if let Err(e) = ioctl(&uffd, UFFDIO_WAKE, &mut [page.address().0, page_size()]) {
            fail!(EINVAL, "uffd: descriptor {fd} is not a userfaultfd: UFFDIO_API and UFFDIO_WAKE: {e}");
        }
        let asked = features_of(uffd.as_raw_fd()).unwrap_or(0);
        if asked & UNFIT != 0 {
            return Err(Error::new(
                libc::EINVAL,
                format!("uffd: its UFFDIO_API was done with features {asked:#x}; those of {UNFIT:#x} (events, SIGBUS) don't go with the library"),
            ));
        }
        let adopted = Uffd { uffd, features: FEATURE_SETS[0] & (!FEATURE_THREAD_ID | asked) };
        let features = if adopted.can_poison() { adopted.features } else { adopted.features & !FEATURE_POISON };
        Ok(Uffd { features, ..adopted })
    }

    /// Tries UFFDIO_POISON on a page of our own.
    fn can_poison(&self) -> bool {
        let Ok(page) = Mapping::anonymous(page_size()) else { return false };
        let works =
            self.register(page.whole(), Mode::default()).is_ok() && self.poison(page.whole(), page_size()).is_ok();
        let _ = self.unregister(page.whole());
        works
    }

    /// The UFFD_FEATURE_* bits in force.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Registers a range.
    pub fn register(&self, area: Area<'_>, mode: Mode) -> Result<()> {
        let (hva, len) = (area.hva(), area.len());
        let register = |mode| self.uffd.register_with_mode(hva.as_ptr(), len as usize, mode).map(drop);
        let faults = if mode.minor { RegisterMode::MISSING | RegisterMode::MINOR } else { RegisterMode::MISSING };
        let registered = match mode.keeps_tables {
            true => match register(faults | RegisterMode::WRITE_PROTECT) {
                // The kernel can't write-protect shared memory (no CONFIG_PTE_MARKER_UFFD_WP).
                Err(userfaultfd::Error::SystemError(e)) if e as i32 == libc::EINVAL => register(faults),
                registered => registered,
            },
            false => register(faults),
        };
        registered.map_err(|e| match from_crate("hva: UFFDIO_REGISTER", e) {
            e if e.errno == libc::EBUSY => e.context("another userfaultfd has this memory registered"),
            e => e,
        })
    }

    /// Registers a range that is unregistered again unless the registration is kept. After a
    /// failure the caller must not call `unregister`: before Linux 6.17 the kernel lets any
    /// userfaultfd undo what another one has registered.
    pub fn try_register<'a>(&'a self, area: Area<'a>, mode: Mode) -> Result<Registration<'a>> {
        self.register(area, mode).map(|()| Registration { uffd: self, area })
    }

    /// Unregisters a range. All threads that wait there wake, and their faults are handled without
    /// userfaultfd.
    ///
    /// The kernel wakes before it takes the registration away, and so misses a fault that began
    /// between the two. It does wait for such a fault to be in the queue, so a second wake-up finds
    /// it (docs/kernel.md, "The end of a registration"). UFFDIO_WAKE asks nothing of a range but
    /// its alignment: it works on what is no longer registered, and reaches sleepers of this
    /// userfaultfd only.
    pub fn unregister(&self, area: Area<'_>) -> Result<()> {
        let (hva, len) = (area.hva(), area.len());
        let done = self.uffd.unregister(hva.as_ptr(), len as usize).map_err(|e| from_crate("UFFDIO_UNREGISTER", e));
        // Also after a failure: a part of the range may be unregistered.
        let woken = self.wake(hva, len);
        done.and(woken)
    }

    /// Wakes all threads that wait for a page of the range.
    pub fn wake(&self, hva: Hva, len: u64) -> Result<()> {
        self.uffd.wake(hva.as_ptr(), len as usize).map_err(|e| from_crate("UFFDIO_WAKE", e))
    }

    /// Copies bytes of this process into absent pages of `page` bytes. A `source` that can't be
    /// read is EFAULT.
    pub fn copy(&self, area: Area<'_>, source: Hva, page: u64) -> Result<Step> {
        in_one_mapping(area.len(), page, |len| {
            let mut arg = [area.hva().0, source.0, len, 0, 0];
            let result = ioctl(&self.uffd, UFFDIO_COPY, &mut arg);
            step("UFFDIO_COPY", result, arg[4], len)
        })
    }

    /// Installs zero pages.
    pub fn zero(&self, area: Area<'_>, page: u64) -> Result<Step> {
        self.install("UFFDIO_ZEROPAGE", UFFDIO_ZEROPAGE, area, page)
    }

    /// Maps pages that are in the page cache; EFAULT where a page isn't.
    pub fn map(&self, area: Area<'_>, page: u64) -> Result<Step> {
        self.install("UFFDIO_CONTINUE", UFFDIO_CONTINUE, area, page)
    }

    /// Puts poison markers where nothing is mapped.
    pub fn poison(&self, area: Area<'_>, page: u64) -> Result<Step> {
        self.install("UFFDIO_POISON", UFFDIO_POISON, area, page)
    }

    fn install(&self, what: &str, request: u64, area: Area<'_>, page: u64) -> Result<Step> {
        in_one_mapping(area.len(), page, |len| {
            let mut arg = [area.hva().0, len, 0, 0];
            let result = ioctl(&self.uffd, request, &mut arg);
            step(what, result, arg[3], len)
        })
    }

    /// May the calling thread read the userfaultfd? A seccomp filter may refuse it. Takes no
    /// message: one byte is too little for any, and then userfaultfd_read_iter (fs/userfaultfd.c)
    /// says EINVAL.
    pub fn check_readable(&self) -> Result<()> {
        let mut byte = 0u8;
        // SAFETY: reads one byte at most, to a live variable, from our own descriptor.
        match unsafe { libc::read(self.as_raw_fd(), (&raw mut byte).cast(), 1) } {
            -1 => match Error::last_os("reading the userfaultfd") {
                error if [libc::EINVAL, libc::EAGAIN, libc::EINTR].contains(&error.errno) => Ok(()),
                error => Err(error),
            },
            _ => Ok(()),
        }
    }

    /// The next fault, if there is one.
    pub fn next(&self) -> Result<Option<Message>> {
        match self.uffd.read_event() {
            Ok(Some(Event::Pagefault { kind, rw, addr, thread_id })) => Ok(Some(Message {
                hva: Hva(addr as u64),
                write: rw == ReadWrite::Write,
                minor: kind == FaultKind::Minor,
                thread: (self.features & FEATURE_THREAD_ID != 0).then(|| thread_id.as_raw()),
            })),
            // Events (fork, remap, remove, unmap) come only if they were asked for.
            Ok(_) => Ok(None),
            Err(e) => Err(from_crate("reading the userfaultfd", e)),
        }
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.uffd.as_raw_fd()
    }
}

/// The features that UFFDIO_API was done with, as /proc tells: "API:", the version, and these
/// (userfaultfd_show_fdinfo in fs/userfaultfd.c).
fn features_of(fd: RawFd) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("API:"))?;
    u64::from_str_radix(line.trim().split(':').nth(1)?, 16).ok()
}

fn ioctl<const N: usize>(uffd: &userfaultfd::Uffd, request: u64, arg: &mut [u64; N]) -> std::io::Result<()> {
    // SAFETY: every request here is defined on a structure of N 64-bit fields (the size is part of
    // its number). The kernel checks the addresses in it. Those that install name the beginning of
    // an area, and no more than its length: memory that the library may change. Waking changes
    // nothing.
    match unsafe { libc::ioctl(uffd.as_raw_fd(), request, arg.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// An install that begins in one mapping and ends in another fails with ENOENT, and does nothing
/// (find_dst_vma in mm/userfaultfd.c). To the VMM both may be one piece of memory, of several files
/// or split by madvise or mbind. So shorter lengths are tried, down to a page.
fn in_one_mapping(len: u64, page: u64, mut attempt: impl FnMut(u64) -> Result<Step>) -> Result<Step> {
    let mut len = len;
    loop {
        match attempt(len) {
            Err(e) if e.errno == libc::ENOENT && len > page => len = len / page / 2 * page,
            result => return result,
        }
    }
}

/// An install ioctl's outcome. The last field of its structure holds the bytes done, or -errno.
fn step(what: &str, result: std::io::Result<()>, done: u64, len: u64) -> Result<Step> {
    match result {
        Ok(()) => Ok(Step::Done(len)),
        Err(_) if done as i64 > 0 => Ok(Step::Done(done)),
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(Step::Exists),
        Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => Ok(Step::Again),
        Err(e) => Err(Error::from_io(what, &e)),
    }
}

fn from_crate(what: &str, error: userfaultfd::Error) -> Error {
    let errno = match &error {
        userfaultfd::Error::SystemError(e)
        | userfaultfd::Error::CopyFailed(e)
        | userfaultfd::Error::ZeropageFailed(e) => *e as i32,
        _ => libc::EIO,
    };
    // The crate's own message doesn't name the errno.
    Error::new(errno, format!("{what}: {}", std::io::Error::from_raw_os_error(errno)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::mem::{self, Mapping};
    use crate::kernel::page::page_size;

    #[test]
    fn partial_progress_and_eexist_are_told_apart() {
        let uffd = needs!(Uffd::open());
        let memory = Mapping::anonymous(4 * page_size()).unwrap();
        let source = Mapping::anonymous(4 * page_size()).unwrap();
        source.whole().write(&vec![7; 4 * page_size() as usize]).unwrap();
        uffd.register(memory.whole(), Mode::default()).unwrap();
        let copy = |page, from, pages| {
            let area = memory.whole().after(page * page_size()).first(pages * page_size());
            uffd.copy(area, from, page_size())
        };
        assert_eq!(copy(2, source.address(), 1), Ok(Step::Done(page_size())));
        assert_eq!(copy(0, source.address(), 4), Ok(Step::Done(2 * page_size())));
        assert_eq!(copy(0, source.address(), 1), Ok(Step::Exists));
        assert_eq!(copy(3, Hva(page_size()), 1).unwrap_err().errno, libc::EFAULT);
        let mut byte = [0];
        mem::read(memory.address() + page_size(), &mut byte).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn an_adopted_descriptor_must_be_a_userfaultfd() {
        assert_eq!(Uffd::adopt(-1).unwrap_err().errno, libc::EBADF);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(Uffd::adopt(file.as_raw_fd()).unwrap_err().errno, libc::EINVAL);
        let flag = super::super::event::Flag::new().unwrap(); // an anonymous inode, too
        assert_eq!(Uffd::adopt(flag.as_raw_fd()).unwrap_err().errno, libc::EINVAL);
        let first = needs!(Uffd::open());
        let second = Uffd::adopt(first.as_raw_fd()).unwrap();
        let memory = Mapping::anonymous(page_size()).unwrap();
        second.register(memory.whole(), Mode::default()).unwrap();
        assert_eq!(first.zero(memory.whole(), page_size()), Ok(Step::Done(page_size())));
    }

    #[test]
    fn an_adopted_descriptor_may_be_the_device() {
        let device = needs!(std::fs::File::open("/dev/userfaultfd"));
        let uffd = Uffd::adopt(device.as_raw_fd()).unwrap();
        let memory = Mapping::anonymous(page_size()).unwrap();
        uffd.register(memory.whole(), Mode::default()).unwrap();
        assert_eq!(uffd.zero(memory.whole(), page_size()), Ok(Step::Done(page_size())));
    }

    /// A thread that touches the memory just before its registration ends. Without the second
    /// wake-up about one round in fifteen leaves it asleep.
    #[test]
    fn the_end_of_a_registration_leaves_no_sleeper() {
        use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
        use std::time::{Duration, Instant};
        const ROUNDS: u32 = 300;
        let uffd = needs!(Uffd::open());
        let memory = Mapping::anonymous(64 * page_size()).unwrap();
        let (begun, touched, lost) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
        let spin = |times: u32| (0..times).for_each(|_| std::hint::spin_loop());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    while begun.load(SeqCst) < round {
                        std::hint::spin_loop();
                    }
                    spin(round * 13 % 400);
                    memory.atomics()[(u64::from(round % 64) * page_size() / 8) as usize].load(SeqCst);
                    touched.store(round, SeqCst);
                }
            });
            for round in 1..=ROUNDS {
                memory.whole().advise(libc::MADV_DONTNEED, "madvise").unwrap();
                uffd.register(memory.whole(), Mode::default()).unwrap();
                begun.store(round, SeqCst);
                spin(round * 7 % 600);
                uffd.unregister(memory.whole()).unwrap();
                let end = Instant::now() + Duration::from_secs(5);
                while touched.load(SeqCst) < round {
                    std::thread::yield_now();
                    if Instant::now() > end && lost.load(SeqCst) < round {
                        lost.store(round, SeqCst);
                        uffd.wake(memory.address(), 64 * page_size()).unwrap();
                    }
                }
            }
        });
        assert_eq!(lost.into_inner(), 0, "the last round in which the thread slept on");
    }
}
