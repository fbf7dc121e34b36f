//! The manifest as it is written: TOML and nothing else checked. [`Guard`](super::Guard) is what it becomes.

use super::error::{GuardError, Location, shown};
use super::{AdapterIdentity, Digest, Fingerprint, GateCalibration, MAX_MANIFEST_BYTES, ModelIdentity, location};
use crate::steering::{PromptTokens, VectorKind};
use crate::tensor::{LayerIndex, LayerStack};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The only `format` this version reads and writes.
pub const FORMAT: u32 = 1;

/// `guard.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    pub name: String,
    pub description: String,
    #[serde(default)]
    pub on_error: OnError,
    /// What the caller of a blocked sequence is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    pub target: TargetEntry,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    pub tensors: TensorsEntry,
    #[serde(default, rename = "vector", skip_serializing_if = "Vec::is_empty")]
    pub vectors: Vec<VectorEntry>,
    #[serde(default, rename = "mapping", skip_serializing_if = "Vec::is_empty")]
    pub mappings: Vec<MappingEntry>,
    #[serde(default, rename = "gate", skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<GateEntry>,
    #[serde(default, rename = "intervention", skip_serializing_if = "Vec::is_empty")]
    pub interventions: Vec<InterventionEntry>,
    #[serde(default, rename = "result", skip_serializing_if = "Vec::is_empty")]
    pub results: Vec<MeasuredResult>,
}

impl Manifest {
    /// A guard for `target` that does nothing yet.
    pub fn new(name: impl Into<String>, target: &ModelIdentity) -> Self {
        Self {
            format: FORMAT,
            name: name.into(),
            description: String::new(),
            on_error: OnError::default(),
            message: None,
            target: TargetEntry {
                architecture: target.architecture.clone(),
                fingerprint: target.fingerprint,
                adapters: target.adapters.clone(),
                probe: None,
            },
            source: None,
            tensors: TensorsEntry::default(),
            vectors: Vec::new(),
            mappings: Vec::new(),
            gates: Vec::new(),
            interventions: Vec::new(),
            results: Vec::new(),
        }
    }
}

/// What a run-time fault means for the sequence that it meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// No more tokens.
    #[default]
    Block,
    /// Go on unguarded.
    Pass,
}

/// `[target]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetEntry {
    pub architecture: String,
    pub fingerprint: Fingerprint,
    /// What the model carried when the guard was made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AdapterIdentity>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<Probe>,
}

/// A known answer: statistics of the residual of a fixed prompt over every token but the first. It tells the right weights from a
/// look-alike's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// Plain text, no template.
    pub prompt: String,
    /// The vector whose unit direction the projection is on.
    pub vector: String,
    pub layer: LayerIndex,
    pub mean_norm: f64,
    /// Mean of the projection.
    pub projection: f64,
    /// Standard deviation of the projection.
    pub spread: f64,
    /// As a fraction: of `mean_norm`, and of the larger of `projection` and `spread`.
    pub tolerance: f64,
}

/// `[source]`: the model that vectors with a mapping were learnt on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    pub model: String,
    pub fingerprint: Fingerprint,
}

/// `[tensors]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorsEntry {
    /// A bare name in the guard's folder.
    pub file: String,
    pub sha256: Digest,
}

impl Default for TensorsEntry {
    /// The usual name; [`write_guard`](super::write_guard) fills in the sha256.
    fn default() -> Self {
        Self { file: "tensors.safetensors".to_owned(), sha256: Digest::default() }
    }
}

/// `[[vector]]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorEntry {
    pub name: String,
    /// Where the vector was found: a layer of the source with a mapping, of the target without. Several layers of the source, as a list,
    /// with a mapping that reads them beside each other: the vector is then as wide as all of them.
    pub layer: LayerStack,
    /// F32 and one-dimensional, in the tensor file.
    pub tensor: String,
    /// What its numbers mean, and so how a mapping carries them.
    #[serde(default, skip_serializing_if = "is_direction")]
    pub kind: VectorKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mapping: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_norm: Option<f64>,
}

fn is_direction(kind: &VectorKind) -> bool {
    *kind == VectorKind::Direction
}

/// `[[mapping]]`: one pair of layers of a mapping file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MappingEntry {
    pub name: String,
    pub sha256: Digest,
    pub kind: MappingKind,
    /// A list where the mapping reads several.
    pub source_layer: LayerStack,
    pub target_layer: LayerIndex,
}

/// Kinds of mapping the format knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MappingKind {
    Affine,
    Autoencoder,
}

impl MappingKind {
    /// As manifests call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Affine => "affine",
            Self::Autoencoder => "autoencoder",
        }
    }
}

/// `[[gate]]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateEntry {
    pub name: String,
    pub vector: String,
    #[serde(default)]
    pub scope: Scope,
    /// Scope `prompt` only: `last` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aggregate: Option<Aggregate>,
    /// Scope `token` only: the tokens that it reads, all where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positions: Option<Positions>,
    #[serde(default)]
    pub readout: Readout,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// Scope `token` only: once fired, it stays so until a score is below this; `threshold` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deviation: Option<f64>,
    #[serde(default)]
    pub on_fire: OnFire,
    /// Figures of single quantizations of the target, each once.
    #[serde(default, rename = "calibration", skip_serializing_if = "Vec::is_empty")]
    pub calibrations: Vec<GateCalibration>,
}

/// What a gate reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// The prompt; decided at its end and latched for the sequence.
    #[default]
    Prompt,
    /// Each token by itself.
    Token,
}

/// How the projections of a prompt's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Aggregate {
    #[default]
    Last,
    Mean,
    Max,
}

/// How a gate reads a residual along its vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Readout {
    /// The projection on the vector's unit direction.
    #[default]
    Projection,
    /// The same with each dimension of both in units of its standard deviation, which the vector's mapping knows.
    Standardized,
}

impl Readout {
    /// As manifests call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Projection => "projection",
            Self::Standardized => "standardized",
        }
    }
}

/// What a gate that fires does by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFire {
    /// Lets the interventions that name it act.
    #[default]
    Steer,
    /// Blocks the sequence: its caller gets the guard's message.
    Block,
}

/// `[[intervention]]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterventionEntry {
    pub kind: InterventionName,
    /// The vector's or the mapping's name where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// All but `switch`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vector: Option<String>,
    /// `switch` only: a mapping from the target's residual at a layer to one of the same layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mapping: Option<String>,
    #[serde(default = "one")]
    pub strength: f64,
    /// `add` only.
    #[serde(default, skip_serializing_if = "is_vector")]
    pub unit: StrengthUnit,
    /// With the unit `deviation` only: that of benign projections on the vector's unit direction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deviation: Option<f64>,
    #[serde(default)]
    pub positions: Positions,
    /// A rule over gates, as `harmful and not research`; always where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    #[serde(default)]
    pub first_position: bool,
    /// `ablate` only: the projection that is left, 0 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean: Option<f64>,
    /// `ablate` and `add` only: the tokens of benign prompts whose projections are measured, all but the first where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub benign_tokens: Option<PromptTokens>,
    /// `clamp` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low: Option<f64>,
    /// `clamp` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high: Option<f64>,
    /// `rotate` only: degrees towards the vector, away from it below 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub angle: Option<f64>,
}

impl InterventionEntry {
    /// At strength 1, always, everywhere but at the first position. `operand` is a vector's name, for `switch` a mapping's.
    pub fn new(kind: InterventionName, operand: impl Into<String>) -> Self {
        let operand = Some(operand.into());
        let (vector, mapping) = if kind == InterventionName::Switch { (None, operand) } else { (operand, None) };
        Self {
            kind,
            name: None,
            vector,
            mapping,
            strength: one(),
            unit: StrengthUnit::Vector,
            deviation: None,
            positions: Positions::default(),
            when: None,
            first_position: false,
            mean: None,
            benign_tokens: None,
            low: None,
            high: None,
            angle: None,
        }
    }
}

/// What a strength of 1 adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StrengthUnit {
    /// The vector as it was extracted and mapped.
    #[default]
    Vector,
    /// One standard deviation of benign projections along it.
    Deviation,
}

fn is_vector(unit: &StrengthUnit) -> bool {
    *unit == StrengthUnit::Vector
}

fn one() -> f64 {
    1.0
}

/// Kinds of intervention the format knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InterventionName {
    Add,
    Ablate,
    Clamp,
    Rotate,
    Switch,
}

impl InterventionName {
    /// As manifests call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Ablate => "ablate",
            Self::Clamp => "clamp",
            Self::Rotate => "rotate",
            Self::Switch => "switch",
        }
    }
}

/// Which tokens an intervention acts on.
///
/// Written `all`, `prompt`, `generated` or `matching=TEXT` on the command line; in a manifest the last is `{ matching = "TEXT" }`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    #[default]
    All,
    Prompt,
    Generated,
    /// The tokens of a prompt that spell this text, wherever it stands there (arXiv 2503.04429, appendix A). Interventions only.
    Matching(String),
}

/// Bytes that the text of [`Positions::Matching`] may have.
pub const MAX_MATCHING_BYTES: usize = 256;

const MATCHING: &str = "matching=";

impl Positions {
    /// Whether its text, if it has one, is one that can be looked for.
    ///
    /// # Errors
    /// It is empty, or longer than [`MAX_MATCHING_BYTES`].
    pub(super) fn check(&self) -> Result<(), GuardError> {
        let Self::Matching(text) = self else { return Ok(()) };
        match text.len() {
            0 => Err(GuardError::value("a text", "an empty one")),
            1..=MAX_MATCHING_BYTES => Ok(()),
            found => Err(GuardError::value(format!("a text of at most {MAX_MATCHING_BYTES} bytes"), found)),
        }
    }
}

impl fmt::Display for Positions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Prompt => f.write_str("prompt"),
            Self::Generated => f.write_str("generated"),
            Self::Matching(text) => write!(f, "{MATCHING}{text}"),
        }
    }
}

impl FromStr for Positions {
    type Err = GuardError;

    fn from_str(text: &str) -> Result<Self, GuardError> {
        let positions = match text {
            "all" => Self::All,
            "prompt" => Self::Prompt,
            "generated" => Self::Generated,
            _ => match text.strip_prefix(MATCHING) {
                Some(matching) => Self::Matching(matching.to_owned()),
                None => {
                    let expected = "`all`, `prompt`, `generated` or `matching=TEXT`";
                    return Err(GuardError::value(expected, format!("`{text}`")));
                }
            },
        };
        positions.check().map(|()| positions)
    }
}

/// `[[result]]`: a figure that was measured with this guard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredResult {
    /// What was measured.
    pub name: String,
    pub value: f64,
    /// The data that it was measured on.
    pub on: String,
    /// What measures it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
}

/// What every format has, so that an unknown one is named as such and not by the first key that is new in it.
#[derive(Deserialize)]
struct AnyFormat {
    format: i64,
}

impl Manifest {
    /// Reads TOML. `file` is what errors call it.
    ///
    /// # Errors
    /// Not UTF-8, not TOML, another format, or a key or a value that a manifest does not have.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Self, GuardError> {
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(GuardError::TooLarge { file: shown(file), limit: MAX_MANIFEST_BYTES });
        }
        let text = text_of(file, bytes)?;
        let problem = |error: toml::de::Error| location::of_toml_error(file, text, &error);
        let AnyFormat { format } = toml::from_str(text).map_err(problem)?;
        if format != i64::from(FORMAT) {
            let reason = GuardError::Format { expected: FORMAT.to_string(), found: format.to_string() };
            return Err(location::at_key(file, text, "format", Box::new(reason)));
        }
        toml::from_str(text).map_err(problem)
    }

    /// As [`parse`](Self::parse) reads it.
    ///
    /// # Errors
    /// A value that TOML can't hold.
    pub fn to_toml(&self) -> Result<String, GuardError> {
        toml::to_string(self).map_err(|error| GuardError::Syntax { reason: shown(&error.to_string()) })
    }
}

/// `bytes` as text.
pub(super) fn text_of<'a>(file: &str, bytes: &'a [u8]) -> Result<&'a str, GuardError> {
    std::str::from_utf8(bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        let reason = Box::new(GuardError::Syntax { reason: "not UTF-8".to_owned() });
        GuardError::Manifest { at: Location { file: shown(file), line, key: None }, reason }
    })
}
