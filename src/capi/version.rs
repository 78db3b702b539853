//! Version: of the library, and of the header that a program was compiled with.

use std::ffi::{c_char, c_int};

/// Major version: incremented when programs have to change.
pub const KVMFAULT_VERSION_MAJOR: c_int = 0;

/// Minor version: incremented when something is added.
pub const KVMFAULT_VERSION_MINOR: c_int = 2;

/// Patch version: incremented when bugs are fixed.
pub const KVMFAULT_VERSION_PATCH: c_int = 0;
/// The version that a program is compiled with, as a number: see `kvmfault_version_number`.
pub const KVMFAULT_VERSION_NUMBER: c_int =
    KVMFAULT_VERSION_MAJOR * 1_000_000 + KVMFAULT_VERSION_MINOR * 1000 + KVMFAULT_VERSION_PATCH;

/// The version of the library in use, as a string: "0.2.0".
///
/// Returns: a static string, never NULL.
/// Threads: any.
/// Callbacks: allowed.
#[no_mangle]
pub extern "C" fn kvmfault_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// The version of the library in use, as a number. Compare it with KVMFAULT_VERSION_NUMBER, the
/// version that the program was compiled with.
///
/// Returns: major * 1000000 + minor * 1000 + patch.
/// Threads: any.
/// Callbacks: allowed.
#[no_mangle]
pub extern "C" fn kvmfault_version_number() -> u32 {
    KVMFAULT_VERSION_NUMBER as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_cargos() {
        let version = format!("{KVMFAULT_VERSION_MAJOR}.{KVMFAULT_VERSION_MINOR}.{KVMFAULT_VERSION_PATCH}");
        assert_eq!(version, env!("CARGO_PKG_VERSION"));
    }
}
