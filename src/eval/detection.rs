use crate::engine::{Model, Session, SessionOptions};
use crate::guard::Guard;
use crate::learn::{LearnError, Progress, contrast, last_token_activations};
use crate::tensor::{LayerIndex, auc, dot, quantile};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

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

/// Prompts for the model's own direction, the control that a mapped one is held against: those the guard was made from.
#[derive(Debug, Clone, Copy)]
pub struct Native<'a> {
    pub positive: &'a [String],
    pub negative: &'a [String],
}

/// Directions of the random control.
const RANDOM_DIRECTIONS: u64 = 100;

/// Scores `positive` and `negative` with every gate of `guard` on `model`, and with the controls at the gate's layer: the model's own
/// direction, if `native` prompts are given, and random ones (median and 95th percentile over 100 seeds).
///
/// # Errors
/// The guard is not for this model, or a prompt can't be run.
pub fn detection(
    model: &Model,
    guard: &Guard,
    positive: &[String],
    negative: &[String],
    native: Option<Native<'_>>,
    progress: Progress<'_>,
) -> Result<Detection, LearnError> {
    let total = 2 * (positive.len() + negative.len())
        + native.map_or(0, |native| native.positive.len() + native.negative.len());
    let mut done = 0;
    let mut session = Session::new(model, Some(guard), SessionOptions::default())?;
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

    let mut layers: Vec<LayerIndex> = guard.gates().iter().map(|gate| guard.vectors()[gate.vector].layer).collect();
    layers.sort_unstable();
    layers.dedup();
    let positive_rows = last_token_activations(model, &layers, positive, &mut |step, _| progress(done + step, total))?;
    done += positive.len();
    let negative_rows = last_token_activations(model, &layers, negative, &mut |step, _| progress(done + step, total))?;
    done += negative.len();
    let own = native
        .map(|native| {
            let step = &mut |step, _| progress(done + step, total);
            contrast(model, &layers, "native", native.positive, native.negative, step)
        })
        .transpose()?;

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
    for layer in layers.iter().copied() {
        let separation = |direction: &[f32]| {
            let scores = |rows: crate::tensor::Residual<'_>| -> Vec<f64> {
                rows.rows().map(|row| f64::from(dot(row, direction))).collect()
            };
            auc(&scores(positive_rows.layer(layer)), &scores(negative_rows.layer(layer)))
        };
        let at = layers.iter().position(|known| *known == layer).expect("one of them");
        if let Some(own) = &own {
            let (vector, scale) = (&own.vectors[at].values, &own.standardization[at]);
            for (name, direction) in [("", vector.clone()), (", standardized", scale.readout(vector))] {
                let name = format!("the model's own direction{name}");
                rows.push(DetectionRow { name, layer, auc: separation(&direction), fired: None });
            }
        }
        let random: Vec<f64> = (0..RANDOM_DIRECTIONS)
            .map(|seed| separation(&random_direction(positive_rows.layer(layer).width(), seed)))
            .collect();
        for (name, q) in [("random direction, median", 0.5), ("random direction, 95th percentile", 0.95)] {
            rows.push(DetectionRow { name: name.into(), layer, auc: quantile(&random, q), fired: None });
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

/// A direction drawn evenly from the sphere: each component normal (Box–Muller).
fn random_direction(width: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = || (f64::from(rng.next_u32()) + 1.0) / (f64::from(u32::MAX) + 2.0);
    (0..width).map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32).collect()
}
