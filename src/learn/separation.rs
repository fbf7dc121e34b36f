//! How well vectors made without some prompts do on those, and how much they hang on which prompts there are.

use super::ContrastMethod;
use crate::steering::{ContrastSet, Extracted, Stability, SteeringError};
use crate::tensor::{Residual, auc, cosine, dot};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Folds of the cross-validation.
pub(super) const FOLDS: usize = 5;

/// Rows of one set that were copied out of it.
struct Part {
    positive: Vec<f32>,
    negative: Vec<f32>,
    weight: f64,
}

impl Part {
    fn of(set: &ContrastSet<'_>, positive: &[usize], negative: &[usize]) -> Self {
        let pick = |rows: Residual<'_>, picked: &[usize]| {
            picked
                .iter()
                .flat_map(|row| &rows.values()[row * rows.width()..(row + 1) * rows.width()])
                .copied()
                .collect()
        };
        Self { positive: pick(set.positive, positive), negative: pick(set.negative, negative), weight: set.weight }
    }

    fn set(&self, width: usize) -> ContrastSet<'_> {
        let rows = |values| Residual::new(values, width).expect("whole rows");
        ContrastSet { positive: rows(&self.positive), negative: rows(&self.negative), weight: self.weight }
    }
}

/// Whether a row is held out of the vector that fold number `fold` is judged by: by its place in its file, so that prompts that two sets share
/// are held out of both.
pub(super) fn is_held(row: usize, fold: usize) -> bool {
    row % FOLDS == fold
}

/// `direction` made without fold number `fold` of the sets' rows.
pub(super) fn without_fold(
    sets: &[ContrastSet<'_>],
    method: ContrastMethod,
    fold: usize,
) -> Result<Extracted, SteeringError> {
    let kept = |rows: Residual<'_>| (0..rows.n_rows()).filter(|row| !is_held(*row, fold)).collect::<Vec<_>>();
    let parts: Vec<Part> = sets.iter().map(|set| Part::of(set, &kept(set.positive), &kept(set.negative))).collect();
    let width = sets.first().map_or(1, |set| set.positive.width());
    let kept: Vec<_> = parts.iter().map(|part| part.set(width)).collect();
    method.extract(&kept)
}

/// AUC of the rows of fold number `fold` along `direction`.
pub(super) fn auc_of_fold(positive: Residual<'_>, negative: Residual<'_>, fold: usize, direction: &[f32]) -> f64 {
    let scores = |rows: Residual<'_>| -> Vec<f64> {
        let held = rows.rows().enumerate().filter(|(row, _)| is_held(*row, fold));
        held.map(|(_, row)| f64::from(dot(row, direction))).collect()
    };
    auc(&scores(positive), &scores(negative))
}

/// Cross-validated AUC of each set, the mean over folds: every row is scored by a vector that was made without its fold.
pub(super) fn held_out(sets: &[ContrastSet<'_>], method: ContrastMethod) -> Result<Vec<f64>, SteeringError> {
    let mut totals = vec![0.0; sets.len()];
    for fold in 0..FOLDS {
        let direction = without_fold(sets, method, fold)?.values;
        for (total, set) in totals.iter_mut().zip(sets) {
            *total += auc_of_fold(set.positive, set.negative, fold, &direction);
        }
    }
    Ok(totals.into_iter().map(|total| total / FOLDS as f64).collect())
}

/// Mean cosine to `whole` of the vectors of bootstrap resamples: of each class as many rows as it has, drawn with replacement; of paired classes
/// pairs. The same seed draws the same rows at every layer. A resample that gives no vector (all of one row) is not counted.
pub(super) fn stability(
    sets: &[ContrastSet<'_>],
    method: ContrastMethod,
    whole: &[f32],
    resamples: u32,
    seed: u64,
) -> Option<Stability> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut total, mut counted) = (0.0, 0);
    for _ in 0..resamples {
        let mut drawn = |n: usize| (0..n).map(|_| rng.random_range(0..n)).collect::<Vec<_>>();
        let mut part = |set: &ContrastSet<'_>| {
            let positive = drawn(set.positive.n_rows());
            let negative = if method.is_paired() { positive.clone() } else { drawn(set.negative.n_rows()) };
            Part::of(set, &positive, &negative)
        };
        let parts: Vec<Part> = sets.iter().map(&mut part).collect();
        let resampled: Vec<_> = parts.iter().map(|part| part.set(whole.len())).collect();
        if let Ok(found) = method.extract(&resampled) {
            total += cosine(&found.values, whole);
            counted += 1;
        }
    }
    (counted > 0).then(|| Stability { mean_cosine: total / f64::from(counted), resamples: counted, seed })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: &[f32], width: usize) -> Residual<'_> {
        Residual::new(values, width).unwrap()
    }

    #[test]
    fn no_row_is_judged_by_a_vector_that_it_made() {
        // In sample a wide difference of means of noise tells its own rows apart; held out it can't.
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut noise = |n: usize| (0..n * 200).map(|_| rng.random::<f32>() - 0.5).collect::<Vec<f32>>();
        let (positive, negative) = (noise(60), noise(60));
        let set = ContrastSet::new(rows(&positive, 200), rows(&negative, 200));
        let method = ContrastMethod::DifferenceOfMeans;
        let whole = method.extract(&[set]).unwrap().values;
        let scores =
            |values: &[f32]| -> Vec<f64> { rows(values, 200).rows().map(|row| f64::from(dot(row, &whole))).collect() };
        assert!(auc(&scores(&positive), &scores(&negative)) > 0.9);
        let held = held_out(&[set], method).unwrap();
        assert!((0.3..0.7).contains(&held[0]), "{held:?}");
    }

    #[test]
    fn a_vector_is_stable_where_the_classes_are_apart_and_not_in_noise() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let mut class = |shift: f32| (0..40 * 8).map(|_| rng.random::<f32>() - 0.5 + shift).collect::<Vec<f32>>();
        let (near, apart, none) = (class(0.0), class(2.0), class(0.0));
        let of = |positive: &[f32], method: ContrastMethod, seed| {
            let set = ContrastSet::new(rows(positive, 8), rows(&near, 8));
            let whole = method.extract(&[set]).unwrap().values;
            stability(&[set], method, &whole, 20, seed).unwrap()
        };
        for method in [ContrastMethod::DifferenceOfMeans, ContrastMethod::PrincipalDifference] {
            let (clear, noise) = (of(&apart, method, 0), of(&none, method, 0));
            assert!(clear.mean_cosine > 0.98 && noise.mean_cosine < 0.95, "{method:?}: {clear:?} and {noise:?}");
            assert_eq!(of(&apart, method, 0), clear, "the same seed, the same figure");
            assert_ne!(of(&apart, method, 1).mean_cosine, clear.mean_cosine);
        }
    }
}
