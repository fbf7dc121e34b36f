//! What an evaluation leaves behind: `report.json` for programs, and one page of HTML for people that needs nothing from anywhere.

mod figures;
mod page;
mod plots;
mod sections;
mod survey;
mod tables;

use super::backdoor::LayerSweep;
use super::{Backdoor, Detection, EvalError, RefusalSweep, Steering, Switch, Utility};
use crate::engine::{Model, Prompt};
use crate::guard::{AdapterIdentity, Digest, Guard, ModelIdentity, Source};
use crate::learn::Survey;
use serde::{Deserialize, Serialize};

/// The only `format` this version writes. Keys are added under it, never renamed.
pub const FORMAT: u32 = 1;

/// All that was measured of one guard on one model, and how.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub format: u32,
    /// Version of this library.
    pub pilotfish: String,
    /// The command line, as it was given.
    pub command: Vec<String>,
    pub model: ModelEntry,
    /// None where the model was measured alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<GuardEntry>,
    /// Other guards that were measured beside it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<GuardEntry>,
    pub seeds: Seeds,
    pub prompts: Vec<PromptsEntry>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detection: Option<Detection>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steering: Option<Steering>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub utility: Option<Utility>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch: Option<Switch>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backdoor: Option<Backdoor>,
    /// Sweeps over layers, as `pilotfish sweep` writes them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sweeps: Vec<LayerSweep>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refusal_sweeps: Vec<RefusalSweep>,
    /// Of layer pairs, as `map --survey` writes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub survey: Option<Survey>,
}

/// The model that was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelEntry {
    pub name: String,
    pub architecture: String,
    pub fingerprint: String,
    /// What it carries.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AdapterIdentity>,
    pub n_layer: u32,
    pub n_embd: usize,
    /// Bytes of its tensors: what tells one quantization from another.
    pub tensor_bytes: u64,
}

/// The guard that was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GuardEntry {
    pub name: String,
    pub description: String,
    /// Of its manifest, which fixes its other files by theirs.
    pub sha256: Digest,
    pub source: Option<Source>,
    pub gates: Vec<String>,
    /// Kind, layer and strength of every intervention.
    pub interventions: Vec<String>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Seeds {
    pub bootstrap: u64,
    /// Random controls are drawn with the seeds from 0 up to this.
    pub controls: u64,
}

/// A set of prompts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PromptsEntry {
    /// What they are for: `positive`, `negative`, …
    pub role: String,
    /// The file's name, without its folder.
    pub file: String,
    pub prompts: usize,
    /// Of the prompts, each with a zero byte behind it; where its answer has begun, with a one byte and how it begins before that.
    pub sha256: Digest,
}

impl PromptsEntry {
    pub fn new(role: &str, file: &str, prompts: &[Prompt]) -> Self {
        let mut bytes = Vec::new();
        for prompt in prompts {
            bytes.extend_from_slice(prompt.text.as_bytes());
            if !prompt.prefill.is_empty() {
                bytes.push(1);
                bytes.extend_from_slice(prompt.prefill.as_bytes());
            }
            bytes.push(0);
        }
        Self { role: role.into(), file: file.into(), prompts: prompts.len(), sha256: Digest::of(&bytes) }
    }
}

impl GuardEntry {
    pub fn new(guard: &Guard) -> Self {
        let gates = guard.gates().iter().map(|gate| {
            let layer = guard.vectors()[gate.vector].layer;
            format!("`{}` reads layer {layer} ({})", gate.name, gate.scope)
        });
        let interventions = guard.interventions().iter().map(|acts| {
            let when = acts.when.as_ref().map(|when| format!(" when {}", guard.written(when))).unwrap_or_default();
            let (kind, layer) = (acts.kind.name(), guard.layer_of(acts));
            format!("{kind} `{}` at layer {layer}, strength {}{when}", guard.operand_of(acts), acts.strength)
        });
        Self {
            name: guard.name().into(),
            description: guard.description().into(),
            sha256: guard.content_hash(),
            source: guard.source().cloned(),
            gates: gates.collect(),
            interventions: interventions.collect(),
        }
    }
}

impl Report {
    /// A report in which nothing has been measured yet.
    pub fn new(model: &Model, guard: Option<&Guard>, seeds: Seeds, command: Vec<String>) -> Self {
        let ModelIdentity { name, architecture, fingerprint, adapters } = model.identity().clone();
        let shape = model.shape();
        Self {
            format: FORMAT,
            pilotfish: env!("CARGO_PKG_VERSION").into(),
            command,
            model: ModelEntry {
                name,
                architecture,
                fingerprint: fingerprint.to_string(),
                adapters,
                n_layer: shape.n_layer,
                n_embd: shape.n_embd.0,
                tensor_bytes: model.llama().size(),
            },
            guard: guard.map(GuardEntry::new),
            also: Vec::new(),
            seeds,
            prompts: Vec::new(),
            detection: None,
            steering: None,
            utility: None,
            switch: None,
            backdoor: None,
            sweeps: Vec::new(),
            refusal_sweeps: Vec::new(),
            survey: None,
        }
    }

    /// `report.json`.
    ///
    /// # Panics
    /// Never: every key is a text, and a figure that is no number becomes null.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("keys are texts") + "\n"
    }

    /// A report from its `report.json`, of this version of Pilotfish or an older one.
    ///
    /// # Errors
    /// Another `format`, no report, or one in which a figure was no number.
    pub fn from_json(text: &str) -> Result<Self, EvalError> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = serde_json::from_str(text).map_err(EvalError::NoReport)?;
        if format != FORMAT {
            return Err(EvalError::ReportFormat { found: format });
        }
        serde_json::from_str(text).map_err(EvalError::NoReport)
    }

    /// `report.html`: one file, no script, nothing to fetch.
    ///
    /// # Errors
    /// A figure that can't be drawn.
    pub fn to_html(&self) -> Result<String, EvalError> {
        page::page(self)
    }
}
