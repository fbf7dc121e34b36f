//! Putting LoRA adapters on a context. llama-cpp-2 sets one, in place of all others; a model may carry several.

use super::ContextError;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::model::{LlamaLoraAdapter, LlamaModel};
use llama_cpp_2::{LlamaLoraAdapterInitError, LlamaLoraAdapterSetError};
use llama_cpp_sys_2 as sys;
use std::path::Path;

/// LoRA adapters that were loaded for one model, and how much of each is added to its weights.
///
/// llama.cpp frees them with their model. Nobody outside of this library can get one, so that the engine's `Model`, which owns both and
/// makes the contexts, answers for their being used together.
#[derive(Debug, Default)]
pub(crate) struct Adapters(Vec<(LlamaLoraAdapter, f32)>);

// `raw` reads the one field of an adapter, and llama-cpp-2 says that it is transparent.
const _: () = assert!(
    size_of::<LlamaLoraAdapter>() == size_of::<*mut sys::llama_adapter_lora>(),
    "llama-cpp-2's LlamaLoraAdapter is no longer a bare pointer"
);

impl Adapters {
    /// Loads the GGUF at `path`, which is there, for `model`, to be added `scale` times.
    ///
    /// # Errors
    /// llama.cpp finds no adapter for this model in the file. Why, it says in its log alone.
    pub(crate) fn load(
        &mut self,
        model: &mut LlamaModel,
        path: &Path,
        scale: f32,
    ) -> Result<(), LlamaLoraAdapterInitError> {
        self.0.push((model.lora_adapter_init(path)?, scale));
        Ok(())
    }

    /// Puts all of them on `context`, which is of their model, in place of what it had. At scale 0 an adapter costs nothing.
    ///
    /// # Errors
    /// llama.cpp refuses them.
    pub(crate) fn put_on(&self, context: &mut LlamaContext<'_>) -> Result<(), ContextError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut adapters: Vec<_> = self.0.iter().map(|(adapter, _)| raw(adapter)).collect();
        let mut scales: Vec<f32> = self.0.iter().map(|(_, scale)| *scale).collect();
        let context = raw_context(context)
            .ok_or_else(|| ContextError::Adapters("this llama-cpp-2 does not show where a context is".into()))?;
        // SAFETY: the context is alive, as it is borrowed for this call; the adapters are alive as their model is, which the context
        // borrows; both lists have that many entries, and llama.cpp copies them.
        let code = unsafe {
            sys::llama_set_adapters_lora(context, adapters.as_mut_ptr(), adapters.len(), scales.as_mut_ptr())
        };
        match code {
            0 => Ok(()),
            code => Err(ContextError::Adapters(LlamaLoraAdapterSetError::ErrorResult(code).to_string())),
        }
    }
}

fn raw(adapter: &LlamaLoraAdapter) -> *mut sys::llama_adapter_lora {
    // SAFETY: `LlamaLoraAdapter` is transparent around a non-null pointer of this type (llama-cpp-2 is pinned exactly), and it is only read.
    unsafe { *std::ptr::from_ref(adapter).cast() }
}

/// Where llama.cpp's context is. llama-cpp-2 keeps the pointer to itself, and the order of the struct's fields is the compiler's choice; but
/// its `Debug` is `LlamaContext { context: 0x… }`, the pointer itself.
fn raw_context(context: &mut LlamaContext<'_>) -> Option<*mut sys::llama_context> {
    let shown = format!("{context:?}");
    let address = shown.strip_prefix("LlamaContext { context: 0x")?.strip_suffix(" }")?;
    let address = usize::from_str_radix(address, 16).ok().filter(|address| *address != 0)?;
    Some(std::ptr::with_exposed_provenance_mut(address))
}
