//! Models of random weights, as GGUF files of any size that llama.cpp loads and runs like any other: for timing where no weights are at hand.
//!
//! In: a [`Shape`] (by hand, or a known model's, [`Preset`]), a [`Quantization`] and a seed. Out: a file, written as it is made, so that memory
//! does not grow with the model. The same value writes the same bytes on every machine. This room knows how files are laid out and nothing of
//! how llama.cpp runs them; there is no C++ in it.
//!
//! Such a model costs what a real one of its shape costs, since no kernel of llama.cpp looks at the values, and says nothing that means anything.

mod architecture;
mod blocks;
mod error;
pub mod gguf;
mod model;
mod presets;
mod quantization;
mod shape;
mod vocabulary;

pub use architecture::Architecture;
pub use blocks::TensorType;
pub use error::SyntheticError;
pub use model::SyntheticModel;
pub use presets::{PRESETS, Preset};
pub use quantization::Quantization;
pub use shape::{NORM_EPSILON, PlannedTensor, Role, Shape, Sliding};
pub use vocabulary::{MIN_VOCABULARY, Token, TokenKind, Vocabulary};
