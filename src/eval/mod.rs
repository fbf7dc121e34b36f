//! Measuring guards: tasks, controls, reports.
//!
//! In: a guard, the model it guards, and prompts that had no part in its making. Out: figures, each beside its controls.

mod detection;
mod error;
mod generate;
pub mod refusal;
pub mod utility;

pub use detection::{Detection, DetectionRow, detection};
pub use error::EvalError;
