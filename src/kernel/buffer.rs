//! A page-aligned buffer for what a thread reads. Each thread has its own, and keeps it.

use super::mem::Mapping;
use crate::error::Result;
use std::cell::Cell;

/// The least size of a buffer. It takes memory only for what is written to it.
pub const USUAL: u64 = 1 << 20;
/// The largest buffer that a thread keeps. Larger ones, for pages of 1 GiB, are freed after use.
const KEPT: u64 = 16 << 20;

thread_local! {
    static BUFFER: Cell<Option<Mapping>> = const { Cell::new(None) };
}

/// Registers the destructor that frees the calling thread's buffer. That allocates, which the
/// thread's first fault must not.
pub fn register() {
    let _ = BUFFER.try_with(|_| {});
}

/// Calls `work` with a buffer of `len` bytes, whose content is undefined. A thread maps its buffer
/// once, and replaces it when a larger one is needed. A call inside `work` gets another buffer.
pub fn with<R>(len: u64, work: impl FnOnce(&mut [u8]) -> R) -> Result<R> {
    // A thread that is ending keeps none.
    let kept = BUFFER.try_with(Cell::take).ok().flatten();
    let buffer = match kept {
        Some(buffer) if buffer.size() >= len => buffer,
        _ => Mapping::anonymous(len.max(USUAL))?,
    };
    // SAFETY: the mapping is anonymous, private, readable and writable, at least `len` bytes long,
    // and nothing else refers to it: it was taken out of its place, and goes back when the slice is
    // gone.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.address().as_ptr(), len as usize) };
    let result = work(bytes);
    if buffer.size() <= KEPT {
        let _ = BUFFER.try_with(|place| place.set(Some(buffer)));
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::super::page::page_size;
    use super::*;

    #[test]
    fn a_thread_has_one_buffer_and_it_grows() {
        let page = page_size();
        let address = |len: u64| with(len, |bytes| (bytes.as_ptr() as u64, bytes.len() as u64)).unwrap();
        let (first, _) = address(page);
        assert_eq!(first % page, 0);
        assert_eq!(address(USUAL), (first, USUAL));
        let (larger, _) = address(2 << 20);
        assert_eq!(address(page), (larger, page));
        assert_eq!(address(KEPT + page).1, KEPT + page);
        let kept = BUFFER.take();
        assert!(kept.is_none_or(|kept| kept.size() <= KEPT));
        let inner = with(page, |outer| (outer.as_ptr() as u64, address(page).0)).unwrap();
        assert_ne!(inner.0, inner.1);
    }
}
