use super::EngineError;
use crate::guard::{Fingerprint, ModelIdentity, quantization_name};
use llama_cpp_2::model::LlamaModel;

/// [`quantization_name`] of a model.
pub fn quantization_of(model: &LlamaModel) -> String {
    quantization_name(model.meta_val_str("general.file_type").ok().as_deref(), model.size())
}

/// What `model` is, whatever its quantization: architecture, shape and the fingerprint over them and the vocabulary. Of adapters it knows nothing.
///
/// # Errors
/// The GGUF does not say its architecture.
pub fn identity_of(name: &str, model: &LlamaModel) -> Result<ModelIdentity, EngineError> {
    let architecture = model
        .meta_val_str("general.architecture")
        .map_err(|_| EngineError::Metadata { key: "general.architecture" })?;
    let vocab = model.vocab();
    // The cast: C enums are signed on Windows.
    #[allow(clippy::unnecessary_cast)]
    let tokens: Vec<(&[u8], u32)> = vocab
        .tokens()
        .map(|token| (vocab.text(token).map_or(&b""[..], |text| text.to_bytes()), vocab.attr(token).bits() as u32))
        .collect();
    let fingerprint = Fingerprint::compute(&architecture, model.n_embd() as u32, model.n_layer(), tokens.into_iter());
    Ok(ModelIdentity { name: name.to_owned(), architecture, fingerprint, adapters: Vec::new() })
}
