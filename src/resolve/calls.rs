//! Which resolver calls are under way. A call may be overtaken: the page comes by another thread, then all others do, and the VMM puts away what
//! its resolver looks at. Whoever tells the VMM that it may do so waits for such calls here.

use crate::error::{Error, Result};
use crate::memory::block::Block;
use crate::memory::pages::State;
use crate::memory::wait::Pause;
use once_cell::race::OnceRef;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{fence, AtomicBool, AtomicU64};

/// What one thread is calling for. Alone in its cache line: threads don't meet here.
#[repr(align(64))]
#[derive(Default)]
struct Place {
    /// A page's address in the VMM's mapping, or 0.
    hva: AtomicU64,
    /// A thread has it.
    taken: AtomicBool,
    next: OnceRef<'static, Place>,
}

/// The places of all threads. They are never freed, but used again (see `Mine`). No lock: a child that is forked while another thread holds one
/// can never take it, and the child's threads come and go, too.
static FIRST: OnceRef<'static, Place> = OnceRef::new();

fn places() -> impl Iterator<Item = &'static Place> {
    std::iter::successors(FIRST.get(), |place| place.next.get())
}

/// A thread's place, for as long as there is the thread.
struct Mine(&'static Place);

impl Mine {
    fn take() -> Mine {
        if let Some(free) = places().find(|place| !place.taken.swap(true, Acquire)) {
            return Mine(free);
        }
        let place: &'static Place = Box::leak(Box::new(Place { taken: true.into(), ..Place::default() }));
        let mut end = &FIRST;
        while end.set(place).is_err() {
            let Some(other) = end.get() else { continue };
            end = &other.next;
        }
        Mine(place)
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        self.0.hva.store(0, Release);
        self.0.taken.store(false, Release);
    }
}

thread_local! {
    static MINE: Mine = Mine::take();
}

/// In a forked child: the parent's other threads are not here, and end no call.
pub fn forget_others() {
    let _ = MINE.try_with(|mine| {
        for place in places().filter(|place| !std::ptr::eq(*place, mine.0)) {
            place.hva.store(0, Release);
            place.taken.store(false, Release);
        }
    });
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
        place.hva.store(hva, Relaxed);
        fence(SeqCst);
    }
    Call(place)
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            place.hva.store(0, Release);
        }
    }
}

/// Waits until no call is under way for a page of this block that is there, or until `enough` says why it should wait no longer.
pub fn wait(block: &Block, enough: impl Fn(u64) -> Option<Error>) -> Result<()> {
    let is_there = |&page: &u64| matches!(block.pages.get(page), State::Present | State::Lost);
    fence(SeqCst);
    for place in places() {
        let mut pause = Pause::default();
        while let Some(page) = block.page_at(place.hva.load(Acquire)).filter(is_there) {
            if let Some(error) = enough(block.hva_of(page)) {
                return Err(error);
            }
            pause.a_moment();
        }
    }
    Ok(())
}
