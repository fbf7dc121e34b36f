//! Refusing: what answers to harmful and harmless prompts are by rule and by the model's own logits, under a guard and its controls; layer by layer; and
//! how strong a guard has to be for it.

mod openings;
mod rules;
mod steering;
mod strength;
mod sweep;

pub use openings::OPENINGS;
pub use rules::{Answer, RULES_VERSION, classify, is_broken, is_refusal, repeated_ngrams, rules};
pub use steering::{Behaviour, Example, Steering, SteeringInput, SteeringRow, StrengthRow, steering};
pub use strength::{StrengthInput, strength_for_refusals};
pub use sweep::{RefusalSweep, RefusalsAt, refusal_sweep};
