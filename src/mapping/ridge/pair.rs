use super::Regression;
use super::products::{BLOCK_ROWS, Rows, cross_product, eigen, in_parallel, narrowed, par, product, solve};
use super::side::{Basis, Side, split, total};
use crate::mapping::{AffineMap, Factors, FitQuality, MappingError, MappingQuality};
use crate::tensor::{LayerIndex, LayerStack};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat};

/// A source layer and a target layer: how well the one predicts the other, how alike they are, and the map.
pub struct Pair<'a> {
    regression: &'a Regression,
    source: &'a Side,
    target: &'a Side,
    /// `Σ z_s z_tᵀ` over each part, `[d_s, d_t]`.
    cross: Vec<Mat<f64>>,
    threads: usize,
}

/// How alike two layers are without regard to rotation, over the rows that are fitted on when the first part is held out. Both are 1 for
/// layers that differ by a rotation, and the same for source and target exchanged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Similarity {
    /// Mean squared canonical correlation of the two layers' leading principal components, as many as hold 99 % of the variance: SVCCA
    /// (Raghu et al. 2017, arXiv 1706.05806) with the mean of squares, `‖Λₛ^{−½} QₛᵀZₛᵀZₜQₜ Λₜ^{−½}‖²_F / min(k_s, k_t)` (Kornblith et al.
    /// 2019, arXiv 1905.00414, table 1). Of unrelated layers it is about `max(k_s, k_t)/n`.
    pub cca: f64,
    /// Linear centred kernel alignment, `‖ZₛᵀZₜ‖²_F / (‖ZₛᵀZₛ‖_F ‖ZₜᵀZₜ‖_F)` (Kornblith et al. 2019, equation 3).
    pub cka: f64,
}

/// The part of the variance that the principal components hold of which canonical correlations are taken.
const VARIANCE_KEPT: f64 = 0.99;

impl<'a> Pair<'a> {
    pub(super) fn new(regression: &'a Regression, source: &'a Side, target: &'a Side, threads: usize) -> Self {
        let folds = &regression.folds;
        let part = |part| cross_product(source.part(folds, part), target.part(folds, part), threads);
        let cross = (0..folds.parts.len()).map(part).collect();
        Self { regression, source, target, cross, threads }
    }

    /// The pair with source and target exchanged.
    pub fn reversed(&self) -> Self {
        let cross = self.cross.iter().map(|part| part.transpose().to_owned()).collect();
        Self { source: self.target, target: self.source, cross, ..*self }
    }

    /// How well the target can be predicted from the source where the first part is held out, with the λ that is best there.
    ///
    /// # Errors
    /// If the held-out target does not vary, or numbers overflow.
    pub fn quality(&self) -> Result<MappingQuality, MappingError> {
        let (quality, _) = self.judge()?;
        Ok(quality)
    }

    /// The map, fitted on all rows, and its [`quality`](Self::quality), which is that of the fit on training rows alone.
    ///
    /// # Errors
    /// As [`quality`](Self::quality), and if the system to solve is singular.
    pub fn fit(
        &self,
        source_layer: impl Into<LayerStack>,
        target_layer: LayerIndex,
    ) -> Result<(AffineMap, MappingQuality), MappingError> {
        let quality = self.quality()?;
        Ok((self.refit(quality.lambda, source_layer, target_layer)?, quality))
    }

    /// The map, fitted on all rows with that penalty.
    ///
    /// # Errors
    /// If the system to solve is singular, or numbers overflow.
    pub fn refit(
        &self,
        lambda: f64,
        source_layer: impl Into<LayerStack>,
        target_layer: LayerIndex,
    ) -> Result<AffineMap, MappingError> {
        let weight = row_major(&self.weight(lambda)?);
        let (source, target) = (self.source.moments.rounded(), self.target.moments.rounded());
        AffineMap::new(source_layer, target_layer, source, target, weight)
    }

    /// `map`, which this pair fitted, with its [`backward`](AffineMap::backward) weight: the regression with the sides exchanged, on the
    /// same rows; and how well that one predicts.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn fit_backward(&self, map: AffineMap) -> Result<(AffineMap, FitQuality), MappingError> {
        let reversed = self.reversed();
        let quality = FitQuality::from(reversed.quality()?);
        Ok((map.with_backward(row_major(&reversed.weight(quality.lambda)?))?, quality))
    }

    /// The map of rank `rank` that is best on all rows at the penalty `lambda`: reduced-rank ridge regression, `W V Vᵀ` with `V` the first
    /// eigenvectors of `Wᵀ(ZₛᵀZₛ + λnI)W = WᵀZₛᵀZₜ`, which are the right singular vectors of the fitted values (Izenman 1975), those of
    /// the penalty's rows included (Mukherjee and Zhu 2011).
    ///
    /// # Errors
    /// As [`refit`](Self::refit), and for a rank of 0 or above the narrower width.
    pub fn refit_low_rank(
        &self,
        lambda: f64,
        rank: usize,
        source_layer: impl Into<LayerStack>,
        target_layer: LayerIndex,
    ) -> Result<AffineMap, MappingError> {
        let (source, target) = (self.source.moments.rounded(), self.target.moments.rounded());
        AffineMap::of_low_rank(source_layer, target_layer, source, target, self.factors(lambda, rank)?)
    }

    /// [`fit_backward`](Self::fit_backward) with that rank.
    ///
    /// # Errors
    /// As [`refit_low_rank`](Self::refit_low_rank).
    pub fn fit_low_rank_backward(&self, map: AffineMap, rank: usize) -> Result<(AffineMap, FitQuality), MappingError> {
        let reversed = self.reversed();
        let quality = FitQuality::from(reversed.low_rank_quality(rank)?);
        Ok((map.with_low_rank_backward(reversed.factors(quality.lambda, rank)?)?, quality))
    }

    /// [`quality`](Self::quality) of the map of rank `rank`, at the penalty that is best at full rank.
    ///
    /// # Errors
    /// As [`refit_low_rank`](Self::refit_low_rank).
    pub fn low_rank_quality(&self, rank: usize) -> Result<MappingQuality, MappingError> {
        let (quality, weight) = self.judge()?;
        let weight = Mat::from_fn(weight.nrows(), weight.ncols(), |i, j| f64::from(weight[(i, j)]));
        let (cross, _) = split(&self.regression.folds, &self.cross, 0, self.source, self.target);
        let (left, right) = self.reduced(&weight, &cross, quality.lambda, rank)?;
        let weight = narrowed(&product(left.as_ref(), right.as_ref(), 1.0, self.threads));
        self.heldout_quality(&weight, quality.lambda)
    }

    fn factors(&self, lambda: f64, rank: usize) -> Result<Factors, MappingError> {
        let (left, right) = self.reduced(&self.weight(lambda)?, &total(&self.cross, None), lambda, rank)?;
        Ok(Factors { rank, left: row_major(&left), right: row_major(&right) })
    }

    /// `WV`, `[d_s, rank]`, and `Vᵀ`, `[rank, d_t]`.
    fn reduced(
        &self,
        weight: &Mat<f64>,
        cross: &Mat<f64>,
        lambda: f64,
        rank: usize,
    ) -> Result<(Mat<f64>, Mat<f64>), MappingError> {
        let widest = weight.nrows().min(weight.ncols());
        if rank == 0 || rank > widest {
            let expected = "1 up to the narrower of the two widths";
            return Err(MappingError::Options { option: "rank", expected, found: rank.to_string() });
        }
        let fitted = product(weight.transpose(), cross.as_ref(), 1.0, self.threads);
        let (_, vectors) = eigen(&fitted, self.threads).ok_or(MappingError::Numerical { lambda })?;
        let first = vectors.subcols(vectors.ncols() - rank, rank);
        Ok((product(weight.as_ref(), first, 1.0, self.threads), first.transpose().to_owned()))
    }

    /// The fraction of variance unexplained with every part held out in turn and predicted from the others, over all parts together, at
    /// the penalty `lambda`.
    ///
    /// # Errors
    /// If the target does not vary, or numbers overflow.
    pub fn cross_validated(&self, lambda: f64) -> Result<f64, MappingError> {
        let folds = &self.regression.folds;
        let (mut unexplained, mut all) = (0.0, 0.0);
        for held in 0..folds.judged {
            let (mut system, heldout) = self.source.split_gram(folds, held);
            let (cross, heldout_cross) = split(folds, &self.cross, held, self.source, self.target);
            penalise(&mut system, lambda * folds.n_train(held) as f64);
            let weight = solve(system, cross, self.threads).ok_or(MappingError::Numerical { lambda })?;
            // Σ‖z − zₛW‖² = Σ‖z‖² + tr(Wᵀ(GW − 2C))
            let predicted = product(heldout.as_ref(), weight.as_ref(), 1.0, self.threads);
            let residual = predicted - heldout_cross * faer::Scale(2.0);
            let total = self.target.heldout_variance(folds, held);
            all += total;
            unexplained += total + inner(&weight, &residual);
        }
        let fraction = unexplained / all;
        match all {
            0.0 => Err(MappingError::ConstantTarget),
            _ if !fraction.is_finite() => Err(MappingError::Numerical { lambda }),
            // Rounding, where nothing is unexplained.
            _ => Ok(fraction.max(0.0)),
        }
    }

    /// # Errors
    /// If a layer does not vary, or numbers overflow.
    pub fn similarity(&self) -> Result<Similarity, MappingError> {
        let folds = &self.regression.folds;
        let overflow = || MappingError::Numerical { lambda: 0.0 };
        let [source, target] =
            [self.source, self.target].map(|side| side.basis(folds, self.threads).ok_or_else(overflow));
        let (source, target) = (source?, target?);
        let (cross, _) = split(folds, &self.cross, 0, self.source, self.target);
        let rotated = product(source.vectors.transpose(), narrowed(&cross).as_ref(), 1.0, self.threads);
        let rotated = product(rotated.as_ref(), target.vectors.as_ref(), 1.0, self.threads);
        let [source_first, target_first] = [source, target].map(|basis| first_kept(&basis.eigenvalues));
        let (mut correlations, mut squares) = (0.0f64, 0.0f64);
        for (column, target_value) in target.eigenvalues.iter().enumerate() {
            for (row, source_value) in source.eigenvalues.iter().enumerate() {
                let square = f64::from(rotated[(row, column)]).powi(2);
                squares += square;
                if row >= source_first && column >= target_first {
                    correlations += square / (source_value * target_value);
                }
            }
        }
        let kept = (source.eigenvalues.len() - source_first).min(target.eigenvalues.len() - target_first);
        let size = |basis: &Basis| basis.eigenvalues.iter().map(|value| value * value).sum::<f64>().sqrt();
        let found = Similarity { cca: correlations / kept as f64, cka: squares / (size(source) * size(target)) };
        if found.cca.is_finite() && found.cka.is_finite() { Ok(found) } else { Err(overflow()) }
    }

    /// `(ZₛᵀZₛ + λnI)⁻¹ ZₛᵀZₜ` over all rows.
    fn weight(&self, lambda: f64) -> Result<Mat<f64>, MappingError> {
        let mut system = self.source.gram();
        penalise(&mut system, lambda * self.regression.folds.order.len() as f64);
        solve(system, total(&self.cross, None), self.threads).ok_or(MappingError::Numerical { lambda })
    }

    /// The quality, and the weight that was judged.
    fn judge(&self) -> Result<(MappingQuality, Mat<f32>), MappingError> {
        let folds = &self.regression.folds;
        let basis = self.source.basis(folds, self.threads);
        let basis = basis.ok_or(MappingError::Numerical { lambda: self.regression.lambdas[0] })?;
        let (train, heldout) = split(folds, &self.cross, 0, self.source, self.target);
        let rotate = |cross: &Mat<f64>| product(basis.vectors.transpose(), narrowed(cross).as_ref(), 1.0, self.threads);
        let mut weight = rotate(&train);
        let lambda = self.best_lambda(basis, &weight, &rotate(&heldout))?;
        let shrinkage = self.shrinkage(basis, lambda);
        for column in 0..weight.ncols() {
            for (value, shrunk) in weight.col_as_slice_mut(column).iter_mut().zip(&shrinkage) {
                *value = (f64::from(*value) * shrunk) as f32;
            }
        }
        let weight = product(basis.vectors.as_ref(), weight.as_ref(), 1.0, self.threads);
        Ok((self.heldout_quality(&weight, lambda)?, weight))
    }

    /// `(Λ + λ n_train)⁻¹`
    fn shrinkage(&self, basis: &Basis, lambda: f64) -> Vec<f64> {
        let penalty = lambda * self.regression.folds.n_train(0) as f64;
        basis.eigenvalues.iter().map(|value| 1.0 / (value + penalty)).collect()
    }

    /// The λ with the lowest held-out `Σ‖z − zₛW‖²`. With `B = QᵀZₛᵀZₜ`, `S = (Λ + λ n)⁻¹` and `W = QSB`, that sum is, but for a
    /// constant, `tr(SBBᵀS · QᵀGQ) − 2 tr(SB · (QᵀC)ᵀ)`, `G` and `C` being the held-out Gram and cross products.
    fn best_lambda(&self, basis: &Basis, train: &Mat<f32>, heldout: &Mat<f32>) -> Result<f64, MappingError> {
        let squares = product(train.as_ref(), train.transpose(), 1.0, self.threads);
        let mut linear = vec![0.0f64; train.nrows()];
        for column in 0..train.ncols() {
            let both = train.col_as_slice(column).iter().zip(heldout.col_as_slice(column));
            for (sum, (train, heldout)) in linear.iter_mut().zip(both) {
                *sum += f64::from(*train) * f64::from(*heldout);
            }
        }
        let loss = |lambda: f64| {
            let shrinkage = self.shrinkage(basis, lambda);
            let mut loss = 0.0f64;
            for (column, shrunk) in shrinkage.iter().enumerate() {
                let both = squares.col_as_slice(column).iter().zip(basis.heldout.col_as_slice(column));
                let sum: f64 = both
                    .zip(&shrinkage)
                    .map(|((square, heldout), shrunk)| f64::from(*square) * f64::from(*heldout) * shrunk)
                    .sum();
                loss += shrunk * (sum - 2.0 * linear[column]);
            }
            loss
        };
        let mut best = (f64::NAN, f64::INFINITY);
        for &lambda in &self.regression.lambdas {
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

    /// How well `weight`, `[d_s, d_t]`, predicts the first part.
    fn heldout_quality(&self, weight: &Mat<f32>, lambda: f64) -> Result<MappingQuality, MappingError> {
        let (source, target) = (self.source.heldout(), self.target.heldout());
        let blocks = source.n().div_ceil(BLOCK_ROWS);
        let sums = in_parallel(blocks, self.threads, |index| {
            let rows = index * BLOCK_ROWS..source.n().min((index + 1) * BLOCK_ROWS);
            predicted_block(weight, source.range(rows.clone()), target.range(rows))
        });
        let [unexplained, total, cosines] =
            sums.into_iter().fold([0.0f64; 3], |sum, block| std::array::from_fn(|index| sum[index] + block[index]));
        if total == 0.0 {
            return Err(MappingError::ConstantTarget);
        }
        let n_heldout = source.n();
        let (fraction_unexplained, cosine) = (unexplained / total, cosines / n_heldout as f64);
        if !fraction_unexplained.is_finite() || !cosine.is_finite() {
            return Err(MappingError::Numerical { lambda });
        }
        let n_train = self.regression.folds.n_train(0);
        Ok(MappingQuality { lambda, fraction_unexplained, cosine, n_train, n_heldout, backward: None })
    }
}

/// `Σ‖z − ẑ‖²`, `Σ‖z‖²` and the sum of cosines of `z` and `ẑ = zₛW` over rows.
fn predicted_block(weight: &Mat<f32>, source: Rows, target: Rows) -> [f64; 3] {
    let mut predicted = Mat::<f32>::zeros(target.width, source.n());
    matmul(&mut predicted, Accum::Replace, weight.transpose(), source.transposed(), 1.0, par(1));
    let mut sums = [0.0; 3];
    for (index, actual) in target.values.chunks_exact(target.width).enumerate() {
        let RowSums { apart, actual, predicted, both } = row_sums(actual, predicted.col_as_slice(index));
        sums[0] += apart;
        sums[1] += actual;
        let norms = (actual * predicted).sqrt();
        sums[2] += if norms > 0.0 { both / norms } else { 0.0 };
    }
    sums
}

/// Over one row: `‖z − ẑ‖²`, `‖z‖²`, `‖ẑ‖²` and `z·ẑ`.
struct RowSums {
    apart: f64,
    actual: f64,
    predicted: f64,
    both: f64,
}

/// A row's sums are in `f32`, in lanes: a few hundred squares, of which a corpus' worth is then added in `f64`.
fn row_sums(actual: &[f32], predicted: &[f32]) -> RowSums {
    const LANES: usize = 16;
    let mut lanes = [[0.0f32; LANES]; 4];
    let mut add = |lane: usize, z: f32, found: f32| {
        let apart = z - found;
        lanes[0][lane] += apart * apart;
        lanes[1][lane] += z * z;
        lanes[2][lane] += found * found;
        lanes[3][lane] += z * found;
    };
    let (actual, actual_rest) = actual.as_chunks::<LANES>();
    let (predicted, predicted_rest) = predicted.as_chunks::<LANES>();
    for (actual, predicted) in actual.iter().zip(predicted) {
        for lane in 0..LANES {
            add(lane, actual[lane], predicted[lane]);
        }
    }
    for (lane, (actual, predicted)) in actual_rest.iter().zip(predicted_rest).enumerate() {
        add(lane, *actual, *predicted);
    }
    let [apart, actual, predicted, both] = lanes.map(|lanes| lanes.into_iter().map(f64::from).sum());
    RowSums { apart, actual, predicted, both }
}

/// Index of the first of the ascending eigenvalues that together are [`VARIANCE_KEPT`] of their sum.
fn first_kept(eigenvalues: &[f64]) -> usize {
    let all: f64 = eigenvalues.iter().sum();
    let mut dropped = 0.0;
    eigenvalues
        .iter()
        .take_while(|value| {
            dropped += **value;
            dropped <= (1.0 - VARIANCE_KEPT) * all
        })
        .count()
        .min(eigenvalues.len() - 1)
}

fn penalise(system: &mut Mat<f64>, penalty: f64) {
    for index in 0..system.nrows() {
        system[(index, index)] += penalty;
    }
}

/// `Σ aᵢⱼ bᵢⱼ`
fn inner(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    (0..a.ncols())
        .map(|column| a.col_as_slice(column).iter().zip(b.col_as_slice(column)).map(|(a, b)| a * b).sum::<f64>())
        .sum()
}

fn row_major(weight: &Mat<f64>) -> Vec<f32> {
    let transposed = weight.transpose().to_owned();
    (0..transposed.ncols()).flat_map(|row| transposed.col_as_slice(row)).map(|value| *value as f32).collect()
}
