//! The heavy products, by faer on one thread: callers work at several layers at once, and the same inputs give the same bits.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatRef, Par};

/// `A Aᵀ` of `a`, `[n, k]`: the lower triangle of `[n, n]`, zeros above it.
pub(super) fn gram(a: MatRef<'_, f64>) -> Mat<f64> {
    let mut product = Mat::zeros(a.nrows(), a.nrows());
    triangular::matmul(
        product.as_mut(),
        BlockStructure::TriangularLower,
        Accum::Replace,
        a,
        BlockStructure::Rectangular,
        a.transpose(),
        BlockStructure::Rectangular,
        1.0,
        Par::Seq,
    );
    product
}

/// `A⁻¹ B` of the positive definite matrix whose lower triangle `a` has, and columns `b`; `None` where it is not positive definite.
pub(super) fn solve(mut a: Mat<f64>, mut b: Mat<f64>) -> Option<Mat<f64>> {
    let n = a.nrows();
    let params = Default::default();
    let scratch = llt::factor::cholesky_in_place_scratch::<f64>(n, Par::Seq, params);
    let mut memory = MemBuffer::new(scratch);
    llt::factor::cholesky_in_place(a.as_mut(), Default::default(), Par::Seq, MemStack::new(&mut memory), params)
        .ok()?;
    let mut memory = MemBuffer::new(llt::solve::solve_in_place_scratch::<f64>(n, b.ncols(), Par::Seq));
    llt::solve::solve_in_place(a.as_ref(), b.as_mut(), Par::Seq, MemStack::new(&mut memory));
    let finite = (0..b.ncols()).all(|column| b.col(column).iter().all(|value| value.is_finite()));
    finite.then_some(b)
}

/// `A x`
pub(super) fn product(a: MatRef<'_, f64>, x: &[f64]) -> Vec<f64> {
    let mut y = vec![0.0; a.nrows()];
    faer::linalg::matmul::matmul(
        faer::MatMut::from_column_major_slice_mut(&mut y, a.nrows(), 1),
        Accum::Replace,
        a,
        MatRef::from_column_major_slice(x, x.len(), 1),
        1.0,
        Par::Seq,
    );
    y
}
