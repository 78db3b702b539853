//! What works here, what does not, why, and what to do: for `kvmfault_probe` (programs) and
//! `kvmfault_explain` (people).

use super::{BlockRequest, Host, MECHANISMS, POISON_TRAP};
use crate::error::{Error, Result};
use crate::kernel::arch::{two_dimensional_paging, PAGING_NAME, PAGING_REMEDY};
use crate::kernel::kvm::SystemFd;
use crate::kernel::mem::Kind;
use crate::kernel::probe::{attempts, Attempt};
use crate::kernel::surroundings::{self, Surroundings};
use crate::kernel::uffd::{Uffd, FEATURE_MINOR_SHMEM, FEATURE_POISON};
use kvm_bindings::{KVM_CAP_MEMORY_FAULT_INFO, KVM_CAP_PRE_FAULT_MEMORY};
use std::fmt::Write;

/// What was found out about this machine and process.
pub struct Report {
    uffd: Result<Uffd>,
    attempts: Vec<Attempt>,
    pre_fault: bool,
    fault_info: bool,
    surroundings: Surroundings,
}

impl Report {
    /// Asks the kernel, which takes some milliseconds: scratch VMs run.
    pub fn new(system: &SystemFd) -> Report {
        Report {
            uffd: Uffd::open(),
            attempts: attempts(system),
            pre_fault: system.check_extension(KVM_CAP_PRE_FAULT_MEMORY) > 0,
            fault_info: system.check_extension(KVM_CAP_MEMORY_FAULT_INFO) > 0,
            surroundings: surroundings::look(),
        }
    }

    /// The name of the ABI row that was proven.
    pub fn abi(&self) -> Option<&'static str> {
        self.attempts.iter().find(|a| a.result.is_ok()).map(|a| a.abi.name)
    }

    /// The features of a userfaultfd; 0 if none can be opened.
    pub fn features(&self) -> u64 {
        self.uffd.as_ref().map_or(0, Uffd::features)
    }

    /// Does KVM have KVM_PRE_FAULT_MEMORY? (The number 236 is also EXIT_ON_MISSING of the flag's
    /// v7, which has no such ioctl.)
    pub fn pre_fault(&self) -> bool {
        self.pre_fault && self.abi() != Some("v7")
    }

    fn host(&self) -> Host {
        let abi = self.attempts.iter().find(|a| a.result.is_ok()).map(|a| a.abi);
        Host { abi, features: self.features() }
    }

    /// Can a mechanism (by its index) serve this kind of memory?
    pub fn check(&self, mechanism: usize, kind: Kind) -> Result<()> {
        if let Err(e) = &self.uffd {
            return Err(Error::new(e.errno, "no userfaultfd"));
        }
        let request = BlockRequest { vcpu_only: true, ..BlockRequest::default() };
        MECHANISMS[mechanism].check(&self.host(), kind, &request)
    }

    /// The report for people.
    pub fn explain(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "kernel {}", surroundings::kernel_release());
        self.explain_mechanisms(&mut text);
        self.explain_uffd(&mut text);
        self.explain_process(&mut text);
        self.explain_kvm(&mut text);
        text
    }

    fn explain_mechanisms(&self, text: &mut String) {
        let _ = writeln!(text, "\nmechanisms, in the order in which auto tries them:");
        for (n, mechanism) in MECHANISMS.iter().enumerate() {
            match self.check(n, Kind::Shared) {
                Ok(()) => {
                    let note = match mechanism.number() {
                        POISON_TRAP => " (shared memory and hugetlb; private memory with KVMFAULT_MEMSLOT_VCPU_ONLY)",
                        _ => "",
                    };
                    let _ = writeln!(text, "  {:<13} works{note}", mechanism.name());
                }
                Err(e) => {
                    let reason = e.message.replace(" (see kvmfault_explain)", "");
                    let _ = writeln!(text, "  {:<13} does not work: {reason}", mechanism.name());
                }
            }
        }
    }

    fn explain_uffd(&self, text: &mut String) {
        let _ = writeln!(text, "\nuserfaultfd:");
        match &self.uffd {
            Ok(uffd) => {
                let has = |bit, name, since| match uffd.features() & bit != 0 {
                    true => format!("{name} yes"),
                    false => format!("{name} no (Linux {since})"),
                };
                let poison = has(FEATURE_POISON, "UFFDIO_POISON", "6.6");
                let _ =
                    writeln!(text, "  can be opened; {poison}, {}", has(FEATURE_MINOR_SHMEM, "minor faults", "5.14"));
            }
            Err(e) => {
                let _ = writeln!(text, "  can't be opened: {e}");
                let _ = writeln!(text, "  {}", uffd_remedy(e.errno, self.surroundings.initial_user_namespace));
            }
        }
    }

    /// Describes what confines the process. Landlock cannot be asked: it shows in what cannot be
    /// read.
    fn explain_process(&self, text: &mut String) {
        let Surroundings { maps, initial_user_namespace, seccomp } = &self.surroundings;
        let _ = writeln!(text, "\nthis process:");
        let _ = match maps {
            None => writeln!(text, "  /proc/self/maps can be read"),
            Some(e) => writeln!(
                text,
                "  {e} (no /proc, or Landlock): slots on hugetlb memory must have kvmfault_memslot.fd, and those on memory in several\n  mappings must say what it is (kvmfault_memslot.memory; .fd if it is shared)"
            ),
        };
        let _ = match initial_user_namespace {
            Some(true) => writeln!(text, "  in the initial user namespace"),
            Some(false) => {
                writeln!(text, "  in a user namespace of its own: capabilities here don't count for userfaultfd")
            }
            None => writeln!(text, "  which user namespace it is in can't be known without /proc"),
        };
        if *seccomp == Some(true) {
            let _ = writeln!(
                text,
                "  a seccomp filter is in force: docs/seccomp.md lists the system calls that the library makes"
            );
        }
    }

    fn explain_kvm(&self, text: &mut String) {
        let _ = writeln!(text, "\nKVM, the fast-only memslot flag (never merged into mainline; revisions by name):");
        for attempt in &self.attempts {
            let verdict =
                attempt.result.as_ref().map_or_else(|e| format!("no: {e}"), |()| "proven in a scratch VM".into());
            let _ = writeln!(text, "  {:<13} {}: {verdict}", attempt.abi.name, attempt.abi.title);
        }
        if self.abi().is_none() {
            let _ = writeln!(
                text,
                "  To have it, run a kernel with one of these series (c-tests/kernel has a patch for Linux 6.12). A kernel with numbers of its own: name its\n  ABI in kvmfault_vm_options.abi. Nothing needs to be done otherwise: auto takes the next mechanism."
            );
        }
        let yes = |b: bool| if b { "yes" } else { "no" };
        let _ = writeln!(text, "\nKVM, the rest:");
        let _ = writeln!(
            text,
            "  KVM_CAP_MEMORY_FAULT_INFO {} (says where private/shared mismatches are, not absent pages)",
            yes(self.fault_info)
        );
        let _ = writeln!(text, "  KVM_PRE_FAULT_MEMORY {}", yes(self.pre_fault()));
        match two_dimensional_paging() {
            true => {
                let _ = writeln!(text, "  two-dimensional paging ({PAGING_NAME}) yes");
            }
            false => {
                let _ = writeln!(
                    text,
                    "  two-dimensional paging ({PAGING_NAME}) no, or not known: KVM reads guest page tables itself. With poison-trap call\n  kvmfault_pages_resolve on them before the guest uses them ({PAGING_REMEDY})."
                );
            }
        }
    }
}

fn uffd_remedy(errno: i32, initial_user_namespace: Option<bool>) -> String {
    match errno {
        libc::EPERM | libc::EACCES => {
            // The kernel checks the capability in the initial user namespace
            // (userfaultfd_syscall_allowed in fs/userfaultfd.c).
            let capability = match initial_user_namespace {
                Some(false) => "",
                Some(true) => "give the process CAP_SYS_PTRACE; ",
                None => "give the process CAP_SYS_PTRACE (of the initial user namespace); ",
            };
            format!(
                "do one of: {capability}sysctl vm.unprivileged_userfaultfd=1; allow it to open /dev/userfaultfd (Linux 6.1 and later: chmod or an \
                 ACL), or pass it an open descriptor of that device (kvmfault_vm_options.uffd); open a userfaultfd before the process gives up its \
                 privileges (the same option: one of another process serves that process's memory). UFFD_USER_MODE_ONLY is no way: KVM's faults are \
                 the kernel's. In a container, its seccomp profile must allow userfaultfd."
            )
        }
        libc::ENOSYS | libc::ENOENT => {
            "the kernel is built without CONFIG_USERFAULTFD, or a seccomp filter hides it".into()
        }
        libc::EMFILE | libc::ENFILE => "too many open files: raise RLIMIT_NOFILE".into(),
        _ => "see userfaultfd(2)".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::abi::ABIS;

    #[test]
    fn every_path_is_named_with_its_reason() {
        let system = needs!(SystemFd::open());
        let report = Report::new(&system);
        let text = report.explain();
        for mechanism in MECHANISMS {
            assert!(text.contains(mechanism.name()), "{text}");
        }
        let tried = ABIS.iter().take_while(|abi| Some(abi.name) != report.abi());
        tried.for_each(|abi| assert!(text.contains(&format!("{:<13} {}: no: ", abi.name, abi.title)), "{text}"));
    }

    #[test]
    fn a_refused_userfaultfd_comes_with_a_remedy() {
        let uffd = Err(Error::new(libc::EPERM, "userfaultfd(2): not permitted"));
        let surroundings = Surroundings { initial_user_namespace: Some(true), ..Surroundings::default() };
        let mut report = Report { uffd, attempts: Vec::new(), pre_fault: false, fault_info: false, surroundings };
        let text = report.explain();
        assert!(text.contains("CAP_SYS_PTRACE"), "{text}");
        assert!(
            text.contains("vm.unprivileged_userfaultfd=1") && text.contains("userfaultfd   does not work"),
            "{text}"
        );
        report.surroundings.initial_user_namespace = Some(false);
        let text = report.explain();
        assert!(!text.contains("CAP_SYS_PTRACE") && text.contains("/dev/userfaultfd"), "{text}");
    }

    #[test]
    fn what_confines_the_process_is_named() {
        let uffd = Err(Error::new(libc::EPERM, "userfaultfd(2): not permitted"));
        let maps = Some(Error::new(libc::EACCES, "/proc/self/maps can't be read: Permission denied"));
        let surroundings = Surroundings { maps, seccomp: Some(true), ..Surroundings::default() };
        let text = Report { uffd, attempts: Vec::new(), pre_fault: false, fault_info: false, surroundings }.explain();
        for words in
            ["/proc/self/maps can't be read", "kvmfault_memslot.memory", "docs/seccomp.md", "initial user namespace"]
        {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
}
