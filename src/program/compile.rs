use super::{Gate, HookPoint, Patch, PatchKind, Program, Readout, Response};
use crate::guard::{Aggregate, Guard, InterventionKind, OnError};
use crate::tensor::{self, HiddenSize, LayerIndex};
use std::collections::BTreeMap;

/// What a program must know of the model that it is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelShape {
    pub n_embd: HiddenSize,
    pub n_layer: u32,
}

/// What to do with a gate's calibration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Calibration {
    /// Scores are in benign standard deviations; a gate without calibration or threshold is an error.
    Required,
    /// Scores are bare projections and no gate fires: for measuring what calibration is made of.
    Ignored,
}

/// Why a guard can't run on a model of this shape.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    #[error("guard `{guard}`: vector `{vector}` acts at layer {layer}, but the model's layers are 0 to {last}")]
    Layer { guard: String, vector: String, layer: LayerIndex, last: u32 },
    #[error("guard `{guard}`: vector `{vector}` has {found} values, but the model's residual has {expected}")]
    Width { guard: String, vector: String, expected: HiddenSize, found: usize },
    #[error("guard `{guard}`: gate `{gate}` is not calibrated: it has no `{missing}`; run `pilotfish calibrate`")]
    NotCalibrated { guard: String, gate: String, missing: &'static str },
    #[error(
        "guard `{guard}`: gate `{gate}` takes the {aggregate} over the prompt at layer {layer}, the model's last, where llama.cpp keeps only the prompt's last token; use `last`, or an earlier layer"
    )]
    LastLayer { guard: String, gate: String, aggregate: &'static str, layer: LayerIndex },
    #[error("guard `{guard}`: vector `{vector}` has no direction: its norm is zero or not finite")]
    NoDirection { guard: String, vector: String },
}

impl Program {
    /// A program that reads and patches nothing, for reading activations through the hook.
    pub fn observer(shape: ModelShape) -> Self {
        Self {
            guard: "observer".into(),
            width: shape.n_embd,
            on_error: OnError::Block,
            message: None,
            gates: Vec::new(),
            points: Vec::new(),
        }
    }

    /// Compiles `guard` for a model of `shape`.
    ///
    /// Gates of a layer are read before its patches act. Patches act in the order of the guard's interventions. An
    /// intervention of strength 0 compiles to nothing, so that it leaves the residual as it is to the last bit.
    ///
    /// # Errors
    /// A layer or width that the model does not have, or a gate without calibration where it is required.
    pub fn compile(guard: &Guard, shape: ModelShape, calibration: Calibration) -> Result<Self, CompileError> {
        for vector in guard.vectors() {
            if vector.layer.0 >= shape.n_layer {
                return Err(CompileError::Layer {
                    guard: guard.name().into(),
                    vector: vector.name.clone(),
                    layer: vector.layer,
                    last: shape.n_layer - 1,
                });
            }
            if vector.direction.len() != shape.n_embd.0 {
                return Err(CompileError::Width {
                    guard: guard.name().into(),
                    vector: vector.name.clone(),
                    expected: shape.n_embd,
                    found: vector.direction.len(),
                });
            }
        }
        let unit = |vector: usize, direction: &[f32]| {
            let no_direction = || CompileError::NoDirection {
                guard: guard.name().into(),
                vector: guard.vectors()[vector].name.clone(),
            };
            Ok(tensor::unit(direction).ok_or_else(no_direction)?.into_boxed_slice())
        };

        let mut points = BTreeMap::<LayerIndex, HookPoint>::new();
        let mut point_at = |layer: LayerIndex, part: Part| {
            let point = points.entry(layer).or_insert(HookPoint { layer, readouts: Vec::new(), patches: Vec::new() });
            match part {
                Part::Readout(readout) => point.readouts.push(readout),
                Part::Patch(patch) => point.patches.push(patch),
            }
        };

        let mut gates = Vec::with_capacity(guard.gates().len());
        for (index, gate) in guard.gates().iter().enumerate() {
            let missing =
                |missing| CompileError::NotCalibrated { guard: guard.name().into(), gate: gate.name.clone(), missing };
            let layer = guard.vectors()[gate.vector].layer;
            let aggregate = match gate.aggregate {
                Aggregate::Last => None,
                Aggregate::Mean => Some("mean"),
                Aggregate::Max => Some("maximum"),
            };
            if let Some(aggregate) = aggregate.filter(|_| layer.0 + 1 == shape.n_layer) {
                let (guard, gate) = (guard.name().into(), gate.name.clone());
                return Err(CompileError::LastLayer { guard, gate, aggregate, layer });
            }
            let (mean, deviation, threshold) = match calibration {
                Calibration::Ignored => (0.0, 1.0, None),
                Calibration::Required => {
                    let benign = gate.calibration.ok_or_else(|| missing("mean` and `deviation"))?;
                    let threshold = gate.threshold.ok_or_else(|| missing("threshold"))?;
                    (benign.mean, benign.deviation, Some(threshold))
                }
            };
            gates.push(Gate {
                name: gate.name.clone(),
                layer,
                aggregate: gate.aggregate,
                mean,
                deviation,
                threshold,
                on_fire: gate.on_fire,
            });
            point_at(layer, Part::Readout(Readout { gate: index, direction: unit(gate.vector, &gate.direction)? }));
        }

        for intervention in guard.interventions() {
            let strength = intervention.strength;
            if strength == 0.0 {
                continue;
            }
            let vector = &guard.vectors()[intervention.vector];
            let kind = match intervention.kind {
                InterventionKind::Add => PatchKind::Shift(vector.direction.iter().map(|x| strength * x).collect()),
                InterventionKind::Ablate { mean } => PatchKind::RankOne {
                    direction: unit(intervention.vector, &vector.direction)?,
                    response: Response::Recentre { target: mean as f32, strength },
                },
                InterventionKind::Clamp { low, high } => PatchKind::RankOne {
                    direction: unit(intervention.vector, &vector.direction)?,
                    response: Response::Clip { low: low as f32, high: high as f32, strength },
                },
            };
            let patch = Patch {
                kind,
                positions: intervention.positions,
                when: intervention.when,
                first_position: intervention.first_position,
            };
            point_at(vector.layer, Part::Patch(patch));
        }

        Ok(Self {
            guard: guard.name().into(),
            width: shape.n_embd,
            on_error: guard.on_error(),
            message: guard.message().map(Into::into),
            gates,
            points: points.into_values().collect(),
        })
    }
}

enum Part {
    Readout(Readout),
    Patch(Patch),
}
