//! Rules of the house that the compiler does not check: which room may import which (ARCHITECTURE.md).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Every room and the rooms that it may import.
const ROOMS: &[(&str, &[&str])] = &[
    ("tensor", &[]),
    ("steering", &["tensor"]),
    ("mapping", &["tensor"]),
    ("guard", &["tensor", "steering", "mapping"]),
    ("program", &["tensor", "mapping", "guard"]),
    ("hook", &["tensor", "guard", "program"]),
    ("engine", &["tensor", "guard", "program", "hook"]),
    ("learn", &["tensor", "steering", "mapping", "guard", "program", "engine"]),
    ("eval", &["tensor", "guard", "hook", "engine", "learn", "steering"]),
    ("store", &["guard"]),
    ("audit", &[]),
    ("server", &["guard", "program", "hook", "engine", "store", "audit"]),
    ("attach", &["program"]),
    ("models", &[]),
    ("synthetic", &[]),
    // A crate of its own, the binary: it sees the library's public face.
    (
        "cli",
        &[
            "tensor",
            "steering",
            "mapping",
            "guard",
            "program",
            "hook",
            "engine",
            "learn",
            "eval",
            "attach",
            "audit",
            "models",
            "server",
            "synthetic",
        ],
    ),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// Names of rooms after `crate::` or `pilotfish::` in code, one by one or in braces. Comments may name any room.
fn imported_rooms(source: &str) -> Vec<String> {
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let source = code.as_str();
    let mut rooms = Vec::new();
    for root in ["crate::", "pilotfish::"] {
        for (at, _) in source.match_indices(root) {
            let rest = &source[at + root.len()..];
            let names = match rest.strip_prefix('{') {
                Some(braced) => braced.split('}').next().unwrap_or_default(),
                None => rest,
            };
            let first = |name: &str| -> String {
                name.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
            };
            if rest.starts_with('{') { rooms.extend(names.split(',').map(first)) } else { rooms.push(first(names)) }
        }
    }
    rooms
}

#[test]
fn imports_point_one_way() {
    let rooms: BTreeMap<_, _> = ROOMS.iter().copied().collect();
    let mut checked = 0;
    for (room, may_import) in ROOMS {
        for file in rust_files(&root().join("src").join(room)) {
            let source = std::fs::read_to_string(&file).unwrap();
            for imported in imported_rooms(&source) {
                if imported == *room || !rooms.contains_key(imported.as_str()) {
                    continue;
                }
                assert!(
                    may_import.contains(&imported.as_str()),
                    "{} imports `{imported}`, which the room `{room}` may not (it may import {may_import:?})",
                    file.display()
                );
                checked += 1;
            }
        }
    }
    assert!(checked > 20, "only {checked} imports were found: has the way they are written changed?");
}

#[test]
fn every_folder_of_src_is_a_room() {
    for entry in std::fs::read_dir(root().join("src")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            let name = entry.file_name().into_string().unwrap();
            assert!(ROOMS.iter().any(|(room, _)| *room == name), "`src/{name}` is not in the list of rooms");
        }
    }
}

#[test]
fn rooms_say_what_they_are() {
    for (room, _) in ROOMS {
        let path = root().join("src").join(room).join("mod.rs");
        let source = std::fs::read_to_string(&path).unwrap();
        assert!(source.starts_with("//!"), "{} does not open with `//!`", path.display());
    }
}

#[test]
fn unsafe_code_stays_in_the_hook() {
    for file in rust_files(&root().join("src")) {
        let source = std::fs::read_to_string(&file).unwrap();
        let in_hook = file.starts_with(root().join("src/hook"));
        let uses = source.lines().any(|line| {
            let code = line.split("//").next().unwrap_or_default();
            code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")
        });
        assert!(in_hook || !uses, "{} holds unsafe code", file.display());
    }
}

#[test]
fn llama_cpp_is_pinned_exactly() {
    let manifest: toml::Table = std::fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    for name in ["llama-cpp-2", "llama-cpp-sys-2"] {
        let version = manifest["dependencies"][name]["version"].as_str().unwrap();
        assert!(version.starts_with('='), "`{name}` is pinned as `{version}`: src/hook/ relies on its layout");
    }
}
