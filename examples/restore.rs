// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lazy restore in Rust: a VM runs at once, and its memory comes from a snapshot file page by page,
//! as the guest touches it. The guest checks every word; then the host does.
//!
//!     cargo run --example restore -- [--mechanism NAME] [--size MIB] [--json FILE]
//!
//! What a VMM needs of the library is in `restore`. The VM is made with kvm-ioctls; any other way
//! does as well.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region, KVM_EXIT_IO, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use kvmfault::{Exit, FileRange, FileSource, HostMemory, Mechanism, MemoryKind, Memslot, Vcpu, Vm};
use std::error::Error;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const PAGE_TABLES: u64 = 0x1000;
const CODE: u64 = 0x10000;
/// Ordinary memory at guest address 0: page tables and code.
const LOW_LEN: usize = 2 << 20;
/// The memory that is restored.
const RAM: u64 = 0x4000_0000;

// The guest: compares `rcx` pages from `rdi` on. Word w of page p is (p + 1) * r8 + w; of every
// eighth page it is 0. At the end `out` to port 0x10 with eax = 0 if all was right, else with eax =
// 1 and rdi = the page.
std::arch::global_asm!(
    r#"
    .pushsection .rodata
    .globl guest_start, guest_end
guest_start:
    xor ebx, ebx
2:  lea rdx, [rbx + 1]
    imul rdx, r8
    mov r9d, 1
    mov eax, ebx
    and eax, 7
    cmp eax, 7
    jne 3f
    xor edx, edx
    xor r9d, r9d
3:  xor esi, esi
4:  cmp [rdi + rsi * 8], rdx
    jne 5f
    add rdx, r9
    inc rsi
    cmp rsi, 512
    jb 4b
    add rdi, 4096
    inc rbx
    cmp rbx, rcx
    jb 2b
    xor eax, eax
    out 0x10, eax
5:  mov eax, 1
    out 0x10, eax
guest_end:
    .popsection
    "#
);
extern "C" {
    static guest_start: u8;
    static guest_end: u8;
}
/// The guest's r8: any odd number with many bits.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// What word `w` of a page is.
fn word(page: u64, w: u64) -> u64 {
    if page % 8 == 7 {
        return 0;
    }
    (page + 1).wrapping_mul(FACTOR).wrapping_add(w)
}

/// A file without a name, with what the guest expects; pages of zeros are holes.
fn write_snapshot(pages: u64) -> std::io::Result<File> {
    let path = std::env::temp_dir().join(format!("restore-{}.snapshot", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(path)?;
    file.set_len(pages * PAGE as u64)?;
    for page in (0..pages).filter(|page| page % 8 != 7) {
        let bytes: Vec<u8> = (0..512).flat_map(|w| word(page, w).to_le_bytes()).collect();
        file.write_all_at(&bytes, page * PAGE as u64)?;
    }
    Ok(file)
}

/// Memory that stays mapped until the program ends.
fn map(len: usize, flags: i32, fd: i32) -> std::io::Result<*mut u8> {
    // SAFETY: a new mapping, at an address that the kernel picks.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    match start {
        libc::MAP_FAILED => Err(std::io::Error::last_os_error()),
        start => Ok(start.cast()),
    }
}

/// An empty file in memory.
fn memfd(len: usize) -> std::io::Result<File> {
    // SAFETY: the name is a string; a descriptor that is returned is new, and owned by nothing
    // else.
    let file = unsafe {
        match libc::memfd_create(c"guest memory".as_ptr(), libc::MFD_CLOEXEC) {
            -1 => return Err(std::io::Error::last_os_error()),
            fd => File::from_raw_fd(fd),
        }
    };
    file.set_len(len as u64)?;
    Ok(file)
}

/// What kvm-ioctls has open, for the library.
fn borrow(fd: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: it is open for as long as what it is borrowed from.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// A VM with page tables and the guest's code: every virtual address below 8 GiB is that physical
/// address.
fn create_vm(kvm: &Kvm) -> Result<VmFd, Box<dyn Error>> {
    let vm = kvm.create_vm()?;
    let low = map(LOW_LEN, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
    const ALL: u64 = 1 | 2 | 4; // present, writable, for CPL 3 too
    const LARGE: u64 = 0x80;
    let mut tables = vec![0u64; 10 * 512];
    tables[0] = (PAGE_TABLES + PAGE as u64) | ALL;
    for n in 0..8 {
        tables[512 + n] = (PAGE_TABLES + (2 + n as u64) * PAGE as u64) | ALL;
    }
    for n in 0..8 * 512 {
        tables[1024 + n] = (n as u64 * (2 << 20)) | ALL | LARGE;
    }
    // SAFETY: both fit into the mapping, which nothing else uses as yet; the code is what lies
    // between its two symbols.
    unsafe {
        std::ptr::copy_nonoverlapping(tables.as_ptr(), low.add(PAGE_TABLES as usize).cast(), tables.len());
        let (start, end) = (&raw const guest_start, &raw const guest_end);
        std::ptr::copy_nonoverlapping(start, low.add(CODE as usize), end as usize - start as usize);
    }
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: LOW_LEN as u64,
        userspace_addr: low as u64,
    };
    // SAFETY: the mapping stays, and is the guest's alone from now on.
    unsafe { vm.set_user_memory_region(region)? };
    Ok(vm)
}

/// A vCPU in 64-bit mode at CPL 3, about to check so many pages.
fn create_vcpu(kvm: &Kvm, vm: &VmFd, pages: u64) -> Result<VcpuFd, Box<dyn Error>> {
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    let segment = kvm_segment { limit: 0xfffff, present: 1, dpl: 3, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x33, type_: 11, l: 1, ..segment };
    sregs.ds = kvm_segment { selector: 0x2b, type_: 3, db: 1, ..segment };
    (sregs.es, sregs.fs, sregs.gs, sregs.ss) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
    sregs.ldt = Default::default();
    (sregs.tr.present, sregs.tr.type_) = (1, 11); // a busy 64-bit TSS
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 1 << 5; // PAE
    sregs.cr0 = 0x8005_0033; // paging, protected mode, and what goes with them
    sregs.efer = 0xd01; // long mode, active; NX; syscall
    vcpu.set_sregs(&sregs)?;
    let rflags = 0x3002; // I/O privilege level 3
    vcpu.set_regs(&kvm_regs { rip: CODE, rsp: CODE, rflags, rdi: RAM, rcx: pages, r8: FACTOR, ..Default::default() })?;
    Ok(vcpu)
}

/// How a restore went.
struct Outcome {
    mechanism: Mechanism,
    faults: u64,
    resolver_calls: u64,
    time: Duration,
    verified: bool,
}

fn restore(kvm: &Kvm, snapshot: &File, len: usize, mechanism: Mechanism) -> Result<Outcome, Box<dyn Error>> {
    let (vm, pages) = (create_vm(kvm)?, (len / PAGE) as u64);
    let mut vcpu = create_vcpu(kvm, &vm, pages)?;

    // The resolver: the library's own, on a snapshot file. A VMM that gets pages from elsewhere
    // implements Resolver.
    let source = FileSource::new(snapshot.as_fd(), &[FileRange { gpa: RAM, len: len as u64, offset: 0 }])?;
    let memory = Vm::options(borrow(kvm), borrow(&vm)).mechanism(mechanism).readahead(16).attach(source)?;

    // Shared memory suits all mechanisms. It is empty, and stays so until touched.
    let ram = map(len, libc::MAP_SHARED, memfd(len)?.as_raw_fd())?;
    // SAFETY: the mapping stays until the program ends; below, the host only reads it, by volatile
    // accesses.
    let lent = unsafe { HostMemory::new(ram, len) };
    memory.set_memslot(&Memslot::new(1, RAM, &lent).kind(MemoryKind::Shared))?;

    // On the thread that runs the vCPU. Instead of VcpuFd::run: `run` returns when there is
    // something that isn't the library's.
    let start = Instant::now();
    let faults = Vcpu::options(borrow(&vcpu)).attach(&memory)?;
    loop {
        match faults.run()? {
            Exit::Pass => break,
            Exit::MemoryError(error) => return Err(format!("a page is lost: {error:?}").into()),
            _ => {} // a kick, or a signal
        }
    }
    let time = start.elapsed();
    let (exit, regs) = (vcpu.get_kvm_run().exit_reason, vcpu.get_regs()?);
    if exit != KVM_EXIT_IO {
        return Err(format!("unexpected exit {exit} at {:#x}", regs.rip).into());
    }
    if regs.rax != 0 {
        eprintln!("the guest found a wrong word in the page at {:#x}", regs.rdi);
    }
    let read = |page: u64, w: u64| {
        // SAFETY: inside the mapping, and aligned; the guest has stopped.
        unsafe { ram.cast::<u64>().add((page * 512 + w) as usize).read_volatile() }
    };
    let equal = (0..pages).all(|page| (0..512).all(|w| read(page, w) == word(page, w)));
    let stats = memory.stats();
    Ok(Outcome {
        mechanism,
        faults: stats.faults_vcpu,
        resolver_calls: stats.resolver_calls,
        time,
        verified: regs.rax == 0 && equal && memory.absent() == 0,
    })
}

const USAGE: &str = "usage: restore [--mechanism memslot-flag|poison-trap|userfaultfd] [--size MIB] [--json FILE]";

fn usage() -> ! {
    eprintln!("{USAGE}");
    std::process::exit(2)
}

fn main() -> Result<(), Box<dyn Error>> {
    let all = [Mechanism::MemslotFlag, Mechanism::PoisonTrap, Mechanism::Userfaultfd];
    let (mut chosen, mut size, mut json) = (None, 64usize, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(option) = arguments.next() {
        if option == "--help" {
            println!("{USAGE}");
            return Ok(());
        }
        let Some(value) = arguments.next() else { usage() };
        match option.as_str() {
            "--mechanism" => chosen = Some(*all.iter().find(|m| m.name() == value).unwrap_or_else(|| usage())),
            "--size" => size = value.parse().ok().filter(|n| (1..=4096).contains(n)).unwrap_or_else(|| usage()),
            "--json" => json = Some(value),
            _ => usage(),
        }
    }
    let kvm = Kvm::new()?;
    let probe = kvmfault::probe(Some(borrow(&kvm)))?;
    let works = |m: &Mechanism| probe.works(*m, MemoryKind::Shared);
    // One that was asked for is tried in any case: the error says why it doesn't work.
    let mechanisms: Vec<_> = match chosen {
        Some(mechanism) => vec![mechanism],
        None => all.into_iter().filter(works).collect(),
    };
    if mechanisms.is_empty() {
        return Err(probe.explain().into());
    }
    let len = size << 20;
    let snapshot = write_snapshot((len / PAGE) as u64)?;
    let (mut rows, mut right) = (Vec::new(), true);
    for mechanism in mechanisms {
        let o = restore(&kvm, &snapshot, len, mechanism)?;
        let (seconds, verified) = (o.time.as_secs_f64(), if o.verified { "yes" } else { "NO" });
        println!(
            "{:<13} {size} MiB in {seconds:.3} s, {} faults, {} resolver calls, verified: {verified}",
            o.mechanism.name(),
            o.faults,
            o.resolver_calls
        );
        rows.push(format!(
            " {{\"mechanism\": \"{}\", \"pages\": {}, \"faults\": {}, \"resolver_calls\": {}, \"verified\": {}}}",
            o.mechanism,
            len / PAGE,
            o.faults,
            o.resolver_calls,
            o.verified
        ));
        right &= o.verified;
    }
    if let Some(file) = json {
        std::fs::write(file, format!("[\n{}\n]\n", rows.join(",\n")))?;
    }
    std::process::exit(i32::from(!right))
}
