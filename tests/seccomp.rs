//! docs/seccomp.md and the list that c-tests/process/seccomp.c is made of are one.

use std::collections::BTreeMap;

fn text(path: &str) -> String {
    std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// Each call, and when it is made.
fn documented() -> BTreeMap<String, String> {
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        Some((cells.next()?.strip_suffix('`')?.to_owned(), cells.next()?.to_owned()))
    };
    text("docs/seccomp.md").lines().filter_map(row).collect()
}

fn tested() -> BTreeMap<String, String> {
    let row = |line: &str| {
        let mut arguments = line.trim().strip_prefix("CALL(")?.split(", ");
        let (name, when) = (arguments.next()?.to_owned(), arguments.next()?);
        let phase = |word: &str| match word {
            "ANYTIME" => "any time",
            "SET_UP" => "set-up",
            "RUNNING" => "running",
            "ENDING" => "end",
            other => panic!("{other} is no phase"),
        };
        Some((name, when.split(" | ").map(phase).collect::<Vec<_>>().join(", ")))
    };
    text("c-tests/process/seccomp_calls.h").lines().filter_map(row).collect()
}

#[test]
fn what_is_documented_is_tested() {
    assert!(tested().len() > 40);
    assert_eq!(documented(), tested());
}
