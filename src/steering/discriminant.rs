use super::extract::{class_means, extracted};
use super::{Extracted, ExtractionMethod, SteeringError};
use crate::tensor::Residual;
use nalgebra::{Cholesky, DMatrix, DVector};

/// Half of the covariance as measured, half of it as if dimensions were independent and alike. Harmful and harmless prompts of held-out kinds
/// were told apart equally well with every value from 0.2 to 0.6, and worse outside.
pub const DEFAULT_SHRINKAGE: f64 = 0.5;

/// Fisher's linear discriminant with a shrunk covariance, `w = D⁻¹ Σ⁻¹ D⁻¹ (mean(x | +) − mean(x | −))`, `[width]`, from `positive` and
/// `negative`, `[n, width]` each: `D` is the standard deviation of each dimension over both classes, and `Σ = (1 − γ) C + γ tr(C)/d · I`
/// with `C` the covariance within classes of the rows in those units and `γ` the `shrinkage` (Friedman, "Regularized Discriminant
/// Analysis", 1989; Ledoit and Wolf, 2004, for the target of the shrinkage). All in `f64`, rounded once.
///
/// What comes out is a function to read rows with, `x ↦ w·x`, rather than a difference of residuals: see
/// [`VectorKind`](super::VectorKind). It discounts what varies among prompts of either class, of which a difference of means is full
/// when the classes differ in form too.
///
/// # Errors
/// Fewer than two rows in a class, rows that all equal their class's mean, a shrinkage out of range, or what
/// [`difference_of_means`](super::difference_of_means) refuses.
pub fn linear_discriminant(positive: Residual, negative: Residual, shrinkage: f64) -> Result<Extracted, SteeringError> {
    if !(shrinkage > 0.0 && shrinkage <= 1.0) {
        return Err(SteeringError::Shrinkage { found: shrinkage });
    }
    let (positive_mean, negative_mean) = class_means(positive, negative)?;
    let (n_positive, n_negative) = (positive.n_rows(), negative.n_rows());
    if n_positive < 2 || n_negative < 2 {
        return Err(SteeringError::TooFewRows { positive: n_positive, negative: n_negative });
    }
    let (width, n) = (positive.width(), (n_positive + n_negative) as f64);
    // A column a row: what is left once the class's mean is taken away.
    let mut within = Vec::with_capacity(positive.values().len() + negative.values().len());
    for (rows, mean) in [(positive, &positive_mean), (negative, &negative_mean)] {
        for row in rows.rows() {
            within.extend(row.iter().zip(mean).map(|(x, mean)| f64::from(*x) - mean));
        }
    }
    let mut within = DMatrix::from_vec(width, n_positive + n_negative, within);
    // Over both classes: the variance within them and what their means add.
    let between = (n_positive as f64 / n) * (n_negative as f64 / n);
    let deviations: Vec<f64> = (0..width)
        .map(|index| {
            let difference = positive_mean[index] - negative_mean[index];
            let deviation = (within.row(index).norm_squared() / n + between * difference * difference).sqrt();
            if deviation.is_normal() { deviation } else { 1.0 }
        })
        .collect();
    for (mut row, deviation) in within.row_iter_mut().zip(&deviations) {
        row /= *deviation;
    }
    let mut covariance = &within * within.transpose() / n;
    let mean_variance = covariance.trace() / width as f64;
    if mean_variance <= 0.0 {
        return Err(SteeringError::NoVariance);
    }
    covariance *= 1.0 - shrinkage;
    for index in 0..width {
        covariance[(index, index)] += shrinkage * mean_variance;
    }
    let difference = positive_mean.iter().zip(&negative_mean).zip(&deviations);
    let difference = DVector::from_iterator(width, difference.map(|((p, n), deviation)| (p - n) / deviation));
    // Positive definite by the shrinkage, unless numbers overflowed.
    let solved = Cholesky::new(covariance).ok_or(SteeringError::NoVariance)?.solve(&difference);
    let values = solved.iter().zip(&deviations).map(|(value, deviation)| value / deviation);
    extracted(ExtractionMethod::LinearDiscriminant, values, positive, negative)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steering::difference_of_means;
    use crate::tensor::{auc, cosine, dot};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn rows(values: &[f32], width: usize) -> Residual<'_> {
        Residual::new(values, width).unwrap()
    }

    #[test]
    fn a_discriminant_worked_by_hand() {
        // Within classes: variances 1 and 4, no covariance. Means differ by (2, 2), so over both classes the variances are 2 and 5.
        let positive = [3.0, 4.0, 3.0, 0.0, 1.0, 4.0, 1.0, 0.0];
        let negative = [1.0, 2.0, 1.0, -2.0, -1.0, 2.0, -1.0, -2.0];
        let found = linear_discriminant(rows(&positive, 2), rows(&negative, 2), 0.5).unwrap();
        // In units of the deviations C = diag(1/2, 4/5), tr(C)/2 = 0.65, Σ = diag(0.575, 0.725); w = 2/(σ² Σ).
        let expected = [2.0 / (2.0 * 0.575), 2.0 / (5.0 * 0.725)];
        for (found, expected) in found.values.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} and {expected}");
        }
        assert_eq!(found.method, ExtractionMethod::LinearDiscriminant);
    }

    #[test]
    fn it_sees_past_a_nuisance_that_a_difference_of_means_follows() {
        // Dimension 0 carries the class; 1 and 2 share a large nuisance, which differs a little between the classes too.
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let mut class = |sign: f32, n: usize| -> Vec<f32> {
            (0..n)
                .flat_map(|_| {
                    let nuisance = 10.0 * (random.random::<f32>() - 0.5) + 0.5 * sign;
                    let noise = 0.6 * (random.random::<f32>() - 0.5);
                    [0.3 * sign + noise, nuisance, nuisance + noise]
                })
                .collect()
        };
        let (positive, negative) = (class(1.0, 200), class(-1.0, 200));
        let (held_positive, held_negative) = (class(1.0, 200), class(-1.0, 200));
        let separation = |direction: &[f32]| {
            let scores = |values: &[f32]| -> Vec<f64> {
                values.chunks_exact(3).map(|row| f64::from(dot(row, direction))).collect()
            };
            auc(&scores(&held_positive), &scores(&held_negative))
        };
        let (positive, negative) = (rows(&positive, 3), rows(&negative, 3));
        let discriminant = linear_discriminant(positive, negative, 0.05).unwrap().values;
        let difference = difference_of_means(positive, negative).unwrap().values;
        assert!(separation(&discriminant) > 0.95, "{}", separation(&discriminant));
        assert!(separation(&difference) < 0.75, "{}", separation(&difference));
    }

    #[test]
    fn wholly_shrunk_it_is_the_difference_in_units_of_the_deviations() {
        let positive = [3.0, 4.0, 3.0, 0.0, 1.0, 4.0, 1.0, 0.0];
        let negative = [1.0, 2.0, 1.0, -2.0, -1.0, 2.0, -1.0, -2.0];
        let found = linear_discriminant(rows(&positive, 2), rows(&negative, 2), 1.0).unwrap();
        assert!((cosine(&found.values, &[2.0 / 2.0, 2.0 / 5.0]) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn what_gives_no_discriminant_is_refused() {
        let cases: [(&[f32], &[f32], f64, &str); 5] = [
            (
                &[1.0],
                &[2.0, 3.0],
                0.5,
                "a discriminant needs two rows of each class or more, found 1 positive and 2 negative",
            ),
            (&[1.0, 1.0], &[2.0, 2.0], 0.5, "no row differs from its class's mean"),
            (&[1.0, 2.0], &[3.0, 4.0], 0.0, "the shrinkage is 0, expected a number above 0, up to 1"),
            (&[1.0, 2.0], &[3.0, 4.0], f64::NAN, "the shrinkage is NaN"),
            (&[1.0, 3.0], &[0.0, 4.0], 0.5, "the two classes have the same mean"),
        ];
        for (positive, negative, shrinkage, expected) in cases {
            let error = linear_discriminant(rows(positive, 1), rows(negative, 1), shrinkage).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{error}");
        }
    }
}
