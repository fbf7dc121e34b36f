//! Ridge regressions between layers of two models, all pairs of layers from shared Gram matrices in one pass over the rows.
//!
//! `W = (ZₛᵀZₛ + λI)⁻¹ ZₛᵀZₜ` with both sides standardised a dimension at a time. Documents are dealt into parts by a seeded shuffle. The
//! penalty λ is the one with the lowest fraction of variance unexplained on the first part when the others are fitted, and the map is
//! then fitted anew on all rows with that λ.
//!
//! Rows are standardised once, with the moments of all of them, and multiplied once, part by part. What standardising by training rows
//! alone would have given follows from the parts' products and sums: `Σ (a − m_a)(b − m_b)ᵀ = Σ abᵀ − Σa m_bᵀ − m_a Σbᵀ + n m_a m_bᵀ`. Since
//! the rows are nearly standardised already, `m` is small and little cancels. With `ZₛᵀZₛ = QΛQᵀ` every λ costs `O(d_s²)` once `QᵀZₛᵀZₜ`
//! is known, and one such decomposition serves all targets; the same cross products, transposed, serve the regression the other way round.
//!
//! Standardised values and products of up to 1024 rows are in `f32`, their sums in `f64`; what judges a map goes on in `f32`, the map itself
//! is solved for in `f64`.

mod folds;
mod pair;
mod products;
mod side;
#[cfg(test)]
mod tests;

pub use pair::{Pair, Similarity};
pub use side::Side;

use super::MappingError;
use crate::tensor::Residual;
pub(crate) use folds::Folds;

/// How ridge regressions are fitted and judged.
#[derive(Debug, Clone, PartialEq)]
pub struct RidgeOptions {
    /// Penalties to choose from, each as a multiple of the number of rows fitted on, so that a value means the same for any
    /// amount of data.
    pub lambdas: Vec<f64>,
    /// Parts that the documents are dealt into, as equal as they can be; one of them is held out. No more than there are documents.
    pub folds: usize,
    /// Whether every part may be held out in turn ([`Pair::cross_validated`]), or only the first.
    pub cross_validate: bool,
    /// Seed of the dealing.
    pub seed: u64,
}

impl Default for RidgeOptions {
    fn default() -> Self {
        Self { lambdas: vec![1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0], folds: 5, cross_validate: false, seed: 0 }
    }
}

/// What all regressions on one corpus share: which row is of which part, and the penalties to choose from.
#[derive(Debug, Clone)]
pub struct Regression {
    folds: Folds,
    lambdas: Vec<f64>,
}

impl Regression {
    /// `documents`, `[n]`, says which document each row is from. Rows of first positions are left out by the caller, before rows are
    /// paired.
    ///
    /// # Errors
    /// If an option is out of range, or there are fewer than two documents or two rows to fit on.
    pub fn new(documents: &[u32], options: &RidgeOptions) -> Result<Self, MappingError> {
        let refuse = |option, expected, found: String| -> Result<Self, MappingError> {
            Err(MappingError::Options { option, expected, found })
        };
        if options.lambdas.is_empty() || options.lambdas.iter().any(|lambda| !lambda.is_normal() || *lambda < 0.0) {
            return refuse("lambdas", "one or more positive numbers", format!("{:?}", options.lambdas));
        }
        if options.folds < 2 {
            return refuse("folds", "2 or more", options.folds.to_string());
        }
        Ok(Self { folds: Folds::of_options(documents, options)?, lambdas: options.lambdas.clone() })
    }

    /// One layer of one model, ready to be paired with any of the other's: `rows` is `[n, width]`, and `name` is what errors call it.
    ///
    /// # Errors
    /// If there is not a row for each of the documents', or a value is not finite.
    pub fn side(&self, rows: Residual, name: &'static str, threads: usize) -> Result<Side, MappingError> {
        Side::new(&self.folds, rows, name, threads)
    }

    /// The pair of two sides that this regression made.
    pub fn pair<'a>(&'a self, source: &'a Side, target: &'a Side, threads: usize) -> Pair<'a> {
        Pair::new(self, source, target, threads)
    }
}
