use super::EngineError;
use crate::guard::{Fingerprint, ModelIdentity};
use llama_cpp_2::model::LlamaModel;

/// How llama.cpp calls the file types of `general.file_type` (`enum llama_ftype`), by their numbers.
const FILE_TYPES: [(u32, &str); 33] = [
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (7, "Q8_0"),
    (8, "Q5_0"),
    (9, "Q5_1"),
    (10, "Q2_K"),
    (11, "Q3_K_S"),
    (12, "Q3_K_M"),
    (13, "Q3_K_L"),
    (14, "Q4_K_S"),
    (15, "Q4_K_M"),
    (16, "Q5_K_S"),
    (17, "Q5_K_M"),
    (18, "Q6_K"),
    (19, "IQ2_XXS"),
    (20, "IQ2_XS"),
    (21, "Q2_K_S"),
    (22, "IQ3_XS"),
    (23, "IQ3_XXS"),
    (24, "IQ1_S"),
    (25, "IQ4_NL"),
    (26, "IQ3_S"),
    (27, "IQ3_M"),
    (28, "IQ2_S"),
    (29, "IQ2_M"),
    (30, "IQ4_XS"),
    (31, "IQ1_M"),
    (32, "BF16"),
    (36, "TQ1_0"),
    (37, "TQ2_0"),
    (38, "MXFP4_MOE"),
];

/// What a gate's figures of this file go by: the quantization that the GGUF names, or where it names none the bytes of its tensors, which differ
/// between the quantizations of a model too.
pub fn quantization_of(model: &LlamaModel) -> String {
    let number = model.meta_val_str("general.file_type").ok().and_then(|number| number.parse::<u32>().ok());
    match number {
        Some(number) => FILE_TYPES
            .iter()
            .find(|(known, _)| *known == number)
            .map_or_else(|| format!("file-type-{number}"), |(_, name)| (*name).to_owned()),
        None => format!("{}-bytes", model.size()),
    }
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
