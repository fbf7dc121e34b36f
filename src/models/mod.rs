//! Model descriptors and the pulling of the weights that they name.
//!
//! In: a descriptor (`NAME.toml`, shipped or the user's own). Out: the path of a file whose size and sha256 are the
//! descriptor's. This room never loads a model and knows nothing of tensors, guards or llama.cpp.

mod cache;
mod catalog;
mod descriptor;
mod digest;
mod error;
mod http;
mod pull;
#[cfg(test)]
mod tests;
mod wheel;

pub use cache::ModelCache;
pub use catalog::Catalog;
pub use descriptor::{Descriptor, Source, WheelMember};
pub use digest::Sha256Digest;
pub use error::{FailedSource, ModelError};
pub use pull::{PullProgress, pull};
