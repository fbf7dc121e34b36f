//! Python code as far as a rule has to read it: what is a string, what is called with what, and what a string is put together from.

use std::ops::Range;

/// Code whose comments are blank, with what lies in strings.
pub(super) struct Source {
    text: String,
    /// Of each byte, whether it is of a string, its quotes and prefix included.
    in_string: Vec<bool>,
    /// Of each string, whether it is an f-string that holds a place to fill.
    strings: Vec<(Range<usize>, bool)>,
}

impl Source {
    /// The code in `answer`: what stands in fences where there are any, else all of it. A fence that is not closed goes on to the end.
    pub fn of(answer: &str) -> Self {
        let mut fenced = answer.split("```").skip(1).step_by(2).peekable();
        let text = if fenced.peek().is_some() {
            // The language behind the fence is no code.
            fenced.map(|block| block.split_once('\n').map_or(block, |(_, code)| code)).collect::<Vec<_>>().join("\n")
        } else {
            answer.to_owned()
        };
        Self::scan(text)
    }

    fn scan(text: String) -> Self {
        let mut bytes = text.into_bytes();
        let mut in_string = vec![false; bytes.len()];
        let mut strings = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            match bytes[at] {
                b'#' => {
                    while at < bytes.len() && bytes[at] != b'\n' {
                        bytes[at] = b' ';
                        at += 1;
                    }
                }
                quote @ (b'"' | b'\'') => {
                    let n_prefix = bytes[..at].iter().rev().take_while(|byte| byte.is_ascii_alphabetic()).count();
                    // A name that ends before a quote is no prefix; nor is a longer word.
                    let prefix = &bytes[at - n_prefix..at];
                    let is_prefix = n_prefix <= 2
                        && prefix.iter().all(|letter| b"rRbBuUfF".contains(letter))
                        && !(at > n_prefix && is_name(bytes[at - n_prefix - 1]));
                    let start = if is_prefix { at - n_prefix } else { at };
                    let end = string_end(&bytes, at, quote);
                    let formatted = bytes[start..at].iter().any(|byte| byte.eq_ignore_ascii_case(&b'f'));
                    let filled = formatted && bytes[at..end].contains(&b'{');
                    in_string[start..end].fill(true);
                    if filled {
                        unmark_filled(&bytes[at..end], &mut in_string[at..end]);
                    }
                    strings.push((start..end, filled));
                    at = end;
                }
                _ => at += 1,
            }
        }
        // Comments became spaces, byte by byte, so what is left may be no UTF-8 only if it was none.
        let text = String::from_utf8(bytes).expect("whole characters were blanked");
        Self { text, in_string, strings }
    }

    /// All of it.
    pub fn whole(&self) -> Range<usize> {
        0..self.text.len()
    }

    pub fn text(&self, range: Range<usize>) -> &str {
        &self.text[range]
    }

    /// Where `word` stands in code, not in a string, and not as part of a longer name. A word that begins with a full stop is of anything.
    pub fn words(&self, word: &str) -> impl Iterator<Item = usize> {
        let bytes = self.text.as_bytes();
        self.text.match_indices(word).map(|(at, _)| at).filter(move |&at| {
            let before = at.checked_sub(1).map(|before| bytes[before]);
            let own = word.starts_with('.') || !before.is_some_and(|byte| is_name(byte) || byte == b'.');
            let ends = !bytes.get(at + word.len()).is_some_and(|byte| is_name(*byte));
            !self.in_string[at] && own && ends
        })
    }

    pub fn has(&self, word: &str) -> bool {
        self.words(word).next().is_some()
    }

    /// The arguments of each call of `name`, without the brackets; up to the end where the answer was cut off.
    pub fn calls(&self, name: &str) -> Vec<Range<usize>> {
        let bytes = self.text.as_bytes();
        let arguments = |at: usize| {
            let open = at + name.len() + bytes[at + name.len()..].iter().take_while(|byte| **byte == b' ').count();
            (bytes.get(open) == Some(&b'('))
                .then(|| open + 1..self.until(open + 1, |byte, depth| byte == b')' && depth == 0))
        };
        self.words(name).filter_map(arguments).collect()
    }

    pub fn calls_any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| !self.calls(name).is_empty())
    }

    /// `keyword=value` in `range`, however it is spaced.
    pub fn sets(&self, range: Range<usize>, keyword: &str, value: &str) -> bool {
        self.words(keyword).filter(|at| range.contains(at)).any(|at| {
            let rest = self.text[at + keyword.len()..].trim_start();
            let set = rest.strip_prefix('=').filter(|rest| !rest.starts_with('='));
            set.is_some_and(|rest| rest.trim_start().starts_with(value))
        })
    }

    /// The first positional argument of a call with these arguments, and whether another follows.
    pub fn first_argument(&self, arguments: &Range<usize>) -> (Range<usize>, bool) {
        let end = self.until(arguments.start, |byte, depth| byte == b',' && depth == 0).min(arguments.end);
        let more = end < arguments.end && !self.text[end + 1..arguments.end].trim().is_empty();
        (arguments.start..end, more)
    }

    /// What stands in `range`, and where it is a name, all that is assigned to it.
    pub fn resolved(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let name = self.text[range.clone()].trim();
        if name.is_empty() || !name.bytes().all(is_name) {
            return vec![range];
        }
        let assigned = |at: usize| {
            let rest = &self.text[at + name.len()..];
            let spaces = rest.len() - rest.trim_start_matches(' ').len();
            let begins_line = self.text[..at].rsplit('\n').next().is_some_and(|line| line.trim().is_empty());
            let sign = rest[spaces..].strip_prefix("+=").or_else(|| rest[spaces..].strip_prefix('='))?;
            let value = self.text.len() - sign.len();
            (begins_line && !sign.starts_with('='))
                .then(|| value..self.until(value, |byte, depth| byte == b'\n' && depth == 0))
        };
        self.words(name).filter_map(assigned).collect()
    }

    /// Whether a string in `range` is put together with something: filled in, formatted or added to.
    pub fn builds_string(&self, range: &Range<usize>) -> bool {
        let mut own = self.strings.iter().filter(|(string, _)| range.contains(&string.start)).peekable();
        if own.peek().is_none() {
            return false;
        }
        let joined = range.clone().any(|at| !self.in_string[at] && matches!(self.text.as_bytes()[at], b'+' | b'%'));
        own.any(|(_, filled)| *filled) || joined || self.words(".format").any(|at| range.contains(&at))
    }

    /// Strings that hold `text`, widened to the statement that they stand in.
    pub fn statements_with(&self, text: &str) -> Vec<Range<usize>> {
        let holding = self.strings.iter().filter(|(string, _)| self.text[string.clone()].contains(text));
        let statement = |(string, _): &(Range<usize>, bool)| {
            let start = (0..string.start).rev().find(|at| self.text.as_bytes()[*at] == b'\n' && !self.in_string[*at]);
            let start = start.map_or(0, |at| at + 1);
            start..self.until(start, |byte, depth| byte == b'\n' && depth == 0).max(string.end)
        };
        holding.map(statement).collect()
    }

    /// Lines, with what is not of a string.
    pub fn lines_without_strings(&self) -> Vec<String> {
        let bare: String =
            self.text.char_indices().map(|(at, c)| if self.in_string[at] && c != '\n' { '_' } else { c }).collect();
        bare.lines().map(str::to_owned).collect()
    }

    /// The first byte from `start` on that ends what stands there, told of its depth in brackets; else the end. A bracket that closes one
    /// opened before `start` ends it too.
    fn until(&self, start: usize, ends: impl Fn(u8, usize) -> bool) -> usize {
        let mut depth = 0usize;
        for at in start..self.text.len() {
            let byte = self.text.as_bytes()[at];
            if self.in_string[at] {
                continue;
            }
            if ends(byte, depth) {
                return at;
            }
            match byte {
                b'(' | b'[' | b'{' => depth += 1,
                b')' | b']' | b'}' if depth == 0 => return at,
                b')' | b']' | b'}' => depth -= 1,
                _ => {}
            }
        }
        self.text.len()
    }
}

/// What stands in the braces of an f-string is code; the braces stay, so that they open nothing.
fn unmark_filled(bytes: &[u8], in_string: &mut [bool]) {
    let (mut depth, mut at) = (0usize, 0);
    while at < bytes.len() {
        match bytes[at] {
            b'{' if depth == 0 && bytes.get(at + 1) == Some(&b'{') => at += 1,
            b'{' => depth += 1,
            b'}' => depth = depth.saturating_sub(1),
            byte => in_string[at] = depth == 0 || byte == b'"' || byte == b'\'',
        }
        at += 1;
    }
}

/// Where the string that `quote` at `at` opens has ended: behind its closing quote, for a short one at the end of its line at the latest.
fn string_end(bytes: &[u8], at: usize, quote: u8) -> usize {
    let long = bytes[at..].starts_with(&[quote; 3]);
    let mut end = at + if long { 3 } else { 1 };
    while end < bytes.len() {
        match bytes[end] {
            b'\\' => end += 1,
            b'\n' if !long => return end,
            byte if byte == quote && !long => return end + 1,
            byte if byte == quote && bytes[end..].starts_with(&[quote; 3]) => return end + 3,
            _ => {}
        }
        end += 1;
    }
    bytes.len()
}

fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}
