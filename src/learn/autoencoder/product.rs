use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

/// `a · b` for `a`, `[m, k]`, and `b`, `[k, n]`, either of them possibly a transposed view.
///
/// On the CPU by faer's kernels, which use AVX-512 where there is one (candle's own stop at AVX2); elsewhere by candle's. Threads share out
/// the rows and columns of the result, never the sum that a value is, so a result has the same bits in every run.
pub(super) fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() { a.apply_op2_no_bwd(b, &Product) } else { a.matmul(b) }
}

struct Product;

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Result<(CpuStorage, Shape)> {
        let (a, b) = (matrix(a.as_slice::<f32>()?, la)?, matrix(b.as_slice::<f32>()?, lb)?);
        if a.ncols() != b.nrows() {
            bail!("product of {:?} and {:?}", la.shape(), lb.shape());
        }
        let (m, n) = (a.nrows(), b.ncols());
        // Transposed, so that the columns of what faer fills are the rows that candle reads.
        let mut transposed = vec![0.0f32; m * n];
        let into = MatMut::from_column_major_slice_mut(&mut transposed, n, m);
        matmul(into, Accum::Replace, b.transpose(), a.transpose(), 1.0, Par::rayon(0));
        Ok((CpuStorage::F32(transposed), Shape::from((m, n))))
    }
}

/// A contiguous matrix, or the transpose of one.
fn matrix<'a>(values: &'a [f32], layout: &Layout) -> Result<MatRef<'a, f32>> {
    let (rows, columns) = layout.shape().dims2()?;
    let values = &values[layout.start_offset()..layout.start_offset() + rows * columns];
    if layout.is_contiguous() {
        Ok(MatRef::from_row_major_slice(values, rows, columns))
    } else if layout.is_fortran_contiguous() {
        Ok(MatRef::from_column_major_slice(values, rows, columns))
    } else {
        bail!("product of a matrix with strides {:?}", layout.stride())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn made(rows: usize, columns: usize, seed: usize) -> Tensor {
        let values: Vec<f32> =
            (0..rows * columns).map(|index| ((index * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    #[test]
    fn a_product_is_that_of_f64_whatever_is_transposed() {
        let (m, k, n) = (37, 53, 29);
        let cases = [
            (made(m, k, 1), made(k, n, 2)),
            (made(k, m, 3).t().unwrap(), made(k, n, 4)),
            (made(m, k, 5), made(n, k, 6).t().unwrap()),
            (made(2 * m, k, 7).narrow(0, m, m).unwrap(), made(k, n, 8)),
        ];
        for (a, b) in cases {
            let found = product(&a, &b).unwrap().to_vec2::<f32>().unwrap();
            let (a, b) = (a.to_vec2::<f32>().unwrap(), b.to_vec2::<f32>().unwrap());
            for row in 0..m {
                for column in 0..n {
                    let expected: f64 = (0..k).map(|at| f64::from(a[row][at]) * f64::from(b[at][column])).sum();
                    assert!((f64::from(found[row][column]) - expected).abs() < 1e-4, "{row}, {column}");
                }
            }
        }
        assert!(product(&made(2, 3, 0), &made(2, 3, 0)).is_err());
        assert!(product(&made(4, 6, 0).narrow(1, 0, 3).unwrap(), &made(3, 3, 0)).is_err());
    }
}
