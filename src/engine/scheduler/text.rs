//! From the bytes of tokens to text that can be shown: whole characters, and nothing of a stop string.

/// Text as it comes, token by token.
#[derive(Debug, Default)]
pub struct TextStream {
    stops: Vec<Vec<u8>>,
    /// What can't be shown yet: half a character, or what may be the beginning of a stop string.
    held: Vec<u8>,
}

/// What a token added to the text.
#[derive(Debug, PartialEq, Eq)]
pub struct Streamed {
    pub text: String,
    /// Index of the stop string that ends the text here; it is not part of it.
    pub stopped_by: Option<usize>,
}

impl TextStream {
    /// A text that ends before the first of `stops` to be complete. Empty ones are no stop strings.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.iter().map(|stop| stop.clone().into_bytes()).collect(), held: Vec::new() }
    }

    /// Takes the next bytes, and gives what can be shown now. Bytes that are no UTF-8 become `�`.
    pub fn push(&mut self, bytes: &[u8]) -> Streamed {
        let before = self.held.len();
        self.held.extend_from_slice(bytes);
        for end in before + 1..=self.held.len() {
            let ends_here = |stop: &&Vec<u8>| !stop.is_empty() && self.held[..end].ends_with(stop);
            // Of several that end here, the longest.
            if let Some(stop) = self.stops.iter().filter(ends_here).max_by_key(|stop| stop.len()) {
                let stopped_by = self.stops.iter().position(|other| other == stop);
                let text = String::from_utf8_lossy(&self.held[..end - stop.len()]).into_owned();
                self.held.clear();
                return Streamed { text, stopped_by };
            }
        }
        let shown = whole_characters(&self.held[..self.held.len() - self.may_be_stop()]);
        let text = String::from_utf8_lossy(&self.held[..shown]).into_owned();
        self.held.drain(..shown);
        Streamed { text, stopped_by: None }
    }

    /// What is left when no more comes.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }

    /// Bytes at the end that a stop string may begin with.
    fn may_be_stop(&self) -> usize {
        let longest = |stop: &Vec<u8>| {
            let most = stop.len().saturating_sub(1).min(self.held.len());
            (1..=most).rev().find(|n| self.held.ends_with(&stop[..*n])).unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

/// Length of `bytes` without a character at its end that is not complete yet.
fn whole_characters(bytes: &[u8]) -> usize {
    let last = bytes.utf8_chunks().last().map_or(&[][..], |chunk| chunk.invalid());
    let begun = std::str::from_utf8(last).is_err_and(|error| error.error_len().is_none());
    bytes.len() - if begun { last.len() } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream(stops: &[&str]) -> TextStream {
        TextStream::new(&stops.iter().map(|stop| (*stop).to_owned()).collect::<Vec<_>>())
    }

    fn shown(text: &str) -> Streamed {
        Streamed { text: text.into(), stopped_by: None }
    }

    #[test]
    fn what_may_be_a_stop_string_is_held_back() {
        let mut stream = stream(&["\n\nUser:", "END"]);
        assert_eq!(stream.push(b"so\n"), shown("so"));
        assert_eq!(stream.push(b"\nUs"), shown(""));
        assert_eq!(stream.push(b"ually E"), shown("\n\nUsually "));
        assert_eq!(stream.push(b"NDed"), Streamed { text: String::new(), stopped_by: Some(1) });
        assert_eq!(stream.push(b" E"), shown(" "));
        assert_eq!(stream.finish(), "E");
    }

    #[test]
    fn characters_are_shown_whole() {
        let mut stream = stream(&[]);
        let fish = "🐟".as_bytes();
        assert_eq!(stream.push(&fish[..1]), shown(""));
        assert_eq!(stream.push(&fish[1..3]), shown(""));
        assert_eq!(stream.push(&fish[3..]), shown("🐟"));
        assert_eq!(stream.push(b"a\xffb\xf0"), shown("a\u{fffd}b"));
        assert_eq!(stream.finish(), "\u{fffd}");
    }

    /// Where the text must end, by its definition: before the stop string that is complete first, the longest of several.
    fn expected(text: &str, stops: &[String]) -> String {
        let ends = (1..=text.len()).find_map(|end| {
            let ends_here = |stop: &&String| !stop.is_empty() && text.as_bytes()[..end].ends_with(stop.as_bytes());
            stops.iter().filter(ends_here).map(String::len).max().map(|length| end - length)
        });
        text[..ends.unwrap_or(text.len())].to_owned()
    }

    proptest! {
        #[test]
        fn however_it_is_cut_the_text_is_the_same(
            text in "[abé🐟]{0,24}",
            stops in prop::collection::vec("[abé🐟]{0,4}", 0..4),
            cuts in prop::collection::vec(0usize..64, 0..12),
        ) {
            let mut stream = TextStream::new(&stops);
            let mut found = String::new();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let mut stopped = false;
            for piece in cuts.windows(2) {
                let streamed = stream.push(&text.as_bytes()[piece[0]..piece[1]]);
                found += &streamed.text;
                // What was shown is never taken back.
                prop_assert!(expected(&text, &stops).starts_with(&found));
                if streamed.stopped_by.is_some() {
                    stopped = true;
                    break;
                }
            }
            if !stopped {
                found += &stream.finish();
            }
            prop_assert_eq!(found, expected(&text, &stops));
        }
    }
}
