//! Which row of a residual is which token of the batch.
//!
//! llama.cpp cuts a batch into micro-batches. With one KV stream it takes the rows in order (`split_simple`, llama-batch.cpp); with several
//! it takes as many rows of each of several sequences, one sequence after another (`split_equal`), and so may a cache with a sliding
//! window that finds no place otherwise. So the order is predicted as llama.cpp makes it, and checked against what the graph itself reads: positions, and token ids
//! where they lie in host memory. A row that no prediction fits is told by its token and position where no other row of the batch has
//! the same; else its micro-batch has no sequences, and every gate of the batch counts as fired.
//!
//! A row has one sequence: [`GuardedBatch`](super::GuardedBatch) offers no row of several.

use crate::program::{EVERY_TEXT, Row, RowKind};
use crate::tensor::{SequenceId, TokenPosition};

/// A row of a batch, as it was handed to llama.cpp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchRow {
    pub sequence: SequenceId,
    pub position: TokenPosition,
    pub kind: RowKind,
    /// Whether its logits were asked for: at its last layer llama.cpp keeps only such rows.
    pub output: bool,
}

/// What of a context's settings decides how it cuts a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Splitting {
    /// KV streams: 1 with a unified cache, else one a sequence.
    pub n_streams: usize,
    /// Rows that a micro-batch may have.
    pub n_ubatch: usize,
}

/// What a micro-batch's graph reads, each empty where it could not be read.
#[derive(Debug, Default)]
pub(super) struct GraphInputs {
    /// `[n_rows]`, or several such sections where a token has several positions (M-RoPE), of which the first is the text's.
    pub positions: Vec<i32>,
    /// `[n_rows]`
    pub tokens: Vec<i32>,
}

/// Follows the micro-batches of one decode.
#[derive(Debug)]
pub(super) struct RowTracker {
    batch: Vec<BatchRow>,
    /// Token ids of `batch`.
    tokens: Vec<i32>,
    /// [`Row::matched`] of `batch`, empty where nobody asks.
    marks: Vec<u64>,
    splitting: Splitting,
    /// Whether the batch has several sequences.
    mixed: bool,
    /// Which rows earlier micro-batches took.
    used: Vec<bool>,
    /// Batch rows of the current micro-batch, in the order of its residuals.
    order: Vec<usize>,
    /// Sequences of a prediction.
    sequences: Vec<SequenceId>,
    /// Rows of the current micro-batch, and those of them that the last layer keeps.
    rows: Vec<Row>,
    outputs: Vec<Row>,
    /// Whether rows of the current micro-batch have no sequence, and whether those of any had none.
    unknown: bool,
    uncertain: bool,
}

impl Default for RowTracker {
    fn default() -> Self {
        Self {
            batch: Vec::new(),
            tokens: Vec::new(),
            marks: Vec::new(),
            splitting: Splitting { n_streams: 1, n_ubatch: 1 },
            mixed: false,
            used: Vec::new(),
            order: Vec::new(),
            sequences: Vec::new(),
            rows: Vec::new(),
            outputs: Vec::new(),
            unknown: false,
            uncertain: false,
        }
    }
}

impl RowTracker {
    /// The batch of this decode.
    pub fn batch(&self) -> &[BatchRow] {
        &self.batch
    }

    /// Starts a decode of `batch` with the token ids `tokens`.
    pub fn begin(&mut self, batch: &[BatchRow], tokens: &[i32], splitting: Splitting) {
        self.batch.clear();
        self.batch.extend_from_slice(batch);
        self.tokens.clear();
        self.tokens.extend_from_slice(tokens);
        self.marks.clear();
        self.splitting = splitting;
        self.mixed = batch.iter().any(|row| row.sequence != batch[0].sequence);
        self.used.clear();
        self.used.resize(batch.len(), false);
        (self.unknown, self.uncertain) = (false, false);
    }

    /// What the rows of the batch spell, to be filled in: [`Row::matched`] of each.
    pub fn marks_mut(&mut self) -> &mut Vec<u64> {
        &mut self.marks
    }

    /// Enters a micro-batch of `n_rows` rows whose graph reads `inputs`.
    pub fn enter(&mut self, n_rows: usize, inputs: &GraphInputs) {
        let found = self.find_order(n_rows, inputs);
        self.unknown = !found;
        self.uncertain |= !found;
        self.rows.clear();
        self.outputs.clear();
        if found {
            for (index, of_batch) in self.order.iter().enumerate() {
                let row = &self.batch[*of_batch];
                let known = row.known(index, self.marks.get(*of_batch).copied().unwrap_or(EVERY_TEXT));
                self.used[*of_batch] = true;
                self.rows.push(known);
                if row.output {
                    self.outputs.push(known);
                }
            }
        } else {
            let position = |index: usize| TokenPosition(inputs.positions.get(index).copied().unwrap_or(1));
            self.rows.extend((0..n_rows).map(|index| unknown(position(index), index)));
        }
    }

    /// Finds out which batch rows the micro-batch has: `order` holds them then.
    fn find_order(&mut self, n_rows: usize, inputs: &GraphInputs) -> bool {
        // After a micro-batch that could not be told, nothing is known of what it took.
        if !self.uncertain {
            if self.splitting.n_streams == 1 {
                self.predict_in_order(n_rows);
                // With nothing to check it against, the order given is llama.cpp's own for one stream.
                if self.fits(n_rows, inputs, true) {
                    return true;
                }
                self.predict_equal(false);
            } else {
                self.predict_equal(true);
            }
            if self.fits(n_rows, inputs, !self.mixed) {
                return true;
            }
        }
        self.identify(n_rows, inputs)
    }

    /// `split_simple`
    fn predict_in_order(&mut self, n_rows: usize) {
        self.order.clear();
        self.order.extend((0..self.batch.len()).filter(|index| !self.used[*index]).take(n_rows));
    }

    /// `split_equal`: rows of sequences in the order in which they first come; where `sequential`, as every stream its own cells, only of
    /// sequences whose ids follow each other.
    fn predict_equal(&mut self, sequential: bool) {
        self.order.clear();
        self.sequences.clear();
        let n_ubatch = self.splitting.n_ubatch;
        for (row, _) in self.batch.iter().zip(&self.used).filter(|(_, used)| !**used) {
            let follows = |last: &SequenceId| !sequential || row.sequence.0 == last.0 + 1;
            if !self.sequences.contains(&row.sequence) && self.sequences.last().is_none_or(follows) {
                self.sequences.push(row.sequence);
                // So it is there: one more than the micro-batch has room for.
                if self.sequences.len() > n_ubatch {
                    break;
                }
            }
        }
        let (batch, used) = (&self.batch, &self.used);
        let rows_of = |sequence: SequenceId| {
            (0..batch.len()).filter(move |index| !used[*index] && batch[*index].sequence == sequence)
        };
        let left = self.sequences.iter().map(|sequence| rows_of(*sequence).count()).min().unwrap_or(0);
        let each = left.min((n_ubatch / self.sequences.len().max(1)).max(1));
        for sequence in &self.sequences {
            self.order.extend(rows_of(*sequence).take(each));
        }
    }

    /// Whether `order` is what the graph reads; `blind` is the answer where nothing of it could be read.
    fn fits(&self, n_rows: usize, GraphInputs { positions, tokens }: &GraphInputs, blind: bool) -> bool {
        let same = |read: &[i32], of_batch: &dyn Fn(usize) -> i32| {
            read.is_empty()
                || read.len() >= n_rows && self.order.iter().zip(read).all(|(index, read)| of_batch(*index) == *read)
        };
        self.order.len() == n_rows
            && (blind || !positions.is_empty())
            && same(positions, &|index| self.batch[index].position.0)
            && (self.tokens.is_empty() || same(tokens, &|index| self.tokens[index]))
    }

    /// Tells rows by what no other row has: the same position with the same token.
    fn identify(&mut self, n_rows: usize, GraphInputs { positions, tokens }: &GraphInputs) -> bool {
        self.order.clear();
        if positions.len() < n_rows || tokens.len() != n_rows || self.tokens.len() != self.batch.len() {
            return false;
        }
        for (position, token) in positions.iter().zip(tokens) {
            let is_it = |index: &usize| {
                !self.used[*index] && self.batch[*index].position.0 == *position && self.tokens[*index] == *token
            };
            let mut candidates = (0..self.batch.len()).filter(is_it);
            let (Some(index), None) = (candidates.next(), candidates.next()) else { return false };
            self.order.push(index);
        }
        true
    }

    /// The rows of a residual that has `n_rows` of them, or `None` where no rows of the micro-batch fit that number.
    pub fn rows(&mut self, n_rows: usize) -> Option<&[Row]> {
        if n_rows == self.rows.len() {
            return Some(&self.rows);
        }
        if self.unknown {
            self.outputs.clear();
            self.outputs.extend((0..n_rows).map(|index| unknown(TokenPosition(1), index)));
        }
        (n_rows == self.outputs.len()).then_some(&self.outputs)
    }

    /// Whether any row of this decode could not be told.
    pub fn is_uncertain(&self) -> bool {
        self.uncertain
    }
}

impl BatchRow {
    fn known(&self, index: usize, matched: u64) -> Row {
        Row { sequence: Some(self.sequence), position: self.position, kind: self.kind, index, matched }
    }
}

/// Treated as the end of a prompt that spells all texts, so that interventions on the prompt and on the answer act alike.
fn unknown(position: TokenPosition, index: usize) -> Row {
    Row { sequence: None, position, kind: RowKind::PromptEnd, index, matched: EVERY_TEXT }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(sequence: i32, position: i32, output: bool) -> BatchRow {
        let kind = if output { RowKind::PromptEnd } else { RowKind::Prompt };
        BatchRow { sequence: SequenceId(sequence), position: TokenPosition(position), kind, output }
    }

    fn prompt(sequence: i32, n: i32) -> Vec<BatchRow> {
        (0..n).map(|position| row(sequence, position, position == n - 1)).collect()
    }

    const ONE_STREAM: Splitting = Splitting { n_streams: 1, n_ubatch: 8 };
    const TWO_STREAMS: Splitting = Splitting { n_streams: 2, n_ubatch: 8 };

    fn positions(positions: &[i32]) -> GraphInputs {
        GraphInputs { positions: positions.to_vec(), tokens: Vec::new() }
    }

    fn begun(batch: &[BatchRow], tokens: &[i32], splitting: Splitting) -> RowTracker {
        let mut tracker = RowTracker::default();
        tracker.begin(batch, tokens, splitting);
        tracker
    }

    fn sequences_of(tracker: &mut RowTracker, n_rows: usize) -> Vec<Option<i32>> {
        tracker.rows(n_rows).unwrap().iter().map(|row| row.sequence.map(|sequence| sequence.0)).collect()
    }

    #[test]
    fn micro_batches_follow_each_other() {
        let mut tracker = begun(&prompt(3, 5), &[], ONE_STREAM);
        tracker.enter(2, &positions(&[0, 1]));
        assert_eq!(tracker.rows(2).unwrap()[1].position, TokenPosition(1));
        assert!(tracker.rows(0).unwrap().is_empty(), "the last layer of a micro-batch with no outputs");
        tracker.enter(2, &positions(&[2, 3]));
        tracker.enter(1, &positions(&[4]));
        let last = tracker.rows(1).unwrap()[0];
        assert_eq!((last.sequence, last.kind), (Some(SequenceId(3)), RowKind::PromptEnd));
        assert!(!tracker.is_uncertain());
    }

    #[test]
    fn the_last_layer_keeps_the_rows_with_outputs() {
        let mut tracker = begun(&[prompt(0, 3), prompt(1, 2)].concat(), &[], ONE_STREAM);
        tracker.enter(5, &positions(&[0, 1, 2, 0, 1]));
        assert_eq!(sequences_of(&mut tracker, 2), [Some(0), Some(1)]);
        assert!(tracker.rows(4).is_none());
    }

    #[test]
    fn unexpected_positions_make_rows_uncertain() {
        let mut tracker = begun(&prompt(0, 3), &[], ONE_STREAM);
        tracker.enter(3, &positions(&[0, 2, 1]));
        assert!(tracker.is_uncertain());
        assert_eq!(sequences_of(&mut tracker, 3), [None; 3]);
    }

    #[test]
    fn other_tokens_make_rows_uncertain() {
        let mut tracker = begun(&prompt(0, 3), &[7, 8, 9], ONE_STREAM);
        tracker.enter(3, &GraphInputs { positions: vec![0, 1, 2], tokens: vec![7, 8, 8] });
        assert!(tracker.is_uncertain());
    }

    #[test]
    fn streams_take_as_many_rows_of_each_sequence() {
        let mut tracker = begun(&[prompt(0, 3), prompt(1, 5)].concat(), &[], TWO_STREAMS);
        tracker.enter(6, &positions(&[0, 1, 2, 0, 1, 2]));
        assert_eq!(sequences_of(&mut tracker, 6), [0, 0, 0, 1, 1, 1].map(Some));
        assert_eq!(sequences_of(&mut tracker, 1), [Some(0)], "of the other the end is to come");
        tracker.enter(2, &positions(&[3, 4]));
        assert_eq!(sequences_of(&mut tracker, 2), [1, 1].map(Some));
        assert!(!tracker.is_uncertain());
    }

    #[test]
    fn several_streams_with_nothing_to_check_are_uncertain() {
        let mut tracker = begun(&[prompt(0, 2), prompt(1, 2)].concat(), &[], TWO_STREAMS);
        tracker.enter(4, &GraphInputs::default());
        assert!(tracker.is_uncertain());
        let mut tracker = begun(&prompt(1, 2), &[], TWO_STREAMS);
        tracker.enter(2, &GraphInputs::default());
        assert!(!tracker.is_uncertain());
    }

    #[test]
    fn a_row_like_no_other_is_known_in_any_order() {
        let batch = [prompt(0, 2), prompt(1, 2)].concat();
        let tokens = [5, 6, 7, 6];
        let shuffled = |tokens: &[i32], at: &[i32]| GraphInputs { positions: at.to_vec(), tokens: tokens.to_vec() };
        let mut tracker = begun(&batch, &tokens, TWO_STREAMS);
        tracker.enter(2, &shuffled(&[7, 5], &[0, 0]));
        assert_eq!(sequences_of(&mut tracker, 2), [1, 0].map(Some));
        assert!(!tracker.is_uncertain());
        // Both sequences have a 6 at position 1, and after a surprise the order tells nothing.
        let mut tracker = begun(&batch, &tokens, TWO_STREAMS);
        tracker.enter(2, &shuffled(&[9, 5], &[0, 0]));
        tracker.enter(2, &shuffled(&[6, 6], &[1, 1]));
        assert_eq!(sequences_of(&mut tracker, 2), [None; 2]);
    }

    #[test]
    fn a_text_position_is_the_first_of_several() {
        let mut tracker = begun(&prompt(0, 2), &[], ONE_STREAM);
        tracker.enter(2, &positions(&[0, 1, 0, 1, 0, 1, 0, 0]));
        assert!(!tracker.is_uncertain());
    }

    #[test]
    fn more_rows_than_the_batch_are_uncertain() {
        let mut tracker = begun(&prompt(0, 2), &[], ONE_STREAM);
        tracker.enter(3, &positions(&[0, 1, 2]));
        assert!(tracker.is_uncertain());
        assert_eq!(tracker.rows(3).unwrap().len(), 3);
    }

    proptest! {
        /// Whatever order llama.cpp takes, rows that differ are told apart, and their outputs come in the same order.
        #[test]
        fn rows_that_differ_are_told_in_any_order(
            lengths in prop::collection::vec(1i32..6, 1..5),
            seed in any::<u64>(),
            n_ubatch in 1usize..9,
            n_streams in 1usize..3,
        ) {
            use rand::{SeedableRng, seq::SliceRandom};
            let batch: Vec<_> = lengths.iter().enumerate().flat_map(|(s, n)| prompt(s as i32, *n)).collect();
            let all_tokens: Vec<i32> = (0..batch.len() as i32).collect();
            let mut shuffled: Vec<usize> = (0..batch.len()).collect();
            shuffled.shuffle(&mut rand_chacha::ChaCha8Rng::seed_from_u64(seed));
            let mut tracker = begun(&batch, &all_tokens, Splitting { n_streams, n_ubatch });
            for order in shuffled.chunks(n_ubatch) {
                let positions = order.iter().map(|index| batch[*index].position.0).collect();
                let tokens = order.iter().map(|index| all_tokens[*index]).collect();
                tracker.enter(order.len(), &GraphInputs { positions, tokens });
                let known = |keep: &dyn Fn(usize) -> bool| -> Vec<_> {
                    order.iter().filter(|index| keep(**index)).map(|index| Some(batch[*index].sequence.0)).collect()
                };
                prop_assert_eq!(sequences_of(&mut tracker, order.len()), known(&|_| true));
                let outputs = known(&|index| batch[index].output);
                if outputs.len() != order.len() {
                    prop_assert_eq!(sequences_of(&mut tracker, outputs.len()), outputs);
                }
            }
            prop_assert!(!tracker.is_uncertain());
        }
    }
}
