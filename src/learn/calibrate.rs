use super::operating::{RATES, operating_point, prompts_needed};
use super::{LearnError, Progress, gate_scores};
use crate::engine::{GuardOptions, Model, Prompt, Session, SessionOptions, quantization_of};
use crate::guard::{Gate, GateCalibration, Guard};
use crate::program::Calibration;
use crate::tensor::mean_and_deviation;

/// Which share of benign prompts may fire a gate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CalibrationOptions {
    /// From 0 to below 1.
    pub false_positive_rate: f64,
    /// That the share among all such prompts is no higher, and not just among those at hand: above 0, below 1.
    pub confidence: Option<f64>,
}

/// A gate's benign statistics on the model that it guards.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibrated {
    pub gate: String,
    /// Of the quantization that was loaded, the threshold at the rate that was asked for, with a table of others.
    pub calibration: GateCalibration,
}

/// Sets those gates of `guard` that are `wanted` on the benign prompts: the score's scale from their mean and deviation, the threshold by the share
/// of them that may fire. `positive` prompts, which may be none, say what share of them each threshold catches.
///
/// Projections are read through the guard's own program on `model`, as they will be when it runs.
///
/// # Errors
/// Too few prompts, prompts that all score alike, or a guard that is not for this model.
pub fn calibrate(
    model: &Model,
    guard: &Guard,
    wanted: impl Fn(&Gate) -> bool,
    benign: &[Prompt],
    positive: &[Prompt],
    options: CalibrationOptions,
    progress: Progress<'_>,
) -> Result<Vec<Calibrated>, LearnError> {
    let CalibrationOptions { false_positive_rate: rate, confidence } = options;
    if !guard.gates().iter().any(&wanted) {
        return Ok(Vec::new());
    }
    let needed = confidence.map_or(2, |confidence| prompts_needed(rate, confidence).max(2));
    if benign.len() < needed {
        return Err(LearnError::TooFewPrompts { what: "a calibration", needed, found: benign.len() });
    }
    let total = benign.len() + positive.len();
    let guard_options = GuardOptions { calibration: Calibration::Ignored, probe: true };
    let mut session = Session::new(model, &[guard], SessionOptions { guard: guard_options, ..Default::default() })?;
    let mut done = 0;
    let mut step = || {
        done += 1;
        progress(done, total);
    };
    let mut read = |prompts: &[Prompt]| -> Result<Vec<Vec<f64>>, LearnError> {
        let gates = gate_scores(model, &mut session, prompts, &mut step)?;
        Ok(gates.iter().map(|gate| gate.iter().map(|reading| reading.score).collect()).collect())
    };
    let (benign, positive) = (read(benign)?, read(positive)?);
    let quantization = quantization_of(model.llama());
    let calibrated = |((gate, benign), positive): ((&Gate, Vec<f64>), Vec<f64>)| {
        let found = benign.len();
        let no_spread = || LearnError::NoSpread { gate: gate.name.clone(), found };
        let (mean, deviation) = mean_and_deviation(&benign).filter(|(_, d)| *d > 0.0).ok_or_else(no_spread)?;
        let scores = |projections: Vec<f64>| -> Vec<f64> {
            projections.into_iter().map(|projection| (projection - mean) / deviation).collect()
        };
        let (benign, positive) = (scores(benign), scores(positive));
        let chosen = operating_point(&benign, &positive, rate, confidence);
        let chosen = chosen.ok_or(LearnError::TooFewPrompts { what: "a calibration", needed, found })?;
        let mut rates: Vec<f64> = RATES.into_iter().chain([rate]).collect();
        rates.sort_by(f64::total_cmp);
        rates.dedup();
        let points = rates.into_iter().filter_map(|rate| operating_point(&benign, &positive, rate, confidence));
        let calibration = GateCalibration {
            quantization: quantization.clone(),
            n_benign: found,
            mean,
            deviation,
            threshold: chosen.threshold,
            points: points.collect(),
        };
        Ok(Calibrated { gate: gate.name.clone(), calibration })
    };
    guard.gates().iter().zip(benign).zip(positive).filter(|((gate, _), _)| wanted(gate)).map(calibrated).collect()
}
