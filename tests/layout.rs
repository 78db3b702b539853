//! A C compiler with the header lays out the structures as src/capi/layout.txt records them.
//! src/capi/structs.rs compares Rust's layout with the same file. It is the record of the ABI:
//! lines are only ever added.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// (offset, size) by "structure.field". A structure itself is "structure.", with its alignment and
/// size.
type Layout = BTreeMap<String, (usize, usize)>;

fn parse(text: &str) -> Layout {
    let number = |word: Option<&str>| word.and_then(|w| w.parse().ok()).expect("a number");
    let lines = text.lines().map(|line| {
        let mut words = line.split(' ');
        let name = words.next().unwrap_or_default().to_owned();
        (name, (number(words.next()), number(words.next())))
    });
    lines.collect()
}

fn text(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every field of every structure that the header defines, found by its text.
fn fields_of_the_header(header: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut structure: Option<&str> = None;
    for line in header.lines() {
        if let Some(name) = line.strip_prefix("struct ").and_then(|l| l.strip_suffix(" {")) {
            structure = Some(name);
            names.push(format!("{name}."));
        } else if line == "};" {
            structure = None;
        } else if line.trim_start().starts_with('*') {
            // Of a comment.
        } else if let (Some(name), Some(field)) = (structure, line.strip_suffix(';')) {
            let field = field.split('[').next().unwrap_or(field);
            let field = field.rsplit([' ', '*']).next().unwrap_or(field);
            names.push(format!("{name}.{field}"));
        }
    }
    names
}

/// Compiles and runs a C program that prints what the header makes of them.
fn as_c_sees_it(names: &[String]) -> Layout {
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

    let source = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("layout.c");
    let binary = source.with_extension("");
    std::fs::write(&source, program).expect("writing the C program");
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let compiled = Command::new(compiler)
        .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-I"])
        .args([&include, &source, Path::new("-o"), &binary])
        .status();
    assert!(compiled.expect("the C compiler").success());
    let output = Command::new(&binary).output().expect("the C program").stdout;
    parse(&String::from_utf8(output).expect("ASCII"))
}

#[test]
fn c_has_the_layout_of_the_record() {
    let names = fields_of_the_header(&text("include/kvmfault.h"));
    assert!(names.len() > 80, "the header's structures were not found: {names:?}");
    let (record, c) = (parse(&text("src/capi/layout.txt")), as_c_sees_it(&names));
    let (recorded, defined): (Vec<_>, Vec<_>) = (record.keys().collect(), c.keys().collect());
    assert_eq!(recorded, defined, "src/capi/layout.txt and the header");
    for (name, layout) in &c {
        assert_eq!(layout, &record[name], "(offset, size) of {name}: C and the record");
    }
}
