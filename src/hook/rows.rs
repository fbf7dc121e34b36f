//! Which row of a residual is which token of the batch.
//!
//! llama.cpp cuts a batch into micro-batches. With one KV stream it takes the rows in order (`split_simple`, llama-batch.cpp);
//! with several it may gather rows of several sequences in another order (`split_equal`). So the order is checked against the
//! positions that the graph itself reads, and where it can't be told, rows are given no sequence and every gate counts as fired.

use crate::program::{Row, RowKind};
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

/// Follows the micro-batches of one decode.
#[derive(Debug, Default)]
pub(super) struct RowTracker {
    batch: Vec<BatchRow>,
    /// Whether llama.cpp may reorder rows of this batch.
    reordered: bool,
    /// First batch row of the current micro-batch, and of the next.
    start: usize,
    end: usize,
    /// Rows of the current micro-batch, and those of them that the last layer keeps.
    rows: Vec<Row>,
    outputs: Vec<Row>,
    uncertain: bool,
}

impl RowTracker {
    /// Starts a decode of `batch`. `n_streams` is the context's number of KV streams.
    pub fn begin(&mut self, batch: &[BatchRow], n_streams: usize) {
        self.batch.clear();
        self.batch.extend_from_slice(batch);
        self.reordered = n_streams > 1 && batch.iter().any(|row| row.sequence != batch[0].sequence);
        (self.start, self.end) = (0, 0);
        self.uncertain = false;
    }

    /// Enters a micro-batch of `n_rows` rows at `positions` (empty where they can't be read).
    pub fn enter(&mut self, n_rows: usize, positions: &[i32]) {
        self.start = self.end;
        self.end = (self.start + n_rows).min(self.batch.len());
        let slice = &self.batch[self.start..self.end];
        let in_order = slice.len() == n_rows
            && (positions.is_empty()
                || positions.len() >= n_rows
                    && slice.iter().zip(positions).all(|(row, position)| row.position.0 == *position));
        // An M-RoPE model has several positions a token; the first `n_rows` of them are the ones of the text.
        let certain = in_order && !self.reordered;
        self.uncertain |= !certain;
        self.rows.clear();
        self.outputs.clear();
        if certain {
            let rows = || slice.iter().enumerate();
            self.rows.extend(rows().map(|(index, row)| row.known(index)));
            self.outputs.extend(rows().filter(|(_, row)| row.output).map(|(index, row)| row.known(index)));
        } else {
            let position = |index: usize| TokenPosition(positions.get(index).copied().unwrap_or(1));
            self.rows.extend((0..n_rows).map(|index| unknown(position(index), index)));
        }
    }

    /// The rows of a residual that has `n_rows` of them, or `None` where no rows of the micro-batch fit that number.
    pub fn rows(&mut self, n_rows: usize) -> Option<&[Row]> {
        if n_rows == self.rows.len() {
            return Some(&self.rows);
        }
        if self.uncertain {
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
    fn known(&self, index: usize) -> Row {
        Row { sequence: Some(self.sequence), position: self.position, kind: self.kind, index }
    }
}

/// Treated as the end of a prompt, so that interventions on the prompt and on the answer act alike.
fn unknown(position: TokenPosition, index: usize) -> Row {
    Row { sequence: None, position, kind: RowKind::PromptEnd, index }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(sequence: i32, position: i32, output: bool) -> BatchRow {
        let kind = if output { RowKind::PromptEnd } else { RowKind::Prompt };
        BatchRow { sequence: SequenceId(sequence), position: TokenPosition(position), kind, output }
    }

    fn prompt(sequence: i32, n: i32) -> Vec<BatchRow> {
        (0..n).map(|position| row(sequence, position, position == n - 1)).collect()
    }

    #[test]
    fn micro_batches_follow_each_other() {
        let mut tracker = RowTracker::default();
        tracker.begin(&prompt(3, 5), 1);
        tracker.enter(2, &[0, 1]);
        assert_eq!(tracker.rows(2).unwrap()[1].position, TokenPosition(1));
        assert!(tracker.rows(0).unwrap().is_empty(), "the last layer of a micro-batch with no outputs");
        tracker.enter(2, &[2, 3]);
        tracker.enter(1, &[4]);
        let last = tracker.rows(1).unwrap()[0];
        assert_eq!((last.sequence, last.kind), (Some(SequenceId(3)), RowKind::PromptEnd));
        assert!(!tracker.is_uncertain());
    }

    #[test]
    fn the_last_layer_keeps_the_rows_with_outputs() {
        let mut tracker = RowTracker::default();
        tracker.begin(&[prompt(0, 3), prompt(1, 2)].concat(), 1);
        tracker.enter(5, &[0, 1, 2, 0, 1]);
        let outputs: Vec<_> = tracker.rows(2).unwrap().iter().map(|row| row.sequence.unwrap().0).collect();
        assert_eq!(outputs, [0, 1]);
        assert!(tracker.rows(4).is_none());
    }

    #[test]
    fn unexpected_positions_make_rows_uncertain() {
        let mut tracker = RowTracker::default();
        tracker.begin(&prompt(0, 3), 1);
        tracker.enter(3, &[0, 2, 1]);
        assert!(tracker.is_uncertain());
        assert!(tracker.rows(3).unwrap().iter().all(|row| row.sequence.is_none()));
    }

    #[test]
    fn several_sequences_in_several_streams_are_uncertain() {
        let mut tracker = RowTracker::default();
        tracker.begin(&[prompt(0, 2), prompt(1, 2)].concat(), 2);
        tracker.enter(4, &[0, 1, 0, 1]);
        assert!(tracker.is_uncertain());
        tracker.begin(&prompt(1, 2), 2);
        tracker.enter(2, &[0, 1]);
        assert!(!tracker.is_uncertain());
    }

    #[test]
    fn more_rows_than_the_batch_are_uncertain() {
        let mut tracker = RowTracker::default();
        tracker.begin(&prompt(0, 2), 1);
        tracker.enter(3, &[0, 1, 2]);
        assert!(tracker.is_uncertain());
        assert_eq!(tracker.rows(3).unwrap().len(), 3);
    }
}
