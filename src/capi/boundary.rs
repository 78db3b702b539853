//! What every entry does: no panic gets out, handles are checked, errors get a message.

use super::errors::set_message;
use super::vcpu::kvmfault_vcpu;
use crate::error::{fail, Error, Result};
use crate::kernel::process::{close_copies, Process};
pub use crate::resolve::not_in_callback;
use crate::resolve::seat::Seat;
use crate::vcpu::Vcpu;
use crate::vm::here;
use arc_swap::ArcSwapOption;
use once_cell::sync::{Lazy, OnceCell};

use std::ffi::c_int;
use std::os::fd::RawFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::Arc;

/// For tests: the entry of this name panics.
static PANIC_IN: Lazy<Option<String>> = Lazy::new(|| std::env::var("KVMFAULT_TEST_PANIC").ok());

/// -errno and the thread's message.
pub fn complain(error: &Error) -> c_int {
    set_message(&error.message);
    -error.errno.clamp(1, 4095)
}

/// Runs an entry's body. A panic becomes -ENOTRECOVERABLE, after `poison`.
fn guarded(name: &str, poison: impl FnOnce(), body: impl FnOnce() -> Result<i64>) -> i64 {
    let result = catch_unwind(AssertUnwindSafe(|| {
        if PANIC_IN.as_deref() == Some(name) {
            panic!("KVMFAULT_TEST_PANIC asked for this");
        }
        body()
    }));
    match result {
        Ok(Ok(value)) => value,
        Ok(Err(error)) => complain(&error).into(),
        Err(_) => {
            poison();
            complain(&Error::new(
                libc::ENOTRECOVERABLE,
                format!("{name}: a bug in libkvmfault: it panicked (see stderr)"),
            ))
            .into()
        }
    }
}

/// An entry without a handle.
pub fn enter(name: &str, body: impl FnOnce() -> Result<c_int>) -> c_int {
    guarded(name, || {}, || body().map(i64::from)) as c_int
}

const FREED: u64 = 0x6b76_6d66_6672_6565; // "kvmffree"
/// Beside a magic number: an earlier call panicked.
const POISONED: u64 = 1 << 63;

/// What an opaque pointer points to. Never freed itself: using or freeing a handle after it was freed is an error, not a crash.
#[repr(C)]
pub struct Handle<T> {
    /// [`Opaque::MAGIC`], perhaps with [`POISONED`], or [`FREED`]; first, so that a handle of another type is recognised too.
    magic: AtomicU64,
    process: Process,
    inner: ArcSwapOption<T>,
    /// Of a vCPU.
    seat: OnceCell<&'static Seat>,
    /// The one made before; keeps leak checkers from calling handles lost.
    before: usize,
}

/// The handle made last. No lock: a forked child could find it taken for ever.
static LAST: AtomicUsize = AtomicUsize::new(0);

/// What is behind an opaque C type.
pub trait Opaque {
    /// The Rust type.
    type Inner;
    /// What messages call the argument.
    const NAME: &'static str;
    /// What tells a live handle of this type from all else.
    const MAGIC: u64;
    /// The VMM's callbacks get this handle, and may be under way when it is freed.
    const HAS_CALLBACKS: bool = false;
    /// Was the VM that it belongs to freed?
    fn has_ended(_inner: &Self::Inner) -> bool {
        false
    }

    /// Descriptors that a forked child has copies of, and shouldn't keep once it has freed the handle.
    fn descriptors(_: &Self::Inner) -> Vec<RawFd> {
        Vec::new()
    }
}

impl<T> Handle<T> {
    /// A handle for C.
    pub fn expose<O: Opaque<Inner = T>>(inner: T) -> *mut O {
        Handle::expose_with(inner, OnceCell::new())
    }

    fn expose_with<O: Opaque<Inner = T>>(inner: T, seat: OnceCell<&'static Seat>) -> *mut O {
        let handle = Box::into_raw(Box::new(Handle {
            magic: AtomicU64::new(O::MAGIC),
            process: here(),
            inner: ArcSwapOption::new(Some(Arc::new(inner))),
            seat,
            before: 0,
        }));
        let _ = LAST.fetch_update(SeqCst, SeqCst, |before| {
            // SAFETY: nobody else knows the handle yet.
            unsafe { (*handle).before = before };
            Some(handle as usize)
        });
        handle.cast()
    }

    /// What a pointer from C points to: a handle, whatever its state, or something that at least can be read.
    fn look<'a, O: Opaque<Inner = T>>(pointer: *const O) -> Result<&'a Handle<T>> {
        let handle = pointer.cast::<Handle<T>>();
        if handle.is_null() {
            fail!(EINVAL, "{}: is NULL", O::NAME);
        }
        if !handle.is_aligned() {
            fail!(EBADF, "{}: {handle:p} is not a handle of this library", O::NAME);
        }
        // SAFETY: not NULL and aligned; handles are never freed, so whatever this library gave out can be read. Other pointers are
        // beyond what can be checked, as with free(3); most are caught by the magic number.
        Ok(unsafe { &*handle })
    }

    /// The handle behind a pointer from C, alive and of this process.
    fn find<'a, O: Opaque<Inner = T>>(pointer: *const O) -> Result<&'a Handle<T>> {
        let handle = Handle::look(pointer)?;
        match handle.magic.load(SeqCst) {
            magic if magic == O::MAGIC && handle.process.is_here() => Ok(handle),
            magic => Err(handle.refusal::<O>(magic)),
        }
    }

    /// Why a handle can't be used.
    #[cold]
    fn refusal<O: Opaque<Inner = T>>(&self, magic: u64) -> Error {
        let name = O::NAME;
        let (errno, why) = match magic {
            FREED => return freed::<O>(),
            _ if magic & !POISONED != O::MAGIC => {
                (libc::EBADF, format!("{name}: {self:p} is not a handle of this library"))
            }
            _ if !self.process.is_here() => {
                (libc::ECHILD, format!("{name}: this handle is the parent process's; a forked child can only free it"))
            }
            _ => (libc::ENOTRECOVERABLE, format!("{name}: an earlier call panicked; only freeing is left")),
        };
        Error::new(errno, why)
    }

    /// Only freeing is left.
    fn poison<O: Opaque<Inner = T>>(&self) {
        let _ = self.magic.compare_exchange(O::MAGIC, O::MAGIC | POISONED, SeqCst, SeqCst);
    }

    /// Frees a handle: what it held is dropped when the last call that uses it ends. NULL is nothing; a second time is an error that only
    /// `kvmfault_last_error` tells.
    pub fn free<O: Opaque<Inner = T>>(name: &str, pointer: *mut O, last_words: impl FnOnce(&T)) {
        if pointer.is_null() || Handle::leave(pointer.cast_const()) {
            return;
        }
        enter(name, || {
            let handle = Handle::look(pointer.cast_const())?;
            let alive = |&magic: &u64| magic & !POISONED == O::MAGIC;
            let freed = handle.magic.fetch_update(SeqCst, SeqCst, |magic| Some(FREED).filter(|_| alive(&magic)));
            if let Err(magic) = freed {
                return Err(handle.refusal::<O>(magic));
            }
            if let Some(inner) = handle.inner.swap(None) {
                last_words(&inner);
            }
            Ok(0)
        });
    }

    /// Frees the parent's handle in a forked child: nothing that is shared is touched, and nothing waits for what the parent's other threads held.
    /// False in the parent.
    fn leave<O: Opaque<Inner = T>>(pointer: *const O) -> bool {
        let Ok(handle) = Handle::look(pointer) else { return false };
        if handle.magic.load(SeqCst) & !POISONED != O::MAGIC || handle.process.is_here() {
            return false;
        }
        if handle.magic.swap(FREED, SeqCst) != FREED {
            if let Some(inner) = handle.inner.load().as_ref() {
                // SAFETY: this is a child; what is behind a freed handle is not used again, and is not dropped: `inner` stays where it is.
                unsafe { close_copies(&O::descriptors(inner)) };
            }
        }
        true
    }
}

impl Handle<Vcpu> {
    /// A vCPU's handle, which signal handlers can use too.
    pub fn expose_vcpu(vcpu: Vcpu) -> *mut kvmfault_vcpu {
        let seat = OnceCell::with_value(vcpu.seat());
        Handle::expose_with(vcpu, seat)
    }

    /// For signal handlers: the vCPU's seat, without taking part in anything that can block or allocate; or -errno. Seats are never freed.
    pub fn seat_of(pointer: *const kvmfault_vcpu) -> std::result::Result<&'static Seat, c_int> {
        let handle = pointer.cast::<Handle<Vcpu>>();
        if handle.is_null() {
            return Err(-libc::EINVAL);
        }
        if !handle.is_aligned() {
            return Err(-libc::EBADF);
        }
        // SAFETY: as in `look`.
        let handle = unsafe { &*handle };
        match handle.magic.load(SeqCst) {
            magic if magic & !POISONED != kvmfault_vcpu::MAGIC => Err(-libc::EBADF),
            _ if !handle.process.is_here() => Err(-libc::ECHILD),
            _ => handle.seat.get().copied().ok_or(-libc::EBADF),
        }
    }
}

/// An entry on a handle.
pub fn with<O: Opaque>(name: &str, pointer: *const O, body: impl FnOnce(&Arc<O::Inner>) -> Result<c_int>) -> c_int {
    with_wide(name, pointer, |inner| body(inner).map(i64::from)) as c_int
}

/// An entry on a handle with a 64-bit result.
pub fn with_wide<O: Opaque>(name: &str, pointer: *const O, body: impl FnOnce(&Arc<O::Inner>) -> Result<i64>) -> i64 {
    let handle = match Handle::find(pointer) {
        Ok(handle) => handle,
        Err(error) => return complain(&error).into(),
    };
    // A guard and no count: callbacks of all vCPUs come through here.
    guarded(
        name,
        || handle.poison::<O>(),
        || match handle.inner.load().as_ref() {
            Some(inner) => body(inner).map_err(|e| explain::<O>(inner, e)),
            None => Err(freed::<O>()),
        },
    )
}

/// A handle that was freed. A callback of a VM can't know that its VM was, and isn't to blame.
fn freed<O: Opaque>() -> Error {
    if O::HAS_CALLBACKS && crate::resolve::in_callback() {
        return Error::new(libc::ESHUTDOWN, format!("{}: was freed while this callback was under way", O::NAME));
    }
    Error::new(libc::EBADF, format!("{}: this handle was freed", O::NAME))
}

/// What failed because the VM was freed meanwhile says so, whatever failed first. Wrong arguments stay what they are.
fn explain<O: Opaque>(inner: &O::Inner, error: Error) -> Error {
    const STAYS: [i32; 5] = [libc::EINVAL, libc::E2BIG, libc::EDEADLK, libc::ETIMEDOUT, libc::ESHUTDOWN];
    if STAYS.contains(&error.errno) || !O::has_ended(inner) {
        return error;
    }
    Error::new(libc::ESHUTDOWN, format!("the VM was freed meanwhile ({error})"))
}

/// Checks where a new handle goes, and makes it NULL.
pub fn clear_out<T>(out: *mut *mut T, name: &str) -> Result<()> {
    if out.is_null() {
        fail!(EINVAL, "{name}: is NULL");
    }
    // SAFETY: not NULL; the header says that it points to a pointer.
    unsafe { out.write_unaligned(std::ptr::null_mut()) };
    Ok(())
}

/// Gives a new handle to C.
pub fn put<T>(out: *mut *mut T, handle: *mut T) {
    // SAFETY: `clear_out` has checked it.
    unsafe { out.write_unaligned(handle) };
}
