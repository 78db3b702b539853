//! `include/kvmfault.h` is what cbindgen makes of src/capi. `KVMFAULT_WRITE_HEADER=1` (make header)
//! writes it; otherwise it is compared.

use std::path::Path;

/// The C names of private things that cbindgen would export.
fn generate() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in [
        "version",
        "errors",
        "probe",
        "resolver",
        "vm",
        "memslots",
        "pages",
        "vcpu",
        "fill",
        "source",
        "working_set",
        "stats",
    ] {
        builder = builder.with_src(root.join(format!("src/capi/{file}.rs")));
    }
    let mut text = Vec::new();
    builder.generate().expect("cbindgen").write(&mut text);
    tidy(&String::from_utf8(text).expect("UTF-8"))
}

const WIDTH: usize = 100;

/// Comments wrapped for people who read the header; what `# Safety` says is for Rust, and C has it
/// in the words before.
fn tidy(text: &str) -> String {
    let (mut out, mut paragraph) = (String::new(), String::new());
    let (mut in_comment, mut in_safety, mut margin) = (false, false, "");
    for line in text.lines() {
        let trimmed = line.trim_start();
        if trimmed == "/*" {
            (in_comment, in_safety) = (true, false);
            margin = &line[..line.len() - trimmed.len()];
            out += &format!("{line}\n");
            continue;
        }
        if !in_comment {
            out += &format!("{line}\n");
            continue;
        }
        let words = trimmed.strip_prefix('*').unwrap_or(trimmed);
        in_safety |= words.trim() == "# Safety";
        let ends = trimmed == "*/";
        let code = words.starts_with("     ");
        if ends || in_safety || words.trim().is_empty() || code {
            flush(&mut out, &mut paragraph, margin);
        }
        if ends {
            while out.ends_with(&format!("{margin} *\n")) {
                out.truncate(out.len() - margin.len() - 3);
            }
            out += &format!("{margin} */\n");
            in_comment = false;
        } else if !in_safety && (words.trim().is_empty() || code) {
            out += &format!("{margin} *{}\n", words.trim_end());
        } else if !in_safety {
            paragraph += words.trim();
            paragraph.push(' ');
        }
    }
    out
}

/// Writes a paragraph in lines that fit.
fn flush(out: &mut String, paragraph: &mut String, margin: &str) {
    let mut line = format!("{margin} *");
    for word in paragraph.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            *out += &format!("{line}\n");
            line = format!("{margin} *");
        }
        line += &format!(" {word}");
    }
    if !paragraph.is_empty() {
        *out += &format!("{line}\n");
    }
    paragraph.clear();
}

#[test]
fn the_header_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/kvmfault.h");
    let fresh = generate();
    if std::env::var_os("KVMFAULT_WRITE_HEADER").is_some() {
        std::fs::write(&path, &fresh).expect("writing the header");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == fresh, "include/kvmfault.h is out of date: run `make header` and commit it");
}
