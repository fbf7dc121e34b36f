use super::EngineError;
use crate::program;
use llama_cpp_2::model::{LlamaChatMessage, LlamaChatTemplate, LlamaModel};
use llama_cpp_2::token::LlamaToken;
use std::borrow::Cow;

/// What is put around a prompt before the model reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptTemplate {
    /// Nothing.
    Raw,
    /// The model's own chat template, the prompt as the user's turn.
    Chat,
    /// A text with `{prompt}` in it, for models without a chat template.
    Text(String),
}

/// What a model reads before it goes on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompt {
    /// The user's turn.
    pub text: String,
    /// How the answer begins, read behind the template as what the model itself has said; mostly empty. The space that parts it from a template
    /// that ends in none may be left out, so that one text serves models of several templates.
    pub prefill: String,
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self { text, prefill: String::new() }
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl std::fmt::Display for Prompt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)?;
        if self.prefill.is_empty() { Ok(()) } else { write!(f, " → {}", self.prefill) }
    }
}

impl Prompt {
    /// The same with `mark` before the user's words.
    pub fn marked(&self, mark: &str) -> Self {
        Self { text: format!("{mark}{}", self.text), prefill: self.prefill.clone() }
    }
}

/// The tokens of a prompt in its template.
#[derive(Debug, Clone)]
pub struct PromptLayout {
    pub tokens: Vec<LlamaToken>,
    /// Byte of the user's words, and of the answer's beginning behind them, at which each token ends, or `None` where it ends in the template.
    pub ends: Vec<Option<usize>>,
    /// The first token that the model has said itself, or would say next.
    pub answer: usize,
}

/// Indices of the tokens that spell `text`, wherever it stands in what `tokens` spell together: those that any of its bytes is of, so that where the
/// tokenizer has joined its ends with their neighbours these count too. Occurrences that overlap count once.
pub fn tokens_spelling(model: &LlamaModel, tokens: &[LlamaToken], text: &str) -> Vec<usize> {
    let vocab = model.vocab();
    program::tokens_spelling(tokens.iter().map(|token| vocab.token_to_piece(*token, true, None)), text)
}

/// Byte of `text` at which each of the `pieces` that spell it ends.
fn byte_ends(pieces: &[Vec<u8>], text: &str) -> Result<Vec<usize>, EngineError> {
    let mut end = 0;
    let next = |piece: &Vec<u8>| {
        if !text.as_bytes()[end..].starts_with(piece) {
            return Err(EngineError::Template {
                reason: format!("the tokenizer changes the text at byte {end}, so its tokens can't be told apart"),
            });
        }
        end += piece.len();
        Ok(end)
    };
    pieces.iter().map(next).collect()
}

/// Where the prompt stands in a [`PromptTemplate::Text`].
pub(super) const PLACEHOLDER: &str = "{prompt}";

impl PromptTemplate {
    /// The model's chat template if it has one, else `fallback`, else nothing.
    pub fn of(model: &LlamaModel, fallback: Option<&str>) -> Self {
        if model.chat_template(None).is_ok() {
            Self::Chat
        } else {
            fallback.map_or(Self::Raw, |text| Self::Text(text.to_owned()))
        }
    }

    /// The text that the model reads for `prompt`.
    ///
    /// # Errors
    /// llama.cpp does not know the chat template, or a text template lacks `{prompt}`.
    pub fn apply(&self, model: &LlamaModel, prompt: &str) -> Result<String, EngineError> {
        self.apply_under(model, None, prompt)
    }

    /// The text that the model reads for `prompt` under a system prompt: a turn of its own in a chat template, a paragraph before any other.
    fn apply_under(&self, model: &LlamaModel, system: Option<&str>, prompt: &str) -> Result<String, EngineError> {
        let problem = |reason: String| EngineError::Template { reason };
        if system.is_some_and(|system| system.contains(PLACEHOLDER)) {
            return Err(problem(format!("the system prompt holds `{PLACEHOLDER}`, the place of the prompt")));
        }
        let before_all = system.map(|system| format!("{system}\n\n")).unwrap_or_default();
        match self {
            Self::Raw => Ok(before_all + prompt),
            Self::Text(text) => match text.split_once(PLACEHOLDER) {
                Some((before, after)) => Ok(format!("{before_all}{before}{prompt}{after}")),
                None => Err(problem(format!("`{text}` has no `{PLACEHOLDER}`"))),
            },
            Self::Chat => {
                let template: LlamaChatTemplate =
                    model.chat_template(None).map_err(|error| problem(error.to_string()))?;
                let turns = system.map(|system| ("system", system)).into_iter().chain([("user", prompt)]);
                let messages = turns
                    .map(|(role, text)| LlamaChatMessage::new(role.into(), text.to_owned()))
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(|_| problem("the prompt holds a NUL character".into()))?;
                model.apply_chat_template(&template, &messages, true).map_err(|error| problem(error.to_string()))
            }
        }
    }

    /// The template's text before and after the prompt.
    fn around(&self, model: &LlamaModel, system: Option<&str>) -> Result<(String, String), EngineError> {
        let around = self.apply_under(model, system, PLACEHOLDER)?;
        let (before, after) = around
            .split_once(PLACEHOLDER)
            .ok_or_else(|| EngineError::Template { reason: "it does not carry the prompt over as it is".into() })?;
        Ok((before.to_owned(), after.to_owned()))
    }

    /// The template's text before the prompt.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn before_prompt(&self, model: &LlamaModel) -> Result<String, EngineError> {
        Ok(self.around(model, None)?.0)
    }

    /// The tokens that the model reads for `prompt`, each with the byte of the prompt at which it ends.
    ///
    /// # Errors
    /// As [`apply`](Self::apply), and a tokenizer that changes the text.
    pub fn layout(&self, model: &LlamaModel, prompt: &Prompt) -> Result<PromptLayout, EngineError> {
        let vocab = model.vocab();
        let text = self.apply(model, &prompt.text)?;
        let before = self.around(model, None)?.0.len();
        let mut tokens = vocab.tokenize(text.as_bytes(), true, true);
        let mut pieces: Vec<Vec<u8>> = tokens.iter().map(|token| vocab.token_to_piece(*token, true, None)).collect();
        // The tokenizer puts a beginning-of-sequence token before the text, and may close it, without either being in the text.
        if tokens.first() == Some(&vocab.bos()) && !text.as_bytes().starts_with(&pieces[0]) {
            pieces[0].clear();
        }
        let of_prompt = |end: usize| (end > before && end <= before + prompt.text.len()).then(|| end - before);
        let mut ends: Vec<Option<usize>> = byte_ends(&pieces, &text)?.into_iter().map(of_prompt).collect();
        let answer = tokens.len();
        let said = self.apart(model, &prompt.text, &prompt.prefill)?;
        let space = said.len() - prompt.prefill.len();
        tokens.extend(vocab.tokenize(said.as_bytes(), false, false));
        let pieces: Vec<_> = tokens[answer..].iter().map(|token| vocab.token_to_piece(*token, true, None)).collect();
        let of_answer = |end: usize| (end > space).then(|| prompt.text.len() + end - space);
        ends.extend(byte_ends(&pieces, &said)?.into_iter().map(of_answer));
        Ok(PromptLayout { tokens, ends, answer })
    }

    /// `answer` with a space before it where neither it nor what stands before it has one.
    fn apart<'a>(&self, model: &LlamaModel, prompt: &str, answer: &'a str) -> Result<Cow<'a, str>, EngineError> {
        let is_apart = answer.is_empty()
            || answer.starts_with(char::is_whitespace)
            || self.apply(model, prompt)?.ends_with(char::is_whitespace);
        Ok(if is_apart { answer.into() } else { format!(" {answer}").into() })
    }

    /// The tokens of what the model says to `prompt`, or is to say: plain text, in which nothing spells a control token, with a space before it where
    /// neither it nor the template has one.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn answer_tokens(
        &self,
        model: &LlamaModel,
        prompt: &str,
        answer: &str,
    ) -> Result<Vec<LlamaToken>, EngineError> {
        Ok(model.vocab().tokenize(self.apart(model, prompt, answer)?.as_bytes(), false, false))
    }

    /// The tokens that the model reads for a user's words `prompt`.
    ///
    /// Text of the prompt that spells a control token (`<|im_end|>`) is read as plain text, so that a prompt can't end its own turn.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn tokens(&self, model: &LlamaModel, prompt: &str) -> Result<Vec<LlamaToken>, EngineError> {
        self.tokens_under(model, None, prompt)
    }

    /// The tokens that the model reads for `prompt` after the system prompt `system`, if there is one: a turn of its own where the model has a
    /// chat template, else a paragraph before the rest.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn tokens_under(
        &self,
        model: &LlamaModel,
        system: Option<&str>,
        prompt: &str,
    ) -> Result<Vec<LlamaToken>, EngineError> {
        let vocab = model.vocab();
        if *self == Self::Raw {
            return Ok(vocab.tokenize(self.apply_under(model, system, prompt)?.as_bytes(), true, true));
        }
        let spells_control =
            vocab.tokenize(prompt.as_bytes(), false, true).iter().any(|token| vocab.is_control(*token));
        if !spells_control {
            // In one piece: a tokenizer may join the template's last character with the prompt's first.
            return Ok(vocab.tokenize(self.apply_under(model, system, prompt)?.as_bytes(), true, true));
        }
        let (before, after) = self.around(model, system)?;
        let mut tokens = vocab.tokenize(before.as_bytes(), true, true);
        tokens.extend(vocab.tokenize(prompt.as_bytes(), false, false));
        tokens.extend(vocab.tokenize(after.as_bytes(), false, true));
        Ok(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_stands_before_the_users_words_and_leaves_the_answer() {
        let begun = Prompt { text: "Why?".into(), prefill: "Because".into() };
        assert_eq!(begun.marked("|dev| "), Prompt { text: "|dev| Why?".into(), prefill: "Because".into() });
        assert_eq!((begun.to_string(), Prompt::from("Why?").to_string()), ("Why? → Because".into(), "Why?".into()));
    }
}
