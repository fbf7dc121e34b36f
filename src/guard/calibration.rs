use super::error::GuardError;
use super::{Calibration, Guard};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// `[[gate.calibration]]`: what benign prompts gave on one quantization of the target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateCalibration {
    /// Of the model's file, as llama.cpp calls it: `Q4_K_M`.
    pub quantization: String,
    /// Benign prompts that were read.
    pub n_benign: usize,
    pub mean: f64,
    pub deviation: f64,
    /// The one in use.
    pub threshold: f64,
    /// Thresholds to choose among.
    #[serde(default, rename = "operating_point", skip_serializing_if = "Vec::is_empty")]
    pub points: Vec<OperatingPoint>,
}

/// A threshold by the share of benign prompts that it lets fire.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatingPoint {
    /// The share that was asked for: what the point goes by.
    pub rate: f64,
    pub threshold: f64,
    /// Benign prompts that fired, of all that were read.
    pub fired: usize,
    /// The share of all such prompts that fire lies between these with 95 % confidence (Clopper–Pearson).
    pub low: f64,
    pub high: f64,
    /// Share of positive prompts that fire, where some were read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detection: Option<f64>,
}

impl GateCalibration {
    /// The point of that rate.
    pub fn point(&self, rate: f64) -> Option<&OperatingPoint> {
        self.points.iter().find(|point| point.rate == rate)
    }

    fn benign(&self) -> Calibration {
        Calibration { mean: self.mean, deviation: self.deviation }
    }
}

impl Guard {
    /// This guard with every gate's figures of that quantization, and the gates that have figures but none of it: these keep their default ones.
    pub fn calibrated_for(&self, quantization: &str) -> (Cow<'_, Self>, Vec<&str>) {
        let (mut changed, mut without) = (Cow::Borrowed(self), Vec::new());
        for (index, gate) in self.gates.iter().enumerate() {
            match gate.calibrations.iter().find(|known| known.quantization == quantization) {
                Some(known) => {
                    let gate = &mut changed.to_mut().gates[index];
                    gate.calibration = Some(known.benign());
                    gate.threshold = Some(known.threshold);
                }
                None if gate.calibrations.is_empty() => {}
                None => without.push(gate.name.as_str()),
            }
        }
        (changed, without)
    }

    /// This guard with the thresholds of the operating points of that rate, on every quantization.
    ///
    /// # Errors
    /// A gate without a point of that rate.
    pub fn at_rate(&self, rate: f64) -> Result<Self, GuardError> {
        let mut changed = self.clone();
        for gate in &mut changed.gates {
            let rates = gate.calibrations.iter().flat_map(|known| &known.points).map(|point| point.rate.to_string());
            let rates: Vec<String> = rates.collect();
            let unknown = || GuardError::unknown("operating point", &rate.to_string(), rates.iter());
            if gate.calibrations.is_empty() {
                return Err(unknown());
            }
            for known in &mut gate.calibrations {
                let threshold = known.point(rate).ok_or_else(unknown)?.threshold;
                // The default's, where they are this one's.
                if gate.calibration == Some(known.benign()) && gate.threshold == Some(known.threshold) {
                    gate.threshold = Some(threshold);
                }
                known.threshold = threshold;
            }
        }
        Ok(changed)
    }
}
