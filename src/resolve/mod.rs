//! How pages are fetched: exactly one caller at a time calls the VMM's resolver for a page, and all
//! others wait for it.

mod call;
pub mod callbacks;
mod engine;
mod fault;
pub mod file_source;
pub mod fill;
pub mod readahead;
pub mod reader;
pub mod seat;
pub mod strays;
pub mod working_set;

pub use call::{callback, in_callback, not_in_callback, note_failure};
pub use engine::Engine;
pub use fault::{pause_before, Answer, Extent, Fault, FaultRequest, Origin, Outcome, Resolver, Waiter, MAX_RETRIES};
