//! Pilotfish: a safety guard for llama.cpp models.
//!
//! Directions found in a small model's activations, carried over by a learned mapping, guard a larger quantized model by reading and
//! patching its residual stream while it generates. The method is that of Oozeer et al., "Activation Space Interventions Can Be
//! Transferred Between Large Language Models" (arXiv 2503.04429).
//!
//! An app that uses llama-cpp-2 loads a [`Guard`] from its folder and gets a context that is guarded by it:
//!
//! ```no_run
//! # #[cfg(feature = "engine")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use llama_cpp_2::{context::params::LlamaContextParams, llama_backend::LlamaBackend, model::LlamaModel};
//! use pilotfish::tensor::{SequenceId, TokenPosition};
//! use pilotfish::{Guard, GuardedBatch, guard_context};
//!
//! let backend = LlamaBackend::init()?;
//! let model = LlamaModel::load_from_file(&backend, "model.gguf", &Default::default())?;
//! let guard = Guard::load("my-guard".as_ref())?;
//! let mut context = guard_context(&model, &backend, LlamaContextParams::default(), &[&guard])?;
//!
//! let mut batch = GuardedBatch::new(512);
//! let tokens = model.vocab().tokenize(b"How do I whittle a spoon?", true, true);
//! let last = batch.add_prompt(SequenceId(0), TokenPosition(0), &tokens)?;
//! context.decode(&mut batch)?; // an error if the guard blocks or fails: then there are no logits to use
//! let logits = context.get_logits_ith(last);
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "engine"))]
//! # fn main() {}
//! ```
//!
//! A guard that can't do its work never passes for one that found nothing: see [`GuardedContext`] and
//! [`guard::OnError`]. What guards may say is in `docs/guard-format.md`, how the library is built in `ARCHITECTURE.md`.
//!
//! # Features
//!
//! - `engine` (default): llama.cpp through llama-cpp-2. Without it there is no C++ in the build, and what remains is guard files,
//!   programs, mappings, [`synthetic`] models and a [`hook`] whose ggml functions are looked up at run time.
//! - `learn` (default): making guards and measuring them: [`learn`], [`eval`]. An app that runs guards can do without.
//! - `store` (default): [`store`], a directory of guards that is watched. It needs no `engine`.
//! - `server` (default): [`server`], OpenAI's API over HTTP.
//! - `cli` (default): the `pilotfish` command, and [`models`], its downloads.
//! - `cuda`, `metal`, `vulkan`, `dynamic-backends`: forwarded to llama-cpp-2. The last loads ggml's backends at run time, from the folder that `PILOTFISH_BACKENDS` names or else from where they were built.
#![cfg_attr(not(feature = "engine"), allow(rustdoc::broken_intra_doc_links))]
#![deny(unsafe_code)]
#![warn(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod attach;
pub mod audit;
#[cfg(feature = "engine")]
pub mod engine;
#[cfg(feature = "learn")]
pub mod eval;
pub mod guard;
#[allow(unsafe_code)]
pub mod hook;
#[cfg(feature = "learn")]
pub mod learn;
pub mod mapping;
#[cfg(feature = "cli")]
pub mod models;
pub mod program;
#[cfg(feature = "server")]
pub mod server;
pub mod steering;
#[cfg(feature = "store")]
pub mod store;
pub mod synthetic;
pub mod tensor;

#[cfg(feature = "engine")]
pub use engine::guard_context;
pub use guard::Guard;
#[cfg(feature = "engine")]
pub use hook::{GuardedBatch, GuardedContext};
pub use program::Program;
