use super::RidgeOptions;
use crate::mapping::MappingError;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::ops::Range;

/// Whole documents dealt into parts, each to be predicted from the others.
#[derive(Debug, Clone)]
pub(crate) struct Folds {
    /// Indices of all rows, part after part.
    pub order: Vec<usize>,
    /// Of `order`. The first is the one held out; with cross-validation every part is in turn, without there is one other, the rest.
    pub parts: Vec<Range<usize>>,
    /// How many parts are held out in turn.
    pub judged: usize,
}

impl Folds {
    /// Parts to judge a regression by, with the options' seed.
    pub fn of_options(documents: &[u32], options: &RidgeOptions) -> Result<Self, MappingError> {
        Self::new(documents, options.folds, options.cross_validate, options.seed)
    }

    /// `folds` parts, 2 or more, as equal as they can be and no more than there are documents, dealt by `seed`; all but the first as one
    /// without `cross_validate`.
    ///
    /// # Errors
    /// Fewer than two documents, or than two rows to fit on.
    pub fn new(documents: &[u32], folds: usize, cross_validate: bool, seed: u64) -> Result<Self, MappingError> {
        let mut rows = BTreeMap::<u32, Vec<usize>>::new();
        for (row, document) in documents.iter().enumerate() {
            rows.entry(*document).or_default().push(row);
        }
        if rows.len() < 2 {
            return Err(MappingError::TooFewDocuments { expected: 2, found: rows.len() });
        }
        let mut shuffled: Vec<Vec<usize>> = rows.into_values().collect();
        shuffled.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let folds = folds.min(shuffled.len());
        let first_document = |fold: usize| (shuffled.len() as f64 * fold as f64 / folds as f64).round() as usize;
        let cuts: Vec<usize> = match cross_validate {
            true => (0..=folds).map(first_document).collect(),
            false => vec![0, first_document(1), shuffled.len()],
        };
        let (mut order, mut parts) = (Vec::with_capacity(documents.len()), Vec::with_capacity(cuts.len() - 1));
        for cut in cuts.windows(2) {
            let start = order.len();
            order.extend(shuffled[cut[0]..cut[1]].iter().flatten());
            // Rows are gathered in their order, which reads memory forwards.
            order[start..].sort_unstable();
            parts.push(start..order.len());
        }
        let judged = if cross_validate { parts.len() } else { 1 };
        let found = parts[..judged].iter().map(|part| order.len() - part.len()).min().unwrap_or(0);
        if found < 2 {
            return Err(MappingError::TooFewRows { expected: 2, found });
        }
        Ok(Self { order, parts, judged })
    }

    /// Rows of the first part.
    pub fn heldout(&self) -> &[usize] {
        &self.order[self.parts[0].clone()]
    }

    /// All other rows.
    pub fn train(&self) -> &[usize] {
        &self.order[self.parts[0].end..]
    }

    /// Rows to fit on when `part` is held out.
    pub fn n_train(&self, part: usize) -> usize {
        self.order.len() - self.parts[part].len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn documents_never_straddle_a_cut(
            documents in proptest::collection::vec(0u32..30, 2..200),
            folds in 2usize..9,
            cross_validate in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let options = RidgeOptions { folds, cross_validate, seed, ..Default::default() };
            if let Ok(found) = Folds::of_options(&documents, &options) {
                let all = documents.iter().collect::<BTreeSet<_>>().len() as f64;
                let mut seen = BTreeSet::new();
                for (index, part) in found.parts.iter().enumerate() {
                    let of: BTreeSet<u32> = found.order[part.clone()].iter().map(|row| documents[*row]).collect();
                    prop_assert!(!of.is_empty());
                    if index < found.judged {
                        prop_assert!((of.len() as f64 - all / (folds as f64).min(all)).abs() < 1.0 + 1e-9);
                    }
                    prop_assert!(of.iter().all(|document| seen.insert(*document)));
                }
                let mut rows = found.order.clone();
                rows.sort_unstable();
                prop_assert!(rows.into_iter().eq(0..documents.len()));
            }
        }

        #[test]
        fn the_first_part_is_the_same_with_cross_validation_and_without(
            documents in proptest::collection::vec(0u32..30, 20..200),
            seed in any::<u64>(),
        ) {
            let part = |cross_validate| {
                let options = RidgeOptions { cross_validate, seed, ..Default::default() };
                Folds::of_options(&documents, &options).map(|folds| folds.heldout().to_vec())
            };
            if let (Ok(with), Ok(without)) = (part(true), part(false)) {
                prop_assert_eq!(with, without);
            }
        }
    }
}
