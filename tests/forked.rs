//! Every function that takes a handle is tried in a forked child.

fn text(path: &str) -> String {
    std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// Functions that take no handle.
const FREE: [&str; 7] = [
    "kvmfault_last_error",
    "kvmfault_version",
    "kvmfault_version_number",
    "kvmfault_probe",
    "kvmfault_explain",
    "kvmfault_vm_new",
    // As kvmfault_file_source_free, which is tried, with an argument of another type.
    "kvmfault_file_source_finalize",
];

#[test]
fn every_function_is_tried() {
    let (map, test) = (text("src/capi/kvmfault.map"), text("c-tests/lifetime/forked.c"));
    let functions = map.lines().filter_map(|line| line.trim().strip_suffix(';').filter(|f| f.starts_with("kvmfault_")));
    let missing: Vec<_> = functions.filter(|f| !FREE.contains(f) && !test.contains(&format!("{f}("))).collect();
    assert!(missing.is_empty(), "not in c-tests/lifetime/forked.c: {missing:?}");
}
