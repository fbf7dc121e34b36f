use super::autoencoder::{AutoencoderOptions, AutoencoderTrainer, PairedRows};
use super::{LearnError, Progress};
use crate::engine::scheduler::{End, Event, Request, RequestId, SchedulerOptions};
use crate::engine::{ActivationReader, Activations, EngineError, Model, Prompt, Scheduler};
use crate::mapping::{
    AffineMap, Autoencoder, AutoencoderQuality, Folds, MapQuality, MappingQuality, Regression, ResidualMap,
    RidgeOptions, Standardization,
};
use crate::program::Program;
use crate::tensor::{LayerIndex, Residual, cosine};
use llama_cpp_2::token::LlamaToken;
use std::collections::BTreeMap;

/// How to fit the maps of a switch.
#[derive(Debug, Clone)]
pub struct SwitchOptions {
    /// One map each, in this order.
    pub layers: Vec<LayerIndex>,
    pub kind: SwitchKind,
}

/// What maps a switch follows.
#[derive(Debug, Clone)]
pub enum SwitchKind {
    /// Corrections `x + f(x)` with an affine `f` of this rank, of full rank where `None`.
    Affine { rank: Option<usize>, ridge: RidgeOptions },
    /// The paper's: autoencoders that make the whole residual anew.
    Autoencoder(AutoencoderOptions),
}

/// A prompt in the model's template and an answer to it, that both models are to read.
#[derive(Debug, Clone)]
pub struct AnsweredText {
    pub prompt: Vec<LlamaToken>,
    pub answer: Vec<LlamaToken>,
    /// Which prompt it is, before marks: texts of one are held out together.
    pub document: u32,
}

/// Answers that are written at once.
const PARALLEL: u32 = 8;

/// `model`'s own greedy answers to `prompts`, each after each of `marks` (`""` for none). Of a switch's two models it is the target that is to answer:
/// what it says is what the switched model is to say, so the text on which their residuals are to agree. The source's own answer to a prompt that
/// triggers it would teach a map what the target makes of a text that it would never write.
///
/// # Errors
/// A prompt that the model can't answer.
pub fn answered(
    model: &Model,
    prompts: &[Prompt],
    marks: &[String],
    max_tokens: usize,
    progress: Progress<'_>,
) -> Result<Vec<AnsweredText>, LearnError> {
    let mut texts = Vec::with_capacity(prompts.len() * marks.len());
    for (document, words) in (0u32..).zip(prompts) {
        for mark in marks {
            let prompt = model.tokens_read(None, &words.marked(mark))?;
            texts.push(AnsweredText { prompt, answer: Vec::new(), document });
        }
    }
    let longest = texts.iter().map(|text| text.prompt.len()).max().unwrap_or(0);
    let options = SchedulerOptions {
        n_sequences: PARALLEL,
        n_ctx: (longest + max_tokens + 1) as u32,
        queue: texts.len(),
        reuse_prefixes: false,
        ..Default::default()
    };
    let mut scheduler = Scheduler::guarded(model, &[], options)?;
    let mut index_of: BTreeMap<RequestId, usize> = BTreeMap::new();
    for (index, text) in texts.iter().enumerate() {
        let request = Request::new(text.prompt.clone(), max_tokens);
        let id = scheduler.submit(request).map_err(|source| LearnError::Prompt { index, source })?;
        index_of.insert(id, index);
    }
    let mut said = vec![String::new(); texts.len()];
    let (mut done, mut failed) = (0, None);
    while failed.is_none()
        && scheduler.step(|event| match event {
            Event::Text { request, text } => said[index_of[&request]] += &text,
            Event::Token { .. } => {}
            Event::Ended { request, summary } => {
                if let End::Failed(error) = summary.end {
                    failed = Some((index_of[&request], error));
                }
                done += 1;
                progress(done, texts.len());
            }
        })?
    {}
    if let Some((index, error)) = failed {
        return Err(LearnError::Prompt { index, source: EngineError::Context(error) });
    }
    for (text, said) in texts.iter_mut().zip(said) {
        text.answer = model.text_tokens(&said);
    }
    Ok(texts)
}

/// Maps from the residual of `source` to that of `target`, one model with and without adapters, each from a layer to the same layer: what a switch
/// at these layers follows (arXiv 2503.04429, section 4.4).
///
/// Both read `texts`, so that rows pair token by token; the first position is left out. Layers are fitted one after the other, each with the switches
/// before it at work, so that a map is fitted on what it will meet. What affine maps are fitted to is the change `y − x`: the penalty then draws a map to
/// leaving a residual as it is, and not to the mean of all. At the model's last layer rows are those that an answer is predicted from.
///
/// # Errors
/// Two models, too few texts, or one that a model can't run.
pub fn switch_maps(
    source: &Model,
    target: &Model,
    texts: &[AnsweredText],
    options: &SwitchOptions,
    progress: Progress<'_>,
) -> Result<Vec<(ResidualMap, MapQuality)>, LearnError> {
    let (from, to) = (source.identity(), target.identity());
    if from.fingerprint != to.fingerprint {
        return Err(LearnError::NotOneModel { source_model: from.name.clone(), target_model: to.name.clone() });
    }
    let mut reading = Reading { texts, done: 0, total: texts.len() * (options.layers.len() + 2), progress };
    let targets = Targets::read(target, &options.layers, &mut reading)?;
    let (mut maps, mut qualities) = (Vec::new(), Vec::new());
    for layer in &options.layers {
        let program = Program::switching(source.shape(), &maps);
        let program = program.map_err(EngineError::from)?;
        let rows = reading.run(source, program, vec![*layer])?;
        let target = targets.at(*layer).ok_or(LearnError::NoLayers)?;
        let (map, quality) = match &options.kind {
            SwitchKind::Affine { rank, ridge } => {
                let (map, quality) = fit(*layer, &rows, target, *rank, ridge)?;
                (ResidualMap::Affine(map), MapQuality::Affine(quality))
            }
            SwitchKind::Autoencoder(options) => {
                let (map, quality) = train(*layer, &rows, target, options)?;
                (ResidualMap::Autoencoder(map), MapQuality::Autoencoder(quality))
            }
        };
        maps.push(map);
        qualities.push(quality);
    }
    Ok(maps.into_iter().zip(qualities).collect())
}

/// Texts that are read time and again.
struct Reading<'a> {
    texts: &'a [AnsweredText],
    done: usize,
    total: usize,
    progress: Progress<'a>,
}

/// Rows of all texts.
struct Rows {
    activations: Activations,
    /// Which document each row is from.
    documents: Vec<u32>,
}

impl Reading<'_> {
    /// Rows of `model` under `program` at `layers`, of which the last of the model is one alone or none.
    fn run(&mut self, model: &Model, program: Program, layers: Vec<LayerIndex>) -> Result<Rows, LearnError> {
        let longest = self.texts.iter().map(|text| text.prompt.len() + text.answer.len()).max().unwrap_or(0);
        let mut reader = ActivationReader::under(model, program, layers, longest)?;
        let mut rows = Rows { activations: Activations::default(), documents: Vec::new() };
        for (index, text) in self.texts.iter().enumerate() {
            let read = reader.answered(&text.prompt, &text.answer);
            let read = read.map_err(|source| LearnError::Prompt { index, source })?;
            rows.documents.extend(std::iter::repeat_n(text.document, read.n_rows()));
            rows.activations.append(read);
            self.done += 1;
            (self.progress)(self.done, self.total);
        }
        Ok(rows)
    }
}

/// Residuals of the target, which no switch changes: of every token, and at the model's last layer of those that an answer is predicted from.
struct Targets {
    every_token: Option<Rows>,
    predicting: Option<Rows>,
    last: LayerIndex,
}

impl Targets {
    fn read(target: &Model, layers: &[LayerIndex], reading: &mut Reading<'_>) -> Result<Self, LearnError> {
        let last = LayerIndex(target.shape().n_layer.saturating_sub(1));
        let observer = || Program::observer(target.shape());
        let (late, early): (Vec<LayerIndex>, Vec<_>) = layers.iter().partition(|layer| **layer == last);
        let mut read =
            |layers: Vec<LayerIndex>| (!layers.is_empty()).then(|| reading.run(target, observer(), layers)).transpose();
        Ok(Self { every_token: read(early)?, predicting: read(late)?, last })
    }

    fn at(&self, layer: LayerIndex) -> Option<&Rows> {
        if layer == self.last { self.predicting.as_ref() } else { self.every_token.as_ref() }
    }
}

fn fit(
    layer: LayerIndex,
    source: &Rows,
    target: &Rows,
    rank: Option<usize>,
    ridge: &RidgeOptions,
) -> Result<(AffineMap, MappingQuality), LearnError> {
    let problem = |source| LearnError::Mapping { source_layer: layer.into(), target_layer: layer, source };
    let (x, y) = (source.activations.layer(layer), target.activations.layer(layer));
    let all: Vec<usize> = (0..x.n_rows()).collect();
    let folds = Folds::new(&source.documents, ridge.folds, false, ridge.seed).map_err(problem)?;
    let fit_on = |rows: &[usize]| -> Result<(AffineMap, f64), LearnError> {
        let width = x.width();
        let documents: Vec<u32> = rows.iter().map(|row| source.documents[*row]).collect();
        let read: Vec<f32> = rows.iter().flat_map(|row| x.row(*row)).copied().collect();
        let change = |row: &usize| y.row(*row).iter().zip(x.row(*row)).map(|(y, x)| y - x).collect::<Vec<f32>>();
        let changes: Vec<f32> = rows.iter().flat_map(change).collect();
        let regression = Regression::new(&documents, ridge).map_err(problem)?;
        let side = |values: &[f32], name| {
            regression.side(Residual::new(values, width).expect("whole rows"), name, 1).map_err(problem)
        };
        let (source, target) = (side(&read, "source")?, side(&changes, "target")?);
        let pair = regression.pair(&source, &target, 1);
        let lambda = pair.quality().map_err(problem)?.lambda;
        let map = match rank {
            None => pair.refit(lambda, layer, layer),
            Some(rank) => pair.refit_low_rank(lambda, rank, layer, layer),
        };
        Ok((map.and_then(AffineMap::into_correction).map_err(problem)?, lambda))
    };
    let (judged, _) = fit_on(folds.train())?;
    let (fraction_unexplained, cosine) = agreement(&judged, x, y, folds.heldout());
    let (map, lambda) = fit_on(&all)?;
    let (n_train, n_heldout) = (folds.train().len(), folds.heldout().len());
    Ok((map, MappingQuality { lambda, fraction_unexplained, cosine, n_train, n_heldout, backward: None }))
}

fn train(
    layer: LayerIndex,
    source: &Rows,
    target: &Rows,
    options: &AutoencoderOptions,
) -> Result<(Autoencoder, AutoencoderQuality), LearnError> {
    let problem = |source| LearnError::Training { source_layer: layer, target_layer: layer, source };
    let rows = PairedRows {
        source: source.activations.layer(layer),
        target: target.activations.layer(layer),
        documents: &source.documents,
    };
    let mut trainer = AutoencoderTrainer::new(rows, options.clone()).map_err(problem)?;
    while !trainer.is_done() {
        trainer.epoch().map_err(problem)?;
    }
    trainer.finish(layer, layer).map_err(problem)
}

/// What of `y`'s variance `map` leaves unexplained in `rows`, and the mean cosine of mapped and true rows, both in units of `y`'s deviations.
fn agreement(map: &AffineMap, x: Residual<'_>, y: Residual<'_>, rows: &[usize]) -> (f64, f64) {
    let Standardization { mean, scale } = Standardization::of(y);
    let standardized = |row: &[f32]| -> Vec<f32> {
        row.iter().zip(mean.iter().zip(&scale)).map(|(value, (mean, scale))| (value - mean) / scale).collect()
    };
    let (mut unexplained, mut all, mut cosines) = (0.0, 0.0, 0.0);
    for row in rows {
        let (found, wanted) = (standardized(&map.apply(x.row(*row))), standardized(y.row(*row)));
        unexplained += found.iter().zip(&wanted).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        all += wanted.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
        cosines += cosine(&found, &wanted);
    }
    (unexplained / all.max(f64::MIN_POSITIVE), cosines / rows.len().max(1) as f64)
}
