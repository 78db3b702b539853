//! The C surface: checks what comes from C, converts it, and keeps panics in. No logic.
//!
//! The header is made from here (tests/header.rs): each public file is a group of it, with the
//! file's constants, structures and functions in the file's order, and their comments word for
//! word. `overview.h` is its beginning. Write for a C developer there.

#![allow(non_camel_case_types)]
#![allow(dead_code, reason = "some constants are for C programs only")]

mod boundary;
pub mod errors;
pub mod fill;
mod finalizer;
pub mod memslots;
pub mod pages;
pub mod probe;
pub mod resolver;
pub mod source;
pub mod stats;
mod structs;
pub mod vcpu;
pub mod version;
pub mod vm;
pub mod working_set;
