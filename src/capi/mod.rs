//! The C surface: checks what comes from C, converts it, and keeps panics in. No logic. The header is made from here by cbindgen: the
//! comments of exported items are its documentation.

#![allow(non_camel_case_types)]

mod boundary;
pub mod fill;
mod finalizer;
pub mod pages;
pub mod probe;
pub mod source;
mod structs;
pub mod types;
pub mod vcpu;
pub mod vm;
