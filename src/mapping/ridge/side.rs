use super::folds::Folds;
use super::products::{self, Rows, gram, in_parallel, narrowed};
use crate::mapping::MappingError;
use crate::mapping::moments::{CHUNK_ROWS, Moments};
use crate::tensor::Residual;
use faer::Mat;
use std::sync::OnceLock;

/// One layer of one model: its standardised rows and their Gram matrices, computed once for all layers that it is paired with.
#[derive(Debug)]
pub struct Side {
    width: usize,
    /// `[n, width]`, standardised by all rows, in the order of the folds.
    rows: Vec<f32>,
    /// Of all rows, in units of the activations.
    pub(super) moments: Moments,
    /// `Σ z` and `Σ zzᵀ` over each part.
    pub(super) sums: Vec<Vec<f64>>,
    grams: Vec<Mat<f64>>,
    /// For each part that is held out, the other parts' moments.
    pub(super) training: Vec<Change>,
    /// The first part, standardised by the other parts.
    heldout: Vec<f32>,
    basis: OnceLock<Option<Basis>>,
}

/// The eigenbasis of the Gram matrix over the rows that are fitted on when the first part is held out.
#[derive(Debug)]
pub(super) struct Basis {
    /// `Λ`, ascending, none below zero.
    pub eigenvalues: Vec<f64>,
    /// `Q`
    pub vectors: Mat<f32>,
    /// `QᵀGQ`, `G` the Gram matrix over the first part.
    pub heldout: Mat<f32>,
}

/// Mean and scale of some rows, in units standardised by all.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub mean: Vec<f64>,
    /// `1/σ`; 0 where the dimension does not vary in these rows, so that nothing is predicted from it.
    pub inverse: Vec<f64>,
    /// As `inverse`, but 1 where it does not vary: as large as over all rows.
    pub measure: Vec<f64>,
}

impl Change {
    fn of(moments: Moments) -> Self {
        let inverse = moments.deviations().map(|found| found.map_or(0.0, f64::recip)).collect();
        let measure = moments.deviations().map(|found| found.map_or(1.0, f64::recip)).collect();
        Self { mean: moments.mean, inverse, measure }
    }
}

impl Side {
    pub(super) fn new(folds: &Folds, rows: Residual, side: &'static str, threads: usize) -> Result<Self, MappingError> {
        let (values, width) = (rows.values(), rows.width());
        if rows.n_rows() != folds.order.len() {
            let (what, expected, found) = (side, folds.order.len(), rows.n_rows());
            return Err(MappingError::RowCount { what, expected, found });
        }
        if let Some((row, index, value)) = rows.first_non_finite() {
            return Err(MappingError::NonFiniteRow { side, row, index, value });
        }
        let moments = moments(values, width, threads);
        let rows = standardised(rows, &folds.order, &moments, threads);
        let part = |part: &std::ops::Range<usize>| Rows { values: &rows, width }.range(part.clone());
        let parts: Vec<Moments> =
            folds.parts.iter().map(|range| self::moments(part(range).values, width, threads)).collect();
        let sums = parts.iter().map(|part| part.mean.iter().map(|mean| mean * part.n as f64).collect()).collect();
        let grams = folds.parts.iter().map(|range| gram(part(range), threads)).collect();
        let training: Vec<Change> = (0..folds.judged)
            .map(|held| {
                let others = parts.iter().enumerate().filter(|(index, _)| *index != held);
                Change::of(others.map(|(_, part)| part.clone()).reduce(Moments::merge).expect("two parts or more"))
            })
            .collect();
        let mut heldout = part(&folds.parts[0]).values.to_vec();
        for row in heldout.chunks_exact_mut(width) {
            for (value, (mean, measure)) in row.iter_mut().zip(training[0].mean.iter().zip(&training[0].measure)) {
                *value = ((f64::from(*value) - mean) * measure) as f32;
            }
        }
        Ok(Self { width, rows, moments, sums, grams, training, heldout, basis: OnceLock::new() })
    }

    /// Does now what the first pair of this source would have to: for callers who have several threads to share it among.
    pub fn prepare(&self, regression: &super::Regression, threads: usize) {
        self.basis(&regression.folds, threads);
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub(super) fn part(&self, folds: &Folds, part: usize) -> Rows<'_> {
        Rows { values: &self.rows, width: self.width }.range(folds.parts[part].clone())
    }

    pub(super) fn heldout(&self) -> Rows<'_> {
        Rows { values: &self.heldout, width: self.width }
    }

    /// `ZᵀZ` over all rows, standardised by all of them.
    pub(super) fn gram(&self) -> Mat<f64> {
        total(&self.grams, None)
    }

    /// `ZᵀZ` over the rows to fit on when `held` is held out, and over `held`, both standardised by the former.
    pub(super) fn split_gram(&self, folds: &Folds, held: usize) -> (Mat<f64>, Mat<f64>) {
        split(folds, &self.grams, held, self, self)
    }

    /// `Σ‖z‖²` over `held`, standardised by the other parts.
    pub(super) fn heldout_variance(&self, folds: &Folds, held: usize) -> f64 {
        let (change, sums, n) = (&self.training[held], &self.sums[held], folds.parts[held].len() as f64);
        let of = |index: usize| {
            let (mean, square) = (change.mean[index], self.grams[held][(index, index)]);
            (square - 2.0 * mean * sums[index] + n * mean * mean) * change.measure[index].powi(2)
        };
        (0..self.width).map(of).sum()
    }

    /// `None` if it can't be had, as where numbers overflow.
    pub(super) fn basis(&self, folds: &Folds, threads: usize) -> Option<&Basis> {
        let make = || {
            let (train, heldout) = self.split_gram(folds, 0);
            let (eigenvalues, vectors) = products::eigen(&train, threads)?;
            let rotated = products::product(heldout.as_ref(), vectors.as_ref(), 1.0, threads);
            let heldout = narrowed(&products::product(vectors.transpose(), rotated.as_ref(), 1.0, threads));
            // A Gram matrix has none below zero but for rounding.
            let eigenvalues = eigenvalues.into_iter().map(|value| value.max(0.0)).collect();
            Some(Basis { eigenvalues, vectors: narrowed(&vectors), heldout })
        };
        self.basis.get_or_init(make).as_ref()
    }
}

/// Products `Σ abᵀ` of each part, as the two of the rows fitted on when `held` is held out and of `held`, standardised by the former.
pub(super) fn split(folds: &Folds, products: &[Mat<f64>], held: usize, a: &Side, b: &Side) -> (Mat<f64>, Mat<f64>) {
    let (a_change, b_change) = (&a.training[held], &b.training[held]);
    let centred = |product: Mat<f64>, n: usize, a_sum: &[f64], b_sum: &[f64]| {
        let mut product = product;
        for column in 0..b.width {
            let (b_mean, b_sum, b_scale) = (b_change.mean[column], b_sum[column], b_change.inverse[column]);
            let of_a = a_sum.iter().zip(&a_change.mean).zip(&a_change.inverse);
            for (value, ((a_sum, a_mean), a_scale)) in product.col_as_slice_mut(column).iter_mut().zip(of_a) {
                let shift = a_sum * b_mean + a_mean * b_sum - n as f64 * a_mean * b_mean;
                *value = (*value - shift) * a_scale * b_scale;
            }
        }
        product
    };
    let n_train = folds.n_train(held);
    let train_sum =
        |side: &Side| -> Vec<f64> { side.training[held].mean.iter().map(|mean| mean * n_train as f64).collect() };
    let train = centred(total(products, Some(held)), n_train, &train_sum(a), &train_sum(b));
    let heldout = centred(products[held].clone(), folds.parts[held].len(), &a.sums[held], &b.sums[held]);
    (train, heldout)
}

/// The sum of the parts' products, without one of them.
pub(super) fn total(products: &[Mat<f64>], without: Option<usize>) -> Mat<f64> {
    let mut kept = products.iter().enumerate().filter(|(index, _)| Some(*index) != without).map(|(_, part)| part);
    let first = kept.next().expect("two parts or more").clone();
    kept.fold(first, |sum, part| sum + part)
}

fn moments(values: &[f32], width: usize, threads: usize) -> Moments {
    let chunks: Vec<&[f32]> = values.chunks(CHUNK_ROWS * width).collect();
    let made = in_parallel(chunks.len(), threads, |index| Moments::of_chunk(chunks[index], width));
    made.into_iter().reduce(Moments::merge).expect("at least one row")
}

fn standardised(rows: Residual, order: &[usize], moments: &Moments, threads: usize) -> Vec<f32> {
    let width = rows.width();
    let scale: Vec<f64> = moments.deviations().map(|found| found.unwrap_or(1.0).recip()).collect();
    let share = order.len().div_ceil(threads.max(1));
    let mut all = vec![0.0f32; order.len() * width];
    std::thread::scope(|scope| {
        for (order, out) in order.chunks(share).zip(all.chunks_mut(share * width)) {
            let scale = &scale;
            scope.spawn(move || {
                for (row, out) in order.iter().zip(out.chunks_exact_mut(width)) {
                    let values = rows.row(*row).iter().zip(moments.mean.iter().zip(scale));
                    for (out, (x, (mean, scale))) in out.iter_mut().zip(values) {
                        *out = ((f64::from(*x) - mean) * scale) as f32;
                    }
                }
            });
        }
    });
    all
}
