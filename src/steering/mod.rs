//! Steering vectors: finding them in activations, and exchanging them with llama.cpp as control vectors.
//!
//! In: residual rows of two classes, or the bytes of a control-vector GGUF. Out: directions with how they were found, or such
//! bytes. This room never runs a model and never touches a file: which rows to compare, and where bytes come from, is the
//! caller's business.

mod contrast;
mod control_vector;
#[cfg(feature = "learn")]
mod discriminant;
mod extract;
mod gguf;
#[cfg(feature = "learn")]
mod logistic;
#[cfg(feature = "learn")]
mod principal;
mod quality;
#[cfg(feature = "learn")]
mod solve;
mod stack;
mod tokens;

pub use contrast::ContrastSet;
pub use control_vector::ControlVector;
#[cfg(feature = "learn")]
pub use discriminant::{DEFAULT_SHRINKAGE, linear_discriminant};
pub use extract::{Extracted, difference_of_means};
#[cfg(feature = "learn")]
pub use logistic::{DEFAULT_PENALTY, logistic_regression};
#[cfg(feature = "learn")]
pub use principal::principal_difference;
pub use quality::{Stability, VectorQuality};
pub use stack::stacked;
pub use tokens::PromptTokens;

use crate::tensor::LayerIndex;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A direction in one model's residual at one hook point, with how it was found.
#[derive(Debug, Clone, PartialEq)]
pub struct SteeringVector {
    pub name: String,
    pub layer: LayerIndex,
    /// `[width]`, as found: not normalised, so that strength 1.0 is the vector itself.
    pub values: Vec<f32>,
    pub method: ExtractionMethod,
    pub tokens: PromptTokens,
    /// Mean L2 norm of the residual rows at that layer, over both classes; 0 where the vector was imported and none is known.
    pub mean_norm: f64,
    /// Rows of the positive class; 0 where imported.
    pub n_positive: usize,
    /// Rows of the negative class; 0 where imported.
    pub n_negative: usize,
    /// Whose difference the vector is; `None` where it is not, where imported, or found before they were kept.
    pub class_means: Option<ClassMeans>,
    /// Measured when it was made; `None` in older files, and where imported.
    pub quality: Option<VectorQuality>,
}

/// Mean residual of each class, over several contrast sets the weighted mean of theirs: what a map that is not linear carries in place of
/// their difference.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassMeans {
    /// `[width]`
    pub positive: Vec<f32>,
    /// `[width]`
    pub negative: Vec<f32>,
}

/// How a steering vector was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ExtractionMethod {
    /// See [`difference_of_means`].
    #[serde(rename = "mean")]
    DifferenceOfMeans,
    /// See [`principal_difference`].
    #[serde(rename = "pca")]
    PrincipalDifference,
    /// See [`linear_discriminant`].
    #[serde(rename = "lda")]
    LinearDiscriminant,
    /// See [`logistic_regression`].
    #[serde(rename = "logistic")]
    LogisticRegression,
    /// Read from a file that does not say.
    #[serde(rename = "imported")]
    Imported,
}

/// What the numbers of a vector mean, and so how a mapping carries them to another model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VectorKind {
    /// A difference of residuals: pushed forward, `v_t = D_t Wᵀ D_s⁻¹ v_s`.
    #[default]
    Direction,
    /// A function of residuals, `x ↦ w·x`: pulled back through what the mapping says of the source's residual, given the target's.
    Discriminant,
}

impl ExtractionMethod {
    pub const ALL: [Self; 5] = [
        Self::DifferenceOfMeans,
        Self::PrincipalDifference,
        Self::LinearDiscriminant,
        Self::LogisticRegression,
        Self::Imported,
    ];

    pub fn kind(self) -> VectorKind {
        match self {
            Self::LinearDiscriminant | Self::LogisticRegression => VectorKind::Discriminant,
            Self::DifferenceOfMeans | Self::PrincipalDifference | Self::Imported => VectorKind::Direction,
        }
    }

    /// As files and the command line call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::DifferenceOfMeans => "mean",
            Self::PrincipalDifference => "pca",
            Self::LinearDiscriminant => "lda",
            Self::LogisticRegression => "logistic",
            Self::Imported => "imported",
        }
    }
}

impl fmt::Display for ExtractionMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ExtractionMethod {
    type Err = SteeringError;

    fn from_str(text: &str) -> Result<Self, SteeringError> {
        let found = Self::ALL.into_iter().find(|method| method.name() == text);
        found.ok_or_else(|| SteeringError::UnknownMethod { found: text.to_owned() })
    }
}

/// Why a direction could not be found, read or written.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SteeringError {
    #[error("unknown extraction method `{found}`, expected `mean`, `pca`, `lda`, `logistic` or `imported`")]
    UnknownMethod { found: String },
    #[error(
        "`{found}` are no tokens of a prompt, expected `last`, `mean`, `-2` (the last but one), `matching=TEXT` or `after=TEXT`"
    )]
    UnknownTokens { found: String },

    #[error("there are no prompts to compare")]
    NoSets,
    #[error("the weight of a contrast set is {found}, expected a number above 0")]
    Weight { found: f64 },
    #[error("the {class} class has no rows")]
    EmptyClass { class: &'static str },
    #[error("rows of the {class} class have width {found}, expected {expected}")]
    ClassWidths { class: &'static str, expected: usize, found: usize },
    #[error(
        "paired differences need classes of equal size, the first prompt of one against the first of the other and so on, found {positive} positive and {negative} negative"
    )]
    Unpaired { positive: usize, negative: usize },
    #[error("row {row} of the {class} class has a non-finite value ({value}) at index {index}")]
    NonFiniteRow { class: &'static str, row: usize, index: usize, value: f32 },
    #[error("the two classes have the same mean: there is no direction between them")]
    ZeroDirection,
    #[error("a discriminant needs two rows of each class or more, found {positive} positive and {negative} negative")]
    TooFewRows { positive: usize, negative: usize },
    #[error("the shrinkage is {found}, expected a number above 0, up to 1")]
    Shrinkage { found: f64 },
    #[error("the penalty is {found}, expected a number above 0")]
    Penalty { found: f64 },
    #[error("the logistic regression did not converge in {iterations} steps: raise the penalty")]
    NotConverged { iterations: usize },
    #[error("no row differs from its class's mean, so there is no variance to weigh dimensions by")]
    NoVariance,
    #[error("the direction does not fit in `f32`: index {index} is {value}")]
    Overflow { index: usize, value: f64 },

    #[error("not a GGUF file: it starts with {found:02x?}, expected {expected:02x?}")]
    Magic { expected: [u8; 4], found: [u8; 4] },
    #[error("GGUF version {found} is not supported, expected 2 or 3 in little-endian byte order")]
    Version { found: u32 },
    #[error("truncated at byte {offset}: {what} needs {needed} bytes, {left} are left")]
    Truncated { offset: usize, what: String, needed: u64, left: usize },
    #[error("key `{key}` at byte {offset}: {reason}")]
    Key { key: String, offset: usize, reason: String },
    #[error("tensor `{tensor}` at byte {offset}: {reason}")]
    Tensor { tensor: String, offset: usize, reason: String },
    #[error("not a control vector: key `general.architecture` is {found}, expected `controlvector`")]
    Architecture { found: String },

    #[error("the control vector has no directions")]
    NoDirections,
    #[error("a control vector cannot act at layer {layer}: llama.cpp takes layers 1 to {}", i32::MAX)]
    DirectionLayer { layer: LayerIndex },
    #[error("the direction at layer {layer} has width {found}, expected {expected}")]
    DirectionWidth { layer: LayerIndex, expected: usize, found: usize },
    #[error("the direction at layer {layer} has a non-finite value ({value}) at index {index}")]
    NonFiniteDirection { layer: LayerIndex, index: usize, value: f32 },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_is_spelt_the_same_everywhere() {
        for (method, name) in [
            (ExtractionMethod::DifferenceOfMeans, "mean"),
            (ExtractionMethod::PrincipalDifference, "pca"),
            (ExtractionMethod::LinearDiscriminant, "lda"),
            (ExtractionMethod::LogisticRegression, "logistic"),
            (ExtractionMethod::Imported, "imported"),
        ] {
            assert_eq!(method.to_string(), name);
            assert_eq!(name.parse(), Ok(method));
            assert_eq!(serde_json::to_value(method).unwrap(), name);
        }
        assert_eq!("Mean".parse::<ExtractionMethod>(), Err(SteeringError::UnknownMethod { found: "Mean".to_owned() }));
    }
}
