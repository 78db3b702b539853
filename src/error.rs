//! The error type of the crate: an errno for programs and a message for people.

use std::borrow::Cow;
use std::fmt;

/// What went wrong: an errno for programs, and a message for people that names the argument or the
/// system call, and where possible what to do. The message's text is not stable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// What C callers get, negated.
    pub(crate) errno: i32,
    /// What `kvmfault_last_error` shows.
    pub(crate) message: Cow<'static, str>,
}

/// The result type of the crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A positive errno of `<errno.h>`.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// An error with a message of its own.
    pub(crate) fn new(errno: i32, message: impl Into<Cow<'static, str>>) -> Error {
        Error { errno, message: message.into() }
    }

    /// The calling thread's errno, as the result of the system call that `what` names.
    pub(crate) fn last_os(what: &str) -> Error {
        Error::from_io(what, &std::io::Error::last_os_error())
    }

    /// An I/O error as the result of what `what` says.
    pub(crate) fn from_io(what: &str, error: &std::io::Error) -> Error {
        Error::new(error.raw_os_error().unwrap_or(libc::EIO), format!("{what}: {error}"))
    }

    /// The same errno with words before the message.
    pub(crate) fn context(self, what: impl fmt::Display) -> Error {
        Error::new(self.errno, format!("{what}: {}", self.message))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<Error> for std::io::Error {
    /// An I/O error of the kind that the errno has, with the message.
    fn from(error: Error) -> std::io::Error {
        std::io::Error::new(std::io::Error::from_raw_os_error(error.errno).kind(), error)
    }
}

/// Returns an [`Error`]: `fail!(EINVAL, "gpa {gpa:#x} is ...")`.
macro_rules! fail {
    ($errno:ident, $($message:tt)+) => {
        return Err($crate::error::Error::new(libc::$errno, format!($($message)+)))
    };
}
pub(crate) use fail;
