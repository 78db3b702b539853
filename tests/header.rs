//! `include/kvmfault.h` is made from src/capi: a group of functions from each file, with its
//! constants and structures, in the order of the file, under the file's comments. cbindgen
//! translates the declarations, and this puts together the rest.
//! `KVMFAULT_WRITE_HEADER=1` (make header) writes the file; otherwise it is compared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The groups in the order of the header: a file of src/capi each. C needs a type before its use.
const GROUPS: [&str; 12] = [
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
];

/// No line of the header is longer.
const WIDTH: usize = 100;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).into()
}

fn source(name: &str) -> String {
    let path = root().join("src/capi").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A file of src/capi: what its group is called, what is said about it, and its items in order.
struct Group {
    title: String,
    /// The group in a few words, for the index.
    about: String,
    /// What the banner says of it: an empty line, and paragraphs.
    text: Vec<String>,
    items: Vec<String>,
}

impl Group {
    /// The file's `//!` comment is "Title: in a few words.", an empty line, and the text. The
    /// comments of items and of structures' fields go into `comments`: from cbindgen they would
    /// come without their indentation.
    fn read(file: &str, comments: &mut Comments) -> Group {
        let source = source(&format!("{file}.rs"));
        let top: Vec<_> = source.lines().map_while(|line| text_of_comment(line, "//!")).collect();
        let [first, text @ ..] = top.as_slice() else { panic!("src/capi/{file}.rs: no comment at the top") };
        let title = first.split_once(": ").unwrap_or_else(|| panic!("{first}: not \"Title: in a few words.\""));
        let (mut items, mut comment) = (Vec::new(), Vec::new());
        for line in source.lines() {
            if let Some(text) = text_of_comment(line.trim_start(), "///") {
                comment.push(text);
            } else if let Some(name) = name_of_rust_item(line) {
                comments.insert(name.clone(), for_c(&comment));
                items.push(name);
            } else if let (Some(item), Some(field)) = (items.last(), line.strip_prefix("    pub ")) {
                let field = field.split(':').next().unwrap_or(field);
                comments.insert(format!("{item}.{field}"), for_c(&comment));
            }
            let goes_on = ["///", "#["].iter().any(|start| line.trim_start().starts_with(start));
            if !goes_on {
                comment.clear();
            }
        }
        let about = title.1.trim_end_matches('.').into();
        Group { title: title.0.into(), about, text: text.to_vec(), items }
    }
}

/// The lines of comments by "item", "function()" and "structure.field".
type Comments = BTreeMap<String, Vec<String>>;

fn text_of_comment(line: &str, marker: &str) -> Option<String> {
    let text = line.strip_prefix(marker)?;
    Some(text.strip_prefix(' ').unwrap_or(text).to_owned())
}

/// What is for C in a comment: `# Safety` is for Rust, and C has it in the words before.
fn for_c(comment: &[String]) -> Vec<String> {
    let mut lines: Vec<_> = comment.iter().take_while(|line| *line != "# Safety").cloned().collect();
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines
}

/// The C name that a line of Rust defines. A function's ends in "()": one has the name of a
/// structure.
fn name_of_rust_item(line: &str) -> Option<String> {
    let kinds = ["pub const ", "pub struct ", "pub type ", "pub extern \"C\" fn ", "pub unsafe extern \"C\" fn "];
    let rest = kinds.iter().find_map(|kind| line.strip_prefix(kind))?;
    let name: String = rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
    let is_c = name.starts_with("kvmfault_") || name.starts_with("KVMFAULT_");
    is_c.then(|| if line.contains(" fn ") { name + "()" } else { name })
}

/// A declaration as cbindgen writes it.
struct Declaration(Vec<String>);

impl Declaration {
    fn first(&self) -> &str {
        &self.0[0]
    }

    /// As [`name_of_rust_item`] has it.
    fn name(&self) -> String {
        let first = self.first();
        if self.is_function() {
            let before = first.split('(').next().unwrap_or(first);
            return before.rsplit([' ', '*']).next().unwrap_or(before).to_owned() + "()";
        }
        let mut words = first.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let name = words.find(|word| word.starts_with("kvmfault_") || word.starts_with("KVMFAULT_"));
        name.unwrap_or_else(|| panic!("no name in {first}")).to_owned()
    }

    fn is_function(&self) -> bool {
        !self.is_callback() && !self.first().starts_with("#define ") && self.first().contains('(')
    }

    fn is_callback(&self) -> bool {
        self.first().starts_with("typedef ")
    }

    fn is_opaque(&self) -> bool {
        self.first().starts_with("struct ") && self.first().ends_with(';') && !self.is_function()
    }

    /// The field that a line of a structure declares.
    fn field(line: &str) -> Option<&str> {
        let field = line.strip_prefix("  ")?.strip_suffix(';')?;
        field.split('[').next()?.rsplit([' ', '*']).next()
    }

    /// In lines that fit, and with the comments of a structure's fields.
    fn write(&self, comments: &Comments) -> String {
        let (name, mut out) = (self.name(), String::new());
        let is_structure = self.0.last().is_some_and(|line| line == "};");
        for line in &self.0 {
            if let Some(field) = Self::field(line).filter(|_| is_structure) {
                out += &comment(&comments[&format!("{name}.{field}")], "  ");
            }
            out += &match line.strip_prefix("#define ").and_then(|define| define.split_once(' ')) {
                Some((name, value)) if line.len() > WIDTH => format!("#define {name} \\\n  {value}\n"),
                _ => format!("{line}\n"),
            };
        }
        out
    }
}

/// What cbindgen makes of the groups. It leaves an empty line between items.
fn declarations() -> BTreeMap<String, Declaration> {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).expect("cbindgen.toml");
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in GROUPS {
        builder = builder.with_src(root().join(format!("src/capi/{file}.rs")));
    }
    let mut text = Vec::new();
    builder.generate().expect("cbindgen").write(&mut text);
    let text = String::from_utf8(text).expect("UTF-8");
    let mut declarations = BTreeMap::new();
    for item in text.split("\n\n").map(|item| item.trim_matches('\n')).filter(|item| !item.is_empty()) {
        let declaration = Declaration(item.lines().map(str::to_owned).collect());
        let old = declarations.insert(declaration.name(), declaration);
        assert!(old.is_none(), "two items of one name: {item}");
    }
    declarations
}

/// A C comment: on one line if it fits.
fn comment(lines: &[String], margin: &str) -> String {
    if let [line] = lines {
        let short = format!("{margin}/* {line} */\n");
        if short.len() <= WIDTH {
            return short;
        }
    }
    let body: String = lines.iter().map(|line| format!("{margin} * {line}").trim_end().to_owned() + "\n").collect();
    format!("{margin}/*\n{body}{margin} */\n")
}

/// The macro that gives a structure its size and its defaults. src/capi/structs.rs knows them.
fn initialiser(name: &str) -> String {
    let structs = source("structs.rs");
    let start = format!("versioned!({name} {{");
    let (_, rest) = structs.split_once(&start).unwrap_or_else(|| panic!("{name}: not in src/capi/structs.rs"));
    let (_, rest) = rest.split_once('}').expect("a list of fields");
    let (defaults, _) = rest.split_once(");").expect("the end of versioned!");
    let defaults: Vec<_> = defaults.split(',').filter_map(|d| d.trim().split_once(": ")).collect();
    let c: String = defaults.iter().map(|(field, value)| format!(", .{field} = {value}")).collect();
    let cxx: String = defaults.iter().map(|(field, value)| format!("\ts.{field} = {value};\n")).collect();
    let macro_name = macro_of(name);
    let mut define = format!("#define {macro_name} {{ .size = sizeof(struct {name}){c} }}\n");
    if define.len() > WIDTH {
        define = format!("#define {macro_name} \\\n\t{{ .size = sizeof(struct {name}){c} }}\n");
    }
    format!(
        "#ifdef __cplusplus\n\
         static inline struct {name} {name}_initial_(void)\n\
         {{\n\tstruct {name} s = {{}};\n\ts.size = sizeof(s);\n{cxx}\treturn s;\n}}\n\
         #define {macro_name} {name}_initial_()\n\
         #else\n{define}#endif\n"
    )
}

fn macro_of(name: &str) -> String {
    format!("{}_INIT", name.to_uppercase())
}

/// A group's banner and items.
fn group(group: &Group, declarations: &mut BTreeMap<String, Declaration>, comments: &Comments) -> String {
    let rule = "=".repeat(WIDTH - 3);
    let mut out = format!("\n/* {rule}\n * {}: {}\n", group.title, group.about);
    for line in &group.text {
        out += &(format!(" * {line}").trim_end().to_owned() + "\n");
    }
    out += &format!(" * {} */\n", &rule[3..]);
    for name in &group.items {
        let declaration = declarations.remove(name).unwrap_or_else(|| panic!("{name}: not in cbindgen's output"));
        let text = &comments[name];
        out += &format!("\n{}{}", comment(text, ""), declaration.write(comments));
        if text.iter().any(|line| line.contains(&macro_of(name))) {
            out += &format!("\n{}", initialiser(name));
        }
    }
    out
}

/// The list of groups, with their functions and callbacks, for the overview.
fn index(groups: &[Group], declarations: &BTreeMap<String, Declaration>) -> String {
    let mut out = String::new();
    for group in groups {
        out += &format!(" *   {}: {}\n", group.title, group.about);
        let mut line = String::from(" *      ");
        for name in &group.items {
            let is_called = declarations.get(name).is_some_and(|d| d.is_function() || d.is_callback());
            let word = name.trim_end_matches("()");
            if is_called && line.len() + 1 + word.len() > WIDTH {
                out += &format!("{line}\n");
                line = String::from(" *      ");
            }
            if is_called {
                line += &format!(" {word}");
            }
        }
        out += &format!("{line}\n");
    }
    out
}

fn generate() -> String {
    let (mut comments, mut declarations) = (Comments::new(), declarations());
    let groups: Vec<_> = GROUPS.iter().map(|file| Group::read(file, &mut comments)).collect();
    let handles = declarations.values().filter(|declaration| declaration.is_opaque());
    let handles: String = handles.map(|declaration| format!("{}\n", declaration.first())).collect();

    let mut out = source("overview.h").replace(" * @INDEX@\n", &index(&groups, &declarations));
    out += "\n#ifndef KVMFAULT_H\n#define KVMFAULT_H\n\n#include <stddef.h>\n#include <stdint.h>\n\n";
    out += "#ifdef __cplusplus\nextern \"C\" {\n#endif\n\n";
    out += &format!("/* Handles. Each is described in its group. */\n{handles}");
    for each in &groups {
        out += &group(each, &mut declarations, &comments);
    }
    assert!(declarations.is_empty(), "in no group: {:?}", declarations.keys().collect::<Vec<_>>());
    out += "\n#ifdef __cplusplus\n} /* extern \"C\" */\n#endif\n\n#endif /* KVMFAULT_H */\n";
    out
}

#[test]
fn the_header_is_up_to_date() {
    let path = root().join("include/kvmfault.h");
    let fresh = generate();
    if std::env::var_os("KVMFAULT_WRITE_HEADER").is_some() {
        std::fs::write(&path, &fresh).expect("writing the header");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == fresh, "include/kvmfault.h is out of date: run `make header` and commit it");
}

#[test]
fn no_line_is_too_long() {
    let header = generate();
    let columns = |line: &str| line.chars().map(|c| if c == '\t' { 8 } else { 1 }).sum::<usize>();
    let long: Vec<_> = header.lines().filter(|line| columns(line) > WIDTH).collect();
    assert!(long.is_empty(), "longer than {WIDTH} columns: {long:#?}");
}

/// The parts that the comment of a function has, in this order.
const SECTIONS: [&str; 5] = ["Returns:", "Errors:", "Threads:", "Callbacks:", "Lifetime:"];

#[test]
fn every_function_has_its_sections() {
    let mut comments = Comments::new();
    GROUPS.iter().for_each(|file| drop(Group::read(file, &mut comments)));
    for (name, declaration) in declarations().iter().filter(|(_, declaration)| declaration.is_function()) {
        let at = |section: &str| -> Vec<usize> {
            let starts = comments[name].iter().enumerate().filter(|(_, line)| line.starts_with(section));
            starts.map(|(at, _)| at).collect()
        };
        let found: Vec<_> = SECTIONS.iter().flat_map(|section| at(section)).collect();
        assert!(found.windows(2).all(|pair| pair[0] < pair[1]), "{name}: sections are {SECTIONS:?}, in this order");
        assert!(SECTIONS.iter().all(|section| at(section).len() <= 1), "{name}: a section stands twice");
        let has = |section: &str| !at(section).is_empty();
        assert!(has("Threads:") && has("Callbacks:"), "{name}: Threads and Callbacks are missing");
        let returns_something = !declaration.first().starts_with("void kvmfault_");
        assert_eq!(has("Returns:"), returns_something, "{name}: Returns, if something is returned");
        let can_fail = declaration.first().starts_with("int");
        assert_eq!(has("Errors:"), can_fail, "{name}: Errors, of functions that return -errno");
    }
}

/// What the comments say of callbacks is what the functions do.
#[test]
fn what_is_refused_in_callbacks_is_said() {
    let mut comments = Comments::new();
    for file in GROUPS {
        let group = Group::read(file, &mut comments);
        let source = source(&format!("{file}.rs"));
        for name in group.items.iter().filter_map(|name| name.strip_suffix("()")) {
            let (_, body) = source.split_once(&format!(" fn {name}(")).expect("the function");
            let (body, _) = body.split_once("\n}").expect("the function's end");
            let is_refused = body.contains("not_in_callback(");
            let callbacks = comments[&format!("{name}()")].iter().find(|line| line.starts_with("Callbacks:"));
            let said = callbacks.unwrap_or_else(|| panic!("{name}: no Callbacks"));
            let expected = if is_refused { "Callbacks: refused with -EDEADLK." } else { "Callbacks: allowed" };
            assert!(said.starts_with(expected), "{name}: \"{said}\", but it does: {expected}");
        }
    }
}
