//! Version.

use std::ffi::{c_char, c_int};

/// The major version: grows when programs must be changed.
pub const KVMFAULT_VERSION_MAJOR: c_int = 0;

/// The minor version: grows when something is added.
pub const KVMFAULT_VERSION_MINOR: c_int = 2;

/// The patch version.
pub const KVMFAULT_VERSION_PATCH: c_int = 0;

/// The version of the library in use as a string, "0.2.0". Any thread.
#[no_mangle]
pub extern "C" fn kvmfault_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// The version of the library in use as a number: major * 1000000 + minor * 1000 + patch. Compare with KVMFAULT_VERSION_NUMBER, the
/// version that the program was compiled with. Any thread.
#[no_mangle]
pub extern "C" fn kvmfault_version_number() -> u32 {
    (KVMFAULT_VERSION_MAJOR * 1_000_000 + KVMFAULT_VERSION_MINOR * 1000 + KVMFAULT_VERSION_PATCH) as u32
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
