use super::{LearnError, Progress};
use crate::engine::{ActivationReader, Activations, Model, Prompt, tokens_spelling};
use crate::steering::PromptTokens;
use crate::tensor::LayerIndex;
use std::collections::BTreeSet;

/// The longest prompt, in tokens with its template.
const CAPACITY: usize = 2048;

/// Activations at `layers` of every prompt, one row a prompt, all layers in one pass: of the token that `tokens` says, or the mean of those.
/// Never of the first.
///
/// # Errors
/// A prompt that the model can't run, or that has no such token; and, for any but the last token, the model's last layer.
pub fn prompt_activations(
    model: &Model,
    layers: &[LayerIndex],
    prompts: &[Prompt],
    tokens: &PromptTokens,
    progress: Progress<'_>,
) -> Result<Activations, LearnError> {
    let mut reader = ActivationReader::of(model, layers.to_vec(), CAPACITY)?;
    let mut all = Activations::default();
    for (index, prompt) in prompts.iter().enumerate() {
        let ids = model.tokens_read(None, prompt)?;
        if *tokens == PromptTokens::Last {
            all.append(reader.last_token(&ids)?);
        } else {
            let wanted = rows_of(model, &ids, tokens);
            let missing = || LearnError::NoSuchToken { tokens: tokens.clone(), index };
            // Before it is run: nothing is, where one prompt of many is wrong.
            if wanted.is_empty() {
                return Err(missing());
            }
            all.append(reader.every_token(&ids)?.select(wanted.into_iter()).mean().ok_or_else(missing)?);
        }
        progress(index + 1, prompts.len());
    }
    Ok(all)
}

/// Which rows of all tokens but the first `tokens` means.
pub(super) fn rows_of(model: &Model, ids: &[llama_cpp_2::token::LlamaToken], tokens: &PromptTokens) -> Vec<usize> {
    // Row 0 is the second token.
    let n_rows = ids.len().saturating_sub(1);
    match tokens {
        PromptTokens::Last => n_rows.checked_sub(1).into_iter().collect(),
        PromptTokens::Mean => (0..n_rows).collect(),
        PromptTokens::FromEnd(n) => n_rows.checked_sub(*n as usize).into_iter().collect(),
        PromptTokens::Matching(texts) => {
            let spelling = texts.iter().flat_map(|text| tokens_spelling(model.llama(), ids, text));
            let rows: BTreeSet<usize> = spelling.filter_map(|token| token.checked_sub(1)).collect();
            rows.into_iter().collect()
        }
        // The row of the token behind the last one is that one's index.
        PromptTokens::After(text) => {
            tokens_spelling(model.llama(), ids, text).last().map_or_else(Vec::new, |last| (*last..n_rows).collect())
        }
    }
}
