//! A buffer for what a thread reads: its own, page-aligned, and there already when it is needed again.

use super::mem::Mapping;
use crate::error::Result;
use std::cell::Cell;

/// A buffer has room for so many bytes, even if fewer are needed now; memory is taken for those that
/// are written.
pub const USUAL: u64 = 1 << 20;
/// The largest that a thread keeps. Others are for pages of 1 GiB, and are given back at once.
const KEPT: u64 = 16 << 20;

thread_local! {
    static BUFFER: Cell<Option<Mapping>> = const { Cell::new(None) };
}

/// Has the calling thread's end give its buffer back, which allocates: so that its first fault needn't.
pub fn register() {
    let _ = BUFFER.try_with(|_| {});
}

/// Calls `work` with a buffer of `len` bytes, which holds anything. A thread maps it once; a larger one
/// takes its place. Inside `work` another call gets a buffer of its own.
pub fn with<R>(len: u64, work: impl FnOnce(&mut [u8]) -> R) -> Result<R> {
    // A thread that is ending has none to keep.
    let kept = BUFFER.try_with(Cell::take).ok().flatten();
    let buffer = match kept {
        Some(buffer) if buffer.size() >= len => buffer,
        _ => Mapping::anonymous(len.max(USUAL))?,
    };
    // SAFETY: the mapping is anonymous, private, readable and writable, at least `len` bytes long, and
    // nothing else refers to it: it was taken out of its place, and goes back when the slice is gone.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.address() as *mut u8, len as usize) };
    let result = work(bytes);
    if buffer.size() <= KEPT {
        let _ = BUFFER.try_with(|place| place.set(Some(buffer)));
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_one_buffer_and_it_grows() {
        let address = |len: u64| with(len, |bytes| (bytes.as_ptr() as u64, bytes.len() as u64)).unwrap();
        let (first, _) = address(4096);
        assert_eq!(first % 4096, 0);
        assert_eq!(address(USUAL), (first, USUAL));
        let (larger, _) = address(2 << 20);
        assert_eq!(address(4096), (larger, 4096));
        assert_eq!(address(KEPT + 4096).1, KEPT + 4096);
        let kept = BUFFER.take();
        assert!(kept.is_none_or(|kept| kept.size() <= KEPT));
        let inner = with(4096, |outer| (outer.as_ptr() as u64, address(4096).0)).unwrap();
        assert_ne!(inner.0, inner.1);
    }
}
