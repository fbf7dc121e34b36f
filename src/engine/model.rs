use super::{Adapter, EngineError, Prompt, PromptTemplate, Weights, adapter, identity_of};
use crate::guard::ModelIdentity;
use crate::hook::Adapters;
use crate::program::ModelShape;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::{LogOptions, send_logs_to_tracing};
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// A loaded model, with the adapters that it carries and what a guard asks of it.
pub struct Model {
    /// Shared with the same model without its adapters.
    llama: Arc<LlamaModel>,
    backend: &'static LlamaBackend,
    /// Of `llama`, which they don't outlive.
    adapters: Adapters,
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
    /// LoRA adapters that every context of the model has.
    pub adapters: Vec<Adapter>,
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
            #[cfg(feature = "dynamic-backends")]
            load_backends();
            LlamaBackend::init().map_err(|error| error.to_string())
        })
        .as_ref()
        .map_err(|reason| EngineError::Backend(reason.clone()))
}

/// Loads ggml's backends from the folder that `PILOTFISH_BACKENDS` names, or else from where they were built.
#[cfg(feature = "dynamic-backends")]
fn load_backends() {
    match std::env::var_os("PILOTFISH_BACKENDS") {
        Some(folder) => llama_cpp_2::llama_backend::load_backends_from_path(Path::new(&folder)),
        None => llama_cpp_2::llama_backend::load_backends(),
    }
}

impl Model {
    /// Loads the GGUF at `path`, called `name` in reports and provenance.
    ///
    /// # Errors
    /// No such file, or llama.cpp can't load it or one of its adapters.
    pub fn load(path: &Path, name: &str, options: &ModelOptions) -> Result<Self, EngineError> {
        if !path.is_file() {
            return Err(EngineError::NoFile { path: path.to_owned() });
        }
        let backend = backend()?;
        let params = LlamaModelParams::default().with_n_gpu_layers(options.gpu_layers);
        let mut llama = LlamaModel::load_from_file(backend, path, &params)
            .map_err(|error| EngineError::Load { path: path.to_owned(), reason: error.to_string() })?;
        let (adapters, identities) = adapter::load(&mut llama, &options.adapters)?;
        let identity = ModelIdentity { adapters: identities, ..identity_of(name, &llama)? };
        let template = if options.raw {
            PromptTemplate::Raw
        } else {
            PromptTemplate::of(&llama, options.fallback_template.as_deref())
        };
        Ok(Self { llama: Arc::new(llama), backend, adapters, identity, template })
    }

    /// The same weights without the adapters, in the same memory.
    pub fn without_adapters(&self) -> Self {
        Self {
            llama: Arc::clone(&self.llama),
            backend: self.backend,
            adapters: Adapters::default(),
            identity: ModelIdentity { adapters: Vec::new(), ..self.identity.clone() },
            template: self.template.clone(),
        }
    }

    /// What contexts of this model are made from.
    pub fn weights(&self) -> Weights<'_> {
        Weights::with_adapters(&self.llama, self.backend, &self.adapters)
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
        self.weights().shape()
    }

    /// The tokens of a user's words `prompt` inside the model's template.
    ///
    /// # Errors
    /// The template can't be applied.
    pub fn prompt_tokens(&self, prompt: &str) -> Result<Vec<LlamaToken>, EngineError> {
        self.template.tokens(&self.llama, prompt)
    }

    /// The tokens of what a model says or is to say after a prompt: plain text, with nothing that begins or ends it.
    pub fn text_tokens(&self, text: &str) -> Vec<LlamaToken> {
        self.llama().vocab().tokenize(text.as_bytes(), false, false)
    }

    /// The tokens of an answer to `prompt` that somebody else has written: see [`PromptTemplate::answer_tokens`].
    ///
    /// # Errors
    /// The template can't be applied.
    pub fn answer_tokens(&self, prompt: &str, answer: &str) -> Result<Vec<LlamaToken>, EngineError> {
        self.template.answer_tokens(&self.llama, prompt, answer)
    }

    /// All that the model reads of `prompt`, after a system prompt if there is one ([`PromptTemplate::tokens_under`]), up to where it goes on.
    ///
    /// # Errors
    /// The template can't be applied.
    pub fn tokens_read(&self, system: Option<&str>, prompt: &Prompt) -> Result<Vec<LlamaToken>, EngineError> {
        let mut tokens = self.template.tokens_under(&self.llama, system, &prompt.text)?;
        tokens.extend(self.template.answer_tokens(&self.llama, &prompt.text, &prompt.prefill)?);
        Ok(tokens)
    }
}

impl Model {
    /// Whether `prompt` is one: some tokens, and all of this model.
    ///
    /// # Errors
    /// It has none, or one that the model has not.
    pub fn check_tokens(&self, prompt: &[LlamaToken]) -> Result<(), EngineError> {
        if prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        let n_vocab = self.llama.n_vocab();
        match prompt.iter().find(|token| !(0..n_vocab).contains(&token.0)) {
            Some(token) => Err(EngineError::NoToken { token: token.0, n_vocab }),
            None => Ok(()),
        }
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

/// Parameters of a context that is used beside others of this process, on the CPU with one thread: a second team of threads, idle as it may be, has OpenMP's
/// (libgomp's) threads no longer wait actively for each other where both teams together are more than there are cores, and every context is slower for it
/// (two cores, 8 sequences of SmolLM2: by a quarter).
pub(super) fn beside(params: LlamaContextParams) -> LlamaContextParams {
    params.with_n_threads(1).with_n_threads_batch(1)
}
