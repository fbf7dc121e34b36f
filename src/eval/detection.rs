use super::EvalError;
use super::controls::{Role, random_direction, wrong_layer};
use super::metrics::{Proportion, Separation, roc, separation, separation_over_seeds};
use crate::engine::{Activations, Model, Prompt, Session, SessionOptions};
use crate::guard::{Aggregate, Gate, GateScope, Guard};
use crate::learn::{
    Classes, ContrastMethod, ContrastOptions, GateScore, Progress, contrast_of, gate_scores, prompt_activations,
};
use crate::steering::{DEFAULT_SHRINKAGE, PromptTokens};
use crate::tensor::{LayerIndex, Residual, auc, dot, norm};
use serde::{Deserialize, Serialize};

/// How well a guard's gates tell positive prompts from negative ones, beside what else could do it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Detection {
    pub guard: String,
    pub model: String,
    pub n_positive: usize,
    pub n_negative: usize,
    /// Negative prompts that look like positive ones; 0 where none were given.
    pub n_look_alike: usize,
    pub rows: Vec<DetectionRow>,
    pub gates: Vec<GateScores>,
    /// Each gate's direction read at every layer that it can be read at.
    pub layers: Vec<LayerSeparation>,
}

/// A gate or a control.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DetectionRow {
    pub name: String,
    pub role: Role,
    pub layer: LayerIndex,
    /// Area under the ROC curve.
    pub auc: f64,
    /// Share of positive prompts that fire, and of negative ones. `None` for controls, which have no threshold.
    pub fired: Option<(f64, f64)>,
    /// Positive against negative prompts. Of random directions, the mean over the seeds and their 5th to 95th percentile.
    pub separation: Separation,
    /// Positive against look-alike prompts.
    pub look_alike: Option<Separation>,
    pub fires: Option<Fires>,
    /// Corners of the ROC curve, as false-positive and true-positive rate. None of random directions.
    pub roc: Vec<[f64; 2]>,
}

/// Shares of prompts at which a gate fires.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fires {
    pub positive: Proportion,
    pub negative: Proportion,
    pub look_alike: Option<Proportion>,
}

/// What a gate made of every prompt, in benign standard deviations.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GateScores {
    pub gate: String,
    pub layer: LayerIndex,
    pub threshold: Option<f64>,
    pub positive: Vec<f64>,
    pub negative: Vec<f64>,
    pub look_alike: Vec<f64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerSeparation {
    pub gate: String,
    pub layer: LayerIndex,
    pub auc: f64,
}

/// What a detection is measured on, and with which controls.
#[derive(Debug, Clone, Copy)]
pub struct DetectionInput<'a> {
    pub classes: Classes<'a>,
    /// Negative prompts that look like positive ones; may be none.
    pub look_alike: &'a [Prompt],
    /// The prompts that the guard was made from, for the model's own direction.
    pub native: Option<Classes<'a>>,
    pub control_seeds: u64,
    /// Of the bootstrap.
    pub seed: u64,
}

/// Scores prompts with every gate of `guard` on `model`, and with controls at the gate's tokens: the model's own direction and discriminant, if
/// the prompts are given that the guard was made from; the gate's own direction at a wrong layer; random directions.
///
/// # Errors
/// The guard is not for this model, a class has no prompts, or one can't be run.
pub fn detection(
    model: &Model,
    guard: &Guard,
    input: DetectionInput<'_>,
    progress: Progress<'_>,
) -> Result<Detection, EvalError> {
    let Classes { positive, negative } = input.classes;
    for (what, prompts) in [("the positive class", positive), ("the negative class", negative)] {
        if prompts.is_empty() {
            return Err(EvalError::NoPrompts { what });
        }
    }
    let n_prompts = positive.len() + negative.len() + input.look_alike.len();
    let n_native = input.native.map_or(0, |native| native.positive.len() + native.negative.len());
    let readings = |tokens: &PromptTokens| guard.gates().iter().any(|gate| tokens_of(&gate.scope) == *tokens);
    let kinds: Vec<PromptTokens> = [PromptTokens::Last, PromptTokens::Mean].into_iter().filter(readings).collect();
    let mut steps = Steps { done: 0, total: n_prompts + kinds.len() * (n_prompts + n_native), progress };

    let mut session = Session::new(model, &[guard], SessionOptions::default())?;
    let mut read = |prompts: &[Prompt]| gate_scores(model, &mut session, prompts, &mut || steps.step());
    let of_gates =
        ThreeClasses { positive: read(positive)?, negative: read(negative)?, look_alike: read(input.look_alike)? };
    drop(session);

    let mut found = Detection {
        guard: guard.name().into(),
        model: model.identity().name.clone(),
        n_positive: positive.len(),
        n_negative: negative.len(),
        n_look_alike: input.look_alike.len(),
        rows: Vec::new(),
        gates: Vec::new(),
        layers: Vec::new(),
    };
    for (index, gate) in guard.gates().iter().enumerate() {
        let (row, scores) = gate_row(guard, gate, index, &of_gates, input.seed);
        found.rows.push(row);
        found.gates.push(scores);
    }
    for tokens in kinds {
        controls(model, guard, input, &tokens, &mut steps, &mut found)?;
    }
    Ok(found)
}

/// Of positive, negative and look-alike prompts.
struct ThreeClasses<T> {
    positive: T,
    negative: T,
    look_alike: T,
}

impl<T> ThreeClasses<T> {
    fn map<U>(&self, each: impl Fn(&T) -> U) -> ThreeClasses<U> {
        ThreeClasses {
            positive: each(&self.positive),
            negative: each(&self.negative),
            look_alike: each(&self.look_alike),
        }
    }
}

type Scores = ThreeClasses<Vec<f64>>;

/// Progress through all prompts, however often each is read.
struct Steps<'a> {
    done: usize,
    total: usize,
    progress: Progress<'a>,
}

impl Steps<'_> {
    fn step(&mut self) {
        self.done += 1;
        (self.progress)(self.done, self.total);
    }
}

fn gate_row(
    guard: &Guard,
    gate: &Gate,
    index: usize,
    readings: &ThreeClasses<Vec<Vec<GateScore>>>,
    seed: u64,
) -> (DetectionRow, GateScores) {
    let scores = readings.map(|gates| gates[index].iter().map(|reading| reading.score).collect::<Vec<f64>>());
    let fired = readings.map(|gates| Proportion::of(gates[index].iter().map(|reading| reading.fired)));
    let layer = guard.vectors()[gate.vector].layer;
    let mut row = scored_row(format!("gate `{}`", gate.name), Role::Guard, layer, &scores, seed);
    row.fired = Some((fired.positive.share, fired.negative.share));
    let look_alike = (fired.look_alike.of > 0).then_some(fired.look_alike);
    row.fires = Some(Fires { positive: fired.positive, negative: fired.negative, look_alike });
    let ThreeClasses { positive, negative, look_alike } = scores;
    let (gate, threshold) = (gate.name.clone(), gate.threshold);
    (row, GateScores { gate, layer, threshold, positive, negative, look_alike })
}

/// A row of one direction, which decides nothing.
fn scored_row(name: String, role: Role, layer: LayerIndex, scores: &Scores, seed: u64) -> DetectionRow {
    let against_negative = separation(&scores.positive, &scores.negative, seed);
    let look_alike = !scores.look_alike.is_empty();
    DetectionRow {
        name,
        role,
        layer,
        auc: against_negative.auc.value,
        fired: None,
        separation: against_negative,
        look_alike: look_alike.then(|| separation(&scores.positive, &scores.look_alike, seed)),
        fires: None,
        roc: roc(&scores.positive, &scores.negative),
    }
}

/// Adds the controls of all gates that read `tokens`.
fn controls(
    model: &Model,
    guard: &Guard,
    input: DetectionInput<'_>,
    tokens: &PromptTokens,
    steps: &mut Steps<'_>,
    found: &mut Detection,
) -> Result<(), EvalError> {
    let n_layer = model.shape().n_layer;
    // Of a mean over the prompt, the last layer has not every token.
    let readable = if *tokens == PromptTokens::Mean { n_layer.saturating_sub(1) } else { n_layer };
    let layers: Vec<LayerIndex> = (0..readable).map(LayerIndex).collect();
    let mut read = |prompts: &[Prompt]| -> Result<Activations, EvalError> {
        Ok(prompt_activations(model, &layers, prompts, tokens, &mut |_, _| steps.step())?)
    };
    let activations = ThreeClasses {
        positive: read(input.classes.positive)?,
        negative: read(input.classes.negative)?,
        look_alike: read(input.look_alike)?,
    };
    let native = input.native.map(|native| Ok::<_, EvalError>((read(native.positive)?, read(native.negative)?)));
    let native = native.transpose()?;
    let scores = |layer: LayerIndex, direction: &[f32]| -> Scores {
        activations.map(|class| projections(class, layer, direction))
    };
    let mut done: Vec<LayerIndex> = Vec::new();
    for gate in guard.gates().iter().filter(|gate| tokens_of(&gate.scope) == *tokens) {
        let layer = guard.vectors()[gate.vector].layer;
        for at in &layers {
            let of_layer = scores(*at, &gate.direction);
            let separation = auc(&of_layer.positive, &of_layer.negative);
            found.layers.push(LayerSeparation { gate: gate.name.clone(), layer: *at, auc: separation });
        }
        // What a gate at the same layer has had already.
        let first = !done.contains(&layer);
        done.push(layer);
        if let Some((positive, negative)) = native.as_ref().filter(|_| first) {
            for OwnVector { name, values } in own_vectors(layer, positive, negative, tokens)? {
                let name = format!("the model's own {name}");
                found.rows.push(scored_row(name, Role::Native, layer, &scores(layer, &values), input.seed));
            }
        }
        let wrong = wrong_layer(layer, n_layer);
        let name = format!("wrong layer, as gate `{}`", gate.name);
        found.rows.push(scored_row(name, Role::WrongLayer, wrong, &scores(wrong, &gate.direction), input.seed));
        if first && input.control_seeds > 0 {
            let length = norm(&gate.direction);
            let random: Vec<Scores> = (0..input.control_seeds)
                .map(|seed| scores(layer, &random_direction(gate.direction.len(), length, seed)))
                .collect();
            found.rows.push(random_row(layer, random));
        }
    }
    Ok(())
}

fn random_row(layer: LayerIndex, random: Vec<Scores>) -> DetectionRow {
    let name = format!("random direction, mean of {}", random.len());
    let look_alike = random.iter().all(|scores| !scores.look_alike.is_empty());
    let (mut against_negative, mut against_look_alike) = (Vec::new(), Vec::new());
    for ThreeClasses { positive, negative, look_alike } in random {
        against_look_alike.push((positive.clone(), look_alike));
        against_negative.push((positive, negative));
    }
    let separation = separation_over_seeds(&against_negative);
    DetectionRow {
        name,
        role: Role::Random,
        layer,
        auc: separation.auc.value,
        fired: None,
        separation,
        look_alike: look_alike.then(|| separation_over_seeds(&against_look_alike)),
        fires: None,
        roc: Vec::new(),
    }
}

fn projections(class: &Activations, layer: LayerIndex, direction: &[f32]) -> Vec<f64> {
    // Of no prompts there is no width either.
    let n_rows = class.n_rows();
    let rows = (n_rows > 0).then(|| class.layer(layer));
    rows.iter().flat_map(Residual::rows).map(|row| f64::from(dot(row, direction))).collect()
}

/// The tokens that a control of a gate reads: those of the gate, but for a maximum, which no direction is learnt on.
fn tokens_of(scope: &GateScope) -> PromptTokens {
    match scope {
        GateScope::Prompt(Aggregate::Mean) => PromptTokens::Mean,
        GateScope::Prompt(Aggregate::Last | Aggregate::Max) | GateScope::Token { .. } => PromptTokens::Last,
    }
}

/// A control made from the guarded model's own activations.
struct OwnVector {
    name: &'static str,
    values: Vec<f32>,
}

/// What the model itself gives at `layer` from the prompts that the guard was made from: its direction, the same in units of each dimension's
/// standard deviation, and its discriminant.
fn own_vectors(
    layer: LayerIndex,
    positive: &Activations,
    negative: &Activations,
    tokens: &PromptTokens,
) -> Result<Vec<OwnVector>, EvalError> {
    let by = |method| {
        let options = ContrastOptions { method, tokens: tokens.clone(), ..Default::default() };
        contrast_of(&[layer], "own", positive, negative, options)
    };
    let means = by(ContrastMethod::DifferenceOfMeans)?;
    let discriminants = by(ContrastMethod::LinearDiscriminant { shrinkage: DEFAULT_SHRINKAGE })?;
    let mut own = Vec::new();
    for (vector, scale) in means.vectors.iter().zip(&means.standardization) {
        own.push(OwnVector { name: "direction", values: vector.values.clone() });
        own.push(OwnVector { name: "direction, standardized", values: scale.readout(&vector.values) });
    }
    let named = |values| OwnVector { name: "discriminant", values };
    own.extend(discriminants.vectors.into_iter().map(|vector| named(vector.values)));
    Ok(own)
}
