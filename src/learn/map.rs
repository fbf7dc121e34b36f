use super::survey::{RankBy, Survey, SurveyedPair};
use super::{LearnError, Progress, threads};
use crate::engine::{ActivationReader, Activations, Model, Prompt, PromptLayout};
use crate::mapping::{AffineMap, MappingQuality, Regression, RidgeOptions, Side, align_tokens};
use crate::tensor::{LayerIndex, LayerStack, Residual};
use std::collections::{BTreeMap, BTreeSet};

/// What to map.
#[derive(Debug, Clone)]
pub struct MapOptions {
    /// Source layers, one or several stacked, and target layers to survey.
    pub layers: Vec<(LayerStack, LayerIndex)>,
    /// How many target layers to fit a source layer, the best ones.
    pub keep: usize,
    /// What is best.
    pub rank_by: RankBy,
    pub ridge: RidgeOptions,
    /// Of the maps that are kept; full where `None`.
    pub rank: Option<usize>,
    pub rows: MapRows,
}

/// What the models' rows are that a map is fitted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MapRows {
    /// Tokens that end at the same byte: of a map for whatever is read or patched token by token.
    #[default]
    Tokens,
    /// The mean over each document's tokens but the first: of a map for what is read by the mean over a prompt. A regression on tokens spends
    /// itself on what tells tokens apart, most of which a mean does not hold.
    Means,
}

/// Fitted maps, and what the survey found.
#[derive(Debug, Clone)]
pub struct Mapped {
    /// Maps fitted on all documents, best first.
    pub maps: Vec<(AffineMap, MappingQuality)>,
    pub survey: Survey,
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
    documents: &[Prompt],
    options: &MapOptions,
    progress: Progress<'_>,
) -> Result<Mapped, LearnError> {
    let paired = read_pairs(source, target, documents, &options.layers, options.rows, progress)?;
    let n_tokens = paired.documents.len();
    let mut groups = BTreeMap::<LayerStack, Vec<LayerIndex>>::new();
    for (source_layer, target_layer) in &options.layers {
        groups.entry(source_layer.clone()).or_default().push(*target_layer);
    }
    let groups: Vec<_> = groups.into_iter().collect();
    let sides = Sides::new(paired, &options.layers, &options.ridge, progress)?;
    // One source layer's Gram matrix serves all its target layers, so a thread takes a source layer at a time.
    let fitted = threads::each(&groups, progress, |(source_layer, target_layers)| {
        sides.fit_group(source_layer, target_layers, options)
    })?;
    let (mut maps, mut pairs) = (Vec::new(), Vec::with_capacity(options.layers.len()));
    for group in fitted {
        maps.extend(group.maps);
        pairs.extend(group.survey);
    }
    maps.sort_by(|(_, _, a), (_, _, b)| a.total_cmp(b));
    pairs.sort_by(|a, b| (&a.source_layer, a.target_layer).cmp(&(&b.source_layer, b.target_layer)));
    let survey = Survey {
        source: source.identity().name.clone(),
        target: target.identity().name.clone(),
        n_tokens,
        n_documents: documents.len(),
        pairs,
    };
    Ok(Mapped { maps: maps.into_iter().map(|(map, quality, _)| (map, quality)).collect(), survey })
}

/// What was fitted from one source layer.
struct FittedGroup {
    /// With their cost.
    maps: Vec<(AffineMap, MappingQuality, f64)>,
    survey: Vec<SurveyedPair>,
}

/// Both models' layers, ready to be paired.
struct Sides {
    regression: Regression,
    source: BTreeMap<LayerStack, Side>,
    target: BTreeMap<LayerIndex, Side>,
}

impl Sides {
    /// A model's activations are let go once its sides are made, which hold as much again.
    fn new(
        paired: Paired,
        layers: &[(LayerStack, LayerIndex)],
        options: &RidgeOptions,
        progress: Progress<'_>,
    ) -> Result<Self, LearnError> {
        let (source_layer, target_layer) = layers.first().cloned().ok_or(LearnError::NoLayers)?;
        let problem = |source_layer: &LayerStack, target_layer| {
            let source_layer = source_layer.clone();
            move |source| LearnError::Mapping { source_layer, target_layer, source }
        };
        let regression = Regression::new(&paired.documents, options).map_err(problem(&source_layer, target_layer))?;
        let targets: Vec<_> = layers.iter().map(|pair| pair.1).collect::<BTreeSet<_>>().into_iter().collect();
        let made = threads::each(&targets, progress, |layer| {
            let side =
                regression.side(paired.target.layer(*layer), "target", 1).map_err(problem(&source_layer, *layer))?;
            side.prepare(&regression, 1);
            Ok(side)
        })?;
        let target = targets.into_iter().zip(made).collect();
        drop(paired.target);
        let sources: Vec<_> = layers.iter().map(|pair| pair.0.clone()).collect::<BTreeSet<_>>().into_iter().collect();
        let made = threads::each(&sources, progress, |stack| {
            let (values, width) = paired.source.stacked(stack);
            let rows = Residual::new(&values, width).expect("whole rows");
            let side = regression.side(rows, "source", 1).map_err(problem(stack, target_layer))?;
            side.prepare(&regression, 1);
            Ok(side)
        })?;
        Ok(Self { source: sources.into_iter().zip(made).collect(), target, regression })
    }

    fn fit_group(
        &self,
        source_layer: &LayerStack,
        target_layers: &[LayerIndex],
        options: &MapOptions,
    ) -> Result<FittedGroup, LearnError> {
        let mut found = Vec::with_capacity(target_layers.len());
        for target_layer in target_layers {
            let problem = |source| LearnError::Mapping {
                source_layer: source_layer.clone(),
                target_layer: *target_layer,
                source,
            };
            let pair = self.regression.pair(&self.source[source_layer], &self.target[target_layer], 1);
            let quality = pair.quality().map_err(problem)?;
            let similarity = pair.similarity().map_err(problem)?;
            let surveyed = SurveyedPair {
                source_layer: source_layer.clone(),
                target_layer: *target_layer,
                lambda: quality.lambda,
                fraction_unexplained: quality.fraction_unexplained,
                cross_validated: pair.cross_validated(quality.lambda).map_err(problem)?,
                cosine: quality.cosine,
                cca: similarity.cca,
                cka: similarity.cka,
                backward_unexplained: None,
            };
            found.push((pair, quality, surveyed));
        }
        found.sort_by(|(.., a), (.., b)| options.rank_by.cost(a).total_cmp(&options.rank_by.cost(b)));
        let mut maps = Vec::new();
        for (pair, quality, surveyed) in found.iter_mut().take(options.keep) {
            let problem = |source| LearnError::Mapping {
                source_layer: source_layer.clone(),
                target_layer: surveyed.target_layer,
                source,
            };
            let (lambda, target_layer) = (quality.lambda, surveyed.target_layer);
            let fitted = match options.rank {
                None => pair.refit(lambda, source_layer.clone(), target_layer).and_then(|map| {
                    let (map, backward) = pair.fit_backward(map)?;
                    Ok((map, *quality, backward))
                }),
                Some(rank) => pair.refit_low_rank(lambda, rank, source_layer.clone(), target_layer).and_then(|map| {
                    let (map, backward) = pair.fit_low_rank_backward(map, rank)?;
                    Ok((map, pair.low_rank_quality(rank)?, backward))
                }),
            };
            let (map, quality, backward) = fitted.map_err(problem)?;
            surveyed.backward_unexplained = Some(backward.fraction_unexplained);
            let quality = MappingQuality { backward: Some(backward), ..quality };
            maps.push((map, quality, options.rank_by.cost(surveyed)));
        }
        Ok(FittedGroup { maps, survey: found.into_iter().map(|(_, _, surveyed)| surveyed).collect() })
    }
}

pub(super) fn read_pairs(
    source: &Model,
    target: &Model,
    documents: &[Prompt],
    layers: &[(LayerStack, LayerIndex)],
    rows: MapRows,
    progress: Progress<'_>,
) -> Result<Paired, LearnError> {
    let sources: BTreeSet<LayerIndex> = layers.iter().flat_map(|pair| pair.0.layers()).copied().collect();
    let targets: BTreeSet<LayerIndex> = layers.iter().map(|pair| pair.1).collect();
    let mut source_reader = ActivationReader::of(source, sources.into_iter().collect(), CAPACITY)?;
    let mut target_reader = ActivationReader::of(target, targets.into_iter().collect(), CAPACITY)?;
    let mut paired = Paired { source: Activations::default(), target: Activations::default(), documents: Vec::new() };
    for (index, document) in documents.iter().enumerate() {
        let source_layout = source.template().layout(source.llama(), document)?;
        let target_layout = target.template().layout(target.llama(), document)?;
        let source_rows = source_reader.every_token(&source_layout.tokens)?;
        let target_rows = target_reader.every_token(&target_layout.tokens)?;
        match rows {
            MapRows::Tokens => {
                let pairs = pair_rows(&source_layout, &target_layout);
                paired.source.append(source_rows.select(pairs.iter().map(|pair| pair.0)));
                paired.target.append(target_rows.select(pairs.iter().map(|pair| pair.1)));
                paired.documents.extend(pairs.iter().map(|_| index as u32));
            }
            MapRows::Means => {
                // A document of which one model reads nothing but its first token has no pair.
                if let (Some(source), Some(target)) = (source_rows.mean(), target_rows.mean()) {
                    paired.source.append(source);
                    paired.target.append(target);
                    paired.documents.push(index as u32);
                }
            }
        }
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
    // The last tokens before the answers, where the templates go on after the user's words.
    let before = |layout: &PromptLayout| {
        let last = layout.answer.checked_sub(1).filter(|last| layout.ends[*last].is_none())?;
        last.checked_sub(1)
    };
    rows.extend(before(source).zip(before(target)));
    rows
}

impl MapOptions {
    /// The pairs to survey where the user names none: source layers of the later half, where a prompt's meaning is, and the middle third
    /// of target layers, so that what is found there can still be acted on. The last layers are left out: there llama.cpp keeps only
    /// rows with logits.
    pub fn candidates(source_layers: u32, target_layers: u32) -> Vec<(LayerStack, LayerIndex)> {
        let targets = target_layers / 3..=(2 * target_layers / 3).min(target_layers.saturating_sub(2));
        (source_layers / 2..source_layers.saturating_sub(1))
            .flat_map(|source| targets.clone().map(move |target| (LayerIndex(source).into(), LayerIndex(target))))
            .collect()
    }

    /// All pairs of layers but the last ones.
    pub fn all(source_layers: u32, target_layers: u32) -> Vec<(LayerStack, LayerIndex)> {
        let targets = 0..target_layers.saturating_sub(1);
        (0..source_layers.saturating_sub(1))
            .flat_map(|source| targets.clone().map(move |target| (LayerIndex(source).into(), LayerIndex(target))))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_cpp_2::token::LlamaToken;

    fn layout(answer: usize, ends: &[Option<usize>]) -> PromptLayout {
        PromptLayout { tokens: vec![LlamaToken(0); ends.len()], ends: ends.to_vec(), answer }
    }

    /// Rows are numbered from the second token on.
    #[test]
    fn tokens_pair_by_where_they_end_and_so_do_the_last_ones_before_answers() {
        let plain = layout(5, &[None, Some(3), Some(5), Some(8), None]);
        let split = layout(6, &[None, Some(2), Some(3), Some(8), None, None]);
        assert_eq!(pair_rows(&plain, &split), [(0, 1), (2, 2), (3, 4)]);
        // An answer that has begun goes on counting where the prompt ended.
        let begun = layout(3, &[None, Some(3), None, Some(9), Some(12)]);
        let other = layout(4, &[None, Some(3), None, None, Some(8), Some(12)]);
        assert_eq!(pair_rows(&begun, &other), [(0, 0), (3, 4), (1, 2)]);
        // Without a template nothing stands between them, and an answer alone is no prompt.
        let raw = layout(2, &[None, Some(3), Some(9)]);
        assert_eq!(pair_rows(&begun, &raw), [(0, 0), (2, 1)]);
        assert_eq!(pair_rows(&layout(1, &[None]), &layout(1, &[None])), []);
    }
}
