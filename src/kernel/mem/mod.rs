//! Memory of this process: mappings that the library makes, accesses that fail instead of crashing,
//! and what the VMM has mapped where.

mod access;
mod backing;
mod mapping;

pub use super::arch::ADDRESSES;
pub use access::*;
pub use backing::*;
pub use mapping::*;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::address::Hva;
    use crate::kernel::host_memory::HostMemory;
    use crate::kernel::page::page_size;

    #[test]
    fn kinds_are_told_apart() {
        let anon = Mapping::anonymous(4 * page_size()).unwrap();
        assert_eq!(
            inspect(&HostMemory::for_test(anon.address(), 4 * page_size()), None, None).unwrap(),
            Backing { kind: Kind::Anon, page: page_size() }
        );
        let text = inspect(
            &HostMemory::for_test(Hva(kinds_are_told_apart as *const () as u64 & !(page_size() - 1)), page_size()),
            None,
            None,
        )
        .unwrap_err();
        assert_eq!(text.errno, libc::EACCES);
        assert_eq!(
            inspect(&HostMemory::for_test(Hva(page_size()), page_size()), None, None).unwrap_err().errno,
            libc::EFAULT
        );
    }

    #[test]
    fn shared_memory_may_have_a_name() {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let memory = Mapping::map(0, page_size(), libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0, "mmap").unwrap();
        // SAFETY: names a live mapping; EINVAL on kernels that don't do that.
        unsafe {
            libc::prctl(libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME, memory.address(), page_size(), c"guest".as_ptr())
        };
        assert_eq!(
            inspect(&HostMemory::for_test(memory.address(), page_size()), None, None).unwrap().kind,
            Kind::Shared
        );
    }

    #[test]
    fn a_bad_address_is_an_error_and_not_a_crash() {
        let mut byte = [0];
        assert_eq!(read(Hva(page_size()), &mut byte).unwrap_err().errno, libc::EFAULT);
        let nowhere = HostMemory::for_test(Hva(page_size()), page_size());
        assert_eq!(nowhere.whole().write(&byte).unwrap_err().errno, libc::EFAULT);
    }
}
