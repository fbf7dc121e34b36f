//! Measuring guards: tasks, controls, reports.
//!
//! In: a guard, the model it guards, and prompts that had no part in its making. Out: figures, each beside its controls.

mod detection;

pub use detection::{Detection, DetectionRow, detection};
