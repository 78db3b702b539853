//! The structures of the C API have one layout: a C compiler with the header, and Rust, agree on every offset and size.

use super::{fill::*, memslots::*, probe::*, resolver::*, source::*, stats::*, vcpu::*, vm::*};
use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

/// (offset, size) by "structure.field"; a structure itself is "structure." with its alignment and size.
type Layout = BTreeMap<String, (usize, usize)>;

fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! layout {
    ($($type:ident { $($field:ident),* })*) => {{
        let mut layout = Layout::new();
        $(
            layout.insert(concat!(stringify!($type), ".").into(), (align_of::<$type>(), size_of::<$type>()));
            $(layout.insert(
                concat!(stringify!($type), ".", stringify!($field)).into(),
                (offset_of!($type, $field), size_of_field(|s: &$type| &s.$field)),
            );)*
        )*
        layout
    }};
}

fn as_rust_sees_it() -> Layout {
    layout! {
        kvmfault_fault { size, gpa, len, hva, slot, access, origin, vcpu, window_gpa, window_len }
        kvmfault_vm_options {
            size, kvm_fd, vm_fd, mechanism, uffd, abi, resolver, opaque, finalizer, written, reader_threads, readahead, flags
        }
        kvmfault_memslot {
            size, slot, kvm_flags, gpa, len, hva, block_hva, block_len, memory, fd, fd_offset, flags, reserved
        }
        kvmfault_region {
            size, ioctl_version, slot, flags, reserved, guest_phys_addr, memory_size, userspace_addr, userfault_bitmap
        }
        kvmfault_vcpu_options { size, fd, sigbus, run, kick_signal, flags }
        kvmfault_memory_error_info { size, gpa, hva, len, lost, reserved }
        kvmfault_probe {
            size, mechanisms_anon, mechanisms_shared, mechanisms_hugetlb, reserved, uffd_features, abi, pre_fault_memory,
            two_dimensional_paging
        }
        kvmfault_stats {
            size, faults_vcpu, faults_host, faults_prefetch, resolver_calls, outcome_resolved, outcome_waited, outcome_mapped,
            outcome_lost, outcome_failed, outcome_interrupted, outcome_retried, pages_copied, pages_zeroed, pages_mapped,
            pages_discarded, retries_again, retries_exist, mmio_reads, mmio_writes, kicks, latency_us_log2, ahead_asked,
            ahead_failed, pages_empty, pages_given_back
        }
        kvmfault_file_range { size, gpa, len, offset }
        kvmfault_fill_progress {
            size, pages_total, pages_left, failures, bytes_per_second, eta_ms, working_set_done, ended, paused,
            threads_calling
        }
        kvmfault_fill_options {
            size, threads, batch, bytes_per_second, progress, opaque, finalizer, interval_ms, flags, working_set_fd, reserved,
            gpa, len
        }
    }
}

/// Every field of every structure that the header defines, found by its text, so that none is forgotten above.
fn fields_of_the_header(header: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut structure: Option<&str> = None;
    for line in header.lines() {
        if let Some(name) = line.strip_prefix("struct ").and_then(|l| l.strip_suffix(" {")) {
            structure = Some(name);
            names.push(format!("{name}."));
        } else if line == "};" {
            structure = None;
        } else if let (Some(name), Some(field)) = (structure, line.strip_suffix(';')) {
            let field = field.split('[').next().unwrap_or(field);
            let field = field.rsplit([' ', '*']).next().unwrap_or(field);
            names.push(format!("{name}.{field}"));
        }
    }
    names
}

/// Compiles and runs a C program that prints what the header makes of them.
fn as_c_sees_it(names: &[String]) -> std::io::Result<Layout> {
    let mut program = String::from("#include <kvmfault.h>\n#include <stdio.h>\nint main(void)\n{\n");
    for name in names {
        let (structure, field) = name.split_once('.').expect("structure.field");
        let (offset, size) = if field.is_empty() {
            let aligned = format!("offsetof(struct {{ char c; struct {structure} s; }}, s)");
            (aligned, format!("sizeof(struct {structure})"))
        } else {
            let size = format!("sizeof(((struct {structure} *)0)->{field})");
            (format!("offsetof(struct {structure}, {field})"), size)
        };
        program += &format!("\tprintf(\"{name} %zu %zu\\n\", {offset}, {size});\n");
    }
    program += "\treturn 0;\n}\n";

    let source = std::env::temp_dir().join(format!("kvmfault-layout-{}.c", std::process::id()));
    let binary = source.with_extension("");
    std::fs::write(&source, program).expect("writing the C program");
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let compiled = Command::new(compiler)
        .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-I"])
        .args([&include, &source, Path::new("-o"), &binary])
        .status()?;
    assert!(compiled.success());
    let output = Command::new(&binary).output().expect("the C program").stdout;
    [source, binary].iter().for_each(|path| std::fs::remove_file(path).expect("removing the C program"));
    let text = String::from_utf8(output).expect("ASCII");
    let number = |word: Option<&str>| word.and_then(|w| w.parse().ok()).expect("a number");
    let layout = text
        .lines()
        .map(|line| {
            let mut words = line.split(' ');
            let name = words.next().unwrap_or_default().to_owned();
            (name, (number(words.next()), number(words.next())))
        })
        .collect();
    Ok(layout)
}

#[test]
fn c_and_rust_agree_on_the_layout() {
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/kvmfault.h");
    let names = fields_of_the_header(&needs!(std::fs::read_to_string(header)));
    assert!(names.len() > 80, "the header's structures were not found: {names:?}");
    let (rust, c) = (as_rust_sees_it(), needs!(as_c_sees_it(&names)));
    let described: Vec<_> = rust.keys().collect();
    let defined: Vec<_> = c.keys().collect();
    assert_eq!(described, defined, "the list in this test and the header");
    for (name, layout) in &c {
        assert_eq!(layout, &rust[name], "(offset, size) of {name}: C and Rust");
    }
}

/// What makes "shorter is accepted" work: the size comes first, and no structure ends in padding that a later field could fall into.
#[test]
fn structures_begin_with_their_size_and_end_without_padding() {
    let layout = as_rust_sees_it();
    for (name, &(_, size)) in layout.iter().filter(|(name, _)| name.ends_with('.')) {
        assert_eq!(layout[&format!("{name}size")], (0, size_of::<usize>()), "{name}");
        let fields = layout.iter().filter(|(field, _)| field.starts_with(name.as_str()) && *field != name);
        let end = fields.map(|(_, (offset, size))| offset + size).max();
        assert_eq!(end, Some(size), "{name} ends in padding");
    }
}
