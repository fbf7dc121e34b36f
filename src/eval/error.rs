use super::report::FORMAT;
use crate::engine::EngineError;
use crate::guard::GuardError;
use crate::learn::LearnError;
use crate::tensor::LayerIndex;

/// Why a guard could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Boxed: it is large, and this would be larger.
    #[error(transparent)]
    Learn(Box<LearnError>),
    #[error(transparent)]
    Guard(#[from] GuardError),
    #[error("prompt {index}: {source}")]
    Prompt { index: usize, source: EngineError },
    #[error("prompt {index} could not be answered: {reason}")]
    Unanswered { index: usize, reason: String },
    #[error("{what} needs at least one prompt")]
    NoPrompts { what: &'static str },
    #[error("guard `{guard}` blocks or leaves empty all {prompts} benign prompts, so there is no answer to compare")]
    NothingToCompare { guard: String, prompts: usize },
    #[error("guard `{guard}` has no intervention, so there is nothing to steer with: `detection` measures its gates")]
    NoIntervention { guard: String },
    #[error(
        "guard `{guard}` has no intervention of a strength other than 0, so there is none to look for a strength of"
    )]
    NoStrength { guard: String },
    #[error("guard `{guard}` has no intervention of kind `switch`, so there is nothing to switch")]
    NoSwitch { guard: String },
    #[error(
        "gate `{gate}` of guard `{guard}` blocks, and a switch is measured on answers: take the gate out of the guard"
    )]
    SwitchBlocks { guard: String, gate: String },
    #[error("`{model}` carries no adapters, so it is its own base and there is nothing to switch to: give `--lora`")]
    NoAdapters { model: String },
    #[error("at {factor} times the guard's strengths")]
    Factor { factor: f64, source: Box<EvalError> },
    #[error("no intervention of guard `{guard}` has a vector, so there is none for the model's own to stand for")]
    NothingToReplace { guard: String },
    #[error(
        "the vectors are of {found} and not of {expected}, which the guard is for: a model's own are what `extract` finds in it"
    )]
    NativeOfAnother { found: String, expected: String },
    #[error(
        "intervention `{intervention}` acts along `{vector}` at layer {layer}: there has to be one vector of that name and layer among the model's own, \
         which are {known}"
    )]
    NoNative { intervention: String, vector: String, layer: LayerIndex, known: String },
    #[error("guard `{guard}` acts at the only layer that its model has, so there is no other to compare with")]
    NoOtherLayer { guard: String },
    #[error("this is no report that `pilotfish eval` wrote: {0}")]
    NoReport(serde_json::Error),
    #[error(
        "the report has format {found}, this version of Pilotfish reads {FORMAT}: measure anew, or take a newer version"
    )]
    ReportFormat { found: u32 },
    #[error("figure `{figure}` can't be drawn: {reason}")]
    Plot { figure: String, reason: String },
}

impl From<LearnError> for EvalError {
    fn from(error: LearnError) -> Self {
        Self::Learn(Box::new(error))
    }
}
