//! The crate's public items are those of this list: a room that becomes public again would give
//! safe programs functions that change memory.

const FACE: [&str; 27] = [
    "Access",
    "Answer",
    "Error",
    "Exit",
    "Fault",
    "FileRange",
    "FileSource",
    "Fill",
    "FillOptions",
    "FillProgress",
    "HostMemory",
    "Kicker",
    "Mechanism",
    "MemoryError",
    "MemoryKind",
    "Memslot",
    "Origin",
    "PageState",
    "Probe",
    "Region",
    "Resolver",
    "Result",
    "Stats",
    "Vcpu",
    "VcpuOptions",
    "Vm",
    "VmOptions",
];

fn text(path: &str) -> String {
    std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// The lines of a file that make something public.
fn public_lines(path: &str) -> Vec<String> {
    let text = text(path);
    text.lines().filter(|line| line.starts_with("pub ")).map(str::to_owned).collect()
}

#[test]
fn only_the_face_is_public() {
    // `internals` is there for a benchmark, by a feature that is off.
    assert_eq!(public_lines("src/lib.rs"), ["pub use face::*;", "pub mod internals {"]);
    assert!(text("src/lib.rs").contains("#[cfg(feature = \"internals\")]\n#[doc(hidden)]\npub mod internals {"));
}

#[test]
fn the_face_is_what_is_listed() {
    let mut names = Vec::new();
    for line in public_lines("src/face/mod.rs") {
        let path = line.strip_prefix("pub use ").expect("only re-exports").trim_end_matches(';');
        let last = path.rsplit("::").next().unwrap();
        let list = path.split_once('{').map_or(last, |(_, list)| list.trim_end_matches('}'));
        names.extend(list.split(", ").map(str::to_owned));
    }
    names.retain(|name| name != "probe");
    names.sort();
    assert_eq!(names, FACE);
}
