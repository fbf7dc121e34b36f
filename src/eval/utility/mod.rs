//! What a guard costs where it should do nothing: how far it moves the model's own answers to benign prompts, and whether the model still
//! knows what it knew.

mod kl;

pub use kl::{BenignAnswers, BenignKl, benign_kl};
