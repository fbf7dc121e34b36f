//! Guard files: what a guard says, checked once, into a type that cannot be wrong.
//!
//! In: the bytes of a manifest, its tensors and its mappings, or the folder that holds them. Out: an immutable [`Guard`], every
//! direction already in its target's space; or such a folder written, and the files that vectors and mappings travel in. This room
//! never learns of a network, a clock or a loaded model. The format, its limits and what they defend against are in
//! `docs/guard-format.md`.

mod calibration;
mod digest;
pub mod edit;
mod error;
mod folder;
mod identity;
mod location;
pub mod manifest;
mod mapping_file;
mod quantization;
mod rule;
mod tensors;
mod validate;
mod vector_file;
mod write;

#[cfg(test)]
mod tests;

pub use calibration::{GateCalibration, OperatingPoint};
pub use digest::Digest;
pub use error::{GuardError, Location};
pub use identity::{AdapterIdentity, Fingerprint, ModelIdentity};
pub use manifest::{
    Aggregate, MAX_MATCHING_BYTES, Manifest, MeasuredResult, OnError, OnFire, Positions, Probe, Readout, Source,
    StrengthUnit,
};
pub use mapping_file::{CarryError, MappingFile, carry};
pub use quantization::quantization_name;
pub use rule::{Rule, Truth};
pub use vector_file::{VectorFile, class_mean_tensors};
pub use write::{compose_guard, extend_guard, from_control_vector, guard_with_manifest, replace_manifest, write_guard};

use crate::mapping::{MapQuality, ResidualMap, Standardization};
use crate::steering::{PromptTokens, VectorKind};
use crate::tensor::{LayerIndex, LayerStack, norm};
use folder::{Folder, InMemory};
use std::path::Path;

/// The manifest's name in a guard's folder.
pub const MANIFEST_FILE: &str = "guard.toml";
/// How the name of every mapping file ends; guards find a mapping among such files by its sha256.
pub const MAPPING_SUFFIX: &str = ".map.safetensors";
/// The folder beside guards' folders whose mappings they share.
pub const MAPPINGS_FOLDER: &str = "mappings";

/// What a guard without words of its own says when it blocks.
pub const BLOCKED: &str = "This was blocked by a guard.";

/// Bytes a manifest may have.
pub const MAX_MANIFEST_BYTES: u64 = 1 << 20;
/// Bytes a tensor file or a mapping file may have.
pub const MAX_TENSOR_BYTES: u64 = 1 << 30;
/// Entries a list of the manifest may have.
pub const MAX_ENTRIES: usize = 1024;
/// Values a vector may have: several times the widest residual there is.
pub const MAX_WIDTH: usize = 1 << 16;

/// A policy for one model: what to read from its residual, what to do to it, and when. Every value has been checked: indices are in
/// range, numbers finite, vectors non-zero and in the target's space.
#[derive(Debug, Clone, PartialEq)]
pub struct Guard {
    name: String,
    description: String,
    on_error: OnError,
    message: Option<String>,
    target: Target,
    source: Option<Source>,
    vectors: Vec<GuardVector>,
    switches: Vec<SwitchMap>,
    gates: Vec<Gate>,
    interventions: Vec<Intervention>,
    results: Vec<MeasuredResult>,
    content_hash: Digest,
}

/// The model that a guard is for.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    pub architecture: String,
    pub fingerprint: Fingerprint,
    pub probe: Option<Probe>,
    /// What the model carried when the guard was made.
    pub adapters: Vec<AdapterIdentity>,
}

impl Target {
    /// What is to be said where `model`, which is this one, carries other adapters than when the guard was made. Whether its weights will do is
    /// for the probe to tell.
    pub fn other_adapters(&self, model: &ModelIdentity) -> Option<String> {
        let (expected, found) = (&self.adapters, &model.adapters);
        (!AdapterIdentity::alike(expected, found)).then(|| {
            let [expected, found] = [expected, found].map(|adapters| AdapterIdentity::listed(adapters));
            format!("was made for the model {expected}, and runs on it {found}")
        })
    }
}

/// A direction in the target's residual.
#[derive(Debug, Clone, PartialEq)]
pub struct GuardVector {
    pub name: String,
    /// The target's layer.
    pub layer: LayerIndex,
    /// `[n_embd]` of the target, mapped if need be, not normalised: strength 1.0 of `add` is this vector itself.
    pub direction: Vec<f32>,
    pub kind: VectorKind,
    pub mapped_from: Option<MappedFrom>,
    /// How the vector was extracted, where the manifest says.
    pub method: Option<String>,
    /// Mean norm of the residual that it was extracted from, where the manifest says.
    pub mean_norm: Option<f64>,
}

/// Where a mapped vector comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct MappedFrom {
    /// The source's layer, or layers where the mapping reads several.
    pub layer: LayerStack,
    /// The mapping's name in the manifest.
    pub mapping: String,
    pub quality: MapQuality,
    /// Of the target's residual, as the mapping knows it.
    pub target: Standardization,
}

/// A map that a `switch` follows: from the target's residual at a layer to the residual that it should be.
#[derive(Debug, Clone, PartialEq)]
pub struct SwitchMap {
    /// The mapping's name in the manifest.
    pub name: String,
    /// From a layer to the same layer, of one width.
    pub map: ResidualMap,
}

/// A condition on a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Gate {
    pub name: String,
    /// Index into [`Guard::vectors`].
    pub vector: usize,
    pub scope: GateScope,
    pub readout: Readout,
    /// What rows are projected on, after the readout: `[n_embd]` of the target, not normalised.
    pub direction: Vec<f32>,
    pub calibration: Option<Calibration>,
    /// In benign standard deviations from the benign mean; a score at or above it fires.
    pub threshold: Option<f64>,
    /// Figures of single quantizations: where the loaded file's is among them, these count and not the two above.
    pub calibrations: Vec<GateCalibration>,
    pub on_fire: OnFire,
}

/// Which tokens a gate reads, and what it makes of them.
#[derive(Debug, Clone, PartialEq)]
pub enum GateScope {
    /// The tokens of the prompt become one score, which decides for the sequence.
    Prompt(Aggregate),
    /// Each token decides for itself: the gate opens at a score of `threshold`, and stays open until one below `release`.
    Token { positions: Positions, release: Option<f64> },
}

impl std::fmt::Display for GateScope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Prompt(Aggregate::Last) => "prompt, last token",
            Self::Prompt(Aggregate::Mean) => "prompt, mean",
            Self::Prompt(Aggregate::Max) => "prompt, maximum",
            Self::Token { positions: Positions::All, .. } => "each token",
            Self::Token { positions: Positions::Prompt, .. } => "each token of the prompt",
            Self::Token { positions: Positions::Generated, .. } => "each generated token",
            Self::Token { positions: Positions::Matching(text), .. } => return write!(f, "each token of `{text}`"),
        })
    }
}

/// Statistics of a gate's projection over benign prompts. For a gate of scope `token`, of the largest projection of each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Calibration {
    pub mean: f64,
    /// Positive.
    pub deviation: f64,
}

/// What is done to a residual.
#[derive(Debug, Clone, PartialEq)]
pub struct Intervention {
    pub name: String,
    pub kind: InterventionKind,
    /// 1.0 is the intervention as its formula has it, 0 is off. Of an `add` with a `deviation`, in units of that.
    pub strength: f32,
    /// `add` only: standard deviation of benign projections on the vector's unit direction, where the strength is in these.
    pub deviation: Option<f64>,
    pub positions: Positions,
    /// Tokens of benign prompts whose projections say what an `ablate` leaves and how large a deviation is: [`PromptTokens::Mean`] are all but the
    /// first, each by itself.
    pub benign_tokens: PromptTokens,
    /// `None` acts always.
    pub when: Option<Rule>,
    /// Whether position 0, the attention sink, is patched too.
    pub first_position: bool,
}

/// The formula of an intervention at strength 1, with `v` its vector, an index into [`Guard::vectors`], and `v̂` the vector's unit
/// direction.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum InterventionKind {
    /// `x + v`
    Add { vector: usize },
    /// `x − (v̂·x − mean) v̂`
    Ablate { vector: usize, mean: f64 },
    /// `x + (clip(v̂·x, low, high) − v̂·x) v̂`
    Clamp { vector: usize, low: f64, high: f64 },
    /// `x` turned by `angle` degrees towards `v̂` in the plane of both, no further than to `v̂`; below 0 away from it, no further than to
    /// `−v̂`. Its norm stays. The strength multiplies the angle.
    Rotate { vector: usize, angle: f64 },
    /// `f(x)`, with `f` the map of that index in [`Guard::switches`]; at strength λ, `x + λ (f(x) − x)`.
    Switch { map: usize },
}

impl InterventionKind {
    /// As manifests call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Add { .. } => "add",
            Self::Ablate { .. } => "ablate",
            Self::Clamp { .. } => "clamp",
            Self::Rotate { .. } => "rotate",
            Self::Switch { .. } => "switch",
        }
    }

    /// The vector, of all but a `switch`.
    pub fn vector(&self) -> Option<usize> {
        match *self {
            Self::Add { vector }
            | Self::Ablate { vector, .. }
            | Self::Clamp { vector, .. }
            | Self::Rotate { vector, .. } => Some(vector),
            Self::Switch { .. } => None,
        }
    }
}

impl Intervention {
    /// What an `add` multiplies its vector, `direction`, by.
    pub fn multiplier(&self, direction: &[f32]) -> f32 {
        multiplier(f64::from(self.strength), self.deviation, direction)
    }
}

/// The strength of an `add` in units of its vector.
pub(crate) fn multiplier(strength: f64, deviation: Option<f64>, direction: &[f32]) -> f32 {
    deviation.map_or(strength, |deviation| strength * deviation / norm(direction)) as f32
}

impl Guard {
    /// Reads the guard in the folder `directory`, with mappings from there and from [`MAPPINGS_FOLDER`] beside it.
    ///
    /// # Errors
    /// Whatever is unreadable, malformed, inconsistent or not what its sha256 says, in one line with file, key and line.
    pub fn load(directory: &Path) -> Result<Self, GuardError> {
        let folder = Folder::new(directory);
        let manifest = folder.manifest()?;
        validate::guard(&folder.label(MANIFEST_FILE), &manifest, &folder)
    }

    /// A guard from bytes: its manifest, the tensor file that this names, and mapping files in any order. `file` is what errors call
    /// the manifest.
    ///
    /// # Errors
    /// As [`load`](Self::load). Nothing in the bytes can make this panic.
    pub fn from_parts(file: &str, manifest: &[u8], tensors: &[u8], mappings: &[&[u8]]) -> Result<Self, GuardError> {
        validate::guard(file, manifest, &InMemory { tensors, mappings })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn description(&self) -> &str {
        &self.description
    }

    /// What a run-time fault means.
    pub fn on_error(&self) -> OnError {
        self.on_error
    }

    /// What the caller of a blocked sequence is told.
    pub fn message(&self) -> Option<&str> {
        self.message.as_deref()
    }

    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Whether `model` is the one that it was made for, whatever its quantization.
    pub fn is_for(&self, model: &ModelIdentity) -> bool {
        self.target().architecture == model.architecture && self.target().fingerprint == model.fingerprint
    }

    /// The model that mapped vectors were learnt on.
    pub fn source(&self) -> Option<&Source> {
        self.source.as_ref()
    }

    pub fn vectors(&self) -> &[GuardVector] {
        &self.vectors
    }

    /// Maps that the interventions of kind `switch` follow.
    pub fn switches(&self) -> &[SwitchMap] {
        &self.switches
    }

    /// The layer that `intervention`, one of this guard's, acts at.
    ///
    /// # Panics
    /// On another guard's.
    pub fn layer_of(&self, intervention: &Intervention) -> LayerIndex {
        match intervention.kind {
            InterventionKind::Switch { map } => self.switches[map].map.target_layer(),
            InterventionKind::Add { vector }
            | InterventionKind::Ablate { vector, .. }
            | InterventionKind::Clamp { vector, .. }
            | InterventionKind::Rotate { vector, .. } => self.vectors[vector].layer,
        }
    }

    /// Name of the vector or the mapping that `intervention`, one of this guard's, is made of.
    ///
    /// # Panics
    /// On another guard's.
    pub fn operand_of(&self, intervention: &Intervention) -> &str {
        match intervention.kind {
            InterventionKind::Switch { map } => &self.switches[map].name,
            kind => &self.vectors[kind.vector().expect("all kinds but `switch` have one")].name,
        }
    }

    /// `rule`, one of this guard's, as a manifest has it.
    ///
    /// # Panics
    /// On another guard's.
    pub fn written(&self, rule: &Rule) -> String {
        rule.with_names(&|gate| self.gates[gate].name.as_str())
    }

    pub fn gates(&self) -> &[Gate] {
        &self.gates
    }

    pub fn interventions(&self) -> &[Intervention] {
        &self.interventions
    }

    pub fn results(&self) -> &[MeasuredResult] {
        &self.results
    }

    /// The sha256 of the manifest's bytes, which in turn fixes tensors and mappings by theirs. [`with_strength`](Self::with_strength)
    /// leaves it as it is.
    pub fn content_hash(&self) -> Digest {
        self.content_hash
    }

    /// This guard with another strength for one intervention.
    ///
    /// # Errors
    /// No intervention of that name, or a strength that is not finite or takes the vector out of `f32`.
    pub fn with_strength(&self, intervention: &str, strength: f64) -> Result<Self, GuardError> {
        let index = self.interventions.iter().position(|known| known.name == intervention).ok_or_else(|| {
            GuardError::unknown("intervention", intervention, self.interventions.iter().map(|known| &known.name))
        })?;
        let mut changed = self.clone();
        let found = &mut changed.interventions[index];
        found.strength = validate::strength(strength, found.deviation, found.kind, &self.vectors)?;
        Ok(changed)
    }

    /// This guard with switches that add, whatever they read, what its maps add in the mean: a control.
    ///
    /// # Errors
    /// A map that there is no such correction of.
    pub fn with_mean_changes(&self) -> Result<Self, GuardError> {
        let mut changed = self.clone();
        for switch in &mut changed.switches {
            switch.map = switch.map.mean_alone().map_err(|error| GuardError::Missing { why: error.to_string() })?;
        }
        Ok(changed)
    }

    /// This guard with switches whose change is as long and turned at random by `seed`: a control. `None` where a map is no correction.
    pub fn with_turned_changes(&self, seed: u64) -> Option<Self> {
        let mut changed = self.clone();
        for switch in &mut changed.switches {
            switch.map = switch.map.turned(seed)?;
        }
        Some(changed)
    }

    /// This guard with the vector of one intervention replaced by `direction` (`[n_embd]`) at `layer`: a control, for measuring what the
    /// vector itself does. Gates read as they did, also those that read along the vector that is replaced. `level` is what the new direction
    /// is held to: the mean of an `ablate`; other kinds keep their own.
    ///
    /// # Errors
    /// No intervention of that name, one that has no vector, or a direction that is no valid vector of this guard.
    pub fn with_direction(
        &self,
        intervention: &str,
        layer: LayerIndex,
        direction: Vec<f32>,
        level: Option<f64>,
    ) -> Result<Self, GuardError> {
        let index = self.interventions.iter().position(|known| known.name == intervention).ok_or_else(|| {
            GuardError::unknown("intervention", intervention, self.interventions.iter().map(|known| &known.name))
        })?;
        let Intervention { kind, strength, deviation, .. } = self.interventions[index];
        let replaced = kind
            .vector()
            .ok_or_else(|| GuardError::Missing { why: format!("`{intervention}`, a `switch`, has no vector") })?;
        let original = &self.vectors[replaced];
        validate::direction(&direction, original.direction.len())?;
        let mut changed = self.clone();
        let vector = changed.vectors.len();
        changed.vectors.push(GuardVector {
            name: original.name.clone(),
            layer,
            direction,
            kind: VectorKind::Direction,
            mapped_from: None,
            method: None,
            mean_norm: None,
        });
        let kind = match kind {
            InterventionKind::Add { .. } => InterventionKind::Add { vector },
            InterventionKind::Ablate { mean, .. } => {
                let mean = level.unwrap_or(mean);
                validate::finite_f32(mean)?;
                InterventionKind::Ablate { vector, mean }
            }
            InterventionKind::Clamp { low, high, .. } => InterventionKind::Clamp { vector, low, high },
            InterventionKind::Rotate { angle, .. } => InterventionKind::Rotate { vector, angle },
            InterventionKind::Switch { map } => InterventionKind::Switch { map },
        };
        changed.interventions[index].kind = kind;
        changed.interventions[index].strength =
            validate::strength(f64::from(strength), deviation, kind, &changed.vectors)?;
        Ok(changed)
    }
}
