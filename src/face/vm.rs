//! A VM, its memslots and its counters.

use super::kinds::Mechanism;
use super::memslot::{Memslot, Region};
use super::resolver::{Adapter, Resolver};
use crate::error::Result;
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::host_memory::HostMemory;
use crate::resolve::not_in_callback;
use crate::stats::snapshot::Stats;
use crate::vm::memslots::{MemoryKind, SlotRequest};
use crate::vm::{self, Options};
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How a [`Vm`] is set up. Made by [`Vm::options`].
#[derive(Debug, Clone)]
#[must_use = "options do nothing until `attach` is called"]
pub struct VmOptions<'a> {
    kvm: BorrowedFd<'a>,
    vm: BorrowedFd<'a>,
    mechanism: Option<Mechanism>,
    uffd: Option<BorrowedFd<'a>>,
    abi: Option<&'a str>,
    reader_threads: u32,
    readahead: u32,
    pre_fault: bool,
    external_uffd: bool,
    filter_msrs: bool,
}

impl<'a> VmOptions<'a> {
    /// Forces a mechanism: where it can't work, [`attach`](Self::attach) or [`Vm::set_memslot`]
    /// fails with `EOPNOTSUPP`. Without, each memslot gets the first that works for it.
    pub fn mechanism(self, mechanism: Mechanism) -> VmOptions<'a> {
        VmOptions { mechanism: Some(mechanism), ..self }
    }

    /// A userfaultfd that this process opened before it gave up the privileges for it, or an open
    /// `/dev/userfaultfd`. Without, the library opens one.
    pub fn uffd(self, uffd: BorrowedFd<'a>) -> VmOptions<'a> {
        VmOptions { uffd: Some(uffd), ..self }
    }

    /// The revision of the memslot flag to use without asking `KVM_CHECK_EXTENSION`, for a kernel
    /// with numbers of its own: `v2`, `v3`, `v4`, `v7` or `userfault-v3`. It is still proven in a
    /// scratch VM.
    pub fn abi(self, name: &'a str) -> VmOptions<'a> {
        VmOptions { abi: Some(name), ..self }
    }

    /// How many threads read the userfaultfd, 1 to 64; 0 for the usual number.
    pub fn reader_threads(self, threads: u32) -> VmOptions<'a> {
        VmOptions { reader_threads: threads, ..self }
    }

    /// How many pages may be in the window of one resolver call, 1 to 4096; 0 means 1: no
    /// readahead. 64 is a good value for memory and files.
    pub fn readahead(self, pages: u32) -> VmOptions<'a> {
        VmOptions { readahead: pages, ..self }
    }

    /// After serving a vCPU's fault, maps the page and what was installed around it with
    /// `KVM_PRE_FAULT_MEMORY`. Only for a VMM that changes no memslot while a vCPU with absent
    /// pages runs: KVM may otherwise retry without end.
    pub fn pre_fault(self, on: bool) -> VmOptions<'a> {
        VmOptions { pre_fault: on, ..self }
    }

    /// The VMM has a userfaultfd of its own on its memory and serves all faults there with it; the
    /// library serves vCPUs only, and learns from the VMM what is there: [`Vm::missing`] and
    /// [`Vm::arrived`].
    pub fn external_uffd(self, on: bool) -> VmOptions<'a> {
        VmOptions { external_uffd: on, ..self }
    }

    /// Also resolves areas that the guest registers at run time (kvmclock, steal time and others):
    /// the library sets the VM's MSR filter. For a VMM that has no MSR filter of its own.
    pub fn filter_msrs(self, on: bool) -> VmOptions<'a> {
        VmOptions { filter_msrs: on, ..self }
    }

    /// Attaches to the VM: finds out what this kernel can do, opens a userfaultfd and starts the
    /// reader threads. Not from callbacks.
    ///
    /// Fails with `EPERM` or `EACCES` where userfaultfd isn't permitted
    /// ([`Probe::explain`](crate::Probe::explain) says what to do), with `EOPNOTSUPP` where the
    /// forced mechanism or ABI can't work, and with `EINVAL` for an argument that the message
    /// names.
    pub fn attach(self, resolver: impl Resolver) -> Result<Vm> {
        not_in_callback("VmOptions::attach")?;
        let options = Options {
            kvm_fd: self.kvm.as_raw_fd(),
            vm_fd: self.vm.as_raw_fd(),
            mechanism: self.mechanism.map(Mechanism::place),
            uffd: self.uffd.map(|fd| fd.as_raw_fd()),
            abi: self.abi,
            readers: self.reader_threads,
            readahead: self.readahead,
            pre_fault: self.pre_fault,
            external: self.external_uffd,
            filter_msrs: self.filter_msrs,
        };
        let for_resolver = Arc::new(OnceLock::new());
        let adapter = Adapter { resolver, vm: for_resolver.clone() };
        let inner = Arc::new(vm::Vm::new(&options, || Box::new(adapter))?);
        let _ = for_resolver.set(Vm { inner: inner.clone() });
        Ok(Vm { inner })
    }
}

/// A KVM virtual machine whose memory is filled on demand.
///
/// Dropping it ends everything without waiting: vCPUs return `ESHUTDOWN`, threads that wait for a
/// page are released, and resolver calls under way end when they end. [`close`](Self::close) waits
/// for them. A child of fork(2) can only drop it.
pub struct Vm {
    inner: Arc<vm::Vm>,
}

impl Vm {
    /// What a VM is made from: `/dev/kvm`, and the VM that `KVM_CREATE_VM` returned. Both are
    /// duplicated.
    ///
    /// ```no_run
    /// # use std::os::fd::BorrowedFd;
    /// # fn descriptors() -> (BorrowedFd<'static>, BorrowedFd<'static>) { unimplemented!() }
    /// # fn main() -> Result<(), kvmfault::Error> {
    /// # let (kvm, vm) = descriptors();
    /// use kvmfault::{Answer, Fault, Vm};
    ///
    /// let zeros = |vm: &Vm, fault: &Fault| -> Answer { vm.zero(fault.gpa(), fault.len()).into() };
    /// let vm = Vm::options(kvm, vm).readahead(64).attach(zeros)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn options<'a>(kvm: BorrowedFd<'a>, vm: BorrowedFd<'a>) -> VmOptions<'a> {
        VmOptions {
            kvm,
            vm,
            mechanism: None,
            uffd: None,
            abi: None,
            reader_threads: 0,
            readahead: 0,
            pre_fault: false,
            external_uffd: false,
            filter_msrs: false,
        }
    }

    /// The inside, for a call in the process that made it.
    pub(super) fn inner(&self) -> Result<&Arc<vm::Vm>> {
        self.inner.check_process().map(|()| &self.inner)
    }

    /// The inside, for a call that callbacks must not make.
    pub(super) fn outside_callbacks(&self, name: &str) -> Result<&Arc<vm::Vm>> {
        not_in_callback(name)?;
        self.inner()
    }

    /// Ends everything as dropping does, and waits until it is over, for `timeout` at most: no
    /// callback is under way, none will come, the resolver is dropped, and no thread of the library
    /// uses the memslots' memory any more. Fails with `ETIMEDOUT` if a callback has not returned;
    /// it may be called again. Not from callbacks.
    pub fn close(&self, timeout: Option<Duration>) -> Result<()> {
        let inner = self.outside_callbacks("Vm::close")?;
        inner.shut_down();
        inner.engine.callbacks.wait_for_end(timeout)
    }

    /// The mechanism in use; without a forced one, that of shared memory.
    /// [`memslot_mechanism`](Self::memslot_mechanism) tells of one memslot.
    pub fn mechanism(&self) -> Mechanism {
        Mechanism::numbered(self.inner.mechanism().number())
    }

    /// The mechanism of one memslot; `ENOENT` if it is not set.
    pub fn memslot_mechanism(&self, number: u32) -> Result<Mechanism> {
        Ok(Mechanism::numbered(self.inner()?.slot_mechanism(number)?.number()))
    }

    /// Can the mechanism serve the guest of this vCPU, as far as its CPUID says? Fails with
    /// `EOPNOTSUPP`, and says why not. Ask after `KVM_SET_CPUID2` and before the vCPU runs.
    pub fn check_guest(&self, vcpu: BorrowedFd<'_>) -> Result<()> {
        self.inner()?.check_guest(vcpu.as_raw_fd())
    }

    /// Enables KVM's memory-fault exits by whatever way the kernel's ABI has. Memslots do so when
    /// they are first set; calling this before is optional. Not from callbacks.
    pub fn enable_fault_exits(&self) -> Result<()> {
        self.outside_callbacks("Vm::enable_fault_exits")?.enable_fault_exits()
    }

    /// Creates or moves a memslot, and tells KVM. On an error nothing has changed. Not from
    /// callbacks.
    ///
    /// Fails with `EINVAL` for an argument that the message names; `EEXIST` if the guest range
    /// overlaps another memslot, or there is content already that can't be hidden; `EFAULT` and
    /// `EACCES` if the memory isn't mapped, or not readable and writable; `EBUSY` if it is
    /// registered with another userfaultfd; `EOPNOTSUPP` if the forced mechanism can't serve it;
    /// `ESHUTDOWN` after the VM was closed; or with KVM's errno.
    pub fn set_memslot(&self, slot: &Memslot<'_>) -> Result<()> {
        self.outside_callbacks("Vm::set_memslot")?.memslot_set(&slot.request())
    }

    /// Deletes a memslot, and tells KVM; `ENOENT` if it is not set. Threads that wait for its pages
    /// are released. Memory that no other memslot shows becomes ordinary memory, in which absent
    /// pages read as zeros. Not from callbacks.
    pub fn delete_memslot(&self, number: u32) -> Result<()> {
        self.outside_callbacks("Vm::delete_memslot")?.memslot_set(&deletion(number))
    }

    /// As [`set_memslot`](Self::set_memslot), for a VMM that does its own ioctl: returns what to
    /// pass to KVM. If the ioctl fails, undo with [`prepare_deletion`](Self::prepare_deletion). Not
    /// from callbacks.
    pub fn prepare_memslot(&self, slot: &Memslot<'_>) -> Result<Region> {
        let inner = self.outside_callbacks("Vm::prepare_memslot")?;
        inner.memslot_prepare(&slot.request()).map(Region::from_kvm)
    }

    /// As [`delete_memslot`](Self::delete_memslot), for a VMM that does its own ioctl: call it
    /// after KVM has deleted the memslot. Not from callbacks.
    pub fn prepare_deletion(&self, number: u32) -> Result<Region> {
        let inner = self.outside_callbacks("Vm::prepare_deletion")?;
        inner.memslot_prepare(&deletion(number)).map(Region::from_kvm)
    }

    /// Turns the fast path of a memslot on or off while vCPUs run, as post-copy does when it begins
    /// and ends. Off, absent pages are still fetched, by classic userfaultfd. Not from callbacks.
    pub fn set_fast_only(&self, number: u32, on: bool) -> Result<()> {
        self.outside_callbacks("Vm::set_fast_only")?.memslot_set_fast_only(number, on)
    }

    /// An address that the kernel named (that of a SIGBUS, say) as one of the VMM's own mapping:
    /// KVM may know the memory by the library's alias. `None` if it is in no memslot's memory.
    pub fn vmm_address(&self, address: u64) -> Option<u64> {
        self.inner().ok()?.vmm_address(Hva(address)).map(|hva| hva.0)
    }

    /// The counters of the VM: the sum over its vCPUs, its reader threads and calls from outside.
    pub fn stats(&self) -> Stats {
        self.inner.stats().snapshot()
    }
}

/// What deletes a memslot.
fn deletion(number: u32) -> SlotRequest {
    SlotRequest {
        slot: number,
        kvm_flags: 0,
        gpa: Gpa(0),
        len: 0,
        hva: Hva(0),
        host: HostMemory::none(),
        memory: MemoryKind::Auto,
        file: None,
        vcpu_only: false,
        present: false,
        keep: false,
        slow: false,
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.inner.check_process().is_ok() {
            self.inner.shut_down();
        }
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("mechanism", &self.mechanism()).finish_non_exhaustive()
    }
}
