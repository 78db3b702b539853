//! The C surface: checks what comes from C, converts it, and keeps panics in. No logic. The header is made from here by cbindgen, a group of
//! functions from each file: the comments of exported items are its documentation.

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
