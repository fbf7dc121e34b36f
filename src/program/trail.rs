//! What the gates of a sequence read, row by row from position 0: from it, what they had made of any beginning of the sequence, for another
//! prompt that begins alike.

use super::gates::RowKind;
use crate::tensor::TokenPosition;

/// Rows of one sequence, in the order of their positions.
#[derive(Debug, Clone, Default)]
pub(super) struct Trail {
    n_gates: usize,
    /// Projections, `[n_rows + n_pending, n_gates]`; NaN where a gate read nothing.
    projections: Vec<f32>,
    n_rows: usize,
    /// Rows of the decode that is running: they count when it has gone well.
    n_pending: usize,
    /// The first row that is not of the prompt, or is its last.
    first_other: Option<usize>,
    /// What comes now can't be told.
    closed: bool,
}

impl Trail {
    /// Starts anew, for `n_gates` gates, with memory for `capacity` rows.
    pub fn restart(&mut self, n_gates: usize, capacity: usize) {
        self.projections.clear();
        self.projections.reserve(n_gates * capacity);
        (self.n_gates, self.n_rows, self.n_pending) = (n_gates, 0, 0);
        (self.first_other, self.closed) = (None, false);
    }

    /// Prepares for a decode. One before it that was never finished has left nothing.
    pub fn begin_decode(&mut self) {
        self.keep(self.n_rows);
    }

    /// Makes room for a row of the decode. Rows that follow no other can't be told.
    pub fn expect(&mut self, position: TokenPosition, kind: RowKind) {
        let position = usize::try_from(position.0).unwrap_or(usize::MAX);
        if position < self.n_rows && self.n_pending == 0 {
            // The app has taken the sequence back to here.
            self.keep(position);
        }
        if position != self.n_rows + self.n_pending {
            self.closed = true;
        }
        if self.closed {
            return;
        }
        if kind != RowKind::Prompt {
            self.first_other.get_or_insert(position);
        }
        self.n_pending += 1;
        self.projections.resize((position + 1) * self.n_gates, f32::NAN);
    }

    /// Takes what gate number `gate` read of the row at `position`.
    pub fn read(&mut self, position: TokenPosition, gate: usize, projection: f32) {
        let row = usize::try_from(position.0).unwrap_or(usize::MAX);
        if gate < self.n_gates && (self.n_rows..self.n_rows + self.n_pending).contains(&row) {
            self.projections[row * self.n_gates + gate] = projection;
        }
    }

    /// Ends a decode; where it did not go `well`, neither its rows nor later ones can be told.
    pub fn finish_decode(&mut self, well: bool) {
        if well {
            self.n_rows += self.n_pending;
            self.n_pending = 0;
        } else {
            self.close_at(self.n_rows);
        }
    }

    /// Says that no row from number `n_rows` on can be told.
    pub fn close_at(&mut self, n_rows: usize) {
        self.keep(n_rows);
        self.closed = true;
    }

    /// Forgets all but the first `n_rows` rows.
    fn keep(&mut self, n_rows: usize) {
        self.projections.truncate(n_rows * self.n_gates);
        (self.n_rows, self.n_pending) = (n_rows, 0);
        self.first_other = self.first_other.filter(|first| *first < n_rows);
    }

    /// Takes the first `n_rows` rows of `other`, which are known, as a prompt's. It has none of its own yet.
    pub fn extend_as_prompt(&mut self, other: &Self, n_rows: usize) {
        self.projections.extend_from_slice(&other.projections[..n_rows * other.n_gates]);
        self.n_rows = n_rows;
    }

    /// These rows for other gates, of which number `i` reads what `gates[i]` has read here, or, where that is `None`, has read nothing of them.
    pub fn for_gates(&self, gates: &[Option<usize>], capacity: usize) -> Self {
        let mut projections = Vec::with_capacity(gates.len() * capacity.max(self.n_rows));
        for row in 0..self.n_rows {
            let read = &self.projections[row * self.n_gates..][..self.n_gates];
            projections.extend(gates.iter().map(|gate| gate.map_or(f32::NAN, |gate| read[gate])));
        }
        Self { n_gates: gates.len(), projections, n_pending: 0, ..*self }
    }

    /// Rows that are known.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Rows at the beginning that are of the prompt, its last token not among them.
    pub fn n_prompt(&self) -> usize {
        self.first_other.unwrap_or(self.n_rows).min(self.n_rows)
    }

    /// What gates read of a row, by gate: those that read nothing are left out.
    pub fn projections(&self, row: usize) -> impl Iterator<Item = (usize, f32)> {
        let row = &self.projections[row * self.n_gates..][..self.n_gates];
        row.iter().copied().enumerate().filter(|(_, projection)| !projection.is_nan())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(trail: &mut Trail, rows: &[(i32, RowKind)], well: bool) {
        trail.begin_decode();
        for (position, kind) in rows {
            trail.expect(TokenPosition(*position), *kind);
        }
        for (position, _) in rows {
            trail.read(TokenPosition(*position), 1, *position as f32 + 0.5);
        }
        trail.finish_decode(well);
    }

    fn read(trail: &Trail) -> Vec<Vec<(usize, f32)>> {
        (0..trail.n_rows()).map(|row| trail.projections(row).collect()).collect()
    }

    fn begun() -> Trail {
        let mut trail = Trail::default();
        trail.restart(2, 8);
        decode(&mut trail, &[(0, RowKind::Prompt), (1, RowKind::Prompt), (2, RowKind::PromptEnd)], true);
        decode(&mut trail, &[(3, RowKind::Generated)], true);
        trail
    }

    #[test]
    fn rows_follow_each_other_and_know_the_prompts_end() {
        let trail = begun();
        assert_eq!((trail.n_rows(), trail.n_prompt()), (4, 2));
        let expected: Vec<_> = (0..4).map(|row| vec![(1, row as f32 + 0.5)]).collect();
        assert_eq!(read(&trail), expected, "gate 0 read nothing");
    }

    #[test]
    fn what_did_not_go_well_ends_it() {
        let mut trail = begun();
        decode(&mut trail, &[(4, RowKind::Generated)], false);
        decode(&mut trail, &[(5, RowKind::Generated)], true);
        assert_eq!(trail.n_rows(), 4);
        // Neither finished nor ended: llama.cpp refused it, and it is tried again.
        let mut trail = begun();
        trail.begin_decode();
        trail.expect(TokenPosition(4), RowKind::Generated);
        decode(&mut trail, &[(4, RowKind::Generated)], true);
        assert_eq!(trail.n_rows(), 5);
    }

    #[test]
    fn a_sequence_taken_back_forgets_and_a_gap_ends_it() {
        let mut trail = begun();
        decode(&mut trail, &[(1, RowKind::Prompt)], true);
        assert_eq!((trail.n_rows(), trail.n_prompt()), (2, 2));
        decode(&mut trail, &[(3, RowKind::Generated)], true);
        decode(&mut trail, &[(2, RowKind::Generated)], true);
        assert_eq!(trail.n_rows(), 2);
        for odd in [i32::MAX, i32::MIN, -1] {
            let mut trail = begun();
            decode(&mut trail, &[(odd, RowKind::Generated)], true);
            assert_eq!(trail.n_rows(), 4, "{odd}");
        }
    }

    #[test]
    fn as_a_prompt_it_goes_on() {
        let mut other = begun();
        decode(&mut other, &[(9, RowKind::Generated)], true);
        let mut trail = Trail::default();
        trail.restart(2, 8);
        trail.extend_as_prompt(&other, 3);
        decode(&mut trail, &[(3, RowKind::Prompt), (4, RowKind::PromptEnd)], true);
        assert_eq!((trail.n_rows(), trail.n_prompt()), (5, 4));
        trail.close_at(0);
        decode(&mut trail, &[(0, RowKind::Prompt)], true);
        assert_eq!(trail.n_rows(), 0);
    }
}
