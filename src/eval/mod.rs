//! Measuring guards: tasks, controls, reports; and how strong a guard has to be for what it measures.
//!
//! In: a guard, the model it guards, and prompts that had no part in its making. Out: figures, each beside its controls, and a report of
//! them. This room touches no file: reports are texts, for the caller to write.

pub mod backdoor;
mod controls;
mod detection;
mod error;
mod generate;
pub mod metrics;
pub mod refusal;
pub mod report;
mod surprise;
mod switch;
pub mod utility;

pub use backdoor::{Backdoor, BackdoorInput, backdoor};
pub use controls::{
    CONTROL_SEEDS, Role, SYSTEM_PROMPT, guard_at_wrong_layer, native_guard, random_guard, scaled, wrong_layer,
};
pub use detection::{Detection, DetectionInput, DetectionRow, Fires, GateScores, LayerSeparation, detection};
pub use error::EvalError;
pub use refusal::{
    Behaviour, Example, OPENINGS, RefusalSweep, RefusalsAt, Steering, SteeringInput, SteeringRow, StrengthInput,
    StrengthRow, refusal_sweep, steering, strength_for_refusals,
};
pub use report::Report;
pub use switch::{Likeness, Switch, SwitchExample, SwitchInput, SwitchRow, SwitchedOff, ToggleCost, switch};
pub use utility::{Utility, UtilityInput, utility};
