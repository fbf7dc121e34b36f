use super::Standardization;
use crate::tensor::Residual;

/// Rows whose moments are taken at once: a chunk stays in the cache for its two passes, and chunks are merged in their order, so that
/// the moments are the same bits whoever computes the chunks.
pub(super) const CHUNK_ROWS: usize = 1024;

/// Number, mean and sum of squared deviations of rows, a dimension each.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    pub n: usize,
    /// `[width]`
    pub mean: Vec<f64>,
    /// `Σ (x − mean)²`, `[width]`
    pub squares: Vec<f64>,
}

impl Moments {
    /// Of at least one row of `width` values.
    pub fn of(values: &[f32], width: usize) -> Self {
        let mut chunks = values.chunks(CHUNK_ROWS * width).map(|chunk| Self::of_chunk(chunk, width));
        let first = chunks.next().expect("at least one row");
        chunks.fold(first, Self::merge)
    }

    pub fn of_chunk(values: &[f32], width: usize) -> Self {
        let n = values.len() / width;
        // Taken from the first row, so that the mean of a constant dimension is that constant and its deviation exactly 0.
        let first = &values[..width];
        let mut mean = vec![0.0f64; width];
        for row in values.chunks_exact(width) {
            for ((sum, x), first) in mean.iter_mut().zip(row).zip(first) {
                *sum += f64::from(*x) - f64::from(*first);
            }
        }
        for (sum, first) in mean.iter_mut().zip(first) {
            *sum = f64::from(*first) + *sum / n as f64;
        }
        let mut squares = vec![0.0f64; width];
        for row in values.chunks_exact(width) {
            for ((sum, x), mean) in squares.iter_mut().zip(row).zip(&mean) {
                *sum += (f64::from(*x) - mean).powi(2);
            }
        }
        Self { n, mean, squares }
    }

    /// Of both sets of rows (Chan et al. 1979, "Updating formulae and a pairwise algorithm for computing sample variances").
    pub fn merge(mut self, other: Self) -> Self {
        let n = self.n + other.n;
        let share = other.n as f64 / n as f64;
        let sides = self.mean.iter_mut().zip(&mut self.squares).zip(other.mean.iter().zip(&other.squares));
        for ((mean, squares), (other_mean, other_squares)) in sides {
            let apart = other_mean - *mean;
            *mean += apart * share;
            *squares += other_squares + apart * apart * share * self.n as f64;
        }
        self.n = n;
        self
    }

    /// Standard deviations; `None` where the dimension does not vary, or too little for an `f32`.
    pub fn deviations(&self) -> impl Iterator<Item = Option<f64>> {
        let n = self.n as f64;
        self.squares.iter().map(move |squares| Some((squares / n).sqrt()).filter(|found| (*found as f32).is_normal()))
    }

    /// Means and standard deviations, these 1 where there is none.
    pub fn rounded(&self) -> Standardization {
        Standardization {
            mean: self.mean.iter().map(|value| *value as f32).collect(),
            scale: self.deviations().map(|value| value.unwrap_or(1.0) as f32).collect(),
        }
    }
}

impl Standardization {
    /// Of `rows`; a dimension that does not vary has scale 1.
    ///
    /// # Panics
    /// If there are no rows.
    pub fn of(rows: Residual) -> Self {
        Moments::of(rows.values(), rows.width()).rounded()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn merged_moments_are_those_of_all_rows(
            values in proptest::collection::vec(-1e3f32..1e3, 8..200),
            cut in 1usize..7,
        ) {
            let values = &values[..values.len() / 4 * 4];
            let cut = (cut * 4).min(values.len() - 4);
            let found = Moments::of_chunk(&values[..cut], 4).merge(Moments::of_chunk(&values[cut..], 4));
            for dimension in 0..4 {
                let column: Vec<f64> = values.iter().skip(dimension).step_by(4).map(|x| f64::from(*x)).collect();
                let mean = column.iter().sum::<f64>() / column.len() as f64;
                let squares: f64 = column.iter().map(|x| (x - mean).powi(2)).sum();
                prop_assert!((found.mean[dimension] - mean).abs() < 1e-9);
                prop_assert!((found.squares[dimension] - squares).abs() <= 1e-9 * squares.max(1.0));
            }
            prop_assert_eq!(found.n, values.len() / 4);
        }
    }

    #[test]
    fn a_constant_dimension_stays_exactly_constant_across_chunks() {
        let values: Vec<f32> = (0..3 * CHUNK_ROWS).flat_map(|row| [0.1, row as f32]).collect();
        let found = Standardization::of(Residual::new(&values, 2).unwrap());
        assert_eq!((found.mean[0], found.scale[0]), (0.1, 1.0));
        assert!(found.scale[1] > 800.0);
    }
}
