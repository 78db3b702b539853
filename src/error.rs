//! One error type: an errno for programs and a sentence for people.

use std::borrow::Cow;
use std::fmt;

/// What went wrong: `errno` is what C callers get (negated), `message` is what `kvmfault_last_error` shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// A positive errno of `<errno.h>`.
    pub errno: i32,
    /// For a human; names the argument or the system call, and where possible what to do.
    pub message: Cow<'static, str>,
}

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with a message of its own.
    pub fn new(errno: i32, message: impl Into<Cow<'static, str>>) -> Error {
        Error { errno, message: message.into() }
    }

    /// The calling thread's errno, as the result of a system call named by `what`.
    pub fn last_os(what: &str) -> Error {
        Error::from_io(what, &std::io::Error::last_os_error())
    }

    /// An I/O error as the result of what `what` says.
    pub fn from_io(what: &str, error: &std::io::Error) -> Error {
        Error::new(error.raw_os_error().unwrap_or(libc::EIO), format!("{what}: {error}"))
    }

    /// The same errno with words before the message.
    pub fn context(self, what: impl fmt::Display) -> Error {
        Error::new(self.errno, format!("{what}: {}", self.message))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// `fail!(EINVAL, "gpa {gpa:#x} is ...")`: returns an [`Error`].
macro_rules! fail {
    ($errno:ident, $($message:tt)+) => {
        return Err($crate::error::Error::new(libc::$errno, format!($($message)+)))
    };
}
pub(crate) use fail;
