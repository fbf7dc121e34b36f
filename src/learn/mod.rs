//! Making guards: activations of real models become steering vectors, mappings and calibrations.
//!
//! In: loaded models and texts. Out: vectors, mappings, benign statistics. The mathematics is in [`steering`](crate::steering) and
//! [`mapping`](crate::mapping), the running of models in [`engine`](crate::engine); this room brings the two together and never
//! touches a file.

mod activations;
mod autoencoder;
mod calibrate;
mod choose;
mod corpus;
mod extract;
mod map;
mod operating;
mod recentre;
mod replacement;
mod scores;
mod separation;
mod strength;
mod survey;
mod sweep;
mod switch;
mod threads;

pub use activations::prompt_activations;
pub use autoencoder::{
    AutoencoderOptions, AutoencoderTrainer, Epoch, LayerPair, MappedByAutoencoder, PairedRows, TrainingError,
    TrainingWatch, map_by_autoencoder,
};
pub use calibrate::{Calibrated, CalibrationOptions, calibrate};
pub use choose::separation_by_map;
pub use corpus::{CorpusOptions, sample_corpus, set_aside};
pub use extract::{
    ClassActivations, Contrast, ContrastMethod, ContrastOptions, class_activations, contrast, contrast_of,
    contrast_of_sets,
};
pub use map::{MapOptions, MapRows, Mapped, map};
pub use operating::clopper_pearson;
pub use recentre::{BenignProjection, benign_projections};
pub use replacement::replacement;
pub use scores::{GateScore, gate_scores};
pub use strength::{StrengthOptions, StrengthSearch, TriedStrength, search_strength};
pub use survey::{RankBy, Survey, SurveyedPair};
pub use sweep::{FirstTokens, SweptLayer, adding, best_of_sweep, guard_along, sweep};
pub use switch::{AnsweredText, SwitchKind, SwitchOptions, answered, switch_maps};

use crate::engine::{EngineError, Prompt};
use crate::mapping::MappingError;
use crate::steering::{PromptTokens, SteeringError};
use crate::tensor::{LayerIndex, LayerStack};

/// Why a guard's part could not be learnt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LearnError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("layer {layer}: {source}")]
    Steering { layer: LayerIndex, source: SteeringError },
    #[error("mapping layer {source_layer} to {target_layer}: {source}")]
    Mapping { source_layer: LayerStack, target_layer: LayerIndex, source: MappingError },
    #[error(
        "a switch leads from a model to the same model with other adapters; `{source_model}` and `{target_model}` are two"
    )]
    NotOneModel { source_model: String, target_model: String },
    #[error("no pair of layers to map: the models have too few layers; name pairs with `--layers`")]
    NoLayers,
    #[error("autoencoder of layer {source_layer} to {target_layer}: {source}")]
    Training { source_layer: LayerIndex, target_layer: LayerIndex, source: TrainingError },
    #[error("the training's checkpoint: {0}")]
    Checkpoint(std::io::Error),
    #[error("{what} needs at least {needed} prompts, found {found}")]
    TooFewPrompts { what: &'static str, needed: usize, found: usize },
    #[error("the two tokenizers share no token ends in the corpus of {documents} documents: is it text?")]
    NoPairs { documents: usize },
    #[error("prompt {index} has no such tokens as `{tokens}` but perhaps its first, which is left out")]
    NoSuchToken { tokens: PromptTokens, index: usize },
    #[error("there are {found} weights for {sets} contrast sets")]
    Weights { sets: usize, found: usize },
    #[error("prompt {index}: {source}")]
    Prompt { index: usize, source: EngineError },
    #[error("gate `{gate}` read nothing from prompt {index}")]
    NothingRead { gate: String, index: usize },
    #[error("`{gate}`: the {found} benign prompts all score alike, so there is no scale to measure others by")]
    NoSpread { gate: String, found: usize },
    #[error("sampling from the model gave {found} usable documents after {tries} tries, {wanted} were asked for")]
    Corpus { found: usize, wanted: usize, tries: usize },
}

/// Prompts with a property, and prompts without it.
#[derive(Debug, Clone, Copy)]
pub struct Classes<'a> {
    pub positive: &'a [Prompt],
    pub negative: &'a [Prompt],
}

/// Told of steps done and steps in all.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);
