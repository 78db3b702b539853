//! Real vCPUs on a tiny guest, which stores a byte into each of some pages.

use super::arch::test_guest;
use super::*;
use crate::kernel::address::Gpa;
use crate::kernel::host_memory::HostMemory;
use crate::kernel::kvm::{Region, SystemFd, VmFd};
use crate::kernel::mem;
use crate::kernel::mem::Mapping;
use crate::kernel::page::page_size;
use crate::mechanism::MECHANISMS;
use crate::memory::pages::State;
use crate::memory::source::Source;
use crate::resolve::{Answer, Fault, Resolver};
use crate::vm::memslots::{MemoryKind, SlotRequest};
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::sync::{OnceLock, Weak};
use std::time::{Duration, Instant};

const CODE_GPA: Gpa = Gpa(0x1_0000);
const DATA_GPA: Gpa = Gpa(0x2_0000);
const PAGES: u64 = 8;

struct Sevens {
    bytes: Mapping,
    vm: Arc<OnceLock<Weak<Vm>>>,
}

impl Resolver for Sevens {
    fn resolve(&self, fault: &Fault) -> Answer {
        let vm = self.vm.get().and_then(Weak::upgrade).expect("the VM");
        match vm.install(fault.gpa, fault.len, Source::Copy(self.bytes.address())) {
            Ok(()) => Answer::Resolved,
            Err(e) => Answer::Failed(e.errno),
        }
    }
}

pub(super) struct Machine {
    vm: Arc<Vm>,
    vcpus: Vec<VcpuFd>,
    data: Mapping,
    _code: Mapping,
}

impl Machine {
    /// A VM with `vcpus` vCPUs, each of which has PAGES pages of its own.
    pub(super) fn new(mechanism: Option<usize>, vcpus: u64) -> Result<Machine> {
        let system = SystemFd::open()?;
        let vm = system.create_vm().unwrap();
        let code = Mapping::anonymous(page_size()).unwrap();
        code.whole().write(&test_guest::CODE).unwrap();
        let region = Region { version: 1, gpa: CODE_GPA, len: page_size(), hva: code.address(), ..Default::default() };
        vm.set_region(&region, code.whole()).unwrap();
        let data = shared(vcpus * PAGES * page_size());
        let bytes = Mapping::anonymous(page_size()).unwrap();
        bytes.whole().write(&vec![7; page_size() as usize]).unwrap();
        let myself = Arc::new(OnceLock::new());
        let resolver = Sevens { bytes, vm: myself.clone() };
        let options = crate::vm::Options {
            kvm_fd: system.as_raw_fd(),
            vm_fd: vm.as_raw_fd(),
            mechanism,
            uffd: None,
            abi: None,
            readers: 0,
            readahead: 0,
            pre_fault: false,
            external: false,
            filter_msrs: false,
        };
        let kf = Arc::new(Vm::new(&options, || Box::new(resolver))?);
        let _ = myself.set(Arc::downgrade(&kf));
        kf.memslot_set(&SlotRequest {
            slot: 1,
            kvm_flags: 0,
            gpa: DATA_GPA,
            len: vcpus * PAGES * page_size(),
            hva: data.address(),
            host: HostMemory::for_test(data.address(), vcpus * PAGES * page_size()),
            memory: MemoryKind::Shared,
            file: None,
            vcpu_only: false,
            present: false,
            keep: false,
            slow: false,
        })
        .unwrap();
        let vcpus = (0..vcpus).map(|n| vcpu(&vm, n)).collect();
        Ok(Machine { vm: kf, vcpus, data, _code: code })
    }

    /// Attaches to one vCPU, on the calling thread.
    pub(super) fn attach(&self, n: usize) -> Result<Vcpu> {
        let options =
            Options { fd: self.vcpus[n].as_raw_fd(), run: None, sigbus: Sigbus::ByMask, signal: None, resumes: false };
        Vcpu::new(&self.vm, options)
    }

    /// Runs one vCPU to its end on the calling thread.
    fn run(&self, n: usize) -> Result<Exit> {
        let vcpu = self.attach(n)?;
        let exit = vcpu.run()?;
        assert_eq!(vcpu.run.exit_reason(), test_guest::END);
        Ok(exit)
    }

    fn bytes(&self, page: u64) -> [u8; 2] {
        let mut bytes = [0; 2];
        mem::read(self.data.address() + page * page_size(), &mut bytes).unwrap();
        bytes
    }
}

fn shared(len: u64) -> Mapping {
    Mapping::shared(crate::kernel::file::tests::shared(len).as_raw_fd(), 0, len, true).unwrap()
}

fn vcpu(vm: &VmFd, n: u64) -> VcpuFd {
    let vcpu = vm.create_vcpu(n).unwrap();
    test_guest::start(vm, &vcpu, CODE_GPA, DATA_GPA + n * PAGES * page_size(), PAGES);
    vcpu
}

/// The fault path takes no lock that two vCPUs share: another thread holds all of them meanwhile.
#[test]
fn faults_take_no_lock_that_vcpus_share() {
    let machine = needs!(Machine::new(None, 2));
    let (done, all_done) = mpsc::channel();
    let slots = machine.vm.hold_editing();
    let failing = machine.vm.engine.hold_failing();
    std::thread::scope(|scope| {
        for n in 0..2 {
            let (machine, done) = (&machine, done.clone());
            scope.spawn(move || done.send(machine.run(n)).unwrap());
        }
        let exits: Vec<_> = (0..2).map(|_| all_done.recv_timeout(Duration::from_secs(10))).collect();
        drop((slots, failing)); // a vCPU that does wait can end now, and the test with it
        for exit in exits {
            assert_eq!(exit.expect("a vCPU waits for a lock").unwrap(), Exit::Pass);
        }
    });
    (0..2 * PAGES).for_each(|page| assert_eq!(machine.bytes(page), [test_guest::BYTE, 7]));
    assert_eq!(machine.vm.stats().resolver_calls.get(), 2 * PAGES);
}

/// A page is installed, and unmapped before its state is PRESENT. A thread that touches it then
/// sleeps in userfaultfd, and no install wakes it.
#[test]
fn a_page_that_is_unmapped_before_it_is_booked_is_found_again() {
    let userfaultfd = MECHANISMS.iter().position(|m| m.name() == "userfaultfd");
    let machine = needs!(Machine::new(userfaultfd, 1));
    let (vm, first) = (&machine.vm, machine.data.address());
    vm.resolve(DATA_GPA, page_size()).unwrap();
    let slots = vm.engine.memory.slots();
    let (block, page) = slots.at_hva(first).unwrap();
    block.pages.change(page, State::Present, State::Resolving).unwrap();
    machine.data.whole().first(page_size()).advise(libc::MADV_DONTNEED, "madvise").unwrap();
    let (seen, looked) = mpsc::channel();
    std::thread::spawn(move || {
        let mut byte = [0];
        mem::read(first, &mut byte).unwrap();
        seen.send(byte)
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    while vm.stats().outcome_waited.get() == 0 {
        assert!(Instant::now() < deadline, "no reader has seen the access");
        std::thread::sleep(Duration::from_millis(1));
    }
    block.pages.make_present(page);
    assert_eq!(looked.recv_timeout(Duration::from_secs(10)).expect("it is not woken"), [7]);
}
