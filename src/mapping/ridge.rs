use super::{AffineMap, MappingError, Standardization};
use crate::tensor::{LayerIndex, Residual, cosine};
use nalgebra::{Cholesky, DMatrix, DVector, SymmetricEigen};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;
use std::ops::Range;

/// Rows multiplied in `f32` before their sum goes into an `f64` one: few enough that rounding stays near that of a single
/// product, enough that the multiplication is fast.
const BLOCK_ROWS: usize = 512;

/// How a ridge regression is fitted and judged.
#[derive(Debug, Clone, PartialEq)]
pub struct RidgeOptions {
    /// Penalties to choose from, each as a multiple of the number of rows fitted on, so that a value means the same for any
    /// amount of data.
    pub lambdas: Vec<f64>,
    /// Part of the documents to hold out, between 0 and 1; at least one document is held out and one kept.
    pub heldout_fraction: f64,
    /// Seed of the choice of documents to hold out.
    pub seed: u64,
}

impl Default for RidgeOptions {
    fn default() -> Self {
        Self { lambdas: vec![1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0], heldout_fraction: 0.2, seed: 0 }
    }
}

/// How well a map predicts rows of documents it was not fitted on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MappingQuality {
    /// The chosen penalty, as a multiple of the number of rows (see [`RidgeOptions::lambdas`]).
    pub lambda: f64,
    /// Fraction of variance unexplained, `Σ‖z − ẑ‖² / Σ‖z‖²` over held-out rows: `z` is the target standardised with the mean and
    /// scale of the training rows, so 1 is what predicting their mean scores. A bad map can exceed 1.
    pub fraction_unexplained: f64,
    /// Mean over held-out rows of the cosine of `ẑ` and `z`.
    pub cosine: f64,
    pub n_train: usize,
    pub n_heldout: usize,
    /// Of the regression the other way round, where there is one ([`AffineMap::backward`]).
    pub backward: Option<FitQuality>,
}

/// How well a regression predicts held-out rows: fields as in [`MappingQuality`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FitQuality {
    pub lambda: f64,
    pub fraction_unexplained: f64,
    pub cosine: f64,
}

/// The source model's half of a ridge regression: whatever does not depend on the target, computed once for all target layers.
///
/// `W = (ZₛᵀZₛ + λI)⁻¹ ZₛᵀZₜ` with both sides standardised a dimension at a time. Documents are split by a seeded shuffle into
/// training and held-out ones, λ is the one with the lowest fraction of variance unexplained on the held-out rows, and
/// [`fit`](Self::fit) then refits on all rows, standardised anew over all rows, with that λ.
///
/// With `ZₛᵀZₛ = QΛQᵀ` every λ costs `O(d_s²)` once `QᵀZₛᵀZₜ` is known; per target there is one pass over its rows. Standardised
/// values and products of up to 512 rows are in `f32`, sums of those and all else in `f64`. It is `Sync`: target layers may be
/// judged from several threads.
#[derive(Debug, Clone)]
pub struct SourceFit {
    split: Split,
    lambdas: Vec<f64>,
    source: Side,
    /// Of all source rows, for the refit.
    source_moments: Moments,
    /// `ZₛᵀZₛ` over training and over held-out rows, `[d_s, d_s]`.
    train_gram: DMatrix<f64>,
    heldout_gram: DMatrix<f64>,
    /// `Λ` and `Q` of `train_gram`.
    eigenvalues: DVector<f64>,
    eigenvectors: DMatrix<f64>,
    /// `Qᵀ · heldout_gram · Q`
    heldout_in_eigenbasis: DMatrix<f64>,
}

impl SourceFit {
    /// `source` is `[n, d_s]`, and `documents` `[n]` says which document each row is from. Rows of first positions are left out by
    /// the caller, before rows are paired.
    ///
    /// # Errors
    /// If an option is out of range, lengths differ, a value is not finite, or there are fewer than two documents or two rows to
    /// fit on.
    pub fn new(source: Residual, documents: &[u32], options: &RidgeOptions) -> Result<Self, MappingError> {
        check_options(options)?;
        if documents.len() != source.n_rows() {
            let (expected, found) = (source.n_rows(), documents.len());
            return Err(MappingError::RowCount { what: "`documents`", expected, found });
        }
        let split = Split::new(documents, options.heldout_fraction, options.seed)?;
        let (source, source_moments) = (Side::new(source, &split, "source")?, Moments::new(source, &split.order));
        let train_gram = cross_product(&source.rows, &source.rows, split.train());
        let heldout_gram = cross_product(&source.rows, &source.rows, split.heldout());
        let SymmetricEigen { eigenvalues, eigenvectors } = SymmetricEigen::new(train_gram.clone());
        let heldout_in_eigenbasis = eigenvectors.transpose() * &heldout_gram * &eigenvectors;
        Ok(Self {
            split,
            lambdas: options.lambdas.clone(),
            source,
            source_moments,
            train_gram,
            heldout_gram,
            // A Gram matrix has none below zero but for rounding.
            eigenvalues: eigenvalues.map(|value| value.max(0.0)),
            eigenvectors,
            heldout_in_eigenbasis,
        })
    }

    /// How well `target`, `[n, d_t]` with the rows of the source, can be predicted: for choosing layers.
    ///
    /// # Errors
    /// If the number of rows differs, a value is not finite, the held-out target does not vary, or numbers overflow.
    pub fn quality(&self, target: Residual) -> Result<MappingQuality, MappingError> {
        self.judge(target).map(|judged| judged.quality)
    }

    /// The map to `target`, `[n, d_t]` with the rows of the source, fitted on all rows, and its [`quality`](Self::quality), which
    /// is that of the fit on training rows alone.
    ///
    /// # Errors
    /// As [`quality`](Self::quality), and if the system to solve is singular.
    pub fn fit(
        &self,
        target: Residual,
        source_layer: LayerIndex,
        target_layer: LayerIndex,
    ) -> Result<(AffineMap, MappingQuality), MappingError> {
        let Judged { quality, train_moments, train_cross, heldout_cross } = self.judge(target)?;
        let n_rows = self.split.order.len() as f64;
        let target_moments = Moments::new(target, &self.split.order);
        let source_change = Change::new(&self.source.moments, &self.source_moments);
        let target_change = Change::new(&train_moments, &target_moments);
        let mut gram = restandardised(&self.train_gram + &self.heldout_gram, n_rows, &source_change, &source_change);
        let cross = restandardised(train_cross + heldout_cross, n_rows, &source_change, &target_change);
        for index in 0..gram.nrows() {
            gram[(index, index)] += quality.lambda * n_rows;
        }
        let numerical = MappingError::Numerical { lambda: quality.lambda };
        let weight = Cholesky::new(gram).ok_or(numerical)?.solve(&cross);
        // nalgebra's matrices are column-major: those of the transpose are the rows.
        let weight = weight.transpose().iter().map(|value| *value as f32).collect();
        let map = AffineMap::new(
            source_layer,
            target_layer,
            self.source_moments.rounded(),
            target_moments.rounded(),
            weight,
        )?;
        Ok((map, quality))
    }

    /// `map` with its [`backward`](AffineMap::backward) weight, and that one's quality: here the *target* of
    /// `map` is this fit's source, and `source` is the rows of the source of `map`.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn fit_backward(&self, map: AffineMap, source: Residual) -> Result<(AffineMap, FitQuality), MappingError> {
        let (backward, quality) = self.fit(source, map.target_layer(), map.source_layer())?;
        let MappingQuality { lambda, fraction_unexplained, cosine, .. } = quality;
        Ok((map.with_backward(backward.weight().to_vec())?, FitQuality { lambda, fraction_unexplained, cosine }))
    }

    fn judge(&self, target: Residual) -> Result<Judged, MappingError> {
        if target.n_rows() != self.split.order.len() {
            let (expected, found) = (self.split.order.len(), target.n_rows());
            return Err(MappingError::RowCount { what: "`target`", expected, found });
        }
        let target = Side::new(target, &self.split, "target")?;
        let train_cross = cross_product(&self.source.rows, &target.rows, self.split.train());
        let heldout_cross = cross_product(&self.source.rows, &target.rows, self.split.heldout());
        let to_eigenbasis = self.eigenvectors.transpose();
        let train_in_eigenbasis = &to_eigenbasis * &train_cross;
        let lambda = self.best_lambda(&train_in_eigenbasis, &(&to_eigenbasis * &heldout_cross))?;
        let mut weight = train_in_eigenbasis;
        for (mut row, shrunk) in weight.row_iter_mut().zip(self.shrinkage(lambda).iter()) {
            row *= *shrunk;
        }
        let weight = &self.eigenvectors * weight;
        let quality = self.heldout_quality(&target, &weight, lambda)?;
        Ok(Judged { quality, train_moments: target.moments, train_cross, heldout_cross })
    }

    /// `(Λ + λ n_train)⁻¹`
    fn shrinkage(&self, lambda: f64) -> DVector<f64> {
        let penalty = lambda * self.split.n_train as f64;
        self.eigenvalues.map(|value| 1.0 / (value + penalty))
    }

    /// The λ with the lowest held-out `Σ‖z − zₛW‖²`. With `B = QᵀZₛᵀZₜ`, `S = (Λ + λ n)⁻¹` and `W = QSB`, that sum is, but for a
    /// constant, `tr(SBBᵀS · QᵀGQ) − 2 tr(SB · (QᵀC)ᵀ)`, `G` and `C` being the held-out Gram and cross products.
    fn best_lambda(
        &self,
        train_in_eigenbasis: &DMatrix<f64>,
        heldout_in_eigenbasis: &DMatrix<f64>,
    ) -> Result<f64, MappingError> {
        let quadratic =
            (train_in_eigenbasis * train_in_eigenbasis.transpose()).component_mul(&self.heldout_in_eigenbasis);
        let linear = train_in_eigenbasis.component_mul(heldout_in_eigenbasis).column_sum();
        let loss = |lambda: f64| {
            let shrinkage = self.shrinkage(lambda);
            shrinkage.dot(&(&quadratic * &shrinkage)) - 2.0 * shrinkage.dot(&linear)
        };
        let mut best = (f64::NAN, f64::INFINITY);
        for &lambda in &self.lambdas {
            let loss = loss(lambda);
            if !loss.is_finite() {
                return Err(MappingError::Numerical { lambda });
            }
            if loss < best.1 {
                best = (lambda, loss);
            }
        }
        Ok(best.0)
    }

    fn heldout_quality(
        &self,
        target: &Side,
        weight: &DMatrix<f64>,
        lambda: f64,
    ) -> Result<MappingQuality, MappingError> {
        let heldout = self.split.heldout();
        let n_heldout = heldout.len();
        let to_target = weight.transpose().map(|value| value as f32);
        let mut predicted = DMatrix::zeros(to_target.nrows(), n_heldout);
        predicted.gemm(1.0, &to_target, &self.source.rows.columns(heldout.start, n_heldout), 0.0);
        let (mut unexplained, mut total, mut cosines) = (0.0f64, 0.0f64, 0.0f64);
        let width = to_target.nrows();
        let actual = &target.rows.as_slice()[heldout.start * width..];
        for (found, actual) in predicted.as_slice().chunks_exact(width).zip(actual.chunks_exact(width)) {
            for (found, actual) in found.iter().zip(actual) {
                unexplained += (f64::from(*actual) - f64::from(*found)).powi(2);
                total += f64::from(*actual).powi(2);
            }
            cosines += cosine(found, actual);
        }
        if total == 0.0 {
            return Err(MappingError::ConstantTarget);
        }
        let fraction_unexplained = unexplained / total;
        let cosine = cosines / n_heldout as f64;
        if !fraction_unexplained.is_finite() || !cosine.is_finite() {
            return Err(MappingError::Numerical { lambda });
        }
        Ok(MappingQuality {
            lambda,
            fraction_unexplained,
            cosine,
            n_train: self.split.n_train,
            n_heldout,
            backward: None,
        })
    }
}

/// What judging a target leaves behind for the fit to use.
struct Judged {
    quality: MappingQuality,
    /// Of the target.
    train_moments: Moments,
    /// `ZₛᵀZₜ` over training and over held-out rows, `[d_s, d_t]`.
    train_cross: DMatrix<f64>,
    heldout_cross: DMatrix<f64>,
}

/// Which rows are trained on: whole documents.
#[derive(Debug, Clone)]
pub(crate) struct Split {
    /// Indices of all rows, those of training documents first.
    pub(crate) order: Vec<usize>,
    n_train: usize,
}

impl Split {
    pub(crate) fn new(documents: &[u32], heldout_fraction: f64, seed: u64) -> Result<Self, MappingError> {
        let mut shuffled: Vec<u32> = documents.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        if shuffled.len() < 2 {
            return Err(MappingError::TooFewDocuments { expected: 2, found: shuffled.len() });
        }
        shuffled.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let n_heldout = (shuffled.len() as f64 * heldout_fraction).round() as usize;
        let heldout: BTreeSet<u32> = shuffled[..n_heldout.clamp(1, shuffled.len() - 1)].iter().copied().collect();
        let (mut order, heldout): (Vec<usize>, Vec<usize>) =
            (0..documents.len()).partition(|row| !heldout.contains(&documents[*row]));
        let n_train = order.len();
        if n_train < 2 {
            return Err(MappingError::TooFewRows { expected: 2, found: n_train });
        }
        order.extend(heldout);
        Ok(Self { order, n_train })
    }

    pub(crate) fn train(&self) -> Range<usize> {
        0..self.n_train
    }

    pub(crate) fn heldout(&self) -> Range<usize> {
        self.n_train..self.order.len()
    }
}

/// One model's rows, standardised with the mean and scale of the training rows.
#[derive(Debug, Clone)]
struct Side {
    /// `[width, n]` column-major, a column a row of activations, in the split's order.
    rows: DMatrix<f32>,
    /// Of the training rows.
    moments: Moments,
}

impl Side {
    fn new(rows: Residual, split: &Split, side: &'static str) -> Result<Self, MappingError> {
        if let Some(index) = rows.values().iter().position(|value| !value.is_finite()) {
            let (row, value) = (index / rows.width(), rows.values()[index]);
            return Err(MappingError::NonFiniteRow { side, row, index: index % rows.width(), value });
        }
        let moments = Moments::new(rows, &split.order[split.train()]);
        let mut standardised = Vec::with_capacity(rows.values().len());
        for row in &split.order {
            let values = rows.row(*row).iter().zip(moments.mean.iter().zip(&moments.scale));
            standardised.extend(values.map(|(x, (mean, scale))| ((f64::from(*x) - mean) / scale) as f32));
        }
        Ok(Self { rows: DMatrix::from_vec(rows.width(), split.order.len(), standardised), moments })
    }
}

/// Mean and standard deviation of each dimension, `[width]`.
#[derive(Debug, Clone)]
struct Moments {
    mean: Vec<f64>,
    /// Positive: 1 where the dimension does not vary, or too little for an `f32`.
    scale: Vec<f64>,
}

impl Standardization {
    /// Of `rows`; a dimension that does not vary has scale 1.
    ///
    /// # Panics
    /// If there are no rows.
    pub fn of(rows: Residual) -> Self {
        Moments::new(rows, &(0..rows.n_rows()).collect::<Vec<_>>()).rounded()
    }
}

impl Moments {
    /// `which` has at least one row.
    fn new(rows: Residual, which: &[usize]) -> Self {
        let n = which.len() as f64;
        // Taken from the first row, so that the mean of a constant dimension is that constant and its deviation exactly 0.
        let first = rows.row(which[0]);
        let mut mean = vec![0.0f64; rows.width()];
        for row in which {
            for ((sum, x), first) in mean.iter_mut().zip(rows.row(*row)).zip(first) {
                *sum += f64::from(*x) - f64::from(*first);
            }
        }
        for (sum, first) in mean.iter_mut().zip(first) {
            *sum = f64::from(*first) + *sum / n;
        }
        let mut scale = vec![0.0f64; rows.width()];
        for row in which {
            for ((sum, x), mean) in scale.iter_mut().zip(rows.row(*row)).zip(&mean) {
                *sum += (f64::from(*x) - mean).powi(2);
            }
        }
        for sum in &mut scale {
            let deviation = (*sum / n).sqrt();
            *sum = if (deviation as f32).is_normal() { deviation } else { 1.0 };
        }
        Self { mean, scale }
    }

    fn rounded(&self) -> Standardization {
        Standardization {
            mean: self.mean.iter().map(|value| *value as f32).collect(),
            scale: self.scale.iter().map(|value| *value as f32).collect(),
        }
    }
}

/// `Σ a bᵀ` over the columns `columns` of `a`, `[d_a, n]`, and `b`, `[d_b, n]`: `[d_a, d_b]`.
fn cross_product(a: &DMatrix<f32>, b: &DMatrix<f32>, columns: Range<usize>) -> DMatrix<f64> {
    let mut sum = DMatrix::<f64>::zeros(a.nrows(), b.nrows());
    let mut product = DMatrix::<f32>::zeros(a.nrows(), b.nrows());
    for start in columns.clone().step_by(BLOCK_ROWS) {
        let n = BLOCK_ROWS.min(columns.end - start);
        product.gemm(1.0, &a.columns(start, n), &b.columns(start, n).transpose(), 0.0);
        sum.zip_apply(&product, |sum, product| *sum += f64::from(product));
    }
    sum
}

/// The mean and scale of all rows in units standardised by the training rows, `[width]`.
struct Change {
    shift: Vec<f64>,
    stretch: Vec<f64>,
}

impl Change {
    fn new(train: &Moments, all: &Moments) -> Self {
        let shift =
            all.mean.iter().zip(&train.mean).zip(&train.scale).map(|((all, train), scale)| (all - train) / scale);
        let stretch = all.scale.iter().zip(&train.scale).map(|(all, train)| all / train);
        Self { shift: shift.collect(), stretch: stretch.collect() }
    }
}

/// `ZₐᵀZ_b` over `n` rows with both sides standardised by all rows, from `product`, where they are standardised by the training
/// rows: `(product − n mₐ m_bᵀ) / (sₐ s_bᵀ)` with `m` the shift and `s` the stretch. `m` is small, so little cancels.
fn restandardised(mut product: DMatrix<f64>, n: f64, a: &Change, b: &Change) -> DMatrix<f64> {
    for (mut column, (b_shift, b_stretch)) in product.column_iter_mut().zip(b.shift.iter().zip(&b.stretch)) {
        for (value, (a_shift, a_stretch)) in column.iter_mut().zip(a.shift.iter().zip(&a.stretch)) {
            *value = (*value - n * a_shift * b_shift) / (a_stretch * b_stretch);
        }
    }
    product
}

fn check_options(options: &RidgeOptions) -> Result<(), MappingError> {
    let refuse = |option, expected, found: String| -> Result<(), MappingError> {
        Err(MappingError::Options { option, expected, found })
    };
    if options.lambdas.is_empty() || options.lambdas.iter().any(|lambda| !lambda.is_normal() || *lambda < 0.0) {
        return refuse("lambdas", "one or more positive numbers", format!("{:?}", options.lambdas));
    }
    if !(options.heldout_fraction > 0.0 && options.heldout_fraction < 1.0) {
        return refuse("heldout_fraction", "a number between 0 and 1", options.heldout_fraction.to_string());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::RngExt;

    const ROWS_A_DOCUMENT: usize = 6;

    /// Rows of two models, `y = x·truth + noise`, with dimensions of very different sizes and offsets.
    struct Synthetic {
        source_width: usize,
        target_width: usize,
        source: Vec<f32>,
        target: Vec<f32>,
        documents: Vec<u32>,
    }

    impl Synthetic {
        fn new(n: usize, source_width: usize, target_width: usize, noise: f64, seed: u64) -> Self {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut random = |n: usize| (0..n).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f64>>();
            let truth = random(source_width * target_width);
            // A factor common to all dimensions makes them correlated, as activations are.
            let (common, own, errors) = (random(n), random(n * source_width), random(n * target_width));
            let (mut source, mut target) = (Vec::new(), Vec::new());
            for row in 0..n {
                let x: Vec<f64> = (0..source_width).map(|i| 0.7 * common[row] + own[row * source_width + i]).collect();
                for j in 0..target_width {
                    let signal: f64 = (0..source_width).map(|i| x[i] * truth[i * target_width + j]).sum();
                    let value = signal + noise * (source_width as f64).sqrt() * errors[row * target_width + j];
                    target.push((30.0 + value * 10f64.powi(j as i32 % 4)) as f32);
                }
                source.extend(x.iter().enumerate().map(|(i, x)| (x * 10f64.powi(i as i32 % 3) - 5.0) as f32));
            }
            let documents = (0..n).map(|row| (row / ROWS_A_DOCUMENT) as u32 * 7).collect();
            Self { source_width, target_width, source, target, documents }
        }

        fn source(&self) -> Residual<'_> {
            Residual::new(&self.source, self.source_width).unwrap()
        }

        fn target(&self) -> Residual<'_> {
            Residual::new(&self.target, self.target_width).unwrap()
        }

        fn fit(&self, options: &RidgeOptions) -> (AffineMap, MappingQuality) {
            let fit = SourceFit::new(self.source(), &self.documents, options).unwrap();
            fit.fit(self.target(), LayerIndex(24), LayerIndex(10)).unwrap()
        }
    }

    #[test]
    fn backward_is_the_regression_with_the_sides_exchanged() {
        let data = Synthetic::new(240, 5, 7, 0.3, 3);
        let options = RidgeOptions::default();
        let (map, _) = data.fit(&options);
        let exchanged = SourceFit::new(data.target(), &data.documents, &options).unwrap();
        let (map, quality) = exchanged.fit_backward(map, data.source()).unwrap();
        let (expected, judged) = exchanged.fit(data.source(), LayerIndex(10), LayerIndex(24)).unwrap();
        assert_eq!(map.backward().unwrap(), expected.weight());
        assert_eq!((quality.lambda, quality.fraction_unexplained), (judged.lambda, judged.fraction_unexplained));
        // What the target's row says of the source's reading is the reading of what it says of the source's row.
        let w = [1.0, -2.0, 0.5, 3.0, 0.25];
        let pulled = map.pull_back(&w).unwrap();
        for row in 1..20 {
            let read = |row: &[f32]| pulled.iter().zip(row).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
            let change = read(data.target().row(row)) - read(data.target().row(0));
            let predicted = |row: usize| -> f64 {
                expected.apply(data.target().row(row)).iter().zip(&w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
            };
            let expected = predicted(row) - predicted(0);
            assert!((change - expected).abs() <= 1e-3 * expected.abs().max(1.0), "{change} {expected}");
        }
    }

    type Rows = Vec<Vec<f64>>;

    fn naive_moments(rows: &Rows) -> (Vec<f64>, Vec<f64>) {
        let n = rows.len() as f64;
        let width = rows[0].len();
        let mean: Vec<f64> = (0..width).map(|j| rows.iter().map(|row| row[j]).sum::<f64>() / n).collect();
        let variance = |j: usize| rows.iter().map(|row| (row[j] - mean[j]).powi(2)).sum::<f64>() / n;
        let scale = (0..width).map(|j| variance(j).sqrt()).collect();
        (mean, scale)
    }

    fn naive_standardised(rows: &Rows, (mean, scale): &(Vec<f64>, Vec<f64>)) -> Rows {
        rows.iter().map(|row| (0..row.len()).map(|j| (row[j] - mean[j]) / scale[j]).collect()).collect()
    }

    /// `(XᵀX + penalty I)⁻¹ XᵀY` by Gaussian elimination with partial pivoting.
    fn naive_ridge(x: &Rows, y: &Rows, penalty: f64) -> Rows {
        let (d_s, d_t) = (x[0].len(), y[0].len());
        let mut system = vec![vec![0.0; d_s + d_t]; d_s];
        for (i, equation) in system.iter_mut().enumerate() {
            for (x, y) in x.iter().zip(y) {
                for (sum, value) in equation.iter_mut().zip(x.iter().chain(y)) {
                    *sum += x[i] * value;
                }
            }
            equation[i] += penalty;
        }
        for pivot in 0..d_s {
            let largest =
                (pivot..d_s).max_by(|a, b| system[*a][pivot].abs().total_cmp(&system[*b][pivot].abs())).unwrap();
            system.swap(pivot, largest);
            let divisor = system[pivot][pivot];
            system[pivot].iter_mut().for_each(|value| *value /= divisor);
            let pivot_row = system[pivot].clone();
            for (i, equation) in system.iter_mut().enumerate() {
                let factor = equation[pivot];
                if i != pivot && factor != 0.0 {
                    equation.iter_mut().zip(&pivot_row).for_each(|(value, pivot)| *value -= factor * pivot);
                }
            }
        }
        system.into_iter().map(|equation| equation[d_s..].to_vec()).collect()
    }

    fn naive_predictions(x: &Rows, weight: &Rows) -> Rows {
        let predict = |row: &Vec<f64>, j: usize| row.iter().zip(weight).map(|(x, weights)| x * weights[j]).sum();
        x.iter().map(|row| (0..weight[0].len()).map(|j| predict(row, j)).collect()).collect()
    }

    #[test]
    fn agrees_with_naive_normal_equations_in_f64() {
        // (rows, d_s, d_t, noise): tiny, wide enough for the blocked products, more rows than one block.
        for (n, d_s, d_t, noise) in [(120, 7, 5, 0.3), (300, 64, 80, 1.0), (1500, 24, 16, 0.05)] {
            let data = Synthetic::new(n, d_s, d_t, noise, n as u64);
            let options = RidgeOptions { seed: 3, ..RidgeOptions::default() };
            let (map, quality) = data.fit(&options);

            let split = Split::new(&data.documents, options.heldout_fraction, options.seed).unwrap();
            let pick = |rows: Residual, which: &[usize]| -> Rows {
                which.iter().map(|row| rows.row(*row).iter().map(|x| f64::from(*x)).collect()).collect()
            };
            let [x_train, x_heldout] = [split.train(), split.heldout()].map(|r| pick(data.source(), &split.order[r]));
            let [y_train, y_heldout] = [split.train(), split.heldout()].map(|r| pick(data.target(), &split.order[r]));
            let (x_moments, y_moments) = (naive_moments(&x_train), naive_moments(&y_train));
            let (x_train, y_train) =
                (naive_standardised(&x_train, &x_moments), naive_standardised(&y_train, &y_moments));
            let (x_heldout, y_heldout) =
                (naive_standardised(&x_heldout, &x_moments), naive_standardised(&y_heldout, &y_moments));
            let unexplained = |lambda: f64| {
                let weight = naive_ridge(&x_train, &y_train, lambda * x_train.len() as f64);
                let predicted = naive_predictions(&x_heldout, &weight);
                let pairs = || predicted.iter().flatten().zip(y_heldout.iter().flatten());
                pairs().map(|(p, y)| (y - p).powi(2)).sum::<f64>() / pairs().map(|(_, y)| y * y).sum::<f64>()
            };
            let best = options.lambdas.iter().copied().min_by(|a, b| unexplained(*a).total_cmp(&unexplained(*b)));
            assert_eq!(Some(quality.lambda), best, "{n} {d_s} {d_t}");
            let expected = unexplained(quality.lambda);
            assert!((quality.fraction_unexplained - expected).abs() < 1e-4 * expected, "{quality:?} {expected}");
            let weight = naive_ridge(&x_train, &y_train, quality.lambda * x_train.len() as f64);
            let cosine_of = |a: &Vec<f64>, b: &Vec<f64>| {
                let dot = |a: &Vec<f64>, b: &Vec<f64>| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
            };
            let cosines = naive_predictions(&x_heldout, &weight)
                .iter()
                .zip(&y_heldout)
                .map(|(p, y)| cosine_of(p, y))
                .sum::<f64>();
            assert!((quality.cosine - cosines / x_heldout.len() as f64).abs() < 1e-4);
            assert_eq!((quality.n_train, quality.n_heldout), (x_train.len(), x_heldout.len()));

            let everything: Vec<usize> = (0..n).collect();
            let (x, y) = (pick(data.source(), &everything), pick(data.target(), &everything));
            let (x_moments, y_moments) = (naive_moments(&x), naive_moments(&y));
            let x = naive_standardised(&x, &x_moments);
            let weight = naive_ridge(&x, &naive_standardised(&y, &y_moments), quality.lambda * n as f64);
            let largest = weight.iter().flatten().fold(0.0f64, |largest, value| largest.max(value.abs()));
            for (found, expected) in map.weight().iter().zip(weight.iter().flatten()) {
                assert!((f64::from(*found) - expected).abs() < 1e-4 * largest, "{found} {expected}");
            }
            for (side, (mean, scale)) in [(map.source(), x_moments), (map.target(), y_moments)] {
                for (found, expected) in side.mean.iter().chain(&side.scale).zip(mean.iter().chain(&scale)) {
                    assert!((f64::from(*found) - expected).abs() <= 1e-6 * expected.abs());
                }
            }
        }
    }

    #[test]
    fn a_known_map_is_recovered() {
        let data = Synthetic::new(3000, 20, 12, 0.0, 1);
        let options = RidgeOptions { lambdas: vec![1e-7, 1e-2], ..RidgeOptions::default() };
        let (map, quality) = data.fit(&options);
        assert_eq!(quality.lambda, 1e-7);
        assert!(quality.fraction_unexplained < 1e-6 && quality.cosine > 0.999_999, "{quality:?}");
        for (x, y) in data.source().rows().zip(data.target().rows()) {
            for ((found, expected), scale) in map.apply(x).iter().zip(y).zip(&map.target().scale) {
                assert!((found - expected).abs() < 1e-3 * scale);
            }
        }
        let noise = Synthetic::new(3000, 20, 12, 0.5, 1);
        let (_, quality) = noise.fit(&options);
        // Signal and noise variances of a target dimension, by construction: about 20·(1/3)·(1/3·(1 + 0.49)) and 20·0.25/3.
        assert!((0.2..0.45).contains(&quality.fraction_unexplained), "{quality:?}");
    }

    #[test]
    fn a_target_unrelated_to_the_source_is_unexplained() {
        let (data, other) = (Synthetic::new(1200, 16, 8, 0.5, 1), Synthetic::new(1200, 16, 8, 0.5, 2));
        let fit = SourceFit::new(data.source(), &data.documents, &RidgeOptions::default()).unwrap();
        let quality = fit.quality(other.target()).unwrap();
        assert!(quality.fraction_unexplained > 0.95 && quality.cosine.abs() < 0.1, "{quality:?}");
        assert_eq!(quality.lambda, 1.0);
    }

    #[test]
    fn one_source_serves_all_targets_alike() {
        let data = Synthetic::new(240, 9, 6, 0.3, 5);
        let options = RidgeOptions { seed: 11, ..RidgeOptions::default() };
        let fit = SourceFit::new(data.source(), &data.documents, &options).unwrap();
        let quality = fit.quality(data.target()).unwrap();
        assert_eq!(fit.fit(data.target(), LayerIndex(24), LayerIndex(10)).unwrap(), data.fit(&options));
        assert_eq!(quality, data.fit(&options).1);
        let reseeded = data.fit(&RidgeOptions { seed: 12, ..options }).1;
        assert_ne!(quality.fraction_unexplained, reseeded.fraction_unexplained);
    }

    #[test]
    fn a_dimension_that_does_not_vary_is_harmless() {
        let mut data = Synthetic::new(240, 4, 3, 0.1, 6);
        data.source.iter_mut().skip(1).step_by(4).for_each(|x| *x = 0.1);
        data.target.iter_mut().step_by(3).for_each(|y| *y = -777.7);
        let (map, quality) = data.fit(&RidgeOptions::default());
        assert_eq!((map.source().mean[1], map.source().scale[1]), (0.1, 1.0));
        assert!(map.source().scale.iter().chain(&map.target().scale).all(|scale| *scale > 0.0));
        assert!(quality.fraction_unexplained.is_finite());
        assert_eq!(map.apply(data.source().row(5))[0], -777.7);
    }

    #[test]
    fn what_cannot_be_fitted_is_refused() {
        let data = Synthetic::new(60, 4, 3, 0.1, 7);
        let source = |options: RidgeOptions, documents: &[u32]| {
            SourceFit::new(data.source(), documents, &options).unwrap_err().to_string()
        };
        let with =
            |lambdas: &[f64], heldout_fraction| RidgeOptions { lambdas: lambdas.to_vec(), heldout_fraction, seed: 0 };
        let good = RidgeOptions::default;
        assert_eq!(source(with(&[], 0.2), &data.documents), "`lambdas` is [], expected one or more positive numbers");
        assert_eq!(
            source(with(&[0.0], 0.2), &data.documents),
            "`lambdas` is [0.0], expected one or more positive numbers"
        );
        assert_eq!(
            source(with(&[1.0], f64::NAN), &data.documents),
            "`heldout_fraction` is NaN, expected a number between 0 and 1"
        );
        assert_eq!(
            source(with(&[1.0], 1.0), &data.documents),
            "`heldout_fraction` is 1, expected a number between 0 and 1"
        );
        assert!(source(good(), &data.documents[1..]).starts_with("`documents` has 59 rows, expected 60"));
        assert!(source(good(), &[4; 60]).starts_with("rows of 1 documents, expected 2 or more"));

        let two_rows = SourceFit::new(Residual::new(&[1.0, 2.0], 1).unwrap(), &[0, 1], &good()).unwrap_err();
        assert_eq!(two_rows, MappingError::TooFewRows { expected: 2, found: 1 });
        let none = SourceFit::new(Residual::new(&[], 1).unwrap(), &[], &good()).unwrap_err();
        assert_eq!(none, MappingError::TooFewDocuments { expected: 2, found: 0 });
        let mut spoilt = data.source.clone();
        spoilt[9] = f32::INFINITY;
        let error = SourceFit::new(Residual::new(&spoilt, 4).unwrap(), &data.documents, &good()).unwrap_err();
        let expected = MappingError::NonFiniteRow { side: "source", row: 2, index: 1, value: f32::INFINITY };
        assert_eq!(error, expected);

        let fit = SourceFit::new(data.source(), &data.documents, &good()).unwrap();
        let target = |values: &[f32]| fit.quality(Residual::new(values, 3).unwrap()).unwrap_err();
        assert_eq!(target(&data.target[3..]), MappingError::RowCount { what: "`target`", expected: 60, found: 59 });
        assert_eq!(target(&vec![2.5; 180]), MappingError::ConstantTarget);
        let mut spoilt = data.target.clone();
        spoilt[0] = f32::NEG_INFINITY;
        assert!(
            target(&spoilt).to_string().starts_with("a row of the target activations has a non-finite value: row 0")
        );
    }

    #[test]
    fn numbers_past_f32_are_an_error_and_not_a_map() {
        let mut data = Synthetic::new(60, 4, 3, 0.1, 8);
        let split = Split::new(&data.documents, 0.2, 0).unwrap();
        // Constant in training, so its scale is 1, and enormous in the rows held out.
        for (place, row) in split.order.iter().enumerate() {
            data.source[row * 4] = if place < split.n_train { 0.0 } else { 3e38 };
            data.target[row * 3] = if place < split.n_train { 0.0 } else { 3e38 };
        }
        let fit = SourceFit::new(data.source(), &data.documents, &RidgeOptions::default()).unwrap();
        assert!(matches!(fit.quality(data.target()), Err(MappingError::Numerical { .. })));
    }

    proptest! {
        #[test]
        fn documents_never_straddle_the_split(
            documents in proptest::collection::vec(0u32..30, 2..200),
            fraction in 0.01f64..0.99,
            seed in any::<u64>(),
        ) {
            if let Ok(split) = Split::new(&documents, fraction, seed) {
                let of = |range: Range<usize>| split.order[range].iter().map(|row| documents[*row]).collect::<BTreeSet<_>>();
                let (train, heldout) = (of(split.train()), of(split.heldout()));
                prop_assert!(train.is_disjoint(&heldout) && !train.is_empty() && !heldout.is_empty());
                prop_assert!((heldout.len() as f64 - fraction * (train.len() + heldout.len()) as f64).abs() < 1.0);
                let mut rows = split.order.clone();
                rows.sort_unstable();
                prop_assert!(rows.into_iter().eq(0..documents.len()));
            }
        }
    }
}
