//! Pilotfish: a safety guard for llama.cpp models.
//!
//! Steering vectors found on a small model, carried over by a learned mapping of activation spaces, guard a larger quantized
//! model, by reading and patching its residual stream while it generates.
#![deny(unsafe_code)]
#![warn(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

#[cfg(feature = "engine")]
pub mod engine;
#[cfg(feature = "engine")]
pub mod eval;
pub mod guard;
#[allow(unsafe_code)]
pub mod hook;
#[cfg(feature = "engine")]
pub mod learn;
pub mod mapping;
#[cfg(feature = "cli")]
pub mod models;
pub mod program;
pub mod steering;
pub mod tensor;
