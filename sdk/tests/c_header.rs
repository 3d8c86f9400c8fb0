//! `spec/include/vfio_mediate.h` is what the sdk's ABI says, and a C compiler lays it out alike.

use std::path::{Path, PathBuf};
use std::process::Command;

use vfio_mediate_sdk::layout::{ABI_FINGERPRINT, structs};

fn header_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../spec/include/vfio_mediate.h")
}

fn generate() -> String {
    let forward: String =
        structs().iter().map(|layout| format!("struct vfio_mediate_{};\n", snake(layout.name))).collect();
    let mut config = cbindgen::Config {
        language: cbindgen::Language::C,
        include_guard: Some("VFIO_MEDIATE_H".into()),
        cpp_compat: true,
        documentation_style: cbindgen::DocumentationStyle::C99,
        style: cbindgen::Style::Tag,
        usize_is_size_t: true,
        line_length: 110,
        tab_width: 4,
        no_includes: true,
        header: Some(HEADER.into()),
        ..Default::default()
    };
    config.export.include = structs().iter().map(|layout| layout.name.to_owned()).collect();
    // Written below: their values are not literals.
    config.export.exclude = ["ENTRY_SYMBOL", "ENTRY_MAGIC"].map(str::to_owned).into();
    config.after_includes = Some(format!(
        "#include <stddef.h>\n#include <stdint.h>\n\n\
         // \"VFIOMED1\" read as a little-endian number: vfio_mediate_entry.magic\n\
         #define VFIO_MEDIATE_ENTRY_MAGIC UINT64_C({:#018x})\n\n\
         // A hash over names, sizes and offsets of every structure below: vfio_mediate_entry.fingerprint\n\
         #define VFIO_MEDIATE_ABI_FINGERPRINT UINT64_C({ABI_FINGERPRINT:#018x})\n\n\
         {forward}",
        vfio_mediate_sdk::abi::ENTRY_MAGIC,
    ));
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in ["mod", "entry", "device", "hooks", "migration", "services"] {
        builder = builder.with_src(Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/abi/{file}.rs")));
    }
    let mut bytes = Vec::new();
    builder.generate().unwrap().write(&mut bytes);
    rename(&String::from_utf8(bytes).unwrap())
}

/// C's names: `struct vfio_mediate_region_claim`, `VFIO_MEDIATE_MAP_NORMAL`. Word by word, since docs name them too.
fn rename(header: &str) -> String {
    let constants = constants();
    let mut out = String::new();
    let mut rest = header;
    while !rest.is_empty() {
        let length = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
        let (word, tail) = rest.split_at(length);
        out.push_str(&rename_word(word, &out, &constants));
        let mut chars = tail.chars();
        out.extend(chars.next());
        rest = chars.as_str();
    }
    plain_docs(&out)
}

fn rename_word(word: &str, before: &str, constants: &[String]) -> String {
    if word == "Opaque" {
        return "vfio_mediate_opaque".into();
    }
    let named = before.ends_with("struct ") || before.ends_with('[') || before.ends_with('`');
    if named && structs().iter().any(|layout| layout.name == word) {
        return format!("vfio_mediate_{}", snake(word));
    }
    if constants.iter().any(|name| name == word) {
        return format!("VFIO_MEDIATE_{word}");
    }
    word.to_owned()
}

/// Rustdoc's links mean nothing in C: [`X::y`](path) becomes X.y.
fn plain_docs(header: &str) -> String {
    let mut lines = Vec::new();
    for line in header.lines() {
        let comment = line.trim_start().starts_with("//");
        let mut line = line.trim_end().to_owned();
        if comment {
            while let Some(start) = line.find("](") {
                let end = line[start..].find(')').map(|end| start + end).unwrap_or_else(|| panic!("a link in {line}"));
                line.replace_range(start + 1..=end, "");
            }
            line = line.replace("u64::MAX", "UINT64_MAX").replace("[`", "`").replace("`]", "`").replace("::", ".");
        }
        lines.push(line);
    }
    lines.join("\n") + "\n"
}

fn snake(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.extend(c.to_lowercase());
    }
    out
}

/// Names of the ABI's constants, from the source: cbindgen writes them as they are.
fn constants() -> Vec<String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/abi");
    let mut names = Vec::new();
    for file in std::fs::read_dir(directory).unwrap() {
        let source = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let lines = source.lines().filter_map(|line| line.strip_prefix("pub const "));
        names.extend(lines.filter_map(|rest| Some(rest.split_once(':')?.0.to_owned())));
    }
    names
}

const HEADER: &str = "\
// The ABI between vfio-mediate and a plug-in, version 1. Generated from sdk/src/abi; do not edit.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//
// A plug-in exports one symbol, `const struct vfio_mediate_entry vfio_mediate_plugin`; examples/c-plugin is a whole one.
// The rules that hold for every function (status, ownership, threads, re-entrancy, sizes) are in spec/plugin-abi.md.
";

/// spec: ABI-HEADER
#[test]
fn the_header_in_the_tree_is_the_generated_one() {
    let generated = generate();
    if std::env::var_os("UPDATE_HEADER").is_some() {
        std::fs::write(header_path(), &generated).unwrap();
    }
    let checked_in = std::fs::read_to_string(header_path()).unwrap();
    assert!(generated == checked_in, "{} is stale; run with UPDATE_HEADER=1 to rewrite it", header_path().display());
}

/// spec: ABI-HEADER
#[test]
fn a_c_compiler_lays_every_structure_out_as_rust_does() {
    let mut source = String::from("#include \"vfio_mediate.h\"\n");
    for layout in structs() {
        let name = format!("struct vfio_mediate_{}", snake(layout.name));
        source += &format!("_Static_assert(sizeof({name}) == {}, \"{name}\");\n", layout.size);
        source += &format!("_Static_assert(_Alignof({name}) == {}, \"{name}\");\n", layout.align);
        for field in layout.fields {
            source +=
                &format!("_Static_assert(offsetof({name}, {0}) == {1}, \"{name}.{0}\");\n", field.name, field.offset);
        }
    }
    let directory = tempdir("layout");
    let file = directory.join("layout.c");
    std::fs::write(&file, source).unwrap();
    let output = Command::new("gcc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-I"])
        .arg(header_path().parent().unwrap())
        .arg(&file)
        .output()
        .expect("a C compiler, gcc");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn tempdir(name: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&directory).unwrap();
    directory
}
