//! Mappings: learnt functions from one model's residuals to another's, and how good they are.
//!
//! In: residual rows of two models on the same tokens, and which document each row is from. Out: an [`AffineMap`] and its
//! [`MappingQuality`]; an [`Autoencoder`] is trained elsewhere and run here. This room knows nothing of files, tokenizers or models, and draws no randomness of its own: a seed is an
//! argument.
//!
//! Pairing rows ([`align_tokens`] says which tokens belong together) and leaving out the first position of every sequence, whose
//! activations are thousands of times larger than any other's and ruin a fit, is the caller's work.

mod affine;
mod align;
mod autoencoder;
mod moments;
mod quality;
mod residual_map;
#[cfg(feature = "learn")]
mod ridge;

pub use affine::{AffineMap, Factors, Standardization};
pub use align::align_tokens;
pub use autoencoder::{Autoencoder, AutoencoderQuality, AutoencoderWeights};
pub use quality::{FitQuality, MappingQuality};
pub use residual_map::{MapQuality, ReplacementQuality, ResidualMap};
#[cfg(feature = "learn")]
pub(crate) use ridge::Folds;
#[cfg(feature = "learn")]
pub use ridge::{Pair, Regression, RidgeOptions, Side, Similarity};

/// Why a mapping could not be fitted or made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MappingError {
    #[error("{what} has {found} values, expected {expected}")]
    Length { what: &'static str, expected: usize, found: usize },
    #[error("{what} has a non-finite value ({value}) at index {index}")]
    NonFinite { what: &'static str, index: usize, value: f32 },
    #[error("{what} has {value} at index {index}, expected a positive number")]
    Scale { what: &'static str, index: usize, value: f32 },
    #[error("{what} has {found} rows, expected {expected}, one for each of the documents' rows")]
    RowCount { what: &'static str, expected: usize, found: usize },
    #[error("a row of the {side} activations has a non-finite value: row {row}, index {index} is {value}")]
    NonFiniteRow { side: &'static str, row: usize, index: usize, value: f32 },
    #[error("rows of {found} documents, expected {expected} or more: some to fit on and some to hold out")]
    TooFewDocuments { expected: usize, found: usize },
    #[error("{found} rows to fit on once documents are held out, expected {expected} or more")]
    TooFewRows { expected: usize, found: usize },
    #[error("`{option}` is {found}, expected {expected}")]
    Options { option: &'static str, expected: &'static str, found: String },
    #[error("the held-out target activations do not vary: there is nothing to predict")]
    ConstantTarget,
    #[error("the ridge system is singular or overflows at a penalty of {lambda} times the number of rows")]
    Numerical { lambda: f64 },
}
