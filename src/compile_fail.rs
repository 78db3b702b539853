//! Programs without unsafe code can't change memory through the crate. Each program that must not
//! compile has a twin that does, so that it fails for the reason that is meant.

/// Memory is lent by an unsafe function.
///
/// ```
/// fn lend(start: *mut u8) -> kvmfault::HostMemory {
///     unsafe { kvmfault::HostMemory::new(start, 4096) }
/// }
/// ```
///
/// ```compile_fail,E0133
/// fn lend(start: *mut u8) -> kvmfault::HostMemory {
///     kvmfault::HostMemory::new(start, 4096)
/// }
/// ```
///
/// ```compile_fail
/// #![forbid(unsafe_code)]
/// fn lend(start: *mut u8) -> kvmfault::HostMemory {
///     unsafe { kvmfault::HostMemory::new(start, 4096) }
/// }
/// ```
struct LendingIsUnsafe;

/// There is no other way to memory that was lent.
///
/// ```
/// fn use_it(memory: &kvmfault::HostMemory) -> kvmfault::Memslot<'_> {
///     kvmfault::Memslot::new(0, 0, memory)
/// }
/// ```
///
/// ```compile_fail,E0624
/// fn use_it(memory: &kvmfault::HostMemory) {
///     memory.address();
/// }
/// ```
///
/// ```compile_fail,E0451
/// fn make_it() -> kvmfault::HostMemory {
///     kvmfault::HostMemory { hva: 0x1000, len: 4096 }
/// }
/// ```
struct LentMemoryIsOpaque;

/// The rooms are private.
///
/// ```
/// use kvmfault::HostMemory;
/// ```
///
/// ```compile_fail,E0603
/// use kvmfault::kernel::host_memory::HostMemory;
/// ```
///
/// ```compile_fail,E0603
/// use kvmfault::kernel::mem;
/// ```
///
/// ```compile_fail,E0603
/// use kvmfault::memory::install;
/// ```
struct RoomsArePrivate;
