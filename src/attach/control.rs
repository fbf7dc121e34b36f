//! What is said over the socket of an attached process: a line of JSON for a request, a line for its answer.

use super::Fail;
use crate::program::Setting;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Of what is said here. A request or an answer of another version is not read any further.
pub const VERSION: u32 = 1;
/// The longest line, of either side, in bytes.
pub const MAX_LINE_BYTES: u64 = 4 << 20;

/// A line to the process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    pub version: u32,
    pub request: Request,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    Status,
    /// A change to one guard, for prompts to come.
    Toggle {
        /// Its name, or its folder's.
        guard: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        enabled: Option<bool>,
        /// What interventions, or groups of them, are set to; `None` for what the guard's file says.
        #[serde(default)]
        interventions: BTreeMap<String, Option<Setting>>,
    },
    /// To read all files of the directory now.
    Reload,
    /// What gates make of a text.
    Score {
        text: String,
        /// Which of the loaded models, by its number in the status; the only one if it is not said.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        model: Option<usize>,
        #[serde(default)]
        form: TextForm,
    },
    Metrics,
}

/// What a text to score is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextForm {
    /// Text, also where it spells a control token.
    #[default]
    Plain,
    /// What a user says, which is put into the model's own chat template.
    Chat,
    /// A whole prompt, as an app has put it into a template: what spells a control token is one.
    Templated,
}

/// A line from the process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    pub version: u32,
    pub answer: Outcome,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Outcome {
    Status(Box<Status>),
    /// What is in force after a change, or after a look at the files.
    InForce(InForce),
    Score(Score),
    /// In Prometheus' (OpenMetrics') text format.
    Metrics(String),
    /// Why it was not done.
    Error(String),
}

/// An attached process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// The library's version.
    pub library: String,
    pub pid: u32,
    /// The command line.
    pub command: Vec<String>,
    /// What is wrong with all of it, so that nothing decodes.
    pub problem: Option<String>,
    pub fail: Fail,
    pub in_force: InForce,
    /// Contexts of the app's that have decoded.
    pub contexts: usize,
    pub counts: Counts,
    pub audit: Option<AuditStatus>,
}

/// The guards of the directory, and what they are to the models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InForce {
    /// Grows with each change.
    pub epoch: u64,
    pub directory: String,
    /// Why the directory can't be read; what was read before stays.
    pub problem: Option<String>,
    pub guards: Vec<GuardStatus>,
    pub models: Vec<ModelStatus>,
}

/// A folder of the directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuardStatus {
    pub folder: String,
    /// `None` where it was never read.
    pub name: Option<String>,
    /// The hash of its content.
    pub content: Option<String>,
    pub enabled: bool,
    /// Why what the folder holds now is not in force.
    pub problem: Option<String>,
    pub gates: Vec<GateStatus>,
    pub interventions: Vec<InterventionStatus>,
    /// What was set, by the names of interventions or of groups of them.
    pub settings: BTreeMap<String, Setting>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateStatus {
    pub name: String,
    pub layer: u32,
    /// `block` or `steer`.
    pub on_fire: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterventionStatus {
    pub name: String,
    pub kind: String,
    pub layer: u32,
    pub strength: f32,
    pub strength_of_guard: f32,
}

/// A model that the process has loaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelStatus {
    pub name: String,
    pub architecture: String,
    pub fingerprint: String,
    pub quantization: String,
    /// Names of the guards that its prompts to come run under.
    pub guards: Vec<String>,
    /// Why there is no program for it.
    pub problem: Option<String>,
}

/// Since the process began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Decodes that were guarded.
    pub decodes: u64,
    pub prompt_tokens: u64,
    pub answer_tokens: u64,
    /// Prompts that were read to their end.
    pub prompts: u64,
    /// Answers that a guard has ended.
    pub blocked: u64,
    /// Answers that ended because a guard failed.
    pub faults: u64,
    /// Decodes that were refused.
    pub refused: u64,
    /// Decodes that ran without a guard, as `--fail open` lets them.
    pub unguarded: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditStatus {
    pub path: String,
    /// Why it can't be written.
    pub problem: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Score {
    pub epoch: u64,
    /// Name of the model.
    pub model: String,
    pub tokens: usize,
    /// Whether any gate fired.
    pub flagged: bool,
    pub gates: Vec<GateScore>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateScore {
    pub guard: String,
    pub gate: String,
    /// In standard deviations of benign prompts; `None` where there is nothing that it could read.
    pub score: Option<f64>,
    pub fired: bool,
}
