//! What a batch's rows are to a sequence: the app does not say where a prompt begins and where an answer does.

use pilotfish::program::RowKind;

/// What is known of a sequence's cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Track {
    /// Tokens that were decoded.
    n: i32,
    /// Position of the last prompt's last token, once its logits were asked for.
    prompt_end: Option<i32>,
}

/// How a sequence goes on with the rows of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// There was nothing.
    Begins,
    /// As it was: more of a prompt, or of an answer.
    GoesOn,
    /// Another prompt behind what is there.
    Turn,
    /// There are tokens that were never decoded here: a state that the app has loaded.
    Unseen,
}

/// As many rows with logits as an answer may go on by at once, where a draft of it is checked. More, with logits or not, are a prompt.
const MAX_DRAFT: usize = 65;

impl Track {
    /// What `rows` are, each by its position and whether its logits are asked for, to a sequence of which `track` is known and whose cells hold `in_cells`
    /// tokens: how it goes on, the kind of each row, and what is known of it once they are decoded.
    ///
    /// The last row of a batch whose logits are asked for ends a prompt: no token may be chosen before gates have decided. Those that follow are of the answer as
    /// long as the logits of each are asked for; others are a prompt again. An app may take tokens back: behind the prompt's end that is a draft that was
    /// refused, before it another prompt.
    pub fn take(
        track: Option<Self>,
        in_cells: i32,
        rows: impl ExactSizeIterator<Item = (i32, bool)> + Clone,
    ) -> (Next, Vec<RowKind>, Self) {
        let next = Self::next(track, in_cells, rows.clone());
        let n = rows.clone().last().map_or(in_cells, |(position, _)| position.saturating_add(1));
        let prompt_end = track.and_then(|track| track.prompt_end);
        if let (Next::GoesOn, Some(prompt_end)) = (next, prompt_end) {
            let kinds = vec![RowKind::Generated; rows.len()];
            return (next, kinds, Self { n, prompt_end: Some(prompt_end) });
        }
        let end = rows.clone().enumerate().filter(|(_, (_, output))| *output).last();
        let Some((end, (position, _))) = end else {
            return (next, vec![RowKind::Prompt; rows.len()], Self { n, prompt_end: None });
        };
        let mut kinds = vec![RowKind::Prompt; end];
        kinds.push(RowKind::PromptEnd);
        kinds.resize(rows.len(), RowKind::Generated);
        (next, kinds, Self { n, prompt_end: Some(position) })
    }

    /// Says that what comes next is another prompt, whatever it looks like.
    pub fn begin_prompt(&mut self) {
        self.prompt_end = Some(i32::MAX);
    }

    /// Positions from `first` on become `by` more.
    pub fn shift(&mut self, first: i32, by: i32) {
        let shifted = |position: i32| if position >= first { position.saturating_add(by) } else { position };
        self.n = shifted(self.n);
        // Where the prompt's end was removed, what stands there now is of the answer.
        self.prompt_end =
            self.prompt_end.map(|end| if end >= first { shifted(end) } else { end.min(first + by.min(0) - 1) });
    }

    fn next(track: Option<Self>, in_cells: i32, mut rows: impl ExactSizeIterator<Item = (i32, bool)> + Clone) -> Next {
        let first = rows.clone().next().map_or(in_cells, |(position, _)| position);
        if in_cells <= 0 {
            return Next::Begins;
        }
        let Some(track) = track.filter(|track| in_cells <= track.n && first == in_cells) else { return Next::Unseen };
        let is_cut = in_cells < track.n;
        match track.prompt_end {
            Some(prompt_end) if in_cells > prompt_end => {
                let is_answer = rows.len() <= MAX_DRAFT && rows.all(|(_, output)| output);
                if is_answer { Next::GoesOn } else { Next::Turn }
            }
            Some(_) => Next::Turn,
            None if is_cut => Next::Turn,
            None => Next::GoesOn,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use RowKind::{Generated, Prompt, PromptEnd};

    /// Takes `n` rows from `first` on, those from `outputs` on with logits.
    fn take(track: Option<Track>, in_cells: i32, first: i32, n: usize, outputs: usize) -> (Next, Vec<RowKind>, Track) {
        let rows: Vec<(i32, bool)> = (0..n).map(|row| (first + row as i32, row >= outputs)).collect();
        Track::take(track, in_cells, rows.into_iter())
    }

    #[test]
    fn a_prompt_in_parts_and_its_answer() {
        let (next, kinds, track) = take(None, 0, 0, 3, 3);
        assert_eq!((next, kinds), (Next::Begins, vec![Prompt; 3]));
        let (next, kinds, track) = take(Some(track), 3, 3, 2, 1);
        assert_eq!((next, kinds), (Next::GoesOn, vec![Prompt, PromptEnd]));
        let (next, kinds, track) = take(Some(track), 5, 5, 1, 0);
        assert_eq!((next, kinds), (Next::GoesOn, vec![Generated]));
        assert_eq!(track, Track { n: 6, prompt_end: Some(4) });
    }

    #[test]
    fn a_draft_is_of_the_answer_and_may_be_refused() {
        let track = Track { n: 6, prompt_end: Some(4) };
        let (next, kinds, track) = take(Some(track), 6, 6, 4, 0);
        assert_eq!((next, kinds), (Next::GoesOn, vec![Generated; 4]));
        // Three of them were wrong.
        let (next, kinds, _) = take(Some(track), 7, 7, 2, 0);
        assert_eq!((next, kinds), (Next::GoesOn, vec![Generated; 2]));
    }

    #[test]
    fn another_turn_is_a_prompt_wherever_it_begins() {
        let track = Track { n: 9, prompt_end: Some(4) };
        let expected = vec![Prompt, Prompt, PromptEnd];
        for in_cells in [9, 7, 4, 2] {
            let (next, kinds, track) = take(Some(track), in_cells, in_cells, 3, 2);
            assert_eq!((next, &kinds), (Next::Turn, &expected), "{in_cells}");
            assert_eq!(track, Track { n: in_cells + 3, prompt_end: Some(in_cells + 2) });
        }
        // The same prompt again, of which the last token alone is read.
        let (next, kinds, _) = take(Some(track), 4, 4, 1, 0);
        assert_eq!((next, kinds), (Next::Turn, vec![PromptEnd]));
        // An app that asks for the logits of each token of a prompt.
        let (next, ..) = take(Some(track), 9, 9, MAX_DRAFT + 1, 0);
        assert_eq!(next, Next::Turn);
        // A prompt that was broken off.
        let (next, ..) = take(Some(Track { n: 9, prompt_end: None }), 4, 4, 3, 2);
        assert_eq!(next, Next::Turn);
    }

    #[test]
    fn logits_before_the_last_row_end_a_prompt_too() {
        let rows = [(0, false), (1, true), (2, false)];
        let (next, kinds, track) = Track::take(None, 0, rows.into_iter());
        assert_eq!((next, kinds), (Next::Begins, vec![Prompt, PromptEnd, Generated]));
        assert_eq!(track, Track { n: 3, prompt_end: Some(1) });
        // One that is told to be a prompt, though it looks like a draft.
        let mut track = Track { n: 9, prompt_end: Some(4) };
        track.begin_prompt();
        let (next, kinds, track) = take(Some(track), 9, 9, 2, 0);
        assert_eq!((next, kinds), (Next::Turn, vec![Prompt, PromptEnd]));
        assert_eq!(track, Track { n: 11, prompt_end: Some(10) });
    }

    #[test]
    fn a_shift_takes_the_prompts_end_along() {
        let shifted = |end, first, by| {
            let mut track = Track { n: 20, prompt_end: Some(end) };
            track.shift(first, by);
            track
        };
        // Tokens 4 to 11 are removed, and what is behind them moves up.
        assert_eq!(shifted(15, 12, -8), Track { n: 12, prompt_end: Some(7) });
        assert_eq!(shifted(9, 12, -8), Track { n: 12, prompt_end: Some(3) });
        assert_eq!(shifted(2, 12, -8), Track { n: 12, prompt_end: Some(2) });
    }

    #[test]
    fn what_was_not_decoded_here_is_unseen() {
        let track = Track { n: 4, prompt_end: Some(3) };
        for (track, in_cells, first) in [(None, 4, 4), (Some(track), 5, 5), (Some(track), 4, 6), (Some(track), 4, 3)] {
            let (next, kinds, _) = take(track, in_cells, first, 2, 1);
            assert_eq!((next, kinds), (Next::Unseen, vec![Prompt, PromptEnd]), "{in_cells}, {first}");
        }
        assert_eq!(take(Some(track), 0, 0, 1, 0).0, Next::Begins);
    }
}
