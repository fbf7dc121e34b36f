/// Pairs `(source, target)` of indices of tokens that end at the same byte of one text, in order; no token is in two pairs.
///
/// `source_ends` and `target_ends` are, for each token of either tokenizer, the byte offset in the text where it ends. A token
/// that adds no bytes (BOS, EOS and their like), and so ends where the tokens before it do, never pairs; nor does one that ends
/// before them.
pub fn align_tokens(source_ends: &[usize], target_ends: &[usize]) -> Vec<(usize, usize)> {
    let mut targets = growing_ends(target_ends).peekable();
    let mut pairs = Vec::new();
    for (source, source_end) in growing_ends(source_ends) {
        while targets.next_if(|(_, target_end)| *target_end < source_end).is_some() {}
        if let Some((target, _)) = targets.next_if(|(_, target_end)| *target_end == source_end) {
            pairs.push((source, target));
        }
    }
    pairs
}

/// The tokens that add bytes, with where they end.
fn growing_ends(ends: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    let mut reached = 0;
    ends.iter().copied().enumerate().filter(move |(_, end)| {
        let grows = *end > reached;
        reached = reached.max(*end);
        grows
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tokens_pair_where_they_end_together() {
        // "the cat sat", as `the| cat| sat` with BOS and EOS, and as `t|he| ca|t sat`.
        assert_eq!(align_tokens(&[0, 3, 7, 11, 11], &[1, 3, 6, 11]), [(1, 1), (3, 3)]);
        assert_eq!(align_tokens(&[0, 0], &[0]), []);
        assert_eq!(align_tokens(&[], &[4]), []);
    }

    /// Ends of tokens of which some add no bytes.
    fn ends() -> impl Strategy<Value = Vec<usize>> {
        proptest::collection::vec(0usize..4, 0..40).prop_map(|lengths| {
            lengths
                .into_iter()
                .scan(0, |end, length| {
                    *end += length;
                    Some(*end)
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn pairs_are_exactly_the_shared_ends(source in ends(), target in ends()) {
            let adds_bytes = |ends: &[usize], token: usize| ends[token] > token.checked_sub(1).map_or(0, |last| ends[last]);
            let mut expected = Vec::new();
            for s in 0..source.len() {
                for t in 0..target.len() {
                    if source[s] == target[t] && adds_bytes(&source, s) && adds_bytes(&target, t) {
                        expected.push((s, t));
                    }
                }
            }
            prop_assert_eq!(align_tokens(&source, &target), expected);
        }

        #[test]
        fn no_token_pairs_twice_even_when_ends_go_back(
            source in proptest::collection::vec(0usize..20, 0..30),
            target in proptest::collection::vec(0usize..20, 0..30),
        ) {
            let pairs = align_tokens(&source, &target);
            prop_assert!(pairs.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1));
            prop_assert!(pairs.iter().all(|(s, t)| source[*s] == target[*t]));
        }
    }
}
