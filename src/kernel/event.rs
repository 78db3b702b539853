//! An eventfd that is a flag, and poll(2).

use crate::error::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// An eventfd that is readable from the moment when it is raised.
#[derive(Debug)]
pub struct Flag(OwnedFd);

impl Flag {
    /// A new flag, not raised.
    pub fn new() -> Result<Flag> {
        // SAFETY: eventfd returns a new descriptor, which is ours alone, or -1.
        unsafe {
            match libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) {
                -1 => Err(Error::last_os("eventfd")),
                fd => Ok(Flag(OwnedFd::from_raw_fd(fd))),
            }
        }
    }

    /// Makes it readable for every thread that polls it.
    pub fn raise(&self) {
        let one = 1u64;
        // SAFETY: writes 8 bytes from a live variable to our own descriptor.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }
}

impl AsRawFd for Flag {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Waits until one of the descriptors is readable (or broken), and returns which are. After the
/// timeout, or a signal, none is.
pub fn poll<const N: usize>(fds: [i32; N], timeout: Option<Duration>) -> Result<[bool; N]> {
    let mut set = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    let millis = timeout.map_or(-1, |t| t.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32);
    // SAFETY: `set` is a live array of N pollfds.
    match unsafe { libc::poll(set.as_mut_ptr(), N as _, millis) } {
        -1 => match Error::last_os("poll") {
            error if error.errno == libc::EINTR => Ok([false; N]),
            error => Err(error),
        },
        _ => Ok(set.map(|p| p.revents != 0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_stays_raised() {
        let flag = Flag::new().unwrap();
        assert_eq!(poll([flag.as_raw_fd()], Some(Duration::ZERO)).unwrap(), [false]);
        flag.raise();
        assert_eq!(poll([flag.as_raw_fd()], None).unwrap(), [true]);
        assert_eq!(poll([flag.as_raw_fd()], None).unwrap(), [true]);
    }
}
