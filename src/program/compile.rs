use super::form::{Form, switch};
use super::{Condition, Dial, Gate, GuardInfo, HookPoint, MAX_TEXTS, Positions, Program, Readout, Scope, ToggleError};
use crate::guard::{self, Aggregate, GateScope, Guard, Intervention, InterventionKind};
use crate::mapping::ResidualMap;
use crate::tensor::{self, HiddenSize, LayerIndex};
use std::collections::BTreeMap;
use std::sync::Arc;

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
    #[error("guard `{guard}`: {what} acts at layer {layer}, but the model's layers are 0 to {last}")]
    Layer { guard: String, what: String, layer: LayerIndex, last: u32 },
    #[error("guard `{guard}`: {what} has {found} values, but the model's residual has {expected}")]
    Width { guard: String, what: String, expected: HiddenSize, found: usize },
    #[error("guard `{guard}`: gate `{gate}` is not calibrated: it has no `{missing}`; run `pilotfish calibrate`")]
    NotCalibrated { guard: String, gate: String, missing: &'static str },
    #[error(
        "guard `{guard}`: gate `{gate}` takes {reads} at layer {layer}, the model's last, where llama.cpp keeps only tokens with logits; use an earlier layer, or `last`"
    )]
    LastLayer { guard: String, gate: String, reads: &'static str, layer: LayerIndex },
    #[error("guard `{guard}`: vector `{vector}` has no direction: its norm is zero or not finite")]
    NoDirection { guard: String, vector: String },
    #[error(
        "guard `{guard}`: intervention `{intervention}` acts at layer {layer}, before gate `{gate}` is read at layer {read}: move it to layer {read} or later, or let it act on generated tokens alone and the gate decide over the prompt"
    )]
    BeforeGate { guard: String, intervention: String, layer: LayerIndex, gate: String, read: LayerIndex },
    #[error("guard `{name}` is there twice")]
    SameGuard { name: String },
    #[error("more than {MAX_TEXTS} different texts that interventions act on")]
    TooManyTexts,
    #[error("guard `{guard}`: intervention `{intervention}` has values that do not fit in `f32`")]
    Overflow { guard: String, intervention: String },
    /// The strengths that the guards have.
    #[error(transparent)]
    Strengths(#[from] ToggleError),
}

/// Gates, each with its guard's name, that have no figures of the quantization that they are to run on and go by their default ones.
#[derive(Debug)]
pub struct Uncalibrated<'a> {
    quantization: &'a str,
    gates: Vec<(&'a str, &'a str)>,
}

impl Uncalibrated<'_> {
    /// Writes a warning of each.
    pub fn warn(&self) {
        let quantization = self.quantization;
        for (guard, gate) in &self.gates {
            tracing::warn!(
                "guard `{guard}`: gate `{gate}` is not calibrated on {quantization}, so its default figures are used; run `pilotfish calibrate`"
            );
        }
    }
}

impl Program {
    /// A program that reads and patches nothing, for reading activations through the hook.
    pub fn observer(shape: ModelShape) -> Self {
        Self {
            guards: Vec::new(),
            width: shape.n_embd,
            gates: Vec::new(),
            points: Vec::new(),
            texts: Vec::new(),
            dials: Arc::new([]),
            strengths: Vec::new(),
        }
    }

    /// A program of switches alone, for fitting the next one: each of `maps` leads from its layer to the same one.
    ///
    /// # Errors
    /// Two at one layer, or one that does not fit in `f32`.
    pub fn switching(shape: ModelShape, maps: &[ResidualMap]) -> Result<Self, ToggleError> {
        let condition = || Condition { positions: Positions::All, when: None, first_position: false };
        let dial = |map: &ResidualMap| {
            let (layer, form) = (map.target_layer(), Form::Switch(switch(map)));
            Dial { name: format!("switch.{layer}"), layer, loaded: 1.0, condition: condition(), form }
        };
        let dials: Arc<[Dial]> = maps.iter().map(dial).collect();
        let program = Self { strengths: vec![0.0; dials.len()], dials, ..Self::observer(shape) };
        program.at(vec![1.0; maps.len()])
    }

    /// Compiles `guard` for a model of `shape`.
    ///
    /// # Errors
    /// As [`stack`](Self::stack).
    pub fn compile(guard: &Guard, shape: ModelShape, calibration: Calibration) -> Result<Self, CompileError> {
        Self::stack(&[guard], shape, calibration)
    }

    /// [`stack`](Self::stack) of `guards` by their figures of that quantization, and which gates have none.
    ///
    /// # Errors
    /// As there.
    pub fn stack_for<'a>(
        guards: &[&'a Guard],
        quantization: &'a str,
        shape: ModelShape,
        calibration: Calibration,
    ) -> Result<(Self, Uncalibrated<'a>), CompileError> {
        let of_this_file: Vec<_> = guards.iter().map(|guard| guard.calibrated_for(quantization)).collect();
        let calibrated: Vec<&Guard> = of_this_file.iter().map(|(guard, _)| guard.as_ref()).collect();
        let program = Self::stack(&calibrated, shape, calibration)?;
        let of_each = guards.iter().zip(of_this_file);
        let gates =
            of_each.flat_map(|(guard, (_, gates))| gates.into_iter().map(|gate| (guard.name(), gate))).collect();
        Ok((program, Uncalibrated { quantization, gates }))
    }

    /// Compiles `guards` into one program for a model of `shape`. They act in the order given.
    ///
    /// All gates of a layer are read before any patch of that layer acts, also those of other guards, and after the patches of earlier
    /// layers. Patches act in the order of the guards, within one in the order of its interventions. An intervention of strength 0 compiles
    /// to nothing, so that it leaves the residual as it is to the last bit, and can be [turned on](Self::with_setting).
    ///
    /// # Errors
    /// A layer or width that the model does not have, a gate without calibration where it is required, an intervention before a gate that
    /// it waits for, two switches at one layer, one guard twice, or more than [`MAX_TEXTS`] texts to look for.
    pub fn stack(guards: &[&Guard], shape: ModelShape, calibration: Calibration) -> Result<Self, CompileError> {
        let mut program = Self::observer(shape);
        let mut points = BTreeMap::new();
        let mut dials = Vec::new();
        for (index, guard) in guards.iter().enumerate() {
            if guards[..index].iter().any(|other| other.name() == guard.name()) {
                return Err(CompileError::SameGuard { name: guard.name().into() });
            }
            let compiling = Compiling { guard, shape, calibration, stacked: guards.len() > 1 };
            compiling.check_shape()?;
            let first_gate = program.gates.len();
            for gate in guard.gates() {
                let (compiled, direction) = compiling.gate(index, gate, &mut program.texts)?;
                let readout = Readout { gate: program.gates.len(), direction: direction.into() };
                point_at(&mut points, compiled.layer).readouts.push(readout);
                program.gates.push(compiled);
            }
            for intervention in guard.interventions() {
                let layer = guard.layer_of(intervention);
                compiling.check_order(intervention, layer)?;
                let condition = Condition {
                    positions: positions(&intervention.positions, &mut program.texts)?,
                    when: intervention.when.as_ref().map(|rule| rule.shifted(first_gate)),
                    first_position: intervention.first_position,
                };
                let name = compiling.qualified(&intervention.name);
                let form = compiling.form(intervention)?;
                dials.push(Dial { name, layer, loaded: intervention.strength, condition, form });
            }
            program.guards.push(GuardInfo {
                name: guard.name().into(),
                content_hash: guard.content_hash(),
                on_error: guard.on_error(),
                message: guard.message().map(Into::into),
            });
        }
        program.points = points.into_values().collect();
        let strengths = dials.iter().map(|dial| dial.loaded).collect();
        program.strengths = vec![0.0; dials.len()];
        program.dials = dials.into();
        Ok(program.at(strengths)?)
    }
}

fn point_at(points: &mut BTreeMap<LayerIndex, HookPoint>, layer: LayerIndex) -> &mut HookPoint {
    points.entry(layer).or_insert_with(|| HookPoint { layer, readouts: Vec::new(), patches: Vec::new() })
}

/// `positions` as the program has them, its text among `texts`.
fn positions(positions: &guard::Positions, texts: &mut Vec<Box<[u8]>>) -> Result<Positions, CompileError> {
    let text = match positions {
        guard::Positions::All => return Ok(Positions::All),
        guard::Positions::Prompt => return Ok(Positions::Prompt),
        guard::Positions::Generated => return Ok(Positions::Generated),
        guard::Positions::Matching(text) => text.as_bytes(),
    };
    let index = texts.iter().position(|known| **known == *text).unwrap_or(texts.len());
    if index == MAX_TEXTS {
        return Err(CompileError::TooManyTexts);
    }
    if index == texts.len() {
        texts.push(text.into());
    }
    Ok(Positions::Matching(index))
}

/// One guard on its way into a program.
struct Compiling<'a> {
    guard: &'a Guard,
    shape: ModelShape,
    calibration: Calibration,
    /// Whether other guards are in the program too.
    stacked: bool,
}

impl Compiling<'_> {
    fn name(&self) -> String {
        self.guard.name().to_owned()
    }

    /// The name of a gate or an intervention in the program.
    fn qualified(&self, name: &str) -> String {
        if self.stacked { format!("{}/{name}", self.guard.name()) } else { name.to_owned() }
    }

    fn check_shape(&self) -> Result<(), CompileError> {
        let vectors = self.guard.vectors().iter();
        let vectors = vectors.map(|vector| ("vector", &vector.name, vector.layer, vector.direction.len()));
        let maps = self.guard.switches().iter();
        let maps = maps.map(|switch| ("mapping", &switch.name, switch.map.target_layer(), switch.map.target_width()));
        for (what, name, layer, found) in vectors.chain(maps) {
            let what = || format!("{what} `{name}`");
            if layer.0 >= self.shape.n_layer {
                let last = self.shape.n_layer - 1;
                return Err(CompileError::Layer { guard: self.name(), what: what(), layer, last });
            }
            if found != self.shape.n_embd.0 {
                let expected = self.shape.n_embd;
                return Err(CompileError::Width { guard: self.name(), what: what(), expected, found });
            }
        }
        Ok(())
    }

    fn unit(&self, vector: usize, direction: &[f32]) -> Result<Box<[f32]>, CompileError> {
        let no_direction =
            || CompileError::NoDirection { guard: self.name(), vector: self.guard.vectors()[vector].name.clone() };
        Ok(tensor::unit(direction).ok_or_else(no_direction)?.into_boxed_slice())
    }

    fn gate(
        &self,
        guard: usize,
        gate: &guard::Gate,
        texts: &mut Vec<Box<[u8]>>,
    ) -> Result<(Gate, Box<[f32]>), CompileError> {
        let layer = self.guard.vectors()[gate.vector].layer;
        let reads = match gate.scope {
            GateScope::Prompt(Aggregate::Last) => None,
            GateScope::Prompt(Aggregate::Mean) => Some("the mean over the prompt"),
            GateScope::Prompt(Aggregate::Max) => Some("the maximum over the prompt"),
            GateScope::Token { .. } => Some("each token"),
        };
        if let Some(reads) = reads.filter(|_| layer.0 + 1 == self.shape.n_layer) {
            return Err(CompileError::LastLayer { guard: self.name(), gate: gate.name.clone(), reads, layer });
        }
        let missing = |missing| CompileError::NotCalibrated { guard: self.name(), gate: gate.name.clone(), missing };
        let (mean, deviation, threshold) = match self.calibration {
            Calibration::Ignored => (0.0, 1.0, None),
            Calibration::Required => {
                let benign = gate.calibration.ok_or_else(|| missing("mean` and `deviation"))?;
                let threshold = gate.threshold.ok_or_else(|| missing("threshold"))?;
                (benign.mean, benign.deviation, Some(threshold))
            }
        };
        let scope = match &gate.scope {
            GateScope::Prompt(aggregate) => Scope::Prompt(*aggregate),
            GateScope::Token { positions: read, release } => {
                // A threshold lowered since by calibration takes the release with it.
                let threshold = threshold.unwrap_or(f64::INFINITY);
                Scope::Token {
                    positions: positions(read, texts)?,
                    release: release.unwrap_or(threshold).min(threshold),
                }
            }
        };
        let name = self.qualified(&gate.name);
        let compiled = Gate { name, guard, layer, scope, mean, deviation, threshold, on_fire: gate.on_fire };
        Ok((compiled, self.unit(gate.vector, &gate.direction)?))
    }

    /// An intervention and the gates that it waits for may share a layer, where gates come first. One on generated tokens alone may lie
    /// before gates of the prompt, which have decided when the first of them comes.
    fn check_order(&self, intervention: &Intervention, layer: LayerIndex) -> Result<(), CompileError> {
        for gate in intervention.when.iter().flat_map(guard::Rule::gates) {
            let gate = &self.guard.gates()[gate];
            let read = self.guard.vectors()[gate.vector].layer;
            let decided =
                intervention.positions == guard::Positions::Generated && matches!(gate.scope, GateScope::Prompt(_));
            if layer < read && !decided {
                return Err(CompileError::BeforeGate {
                    guard: self.name(),
                    intervention: intervention.name.clone(),
                    layer,
                    gate: gate.name.clone(),
                    read,
                });
            }
        }
        Ok(())
    }

    /// What `intervention` is at no strength in particular.
    fn form(&self, intervention: &Intervention) -> Result<Form, CompileError> {
        let vector = |index: usize| &self.guard.vectors()[index].direction;
        let unit = |index: usize| self.unit(index, vector(index)).map(Arc::from);
        let form = match intervention.kind {
            InterventionKind::Add { vector: index } => {
                Form::Add { vector: vector(index).as_slice().into(), deviation: intervention.deviation }
            }
            InterventionKind::Ablate { vector: index, mean } => Form::Ablate { unit: unit(index)?, mean },
            InterventionKind::Clamp { vector: index, low, high } => Form::Clamp { unit: unit(index)?, low, high },
            InterventionKind::Rotate { vector: index, angle } => Form::Rotate { unit: unit(index)?, angle },
            InterventionKind::Switch { map } => Form::Switch(switch(&self.guard.switches()[map].map)),
        };
        if form.is_finite() {
            return Ok(form);
        }
        Err(CompileError::Overflow { guard: self.name(), intervention: intervention.name.clone() })
    }
}
