use crate::hook::{Adapters, ContextError, GuardedContext};
use crate::program::{ModelShape, Program};
use crate::tensor::HiddenSize;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use std::sync::Arc;

/// A model's weights with the adapters that it carries: every context of this room is made here, so that all of them have the adapters.
#[derive(Clone, Copy)]
pub struct Weights<'model> {
    llama: &'model LlamaModel,
    backend: &'model LlamaBackend,
    adapters: Option<&'model Adapters>,
}

impl<'model> Weights<'model> {
    /// Of a model that an app has loaded itself, without adapters: one that the app sets on its contexts is not known here.
    pub fn of(llama: &'model LlamaModel, backend: &'model LlamaBackend) -> Self {
        Self { llama, backend, adapters: None }
    }

    pub(super) fn with_adapters(
        llama: &'model LlamaModel,
        backend: &'model LlamaBackend,
        adapters: &'model Adapters,
    ) -> Self {
        Self { llama, backend, adapters: Some(adapters) }
    }

    pub fn llama(self) -> &'model LlamaModel {
        self.llama
    }

    pub fn shape(self) -> ModelShape {
        ModelShape { n_embd: HiddenSize(self.llama.n_embd() as usize), n_layer: self.llama.n_layer() }
    }

    /// A context under `program`, see [`GuardedContext::new`].
    ///
    /// # Errors
    /// As there, and llama.cpp refuses the adapters.
    pub fn guarded(
        self,
        params: LlamaContextParams,
        program: Arc<Program>,
    ) -> Result<GuardedContext<'model>, ContextError> {
        let mut context = GuardedContext::new(self.llama, self.backend, params, program)?;
        if let Some(adapters) = self.adapters {
            context.put_on(adapters)?;
        }
        Ok(context)
    }

    /// A context with no guard and no callback.
    ///
    /// # Errors
    /// llama.cpp can't make it, or refuses the adapters.
    pub fn plain(self, params: LlamaContextParams) -> Result<LlamaContext<'model>, ContextError> {
        let mut context = self.llama.new_context(self.backend, params)?;
        if let Some(adapters) = self.adapters {
            adapters.put_on(&mut context)?;
        }
        Ok(context)
    }
}
