use super::contrast::Checked;
use super::{ContrastSet, Extracted, ExtractionMethod, SteeringError};
use nalgebra::{DMatrix, DVector, SymmetricEigen};

/// The residual of an eigenpair, as a share of the eigenvalue, at which it counts as found.
const TOLERANCE: f64 = 1e-12;
/// Steps after which it counts as found if nothing else does: an eigenvalue so close to the first leaves a direction open that the data does not
/// decide.
const MOST_STEPS: usize = 300;

/// The first principal component of paired differences, `[width]`: with `d = x₊ − x₋` of the first positive and the first negative row, of the second
/// ones and so on, the leading eigenvector `u` of `Σ ω/n Σ d dᵀ` over the sets, as `(u·v) u` with `v` the difference of means. (Zou et al.,
/// "Representation Engineering", arXiv 2310.01405, take the components of differences whose signs are drawn at random, which centres them: what
/// is left of chance when every difference is there with both signs. There the component has no length; here strength 1.0 takes a negative row as
/// far along it as the positives are.) So positives score higher. In `f64`, rounded once.
///
/// # Errors
/// Classes of unequal size, a component on which the means agree, or what [`difference_of_means`](super::difference_of_means) refuses.
pub fn principal_difference(sets: &[ContrastSet<'_>]) -> Result<Extracted, SteeringError> {
    let checked = Checked::new(sets)?;
    let mut differences = Vec::new();
    let mut n_pairs = 0;
    for (set, share) in checked.each() {
        let (positive, negative) = (set.positive.n_rows(), set.negative.n_rows());
        if positive != negative {
            return Err(SteeringError::Unpaired { positive, negative });
        }
        let scale = (share / positive as f64).sqrt();
        for (p, n) in set.positive.rows().zip(set.negative.rows()) {
            differences.extend(p.iter().zip(n).map(|(p, n)| scale * (f64::from(*p) - f64::from(*n))));
        }
        n_pairs += positive;
    }
    // A column a pair.
    let differences = DMatrix::from_vec(checked.width, n_pairs, differences);
    let mean = DVector::from_vec(checked.mean_difference());
    let component = leading(&differences, &mean).ok_or(SteeringError::ZeroDirection)?;
    let length = component.dot(&mean);
    checked.extracted(ExtractionMethod::PrincipalDifference, component.iter().map(|value| length * value))
}

/// The leading eigenvector of `D Dᵀ` among those that `start` has a part of, of norm 1: Lanczos' method, each new vector made orthogonal to all
/// before it, twice. One that `start` has no part of could not be given a sign.
fn leading(d: &DMatrix<f64>, start: &DVector<f64>) -> Option<DVector<f64>> {
    let mut basis = vec![start.try_normalize(0.0)?];
    let (mut diagonal, mut beside) = (Vec::new(), Vec::new());
    loop {
        let last = basis.last().expect("it has the start");
        let mut next = d * (d.tr_mul(last));
        diagonal.push(next.dot(last));
        for _ in 0..2 {
            for known in &basis {
                next.axpy(-next.dot(known), known, 1.0);
            }
        }
        let (steps, length) = (basis.len(), next.norm());
        let small = DMatrix::from_fn(steps, steps, |row, column| match row.abs_diff(column) {
            0 => diagonal[row],
            1 => beside[row.min(column)],
            _ => 0.0,
        });
        let eigen = SymmetricEigen::new(small);
        let (best, value) = eigen.eigenvalues.argmax();
        let weights = eigen.eigenvectors.column(best);
        let left = (length * weights[steps - 1]).abs();
        if left <= TOLERANCE * value || length <= f64::MIN_POSITIVE || steps == MOST_STEPS.min(d.nrows()) {
            let sum = basis
                .iter()
                .zip(weights.iter())
                .fold(DVector::zeros(d.nrows()), |sum, (vector, weight)| sum + vector * *weight);
            return sum.try_normalize(0.0);
        }
        beside.push(length);
        basis.push(next / length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Residual;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn principal(positive: &[f32], negative: &[f32], width: usize) -> Result<Extracted, SteeringError> {
        let rows = |values| Residual::new(values, width).unwrap();
        principal_difference(&[ContrastSet::new(rows(positive), rows(negative))])
    }

    #[test]
    fn a_component_worked_by_hand() {
        // Differences (4, 3), (4, 3) and (3, −4): Σ d dᵀ has the eigenvector (4, 3)/5, and their mean is (11, 2)/3.
        let found = principal(&[4.0, 3.0, 5.0, 3.0, 3.0, 0.0], &[0.0, 0.0, 1.0, 0.0, 0.0, 4.0], 2).unwrap();
        let length = (11.0 * 4.0 + 2.0 * 3.0) / 15.0;
        for (found, expected) in found.values.iter().zip([length * 0.8, length * 0.6]) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} and {expected}");
        }
        assert_eq!(found.method, ExtractionMethod::PrincipalDifference);
    }

    #[test]
    fn it_is_the_eigenvector_that_a_dense_solver_finds_and_positives_score_higher() {
        for (n, width, seed) in [(40, 12, 1), (9, 30, 2), (64, 64, 3)] {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let mut class = |shift: f32| -> Vec<f32> {
                (0..n * width).map(|index| random.random::<f32>() - 0.5 + shift / (1 + index % width) as f32).collect()
            };
            let (positive, negative) = (class(0.4), class(-0.4));
            let found = principal(&positive, &negative, width).unwrap().values;
            let d = DMatrix::from_fn(width, n, |row, pair| {
                f64::from(positive[pair * width + row]) - f64::from(negative[pair * width + row])
            });
            let dense = SymmetricEigen::new(&d * d.transpose());
            let expected = dense.eigenvectors.column(dense.eigenvalues.argmax().0);
            let length = expected.dot(&d.column_mean());
            assert!(f64::from(crate::tensor::dot(&found, &d.column_mean().map(|x| x as f32).data.as_vec()[..])) > 0.0);
            for (found, expected) in found.iter().zip(expected.iter()) {
                assert!((f64::from(*found) - length * expected).abs() < 1e-6 * length.abs(), "{found} and {expected}");
            }
        }
    }

    #[test]
    fn pairs_are_needed() {
        let error = principal(&[1.0, 2.0], &[1.0], 1).unwrap_err().to_string();
        assert!(error.contains("equal size") && error.contains("found 2 positive and 1 negative"), "{error}");
        assert_eq!(principal(&[1.0, 2.0], &[2.0, 1.0], 1).unwrap_err(), SteeringError::ZeroDirection);
    }
}
