use crate::engine::{Activations, Model, Session, SessionOptions};
use crate::guard::{Aggregate, GateScope, Guard};
use crate::learn::{Classes, ContrastMethod, ContrastOptions, LearnError, Progress, contrast_of, prompt_activations};
use crate::steering::{DEFAULT_SHRINKAGE, PromptTokens};
use crate::tensor::{LayerIndex, Residual, auc, dot, quantile};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::collections::BTreeSet;

/// How well a guard's gates tell positive prompts from negative ones, beside what else could do it.
#[derive(Debug, Clone, Serialize)]
pub struct Detection {
    pub guard: String,
    pub model: String,
    pub n_positive: usize,
    pub n_negative: usize,
    pub rows: Vec<DetectionRow>,
}

#[derive(Debug, Clone, Serialize)]
pub struct DetectionRow {
    /// The gate, or the control.
    pub name: String,
    pub layer: LayerIndex,
    /// Area under the ROC curve.
    pub auc: f64,
    /// Share of positive prompts that fire, and of negative ones. `None` for controls, which have no threshold.
    pub fired: Option<(f64, f64)>,
}

/// Directions of the random control.
const RANDOM_DIRECTIONS: u64 = 100;

/// Scores prompts with every gate of `guard` on `model`, and with the controls at the gate's layer and tokens: the model's own
/// direction and discriminant, if `native` prompts are given, those that the guard was made from, and random directions (median and 95th percentile over 100 seeds).
///
/// # Errors
/// The guard is not for this model, or a prompt can't be run.
pub fn detection(
    model: &Model,
    guard: &Guard,
    Classes { positive, negative }: Classes<'_>,
    native: Option<Classes<'_>>,
    progress: Progress<'_>,
) -> Result<Detection, LearnError> {
    let total = 2 * (positive.len() + negative.len())
        + native.map_or(0, |native| native.positive.len() + native.negative.len());
    let mut done = 0;
    let mut session = Session::new(model, &[guard], SessionOptions::default())?;
    let mut read = |prompts: &[String]| -> Result<Vec<Vec<(f64, bool)>>, LearnError> {
        let mut gates = vec![Vec::new(); guard.gates().len()];
        for (index, prompt) in prompts.iter().enumerate() {
            for (gate, reading) in gates.iter_mut().zip(session.score(&model.prompt_tokens(prompt)?)?) {
                let score = reading.score.ok_or(LearnError::NothingRead { gate: reading.gate, index })?;
                gate.push((score, reading.fired));
            }
            done += 1;
            progress(done, total);
        }
        Ok(gates)
    };
    let (positive_readings, negative_readings) = (read(positive)?, read(negative)?);

    let mut rows = Vec::new();
    for ((gate, positive), negative) in guard.gates().iter().zip(&positive_readings).zip(&negative_readings) {
        let scores = |readings: &[(f64, bool)]| -> Vec<f64> { readings.iter().map(|reading| reading.0).collect() };
        let share = |readings: &[(f64, bool)]| {
            readings.iter().filter(|reading| reading.1).count() as f64 / readings.len() as f64
        };
        rows.push(DetectionRow {
            name: format!("gate `{}`", gate.name),
            layer: guard.vectors()[gate.vector].layer,
            auc: auc(&scores(positive), &scores(negative)),
            fired: Some((share(positive), share(negative))),
        });
    }
    // What the controls read: once for all gates at the same layer and tokens.
    for tokens in [PromptTokens::Last, PromptTokens::Mean] {
        let layers: BTreeSet<LayerIndex> = guard
            .gates()
            .iter()
            .filter(|gate| tokens_of(gate.scope) == tokens)
            .map(|gate| guard.vectors()[gate.vector].layer)
            .collect();
        if layers.is_empty() {
            continue;
        }
        let layers: Vec<LayerIndex> = layers.into_iter().collect();
        let mut read = |prompts: &[String]| -> Result<Activations, LearnError> {
            let read =
                prompt_activations(model, &layers, prompts, &tokens, &mut |step, _| progress(done + step, total))?;
            done += prompts.len();
            Ok(read)
        };
        let (positive, negative) = (read(positive)?, read(negative)?);
        let own = match native {
            Some(native) => own_directions(&layers, &read(native.positive)?, &read(native.negative)?, &tokens)?,
            None => Vec::new(),
        };
        for layer in layers {
            let separation = |direction: &[f32]| {
                let scores = |rows: Residual<'_>| -> Vec<f64> {
                    rows.rows().map(|row| f64::from(dot(row, direction))).collect()
                };
                auc(&scores(positive.layer(layer)), &scores(negative.layer(layer)))
            };
            for OwnVector { name, values, .. } in own.iter().filter(|own| own.layer == layer) {
                let name = format!("the model's own {name}");
                rows.push(DetectionRow { name, layer, auc: separation(values), fired: None });
            }
            let width = positive.layer(layer).width();
            let random: Vec<f64> =
                (0..RANDOM_DIRECTIONS).map(|seed| separation(&random_direction(width, seed))).collect();
            for (name, q) in [("random direction, median", 0.5), ("random direction, 95th percentile", 0.95)] {
                rows.push(DetectionRow { name: name.into(), layer, auc: quantile(&random, q), fired: None });
            }
        }
    }
    Ok(Detection {
        guard: guard.name().into(),
        model: model.identity().name.clone(),
        n_positive: positive.len(),
        n_negative: negative.len(),
        rows,
    })
}

/// The tokens that a control of a gate reads: those of the gate, but for a maximum, which no direction is learnt on.
fn tokens_of(scope: GateScope) -> PromptTokens {
    match scope {
        GateScope::Prompt(Aggregate::Mean) => PromptTokens::Mean,
        GateScope::Prompt(Aggregate::Last | Aggregate::Max) | GateScope::Token { .. } => PromptTokens::Last,
    }
}

/// A control made from the guarded model's own activations.
struct OwnVector {
    name: &'static str,
    layer: LayerIndex,
    values: Vec<f32>,
}

/// What the model itself gives from the prompts that the guard was made from: its direction, the same in units of each dimension's
/// standard deviation, and its discriminant.
fn own_directions(
    layers: &[LayerIndex],
    positive: &Activations,
    negative: &Activations,
    tokens: &PromptTokens,
) -> Result<Vec<OwnVector>, LearnError> {
    let by = |method| {
        let options = ContrastOptions { method, tokens: tokens.clone(), ..Default::default() };
        contrast_of(layers, "own", positive, negative, options)
    };
    let means = by(ContrastMethod::DifferenceOfMeans)?;
    let discriminants = by(ContrastMethod::LinearDiscriminant { shrinkage: DEFAULT_SHRINKAGE })?;
    let mut own = Vec::new();
    for (vector, scale) in means.vectors.iter().zip(&means.standardization) {
        own.push(OwnVector { name: "direction", layer: vector.layer, values: vector.values.clone() });
        let values = scale.readout(&vector.values);
        own.push(OwnVector { name: "direction, standardized", layer: vector.layer, values });
    }
    own.extend(discriminants.vectors.into_iter().map(|vector| OwnVector {
        name: "discriminant",
        layer: vector.layer,
        values: vector.values,
    }));
    Ok(own)
}

/// A direction drawn evenly from the sphere: each component normal (Box–Muller).
fn random_direction(width: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = || (f64::from(rng.next_u32()) + 1.0) / (f64::from(u32::MAX) + 2.0);
    (0..width).map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32).collect()
}
