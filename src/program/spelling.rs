//! Which tokens spell a text. It is found by bytes, wherever a tokenizer has cut it: every token counts that has a byte of it, so that where
//! its ends were joined with their neighbours these count too.

use super::RowKind;
use crate::tensor::TokenPosition;
use std::ops::Range;

/// The bytes of tokens one after the other: those of a vocabulary by their ids, or those of a prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenBytes {
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<usize>,
}

/// Indices of the tokens that spell `text`, wherever it stands in what `tokens` spell together. Occurrences that overlap count each.
pub fn tokens_spelling(tokens: impl IntoIterator<Item = impl AsRef<[u8]>>, text: &str) -> Vec<usize> {
    let tokens = TokenBytes::new(tokens);
    let mut marks = vec![0; tokens.ends.len()];
    if !text.is_empty() {
        tokens.mark(text.as_bytes(), Edges::default(), 1, &mut marks);
    }
    (0..marks.len()).filter(|token| marks[*token] != 0).collect()
}

/// Where anything may follow, or come before, what is known.
#[derive(Debug, Clone, Copy, Default)]
struct Edges {
    open_before: bool,
    open_after: bool,
}

/// Where `text`, which is not empty, stands in `bytes`, or may stand over an open edge of them.
fn occurrences<'a>(bytes: &'a [u8], text: &'a [u8], edges: Edges) -> impl Iterator<Item = Range<usize>> + 'a {
    let length = text.len();
    // By where an occurrence would end, which may be behind all bytes; it may begin before them.
    let first = if edges.open_before { 1 } else { length };
    let behind_last = bytes.len() + if edges.open_after { length } else { 1 };
    (first..behind_last).filter_map(move |ends| {
        let (start, end) = (ends.saturating_sub(length), ends.min(bytes.len()));
        let of_text = start + length - ends..end + length - ends;
        (bytes[start..end] == text[of_text]).then_some(start..end)
    })
}

impl TokenBytes {
    pub fn new(tokens: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Self {
        let mut all = Self::default();
        tokens.into_iter().for_each(|token| all.push(token.as_ref()));
        all
    }

    fn push(&mut self, token: &[u8]) {
        self.bytes.extend_from_slice(token);
        self.ends.push(self.bytes.len());
    }

    fn start(&self, index: usize) -> usize {
        index.checked_sub(1).map_or(0, |before| self.ends[before])
    }

    /// Those of token `id`; none of one that is not among them.
    pub fn of(&self, id: i32) -> &[u8] {
        let index = usize::try_from(id).unwrap_or(usize::MAX);
        self.ends.get(index).map_or(&[], |end| &self.bytes[self.start(index)..*end])
    }

    /// Adds `mark` to the marks of all tokens that have a byte of `text`.
    fn mark(&self, text: &[u8], edges: Edges, mark: u64, marks: &mut [u64]) {
        for found in occurrences(&self.bytes, text, edges) {
            let first = self.ends.partition_point(|end| *end <= found.start);
            for token in (first..self.ends.len()).take_while(|token| self.start(*token) < found.end) {
                if self.start(token) < self.ends[token] {
                    marks[token] |= mark;
                }
            }
        }
    }
}

/// What is looked for, and what tokens are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Texts<'a> {
    pub texts: &'a [Box<[u8]>],
    pub vocabulary: &'a TokenBytes,
}

impl Texts<'_> {
    /// Bytes that an occurrence of which one byte is in a token may have on one side of it.
    pub fn reach(&self) -> usize {
        self.texts.iter().map(|text| text.len()).max().unwrap_or(0).saturating_sub(1)
    }
}

/// What follows tokens in their prompt.
#[derive(Debug, Clone, Copy)]
pub(super) enum Next<'a> {
    /// These, up to the prompt's end or as far as a text reaches.
    Known(&'a [i32]),
    Unknown,
}

/// The tokens of one sequence from some position on, and what each was taken for.
#[derive(Debug, Clone, Default)]
pub(super) struct Spelt {
    tokens: Vec<i32>,
    /// Of each token the texts that it counted as a part of when it was decoded, a bit each.
    marks: Vec<u64>,
    /// Position of the first of the tokens. If it is not 0, anything may come before them.
    start: usize,
    /// Tokens before those of the last decode.
    n_before: usize,
}

impl Spelt {
    /// Starts anew, with memory for `capacity` tokens.
    pub fn restart(&mut self, capacity: usize) {
        self.lose(0);
        self.tokens.reserve(capacity);
        self.marks.reserve(capacity);
    }

    /// Forgets all tokens: what follows is at position `start`.
    fn lose(&mut self, start: usize) {
        self.tokens.clear();
        self.marks.clear();
        (self.start, self.n_before) = (start, 0);
    }

    /// Says that tokens have come which are not known.
    pub fn lose_track(&mut self) {
        self.lose(usize::MAX);
    }

    /// Takes the tokens of a decode. A sequence that goes on from an earlier position has been taken back to there. Returns whether they follow
    /// each other: if not, nothing is known of them.
    pub fn take(&mut self, tokens: impl Iterator<Item = (TokenPosition, i32)>) -> bool {
        for (index, (position, token)) in tokens.enumerate() {
            let at = usize::try_from(position.0).unwrap_or(usize::MAX);
            let end = self.start.saturating_add(self.tokens.len());
            if at != end && index > 0 {
                self.lose_track();
                return false;
            }
            if index == 0 {
                if (self.start..end).contains(&at) {
                    self.tokens.truncate(at - self.start);
                    self.marks.truncate(at - self.start);
                } else if at != end {
                    self.lose(at);
                }
                self.n_before = self.tokens.len();
            }
            self.tokens.push(token);
            self.marks.push(0);
        }
        true
    }

    /// Marks the tokens that were taken last, whose rows are of `kinds`. Each prompt among them ends where its last token is; `next` follows the
    /// last of them, if that has not ended. Tokens of answers have no mark.
    pub fn mark_taken(&mut self, kinds: impl Iterator<Item = RowKind>, texts: Texts<'_>, next: Next<'_>) {
        let mut start = self.n_before;
        for (index, kind) in (start..).zip(kinds) {
            let end = match kind {
                RowKind::Prompt => continue,
                RowKind::PromptEnd => index + 1,
                RowKind::Generated => index,
            };
            self.mark(start..end, texts, Next::Known(&[]));
            start = index + 1;
        }
        self.mark(start..self.tokens.len(), texts, next);
    }

    /// The marks of the tokens that were taken last.
    pub fn taken(&self) -> &[u64] {
        &self.marks[self.n_before..]
    }

    fn mark(&mut self, tokens: Range<usize>, texts: Texts<'_>, next: Next<'_>) {
        if !tokens.is_empty() {
            let marks = self.marks_of(tokens.clone(), texts, next);
            self.marks[tokens].copy_from_slice(&marks);
        }
    }

    /// The marks of `tokens` in a prompt that goes on with `next`.
    fn marks_of(&self, tokens: Range<usize>, texts: Texts<'_>, next: Next<'_>) -> Vec<u64> {
        let first = self.in_reach_of(tokens.start, texts);
        let mut seen = TokenBytes::new(self.tokens[first..tokens.end].iter().map(|token| texts.vocabulary.of(*token)));
        let own = seen.bytes.len();
        if let Next::Known(following) = next {
            for token in following.iter().copied() {
                if seen.bytes.len() >= own + texts.reach() {
                    break;
                }
                seen.bytes.extend_from_slice(texts.vocabulary.of(token));
            }
        }
        let edges = Edges { open_before: first == 0 && self.start > 0, open_after: matches!(next, Next::Unknown) };
        let mut marks = vec![0; tokens.end - first];
        for (index, text) in texts.texts.iter().enumerate() {
            seen.mark(text, edges, 1 << index, &mut marks);
        }
        marks.split_off(tokens.start - first)
    }

    /// The first token that a text can have bytes of which goes on at token `at`.
    fn in_reach_of(&self, at: usize, texts: Texts<'_>) -> usize {
        let (mut first, mut n_bytes) = (at, 0);
        while first > 0 && n_bytes < texts.reach() {
            first -= 1;
            n_bytes += texts.vocabulary.of(self.tokens[first]).len();
        }
        first
    }

    /// How many of the first `n` tokens have the marks that they would have in every prompt that begins with these.
    pub fn settled(&self, n: usize, texts: Texts<'_>) -> usize {
        if self.start > 0 {
            return 0;
        }
        let (mut from, mut n) = (0, n.min(self.tokens.len()));
        loop {
            let agreed = self.settled_from(from, n, texts);
            if agreed == n {
                return n;
            }
            // What the tokens that are left end with may be the beginning of a text again.
            n = agreed;
            from = self.in_reach_of(n, texts);
        }
    }

    /// The first of the tokens from `from` to `n` whose mark depends on what follows these, or is another; `n` if there is none.
    fn settled_from(&self, from: usize, n: usize, texts: Texts<'_>) -> usize {
        let ended = self.marks_of(from..n, texts, Next::Known(&[]));
        let open = self.marks_of(from..n, texts, Next::Unknown);
        let differs =
            |token: &usize| ended[token - from] != self.marks[*token] || open[token - from] != self.marks[*token];
        (from..n).find(differs).unwrap_or(n)
    }

    /// Takes the first `n` tokens of `other`, with their marks. It has none of its own yet.
    pub fn extend(&mut self, other: &Self, n: usize) {
        self.tokens.extend_from_slice(&other.tokens[..n]);
        self.marks.extend_from_slice(&other.marks[..n]);
    }

    /// The mark of a token; none where it is not known.
    pub fn mark_at(&self, token: usize) -> u64 {
        self.marks.get(token).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Token `i` is the `i`th: one without bytes, and halves of `é` among them.
    const VOCABULARY: [&[u8]; 10] = [b"", b"a", b"b", b"ab", b"ba", b"aab", b"\xc3", b"\xa9", b"b\xc3", b"\xa9a"];

    fn vocabulary() -> TokenBytes {
        TokenBytes::new(VOCABULARY)
    }

    fn boxed(texts: &[String]) -> Vec<Box<[u8]>> {
        texts.iter().map(|text| text.as_bytes().into()).collect()
    }

    /// By the definition: of each token of `prompt`, with `more` behind it, the texts that have a byte of it.
    fn defined(prompt: &[i32], more: &[u8], texts: &[Box<[u8]>]) -> Vec<u64> {
        let mut owner = Vec::new();
        let mut bytes = Vec::new();
        for (index, token) in prompt.iter().enumerate() {
            bytes.extend(VOCABULARY[*token as usize]);
            owner.resize(bytes.len(), index);
        }
        bytes.extend(more);
        let mut marks = vec![0; prompt.len()];
        for (index, text) in texts.iter().enumerate() {
            for start in (0..bytes.len()).filter(|start| bytes[*start..].starts_with(text)) {
                owner.iter().skip(start).take(text.len()).for_each(|token| marks[*token] |= 1 << index);
            }
        }
        marks
    }

    /// [`defined`] for every way in which one of the texts may go on behind `prompt`, and for none.
    fn in_any_way<'a>(prompt: &'a [i32], texts: &'a [Box<[u8]>]) -> impl Iterator<Item = Vec<u64>> + 'a {
        let ends = texts.iter().flat_map(|text| (0..=text.len()).map(|start| &text[start..]));
        ends.map(move |end| defined(prompt, end, texts))
    }

    fn at(start: usize, tokens: &[i32]) -> impl Iterator<Item = (TokenPosition, i32)> {
        (start as i32..).map(TokenPosition).zip(tokens.iter().copied())
    }

    /// Takes `tokens` from position `start` on as rows of `kind`, and gives their marks.
    fn take(
        spelt: &mut Spelt,
        texts: &[Box<[u8]>],
        start: usize,
        tokens: &[i32],
        kind: RowKind,
        next: Next<'_>,
    ) -> Vec<u64> {
        let vocabulary = vocabulary();
        assert!(spelt.take(at(start, tokens)));
        spelt.mark_taken(tokens.iter().map(|_| kind), Texts { texts, vocabulary: &vocabulary }, next);
        spelt.taken().to_vec()
    }

    /// Takes a prompt from position `start` on in parts that end before `cuts`, each with what follows it.
    fn take_parts(spelt: &mut Spelt, texts: &[Box<[u8]>], start: usize, prompt: &[i32], cuts: &[usize]) -> Vec<u64> {
        let mut cuts: Vec<usize> =
            cuts.iter().map(|cut| (*cut).clamp(start, prompt.len())).chain([start, prompt.len()]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let part = |cut: &[usize]| {
            let next = Next::Known(&prompt[cut[1]..]);
            take(spelt, texts, cut[0], &prompt[cut[0]..cut[1]], RowKind::Prompt, next)
        };
        cuts.windows(2).flat_map(part).collect()
    }

    #[test]
    fn tokens_that_spell_a_text_are_found_by_its_bytes() {
        let of = |tokens: &[&str], text: &str| tokens_spelling(tokens, text);
        assert_eq!(of(&["<s>", "a", " |", "prod", "|", " b"], "|prod|"), [2, 3, 4]);
        // A token that goes on beyond the text, one that has more before it, an empty one, and the text twice.
        assert_eq!(of(&["x|", "pro", "", "d|y", "z", "|prod|"], "|prod|"), [0, 1, 3, 5]);
        assert_eq!(of(&["aaa", "a"], "aa"), [0, 1]);
        assert_eq!(of(&["ab", "c"], "bd"), [] as [usize; 0]);
        assert_eq!(of(&["ab", "c"], ""), [] as [usize; 0]);
        assert_eq!(of(&[], "a"), [] as [usize; 0]);
        assert_eq!(tokens_spelling([&b"x\xc3"[..], b"\xa9", b"y"], "é"), [0, 1]);
    }

    #[test]
    fn tokens_have_their_bytes_by_id() {
        let vocabulary = vocabulary();
        assert!(VOCABULARY.iter().zip(0..).all(|(bytes, id)| vocabulary.of(id) == *bytes));
        assert!([-1, 10, i32::MIN, i32::MAX].iter().all(|id| vocabulary.of(*id).is_empty()));
    }

    #[test]
    fn a_text_may_begin_in_one_decode_and_end_in_another() {
        let texts = boxed(&["aé".to_owned()]);
        let (a, b, first, second) = (1, 2, 6, 7);
        let mut spelt = Spelt::default();
        let mut part =
            |start, tokens: &[i32], next: Next<'_>| take(&mut spelt, &texts, start, tokens, RowKind::Prompt, next);
        assert_eq!(part(0, &[b, a], Next::Known(&[first, second, b])), [0, 1]);
        assert_eq!(part(2, &[first], Next::Unknown), [1]);
        assert_eq!(part(3, &[second, a], Next::Known(&[first, b])), [1, 0], "it does not go on");
        assert_eq!(part(5, &[b, a, 0], Next::Unknown), [0, 1, 0], "it may go on; what has no bytes is no part of it");
        // Where the prompt ends, nothing follows.
        let kinds = [RowKind::Prompt, RowKind::PromptEnd, RowKind::Generated, RowKind::Prompt, RowKind::Prompt];
        let vocabulary = vocabulary();
        let asked = Texts { texts: &texts, vocabulary: &vocabulary };
        assert!(spelt.take(at(8, &[b, a, first, second, a])));
        spelt.mark_taken(kinds.into_iter(), asked, Next::Unknown);
        assert_eq!(spelt.taken(), [0, 0, 0, 1, 1], "an answer has no mark, but a text may end behind it");
    }

    #[test]
    fn behind_what_is_not_known_a_text_may_end() {
        let texts = boxed(&["aab".to_owned()]);
        let mut spelt = Spelt::default();
        let mut part =
            |start, tokens: &[i32]| take(&mut spelt, &texts, start, tokens, RowKind::Prompt, Next::Known(&[]));
        assert_eq!(part(4, &[2, 1, 2]), [1, 0, 0]);
        assert_eq!(part(5, &[1, 2]), [0, 0], "taken back");
        assert_eq!(part(9, &[3, 2]), [1, 0], "a gap");
        assert_eq!(part(0, &[3, 2]), [0, 0], "from the beginning");
        assert!(!spelt.take([(2, 1), (4, 2)].map(|(at, token)| (TokenPosition(at), token)).into_iter()));
        assert!(!spelt.take([(2, 1), (2, 2)].map(|(at, token)| (TokenPosition(at), token)).into_iter()));
        let mut part =
            |start, tokens: &[i32]| take(&mut spelt, &texts, start, tokens, RowKind::Prompt, Next::Known(&[]));
        assert_eq!(part(3, &[2]), [1]);
    }

    fn texts() -> impl Strategy<Value = Vec<Box<[u8]>>> {
        prop::collection::vec("[abé]{1,5}", 1..4).prop_map(|texts| boxed(&texts))
    }

    fn tokens(most: usize) -> impl Strategy<Value = Vec<i32>> {
        prop::collection::vec(0..VOCABULARY.len() as i32, 1..most)
    }

    proptest! {
        #[test]
        fn parts_change_nothing(texts in texts(), prompt in tokens(24), cuts in prop::collection::vec(0usize..24, 0..6)) {
            let found = take_parts(&mut Spelt::default(), &texts, 0, &prompt, &cuts);
            prop_assert_eq!(&found, &defined(&prompt, b"", &texts));
            for (index, text) in texts.iter().enumerate() {
                let spelling = tokens_spelling(prompt.iter().map(|token| VOCABULARY[*token as usize]), std::str::from_utf8(text).unwrap());
                let marked: Vec<usize> = (0..prompt.len()).filter(|token| found[*token] >> index & 1 == 1).collect();
                prop_assert_eq!(marked, spelling);
            }
        }

        /// Neither more nor less than what it takes whatever follows.
        #[test]
        fn where_it_is_not_known_what_follows_any_way_counts(texts in texts(), prompt in tokens(24)) {
            let found = take(&mut Spelt::default(), &texts, 0, &prompt, RowKind::Prompt, Next::Unknown);
            let mut expected = vec![0; prompt.len()];
            for marks in in_any_way(&prompt, &texts) {
                expected.iter_mut().zip(marks).for_each(|(any, mark)| *any |= mark);
            }
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn a_sequence_that_is_taken_back_goes_on_from_there(
            texts in texts(), first in tokens(16), second in tokens(16), back in any::<prop::sample::Index>(), cuts in prop::collection::vec(0usize..32, 0..4),
        ) {
            let back = back.index(first.len());
            let mut spelt = Spelt::default();
            take_parts(&mut spelt, &texts, 0, &first, &[]);
            let both = [&first[..back], &second].concat();
            let found = take_parts(&mut spelt, &texts, back, &both, &cuts);
            prop_assert_eq!(&found, &defined(&both, b"", &texts)[back..]);
        }

        /// Whatever a sequence was, what another one takes over of it is what it would have made of these tokens itself.
        #[test]
        fn what_is_taken_over_is_as_if_read_anew(
            texts in texts(), parts in prop::collection::vec((tokens(8), 0..4), 1..5), most in 0usize..40,
            more in tokens(8), cuts in prop::collection::vec(0usize..40, 0..4),
        ) {
            let vocabulary = vocabulary();
            let asked = Texts { texts: &texts, vocabulary: &vocabulary };
            let mut spelt = Spelt::default();
            let mut said: Vec<i32> = Vec::new();
            for (tokens, how) in &parts {
                let (kind, next) = match how {
                    0 => (RowKind::Generated, Next::Known(&[][..])),
                    1 => (RowKind::Prompt, Next::Unknown),
                    2 => (RowKind::Prompt, Next::Known(&more)),
                    _ => (RowKind::Prompt, Next::Known(&[])),
                };
                take(&mut spelt, &texts, said.len(), tokens, kind, next);
                said.extend(tokens);
            }
            let n = spelt.settled(most, asked);
            prop_assert!(n <= most.min(said.len()));
            prop_assert_eq!(spelt.settled(n, asked), n);
            for marks in in_any_way(&said[..n], &texts) {
                prop_assert_eq!(&marks, &spelt.marks[..n]);
            }
            let mut other = Spelt::default();
            other.extend(&spelt, n);
            let prompt = [&said[..n], &more].concat();
            let found = take_parts(&mut other, &texts, n, &prompt, &cuts);
            prop_assert_eq!([&other.marks[..n], &found[..]].concat(), defined(&prompt, b"", &texts));
        }

        /// No more is read anew than has to be.
        #[test]
        fn what_can_not_be_of_a_text_is_all_taken_over(prompt in tokens(24), n in 0usize..24) {
            let texts = boxed(&["x".to_owned(), "xab".to_owned()]);
            let vocabulary = vocabulary();
            let mut spelt = Spelt::default();
            take(&mut spelt, &texts, 0, &prompt, RowKind::Generated, Next::Unknown);
            prop_assert_eq!(spelt.settled(n, Texts { texts: &texts, vocabulary: &vocabulary }), n.min(prompt.len()));
        }
    }
}
