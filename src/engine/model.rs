use super::{EngineError, PromptTemplate, identity_of};
use crate::guard::ModelIdentity;
use crate::program::ModelShape;
use crate::tensor::HiddenSize;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::{LogOptions, send_logs_to_tracing};
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::OnceLock;

/// A loaded model, with what a guard asks of it.
pub struct Model {
    llama: LlamaModel,
    identity: ModelIdentity,
    template: PromptTemplate,
}

#[derive(Debug, Clone, Default)]
pub struct ModelOptions {
    /// Layers to put on a GPU; 0 keeps all on the CPU.
    pub gpu_layers: u32,
    /// Template for a model that has none of its own: a text with `{prompt}`.
    pub fallback_template: Option<String>,
    /// Put nothing around prompts.
    pub raw: bool,
}

/// llama.cpp's one-time initialisation, for contexts of a [`Model`] that an app makes itself. Its log goes to `tracing`.
///
/// # Errors
/// The app has initialised llama.cpp itself: then it passes its own backend to [`guard_context`](super::guard_context).
pub fn backend() -> Result<&'static LlamaBackend, EngineError> {
    static BACKEND: OnceLock<Result<LlamaBackend, String>> = OnceLock::new();
    BACKEND
        .get_or_init(|| {
            send_logs_to_tracing(LogOptions::default());
            LlamaBackend::init().map_err(|error| error.to_string())
        })
        .as_ref()
        .map_err(|reason| EngineError::Backend(reason.clone()))
}

impl Model {
    /// Loads the GGUF at `path`, called `name` in reports and provenance.
    ///
    /// # Errors
    /// No such file, or llama.cpp can't load it.
    pub fn load(path: &Path, name: &str, options: &ModelOptions) -> Result<Self, EngineError> {
        if !path.is_file() {
            return Err(EngineError::NoFile { path: path.to_owned() });
        }
        let backend = backend()?;
        let params = LlamaModelParams::default().with_n_gpu_layers(options.gpu_layers);
        let llama = LlamaModel::load_from_file(backend, path, &params)
            .map_err(|error| EngineError::Load { path: path.to_owned(), reason: error.to_string() })?;
        let identity = identity_of(name, &llama)?;
        let template = if options.raw {
            PromptTemplate::Raw
        } else {
            PromptTemplate::of(&llama, options.fallback_template.as_deref())
        };
        Ok(Self { llama, identity, template })
    }

    pub fn llama(&self) -> &LlamaModel {
        &self.llama
    }

    pub fn identity(&self) -> &ModelIdentity {
        &self.identity
    }

    pub fn template(&self) -> &PromptTemplate {
        &self.template
    }

    pub fn shape(&self) -> ModelShape {
        shape_of(&self.llama)
    }

    /// The tokens of `prompt` inside the model's template.
    ///
    /// # Errors
    /// The template can't be applied.
    pub fn prompt_tokens(&self, prompt: &str) -> Result<Vec<LlamaToken>, EngineError> {
        self.template.tokens(&self.llama, prompt)
    }

    /// The tokens of `prompt` after a system prompt: see [`PromptTemplate::tokens_under`].
    ///
    /// # Errors
    /// The template can't be applied.
    pub fn prompt_tokens_under(&self, system: Option<&str>, prompt: &str) -> Result<Vec<LlamaToken>, EngineError> {
        self.template.tokens_under(&self.llama, system, prompt)
    }
}

/// Parameters of every context that this room makes: llama.cpp's own but for the threads, one for each core that this process may use.
/// (Its default is 4; on fewer cores these wait for each other.)
pub(super) fn context_params(n_ctx: u32, n_batch: u32) -> LlamaContextParams {
    let threads = std::thread::available_parallelism().map_or(4, |cores| cores.get() as i32);
    LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(n_ctx))
        .with_n_batch(n_batch)
        .with_n_ubatch(n_batch.min(512))
        .with_n_threads(threads)
        .with_n_threads_batch(threads)
}

pub(super) fn shape_of(model: &LlamaModel) -> ModelShape {
    ModelShape { n_embd: HiddenSize(model.n_embd() as usize), n_layer: model.n_layer() }
}
