use super::{LearnError, Progress};
use crate::engine::{Model, ParallelSampler, PromptTemplate};

/// How a corpus is sampled from a model.
#[derive(Debug, Clone, Copy)]
pub struct CorpusOptions {
    pub documents: usize,
    /// Tokens a document has at most.
    pub max_tokens: usize,
    pub seed: u32,
}

impl Default for CorpusOptions {
    fn default() -> Self {
        Self { documents: 400, max_tokens: 48, seed: 0 }
    }
}

/// A document shorter than this teaches a mapping little.
const SHORTEST: usize = 16;

/// Documents that are written at once.
const PARALLEL: usize = 32;

/// Texts that `model` itself writes where a user's prompt would stand: the template up to the prompt is given, and the model goes on,
/// at temperature 1. (A chat model asked so invents instructions: Xu et al., "Magpie", arXiv 2406.08464.) So a mapping needs no data set.
///
/// The same seed gives the same corpus on one machine.
///
/// # Errors
/// The model can't run, or nearly all that it writes is too short to use.
pub fn sample_corpus(model: &Model, options: CorpusOptions, progress: Progress<'_>) -> Result<Vec<String>, LearnError> {
    let before = model.template().before_prompt(model.llama())?;
    let start = PromptTemplate::Raw.tokens(model.llama(), &before)?;
    let mut sampler = ParallelSampler::new(model, start, PARALLEL, options.max_tokens)?;
    let mut documents = Vec::with_capacity(options.documents);
    let tries = options.documents * 4;
    for first in (0..tries).step_by(PARALLEL) {
        for text in sampler.round(options.seed.wrapping_add(first as u32))? {
            let text = text.trim();
            if text.len() >= SHORTEST {
                documents.push(text.to_owned());
            }
            if documents.len() == options.documents {
                return Ok(documents);
            }
        }
        progress(documents.len(), options.documents);
    }
    Err(LearnError::Corpus { found: documents.len(), wanted: options.documents, tries })
}
