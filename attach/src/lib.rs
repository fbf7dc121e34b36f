//! Pilotfish inside an app that runs llama.cpp.
//!
//! One small shared library with no llama.cpp in it, used in two ways. An app links it and calls the functions of `include/pilotfish.h` (`abi`). Or it is preloaded
//! (`pilotfish attach`) and stands between an app that knows nothing of it and the llama.cpp that the app loads as shared libraries: `preload` takes the place of a
//! few exported functions, `lookup` does the same for apps that look functions up by name, `batch` keeps what an app
//! writes into batches that can't be read.
//!
//! Under both: `loaded` finds llama.cpp's functions, `llama` has their types, `guards` watches a directory and compiles what is in it for the models that the
//! process loads (`models`), `guarding` runs that in one context, behind whose callback `seat` is, `track` says what the rows of its batches are. `record` counts and writes the
//! audit log; `control` answers `pilotfish ctl` over a socket, and `score` reads a text for it.
//!
//! Hooking and patching are the library's own (`pilotfish::hook`, `pilotfish::program`). Only exported functions are used, and no layout but that of `llama_batch`,
//! which is part of the interface that apps call.

#![warn(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

mod abi;
#[cfg(target_os = "linux")]
mod batch;
#[cfg(target_os = "linux")]
mod control;
mod guarding;
mod guards;
mod llama;
mod loaded;
#[cfg(all(target_os = "linux", target_env = "gnu", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod lookup;
mod models;
#[cfg(target_os = "linux")]
mod preload;
mod record;
#[cfg(target_os = "linux")]
mod score;
mod seat;
mod track;

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `body`, whose panics go no further: then `failed` is the answer.
fn boundary<T>(failed: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(failed)
}

/// Has a log written to standard error, of what `PILOTFISH_LOG` asks for, or else of `otherwise`, if that is anything.
fn begin_log(otherwise: Option<&str>) {
    use tracing_subscriber::EnvFilter;
    let asked = EnvFilter::try_from_env("PILOTFISH_LOG").ok();
    if let Some(filter) = asked.or_else(|| otherwise.map(EnvFilter::new)) {
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
        // The app has one already.
        let _ = log.without_time().try_init();
    }
}
