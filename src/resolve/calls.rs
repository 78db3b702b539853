//! Which resolver calls are under way. A call may be overtaken: the page comes by another thread, then all others do, and the VMM puts away what
//! its resolver looks at. Whoever tells the VMM that it may do so waits for such calls here.

use crate::error::{Error, Result};
use crate::memory::block::Block;
use crate::memory::pages::State;
use crate::memory::wait::Pause;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{fence, AtomicU64};
use std::sync::{Mutex, PoisonError};

/// What one thread is calling for: a page's address in the VMM's mapping, or 0. Alone in its cache line: threads don't meet here.
#[repr(align(64))]
#[derive(Default)]
struct Place(AtomicU64);

/// The places of all threads that are there. They are never freed, but used again: see `Mine`.
static PLACES: Mutex<Vec<&'static Place>> = Mutex::new(Vec::new());
static FREE: Mutex<Vec<&'static Place>> = Mutex::new(Vec::new());

/// A thread's place, for as long as there is the thread.
struct Mine(&'static Place);

impl Mine {
    fn take() -> Mine {
        let used = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Mine(used.unwrap_or_else(|| {
            let place: &Place = Box::leak(Box::default());
            let mut all = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
            all.push(place);
            // Room for all of them, so that a thread that ends allocates nothing: others may be serving faults.
            let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
            let missing = all.len() - free.len();
            free.reserve(missing);
            place
        }))
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        self.0 .0.store(0, Release);
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
    }
}

thread_local! {
    static MINE: Mine = Mine::take();
}

/// Gives the calling thread its place, which allocates: so that its first fault needn't.
pub fn register() {
    let _ = MINE.try_with(|_| {});
}

/// A call that is under way.
pub struct Call(Option<&'static Place>);

/// The calling thread is about to call the resolver for a page. It must look at the page's state after this, and call only if the page isn't
/// there: then whoever waits either sees this call, or has seen the page first and so does the caller.
pub fn begin(hva: u64) -> Call {
    let place = MINE.try_with(|mine| mine.0).ok();
    if let Some(place) = place {
        place.0.store(hva, Relaxed);
        fence(SeqCst);
    }
    Call(place)
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            place.0.store(0, Release);
        }
    }
}

/// Waits until no call is under way for a page of this block that is there, or until `enough` says why it should wait no longer.
pub fn wait(block: &Block, enough: impl Fn(u64) -> Option<Error>) -> Result<()> {
    let is_there = |&page: &u64| matches!(block.pages.get(page), State::Present | State::Lost);
    fence(SeqCst);
    let places = PLACES.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for place in places {
        let mut pause = Pause::default();
        while let Some(page) = block.page_at(place.0.load(Acquire)).filter(is_there) {
            if let Some(error) = enough(block.hva_of(page)) {
                return Err(error);
            }
            pause.a_moment();
        }
    }
    Ok(())
}
