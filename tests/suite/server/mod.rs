//! `pilotfish serve`, over HTTP.

mod abuse;
mod answers;
mod client;
mod connections;
mod reloads;

use crate::support::Fixture;
use client::{Answer, Server, answer, copy, directory, hang_up, replace};
use serde_json::{Value, json};
use std::path::Path;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A guard that adds its vector to every token of an answer, with no gate.
fn steering(strength: &str) -> Fixture {
    Fixture::new(&["--intervene", "add", "--strength", strength, "--positions", "all"])
}

/// A greedy completion of 12 tokens.
fn greedy(prompt: &str) -> Value {
    json!({ "prompt": prompt, "temperature": 0, "max_tokens": 12 })
}
