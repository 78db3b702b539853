//! What every entry does: it keeps panics in, checks handles, and keeps the messages of errors.

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

/// For tests: the name of the entry that panics.
static PANIC_IN: Lazy<Option<String>> = Lazy::new(|| std::env::var("KVMFAULT_TEST_PANIC").ok());

/// Sets the thread's message, and gives -errno.
pub fn failed_with(error: &Error) -> c_int {
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
        Ok(Err(error)) => failed_with(&error).into(),
        Err(_) => {
            poison();
            failed_with(&Error::new(
                libc::ENOTRECOVERABLE,
                format!("{name}: a bug in libkvmfault: it panicked (see stderr)"),
            ))
            .into()
        }
    }
}

/// Runs the body of an entry that takes no handle.
pub fn enter(name: &str, body: impl FnOnce() -> Result<c_int>) -> c_int {
    guarded(name, || {}, || body().map(i64::from)) as c_int
}

const FREED: u64 = 0x6b76_6d66_6672_6565; // "kvmffree"
/// Beside a magic number: an earlier call panicked.
const POISONED: u64 = 1 << 63;

/// What an opaque pointer points to. It is never freed: a call with a handle that was freed is an
/// error, not a crash.
#[repr(C)]
pub struct Handle<T> {
    /// [`Opaque::MAGIC`], perhaps with [`POISONED`], or [`FREED`]. The first field, so that a
    /// handle of another type is recognised, too.
    magic: AtomicU64,
    process: Process,
    inner: ArcSwapOption<T>,
    /// What signal handlers use, for a vCPU.
    seat: OnceCell<&'static Seat>,
    /// Address of the handle that was made before this one. It keeps leak checkers from reporting
    /// handles as lost.
    before: usize,
}

/// The handle that was made last. There is no lock: a forked child could find it taken for ever.
static LAST: AtomicUsize = AtomicUsize::new(0);

/// An opaque C type and what is behind it.
pub trait Opaque {
    /// The Rust type behind it.
    type Inner;
    /// Name of the argument in messages.
    const NAME: &'static str;
    /// Distinguishes a live handle of this type from anything else.
    const MAGIC: u64;
    /// The VMM's callbacks get this handle, and one may be under way when it is freed.
    const HAS_CALLBACKS: bool = false;
    /// Whether the VM that it belongs to was freed.
    fn has_ended(_inner: &Self::Inner) -> bool {
        false
    }

    /// Descriptors of which a forked child has copies, to be closed when the child frees the
    /// handle.
    fn descriptors(_: &Self::Inner) -> Vec<RawFd> {
        Vec::new()
    }
}

impl<T> Handle<T> {
    /// Makes a handle for C.
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
            // SAFETY: no other thread knows the handle yet.
            unsafe { (*handle).before = before };
            Some(handle as usize)
        });
        handle.cast()
    }

    /// Looks at what a pointer from C points to: a handle in any state, or something that can at
    /// least be read.
    fn at<'a, O: Opaque<Inner = T>>(pointer: *const O) -> Result<&'a Handle<T>> {
        let handle = pointer.cast::<Handle<T>>();
        if handle.is_null() {
            fail!(EINVAL, "{}: is NULL", O::NAME);
        }
        if !handle.is_aligned() {
            fail!(EBADF, "{}: {handle:p} is not a handle of this library", O::NAME);
        }
        // SAFETY: not NULL and aligned. Handles are never freed, so each that this library gave out
        // can be read. Other pointers can't be checked, as with free(3); the magic number catches
        // most of them.
        Ok(unsafe { &*handle })
    }

    /// Finds the handle behind a pointer from C; it is alive, and of this process.
    fn find<'a, O: Opaque<Inner = T>>(pointer: *const O) -> Result<&'a Handle<T>> {
        let handle = Handle::at(pointer)?;
        match handle.magic.load(SeqCst) {
            magic if magic == O::MAGIC && handle.process.is_here() => Ok(handle),
            magic => Err(handle.refusal::<O>(magic)),
        }
    }

    /// Says why a handle can't be used.
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

    /// Allows nothing but freeing from now on.
    fn poison<O: Opaque<Inner = T>>(&self) {
        let _ = self.magic.compare_exchange(O::MAGIC, O::MAGIC | POISONED, SeqCst, SeqCst);
    }

    /// Frees a handle. What it held is dropped when the last call that uses it ends. For NULL it
    /// does nothing. A second call is an error, which only `kvmfault_last_error` reports.
    pub fn free<O: Opaque<Inner = T>>(name: &str, pointer: *mut O, before_drop: impl FnOnce(&T)) {
        if pointer.is_null() || Handle::forget_in_child(pointer.cast_const()) {
            return;
        }
        enter(name, || {
            let handle = Handle::at(pointer.cast_const())?;
            let alive = |&magic: &u64| magic & !POISONED == O::MAGIC;
            let freed = handle.magic.fetch_update(SeqCst, SeqCst, |magic| Some(FREED).filter(|_| alive(&magic)));
            if let Err(magic) = freed {
                return Err(handle.refusal::<O>(magic));
            }
            if let Some(inner) = handle.inner.swap(None) {
                before_drop(&inner);
            }
            Ok(0)
        });
    }

    /// In a forked child, frees a handle of the parent's: touches nothing that is shared, and waits
    /// for no lock of the parent's other threads. Gives false if this is no such child.
    fn forget_in_child<O: Opaque<Inner = T>>(pointer: *const O) -> bool {
        let Ok(handle) = Handle::at(pointer) else { return false };
        if handle.magic.load(SeqCst) & !POISONED != O::MAGIC || handle.process.is_here() {
            return false;
        }
        if handle.magic.swap(FREED, SeqCst) != FREED {
            if let Some(inner) = handle.inner.load().as_ref() {
                // SAFETY: this is a child. What is behind a freed handle is not used again and is
                // not dropped: `inner` stays where it is.
                unsafe { close_copies(&O::descriptors(inner)) };
            }
        }
        true
    }
}

impl Handle<Vcpu> {
    /// Makes the handle of a vCPU, which signal handlers can use, too.
    pub fn expose_vcpu(vcpu: Vcpu) -> *mut kvmfault_vcpu {
        let seat = OnceCell::with_value(vcpu.seat());
        Handle::expose_with(vcpu, seat)
    }

    /// For signal handlers: the vCPU's seat, found without anything that can block or allocate; or
    /// -errno. Seats are never freed.
    pub fn seat_of(pointer: *const kvmfault_vcpu) -> std::result::Result<&'static Seat, c_int> {
        let handle = pointer.cast::<Handle<Vcpu>>();
        if handle.is_null() {
            return Err(-libc::EINVAL);
        }
        if !handle.is_aligned() {
            return Err(-libc::EBADF);
        }
        // SAFETY: as in `at`.
        let handle = unsafe { &*handle };
        match handle.magic.load(SeqCst) {
            magic if magic & !POISONED != kvmfault_vcpu::MAGIC => Err(-libc::EBADF),
            _ if !handle.process.is_here() => Err(-libc::ECHILD),
            _ => handle.seat.get().copied().ok_or(-libc::EBADF),
        }
    }
}

/// Runs the body of an entry that takes a handle.
pub fn with<O: Opaque>(name: &str, pointer: *const O, body: impl FnOnce(&Arc<O::Inner>) -> Result<c_int>) -> c_int {
    with_wide(name, pointer, |inner| body(inner).map(i64::from)) as c_int
}

/// Runs the body of an entry that takes a handle and has a 64-bit result.
pub fn with_wide<O: Opaque>(name: &str, pointer: *const O, body: impl FnOnce(&Arc<O::Inner>) -> Result<i64>) -> i64 {
    let handle = match Handle::find(pointer) {
        Ok(handle) => handle,
        Err(error) => return failed_with(&error).into(),
    };
    // A guard, not a reference count: the callbacks of all vCPUs come through here.
    guarded(
        name,
        || handle.poison::<O>(),
        || match handle.inner.load().as_ref() {
            Some(inner) => body(inner).map_err(|e| as_shutdown::<O>(inner, e)),
            None => Err(freed::<O>()),
        },
    )
}

/// The error for a handle that was freed. A callback of the VM can't know, and isn't to blame.
fn freed<O: Opaque>() -> Error {
    if O::HAS_CALLBACKS && crate::resolve::in_callback() {
        return Error::new(libc::ESHUTDOWN, format!("{}: was freed while this callback was under way", O::NAME));
    }
    Error::new(libc::EBADF, format!("{}: this handle was freed", O::NAME))
}

/// Reports a failure whose cause is that the VM was freed meanwhile as -ESHUTDOWN, whatever failed
/// first. An error in the arguments stays what it is.
fn as_shutdown<O: Opaque>(inner: &O::Inner, error: Error) -> Error {
    const STAYS: [i32; 5] = [libc::EINVAL, libc::E2BIG, libc::EDEADLK, libc::ETIMEDOUT, libc::ESHUTDOWN];
    if STAYS.contains(&error.errno) || !O::has_ended(inner) {
        return error;
    }
    Error::new(libc::ESHUTDOWN, format!("the VM was freed meanwhile ({error})"))
}

/// Checks the place for a new handle, and sets it to NULL.
pub fn clear_out<T>(out: *mut *mut T, name: &str) -> Result<()> {
    if out.is_null() {
        fail!(EINVAL, "{name}: is NULL");
    }
    // SAFETY: not NULL; the header says that it points to a pointer.
    unsafe { out.write_unaligned(std::ptr::null_mut()) };
    Ok(())
}

/// Puts a new handle into its place.
pub fn put<T>(out: *mut *mut T, handle: *mut T) {
    // SAFETY: `clear_out` has checked it.
    unsafe { out.write_unaligned(handle) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// src/capi/overview.h states these sizes.
    #[test]
    fn what_a_handle_costs_for_good() {
        assert!(size_of::<Handle<crate::vm::Vm>>() <= 64);
        let vcpu = size_of::<Handle<Vcpu>>() + size_of::<Seat>();
        assert!((1024..=1280).contains(&vcpu), "{vcpu}");
    }
}
