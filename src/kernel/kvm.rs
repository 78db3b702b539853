//! KVM's ioctls and `struct kvm_run`. See Documentation/virt/kvm/api.rst.

use super::file::is_anonymous;
use super::mem::{Mapping, PAGE};
use crate::error::{fail, Error, Result};
use kvm_bindings as kb;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU8, Ordering::SeqCst};

const KVMIO: u64 = 0xAE;
const fn io(nr: u64) -> u64 {
    KVMIO << 8 | nr
}
const fn iow(nr: u64, size: usize) -> u64 {
    1 << 30 | (size as u64) << 16 | KVMIO << 8 | nr
}
const fn ior(nr: u64, size: usize) -> u64 {
    2 << 30 | (size as u64) << 16 | KVMIO << 8 | nr
}
const fn iowr(nr: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | KVMIO << 8 | nr
}

const KVM_GET_API_VERSION: u64 = io(0x00);
const KVM_CREATE_VM: u64 = io(0x01);
const KVM_CHECK_EXTENSION: u64 = io(0x03);
const KVM_GET_VCPU_MMAP_SIZE: u64 = io(0x04);
const KVM_CREATE_VCPU: u64 = io(0x41);
const KVM_SET_USER_MEMORY_REGION: u64 = iow(0x46, size_of::<kb::kvm_userspace_memory_region>());
const KVM_SET_USER_MEMORY_REGION2: u64 = iow(0x49, size_of::<kb::kvm_userspace_memory_region2>());
const KVM_RUN: u64 = io(0x80);
const KVM_GET_REGS: u64 = ior(0x81, size_of::<kb::kvm_regs>());
const KVM_SET_REGS: u64 = iow(0x82, size_of::<kb::kvm_regs>());
const KVM_GET_SREGS: u64 = ior(0x83, size_of::<kb::kvm_sregs>());
const KVM_SET_SREGS: u64 = iow(0x84, size_of::<kb::kvm_sregs>());
const KVM_TRANSLATE: u64 = iowr(0x85, size_of::<kb::kvm_translation>());
const KVM_GET_MSRS: u64 = iowr(0x88, size_of::<kb::kvm_msrs>());
const KVM_SET_MSRS: u64 = iow(0x89, size_of::<kb::kvm_msrs>());
const KVM_SET_SIGNAL_MASK: u64 = iow(0x8b, 4);
const KVM_GET_CPUID2: u64 = iowr(0x91, size_of::<kb::kvm_cpuid2>());
const KVM_GET_VCPU_EVENTS: u64 = ior(0x9f, size_of::<kb::kvm_vcpu_events>());
const KVM_SET_VCPU_EVENTS: u64 = iow(0xa0, size_of::<kb::kvm_vcpu_events>());
const KVM_ENABLE_CAP: u64 = iow(0xa3, size_of::<kb::kvm_enable_cap>());
const KVM_X86_SET_MSR_FILTER: u64 = iow(0xc6, size_of::<kb::kvm_msr_filter>());
const KVM_GET_SREGS2: u64 = ior(0xcc, size_of::<kb::kvm_sregs2>());
const KVM_GET_STATS_FD: u64 = io(0xce);
const KVM_PRE_FAULT_MEMORY: u64 = iowr(0xd5, size_of::<kb::kvm_pre_fault_memory>());

/// A request that no driver has: its type is not KVM's, and no other's.
const FOREIGN: u64 = 0xFFFF;

/// Which of KVM's descriptors one is meant to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// /dev/kvm.
    System,
    /// What KVM_CREATE_VM returned.
    Vm,
    /// What KVM_CREATE_VCPU returned.
    Vcpu,
}

/// A descriptor of KVM's that is ours: a checked duplicate of the VMM's, or one that we made.
#[derive(Debug)]
pub struct Descriptor(OwnedFd);

impl Descriptor {
    /// Opens /dev/kvm.
    pub fn open() -> Result<Descriptor> {
        let file = std::fs::File::options().read(true).write(true).open("/dev/kvm");
        file.map(|f| Descriptor(f.into())).map_err(|e| Error::from_io("/dev/kvm", &e))
    }

    /// Duplicates `fd` after checking that it is what `role` says; errors name it `name`. The descriptor itself is asked: a jail may have no /proc.
    pub fn duplicate(fd: RawFd, role: Role, name: &str) -> Result<Descriptor> {
        // SAFETY: F_DUPFD_CLOEXEC gives a new descriptor or -1 (EBADF for a bad number).
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        if copy < 0 {
            return Err(Error::last_os(&format!("{name}: descriptor {fd}: fcntl(F_DUPFD_CLOEXEC)")));
        }
        // SAFETY: `copy` is open and ours alone.
        let copy = Descriptor(unsafe { OwnedFd::from_raw_fd(copy) });
        let answered = copy.is(role);
        if matches!(answered, Ok(true)) {
            return Ok(copy);
        }
        let is = match answered {
            // KVM_CHECK_EXTENSION and all others, where the caller's address space is not that of the VM's maker.
            Err(e) if e.errno == libc::EIO => "another process's (or its VM is dead)".into(),
            // A filter's answer, and not the descriptor's.
            Err(e) if matches!(e.errno, libc::EPERM | libc::EACCES | libc::ENOSYS) => {
                return Err(e.context(format!("{name}: descriptor {fd} can't be asked what it is")));
            }
            _ => copy.link().unwrap_or_else(|| "something else".into()),
        };
        let wanted = match role {
            Role::System => "/dev/kvm",
            Role::Vm => "a VM of KVM's",
            Role::Vcpu => "a vCPU of KVM's",
        };
        fail!(EINVAL, "{name}: descriptor {fd} is {is}, not {wanted}")
    }

    /// Is it that? Only vCPUs can be mapped, so they are told first: most ioctls of theirs wait while the vCPU runs.
    fn is(&self, role: Role) -> Result<bool> {
        let fd = self.0.as_raw_fd();
        let ask = |request, arg, what: &str| self.number(request, arg).map_err(|e| Error::from_io(what, &e));
        let is_device = !is_anonymous(fd).map_err(|e| Error::from_io("fstat", &e))?;
        if is_device || role == Role::System {
            // Other files aren't mapped: for a device that may mean something.
            return Ok(is_device
                && role == Role::System
                && ask(KVM_GET_API_VERSION, 0, "ioctl(KVM_GET_API_VERSION)")? == 12);
        }
        let mapped = match Mapping::shared(fd, 0, PAGE, false) {
            Err(e) if matches!(e.errno, libc::EPERM | libc::ENOSYS) => return Err(e),
            mapped => mapped.is_ok(),
        };
        match (role, mapped) {
            (Role::Vm, false) if self.number(KVM_GET_API_VERSION, 0).is_err() => {
                Ok(ask(KVM_CHECK_EXTENSION, kb::KVM_CAP_USER_MEMORY.into(), "ioctl(KVM_CHECK_EXTENSION)")? > 0)
            }
            // To a request that isn't KVM's others say ENOTTY, and a vCPU says EINVAL, without waiting (kvm_vcpu_ioctl).
            (Role::Vcpu, true) => match ask(FOREIGN, 0, "ioctl") {
                Err(e) if e.errno == libc::EINVAL => Ok(true),
                other => other.map(|_| false),
            },
            _ => Ok(false),
        }
    }

    /// What /proc/self/fd says of it, where there is a /proc.
    fn link(&self) -> Option<String> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", self.0.as_raw_fd())).ok()?;
        Some(link.to_string_lossy().into_owned())
    }

    /// The number that KVM_CREATE_VCPU gave this vCPU, if it can be known: from /proc, or since Linux 5.14 from KVM's statistics.
    pub fn vcpu_number(&self) -> Option<i32> {
        let from_link = || self.link()?.rsplit(':').next()?.parse().ok();
        from_link().or_else(|| self.stats_id()?.rsplit('-').next()?.parse().ok())
    }

    /// Whose the statistics are: "kvm-PID/vcpu-NUMBER" (struct kvm_stats_header).
    fn stats_id(&self) -> Option<String> {
        // SAFETY: the ioctl returns a new descriptor, which is ours alone.
        let stats = unsafe { File::from_raw_fd(self.number(KVM_GET_STATS_FD, 0).ok()?) };
        let mut header = [0; size_of::<kb::kvm_stats_header>()];
        stats.read_exact_at(&mut header, 0).ok()?;
        let field = |n: usize| u32::from_ne_bytes(std::array::from_fn(|b| header[4 * n + b]));
        let mut id = vec![0; field(1).min(256) as usize]; // name_size
        stats.read_exact_at(&mut id, field(3).into()).ok()?; // id_offset
        Some(CStr::from_bytes_until_nul(&id).ok()?.to_str().ok()?.to_owned())
    }

    /// A new VM.
    pub fn create_vm(&self) -> Result<Descriptor> {
        self.create(KVM_CREATE_VM, 0, "KVM_CREATE_VM")
    }

    /// A new vCPU of this VM.
    pub fn create_vcpu(&self, number: u64) -> Result<Descriptor> {
        self.create(KVM_CREATE_VCPU, number, "KVM_CREATE_VCPU")
    }

    /// KVM_CREATE_VM fails with EINTR when a signal comes in the middle.
    fn create(&self, request: u64, arg: u64, what: &str) -> Result<Descriptor> {
        let fd = loop {
            match self.number(request, arg) {
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                other => break other.map_err(|e| Error::from_io(what, &e))?,
            }
        };
        // SAFETY: the ioctl returned a new descriptor, which is ours alone.
        Ok(Descriptor(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// KVM_CHECK_EXTENSION; 0 for what the kernel doesn't know. Proves nothing of the numbers in the ABI table.
    pub fn check_extension(&self, cap: u32) -> i32 {
        self.number(KVM_CHECK_EXTENSION, cap.into()).unwrap_or(0)
    }

    /// KVM_ENABLE_CAP on a VM.
    pub fn enable_cap(&self, cap: u32, arg: u64) -> Result<()> {
        let mut enable = kb::kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = arg;
        self.set(KVM_ENABLE_CAP, &mut enable, "KVM_ENABLE_CAP")
    }

    /// KVM_SET_USER_MEMORY_REGION or _REGION2.
    pub fn set_region(&self, region: &Region) -> Result<()> {
        match region.version {
            1 => {
                let mut arg = kb::kvm_userspace_memory_region {
                    slot: region.slot,
                    flags: region.flags,
                    guest_phys_addr: region.gpa,
                    memory_size: region.len,
                    userspace_addr: region.hva,
                };
                self.set(KVM_SET_USER_MEMORY_REGION, &mut arg, "KVM_SET_USER_MEMORY_REGION")
            }
            _ => {
                let mut arg = kb::kvm_userspace_memory_region2 {
                    slot: region.slot,
                    flags: region.flags,
                    guest_phys_addr: region.gpa,
                    memory_size: region.len,
                    userspace_addr: region.hva,
                    ..Default::default()
                };
                arg.pad2[0] = region.bitmap; // `userfault_bitmap` of the KVM Userfault series
                self.set(KVM_SET_USER_MEMORY_REGION2, &mut arg, "KVM_SET_USER_MEMORY_REGION2")
            }
        }
    }

    /// KVM_RUN; the errno if it fails.
    pub fn run(&self) -> std::result::Result<(), i32> {
        match self.number(KVM_RUN, 0) {
            Ok(_) => Ok(()),
            Err(e) => Err(e.raw_os_error().unwrap_or(libc::EIO)),
        }
    }

    /// The signals that are blocked inside KVM_RUN (KVM_SET_SIGNAL_MASK).
    pub fn set_signal_mask(&self, mask: super::signal::SignalSet) -> Result<()> {
        // struct kvm_signal_mask { u32 len; u8 sigset[8]; }
        let mut arg = [8u32, mask.0 as u32, (mask.0 >> 32) as u32];
        self.set(KVM_SET_SIGNAL_MASK, &mut arg, "KVM_SET_SIGNAL_MASK")
    }

    /// No such signals any more: inside KVM_RUN the thread's own mask holds again.
    pub fn reset_signal_mask(&self) -> Result<()> {
        self.number(KVM_SET_SIGNAL_MASK, 0).map(drop).map_err(|e| Error::from_io("KVM_SET_SIGNAL_MASK", &e))
    }

    /// The vCPU's general registers.
    pub fn regs(&self) -> Result<kb::kvm_regs> {
        self.get(KVM_GET_REGS, "KVM_GET_REGS")
    }

    /// Sets them.
    pub fn set_regs(&self, mut regs: kb::kvm_regs) -> Result<()> {
        self.set(KVM_SET_REGS, &mut regs, "KVM_SET_REGS")
    }

    /// The vCPU's segment and control registers.
    pub fn sregs(&self) -> Result<kb::kvm_sregs> {
        self.get(KVM_GET_SREGS, "KVM_GET_SREGS")
    }

    /// Sets them.
    pub fn set_sregs(&self, mut sregs: kb::kvm_sregs) -> Result<()> {
        self.set(KVM_SET_SREGS, &mut sregs, "KVM_SET_SREGS")
    }

    /// KVM's copies of the first table's entries, in PAE mode; None in others, and before Linux 5.14.
    pub fn pdptrs(&self) -> Option<[u64; 4]> {
        let sregs: kb::kvm_sregs2 = self.get(KVM_GET_SREGS2, "KVM_GET_SREGS2").ok()?;
        (sregs.flags & u64::from(kb::KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0).then_some(sregs.pdptrs)
    }

    /// The vCPU's pending exceptions and interrupts.
    pub fn vcpu_events(&self) -> Result<kb::kvm_vcpu_events> {
        self.get(KVM_GET_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS")
    }

    /// Sets them.
    pub fn set_vcpu_events(&self, mut events: kb::kvm_vcpu_events) -> Result<()> {
        self.set(KVM_SET_VCPU_EVENTS, &mut events, "KVM_SET_VCPU_EVENTS")
    }

    /// One of the vCPU's model-specific registers; None if it hasn't got it.
    pub fn msr(&self, index: u32) -> Option<u64> {
        let mut one = OneMsr::new(index, 0);
        // KVM_GET_MSRS returns how many it has read.
        (self.with(KVM_GET_MSRS, &mut one, "KVM_GET_MSRS").ok()? == 1).then_some(one.1.data)
    }

    /// Sets one; false if the vCPU hasn't got it, or it can't have this value.
    pub fn set_msr(&self, index: u32, data: u64) -> Result<bool> {
        Ok(self.with(KVM_SET_MSRS, &mut OneMsr::new(index, data), "KVM_SET_MSRS")? == 1)
    }

    /// Guests' writes to these MSRs are not done, and end KVM_RUN (KVM_EXIT_X86_WRMSR); an empty range: no more. In place of the VM's filter.
    pub fn exit_on_msr_writes(&self, msrs: std::ops::Range<u32>) -> Result<()> {
        let count = msrs.len() as u32;
        let mut denied = vec![0u8; count.div_ceil(8) as usize];
        let mut filter = kb::kvm_msr_filter { flags: kb::KVM_MSR_FILTER_DEFAULT_ALLOW, ..Default::default() };
        if count > 0 {
            self.enable_cap(kb::KVM_CAP_X86_USER_SPACE_MSR, kb::KVM_MSR_EXIT_REASON_FILTER.into())?;
            filter.ranges[0] = kb::kvm_msr_filter_range {
                flags: kb::KVM_MSR_FILTER_WRITE,
                nmsrs: count,
                base: msrs.start,
                bitmap: denied.as_mut_ptr(),
            };
        }
        self.set(KVM_X86_SET_MSR_FILTER, &mut filter, "KVM_X86_SET_MSR_FILTER")
    }

    /// What KVM_SET_CPUID2 told the vCPU; nothing if it wasn't called.
    pub fn cpuid(&self) -> Result<Vec<kb::kvm_cpuid_entry2>> {
        const MOST: usize = 256; // KVM_MAX_CPUID_ENTRIES
        #[repr(C)]
        struct Many(kb::kvm_cpuid2, [kb::kvm_cpuid_entry2; MOST]);
        let head = kb::kvm_cpuid2 { nent: MOST as u32, ..Default::default() };
        let mut many = Many(head, [Default::default(); MOST]);
        self.with(KVM_GET_CPUID2, &mut many, "KVM_GET_CPUID2")?;
        Ok(many.1[..many.0.nent as usize].to_vec())
    }

    /// Guest virtual to guest physical address, by the vCPU's page tables; None if not mapped.
    pub fn translate(&self, linear: u64) -> Option<u64> {
        let mut arg = kb::kvm_translation { linear_address: linear, ..Default::default() };
        self.with(KVM_TRANSLATE, &mut arg, "KVM_TRANSLATE").ok()?;
        (arg.valid != 0).then_some(arg.physical_address)
    }

    /// KVM_PRE_FAULT_MEMORY: maps guest memory in stage 2 without an exit.
    ///
    /// Never while a memslot of the VM may change: deleting one makes the vCPU's page-table root obsolete, a fault on an obsolete root is
    /// retried (is_page_fault_stale), only KVM_RUN replaces the root, and kvm_tdp_map_page retries until a signal. Seen to 7.3, in spite of
    /// "Check and free obsolete roots in kvm_mmu_reload()" (6.15), which helps only before the first try.
    pub fn pre_fault(&self, gpa: u64, len: u64) -> Result<()> {
        let mut arg = kb::kvm_pre_fault_memory { gpa, size: len, ..Default::default() };
        self.set(KVM_PRE_FAULT_MEMORY, &mut arg, "KVM_PRE_FAULT_MEMORY")
    }

    fn get<T: Default>(&self, request: u64, what: &str) -> Result<T> {
        let mut value = T::default();
        self.with(request, &mut value, what)?;
        Ok(value)
    }

    /// An ioctl on a structure; what it returned.
    fn with<T>(&self, request: u64, arg: &mut T, what: &str) -> Result<i32> {
        // SAFETY: `arg` is live, and every caller passes the structure that `request` is defined on, followed by as many entries as its head
        // says if it is one with entries; what it points to is live as well. Guest memory addresses in it are checked by KVM, and are used by
        // guests only.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, &raw mut *arg) } {
            r if r < 0 => Err(Error::last_os(what)),
            r => Ok(r),
        }
    }

    /// One that returns nothing.
    fn set<T>(&self, request: u64, arg: &mut T, what: &str) -> Result<()> {
        self.with(request, arg, what).map(drop)
    }

    /// An ioctl that takes a number.
    fn number(&self, request: u64, arg: u64) -> std::io::Result<i32> {
        // SAFETY: the requests passed here take no pointer, or (KVM_SET_SIGNAL_MASK) NULL.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, arg) } {
            r if r < 0 => Err(std::io::Error::last_os_error()),
            r => Ok(r),
        }
    }
}

/// What KVM_GET_MSRS and KVM_SET_MSRS take.
#[repr(C)]
struct OneMsr(kb::kvm_msrs, kb::kvm_msr_entry);

impl OneMsr {
    fn new(index: u32, data: u64) -> OneMsr {
        let head = kb::kvm_msrs { nmsrs: 1, ..Default::default() };
        OneMsr(head, kb::kvm_msr_entry { index, data, ..Default::default() })
    }
}

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A memslot as KVM gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Region {
    /// 1 or 2: which ioctl.
    pub version: u32,
    /// Id and address space.
    pub slot: u32,
    /// KVM_MEM_* and the fast-only flag.
    pub flags: u32,
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes; 0 deletes.
    pub len: u64,
    /// Where KVM finds the memory in this process.
    pub hva: u64,
    /// `userfault_bitmap`, for the ABI that has it.
    pub bitmap: u64,
}

/// An access that KVM asks userspace to complete (KVM_EXIT_MMIO).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mmio {
    /// Guest physical address.
    pub gpa: u64,
    /// What is written, or room for what is read.
    pub data: [u8; 8],
    /// 1 to 8 bytes.
    pub len: usize,
    /// Is it a write?
    pub write: bool,
}

/// A guest's write to an MSR that userspace is asked to do (KVM_EXIT_X86_WRMSR).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsrWrite {
    /// Which.
    pub index: u32,
    /// What is written.
    pub data: u64,
    /// The VM's filter denied it to KVM.
    pub filtered: bool,
}

/// A vCPU's `struct kvm_run`: shared with the kernel, and for its `immediate_exit` byte with whoever kicks.
#[derive(Debug)]
pub struct Run {
    run: NonNull<kb::kvm_run>,
    _mapping: Option<Mapping>,
}

// SAFETY: all access is by single volatile reads and writes of plain fields; the kernel is the other party at all times anyway.
unsafe impl Send for Run {}
// SAFETY: as above.
unsafe impl Sync for Run {}

impl Run {
    /// Maps it.
    pub fn map(system: &Descriptor, vcpu: &Descriptor) -> Result<Run> {
        let size =
            system.number(KVM_GET_VCPU_MMAP_SIZE, 0).map_err(|e| Error::from_io("KVM_GET_VCPU_MMAP_SIZE", &e))?;
        let mapping = Mapping::shared(vcpu.0.as_raw_fd(), 0, size as u64, true).map_err(|e| e.context("kvm_run"))?;
        let run = NonNull::new(mapping.address() as *mut kb::kvm_run);
        Ok(Run { run: run.ok_or_else(|| Error::new(libc::EFAULT, "kvm_run"))?, _mapping: Some(mapping) })
    }

    /// Uses the VMM's mapping, which must be a kvm_run and outlive this.
    ///
    /// # Safety
    /// `address` is the start of a mapping of the vCPU's descriptor that stays for as long as the result lives.
    pub unsafe fn borrow(address: NonNull<kb::kvm_run>) -> Run {
        Run { run: address, _mapping: None }
    }

    /// Why KVM_RUN returned.
    pub fn exit_reason(&self) -> u32 {
        // SAFETY: `run` is mapped (see the constructors); the same holds for every access below.
        unsafe { (&raw const (*self.run.as_ptr()).exit_reason).read_volatile() }
    }

    /// Forgets the last exit, so that a KVM_RUN which fails without setting a reason can't be mistaken for it.
    pub fn clear_exit_reason(&self) {
        // SAFETY: as in `exit_reason`.
        unsafe { (&raw mut (*self.run.as_ptr()).exit_reason).write_volatile(kb::KVM_EXIT_UNKNOWN) };
    }

    /// The byte that keeps KVM_RUN from beginning, for whoever kicks.
    pub fn immediate_exit(&self) -> ImmediateExit {
        // SAFETY: as in `exit_reason`; only the address is taken.
        ImmediateExit(AtomicPtr::new(unsafe { (&raw mut (*self.run.as_ptr()).immediate_exit).cast() }))
    }

    /// The address space of the exit: 1 in system management mode.
    pub fn space(&self) -> u32 {
        // SAFETY: as in `exit_reason`.
        let flags = unsafe { (&raw const (*self.run.as_ptr()).flags).read_volatile() };
        u32::from(flags) & kb::KVM_RUN_X86_SMM
    }

    /// The first three words of the exit's own data: flags, gpa and size in all ABIs of memory-fault exits.
    pub fn words(&self) -> [u64; 3] {
        // SAFETY: as in `exit_reason`; the union is 256 bytes of plain data.
        unsafe { (&raw const (*self.run.as_ptr()).__bindgen_anon_1).cast::<[u64; 3]>().read_volatile() }
    }

    /// The access of a KVM_EXIT_MMIO.
    pub fn mmio(&self) -> Mmio {
        // SAFETY: as in `exit_reason`; all bit patterns are valid for this member.
        let mmio = unsafe { (&raw const (*self.run.as_ptr()).__bindgen_anon_1.mmio).read_volatile() };
        Mmio { gpa: mmio.phys_addr, data: mmio.data, len: (mmio.len as usize).min(8), write: mmio.is_write != 0 }
    }

    /// The write of a KVM_EXIT_X86_WRMSR.
    pub fn msr_write(&self) -> MsrWrite {
        // SAFETY: as in `exit_reason`; all bit patterns are valid for this member.
        let msr = unsafe { (&raw const (*self.run.as_ptr()).__bindgen_anon_1.msr).read_volatile() };
        MsrWrite { index: msr.index, data: msr.data, filtered: msr.reason == kb::KVM_MSR_EXIT_REASON_FILTER }
    }

    /// Did the write fail? Then the guest gets #GP.
    pub fn set_msr_failed(&self, failed: bool) {
        // SAFETY: as in `exit_reason`.
        unsafe { (&raw mut (*self.run.as_ptr()).__bindgen_anon_1.msr.error).write_volatile(failed as u8) };
    }

    /// The bytes that the guest's read gets.
    pub fn set_mmio_data(&self, data: [u8; 8]) {
        // SAFETY: as in `exit_reason`.
        unsafe { (&raw mut (*self.run.as_ptr()).__bindgen_anon_1.mmio.data).write_volatile(data) };
    }
}

/// `kvm_run.immediate_exit`, which any thread and any signal handler may set: KVM_RUN then completes what the last exit left,
/// and returns at once with EINTR. KVM asks only whether the byte is 0, so there is room for two: the VMM writes 0 and 1, and the library has
/// a bit of its own. Neither takes back what the other has set, unless the VMM writes 0.
#[derive(Debug)]
pub struct ImmediateExit(AtomicPtr<AtomicU8>);

/// The library's bit.
const OURS: u8 = 2;

impl ImmediateExit {
    /// Of no vCPU: raising it does nothing.
    #[cfg(test)]
    pub fn none() -> ImmediateExit {
        ImmediateExit(AtomicPtr::default())
    }

    fn byte(&self) -> Option<&AtomicU8> {
        // SAFETY: the byte is in the vCPU's kvm_run, which stays mapped until `detach`, and after that for as long as there are callers that may
        // have found it before (see `Seat::detach`).
        unsafe { self.0.load(SeqCst).as_ref() }
    }

    /// Sets the library's bit; async-signal-safe.
    pub fn raise(&self) {
        if let Some(byte) = self.byte() {
            byte.fetch_or(OURS, SeqCst);
        }
    }

    /// Clears the library's bit.
    pub fn lower(&self) {
        if let Some(byte) = self.byte() {
            byte.fetch_and(!OURS, SeqCst);
        }
    }

    /// Is the library's bit set?
    pub fn is_raised(&self) -> bool {
        self.byte().is_some_and(|byte| byte.load(SeqCst) & OURS != 0)
    }

    /// Has the VMM set it?
    pub fn is_the_vmms(&self) -> bool {
        self.byte().is_some_and(|byte| byte.load(SeqCst) & !OURS != 0)
    }

    /// Is it the byte of the same mapping?
    pub fn is_same(&self, other: &ImmediateExit) -> bool {
        let address = self.0.load(SeqCst);
        !address.is_null() && address == other.0.load(SeqCst)
    }

    /// The kvm_run is about to go.
    pub fn detach(&self) {
        self.0.store(std::ptr::null_mut(), SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::shared;
    use super::*;

    #[test]
    fn descriptors_are_checked() {
        let kvm = needs!(Descriptor::open());
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(3).unwrap();
        let raw = |d: &Descriptor| d.0.as_raw_fd();
        assert!(Descriptor::duplicate(raw(&kvm), Role::System, "kvm_fd").is_ok());
        assert!(Descriptor::duplicate(raw(&vm), Role::Vm, "vm_fd").is_ok());
        assert_eq!(Descriptor::duplicate(raw(&vcpu), Role::Vcpu, "fd").unwrap().vcpu_number(), Some(3));
        assert_eq!(
            vcpu.stats_id().and_then(|id| Some(id.rsplit_once('-')?.1.to_owned())).as_deref().unwrap_or("3"),
            "3"
        );
        let (file, null) = (shared(PAGE), File::open("/dev/null").unwrap());
        let bad = [
            (raw(&vm), Role::System),
            (raw(&kvm), Role::Vm),
            (raw(&vm), Role::Vcpu),
            (raw(&kvm), Role::Vcpu),
            (raw(&vcpu), Role::Vm),
            (raw(&vcpu), Role::System),
            (file.as_raw_fd(), Role::Vcpu),
            (null.as_raw_fd(), Role::Vcpu),
            (null.as_raw_fd(), Role::Vm),
            (0, Role::Vm),
        ];
        for (fd, role) in bad {
            assert_eq!(Descriptor::duplicate(fd, role, "x").unwrap_err().errno, libc::EINVAL);
        }
        assert_eq!(Descriptor::duplicate(-1, Role::Vm, "vm_fd").unwrap_err().errno, libc::EBADF);
    }
}
