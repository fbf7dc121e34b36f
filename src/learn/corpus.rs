use super::{LearnError, Progress};
use crate::engine::{Model, ParallelSampler, PromptTemplate};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;

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

/// `documents` in two: those to learn from, and `n` to judge by what was learnt, in their order, chosen by `seed`. All are to learn from where there
/// would be fewer than two left.
pub fn set_aside<T>(documents: Vec<T>, n: usize, seed: u64) -> (Vec<T>, Vec<T>) {
    if n.saturating_add(2) > documents.len() {
        return (documents, Vec::new());
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Not the numbers by which documents are held out of a fit.
    rng.set_stream(1);
    let chosen: BTreeSet<usize> = rand::seq::index::sample(&mut rng, documents.len(), n).into_iter().collect();
    let (mut kept, mut aside) = (Vec::new(), Vec::new());
    for (index, document) in documents.into_iter().enumerate() {
        if chosen.contains(&index) { &mut aside } else { &mut kept }.push(document);
    }
    (kept, aside)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_document_is_on_one_side_and_a_seed_says_on_which() {
        let documents: Vec<String> = (0..20).map(|n| n.to_string()).collect();
        let (kept, aside) = set_aside(documents.clone(), 5, 3);
        assert_eq!((kept.len(), aside.len()), (15, 5));
        let mut all = [kept.clone(), aside.clone()].concat();
        all.sort_by_key(|text| text.parse::<usize>().unwrap());
        assert_eq!(all, documents);
        assert_eq!(set_aside(documents.clone(), 5, 3), (kept, aside.clone()));
        assert_ne!(set_aside(documents.clone(), 5, 4).1, aside);
        for n in [0, 19, 20, 21, usize::MAX] {
            assert_eq!(set_aside(documents.clone(), n, 3), (documents.clone(), vec![]), "{n}");
        }
    }
}
