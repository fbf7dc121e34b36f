use super::contrast::{Checked, WeightedRow};
use super::solve::{gram, product, solve};
use super::{ContrastSet, Extracted, ExtractionMethod, SteeringError};
use faer::{Mat, MatRef};

/// In five-fold cross-validation on SmolLM2-135M (layers 12, 16 and 20, mean over the prompt, 110 harmful prompts of the shipped guard against 118
/// harmless and 53 alarming ones) every penalty from 0.003 to 0.3 is within 0.007 of every other, and 1 is worse by up to 0.022.
pub const DEFAULT_PENALTY: f64 = 0.03;

/// Newton's method has the gradient at rounding after six to ten.
const MOST_ITERATIONS: usize = 100;
/// Half the Newton decrement: what the loss, some tenths, is above its least.
const TOLERANCE: f64 = 1e-13;

/// Logistic regression with a ridge penalty, `[width]`: `w = D⁻¹ u` where `u` and `b` minimise
/// `Σ ωᵢ ln(1 + exp(−yᵢ (u·zᵢ + b))) + λ/2 ‖u‖²`, `z = D⁻¹ (x − m)` the rows with each dimension in units of its standard deviation (mean and deviation
/// weighted as the rows are), `y` 1 and −1, and `λ` the `penalty`. The weights `ωᵢ` sum to 1: each set has its own, each class of it half of that.
/// By Newton's method in `f64` (Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", 4.4), among as many unknowns as there are
/// dimensions or rows, whichever are fewer; rounded once.
///
/// What comes out is a function to read rows with, as of [`linear_discriminant`](super::linear_discriminant).
///
/// # Errors
/// Rows that are all alike, a penalty that is not above 0, or what [`difference_of_means`](super::difference_of_means) refuses.
pub fn logistic_regression(sets: &[ContrastSet<'_>], penalty: f64) -> Result<Extracted, SteeringError> {
    if !(penalty.is_finite() && penalty > 0.0) {
        return Err(SteeringError::Penalty { found: penalty });
    }
    let checked = Checked::new(sets)?;
    let rows = checked.rows(true);
    let (standardized, deviations) = standardized(&rows, checked.width)?;
    let space = Space::of(standardized.as_ref());
    let solution = minimise(&space, &rows, penalty)?;
    let values = space.direction(&solution);
    let values = values.iter().zip(&deviations).map(|(value, deviation)| value / deviation);
    checked.extracted(ExtractionMethod::LogisticRegression, values)
}

/// Rows in units of each dimension's standard deviation from its mean, `[n, width]`, and those deviations.
fn standardized(rows: &[WeightedRow<'_>], width: usize) -> Result<(Mat<f64>, Vec<f64>), SteeringError> {
    let (mut means, mut variances) = (vec![0.0; width], vec![0.0; width]);
    for row in rows {
        means.iter_mut().zip(row.values).for_each(|(sum, x)| *sum += row.weight * f64::from(*x));
    }
    for row in rows {
        for ((sum, x), mean) in variances.iter_mut().zip(row.values).zip(&means) {
            *sum += row.weight * (f64::from(*x) - mean).powi(2);
        }
    }
    let deviations: Vec<f64> = variances.iter().map(|variance| variance.sqrt()).collect();
    if !deviations.iter().any(|deviation| deviation.is_normal()) {
        return Err(SteeringError::ZeroDirection);
    }
    let deviations: Vec<f64> = deviations.into_iter().map(|d| if d.is_normal() { d } else { 1.0 }).collect();
    let z = |row: usize, index: usize| (f64::from(rows[row].values[index]) - means[index]) / deviations[index];
    Ok((Mat::from_fn(rows.len(), width, z), deviations))
}

/// Where the weights `u` are looked for. Those that minimise the loss are combinations of the rows, `u = Zᵀ a`: with fewer rows than dimensions the
/// unknowns are `a`.
enum Space<'a> {
    /// `u` itself; `Z`.
    Dimensions(MatRef<'a, f64>),
    /// `a`; `Z` and `Z Zᵀ`.
    Rows(MatRef<'a, f64>, Mat<f64>),
}

impl<'a> Space<'a> {
    fn of(z: MatRef<'a, f64>) -> Self {
        if z.nrows() >= z.ncols() {
            return Self::Dimensions(z);
        }
        let mut kernel = gram(z);
        for row in 0..z.nrows() {
            for column in 0..row {
                kernel[(column, row)] = kernel[(row, column)];
            }
        }
        Self::Rows(z, kernel)
    }

    fn n_unknowns(&self) -> usize {
        match self {
            Self::Dimensions(z) => z.ncols(),
            Self::Rows(z, _) => z.nrows(),
        }
    }

    /// `Z u`
    fn scores(&self, x: &[f64]) -> Vec<f64> {
        match self {
            Self::Dimensions(z) => product(*z, x),
            Self::Rows(_, kernel) => product(kernel.as_ref(), x),
        }
    }

    /// The unknowns of `Zᵀ r`.
    fn combined(&self, r: &[f64]) -> Vec<f64> {
        match self {
            Self::Dimensions(z) => product(z.transpose(), r),
            Self::Rows(..) => r.to_vec(),
        }
    }

    /// `u·u'`, of which the unknowns `x` and the scores of the other are known, and the other's unknowns.
    fn inner(&self, x: &[f64], other: &[f64], scores_of_other: &[f64]) -> f64 {
        let other = match self {
            Self::Dimensions(_) => other,
            Self::Rows(..) => scores_of_other,
        };
        x.iter().zip(other).map(|(a, b)| a * b).sum()
    }

    fn direction(&self, x: &[f64]) -> Vec<f64> {
        match self {
            Self::Dimensions(_) => x.to_vec(),
            Self::Rows(z, _) => product(z.transpose(), x),
        }
    }

    /// The unknowns of `(Zᵀ H Z + λ I)⁻¹` applied to each of two, with `H` diagonal.
    fn solve(&self, h: &[f64], penalty: f64, right: [&[f64]; 2]) -> Option<[Vec<f64>; 2]> {
        let roots: Vec<f64> = h.iter().map(|h| h.sqrt()).collect();
        let columns = |solved: &Mat<f64>| [0, 1].map(|column| solved.col(column).iter().copied().collect::<Vec<f64>>());
        match self {
            Self::Dimensions(z) => {
                let scaled = Mat::from_fn(z.ncols(), z.nrows(), |index, row| roots[row] * z[(row, index)]);
                let mut hessian = gram(scaled.as_ref());
                for index in 0..z.ncols() {
                    hessian[(index, index)] += penalty;
                }
                solve(hessian, Mat::from_fn(z.ncols(), 2, |index, column| right[column][index])).map(|x| columns(&x))
            }
            // (Zᵀ H Z + λ I)⁻¹ Zᵀ q = Zᵀ (q − √H (√H K √H + λ I)⁻¹ √H K q) / λ
            Self::Rows(_, kernel) => {
                let n = kernel.nrows();
                let inner = Mat::from_fn(n, n, |row, column| {
                    let diagonal = if row == column { penalty } else { 0.0 };
                    roots[row] * kernel[(row, column)] * roots[column] + diagonal
                });
                let products = right.map(|q| product(kernel.as_ref(), q));
                let solved = solve(inner, Mat::from_fn(n, 2, |row, column| roots[row] * products[column][row]))?;
                let [first, second] = columns(&solved);
                let back = |q: &[f64], solved: Vec<f64>| {
                    let terms = q.iter().zip(solved).zip(&roots);
                    terms.map(|((q, solved), root)| (q - root * solved) / penalty).collect()
                };
                Some([back(right[0], first), back(right[1], second)])
            }
        }
    }
}

/// Where a search for the least loss stands.
struct Point {
    x: Vec<f64>,
    /// `Z u`
    scores: Vec<f64>,
    intercept: f64,
}

impl Point {
    fn loss(&self, space: &Space<'_>, rows: &[WeightedRow<'_>], penalty: f64) -> f64 {
        let one = |(row, score): (&WeightedRow<'_>, &f64)| {
            let margin = (score + self.intercept) * if row.positive { 1.0 } else { -1.0 };
            // ln(1 + exp(−m)) without overflow
            row.weight * ((-margin).max(0.0) + (-margin.abs()).exp().ln_1p())
        };
        let fit: f64 = rows.iter().zip(&self.scores).map(one).sum();
        fit + penalty / 2.0 * space.inner(&self.x, &self.x, &self.scores)
    }

    /// `self − t · step`
    fn stepped(&self, step: &Point, t: f64) -> Self {
        let minus = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - t * b).collect();
        Self {
            x: minus(&self.x, &step.x),
            scores: minus(&self.scores, &step.scores),
            intercept: self.intercept - t * step.intercept,
        }
    }
}

/// The unknowns of the least loss.
fn minimise(space: &Space<'_>, rows: &[WeightedRow<'_>], penalty: f64) -> Result<Vec<f64>, SteeringError> {
    let not_converged = SteeringError::NotConverged { iterations: MOST_ITERATIONS };
    let mut at = Point { x: vec![0.0; space.n_unknowns()], scores: vec![0.0; rows.len()], intercept: 0.0 };
    let mut loss = at.loss(space, rows, penalty);
    for _ in 0..MOST_ITERATIONS {
        let (mut slopes, mut curvatures) = (Vec::with_capacity(rows.len()), Vec::with_capacity(rows.len()));
        for (row, score) in rows.iter().zip(&at.scores) {
            let probability = 1.0 / (1.0 + (-(score + at.intercept)).exp());
            slopes.push(row.weight * (probability - f64::from(u8::from(row.positive))));
            curvatures.push(row.weight * probability * (1.0 - probability));
        }
        let gradient: Vec<f64> =
            space.combined(&slopes).iter().zip(&at.x).map(|(slope, x)| slope + penalty * x).collect();
        let gradient_of_intercept: f64 = slopes.iter().sum();
        let border = space.combined(&curvatures);
        let [own, of_border] =
            space.solve(&curvatures, penalty, [&gradient, &border]).ok_or_else(|| not_converged.clone())?;
        let (own_scores, border_scores) = (space.scores(&own), space.scores(&of_border));
        let weighed = |scores: &[f64]| curvatures.iter().zip(scores).map(|(h, score)| h * score).sum::<f64>();
        let pivot = curvatures.iter().sum::<f64>() - weighed(&border_scores);
        let intercept = if pivot > 0.0 { (gradient_of_intercept - weighed(&own_scores)) / pivot } else { 0.0 };
        let minus = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - intercept * b).collect::<Vec<_>>();
        let step = Point { x: minus(&own, &of_border), scores: minus(&own_scores, &border_scores), intercept };

        let decrement = space.inner(&gradient, &step.x, &step.scores) + gradient_of_intercept * intercept;
        if decrement.is_nan() {
            return Err(not_converged);
        }
        if decrement / 2.0 <= TOLERANCE {
            return Ok(at.stepped(&step, 1.0).x);
        }
        let mut t = 1.0;
        (at, loss) = loop {
            let next = at.stepped(&step, t);
            let lower = next.loss(space, rows, penalty);
            if lower <= loss - 1e-4 * t * decrement {
                break (next, lower);
            }
            t /= 2.0;
            if t < 1e-10 {
                return Err(not_converged);
            }
        };
    }
    Err(not_converged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Residual;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn noise(n: usize, width: usize, shift: f32, seed: u64) -> Vec<f32> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        (0..n * width).map(|index| 5.0 + 3.0 * random.random::<f32>() + shift / (1 + index % width) as f32).collect()
    }

    /// What the gradient of the loss is at `w`, dimension by dimension, in units of the deviations; the intercept is found by bisection.
    fn gradient(sets: &[ContrastSet<'_>], w: &[f32], penalty: f64) -> Vec<f64> {
        let checked = Checked::new(sets).unwrap();
        let rows = checked.rows(true);
        let (z, deviations) = standardized(&rows, checked.width).unwrap();
        let u: Vec<f64> = w.iter().zip(&deviations).map(|(w, deviation)| f64::from(*w) * deviation).collect();
        let scores: Vec<f64> =
            (0..rows.len()).map(|row| (0..u.len()).map(|index| z[(row, index)] * u[index]).sum()).collect();
        let slopes = |intercept: f64| -> Vec<f64> {
            let slope = |(row, score): (&WeightedRow<'_>, &f64)| {
                row.weight * (1.0 / (1.0 + (-(score + intercept)).exp()) - f64::from(u8::from(row.positive)))
            };
            rows.iter().zip(&scores).map(slope).collect()
        };
        let (mut low, mut high) = (-100.0, 100.0);
        for _ in 0..200 {
            let middle = (low + high) / 2.0;
            if slopes(middle).iter().sum::<f64>() > 0.0 { high = middle } else { low = middle }
        }
        let slopes = slopes(low);
        (0..u.len())
            .map(|index| (0..rows.len()).map(|row| slopes[row] * z[(row, index)]).sum::<f64>() + penalty * u[index])
            .collect()
    }

    #[test]
    fn the_gradient_is_zero_where_it_ends_in_either_space() {
        // More rows than dimensions, fewer, and two sets of unlike sizes.
        for (n, width, penalty) in [(60, 7, 0.1), (8, 40, 0.01), (30, 30, 1.0), (40, 6, 1e-4)] {
            let (positive, negative) = (noise(n, width, 1.0, 1), noise(n / 2, width, 0.0, 2));
            let others = noise(n, width, -2.0, 3);
            let rows = |values| Residual::new(values, width).unwrap();
            let sets = [
                ContrastSet::new(rows(&positive), rows(&negative)),
                ContrastSet { weight: 2.0, ..ContrastSet::new(rows(&positive), rows(&others)) },
            ];
            for sets in [&sets[..1], &sets] {
                let found = logistic_regression(sets, penalty).unwrap();
                for slope in gradient(sets, &found.values, penalty) {
                    // Rounding to `f32` moves it by some 1e-7 of the penalty's and the curvature's share.
                    assert!(slope.abs() < 1e-6, "{n} × {width}: {slope}");
                }
            }
        }
    }

    #[test]
    fn both_spaces_find_the_same() {
        let (positive, negative) = (noise(10, 20, 1.0, 4), noise(10, 20, 0.0, 5));
        let rows = |values| Residual::new(values, 20).unwrap();
        let sets = [ContrastSet::new(rows(&positive), rows(&negative))];
        let checked = Checked::new(&sets).unwrap();
        let weighted = checked.rows(true);
        let (z, _) = standardized(&weighted, 20).unwrap();
        let of = |space: Space<'_>| space.direction(&minimise(&space, &weighted, 0.05).unwrap());
        let (by_rows, by_dimensions) = (of(Space::of(z.as_ref())), of(Space::Dimensions(z.as_ref())));
        for (a, b) in by_rows.iter().zip(&by_dimensions) {
            assert!((a - b).abs() < 1e-9, "{a} and {b}");
        }
    }

    #[test]
    fn what_gives_no_regression_is_refused() {
        let one = |positive: &[f32], negative: &[f32], penalty| {
            let rows = |values| Residual::new(values, 1).unwrap();
            logistic_regression(&[ContrastSet::new(rows(positive), rows(negative))], penalty).unwrap_err()
        };
        for penalty in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(one(&[1.0], &[2.0], penalty), SteeringError::Penalty { .. }));
        }
        assert_eq!(one(&[1.0, 1.0], &[1.0], 0.1), SteeringError::ZeroDirection);
        assert!(matches!(one(&[1.0], &[], 0.1), SteeringError::EmptyClass { class: "negative" }));
    }
}
