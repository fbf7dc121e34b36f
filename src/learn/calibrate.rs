use super::{LearnError, Progress};
use crate::engine::{GuardOptions, Model, Session, SessionOptions};
use crate::guard::Guard;
use crate::program::Calibration;
use crate::tensor::{mean_and_deviation, quantile};

/// A gate's benign statistics on the model that it guards.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibrated {
    pub gate: String,
    /// Mean and standard deviation of benign projections, aggregated as the gate does.
    pub mean: f64,
    pub deviation: f64,
    /// In those deviations: the benign quantile that was asked for.
    pub threshold: f64,
}

/// Sets every gate of `guard` on the benign prompts: the score's scale from their mean and deviation, the threshold at their
/// `benign_quantile` (0.95 lets one benign prompt in twenty fire).
///
/// Projections are read through the guard's own program on `model`, as they will be when it runs.
///
/// # Errors
/// Fewer than two prompts, prompts that all score alike, or a guard that is not for this model.
pub fn calibrate(
    model: &Model,
    guard: &Guard,
    benign: &[String],
    benign_quantile: f64,
    progress: Progress<'_>,
) -> Result<Vec<Calibrated>, LearnError> {
    let options = GuardOptions { calibration: Calibration::Ignored, probe: true };
    let mut session = Session::new(model, &[guard], SessionOptions { guard: options, ..Default::default() })?;
    let mut projections = vec![Vec::with_capacity(benign.len()); guard.gates().len()];
    for (index, prompt) in benign.iter().enumerate() {
        let readings = session.score(&model.prompt_tokens(prompt)?)?;
        for (gate, reading) in projections.iter_mut().zip(readings) {
            gate.push(reading.score.ok_or(LearnError::NothingRead { gate: reading.gate, index })?);
        }
        progress(index + 1, benign.len());
    }
    let calibrated = |(gate, projections): (&crate::guard::Gate, Vec<f64>)| {
        let too_few = LearnError::TooFewPrompts { what: "a calibration", needed: 2, found: projections.len() };
        let (mean, deviation) = mean_and_deviation(&projections).ok_or(too_few)?;
        if deviation <= 0.0 {
            return Err(LearnError::NoSpread { gate: gate.name.clone(), found: projections.len() });
        }
        let threshold = (quantile(&projections, benign_quantile) - mean) / deviation;
        Ok(Calibrated { gate: gate.name.clone(), mean, deviation, threshold })
    };
    guard.gates().iter().zip(projections).map(calibrated).collect()
}
