use super::{LearnError, Progress, threads};
use crate::engine::{ActivationReader, Activations, Model, PromptLayout};
use crate::mapping::{AffineMap, MappingQuality, RidgeOptions, SourceFit, align_tokens};
use crate::tensor::LayerIndex;
use std::collections::{BTreeMap, BTreeSet};

/// What to map.
#[derive(Debug, Clone)]
pub struct MapOptions {
    /// Source and target layers to survey.
    pub layers: Vec<(LayerIndex, LayerIndex)>,
    /// How many target layers to fit a source layer, the best by held-out variance explained.
    pub keep: usize,
    pub ridge: RidgeOptions,
}

/// Fitted maps, and what the survey found.
#[derive(Debug, Clone)]
pub struct Mapped {
    /// Maps fitted on all documents, best first.
    pub maps: Vec<(AffineMap, MappingQuality)>,
    /// Every surveyed pair of layers with its held-out quality, in the order of the layers.
    pub survey: Vec<(LayerIndex, LayerIndex, MappingQuality)>,
    /// Paired tokens and documents that they come from.
    pub n_tokens: usize,
    pub n_documents: usize,
}

/// Residuals of both models on the same tokens of the same documents.
pub(super) struct Paired {
    pub source: Activations,
    pub target: Activations,
    /// Which document each row is from.
    pub documents: Vec<u32>,
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
    let paired = read_pairs(source, target, documents, &options.layers, progress)?;
    let mut groups = BTreeMap::<LayerIndex, Vec<LayerIndex>>::new();
    for (source_layer, target_layer) in &options.layers {
        groups.entry(*source_layer).or_default().push(*target_layer);
    }
    let groups: Vec<_> = groups.into_iter().collect();
    // One source layer's Gram matrix serves all its target layers, so a thread takes a source layer at a time.
    let fitted = threads::each(&groups, progress, |(source_layer, target_layers)| {
        paired.fit_group(*source_layer, target_layers, options)
    })?;

    let (mut maps, mut survey) = (Vec::new(), Vec::with_capacity(options.layers.len()));
    for group in fitted {
        maps.extend(group.maps);
        survey.extend(group.survey);
    }
    let mut maps = paired.fit_backward(maps, options, progress)?;
    survey.sort_by_key(|(source_layer, target_layer, _)| (*source_layer, *target_layer));
    let unexplained = |(_, quality): &(AffineMap, MappingQuality)| quality.fraction_unexplained;
    maps.sort_by(|a, b| {
        unexplained(a)
            .total_cmp(&unexplained(b))
            .then((a.0.source_layer(), a.0.target_layer()).cmp(&(b.0.source_layer(), b.0.target_layer())))
    });
    Ok(Mapped { maps, survey, n_tokens: paired.documents.len(), n_documents: documents.len() })
}

/// What was fitted from one source layer.
struct FittedGroup {
    maps: Vec<(AffineMap, MappingQuality)>,
    survey: Vec<(LayerIndex, LayerIndex, MappingQuality)>,
}

impl Paired {
    fn fit_group(
        &self,
        source_layer: LayerIndex,
        target_layers: &[LayerIndex],
        options: &MapOptions,
    ) -> Result<FittedGroup, LearnError> {
        let problem = |target_layer| move |source| LearnError::Mapping { source_layer, target_layer, source };
        let fit = SourceFit::new(self.source.layer(source_layer), &self.documents, &options.ridge)
            .map_err(problem(target_layers[0]))?;
        let mut survey = Vec::with_capacity(target_layers.len());
        for target_layer in target_layers {
            let quality = fit.quality(self.target.layer(*target_layer)).map_err(problem(*target_layer))?;
            survey.push((source_layer, *target_layer, quality));
        }
        let mut ranked: Vec<_> = survey.iter().collect();
        ranked.sort_by(|a, b| a.2.fraction_unexplained.total_cmp(&b.2.fraction_unexplained));
        let maps = ranked
            .into_iter()
            .take(options.keep)
            .map(|(_, target_layer, _)| {
                fit.fit(self.target.layer(*target_layer), source_layer, *target_layer).map_err(problem(*target_layer))
            })
            .collect::<Result<_, _>>()?;
        Ok(FittedGroup { maps, survey })
    }

    /// `maps` with what the target's residuals say of the source's.
    fn fit_backward(
        &self,
        maps: Vec<(AffineMap, MappingQuality)>,
        options: &MapOptions,
        progress: Progress<'_>,
    ) -> Result<Vec<(AffineMap, MappingQuality)>, LearnError> {
        let mut groups = BTreeMap::<LayerIndex, Vec<(AffineMap, MappingQuality)>>::new();
        for pair in maps {
            groups.entry(pair.0.target_layer()).or_default().push(pair);
        }
        let groups: Vec<_> = groups.into_iter().collect();
        let fitted = threads::each(&groups, progress, |(target_layer, maps)| {
            let problem = |map: &AffineMap| {
                let (source_layer, target_layer) = (map.source_layer(), map.target_layer());
                move |source| LearnError::Mapping { source_layer, target_layer, source }
            };
            let target = self.target.layer(*target_layer);
            let fit = SourceFit::new(target, &self.documents, &options.ridge).map_err(problem(&maps[0].0))?;
            maps.iter()
                .map(|(map, quality)| {
                    let source = self.source.layer(map.source_layer());
                    let (map, backward) = fit.fit_backward(map.clone(), source).map_err(problem(map))?;
                    Ok((map, MappingQuality { backward: Some(backward), ..*quality }))
                })
                .collect::<Result<Vec<_>, LearnError>>()
        })?;
        Ok(fitted.into_iter().flatten().collect())
    }
}

pub(super) fn read_pairs(
    source: &Model,
    target: &Model,
    documents: &[String],
    layers: &[(LayerIndex, LayerIndex)],
    progress: Progress<'_>,
) -> Result<Paired, LearnError> {
    let side = |of: fn(&(LayerIndex, LayerIndex)) -> LayerIndex| -> Vec<LayerIndex> {
        layers.iter().map(of).collect::<BTreeSet<_>>().into_iter().collect()
    };
    let mut source_reader = ActivationReader::of(source, side(|pair| pair.0), CAPACITY)?;
    let mut target_reader = ActivationReader::of(target, side(|pair| pair.1), CAPACITY)?;
    let mut paired = Paired { source: Activations::default(), target: Activations::default(), documents: Vec::new() };
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
pub(super) fn pair_rows(source: &PromptLayout, target: &PromptLayout) -> Vec<(usize, usize)> {
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

impl MapOptions {
    /// The pairs to survey where the user names none: source layers of the later half, where a prompt's meaning is, and the middle third
    /// of target layers, so that what is found there can still be acted on. The last layers are left out: there llama.cpp keeps only
    /// rows with logits.
    pub fn survey_all(source_layers: u32, target_layers: u32) -> Vec<(LayerIndex, LayerIndex)> {
        let targets = target_layers / 3..=(2 * target_layers / 3).min(target_layers.saturating_sub(2));
        (source_layers / 2..source_layers.saturating_sub(1))
            .flat_map(|source| targets.clone().map(move |target| (LayerIndex(source), LayerIndex(target))))
            .collect()
    }
}
