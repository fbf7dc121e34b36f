use super::{ClassMeans, Extracted, ExtractionMethod, SteeringError};
use crate::tensor::{Residual, norm};

/// Rows of one layer of prompts with a property and of prompts without it, and how much the pair has to say beside others.
///
/// Several sets make one vector: harmful against harmless prompts, and harmful against those that only look so. However many prompts a
/// set has, it has its weight's say and no more.
#[derive(Debug, Clone, Copy)]
pub struct ContrastSet<'a> {
    /// `[n, width]`
    pub positive: Residual<'a>,
    /// `[n, width]`
    pub negative: Residual<'a>,
    /// Above 0, in the proportion of the weights of all sets.
    pub weight: f64,
}

impl<'a> ContrastSet<'a> {
    /// Of weight 1.
    pub fn new(positive: Residual<'a>, negative: Residual<'a>) -> Self {
        Self { positive, negative, weight: 1.0 }
    }

    fn n_rows(&self) -> usize {
        self.positive.n_rows() + self.negative.n_rows()
    }
}

/// Sets whose rows can be compared: of one width, finite, no class empty.
pub(super) struct Checked<'a, 's> {
    sets: &'s [ContrastSet<'a>],
    /// Of each set, summing to 1.
    pub shares: Vec<f64>,
    pub width: usize,
}

/// A row of some set, with what it counts.
#[cfg(feature = "learn")]
pub(super) struct WeightedRow<'a> {
    pub values: &'a [f32],
    pub positive: bool,
    pub weight: f64,
}

impl<'a, 's> Checked<'a, 's> {
    pub fn new(sets: &'s [ContrastSet<'a>]) -> Result<Self, SteeringError> {
        let width = sets.first().ok_or(SteeringError::NoSets)?.positive.width();
        for set in sets {
            for (class, rows) in [("positive", set.positive), ("negative", set.negative)] {
                if rows.n_rows() == 0 {
                    return Err(SteeringError::EmptyClass { class });
                }
                if rows.width() != width {
                    return Err(SteeringError::ClassWidths { class, expected: width, found: rows.width() });
                }
                if let Some((row, index, value)) = rows.first_non_finite() {
                    return Err(SteeringError::NonFiniteRow { class, row, index, value });
                }
            }
            if !(set.weight.is_finite() && set.weight > 0.0) {
                return Err(SteeringError::Weight { found: set.weight });
            }
        }
        let total: f64 = sets.iter().map(|set| set.weight).sum();
        Ok(Self { sets, shares: sets.iter().map(|set| set.weight / total).collect(), width })
    }

    /// Sets with their shares.
    pub fn each(&self) -> impl Iterator<Item = (&'s ContrastSet<'a>, f64)> {
        self.sets.iter().zip(self.shares.iter().copied())
    }

    /// `Σ ω (mean(x | +) − mean(x | −))` over the sets, `[width]`.
    pub fn mean_difference(&self) -> Vec<f64> {
        let mut difference = vec![0.0; self.width];
        for (set, share) in self.each() {
            let means = class_mean(set.positive).into_iter().zip(class_mean(set.negative));
            difference.iter_mut().zip(means).for_each(|(sum, (p, n))| *sum += share * (p - n));
        }
        difference
    }

    /// `Σ ω mean(x | +)` and `Σ ω mean(x | −)` over the sets, whose difference is [`mean_difference`](Self::mean_difference).
    fn class_means(&self) -> ClassMeans {
        let mean = |class: fn(&ContrastSet<'a>) -> Residual<'a>| -> Vec<f32> {
            let mut mean = vec![0.0; self.width];
            for (set, share) in self.each() {
                mean.iter_mut().zip(class_mean(class(set))).for_each(|(sum, of_set)| *sum += share * of_set);
            }
            mean.into_iter().map(|value| value as f32).collect()
        };
        ClassMeans { positive: mean(|set| set.positive), negative: mean(|set| set.negative) }
    }

    /// Every row with its weight; weights sum to 1. A set's rows share its weight evenly, or each of its classes has half of it.
    #[cfg(feature = "learn")]
    pub fn rows(&self, balanced: bool) -> Vec<WeightedRow<'a>> {
        let mut rows = Vec::new();
        for (set, share) in self.each() {
            for (class, positive) in [(set.positive, true), (set.negative, false)] {
                let n = if balanced { 2 * class.n_rows() } else { set.n_rows() };
                rows.extend(class.rows().map(|values| WeightedRow { values, positive, weight: share / n as f64 }));
            }
        }
        rows
    }

    /// Rounds `values` and adds what is to be known of the classes.
    pub fn extracted(
        &self,
        method: ExtractionMethod,
        values: impl Iterator<Item = f64>,
    ) -> Result<Extracted, SteeringError> {
        let rounded = |(index, value): (usize, f64)| {
            let rounded = value as f32;
            if rounded.is_finite() { Ok(rounded) } else { Err(SteeringError::Overflow { index, value }) }
        };
        let values = values.enumerate().map(rounded).collect::<Result<Vec<_>, _>>()?;
        if values.iter().all(|value| *value == 0.0) {
            return Err(SteeringError::ZeroDirection);
        }
        let mean_norm = |set: &ContrastSet<'_>| {
            set.positive.rows().chain(set.negative.rows()).map(norm).sum::<f64>() / set.n_rows() as f64
        };
        Ok(Extracted {
            values,
            method,
            mean_norm: self.each().map(|(set, share)| share * mean_norm(set)).sum(),
            n_positive: self.sets.iter().map(|set| set.positive.n_rows()).sum(),
            n_negative: self.sets.iter().map(|set| set.negative.n_rows()).sum(),
            class_means: (method == ExtractionMethod::DifferenceOfMeans).then(|| self.class_means()),
        })
    }
}

fn class_mean(rows: Residual<'_>) -> Vec<f64> {
    let mut mean = vec![0.0f64; rows.width()];
    for values in rows.rows() {
        mean.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(*value));
    }
    mean.iter_mut().for_each(|sum| *sum /= rows.n_rows() as f64);
    mean
}
