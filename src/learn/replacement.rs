use super::map::pair_rows;
use super::{LearnError, Progress};
use crate::engine::{ActivationReader, Activations, Model, Prompt, ReplacedReader};
use crate::mapping::{ReplacementQuality, ResidualMap};
use crate::tensor::{LayerIndex, LayerStack, Residual, TokenPosition, kl_divergence};
use std::collections::BTreeSet;

/// Tokens of the target's that a document has at most: with a vocabulary of 262,144 the logits of as many take 128 MiB.
const TARGET_TOKENS: usize = 128;

/// Longest document of the source's, in tokens with its template.
const SOURCE_TOKENS: usize = 1024;

/// How much of the target's output each of `maps` keeps when it takes the place of the target's own residual at its layer (arXiv 2503.04429, App. C),
/// in the order of `maps`. `documents` are such as no map was made from.
///
/// Residuals of tokens without a partner in the source keep what they are, and so does the first, an attention sink; a
/// [quality](ReplacementQuality) says how many were replaced. A document is cut after 128 tokens of the target's.
///
/// # Errors
/// A document that a model can't run, a source layer that is the model's last, or no two tokens that pair.
pub fn replacement(
    source: &Model,
    target: &Model,
    maps: &[&ResidualMap],
    documents: &[Prompt],
    progress: Progress<'_>,
) -> Result<Vec<ReplacementQuality>, LearnError> {
    let stacks: Vec<LayerStack> = maps.iter().map(|map| map.source_layer()).collect();
    let layers: BTreeSet<LayerIndex> = stacks.iter().flat_map(LayerStack::layers).copied().collect();
    let mut source_reader = ActivationReader::of(source, layers.into_iter().collect(), SOURCE_TOKENS)?;
    let mut target_reader = ReplacedReader::of(target, TARGET_TOKENS)?;
    let mut sums = vec![Sums::default(); maps.len()];
    let (mut n_tokens, mut n_replaced) = (0, 0);
    for (index, document) in documents.iter().enumerate() {
        let source_layout = source.template().layout(source.llama(), document)?;
        let target_layout = target.template().layout(target.llama(), document)?;
        let tokens = &target_layout.tokens[..target_layout.tokens.len().min(TARGET_TOKENS)];
        let mut pairs = pair_rows(&source_layout, &target_layout);
        // Rows begin at the second token.
        pairs.retain(|(_, row)| row + 1 < tokens.len());
        let positions: Vec<_> = pairs.iter().map(|(_, row)| TokenPosition(*row as i32 + 1)).collect();
        let residuals = source_reader.every_token(&source_layout.tokens)?;

        let mut own = Vec::with_capacity(tokens.len());
        target_reader.logits(tokens, None, |_, logits| own.push(logits.to_vec()))?;
        for (map, sums) in maps.iter().zip(&mut sums) {
            let mut divergence = |rows: &[f32]| -> Result<f64, LearnError> {
                let rows = Residual::new(rows, map.target_width()).expect("rows of the map's width");
                let replaced = Some((map.target_layer(), positions.as_slice(), rows));
                let mut sum = 0.0;
                target_reader.logits(tokens, replaced, |token, logits| {
                    // The first has nothing before it that could have been replaced.
                    sum += if token == 0 { 0.0 } else { kl_divergence(&own[token], logits) };
                })?;
                Ok(sum)
            };
            sums.mapped += divergence(&mapped(map, &residuals, &pairs))?;
            sums.mean += divergence(&map.target().mean.repeat(pairs.len()))?;
        }
        n_tokens += tokens.len() - 1;
        n_replaced += pairs.len();
        progress(index + 1, documents.len());
    }
    if n_replaced == 0 {
        return Err(LearnError::NoPairs { documents: documents.len() });
    }
    let quality = |sums: Sums| ReplacementQuality {
        kl: sums.mapped / n_tokens as f64,
        kl_mean_ablation: sums.mean / n_tokens as f64,
        replaced: n_replaced as f64 / n_tokens as f64,
        n_tokens,
        n_documents: documents.len(),
    };
    Ok(sums.into_iter().map(quality).collect())
}

/// Of the divergences of all tokens.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    mapped: f64,
    mean: f64,
}

/// What `map` makes of the source's row of each pair, `[pairs.len(), d_t]`.
fn mapped(map: &ResidualMap, residuals: &Activations, pairs: &[(usize, usize)]) -> Vec<f32> {
    let (values, width) = residuals.stacked(&map.source_layer());
    let rows = Residual::new(&values, width).expect("whole rows");
    let of_pair = |(row, _): &(usize, usize)| {
        let x: Vec<f64> = rows.row(*row).iter().map(|x| f64::from(*x)).collect();
        map.apply(&x).into_iter().map(|y| y as f32)
    };
    pairs.iter().flat_map(of_pair).collect()
}
