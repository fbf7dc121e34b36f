//! The heavy products, in `f32` by faer's kernels, summed in `f64`; and what the rest needs of linear algebra.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt;
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Rows multiplied in `f32` before their sum goes into an `f64` one: few enough that rounding stays near that of a single
/// product, enough that the sums cost little beside it.
pub(super) const BLOCK_ROWS: usize = 1024;

/// Widest tile of a product: its sum in `f64` stays in the cache between blocks of rows.
const TILE: usize = 768;

/// Widest tile of a Gram matrix, of which those above the diagonal are left out.
const GRAM_TILE: usize = 256;

/// `[n, width]` row-major, which is `[width, n]` column-major.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub values: &'a [f32],
    pub width: usize,
}

impl<'a> Rows<'a> {
    pub fn range(self, rows: Range<usize>) -> Self {
        Self { values: &self.values[rows.start * self.width..rows.end * self.width], ..self }
    }

    pub fn n(self) -> usize {
        self.values.len() / self.width
    }

    /// `[width, n]`
    pub fn transposed(self) -> MatRef<'a, f32> {
        MatRef::from_column_major_slice(self.values, self.width, self.n())
    }
}

/// How many threads faer is to use in a product of its own.
pub(super) fn par(threads: usize) -> Par {
    if threads > 1 { Par::rayon(threads) } else { Par::Seq }
}

/// What `work` makes of each index below `count`, on `threads` threads: results are in order, whoever made them.
pub(super) fn in_parallel<R: Send>(count: usize, threads: usize, work: impl Fn(usize) -> R + Sync) -> Vec<R> {
    if threads.min(count) <= 1 {
        return (0..count).map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let mut done: Vec<(usize, R)> = std::thread::scope(|scope| {
        let worker = || {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    return done;
                }
                done.push((index, work(index)));
            }
        };
        let workers: Vec<_> = (0..threads.min(count)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker that does not panic")).collect()
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// `Σ a bᵀ` over rows of `a`, `[n, d_a]`, and `b`, `[n, d_b]`: `[d_a, d_b]`, the same bits for any number of threads.
pub(super) fn cross_product(a: Rows, b: Rows, threads: usize) -> Mat<f64> {
    let (a_tiles, b_tiles) = (tiles(a.width, TILE), tiles(b.width, TILE));
    let pairs: Vec<_> = a_tiles.iter().flat_map(|a| b_tiles.iter().map(move |b| (a.clone(), b.clone()))).collect();
    let mut sum = Mat::zeros(a.width, b.width);
    let made = in_parallel(pairs.len(), threads, |index| tile(a, b, &pairs[index].0, &pairs[index].1));
    for ((rows, columns), tile) in pairs.into_iter().zip(made) {
        sum.submatrix_mut(rows.start, columns.start, rows.len(), columns.len()).copy_from(tile);
    }
    sum
}

/// [`cross_product`] of `a` with itself.
pub(super) fn gram(a: Rows, threads: usize) -> Mat<f64> {
    let edges = tiles(a.width, GRAM_TILE);
    let lower: Vec<_> = (0..edges.len()).flat_map(|row| (0..=row).map(move |column| (row, column))).collect();
    let made = in_parallel(lower.len(), threads, |index| tile(a, a, &edges[lower[index].0], &edges[lower[index].1]));
    let mut sum = Mat::zeros(a.width, a.width);
    for ((row, column), tile) in lower.into_iter().zip(made) {
        let (rows, columns) = (&edges[row], &edges[column]);
        sum.submatrix_mut(rows.start, columns.start, rows.len(), columns.len()).copy_from(&tile);
        if row != column {
            sum.submatrix_mut(columns.start, rows.start, columns.len(), rows.len()).copy_from(tile.transpose());
        }
    }
    sum
}

fn tiles(width: usize, widest: usize) -> Vec<Range<usize>> {
    let count = width.div_ceil(widest);
    (0..count).map(|index| index * width / count..(index + 1) * width / count).collect()
}

fn tile(a: Rows, b: Rows, a_columns: &Range<usize>, b_columns: &Range<usize>) -> Mat<f64> {
    let (height, width) = (a_columns.len(), b_columns.len());
    let mut sum = Mat::<f64>::zeros(height, width);
    let mut product = Mat::<f32>::zeros(height, width);
    for start in (0..a.n()).step_by(BLOCK_ROWS) {
        let block = start..a.n().min(start + BLOCK_ROWS);
        let left = a.range(block.clone()).transposed().subrows(a_columns.start, height);
        let right = b.range(block).transposed().subrows(b_columns.start, width);
        matmul(&mut product, Accum::Replace, left, right.transpose(), 1.0, Par::Seq);
        for column in 0..width {
            for (sum, product) in sum.col_as_slice_mut(column).iter_mut().zip(product.col_as_slice(column)) {
                *sum += f64::from(*product);
            }
        }
    }
    sum
}

/// `a · b`
pub(super) fn product<T: faer::traits::ComplexField + faer::traits::Conjugate<Canonical = T>>(
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    one: T,
    threads: usize,
) -> Mat<T> {
    let mut product = Mat::zeros(a.nrows(), b.ncols());
    matmul(&mut product, Accum::Replace, a, b, one, par(threads));
    product
}

pub(super) fn narrowed(a: &Mat<f64>) -> Mat<f32> {
    Mat::from_fn(a.nrows(), a.ncols(), |row, column| a[(row, column)] as f32)
}

/// `Λ`, ascending, and `Q` of the symmetric `a = QΛQᵀ`; `None` if it does not converge, as on what is not finite.
pub(super) fn eigen(a: &Mat<f64>, threads: usize) -> Option<(Vec<f64>, Mat<f64>)> {
    let n = a.nrows();
    let mut values = faer::Col::<f64>::zeros(n);
    let mut vectors = Mat::<f64>::zeros(n, n);
    let scratch = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, par(threads), Default::default());
    let mut memory = MemBuffer::new(scratch);
    let stack = MemStack::new(&mut memory);
    let vectors_out = Some(vectors.as_mut());
    self_adjoint_evd(
        a.as_ref(),
        values.as_mut().as_diagonal_mut(),
        vectors_out,
        par(threads),
        stack,
        Default::default(),
    )
    .ok()?;
    Some((values.iter().copied().collect(), vectors))
}

/// `system⁻¹ · right`, `system` symmetric; `None` unless it is positive definite.
pub(super) fn solve(mut system: Mat<f64>, mut right: Mat<f64>, threads: usize) -> Option<Mat<f64>> {
    let n = system.nrows();
    let par = par(threads);
    let mut memory = MemBuffer::new(llt::factor::cholesky_in_place_scratch::<f64>(n, par, Default::default()));
    let stack = MemStack::new(&mut memory);
    llt::factor::cholesky_in_place(system.as_mut(), Default::default(), par, stack, Default::default()).ok()?;
    llt::solve::solve_in_place(system.as_ref(), right.as_mut(), par, stack);
    Some(right)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(n: usize, width: usize, seed: u64) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..n * width).map(|_| rng.random_range(-1.0f32..1.0)).collect()
    }

    #[test]
    fn tiled_products_are_those_in_f64_and_the_same_on_any_number_of_threads() {
        // More rows than a block, wider than a tile of either kind.
        let (n, d_a, d_b) = (2 * BLOCK_ROWS + 100, GRAM_TILE + 44, TILE + 9);
        let (a, b) = (random(n, d_a, 1), random(n, d_b, 2));
        let (a, b) = (Rows { values: &a, width: d_a }, Rows { values: &b, width: d_b });
        let widened = |rows: Rows| {
            let narrow = rows.transposed();
            Mat::<f64>::from_fn(rows.width, rows.n(), |i, j| f64::from(narrow[(i, j)]))
        };
        let (wide_a, wide_b) = (widened(a), widened(b));
        for (found, expected) in
            [(gram(a, 1), &wide_a * wide_a.transpose()), (cross_product(a, b, 1), &wide_a * wide_b.transpose())]
        {
            let apart = (&found - &expected).norm_max();
            assert!(apart < 1e-5 * (n as f64).sqrt() * 4.0, "{apart}");
        }
        assert_eq!(gram(a, 1), gram(a, 3));
        assert_eq!(cross_product(a, b, 1), cross_product(a, b, 2));
    }

    #[test]
    fn what_cannot_be_factored_is_told() {
        let indefinite = Mat::from_fn(2, 2, |i, j| if i == j { 1.0 } else { 2.0 });
        assert!(solve(indefinite.clone(), Mat::zeros(2, 1), 1).is_none());
        let (values, vectors) = eigen(&indefinite, 1).unwrap();
        assert!((values[0] + 1.0).abs() < 1e-12 && (values[1] - 3.0).abs() < 1e-12);
        assert!((vectors[(0, 1)].abs() - 0.5f64.sqrt()).abs() < 1e-12);
    }
}
