use super::contrast::Checked;
use super::solve::{gram, solve};
use super::{ContrastSet, Extracted, ExtractionMethod, SteeringError};
use faer::Mat;

/// Half of the covariance as measured, half of it as if dimensions were independent and alike. Harmful and harmless prompts of held-out kinds
/// were told apart equally well with every value from 0.2 to 0.6, and worse outside.
pub const DEFAULT_SHRINKAGE: f64 = 0.5;

/// Fisher's linear discriminant with a shrunk covariance, `w = D⁻¹ Σ⁻¹ D⁻¹ (mean(x | +) − mean(x | −))`, `[width]`: `D` is the standard deviation
/// of each dimension over both classes, and `Σ = (1 − γ) C + γ tr(C)/d · I` with `C` the covariance within classes of the rows in those units
/// and `γ` the `shrinkage` (Friedman, "Regularized Discriminant Analysis", 1989; Ledoit and Wolf, 2004, for the target of the shrinkage). All
/// in `f64`, rounded once.
///
/// Several sets are pooled, each row with its set's weight over its set's size: what tells the negatives of one set from those of another
/// counts as variance within the class, so the discriminant does not look at it.
///
/// What comes out is a function to read rows with, `x ↦ w·x`, rather than a difference of residuals: see
/// [`VectorKind`](super::VectorKind). It discounts what varies among prompts of either class, of which a difference of means is full
/// when the classes differ in form too.
///
/// # Errors
/// Fewer than two rows in a class, rows that all equal their class's mean, a shrinkage out of range, or what
/// [`difference_of_means`](super::difference_of_means) refuses.
pub fn linear_discriminant(sets: &[ContrastSet<'_>], shrinkage: f64) -> Result<Extracted, SteeringError> {
    if !(shrinkage > 0.0 && shrinkage <= 1.0) {
        return Err(SteeringError::Shrinkage { found: shrinkage });
    }
    let checked = Checked::new(sets)?;
    let (width, rows) = (checked.width, checked.rows(false));
    let n_positive = rows.iter().filter(|row| row.positive).count();
    let n_negative = rows.len() - n_positive;
    if n_positive < 2 || n_negative < 2 {
        return Err(SteeringError::TooFewRows { positive: n_positive, negative: n_negative });
    }
    let (mut shares, mut means) = ([0.0; 2], [vec![0.0; width], vec![0.0; width]]);
    for row in &rows {
        let class = usize::from(row.positive);
        shares[class] += row.weight;
        means[class].iter_mut().zip(row.values).for_each(|(sum, x)| *sum += row.weight * f64::from(*x));
    }
    for (mean, share) in means.iter_mut().zip(shares) {
        mean.iter_mut().for_each(|sum| *sum /= share);
    }
    let difference: Vec<f64> = means[1].iter().zip(&means[0]).map(|(p, n)| p - n).collect();

    // A column a row: what is left once the class's mean is taken away, times the root of the row's weight.
    let mut within = Mat::zeros(width, rows.len());
    for (column, row) in rows.iter().enumerate() {
        let (mean, root) = (&means[usize::from(row.positive)], row.weight.sqrt());
        for (index, (x, mean)) in row.values.iter().zip(mean).enumerate() {
            within[(index, column)] = root * (f64::from(*x) - mean);
        }
    }
    // Over both classes: the variance within them and what their means add.
    let mut variances: Vec<f64> = difference.iter().map(|d| shares[0] * shares[1] * d * d).collect();
    for column in 0..rows.len() {
        variances.iter_mut().zip(within.col(column).iter()).for_each(|(sum, x)| *sum += x * x);
    }
    let deviations: Vec<f64> =
        variances.iter().map(|variance| variance.sqrt()).map(|d| if d.is_normal() { d } else { 1.0 }).collect();
    for column in 0..rows.len() {
        within.col_mut(column).iter_mut().zip(&deviations).for_each(|(x, deviation)| *x /= deviation);
    }
    let mut covariance = gram(within.as_ref());
    let mean_variance = (0..width).map(|index| covariance[(index, index)]).sum::<f64>() / width as f64;
    if mean_variance <= 0.0 {
        return Err(SteeringError::NoVariance);
    }
    covariance *= faer::Scale(1.0 - shrinkage);
    for index in 0..width {
        covariance[(index, index)] += shrinkage * mean_variance;
    }
    let scaled = Mat::from_fn(width, 1, |index, _| difference[index] / deviations[index]);
    // Positive definite by the shrinkage, unless numbers overflowed.
    let solved = solve(covariance, scaled).ok_or(SteeringError::NoVariance)?;
    let values = solved.col(0).iter().zip(&deviations).map(|(value, deviation)| value / deviation);
    checked.extracted(ExtractionMethod::LinearDiscriminant, values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steering::difference_of_means;
    use crate::tensor::{Residual, auc, cosine, dot};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn rows(values: &[f32], width: usize) -> Residual<'_> {
        Residual::new(values, width).unwrap()
    }

    fn discriminant(positive: Residual, negative: Residual, shrinkage: f64) -> Result<Extracted, SteeringError> {
        linear_discriminant(&[ContrastSet::new(positive, negative)], shrinkage)
    }

    #[test]
    fn a_discriminant_worked_by_hand() {
        // Within classes: variances 1 and 4, no covariance. Means differ by (2, 2), so over both classes the variances are 2 and 5.
        let positive = [3.0, 4.0, 3.0, 0.0, 1.0, 4.0, 1.0, 0.0];
        let negative = [1.0, 2.0, 1.0, -2.0, -1.0, 2.0, -1.0, -2.0];
        let found = discriminant(rows(&positive, 2), rows(&negative, 2), 0.5).unwrap();
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
        let discriminant = discriminant(positive, negative, 0.05).unwrap().values;
        let difference = difference_of_means(&[ContrastSet::new(positive, negative)]).unwrap().values;
        assert!(separation(&discriminant) > 0.95, "{}", separation(&discriminant));
        assert!(separation(&difference) < 0.75, "{}", separation(&difference));
    }

    #[test]
    fn wholly_shrunk_it_is_the_difference_in_units_of_the_deviations() {
        let positive = [3.0, 4.0, 3.0, 0.0, 1.0, 4.0, 1.0, 0.0];
        let negative = [1.0, 2.0, 1.0, -2.0, -1.0, 2.0, -1.0, -2.0];
        let found = discriminant(rows(&positive, 2), rows(&negative, 2), 1.0).unwrap();
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
            let error = discriminant(rows(positive, 1), rows(negative, 1), shrinkage).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{error}");
        }
    }
}
