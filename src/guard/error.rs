use super::{CarryError, Digest};
use crate::tensor::LayerStack;
use std::fmt;

/// Why a guard, or a file that goes into one, could not be read or written. Each is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuardError {
    /// Any other of these, with the place in a manifest that it is about.
    #[error("{at}: {reason}")]
    Manifest { at: Location, reason: Box<GuardError> },

    #[error("cannot {action} `{path}`: {error}")]
    Io { action: &'static str, path: String, error: std::io::Error },
    #[error("`{path}` is not a regular file inside its guard's folder")]
    OutsideFolder { path: String },
    #[error("`{file}` is larger than {limit} bytes")]
    TooLarge { file: String, limit: u64 },

    #[error("{reason}")]
    Syntax { reason: String },
    #[error("format {found} is not supported, expected {expected}")]
    Format { expected: String, found: String },
    #[error("expected {expected}, found {found}")]
    Value { expected: String, found: String },
    #[error("missing: {why}")]
    Missing { why: String },
    #[error("does not belong here: {why}")]
    Misplaced { why: String },
    #[error("the {what} `{name}` is there twice")]
    Duplicate { what: &'static str, name: String },
    #[error("there is no {what} `{name}`; known: {known}")]
    Unknown { what: &'static str, name: String, known: String },
    #[error("neither a gate nor an intervention: this guard would do nothing")]
    Idle,

    #[error(
        "the sha256 of `{file}` is {found}, expected {expected}: it is not the file that the manifest was written for"
    )]
    Sha256 { file: String, expected: Digest, found: Digest },
    #[error("no `*.map.safetensors` with sha256 {sha256} in {searched}")]
    NoMapping { sha256: Digest, searched: String },
    #[error("mapping `{file}` is {side} {found}, but this guard's {side_of_guard} is {expected}")]
    OtherModel { file: String, side: &'static str, side_of_guard: &'static str, expected: String, found: String },
    #[error("mapping `{file}` has no {kind} pair of layers {source_layer} → {target_layer}; it has {known}")]
    NoLayerPair { file: String, kind: &'static str, source_layer: LayerStack, target_layer: u32, known: String },
    #[error("vector `{vector}` has {found} values, but mapping `{mapping}` takes {expected}")]
    MappingWidth { vector: String, mapping: String, expected: usize, found: usize },
    #[error("vector `{vector}` has {found} values in the target, but vector `{other}` has {expected}")]
    TargetWidth { vector: String, other: String, expected: usize, found: usize },

    #[error("`{file}` is not a safetensors file that can be used: {reason}")]
    Safetensors { file: String, reason: String },
    #[error("`{file}`: metadata key `{key}`: {reason}")]
    Metadata { file: String, key: String, reason: String },
    #[error("`{file}` has no tensor `{tensor}`; it has {known}")]
    NoTensor { file: String, tensor: String, known: String },
    #[error("`{file}`: tensor `{tensor}` is {found}, expected {expected}")]
    TensorShape { file: String, tensor: String, expected: String, found: String },
    #[error("`{file}`: tensor `{tensor}` has a non-finite value ({value}) at index {index}")]
    NonFinite { file: String, tensor: String, index: usize, value: f32 },
    #[error("`{file}`: tensor `{tensor}` is zero everywhere, so it has no direction")]
    ZeroVector { file: String, tensor: String },
    #[error("mapping `{mapping}` can't carry vector `{vector}`: {reason}")]
    Carry { vector: String, mapping: String, reason: CarryError },
    #[error("mapped by `{mapping}`, vector `{vector}` is {problem}")]
    MappedVector { mapping: String, vector: String, problem: &'static str },
    #[error("at strength {strength} the vector has values that do not fit in `f32`")]
    Strength { strength: f64 },
}

impl GuardError {
    pub(super) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        move |error| Self::Io { action, path: shown(&path.to_string_lossy()), error }
    }

    pub(super) fn value(expected: impl Into<String>, found: impl fmt::Display) -> Self {
        Self::Value { expected: expected.into(), found: shown(&found.to_string()) }
    }

    pub(super) fn unknown<'a>(what: &'static str, name: &str, known: impl Iterator<Item = &'a String>) -> Self {
        Self::Unknown { what, name: shown(name), known: listed(known) }
    }
}

/// A place in a manifest. The key is as in `vector[1].tensor`, counted from 0; none where the text is not TOML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    pub file: String,
    /// From 1.
    pub line: usize,
    pub key: Option<String>,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)?;
        self.key.as_ref().map_or(Ok(()), |key| write!(f, ": `{key}`"))
    }
}

/// Foreign text as an error shows it: on one line, no control characters, not too long.
pub(super) fn shown(text: &str) -> String {
    const LONGEST: usize = 300;
    let mut shown = String::new();
    for character in text.chars() {
        if shown.len() >= LONGEST {
            shown.push('…');
            break;
        }
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Names as an error lists them.
pub(super) fn listed<T: AsRef<str>>(names: impl Iterator<Item = T>) -> String {
    const MOST: usize = 12;
    let mut names = names.map(|name| format!("`{}`", shown(name.as_ref())));
    let first: Vec<String> = names.by_ref().take(MOST).collect();
    match (first.is_empty(), names.count()) {
        (true, _) => "none".to_owned(),
        (false, 0) => first.join(", "),
        (false, more) => format!("{} and {more} more", first.join(", ")),
    }
}
