use super::SyntheticError;
use super::gguf::Value;
use std::collections::HashSet;

/// Tokens that every vocabulary here has: unknown, begin, end, a byte each, the space and the letters.
pub const MIN_VOCABULARY: u32 = 3 + 256 + 1 + 26;

/// A SentencePiece vocabulary with a token for every byte, so that any text has tokens and gives itself back.
///
/// The tokenizer joins two neighbours at a time, so every beginning of a word is a token too.
#[derive(Debug, Clone, PartialEq)]
pub struct Vocabulary {
    tokens: Vec<Token>,
    /// Texts after a space.
    words: HashSet<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    pub text: String,
    pub score: f32,
    pub kind: TokenKind,
}

/// llama.cpp's `enum llama_token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    Byte = 6,
}

const SPACE: char = '▁';
const UNKNOWN: u32 = 0;
const BEGIN: u32 = 1;
const END: u32 = 2;

impl Vocabulary {
    /// With `words`, each one token after a space; any other text goes by letters and bytes.
    pub fn new(words: &[&str]) -> Self {
        let mut vocabulary = Self { tokens: Vec::new(), words: HashSet::new() };
        vocabulary.add("<unk>".into(), 0.0, TokenKind::Unknown);
        vocabulary.add("<s>".into(), 0.0, TokenKind::Control);
        vocabulary.add("</s>".into(), 0.0, TokenKind::Control);
        (0..=255u8).for_each(|byte| vocabulary.add(format!("<0x{byte:02X}>"), 0.0, TokenKind::Byte));
        vocabulary.add_text(SPACE.into());
        ('a'..='z').for_each(|letter| vocabulary.add_text(letter.into()));
        for word in words {
            word.char_indices().for_each(|(at, letter)| vocabulary.add_word(&word[..at + letter.len_utf8()]));
        }
        vocabulary
    }

    /// Adds made-up words up to `n` tokens: of one letter, of two, and so on.
    ///
    /// # Errors
    /// There are more than `n` already.
    pub fn filled(mut self, n: u32) -> Result<Self, SyntheticError> {
        let least = self.tokens.len() as u32;
        if n < least {
            return Err(SyntheticError::Size { what: "the vocabulary", found: n, least, most: super::shape::MOST });
        }
        let letters = || ('a'..='z').map(String::from);
        let mut words: Vec<String> = letters().collect();
        loop {
            for word in &words {
                if self.tokens.len() as u32 == n {
                    return Ok(self);
                }
                self.add_word(word);
            }
            words = words.iter().flat_map(|word| letters().map(move |letter| format!("{word}{letter}"))).collect();
        }
    }

    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    fn add(&mut self, text: String, score: f32, kind: TokenKind) {
        self.tokens.push(Token { text, score, kind });
    }

    /// A token that the tokenizer prefers to those that come after it.
    fn add_text(&mut self, text: String) {
        let before = self.tokens.iter().rev().find(|token| token.kind == TokenKind::Normal);
        let score = before.map_or(0.0, |token| token.score - 1.0);
        self.add(text, score, TokenKind::Normal);
    }

    fn add_word(&mut self, word: &str) {
        if self.words.insert(word.to_owned()) {
            self.add_text(format!("{SPACE}{word}"));
        }
    }

    /// What the file says of it.
    pub fn metadata(&self) -> Vec<(String, Value)> {
        let of = |key: &str, value: Value| (format!("tokenizer.ggml.{key}"), value);
        let tokens = || self.tokens.iter();
        vec![
            of("model", Value::Text("llama".to_owned())),
            of("tokens", Value::Texts(tokens().map(|token| token.text.clone()).collect())),
            of("scores", Value::Floats(tokens().map(|token| token.score).collect())),
            of("token_type", Value::Ints(tokens().map(|token| token.kind as i32).collect())),
            of("unknown_token_id", Value::Uint32(UNKNOWN)),
            of("bos_token_id", Value::Uint32(BEGIN)),
            of("eos_token_id", Value::Uint32(END)),
            of("add_bos_token", Value::Bool(true)),
            of("add_eos_token", Value::Bool(false)),
            // So that the tokens spell the text.
            of("add_space_prefix", Value::Bool(false)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filled_vocabulary_has_every_beginning_and_nothing_twice() {
        for n in [MIN_VOCABULARY, MIN_VOCABULARY + 5, 2000, 49_152] {
            let vocabulary = Vocabulary::new(&[]).filled(n).unwrap();
            assert_eq!(vocabulary.tokens().len(), n as usize);
            let texts: HashSet<&str> = vocabulary.tokens().iter().map(|token| token.text.as_str()).collect();
            assert_eq!(texts.len(), n as usize);
            for text in texts.iter().filter(|text| text.starts_with(SPACE) && text.chars().count() > 2) {
                assert!(texts.contains(&text[..text.len() - 1]), "{text}");
            }
        }
    }

    #[test]
    fn words_are_not_made_up_again() {
        let vocabulary = Vocabulary::new(&["sea", "set"]).filled(400).unwrap();
        let count = |text: &str| vocabulary.tokens().iter().filter(|token| token.text == text).count();
        assert_eq!(["▁s", "▁se", "▁sea", "▁set", "▁a"].map(count), [1; 5]);
        assert!(Vocabulary::new(&["sea"]).filled(MIN_VOCABULARY).is_err());
    }
}
