//! Newtypes for the things that can be mixed up, views of residual activations, and the numeric kernels that run on them.
//!
//! In: slices of `f32`, row-contiguous, one row a token. Out: the same, patched, or scalars. This room knows nothing of
//! files, models or whose memory a slice is.

mod kernels;
mod residual;
mod stack;
mod statistics;

pub use kernels::{all_finite, axpy, axpy4, cosine, dot, norm, unit};
pub use residual::{Residual, ResidualMut};
pub use stack::{LayerStack, NoLayerStack};
pub use statistics::{auc, kl_divergence, log_softmax, mean_and_deviation, quantile};

use serde::{Deserialize, Serialize};
use std::fmt;

/// A hook point: the index `L` of the block whose output residual is read or patched (llama.cpp's graph layer `L`, from 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerIndex(pub u32);

impl LayerIndex {
    /// As an index into a `Vec` with one entry a layer.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for LayerIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Width of the residual stream (`n_embd`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HiddenSize(pub usize);

impl fmt::Display for HiddenSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A sequence of a batch, as the caller numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub i32);

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Position of a token in its sequence, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenPosition(pub i32);

impl TokenPosition {
    /// The first position is an attention sink: its activations are thousands of times larger than any other's, so it is
    /// left out of every fit and statistic and is not patched unless a guard says so.
    pub fn is_sink(self) -> bool {
        self.0 == 0
    }
}

/// What is wrong with the shape or the content of a numeric argument.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    #[error("{what} has {found} values, which is not a whole number of rows of {width}")]
    RaggedRows { what: &'static str, width: usize, found: usize },
    #[error("{what} has width {found}, expected {expected}")]
    Width { what: &'static str, expected: usize, found: usize },
    #[error("{what} has a non-finite value ({value}) at index {index}")]
    NonFinite { what: &'static str, index: usize, value: f32 },
}
