//! Behaviour, from outside. Three tiers: without a model, on tiny GGUFs that the tests write, and on real models, which run where
//! they have been pulled (`pilotfish models pull`) and say so where they are skipped.

mod adapters;
mod architecture;
#[cfg(target_os = "linux")]
mod attach;
#[cfg(target_os = "linux")]
mod attach_control;
mod autoencoder;
mod backdoor;
#[cfg(target_os = "linux")]
mod c_interface;
mod command_line;
#[path = "../support/counting_allocator.rs"]
mod counting_allocator;
mod evaluation;
mod guarded;
mod learning;
#[path = "../support/raw_llama.rs"]
mod raw_llama;
mod real;
mod reference;
mod server;
mod support;
mod switches;
mod synthetic;
#[path = "../support/tiny_adapter.rs"]
mod tiny_adapter;
#[path = "../support/tiny_model.rs"]
mod tiny_model;

#[global_allocator]
static ALLOCATOR: counting_allocator::CountingAllocator = counting_allocator::CountingAllocator;
