//! A guard compiled for one model's shape, and what runs it on slices.
//!
//! In: a validated [`Guard`](crate::guard::Guard), a [`ModelShape`], then residual rows with who they belong to. Out: the rows patched, and each
//! sequence's gate decisions. This room knows nothing of ggml, of devices or of files: the [hook](crate::hook) finds the rows
//! and brings them here, or runs the same [`Program`] elsewhere.
//!
//! Every patch has the canonical form `y = x + U·g(Vᵀx + c) + b` with at most one column in `U` and `V`: see [`Patch`].

mod compile;
mod gates;
mod host;
pub mod reference;

pub use compile::{Calibration, CompileError, ModelShape};
pub use gates::{GateDecision, GateStates, Row, RowKind};
pub use host::RowFault;

use crate::guard::{Aggregate, OnError, OnFire, Positions};
use crate::tensor::{HiddenSize, LayerIndex};

/// A guard compiled for one model: per hook point, what to read and what to patch, in order.
#[derive(Debug, Clone)]
pub struct Program {
    pub(crate) guard: String,
    pub(crate) width: HiddenSize,
    pub(crate) on_error: OnError,
    pub(crate) message: Option<String>,
    pub(crate) gates: Vec<Gate>,
    pub(crate) points: Vec<HookPoint>,
}

/// A gate as the program holds it: how a sequence's projections become one score, and what that score means.
#[derive(Debug, Clone, PartialEq)]
pub struct Gate {
    pub name: String,
    pub layer: LayerIndex,
    pub aggregate: Aggregate,
    /// Mean and standard deviation of benign projections; the score is in these deviations from this mean.
    pub mean: f64,
    pub deviation: f64,
    /// A score at or above it fires. `None` only in a program compiled to measure projections.
    pub threshold: Option<f64>,
    pub on_fire: OnFire,
}

/// What happens at one layer: gates are read first, from the residual as the model made it, then patches act in the guard's order.
#[derive(Debug, Clone)]
pub struct HookPoint {
    pub layer: LayerIndex,
    pub readouts: Vec<Readout>,
    pub patches: Vec<Patch>,
}

/// The projection that feeds a gate.
#[derive(Debug, Clone)]
pub struct Readout {
    /// Index into [`Program::gates`].
    pub gate: usize,
    /// The gate's direction, readout applied: `[width]`, of norm 1.
    pub direction: Box<[f32]>,
}

/// One intervention, with its strength folded in.
#[derive(Debug, Clone)]
pub struct Patch {
    pub kind: PatchKind,
    pub positions: Positions,
    /// Index into [`Program::gates`]; `None` acts always.
    pub when: Option<usize>,
    /// Whether position 0, the attention sink, is patched too.
    pub first_position: bool,
}

/// The canonical forms that this version compiles to (DESIGN: one canonical op).
#[derive(Debug, Clone)]
pub enum PatchKind {
    /// `y = x + b`, `b` of `[width]`.
    Shift(Box<[f32]>),
    /// `y = x + g(v̂·x) v̂`, `v̂` of `[width]` and norm 1.
    RankOne { direction: Box<[f32]>, response: Response },
}

/// `g` of a rank-one patch: how far to move along `v̂` when the projection on it is `p`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Response {
    /// `s (b − p)`: ablation recentred on `b`.
    Recentre { target: f32, strength: f32 },
    /// `s (clip(p, low, high) − p)`.
    Clip { low: f32, high: f32, strength: f32 },
}

impl Response {
    pub fn at(self, projection: f32) -> f32 {
        match self {
            Self::Recentre { target, strength } => strength * (target - projection),
            Self::Clip { low, high, strength } => strength * (projection.clamp(low, high) - projection),
        }
    }
}

impl Program {
    /// Name of the guard that was compiled.
    pub fn guard(&self) -> &str {
        &self.guard
    }

    pub fn width(&self) -> HiddenSize {
        self.width
    }

    /// What a run-time fault means.
    pub fn on_error(&self) -> OnError {
        self.on_error
    }

    /// What the caller of a blocked sequence is told.
    pub fn message(&self) -> Option<&str> {
        self.message.as_deref()
    }

    pub fn gates(&self) -> &[Gate] {
        &self.gates
    }

    /// Hook points in the order of their layers, each layer once.
    pub fn points(&self) -> &[HookPoint] {
        &self.points
    }
}
