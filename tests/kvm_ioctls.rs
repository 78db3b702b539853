//! A VMM with any version of kvm-ioctls can use the crate: it passes descriptors, and no types. The
//! guest is one of x86-64.
#![cfg(target_arch = "x86_64")]

use kvmfault::{Answer, Exit, Fault, HostMemory, Memslot, Origin, PageState, Vcpu, Vm};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::Arc;
use std::time::Duration;

/// mov byte [bx], 0x5a; add bx, 4096; dec cx; jnz the first; hlt
const CODE: [u8; 11] = [0xc6, 0x07, 0x5a, 0x81, 0xc3, 0x00, 0x10, 0x49, 0x75, 0xf6, 0xf4];
const CODE_GPA: u64 = 0x1000;
const DATA_GPA: u64 = 0x20000;
const PAGE: usize = 4096;
const PAGES: usize = 8;

fn borrow(fd: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: it is open for as long as what it is borrowed from.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Shared memory that stays mapped.
fn map(len: usize) -> *mut u8 {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, at an address that the kernel picks.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    start.cast()
}

macro_rules! needs {
    ($result:expr) => {
        match $result {
            Ok(found) => found,
            Err(why) => return eprintln!("skipped: {why}"),
        }
    };
}

/// A guest that touches absent pages runs in the VMM's own loop, which calls KVM_RUN by kvm-ioctls.
macro_rules! runs_with {
    ($test:ident, $ioctls:ident, $bindings:ident) => {
        #[test]
        fn $test() {
            let kvm = needs!($ioctls::Kvm::new());
            let vm = kvm.create_vm().unwrap();
            let code = map(PAGE);
            // SAFETY: the code fits, and nothing else uses the mapping.
            unsafe { code.copy_from_nonoverlapping(CODE.as_ptr(), CODE.len()) };
            let region = $bindings::kvm_userspace_memory_region {
                slot: 0,
                flags: 0,
                guest_phys_addr: CODE_GPA,
                memory_size: PAGE as u64,
                userspace_addr: code as u64,
            };
            // SAFETY: the mapping stays.
            unsafe { vm.set_user_memory_region(region).unwrap() };
            let mut vcpu = vm.create_vcpu(0).unwrap();
            let mut sregs = vcpu.get_sregs().unwrap();
            (sregs.cs.base, sregs.cs.selector) = (CODE_GPA, (CODE_GPA >> 4) as u16);
            (sregs.ds.base, sregs.ds.selector) = (DATA_GPA, (DATA_GPA >> 4) as u16);
            vcpu.set_sregs(&sregs).unwrap();
            vcpu.set_regs(&$bindings::kvm_regs { rflags: 2, rcx: PAGES as u64, ..Default::default() }).unwrap();

            let calls = Arc::new(AtomicU64::new(0));
            let counted = calls.clone();
            let sevens = move |vm: &Vm, fault: &Fault<'_>| -> Answer {
                counted.fetch_add(1, SeqCst);
                assert_eq!(fault.origin(), Origin::Vcpu(Some(0)));
                assert_eq!(vm.discard(fault.gpa(), fault.len()).unwrap_err().errno(), libc::EDEADLK);
                vm.install(fault.gpa(), &[7; PAGE]).into()
            };
            let memory = needs!(Vm::options(borrow(&kvm), borrow(&vm)).attach(sevens));
            let ram = map(PAGES * PAGE);
            // SAFETY: the mapping stays; it is read by volatile accesses only.
            let lent = unsafe { HostMemory::new(ram, PAGES * PAGE) };
            memory.set_memslot(&Memslot::new(1, DATA_GPA, &lent)).unwrap();
            assert_eq!((memory.absent(), memory.state(DATA_GPA)), (PAGES as u64, Ok(PageState::Absent)));

            let faults = Vcpu::options(borrow(&vcpu)).resumes().attach(&memory).unwrap();
            faults.kicker().kick();
            let mut kicks = 0;
            loop {
                match faults.resume().unwrap() {
                    Exit::Handled => {}
                    Exit::Interrupted => {
                        kicks += 1;
                        continue;
                    }
                    other => panic!("{other:?}"),
                }
                let errno = vcpu.run().map(drop).err().map(|e| e.errno());
                match faults.handle_exit(errno).unwrap() {
                    Exit::Handled => {}
                    Exit::Interrupted => kicks += 1,
                    Exit::Pass => break,
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!((kicks, vcpu.get_kvm_run().exit_reason), (1, $bindings::KVM_EXIT_HLT));
            for page in 0..PAGES {
                // SAFETY: inside the mapping.
                let bytes = [0, 1].map(|n| unsafe { ram.add(page * PAGE + n).read_volatile() });
                assert_eq!(bytes, [0x5a, 7], "page {page}");
            }
            let mut bitmap = [!0u64; 2];
            let present = memory.bitmap(DATA_GPA, (PAGES * PAGE) as u64, &[PageState::Present], &mut bitmap);
            assert_eq!((present, bitmap), (Ok(PAGES as u64), [0xff, !0]));
            assert_eq!((calls.load(SeqCst), memory.stats().pages_copied), (PAGES as u64, PAGES as u64));
            memory.delete_memslot(1).unwrap();
            memory.close(Some(Duration::from_secs(10))).unwrap();
            assert_eq!(Arc::strong_count(&calls), 1, "the resolver is dropped");
            assert_eq!(faults.run().unwrap_err().errno(), libc::ESHUTDOWN);
        }
    };
}

runs_with!(kvm_ioctls_0_24, kvm_ioctls, kvm_bindings);
runs_with!(kvm_ioctls_0_20, kvm_ioctls_0_20, kvm_bindings_0_11);

/// A resolver that panics fails the fault, and not the process.
#[test]
fn a_panic_of_a_resolver_is_an_error() {
    let kvm = needs!(kvm_ioctls::Kvm::new());
    let vm = kvm.create_vm().unwrap();
    let panics = |_: &Vm, _: &Fault<'_>| -> Answer { panic!("as the test wants it") };
    let memory = needs!(Vm::options(borrow(&kvm), borrow(&vm)).attach(panics));
    let ram = map(PAGE);
    // SAFETY: the mapping stays; nothing touches it.
    let lent = unsafe { HostMemory::new(ram, PAGE) };
    memory.set_memslot(&Memslot::new(1, DATA_GPA, &lent)).unwrap();
    assert_eq!(memory.resolve(DATA_GPA, PAGE as u64).unwrap_err().errno(), libc::ENOTRECOVERABLE);
    assert_eq!(memory.state(DATA_GPA), Ok(PageState::Absent));
}

/// Every reader of an error finds the errno and a message.
#[test]
fn errors_are_std_errors() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let error = Vm::options(borrow(&null), borrow(&null)).attach(|_: &Vm, _: &Fault<'_>| Answer::Lost).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    let error: Box<dyn std::error::Error + Send + Sync> = error.into();
    assert!(error.to_string().starts_with("kvm_fd: "), "{error}");
}
