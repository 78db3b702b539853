//! What the Markdown pages name exists: files that they link to and their headings, paths of the
//! project, functions and constants of the C API, cases of the C tests, and the functions of
//! docs/architecture.md.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The pages of the project, relative to its root.
fn pages() -> Vec<PathBuf> {
    let folders = ["", "docs", "qemu", "c-tests", "c-tests/kernel", "c-tests/vm"];
    let mut pages = Vec::new();
    for folder in folders {
        for entry in root().join(folder).read_dir().into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|e| e == "md") {
                pages.push(Path::new(folder).join(entry.file_name()));
            }
        }
    }
    assert!(pages.len() > 10);
    pages
}

/// A page's lines outside of fenced code, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut in_code = false;
    text.lines().enumerate().filter_map(move |(n, line)| {
        let fence = line.trim_start().starts_with("```");
        in_code ^= fence;
        (!in_code && !fence).then_some((n + 1, line))
    })
}

/// What stands between `open` and `close` in a line, each time.
fn between<'a>(line: &'a str, open: &'a str, close: &'a str) -> impl Iterator<Item = &'a str> {
    line.split(open).skip(1).filter_map(move |rest| rest.split_once(close).map(|(inside, _)| inside))
}

/// What stands in backquotes.
fn quoted(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// A heading's anchor, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn links_lead_somewhere() {
    let mut wrong = Vec::new();
    for page in pages() {
        let text = read(&page);
        for (n, line) in prose(&text) {
            for target in between(line, "](", ")").filter(|t| !t.starts_with("http")) {
                let (file, heading) = target.split_once('#').unwrap_or((target, ""));
                let path = match file {
                    "" => page.clone(),
                    _ => page.parent().unwrap().join(file),
                };
                let has = |heading: &str| {
                    let text = read(&path);
                    let mut headings = prose(&text).filter_map(|(_, l)| l.strip_prefix('#'));
                    headings.any(|l| anchor(l.trim_start_matches('#').trim()) == heading)
                };
                if !root().join(&path).exists() || !heading.is_empty() && !has(heading) {
                    wrong.push(format!("{}:{n}: {target}", page.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "links that lead nowhere: {wrong:#?}");
}

#[test]
fn paths_exist() {
    const FOLDERS: [&str; 9] =
        ["src/", "docs/", "c-tests/", "examples/", "scripts/", "bench/", "qemu/", "include/kvm", "tests/"];
    let mut wrong = Vec::new();
    for page in pages() {
        let text = read(&page);
        for (n, line) in prose(&text) {
            for word in quoted(line).flat_map(|code| code.split([' ', '=', ':'])) {
                let is_path = FOLDERS.iter().any(|folder| word.starts_with(folder)) && !word.contains(['*', '<']);
                if is_path && !word.contains("ARCH") && !root().join(word).exists() {
                    wrong.push(format!("{}:{n}: {word}", page.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "paths that don't exist: {wrong:#?}");
}

/// `kvmfault_pages_*` and `KVMFAULT_STATE_*` stand for several.
#[test]
fn names_of_the_api_exist() {
    let header = read("include/kvmfault.h");
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let known: BTreeSet<&str> = header.split(|c| !is_part(c)).collect();
    let mut wrong = Vec::new();
    for page in pages() {
        // What was removed since has its place there.
        let is_history = page.ends_with("CHANGELOG.md");
        let text = read(&page);
        for (n, line) in prose(&text).filter(|_| !is_history) {
            for code in quoted(line) {
                for word in code.split(|c| !is_part(c)) {
                    let is_name = word.starts_with("kvmfault_") || word.starts_with("KVMFAULT_");
                    // Python packages, and what the tests' environment has.
                    let is_other = [
                        "kvmfault_vm",
                        "kvmfault_qemu",
                        "KVMFAULT_TEST_",
                        "KVMFAULT_VM_",
                        "KVMFAULT_SELFTEST_",
                        "KVMFAULT_0",
                    ]
                    .iter()
                    .any(|prefix| word.starts_with(prefix))
                        && !known.contains(word)
                        && (page.starts_with("c-tests")
                            || page.starts_with("qemu")
                            || !word.starts_with("KVMFAULT_VM_"));
                    let exists =
                        known.contains(word) || word.ends_with('_') && known.iter().any(|k| k.starts_with(word));
                    if is_name && !is_other && !exists {
                        wrong.push(format!("{}:{n}: {word}", page.display()));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "names that kvmfault.h doesn't have: {wrong:#?}");
}

/// The C programs of a folder and of those in it: name and text.
fn programs(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(programs(&path));
        } else if path.extension().is_some_and(|e| e == "c") {
            found.push((path.file_stem().unwrap().to_string_lossy().into_owned(), read(&path)));
        }
    }
    found
}

/// `group/case`, where there is such a group.
#[test]
fn cases_exist() {
    let groups: BTreeMap<_, _> = programs(&root().join("c-tests")).into_iter().collect();
    let (mut named, mut wrong) = (0, Vec::new());
    for page in pages() {
        let text = read(&page);
        // Pages beside the tests name their folders in the same form.
        for (n, line) in prose(&text).filter(|_| !page.starts_with("c-tests")) {
            for (group, case) in quoted(line).filter_map(|code| code.split_once('/')) {
                let Some(text) = groups.get(group).filter(|_| !case.is_empty()) else { continue };
                named += 1;
                if !text.contains(&format!("\"{case}\"")) {
                    wrong.push(format!("{}:{n}: {group}/{case}", page.display()));
                }
            }
        }
    }
    assert!(named > 10, "cases are named");
    assert!(wrong.is_empty(), "cases that the C tests don't have: {wrong:#?}");
}

/// Rows of the table "| step | function | file |", and "`function` ... in `file`" of the text.
#[test]
fn the_architecture_names_functions_where_they_are() {
    let text = read("docs/architecture.md");
    let mut named = Vec::new();
    for (_, line) in prose(&text).filter(|(_, line)| line.starts_with("| ")) {
        let cells: Vec<_> = line.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        if let [_, step, function, file, ..] = cells[..] {
            if step.parse::<u32>().is_ok() && !file.is_empty() {
                named.push((function.to_owned(), file.to_owned()));
            }
        }
    }
    assert!(named.len() > 10, "the table of steps is there");
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for (before, rest) in
        words.match_indices("` in `src/").map(|(at, found)| (&words[..at], &words[at + found.len() - 4..]))
    {
        let function = before.rsplit('`').next().unwrap();
        let file = rest.split('`').next().unwrap();
        let is_function = function.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        if is_function && file.ends_with(".rs") {
            named.push((function.to_owned(), file.to_owned()));
        }
    }
    let is_missing = |(function, file): &&(String, String)| {
        let text = std::fs::read_to_string(root().join(file)).unwrap_or_default();
        !text.contains(&format!("fn {function}(")) && !text.contains(&format!("fn {function}<"))
    };
    let missing: Vec<_> = named.iter().filter(is_missing).collect();
    assert!(missing.is_empty(), "functions that docs/architecture.md names elsewhere than they are: {missing:#?}");
}
