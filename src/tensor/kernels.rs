//! Kernels over one row. They accumulate in `f32` over independent lanes, which the compiler turns into SIMD (a single
//! running sum can't be, since float addition is not associative), so a sum of n terms has an error of about n/16 ulps.
//!
//! Each is compiled for several instruction sets, and the machine's best is taken at run time. All add in the same order and none fuses
//! a product into a sum, so that they agree to the last bit.

use multiversion::multiversion;

/// Independent partial sums a dot product keeps: two AVX2 or four NEON registers.
const LANES: usize = 16;

/// `a · b`, both `[width]`, accumulated in `f32`.
///
/// # Panics
/// If the lengths differ.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2", "x86_64+avx"))]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot of {} and {} values", a.len(), b.len());
    let mut sums = [0.0f32; LANES];
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_lanes.iter().zip(b_lanes) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum();
    sums.iter().sum::<f32>() + rest
}

/// Four [`axpy`]s on one `y`, one after the other, to the same bits: `y` is read and written once.
///
/// # Panics
/// If the lengths differ.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2", "x86_64+avx"))]
pub fn axpy4(alpha: [f32; 4], x: [&[f32]; 4], y: &mut [f32]) {
    for x in x {
        assert_eq!(x.len(), y.len(), "axpy of {} and {} values", x.len(), y.len());
    }
    let [x0, x1, x2, x3] = x;
    for ((((y, x0), x1), x2), x3) in y.iter_mut().zip(x0).zip(x1).zip(x2).zip(x3) {
        *y = (((*y + alpha[0] * x0) + alpha[1] * x1) + alpha[2] * x2) + alpha[3] * x3;
    }
}

/// `y += alpha · x`, both `[width]`.
///
/// # Panics
/// If the lengths differ.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2", "x86_64+avx"))]
pub fn axpy(alpha: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "axpy of {} and {} values", x.len(), y.len());
    for (y, x) in y.iter_mut().zip(x) {
        *y += alpha * x;
    }
}

/// Whether no value is NaN or infinite: `x · 0` is 0 for a finite x and NaN for any other, so one sum tells.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2", "x86_64+avx"))]
pub fn all_finite(values: &[f32]) -> bool {
    let (lanes, rest) = values.as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for chunk in lanes {
        for lane in 0..LANES {
            sums[lane] += chunk[lane] * 0.0;
        }
    }
    sums.iter().all(|sum| *sum == 0.0) && rest.iter().all(|x| x.is_finite())
}

/// `‖a‖₂`, accumulated in `f64`.
pub fn norm(a: &[f32]) -> f64 {
    a.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
}

/// `a / ‖a‖₂`, or `None` where the norm is zero or not finite.
pub fn unit(a: &[f32]) -> Option<Vec<f32>> {
    let length = norm(a);
    (length.is_finite() && length > 0.0).then(|| a.iter().map(|x| (f64::from(*x) / length) as f32).collect())
}

/// Cosine of the angle between `a` and `b`, both `[width]`, accumulated in `f64`; 0 where either is zero.
///
/// # Panics
/// If the lengths differ.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "cosine of {} and {} values", a.len(), b.len());
    let product: f64 = a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    let norms = norm(a) * norm(b);
    if norms > 0.0 { product / norms } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair() -> impl Strategy<Value = (Vec<f32>, Vec<f32>)> {
        (0usize..200)
            .prop_flat_map(|n| (proptest::collection::vec(-1e3f32..1e3, n), proptest::collection::vec(-1e3f32..1e3, n)))
    }

    proptest! {
        #[test]
        fn dot_agrees_with_f64((a, b) in pair()) {
            let exact: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            let magnitude: f64 = a.iter().zip(&b).map(|(x, y)| (f64::from(*x) * f64::from(*y)).abs()).sum();
            prop_assert!((f64::from(dot(&a, &b)) - exact).abs() <= 1e-5 * magnitude + 1e-12);
        }

        #[test]
        fn axpy_agrees_with_f64((x, y) in pair(), alpha in -10.0f32..10.0) {
            let mut found = y.clone();
            axpy(alpha, &x, &mut found);
            for ((x, y), found) in x.iter().zip(&y).zip(found) {
                let exact = f64::from(*y) + f64::from(alpha) * f64::from(*x);
                prop_assert!((f64::from(found) - exact).abs() <= 1e-6 * (exact.abs() + f64::from((alpha * x).abs())));
            }
        }

        #[test]
        fn axpy4_has_the_bits_of_four_axpys((a, b) in pair(), alpha in -10.0f32..10.0) {
            let scaled = [1.0, -0.3, 0.7, 3.1].map(|by| b.iter().map(|x| by * x).collect::<Vec<_>>());
            let each = [0, 1, 2, 3].map(|index| &*scaled[index]);
            let alpha = [alpha, 1.0 - alpha, 0.1 * alpha, -3.0];
            let (mut found, mut expected) = (a.clone(), a);
            axpy4(alpha, each, &mut found);
            alpha.iter().zip(each).for_each(|(alpha, x)| axpy(*alpha, x, &mut expected));
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&found), bits(&expected));
        }

        #[test]
        fn unit_has_norm_one((a, _) in pair()) {
            match unit(&a) {
                Some(u) => prop_assert!((norm(&u) - 1.0).abs() < 1e-6),
                None => prop_assert!(a.iter().all(|x| *x == 0.0)),
            }
        }
    }

    #[test]
    fn one_bad_value_anywhere_is_found() {
        for n in [1, 15, 16, 17, 64, 100] {
            let mut values = vec![1.0e38f32; n];
            assert!(all_finite(&values));
            for index in 0..n {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let good = std::mem::replace(&mut values[index], bad);
                    assert!(!all_finite(&values), "{bad} at {index} of {n}");
                    values[index] = good;
                }
            }
        }
    }
}
