use super::MappingError;
use crate::tensor::{LayerIndex, LayerStack};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Mean `μ` and scale `σ` of each dimension of a residual: `z = (x − μ)/σ`.
#[derive(Debug, Clone, PartialEq)]
pub struct Standardization {
    /// `[width]`
    pub mean: Vec<f32>,
    /// `[width]`, positive.
    pub scale: Vec<f32>,
}

impl Standardization {
    /// The direction along which a residual is read in units of each dimension's scale: `v/σ²`, since its projection on `x` is that of
    /// `v/σ` on `x/σ`. With `v` a difference of means this is the linear discriminant of independent dimensions; the few dimensions of a
    /// residual that are hundreds of times larger than the rest, and mostly noise, then count no more than others.
    ///
    /// # Panics
    /// If `v` is not as long as [`scale`](Self::scale).
    pub fn readout(&self, v: &[f32]) -> Vec<f32> {
        assert_eq!(v.len(), self.scale.len(), "a direction of the wrong width");
        v.iter().zip(&self.scale).map(|(v, scale)| (f64::from(*v) / f64::from(*scale).powi(2)) as f32).collect()
    }
}

/// An affine map from residuals of a source model at one layer to residuals of a target model at one layer:
/// `ŷ = μ_t + D_t Wᵀ D_s⁻¹ (x − μ_s)`, where `D = diag(σ)`. This is the affine map of arXiv 2503.04429 (its
/// linear alternative to the autoencoder) with both sides standardised, without which a few large dimensions take the whole fit.
#[derive(Debug, Clone, PartialEq)]
pub struct AffineMap {
    source_layer: LayerStack,
    target_layer: LayerIndex,
    source: Standardization,
    target: Standardization,
    weight: Vec<f32>,
    factors: Option<Factors>,
    backward: Option<Vec<f32>>,
    backward_factors: Option<Factors>,
    correction: bool,
}

/// A matrix of low rank, `left · right`.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    pub rank: usize,
    /// `[rows, rank]` row-major.
    pub left: Vec<f32>,
    /// `[rank, columns]` row-major.
    pub right: Vec<f32>,
}

impl Factors {
    /// The matrix, `[rows, columns]` row-major, accumulated in `f64`.
    fn product(&self, rows: usize, columns: usize) -> Result<Vec<f32>, MappingError> {
        if self.rank == 0 || self.rank > rows.min(columns) {
            let expected = "1 up to the narrower of the two widths";
            return Err(MappingError::Options { option: "rank", expected, found: self.rank.to_string() });
        }
        for (what, values, expected) in
            [("the left factor", &self.left, rows * self.rank), ("the right factor", &self.right, self.rank * columns)]
        {
            if values.len() != expected {
                return Err(MappingError::Length { what, expected, found: values.len() });
            }
            check_finite(values, what)?;
        }
        let row = |left: &[f32]| {
            let mut sums = vec![0.0f64; columns];
            for (left, right) in left.iter().zip(self.right.chunks_exact(columns)) {
                sums.iter_mut().zip(right).for_each(|(sum, right)| *sum += f64::from(*left) * f64::from(*right));
            }
            sums.into_iter().map(|sum| sum as f32)
        };
        Ok(self.left.chunks_exact(self.rank).flat_map(row).collect())
    }
}

impl AffineMap {
    /// `weight` is `W`, `[d_s, d_t]` row-major, with `z_t = z_s · W`; `d_s` and `d_t` are the widths of `source` and `target`.
    ///
    /// # Errors
    /// If a length does not fit the others, a side has width 0, a value is not finite, or a scale is not a positive normal number.
    pub fn new(
        source_layer: impl Into<LayerStack>,
        target_layer: LayerIndex,
        source: Standardization,
        target: Standardization,
        weight: Vec<f32>,
    ) -> Result<Self, MappingError> {
        let (source_width, target_width) = (source.mean.len(), target.mean.len());
        check_side(&source, "`source_mean`", "`source_scale`")?;
        check_side(&target, "`target_mean`", "`target_scale`")?;
        if source_width.checked_mul(target_width) != Some(weight.len()) {
            let expected = source_width.saturating_mul(target_width);
            return Err(MappingError::Length { what: "`weight`", expected, found: weight.len() });
        }
        check_finite(&weight, "`weight`")?;
        let source_layer = source_layer.into();
        Ok(Self {
            source_layer,
            target_layer,
            source,
            target,
            weight,
            factors: None,
            backward: None,
            backward_factors: None,
            correction: false,
        })
    }

    /// This map with what the target's residual says of the source's: `weight` is `B`, `[d_t, d_s]` row-major, with `z_s ≈ z_t · B`. It is
    /// the regression the other way round, on the same rows, and not the inverse of `W`: each predicts as well as it can.
    ///
    /// # Errors
    /// If its length does not fit, or a value is not finite.
    pub fn with_backward(self, weight: Vec<f32>) -> Result<Self, MappingError> {
        if weight.len() != self.weight.len() {
            return Err(MappingError::Length { what: "`backward`", expected: self.weight.len(), found: weight.len() });
        }
        check_finite(&weight, "`backward`")?;
        Ok(Self { backward: Some(weight), backward_factors: None, ..self })
    }

    /// A map whose `W` is `factors`, `[d_s, rank]` and `[rank, d_t]`.
    ///
    /// # Errors
    /// As [`new`](Self::new), and for a rank of 0 or above the narrower width.
    pub fn of_low_rank(
        source_layer: impl Into<LayerStack>,
        target_layer: LayerIndex,
        source: Standardization,
        target: Standardization,
        factors: Factors,
    ) -> Result<Self, MappingError> {
        let weight = factors.product(source.mean.len(), target.mean.len())?;
        let map = Self::new(source_layer, target_layer, source, target, weight)?;
        Ok(Self { factors: Some(factors), ..map })
    }

    /// [`with_backward`](Self::with_backward) of a `B` that is `factors`, `[d_t, rank]` and `[rank, d_s]`.
    ///
    /// # Errors
    /// As [`of_low_rank`](Self::of_low_rank).
    pub fn with_low_rank_backward(self, factors: Factors) -> Result<Self, MappingError> {
        let weight = factors.product(self.target_width(), self.source_width())?;
        Ok(Self { backward_factors: Some(factors), ..self.with_backward(weight)? })
    }

    /// The map `x + f(x)` of this `f`, between residuals of one space: fitted so, a penalty draws it to leaving residuals as they are, and what it
    /// changes may be of low rank.
    ///
    /// # Errors
    /// The two sides differ in width, or the map reads several layers, or has a [`backward`](Self::backward), which would be of `f` alone.
    pub fn into_correction(self) -> Result<Self, MappingError> {
        let refuse = |option, expected, found: String| Err(MappingError::Options { option, expected, found });
        if self.source_width() != self.target_width() {
            let found = format!("{} and {}", self.source_width(), self.target_width());
            return refuse("correction", "sides of one width", found);
        }
        if self.backward.is_some() {
            return refuse("correction", "a map without a backward weight", "one with it".to_owned());
        }
        Ok(Self { correction: true, ..self })
    }

    /// Whether what the weight gives is added to the residual that it reads: see [`into_correction`](Self::into_correction).
    pub fn is_correction(&self) -> bool {
        self.correction
    }

    /// The same correction with the dimensions of what it adds dealt anew and their signs drawn: what it adds to a residual is as long, and points
    /// elsewhere. `None` of a map that is no correction.
    pub fn turned(&self, seed: u64) -> Option<Self> {
        if !self.correction {
            return None;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut dealt: Vec<usize> = (0..self.target_width()).collect();
        dealt.shuffle(&mut rng);
        let signs: Vec<f32> = dealt.iter().map(|_| if rng.random_range(0..2) == 0 { 1.0 } else { -1.0 }).collect();
        let turn =
            |row: &[f32]| -> Vec<f32> { dealt.iter().zip(&signs).map(|(from, sign)| sign * row[*from]).collect() };
        let rows = |values: &[f32]| values.chunks_exact(self.target_width()).flat_map(turn).collect::<Vec<f32>>();
        let target = Standardization {
            mean: turn(&self.target.mean),
            scale: dealt.iter().map(|from| self.target.scale[*from]).collect(),
        };
        let factors = self.factors.as_ref().map(|of| Factors { right: rows(&of.right), ..of.clone() });
        Some(Self { weight: rows(&self.weight), target, factors, ..self.clone() })
    }

    /// What [`weight`](Self::weight) is the product of, where it has a low rank.
    pub fn factors(&self) -> Option<&Factors> {
        self.factors.as_ref()
    }

    /// What [`backward`](Self::backward) is the product of, where it has a low rank.
    pub fn backward_factors(&self) -> Option<&Factors> {
        self.backward_factors.as_ref()
    }

    /// This map without [`backward`](Self::backward), for who has no use for it.
    pub fn without_backward(self) -> Self {
        Self { backward: None, backward_factors: None, ..self }
    }

    /// Several where the map reads their residuals beside each other, as one row.
    pub fn source_layer(&self) -> &LayerStack {
        &self.source_layer
    }

    pub fn target_layer(&self) -> LayerIndex {
        self.target_layer
    }

    /// `μ_s`, `σ_s`
    pub fn source(&self) -> &Standardization {
        &self.source
    }

    /// `μ_t`, `σ_t`
    pub fn target(&self) -> &Standardization {
        &self.target
    }

    /// `W`, `[d_s, d_t]` row-major.
    pub fn weight(&self) -> &[f32] {
        &self.weight
    }

    /// `B`, `[d_t, d_s]` row-major, where there is one.
    pub fn backward(&self) -> Option<&[f32]> {
        self.backward.as_deref()
    }

    /// `d_s`
    pub fn source_width(&self) -> usize {
        self.source.mean.len()
    }

    /// `d_t`
    pub fn target_width(&self) -> usize {
        self.target.mean.len()
    }

    /// A residual, `[d_s]` to `[d_t]`: `ŷ = μ_t + σ_t ⊙ Wᵀ((x − μ_s)/σ_s)`, of a correction `x` more, accumulated in `f64`.
    ///
    /// # Panics
    /// If `x` is not [`source_width`](Self::source_width) long.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let widened: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        self.apply_f64(&widened).into_iter().map(|y| y as f32).collect()
    }

    /// [`apply`](Self::apply) with nothing rounded.
    ///
    /// # Panics
    /// If `x` is not [`source_width`](Self::source_width) long.
    pub fn apply_f64(&self, x: &[f64]) -> Vec<f64> {
        assert_eq!(x.len(), self.source_width(), "a residual of the wrong width");
        let centred = x.iter().zip(&self.source.mean).map(|(x, mean)| x - f64::from(*mean));
        let mut mapped: Vec<f64> =
            self.linear_part(centred).zip(&self.target.mean).map(|(y, mean)| f64::from(*mean) + y).collect();
        if self.correction {
            mapped.iter_mut().zip(x).for_each(|(y, x)| *y += x);
        }
        mapped
    }

    /// A direction, `[d_s]` to `[d_t]`: `v_t = D_t Wᵀ D_s⁻¹ v_s`, accumulated in `f64`. No mean comes in: a direction is a
    /// difference of residuals, and `apply(x + v) − apply(x)` is `apply_direction(v)`.
    ///
    /// # Panics
    /// If `v` is not [`source_width`](Self::source_width) long.
    pub fn apply_direction(&self, v: &[f32]) -> Vec<f32> {
        assert_eq!(v.len(), self.source_width(), "a direction of the wrong width");
        let own = |v: &f32| if self.correction { f64::from(*v) } else { 0.0 };
        let mapped = self.linear_part(v.iter().map(|v| f64::from(*v)));
        // Of a correction both sides have one width.
        mapped.zip(v.iter().map(own).chain(std::iter::repeat(0.0))).map(|(y, own)| (y + own) as f32).collect()
    }

    /// A reading of source residuals, `[d_s]`, as one of target residuals, `[d_t]`: `w_t = D_t⁻¹ B D_s w_s`, accumulated in `f64`, so that
    /// `w_t · x_t` is, but for a constant, `w_s · x̂_s` with `x̂_s` what the target's residual `x_t` says of the source's. `None` without
    /// [`backward`](Self::backward).
    ///
    /// A direction is pushed forward; a reading is pulled back. Reading along a direction pushed forward would ask of every dimension what
    /// the mapping predicts in it, however much else moves that dimension.
    ///
    /// # Panics
    /// If `w` is not [`source_width`](Self::source_width) long.
    pub fn pull_back(&self, w: &[f32]) -> Option<Vec<f32>> {
        assert_eq!(w.len(), self.source_width(), "a reading of the wrong width");
        let scaled: Vec<f64> =
            w.iter().zip(&self.source.scale).map(|(w, scale)| f64::from(*w) * f64::from(*scale)).collect();
        let rows = self.backward.as_ref()?.chunks_exact(self.source_width());
        let read = rows.zip(&self.target.scale).map(|(row, scale)| {
            let sum: f64 = row.iter().zip(&scaled).map(|(weight, w)| f64::from(*weight) * w).sum();
            (sum / f64::from(*scale)) as f32
        });
        Some(read.collect())
    }

    /// `D_t Wᵀ D_s⁻¹ x`
    fn linear_part(&self, x: impl Iterator<Item = f64>) -> impl Iterator<Item = f64> {
        let mut sums = vec![0.0f64; self.target_width()];
        let weight_rows = self.weight.chunks_exact(self.target_width());
        for ((x, scale), weights) in x.zip(&self.source.scale).zip(weight_rows) {
            let z = x / f64::from(*scale);
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum += z * f64::from(*weight);
            }
        }
        sums.into_iter().zip(&self.target.scale).map(|(sum, scale)| sum * f64::from(*scale))
    }
}

pub(super) fn check_side(side: &Standardization, mean: &'static str, scale: &'static str) -> Result<(), MappingError> {
    let width = side.mean.len().max(1);
    for (what, values) in [(mean, &side.mean), (scale, &side.scale)] {
        if values.len() != width {
            return Err(MappingError::Length { what, expected: width, found: values.len() });
        }
        check_finite(values, what)?;
    }
    match side.scale.iter().position(|value| !value.is_normal() || *value < 0.0) {
        Some(index) => Err(MappingError::Scale { what: scale, index, value: side.scale[index] }),
        None => Ok(()),
    }
}

pub(super) fn check_finite(values: &[f32], what: &'static str) -> Result<(), MappingError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(MappingError::NonFinite { what, index, value: values[index] }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn side(mean: &[f32], scale: &[f32]) -> Standardization {
        Standardization { mean: mean.to_vec(), scale: scale.to_vec() }
    }

    fn make(source: Standardization, target: Standardization, weight: &[f32]) -> Result<AffineMap, MappingError> {
        AffineMap::new(LayerIndex(24), LayerIndex(10), source, target, weight.to_vec())
    }

    #[test]
    fn a_map_worked_by_hand() {
        let map = make(
            side(&[1.0, 2.0], &[2.0, 4.0]),
            side(&[10.0, 20.0, 30.0], &[1.0, 2.0, 3.0]),
            &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        )
        .unwrap();
        // z = [1, 1], z·W = [5, 7, 9]
        assert_eq!(map.apply(&[3.0, 6.0]), [15.0, 34.0, 57.0]);
        assert_eq!(map.apply(&[1.0, 2.0]), [10.0, 20.0, 30.0]);
        assert_eq!(map.apply_direction(&[2.0, 4.0]), [5.0, 14.0, 27.0]);
        assert_eq!(map.apply_direction(&[2.0, 0.0]), [1.0, 4.0, 9.0]);
    }

    #[test]
    fn a_correction_is_added_to_what_it_reads() {
        let map =
            make(side(&[1.0, 2.0], &[2.0, 4.0]), side(&[10.0, 20.0], &[1.0, 2.0]), &[1.0, 2.0, 3.0, 4.0]).unwrap();
        // z = [1, 1], z·W = [4, 6]
        let corrected = map.clone().into_correction().unwrap();
        assert_eq!((map.apply(&[3.0, 6.0]), corrected.apply(&[3.0, 6.0])), (vec![14.0, 32.0], vec![17.0, 38.0]));
        assert_eq!(corrected.apply_direction(&[2.0, 4.0]), [6.0, 16.0]);
        let turned = corrected.turned(3).unwrap();
        let change = |map: &AffineMap| -> Vec<f32> {
            let mut change: Vec<f32> =
                map.apply(&[3.0, 6.0]).iter().zip([3.0, 6.0]).map(|(y, x)| (y - x).abs()).collect();
            change.sort_by(f32::total_cmp);
            change
        };
        assert_eq!(change(&turned), change(&corrected), "as long");
        assert!((0..8).any(|seed| corrected.turned(seed).unwrap().apply(&[3.0, 6.0]) != corrected.apply(&[3.0, 6.0])));
        assert_eq!(map.turned(3), None);
        let error = map.with_backward(vec![0.0; 4]).unwrap().into_correction().unwrap_err();
        assert!(error.to_string().contains("backward"), "{error}");
        let wider = make(side(&[0.0], &[1.0]), side(&[0.0, 0.0], &[1.0, 1.0]), &[1.0, 2.0]).unwrap();
        assert!(wider.into_correction().is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let one = || side(&[0.0], &[1.0]);
        let cases = [
            (one(), one(), vec![1.0, 2.0], "`weight` has 2 values, expected 1"),
            (one(), one(), vec![f32::NAN], "`weight` has a non-finite value (NaN) at index 0"),
            (side(&[], &[]), one(), vec![], "`source_mean` has 0 values, expected 1"),
            (side(&[0.0, 1.0], &[1.0]), one(), vec![1.0, 2.0], "`source_scale` has 1 values, expected 2"),
            (one(), side(&[f32::INFINITY], &[1.0]), vec![1.0], "`target_mean` has a non-finite value (inf) at index 0"),
            (one(), side(&[0.0], &[0.0]), vec![1.0], "`target_scale` has 0 at index 0, expected a positive number"),
            (side(&[0.0], &[-1.0]), one(), vec![1.0], "`source_scale` has -1 at index 0, expected a positive number"),
        ];
        for (source, target, weight, expected) in cases {
            assert_eq!(make(source, target, &weight).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn a_reading_pulled_back_by_hand() {
        let map = make(side(&[1.0, 2.0], &[2.0, 4.0]), side(&[10.0, 20.0, 30.0], &[1.0, 2.0, 5.0]), &[0.0; 6]).unwrap();
        assert_eq!(map.pull_back(&[1.0, 1.0]), None);
        let map = map.with_backward(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        // D_s w = [2, 4]; B times that = [10, 22, 34]; over the target's scale.
        assert_eq!(map.pull_back(&[1.0, 1.0]).unwrap(), [10.0, 11.0, 6.8]);
        let error = map.clone().with_backward(vec![0.0; 5]).unwrap_err();
        assert_eq!(error.to_string(), "`backward` has 5 values, expected 6");
        let error = map.with_backward(vec![0.0, 0.0, f32::NAN, 0.0, 0.0, 0.0]).unwrap_err();
        assert_eq!(error.to_string(), "`backward` has a non-finite value (NaN) at index 2");
    }

    proptest! {
        #[test]
        fn a_direction_maps_as_the_difference_of_residuals(
            weight in proptest::collection::vec(-2.0f32..2.0, 6),
            x in proptest::collection::vec(-10.0f32..10.0, 3),
            v in proptest::collection::vec(-10.0f32..10.0, 3),
        ) {
            let map = make(side(&[5.0, -3.0, 0.5], &[0.5, 2.0, 1.0]), side(&[7.0, -9.0], &[3.0, 0.25]), &weight).unwrap();
            let moved: Vec<f32> = x.iter().zip(&v).map(|(x, v)| x + v).collect();
            for ((to, from), mapped) in map.apply(&moved).iter().zip(map.apply(&x)).zip(map.apply_direction(&v)) {
                prop_assert!((to - from - mapped).abs() < 1e-3);
            }
        }
    }
}
