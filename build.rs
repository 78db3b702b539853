//! Gives the cdylib the SONAME that rustc leaves out. The installed library gets its SONAME, and a
//! symbol map, from the Makefile.
fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!(
        "cargo:rustc-cdylib-link-arg=-Wl,-soname,libkvmfault.so.{}",
        std::env::var("CARGO_PKG_VERSION_MAJOR").unwrap_or_default()
    );
}
