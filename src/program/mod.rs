//! Guards compiled for one model's shape, and what runs them on slices.
//!
//! In: validated [`Guard`](crate::guard::Guard)s, a [`ModelShape`], what tokens spell, then residual rows with who they belong to. Out: the
//! rows patched, and each sequence's gate decisions and faults. This room knows nothing of ggml, of devices or of files: the
//! [hook](crate::hook) finds the rows and brings them here, or runs the same [`Program`] elsewhere.
//!
//! Every patch but a rotation has the canonical form `y = κx + γU·g(Vx + c) + b`: see [`LowRank`].

mod change;
mod compile;
mod form;
mod fuse;
mod gates;
mod host;
pub mod reference;
mod sequences;
mod spelling;
mod toggle;
mod trail;

pub use change::{Change, Changed};
pub use compile::{Calibration, CompileError, ModelShape, Uncalibrated};
pub use gates::{GateDecision, Row, RowKind};
pub(crate) use host::Group;
pub use host::{RowFault, Scratch, panic_message};
pub(crate) use sequences::EVERY_TEXT;
pub use sequences::{Checkpoint, Sequences};
pub use spelling::{TokenBytes, tokens_spelling};
pub use toggle::{Dial, Setting, ToggleError};

use crate::guard::{Aggregate, Digest, OnError, OnFire, Rule};
use crate::tensor::{HiddenSize, LayerIndex};
use std::sync::Arc;

/// Guards compiled for one model: per hook point, what to read and what to patch, in order.
#[derive(Debug, Clone)]
pub struct Program {
    pub(crate) guards: Vec<GuardInfo>,
    pub(crate) width: HiddenSize,
    pub(crate) gates: Vec<Gate>,
    pub(crate) points: Vec<HookPoint>,
    /// Bytes that patches look for in prompts, each once, up to [`MAX_TEXTS`].
    pub(crate) texts: Vec<Box<[u8]>>,
    /// All interventions, also those that are off. Programs that share it are the same guards at other strengths.
    pub(crate) dials: Arc<[Dial]>,
    /// What each of `dials` is at.
    pub(crate) strengths: Vec<f32>,
}

/// Texts that a program may look for: as many as [`Row::matched`] has bits.
pub const MAX_TEXTS: usize = 64;

/// What a program keeps of a guard besides its gates and patches.
#[derive(Debug, Clone, PartialEq)]
pub struct GuardInfo {
    pub name: String,
    pub content_hash: Digest,
    /// What a run-time fault means.
    pub on_error: OnError,
    /// What the caller of a blocked sequence is told.
    pub message: Option<String>,
}

/// A gate as the program holds it: how projections become a score, and what that score means.
#[derive(Debug, Clone, PartialEq)]
pub struct Gate {
    /// As its guard has it, and in a stack of several guards `GUARD/GATE`.
    pub name: String,
    /// Index into [`Program::guards`].
    pub guard: usize,
    pub layer: LayerIndex,
    pub scope: Scope,
    /// Mean and standard deviation of benign projections; the score is in these deviations from this mean.
    pub mean: f64,
    pub deviation: f64,
    /// A score at or above it fires. `None` only in a program compiled to measure projections.
    pub threshold: Option<f64>,
    pub on_fire: OnFire,
}

/// Which tokens a gate reads, and what it makes of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scope {
    /// The prompt's tokens but the first become one score; the decision falls at its end and holds for the sequence.
    Prompt(Aggregate),
    /// Each token of `positions` decides for itself: the gate opens at a score of the threshold, and closes at one below `release`.
    Token { positions: Positions, release: f64 },
}

/// Which tokens a gate reads or a patch acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Positions {
    All,
    Prompt,
    /// From the prompt's last token on.
    Generated,
    /// The tokens of a prompt that spell this text: an index into [`Program::texts`].
    Matching(usize),
}

/// What happens at one layer: gates are read first, from the residual as the model made it, then patches act in the guards' order.
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
    pub direction: Arc<[f32]>,
}

/// One intervention, or several neighbours with the same conditions in one, their strengths folded in.
#[derive(Debug, Clone)]
pub struct Patch {
    pub op: Op,
    pub condition: Condition,
}

/// When a patch acts.
#[derive(Debug, Clone, PartialEq)]
pub struct Condition {
    pub positions: Positions,
    /// Over [`Program::gates`]; `None` acts always.
    pub when: Option<Rule>,
    /// Whether position 0, the attention sink, is patched too.
    pub first_position: bool,
}

/// What a patch does to a row.
#[derive(Debug, Clone)]
pub enum Op {
    LowRank(LowRank),
    Rotate(Rotate),
}

/// `y = κx + γU·g(Vx + c) + b`: the canonical form. `add` is `b` alone, `ablate` and `clamp` have one column, a `switch` has as many as its map
/// is wide.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// `κ`: 1 but for a `switch`.
    pub keep: f32,
    /// `V`, a row a column of `U`: `[k, width]`.
    pub read: Arc<[f32]>,
    /// `c`, `[k]`
    pub offset: Box<[f32]>,
    /// `g` of each column, `[k]`
    pub response: Box<[Response]>,
    /// `γ`: 1 but for a `switch`, whose matrices are the same at every strength.
    pub gain: f32,
    pub write: Write,
    /// `b`, `[width]`
    pub bias: Option<Box<[f32]>>,
}

/// `U` of a [`LowRank`].
#[derive(Debug, Clone, PartialEq)]
pub enum Write {
    /// `Uᵀ`, `[k, width]`
    Columns(Arc<[f32]>),
    /// `U = 1`, with `k` the width.
    Identity,
}

/// One element of `g`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Response {
    /// `p`
    Identity,
    /// `max(p, 0)`
    Relu,
    /// `clip(p, low, high) − p`
    Clip { low: f32, high: f32 },
}

/// `x` turned by an angle towards the unit vector `v̂` (below 0: away from it) in the plane of both, no further than to `±v̂`.
///
/// With `p = v̂·x`, `r = x − p v̂`, `ρ = ‖r‖` and `n = ‖x‖`, an angle `α` takes `(p, ρ)` to `(p cos α + ρ sin α, ρ cos α − p sin α)`, or
/// to `(±n, 0)` where the second is not above 0. A row with no `r` stays: it has no plane to turn in.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotate {
    /// `v̂`, `[width]`
    pub direction: Arc<[f32]>,
    pub sin: f32,
    pub cos: f32,
}

/// `ρ/n` at and below which a row counts as lying on `v̂`: there `r` is rounding.
pub const ON_AXIS: f32 = 1e-6;

impl Response {
    pub fn at(self, p: f32) -> f32 {
        match self {
            Self::Identity => p,
            Self::Relu => p.max(0.0),
            Self::Clip { low, high } => p.clamp(low, high) - p,
        }
    }
}

impl LowRank {
    /// `k`
    pub fn rank(&self) -> usize {
        self.offset.len()
    }
}

impl Rotate {
    /// Where `(p, ρ)` goes, with `n = √(p² + ρ²)`.
    pub fn turned(&self, p: f32, rho: f32) -> (f32, f32) {
        let across = rho * self.cos - p * self.sin;
        if across > 0.0 { (p * self.cos + rho * self.sin, across) } else { (p.hypot(rho).copysign(self.sin), 0.0) }
    }
}

impl Program {
    /// The guards that were compiled, in the order in which they act.
    pub fn guards(&self) -> &[GuardInfo] {
        &self.guards
    }

    /// Names of the guards, as an error or a log line has them.
    pub fn name(&self) -> String {
        let names: Vec<&str> = self.guards.iter().map(|guard| guard.name.as_str()).collect();
        names.join(" + ")
    }

    pub fn width(&self) -> HiddenSize {
        self.width
    }

    /// What a run-time fault means: a stack passes only where all its guards say so.
    pub fn on_error(&self) -> OnError {
        let passes = !self.guards.is_empty() && self.guards.iter().all(|guard| guard.on_error == OnError::Pass);
        if passes { OnError::Pass } else { OnError::Block }
    }

    pub fn gates(&self) -> &[Gate] {
        &self.gates
    }

    /// Texts that patches look for in prompts.
    pub fn texts(&self) -> &[Box<[u8]>] {
        &self.texts
    }

    /// Hook points in the order of their layers, each layer once.
    pub fn points(&self) -> &[HookPoint] {
        &self.points
    }

    /// The gate of `other` that reads the very same as gate number `gate`, whatever it makes of it.
    fn gate_that_reads_alike(&self, gate: usize, other: &Self) -> Option<usize> {
        let alike = |index: &usize| {
            let (own, its) = (&self.gates[gate], &other.gates[*index]);
            let same_tokens = match (own.scope, its.scope) {
                (Scope::Prompt(_), Scope::Prompt(_)) => true,
                (Scope::Token { positions: own, .. }, Scope::Token { positions: its, .. }) => own == its,
                _ => false,
            };
            let (own_direction, its_direction) = (self.direction(gate), other.direction(*index));
            same_tokens && own.layer == its.layer && own_direction.is_some() && own_direction == its_direction
        };
        (0..other.gates.len()).find(alike)
    }

    /// The direction that gate number `gate` reads along.
    fn direction(&self, gate: usize) -> Option<&[f32]> {
        let point = self.point(self.gates[gate].layer)?;
        point.readouts.iter().find(|readout| readout.gate == gate).map(|readout| &*readout.direction)
    }

    /// What happens at `layer`, if anything.
    pub fn point(&self, layer: LayerIndex) -> Option<&HookPoint> {
        let index = self.points.binary_search_by_key(&layer, |point| point.layer).ok()?;
        self.points.get(index)
    }
}
