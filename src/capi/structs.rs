//! Structures from C, by the size that they state. Each is read once, and no further than that
//! size; a shorter one ends where a field ends.

use super::fill::{kvmfault_fill_options, kvmfault_fill_progress};
use super::memslots::{kvmfault_memslot, kvmfault_region};
use super::probe::kvmfault_probe;
use super::resolver::kvmfault_fault;
use super::source::kvmfault_file_range;
use super::stats::kvmfault_stats;
use super::vcpu::{kvmfault_memory_error_info, kvmfault_vcpu_options};
use super::vm::kvmfault_vm_options;
use crate::error::{fail, Error, Result};

/// A structure that begins with `size_t size`.
///
/// # Safety
/// `repr(C)`, a `usize` first, and every bit pattern of the rest valid.
pub unsafe trait Versioned: Copy {
    /// The values of the header's initialiser, which a shorter structure from C has in the fields
    /// that it lacks.
    const INIT: Self;
    /// Where each field begins and ends, in order, `size` excepted.
    const FIELDS: &'static [(usize, usize)];
    /// Names of the fields, in the order of `FIELDS`.
    #[cfg(test)]
    const NAMES: &'static [&'static str];
}

/// No structure of the library is longer; a larger size means that the initialiser is missing.
const LONGEST: usize = 4096;

/// Reads the size word of a structure from C. A caller that relies on the result never reads the
/// word again: another thread may change it.
fn stated_size<T: Versioned>(pointer: *const T, name: &str) -> Result<usize> {
    if pointer.is_null() {
        fail!(EINVAL, "{name}: is NULL");
    }
    // SAFETY: not NULL; the header says that the structure begins with its size. It may be
    // unaligned.
    Ok(unsafe { pointer.cast::<usize>().read_unaligned() })
}

/// Checks that a size is one that some version's initialiser gives. A size that cuts a field in
/// half isn't: half a pointer is an address of something else.
fn check_size<T: Versioned>(size: usize, name: &str) -> Result<()> {
    if size == size_of::<T>() {
        return Ok(());
    }
    if !(size_of::<usize>() + 1..=LONGEST).contains(&size) {
        fail!(EINVAL, "{name}.size: is {size}; use the header's initialiser");
    }
    if T::FIELDS.iter().any(|&(start, end)| start < size && size < end) {
        fail!(EINVAL, "{name}.size: is {size}, in the middle of a field; use the header's initialiser");
    }
    Ok(())
}

/// Reads a structure from C. A shorter one gets initial values for the rest; a longer one must be
/// zero beyond what is known.
pub fn read<T: Versioned>(pointer: *const T, name: &str) -> Result<T> {
    let size = stated_size(pointer, name)?;
    check_size::<T>(size, name)?;
    read_sized(pointer, size, name)
}

/// Reads `size` bytes of a structure, after the size was checked.
fn read_sized<T: Versioned>(pointer: *const T, size: usize, name: &str) -> Result<T> {
    let mut value = T::INIT;
    let known = size.min(size_of::<T>());
    // SAFETY: C says that `size` bytes are there. `known` bytes fit into the value, of which every
    // bit pattern is valid (see the trait) and which begins with its size: the one that was
    // checked.
    let has_more = unsafe {
        let from = pointer.cast::<u8>();
        std::ptr::copy_nonoverlapping(from, (&raw mut value).cast::<u8>(), known);
        (&raw mut value).cast::<usize>().write(size);
        (known..size).any(|at| from.add(at).read() != 0)
    };
    if has_more {
        fail!(E2BIG, "{name}.size: is {size}, with values beyond the {known} bytes that this version knows");
    }
    Ok(value)
}

/// Reads an array of `count` structures, each of the size that the first one states. Of each
/// element only the size is read until it is known to be the same.
pub fn read_array<T: Versioned>(pointer: *const T, count: usize, name: &str) -> Result<Vec<T>> {
    let stride = stated_size(pointer, &format!("{name}[0]"))?;
    check_size::<T>(stride, &format!("{name}[0]"))?;
    let mut values = Vec::new();
    let room = values.try_reserve_exact(count);
    room.map_err(|_| Error::new(libc::ENOMEM, format!("{name}: no memory for {count} elements")))?;
    for n in 0..count {
        let element = pointer.cast::<u8>().wrapping_add(n * stride).cast::<T>();
        let (size, name) = (stated_size(element, name)?, format!("{name}[{n}]"));
        if size != stride {
            fail!(EINVAL, "{name}.size: is {size}, but that of the first is {stride}");
        }
        values.push(read_sized(element, size, &name)?);
    }
    Ok(values)
}

/// An output structure of C's. Its size is checked before anything is done.
pub struct Out<T> {
    pointer: *mut T,
    size: usize,
}

impl<T: Versioned> Out<T> {
    /// Checks the size.
    pub fn new(pointer: *mut T, name: &str) -> Result<Out<T>> {
        let size = stated_size(pointer, name)?;
        check_size::<T>(size, name)?;
        Ok(Out { pointer, size })
    }

    /// Fills the structure in as far as C has room. What C has beyond it becomes zero.
    pub fn write(self, value: &T) {
        let known = self.size.min(size_of::<T>());
        // The caller's size stays.
        let skip = size_of::<usize>();
        // SAFETY: C says that `size` bytes are there; `known` are in the value.
        unsafe {
            let (to, from) = (self.pointer.cast::<u8>(), (&raw const *value).cast::<u8>());
            std::ptr::copy_nonoverlapping(from.add(skip), to.add(skip), known - skip);
            std::ptr::write_bytes(to.add(known), 0, self.size - known);
        }
    }
}

/// Implements `Versioned`, from all fields in order and the initial values of those that are not 0.
macro_rules! versioned {
    ($type:ident { $($field:ident),* } $($init:ident: $value:expr),*) => {
        // SAFETY: repr(C), size first; integers and (nullable) pointers only.
        unsafe impl Versioned for $type {
            const INIT: Self = {
                // SAFETY: all-zero is a valid value of integers and nullable pointers.
                #[allow(unused_mut)]
                let mut init: Self = unsafe { std::mem::zeroed() };
                init.size = size_of::<Self>();
                $(init.$init = $value;)*
                init
            };
            const FIELDS: &'static [(usize, usize)] = {
                // The pattern names every field: a list that lacks one doesn't compile.
                let Self { size: _, $($field),* } = &Self::INIT;
                &[$((std::mem::offset_of!(Self, $field), std::mem::offset_of!(Self, $field) + size_of_val($field))),*]
            };
            #[cfg(test)]
            const NAMES: &'static [&'static str] = &[$(stringify!($field)),*];
        }
    };
}

versioned!(kvmfault_fault { gpa, len, hva, slot, access, origin, vcpu, window_gpa, window_len } vcpu: -1);
versioned!(kvmfault_vm_options {
    kvm_fd, vm_fd, mechanism, uffd, abi, resolver, opaque, finalizer, written, reader_threads, readahead, flags
} kvm_fd: -1, vm_fd: -1, uffd: -1);
versioned!(kvmfault_memslot {
    slot, kvm_flags, gpa, len, hva, block_hva, block_len, memory, fd, fd_offset, flags, reserved
} fd: -1);
versioned!(kvmfault_region {
    ioctl_version,
    slot,
    flags,
    reserved,
    guest_phys_addr,
    memory_size,
    userspace_addr,
    userfault_bitmap
});
versioned!(kvmfault_vcpu_options { fd, sigbus, run, kick_signal, flags } fd: -1);
versioned!(kvmfault_memory_error_info { gpa, hva, len, lost, reserved });
versioned!(kvmfault_probe {
    mechanisms_anon,
    mechanisms_shared,
    mechanisms_hugetlb,
    reserved,
    uffd_features,
    abi,
    pre_fault_memory,
    two_dimensional_paging
});
versioned!(kvmfault_stats {
    faults_vcpu,
    faults_host,
    faults_prefetch,
    resolver_calls,
    outcome_resolved,
    outcome_waited,
    outcome_mapped,
    outcome_lost,
    outcome_failed,
    outcome_interrupted,
    outcome_retried,
    pages_copied,
    pages_zeroed,
    pages_mapped,
    pages_discarded,
    retries_again,
    retries_exist,
    mmio_reads,
    mmio_writes,
    kicks,
    latency_us_log2,
    ahead_asked,
    ahead_failed,
    pages_empty,
    pages_given_back
});
versioned!(kvmfault_file_range { gpa, len, offset });
versioned!(kvmfault_fill_options {
    threads, batch, bytes_per_second, progress, opaque, finalizer, interval_ms, flags, working_set_fd, reserved, gpa,
    len
} working_set_fd: -1);
versioned!(kvmfault_fill_progress {
    pages_total,
    pages_left,
    failures,
    bytes_per_second,
    eta_ms,
    working_set_done,
    ended,
    paused,
    threads_calling
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_read_by_their_size() {
        let mut short = kvmfault_vm_options::INIT;
        short.size = 16; // up to and with vm_fd
        (short.kvm_fd, short.vm_fd, short.uffd) = (3, 4, 77);
        let got = read(&short, "options").unwrap();
        assert_eq!((got.kvm_fd, got.vm_fd, got.uffd), (3, 4, -1), "what C didn't pass has its initial value");

        #[repr(C)]
        struct Longer {
            known: kvmfault_file_range,
            tail: [u8; 8],
        }
        let mut longer = Longer { known: kvmfault_file_range::INIT, tail: [0; 8] };
        longer.known.size = size_of::<Longer>();
        let pointer = (&raw const longer).cast();
        assert!(read::<kvmfault_file_range>(pointer, "range").is_ok());
        let mut longer = Longer { tail: [0, 0, 0, 0, 0, 0, 0, 1], ..longer };
        assert_eq!(read::<kvmfault_file_range>((&raw const longer).cast(), "range").unwrap_err().errno, libc::E2BIG);
        Out::new((&raw mut longer).cast(), "range").unwrap().write(&kvmfault_file_range::INIT);
        assert_eq!((longer.tail, longer.known.size), ([0; 8], size_of::<Longer>()));

        for size in [0, 8, LONGEST + 1, usize::MAX] {
            let bad = kvmfault_file_range { size, ..kvmfault_file_range::INIT };
            assert_eq!(read(&bad, "range").unwrap_err().errno, libc::EINVAL);
        }
        assert!(read::<kvmfault_file_range>(std::ptr::null(), "range").unwrap_err().message.contains("NULL"));
    }

    /// For every structure: a size that is too short or ends inside a field is EINVAL; any other is
    /// read as far as it goes.
    #[test]
    fn a_size_ends_where_a_field_ends() {
        fn check<T: Versioned>(name: &str) {
            let room = size_of::<T>() + 8;
            let mut memory = vec![0u64; room.div_ceil(8)];
            let pointer = memory.as_mut_ptr().cast::<T>();
            for size in 0..=room {
                memory[0] = size as u64;
                let whole = size > size_of::<usize>() && !T::FIELDS.iter().any(|(s, e)| (s + 1..*e).contains(&size));
                assert_eq!(read(pointer, name).is_ok(), whole, "{name} of {size}");
                assert_eq!(Out::new(pointer, name).is_ok(), whole, "{name} of {size}");
                if !whole {
                    let error = read(pointer, name).err().unwrap();
                    assert!(error.errno == libc::EINVAL && error.message.contains(&format!("{name}.size")), "{error}");
                }
            }
            let mut end = size_of::<usize>();
            for &(start, stop) in T::FIELDS {
                assert!(start >= end && start < stop, "{name}: fields are in order");
                end = stop;
            }
            assert_eq!(end, size_of::<T>(), "{name}: the last field is its end");
        }
        check::<kvmfault_fault>("fault");
        check::<kvmfault_vm_options>("options");
        check::<kvmfault_memslot>("slot");
        check::<kvmfault_region>("region");
        check::<kvmfault_vcpu_options>("options");
        check::<kvmfault_memory_error_info>("info");
        check::<kvmfault_probe>("probe");
        check::<kvmfault_stats>("stats");
        check::<kvmfault_file_range>("range");
        check::<kvmfault_fill_options>("options");
        check::<kvmfault_fill_progress>("progress");
    }

    /// src/capi/layout.txt records the ABI: the alignment and size of each structure, and the
    /// offset and size of each field. tests/layout.rs compares C's layout with it.
    #[test]
    fn the_layout_is_the_recorded_one() {
        fn lines<T: Versioned>(name: &str) -> String {
            let mut lines = format!("{name}. {} {}\n", align_of::<T>(), size_of::<T>());
            lines += &format!("{name}.size 0 {}\n", size_of::<usize>());
            for (field, (start, end)) in T::NAMES.iter().zip(T::FIELDS) {
                lines += &format!("{name}.{field} {start} {}\n", end - start);
            }
            lines
        }
        let mut fresh = String::new();
        macro_rules! add {
            ($($type:ident)*) => { $(fresh += &lines::<$type>(stringify!($type));)* };
        }
        add!(kvmfault_fault kvmfault_vm_options kvmfault_memslot kvmfault_region kvmfault_vcpu_options);
        add!(kvmfault_memory_error_info kvmfault_probe kvmfault_stats kvmfault_file_range kvmfault_fill_options);
        add!(kvmfault_fill_progress);
        let recorded = include_str!("layout.txt");
        let new: Vec<_> = fresh.lines().filter(|line| !recorded.lines().any(|known| known == *line)).collect();
        let gone: Vec<_> = recorded.lines().filter(|line| !fresh.lines().any(|here| here == *line)).collect();
        assert!(new.is_empty() && gone.is_empty(), "not recorded: {new:#?}; recorded, and not so: {gone:#?}");
    }

    #[test]
    fn an_array_is_read_by_the_first_size() {
        let range = kvmfault_file_range::INIT;
        assert_eq!(read_array([range; 3].as_ptr(), 3, "ranges").unwrap().len(), 3);
        let mut other = [range; 2];
        other[1].size = LONGEST; // nothing of that may be looked at
        let error = read_array(other.as_ptr(), 2, "ranges").unwrap_err();
        assert!(error.errno == libc::EINVAL && error.message.starts_with("ranges[1].size"), "{error}");
    }
}
