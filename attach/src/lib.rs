//! Pilotfish inside an app that runs llama.cpp.
//!
//! One small shared library with no llama.cpp in it. Preloaded (`pilotfish attach`), it stands between an app that knows nothing of it and the llama.cpp that
//! the app loads as shared libraries: `preload` takes the place of a few exported functions, `loaded` finds the real ones, `llama` has their types, `lookup`
//! does the same for apps that look functions up by name. `guards` watches a directory and compiles what is in it for the models that the process loads,
//! `guarding` runs that in one context, `track` says what the rows of its batches are.
//!
//! Hooking and patching are the library's own (`pilotfish::hook`, `pilotfish::program`). Only exported functions are used, and no layout but that of `llama_batch`,
//! which is part of the interface that apps call.

#![warn(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

mod guarding;
mod guards;
mod llama;
mod loaded;
#[cfg(all(target_os = "linux", target_env = "gnu", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod lookup;
#[cfg(target_os = "linux")]
mod preload;
mod track;
