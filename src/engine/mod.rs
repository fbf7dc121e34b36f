//! llama.cpp through llama-cpp-2: loading a model, putting prompts into its template, running them guarded or not, and reading
//! residual activations.
//!
//! In: a GGUF file, prompts, a validated [`Guard`](crate::guard::Guard). Out: text, gate decisions, timings, activations. This room
//! never parses a guard file and never speaks HTTP.

mod activations;
mod adapter;
mod attach;
#[cfg(feature = "server")]
mod chat;
mod compiler;
#[cfg(feature = "server")]
mod form;
mod identity;
mod lock_step;
mod maybe_guarded;
mod model;
mod parallel;
mod prompt;
mod replaced;
mod sampling;
pub mod scheduler;
mod session;
mod weights;

pub use crate::program::Setting;
pub use activations::{ActivationReader, Activations};
pub use adapter::Adapter;
pub use attach::{GuardOptions, guard_context, measure_probe, probe_of, program_for};
#[cfg(feature = "server")]
pub use chat::{ChatMessage, ChatTemplate};
pub use compiler::GuardCompiler;
#[cfg(feature = "server")]
pub use form::Forms;
pub use identity::{identity_of, quantization_of};
pub use lock_step::LockStep;
pub use model::{Model, ModelOptions, backend};
pub use parallel::ParallelSampler;
pub use prompt::{Prompt, PromptLayout, PromptTemplate, tokens_spelling};
pub use replaced::ReplacedReader;
pub use sampling::Sampling;
pub use scheduler::Scheduler;
pub use session::{GateReading, Session, SessionOptions};
pub use weights::Weights;

use crate::guard::GuardError;
use crate::hook::ContextError;
use crate::program::{CompileError, ToggleError};
use crate::tensor::{LayerIndex, TokenPosition};
use std::path::PathBuf;

impl From<ToggleError> for EngineError {
    fn from(error: ToggleError) -> Self {
        Self::Context(error.into())
    }
}

/// Why a model could not be loaded, guarded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    #[error("no model file at `{}`", .path.display())]
    NoFile { path: PathBuf },
    #[error("llama.cpp can't load `{}`: {reason}", .path.display())]
    Load { path: PathBuf, reason: String },
    #[error("no adapter file at `{}`", .path.display())]
    NoAdapter { path: PathBuf },
    #[error("`{}` is no adapter for this model: {reason}", .path.display())]
    Adapter { path: PathBuf, reason: String },
    #[error("adapter `{}` can't be added {scale} times: give a finite number, as 1 or 0.5", .path.display())]
    AdapterScale { path: PathBuf, scale: f64 },
    #[error("llama.cpp did not start: {0}")]
    Backend(String),
    #[error("the model's metadata lacks `{key}`")]
    Metadata { key: &'static str },
    #[error("answers can't be given this form: {reason}")]
    Form { reason: String },
    #[error("the model's chat template can't be applied: {reason}")]
    Template { reason: String },
    #[error("guard `{guard}` is for another model: it expects {expected}, this one is {found}")]
    OtherModel { guard: String, expected: String, found: String },
    #[error(
        "guard `{guard}`: the model answers its probe otherwise: {quantity} is {found:.4}, expected {expected:.4} within {margin:.4}; its weights are not the ones that the guard was made for"
    )]
    Probe { guard: String, quantity: &'static str, expected: f64, found: f64, margin: f64 },
    #[error("guard `{guard}`: its probe names vector `{vector}` at layer {layer}, where the guard has no such vector")]
    ProbeVector { guard: String, vector: String, layer: LayerIndex },
    #[error("the prompt has {found} tokens and the context {capacity}: raise the context size or shorten the prompt")]
    PromptTooLong { found: usize, capacity: usize },
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    #[error("the model has no token {token}: its vocabulary has {n_vocab}")]
    NoToken { token: i32, n_vocab: i32 },
    #[error("{capacity} requests wait already: try again later")]
    QueueFull { capacity: usize },
    #[error(
        "layer {layer} is not a hook point of every token: llama.cpp keeps only rows with logits at the last of the model's layers (0 to {last})"
    )]
    NotEveryToken { layer: LayerIndex, last: u32 },
    #[error("the prompt has {n_tokens} tokens, so there is nothing at position {}", .position.0)]
    NoPosition { position: TokenPosition, n_tokens: usize },
    #[error("the model has layers 0 to {last}, so there is no layer {layer}")]
    NoLayer { layer: LayerIndex, last: u32 },
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Context(#[from] ContextError),
    #[error(transparent)]
    Guard(#[from] GuardError),
}
