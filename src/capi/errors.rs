//! Errors: the message that goes with a -errno.

use std::cell::UnsafeCell;
use std::ffi::c_char;

const MESSAGE_LEN: usize = 1024;

thread_local! {
    static MESSAGE: UnsafeCell<[u8; MESSAGE_LEN]> = const { UnsafeCell::new([0; MESSAGE_LEN]) };
}

/// The message of the last call that failed in this thread. It names, in English, the argument or
/// the system call at fault and, where possible, what to do about it. The text is for people and
/// may change in any version: programs go by the -errno. The functions for signal handlers
/// (`kvmfault_vcpu_kick`, `kvmfault_vcpu_on_sigbus`) leave no message.
///
/// Returns: a string, never NULL; "" if no call has failed in this thread.
/// Threads: any.
/// Callbacks: allowed.
/// Lifetime: the string is valid until the next call that fails in this thread, or the thread's
///   end.
#[no_mangle]
pub extern "C" fn kvmfault_last_error() -> *const c_char {
    MESSAGE.try_with(|message| message.get().cast_const().cast()).unwrap_or(c"".as_ptr())
}

/// Keeps the message of a call that failed.
pub fn set_message(text: &str) {
    let _ = MESSAGE.try_with(|message| {
        let mut len = text.len().min(MESSAGE_LEN - 1);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        // SAFETY: the buffer is this thread's, and no reference to it outlives this block; `len` +
        // 1 bytes fit.
        unsafe {
            let buffer = message.get().cast::<u8>();
            std::ptr::copy_nonoverlapping(text.as_ptr(), buffer, len);
            *buffer.add(len) = 0;
        }
    });
}
