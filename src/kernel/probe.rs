//! Finds out which row of the ABI table is this kernel's, by the behaviour of a scratch VM.
//!
//! The guest loads a byte from a page that is absent, and ends. A row is proven when the flag is
//! accepted, KVM_RUN exits as the row says with the page's address, and, once the page is present,
//! the same guest ends without another such exit. With a bitmap, a clear bit must not exit.

use super::abi::{Abi, ABIS};
use super::address::Gpa;
use super::arch;
use super::kvm::{Region, Run, SystemFd, VcpuFd};
use super::mem::Mapping;
use super::page::page_size;
use crate::error::{fail, Error, Result};

/// Both addresses are multiples of a page of any size.
const CODE_GPA: Gpa = Gpa(0x1_0000);
const DATA_GPA: Gpa = Gpa(0x2_0000);
/// Pages of the data slot: enough that the slot is no corner case, and few enough to cost nothing.
const DATA_PAGES: u64 = 16;

/// Tries one row; the error says where the kernel differs from it.
pub fn prove(system: &SystemFd, abi: &Abi) -> Result<()> {
    let vm = system.create_vm()?;
    if let Some((cap, arg)) = abi.enable {
        vm.enable_cap(cap, arg).map_err(|e| e.context(format!("enabling capability {cap} as {} does", abi.name)))?;
    }
    let code = Mapping::anonymous(page_size())?;
    let data = Mapping::anonymous(DATA_PAGES * page_size())?;
    let bitmap = Mapping::anonymous(page_size())?;
    code.whole().write(arch::PROBE_CODE)?;
    let region =
        Region { version: 1, slot: 0, gpa: CODE_GPA, len: code.size(), hva: code.address(), ..Default::default() };
    vm.set_region(&region, code.whole())?;

    let mut region =
        Region { version: 1, slot: 1, gpa: DATA_GPA, len: data.size(), hva: data.address(), ..Default::default() };
    bitmap.atomics()[0].store(!0, std::sync::atomic::Ordering::Release);
    abi.arm(&mut region, bitmap.address());
    vm.set_region(&region, data.whole())
        .map_err(|e| e.context(format!("a memslot with flag {:#x} ({})", abi.slot_flag, abi.name)))?;

    let vcpu = vm.create_vcpu(0)?;
    let run = Run::map(system, &vcpu)?;
    arch::start_probe_guest(&vm, &vcpu, CODE_GPA, DATA_GPA)?;

    let result = run_once(&vcpu, &run);
    match (abi.decode(result.err().unwrap_or(0), &run), result) {
        (Some(exit), _) if exit.gpa.0 & !(page_size() - 1) == DATA_GPA.0 => {}
        (Some(exit), _) => fail!(EOPNOTSUPP, "the exit names address {:#x} instead of {DATA_GPA:#x}", exit.gpa),
        (None, Ok(())) if run.exit_reason() == arch::PROBE_END => {
            fail!(EOPNOTSUPP, "the flag is accepted, but a guest that touches an absent page does not exit")
        }
        (None, result) => {
            let error = result.err().map_or("no error".into(), |e| std::io::Error::from_raw_os_error(e).to_string());
            fail!(
                EOPNOTSUPP,
                "KVM_RUN ended otherwise than {} does: {error}, exit reason {}",
                abi.name,
                run.exit_reason()
            )
        }
    }
    data.whole().write(&[1])?;
    bitmap.atomics()[0].store(!1, std::sync::atomic::Ordering::Release);
    match run_once(&vcpu, &run) {
        Ok(()) if run.exit_reason() == arch::PROBE_END => Ok(()),
        other => fail!(
            EOPNOTSUPP,
            "the guest did not go on once the page was there: {other:?}, exit reason {}",
            run.exit_reason()
        ),
    }
}

/// Runs the guest until an exit that no signal caused: those of the VMM (of its timer, say) prove
/// nothing. Gives up after many.
fn run_once(vcpu: &VcpuFd, run: &Run) -> std::result::Result<(), i32> {
    let mut tries = (0..1000).map(|_| {
        run.clear_exit_reason();
        vcpu.run()
    });
    tries.find(|exit| *exit != Err(libc::EINTR)).unwrap_or(Err(libc::EINTR))
}

/// The result of trying one row.
#[derive(Debug)]
pub struct Attempt {
    /// The row.
    pub abi: &'static Abi,
    /// An error says why it was not proven.
    pub result: Result<()>,
}

/// Tries all rows in the table's order, newest last, and stops at the first that is proven.
pub fn attempts(system: &SystemFd) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    for abi in ABIS {
        let result = if abi.is_reported(|cap| system.check_extension(cap)) {
            prove(system, abi)
        } else {
            Err(Error::new(libc::EOPNOTSUPP, format!("KVM_CHECK_EXTENSION does not report all of {:?}", abi.caps)))
        };
        let proven = result.is_ok();
        attempts.push(Attempt { abi, result });
        if proven {
            break;
        }
    }
    attempts
}

/// The row that this kernel was proven to have; None if it has none. An error if a row could not be
/// tried, which says nothing of the kernel.
pub fn find(system: &SystemFd) -> Result<Option<&'static Abi>> {
    let attempts = attempts(system);
    if let Some(proven) = attempts.iter().find(|a| a.result.is_ok()) {
        return Ok(Some(proven.abi));
    }
    let obstacles = [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::EMFILE, libc::ENFILE, libc::ENOMEM];
    match attempts.into_iter().find_map(|a| a.result.err().filter(|e| obstacles.contains(&e.errno))) {
        Some(error) => Err(error.context("looking for the fast-only memslot flag")),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a kernel without the flag every row must fail, also those whose capability numbers
    /// mainline uses for other things.
    #[test]
    fn a_row_is_proven_by_behaviour_only() {
        let system = needs!(SystemFd::open());
        let found = find(&system).unwrap().map(|abi| abi.name);
        for abi in ABIS {
            let result = prove(&system, abi);
            assert_eq!(result.is_ok(), found == Some(abi.name), "{}: {result:?}", abi.name);
        }
    }
}
