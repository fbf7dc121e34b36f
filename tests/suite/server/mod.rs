//! `pilotfish serve`, over HTTP.

mod abuse;
mod answers;
mod client;
mod connections;
mod reloads;

use crate::support::Fixture;
use client::{Answer, Server, answer, copy, directory, hang_up, replace};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A guard that adds its vector to every token of an answer, with no gate.
fn steering(strength: &str) -> Fixture {
    Fixture::new(&["--intervene", "add", "--strength", strength, "--positions", "all"])
}

/// A file of keys: of each its name, its role and what else its entry says. The key `sk-NAME` is NAME's.
fn keys(fixture: &Fixture, entries: &[(&str, &str, &str)]) -> PathBuf {
    let path = fixture.folder.path().join("keys.toml");
    let entry = |(name, role, more): &(&str, &str, &str)| {
        let sha256 = pilotfish::guard::Digest::of(format!("sk-{name}").as_bytes());
        format!("[[key]]\nname = \"{name}\"\nsha256 = \"{sha256}\"\nrole = \"{role}\"\n{more}\n")
    };
    std::fs::write(&path, entries.iter().map(entry).collect::<String>()).unwrap();
    path
}

/// A greedy completion of 12 tokens.
fn greedy(prompt: &str) -> Value {
    json!({ "prompt": prompt, "temperature": 0, "max_tokens": 12 })
}
