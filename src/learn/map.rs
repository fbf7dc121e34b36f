use super::{LearnError, Progress};
use crate::engine::{ActivationReader, Activations, Model, PromptLayout};
use crate::mapping::{AffineMap, MappingQuality, RidgeOptions, SourceFit, align_tokens};
use crate::tensor::LayerIndex;
use std::collections::{BTreeMap, BTreeSet};

/// What to map.
#[derive(Debug, Clone)]
pub struct MapOptions {
    /// Source and target layers to survey.
    pub layers: Vec<(LayerIndex, LayerIndex)>,
    /// How many of them, the best by held-out variance explained, to fit.
    pub keep: usize,
    pub ridge: RidgeOptions,
}

/// Fitted maps, and what the survey found.
#[derive(Debug, Clone)]
pub struct Mapped {
    /// Maps fitted on all documents, best first.
    pub maps: Vec<(AffineMap, MappingQuality)>,
    /// Every surveyed pair of layers with its held-out quality, in the order asked for.
    pub survey: Vec<(LayerIndex, LayerIndex, MappingQuality)>,
    /// Paired tokens and documents that they come from.
    pub n_tokens: usize,
    pub n_documents: usize,
}

/// Residuals of both models on the same tokens of the same documents.
struct Paired {
    source: Activations,
    target: Activations,
    documents: Vec<u32>,
}

/// Longest document, in tokens with its template.
const CAPACITY: usize = 1024;

/// Maps the residual space of `source` to that of `target` on `documents`.
///
/// Each model reads a document as a prompt in its own template. Tokens are paired where they end at the same byte of the document, and
/// so are the last tokens of the two templates: that is where prompts are scored and answers begin. The first position is left out,
/// as the attention sink that it is.
///
/// # Errors
/// Too little text, or a model that can't run it.
pub fn map(
    source: &Model,
    target: &Model,
    documents: &[String],
    options: &MapOptions,
    progress: Progress<'_>,
) -> Result<Mapped, LearnError> {
    let paired = read_pairs(source, target, documents, options, progress)?;
    let problem = |source_layer: LayerIndex, target_layer: LayerIndex| {
        move |source| LearnError::Mapping { source_layer, target_layer, source }
    };
    let mut fits = BTreeMap::new();
    let mut survey = Vec::with_capacity(options.layers.len());
    for (source_layer, target_layer) in &options.layers {
        let problem = problem(*source_layer, *target_layer);
        let fit = match fits.entry(*source_layer) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => entry.insert(
                SourceFit::new(paired.source.layer(*source_layer), &paired.documents, &options.ridge)
                    .map_err(problem)?,
            ),
        };
        let quality = fit.quality(paired.target.layer(*target_layer)).map_err(problem)?;
        survey.push((*source_layer, *target_layer, quality));
        progress(survey.len(), options.layers.len());
    }
    let mut ranked = survey.clone();
    ranked.sort_by(|a, b| a.2.fraction_unexplained.total_cmp(&b.2.fraction_unexplained));
    let maps = ranked
        .iter()
        .take(options.keep)
        .map(|(source_layer, target_layer, _)| {
            fits[source_layer]
                .fit(paired.target.layer(*target_layer), *source_layer, *target_layer)
                .map_err(problem(*source_layer, *target_layer))
        })
        .collect::<Result<_, _>>()?;
    Ok(Mapped { maps, survey, n_tokens: paired.documents.len(), n_documents: documents.len() })
}

fn read_pairs(
    source: &Model,
    target: &Model,
    documents: &[String],
    options: &MapOptions,
    progress: Progress<'_>,
) -> Result<Paired, LearnError> {
    let layers = |of: fn(&(LayerIndex, LayerIndex)) -> LayerIndex| -> Vec<LayerIndex> {
        options.layers.iter().map(of).collect::<BTreeSet<_>>().into_iter().collect()
    };
    let mut source_reader = ActivationReader::of(source, layers(|pair| pair.0), CAPACITY)?;
    let mut target_reader = ActivationReader::of(target, layers(|pair| pair.1), CAPACITY)?;
    let mut paired =
        Paired { source: Activations::default(), target: Activations::default(), documents: Vec::new() };
    for (index, document) in documents.iter().enumerate() {
        let source_layout = source.template().layout(source.llama(), document)?;
        let target_layout = target.template().layout(target.llama(), document)?;
        let rows = pair_rows(&source_layout, &target_layout);
        let source_rows = source_reader.every_token(&source_layout.tokens)?;
        let target_rows = target_reader.every_token(&target_layout.tokens)?;
        paired.source.append(source_rows.select(rows.iter().map(|pair| pair.0)));
        paired.target.append(target_rows.select(rows.iter().map(|pair| pair.1)));
        paired.documents.extend(rows.iter().map(|_| index as u32));
        progress(index + 1, documents.len());
    }
    if paired.documents.is_empty() {
        return Err(LearnError::NoPairs { documents: documents.len() });
    }
    Ok(paired)
}

/// Which rows of the two models' activations belong together. Rows start at the second token, since the first is left out.
fn pair_rows(source: &PromptLayout, target: &PromptLayout) -> Vec<(usize, usize)> {
    let inside = |layout: &PromptLayout| -> (Vec<usize>, Vec<usize>) {
        let tokens = layout.ends.iter().enumerate().skip(1);
        tokens.filter_map(|(token, end)| Some((token - 1, (*end)?))).unzip()
    };
    let (source_rows, source_ends) = inside(source);
    let (target_rows, target_ends) = inside(target);
    let mut rows: Vec<(usize, usize)> = align_tokens(&source_ends, &target_ends)
        .into_iter()
        .map(|(source, target)| (source_rows[source], target_rows[target]))
        .collect();
    // The last tokens, where the templates go on after the document.
    if let ([.., None], [.., None]) = (source.ends.as_slice(), target.ends.as_slice())
        && source.ends.len() > 1
        && target.ends.len() > 1
    {
        rows.push((source.ends.len() - 2, target.ends.len() - 2));
    }
    rows
}

/// The layers that [`map`] is asked to survey when the user names none: from a third of the depth to the last but one on both sides.
/// Early layers hold little of what a prompt means, and at the last one llama.cpp keeps only rows with logits.
pub fn candidate_layers(n_layer: u32) -> impl Iterator<Item = LayerIndex> + Clone {
    (n_layer / 3..n_layer.saturating_sub(1)).map(LayerIndex)
}

impl MapOptions {
    /// Every pair of [`candidate_layers`] of two models of this depth.
    pub fn survey_all(source_layers: u32, target_layers: u32) -> Vec<(LayerIndex, LayerIndex)> {
        candidate_layers(source_layers)
            .flat_map(|source| candidate_layers(target_layers).map(move |target| (source, target)))
            .collect()
    }
}
