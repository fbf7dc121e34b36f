use super::args::TokensArguments;
use super::models::load;
use super::{Outcome, prompts};
use anyhow::Context;
use llama_cpp_2::token::LlamaToken;
use serde::Serialize;
use std::io::Write;

#[derive(Serialize)]
struct TokensLine {
    index: usize,
    tokens: Vec<i32>,
    /// Of the record's answer, as it would be read after the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<Vec<i32>>,
}

/// Prints the tokens that the model reads for each prompt, in its template, and those of the answer that a record has.
pub fn tokens(arguments: TokensArguments) -> anyhow::Result<Outcome> {
    let prompts = prompts::read_records(&arguments.prompts)?;
    let model = load(&arguments.model)?;
    let vocab = model.llama().vocab();
    let mut out = std::io::stdout().lock();
    for (index, prompt) in prompts.iter().enumerate() {
        let tokens = model.tokens_read(None, &prompt.prompt).with_context(|| format!("prompt {index}"))?;
        let answer = prompt.text("answer").map(|answer| model.text_tokens(answer));
        if arguments.json {
            let ids = |tokens: Vec<LlamaToken>| tokens.into_iter().map(|token| token.0).collect();
            let line = TokensLine { index, tokens: ids(tokens), answer: answer.map(ids) };
            writeln!(out, "{}", serde_json::to_string(&line)?)?;
            continue;
        }
        let pieces = tokens.iter().chain(answer.iter().flatten()).map(|token| {
            let piece = vocab.token_to_piece(*token, true, None);
            format!("{:?}", String::from_utf8_lossy(&piece))
        });
        writeln!(out, "{}", pieces.collect::<Vec<_>>().join(" "))?;
    }
    Ok(Outcome::Done)
}
