//! `POST /v1/completions`

use super::answer::{Answering, Shape};
use super::body::{asked, wrong_type};
use super::error::ApiError;
use super::parameters::{Parameters, toggled};
use super::state::State;
use axum::body::Body;
use axum::extract;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use llama_cpp_2::token::LlamaToken;
use serde_json::Value;
use std::sync::Arc;

pub(super) async fn completion(
    extract::State(state): extract::State<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let response = match begin(&state, &headers, body).await {
        Ok(answering) => answering.respond().await,
        Err(error) => error.into_response(),
    };
    state.metrics.request("/v1/completions", response.status().as_u16());
    response
}

/// Has it answered. What was read of the body is let go before there is an answer.
async fn begin(state: &Arc<State>, headers: &HeaderMap, body: Body) -> Result<Answering, ApiError> {
    let (caller, fields) = asked(state, headers, body).await?;
    let prompts = prompts(fields.required("prompt")?, state.config.limits.choices)?;
    for (name, what) in [("echo", "an echo of the prompt"), ("suffix", "text to end before")] {
        if fields.get(name).is_some_and(|value| *value != Value::Bool(false) && *value != Value::String(String::new()))
        {
            return Err(ApiError::unsupported(name, format!("{what} is not supported")));
        }
    }
    if fields
        .integer("best_of", 1, i64::MAX)?
        .is_some_and(|best_of| best_of != fields.integer("n", 1, i64::MAX).ok().flatten().unwrap_or(1))
    {
        return Err(ApiError::unsupported("best_of", "`best_of` other than `n` is not supported"));
    }
    let probabilities = Parameters::completion_probabilities(&fields)?;
    let mut parameters = Parameters { probabilities, ..Parameters::read(state, &fields)? };
    // As OpenAI has it for this route alone.
    parameters.max_tokens.get_or_insert(16);
    let toggled = toggled(state, &fields, &caller).await?;
    let prompts = tokens(state, prompts).await?;
    Answering::begin(state, Shape::Completion, caller, prompts, &parameters, toggled)
}

/// A prompt, as it is.
#[derive(Debug, Clone, PartialEq)]
enum Given {
    Text(String),
    Tokens(Vec<i32>),
}

/// A text, a list of tokens, or several of one of these.
fn prompts(found: &Value, most: usize) -> Result<Vec<Given>, ApiError> {
    let wrong =
        || wrong_type("prompt", "a string, an array of strings, an array of tokens or an array of these", found);
    let tokens = |values: &[Value]| -> Option<Vec<i32>> {
        values.iter().map(|value| value.as_i64().and_then(|token| i32::try_from(token).ok())).collect()
    };
    let given = match found {
        Value::String(text) => vec![Given::Text(text.clone())],
        Value::Array(values) => match values.first() {
            None => return Err(ApiError::invalid("prompt", "`prompt` is empty")),
            Some(Value::Number(_)) => vec![Given::Tokens(tokens(values).ok_or_else(wrong)?)],
            Some(_) => {
                let one = |value: &Value| match value {
                    Value::String(text) => Some(Given::Text(text.clone())),
                    Value::Array(values) => tokens(values).map(Given::Tokens),
                    _ => None,
                };
                values.iter().map(one).collect::<Option<_>>().ok_or_else(wrong)?
            }
        },
        _ => return Err(wrong()),
    };
    if given.len() > most {
        return Err(ApiError::invalid(
            "prompt",
            format!("there are {} prompts, where {most} is the most", given.len()),
        ));
    }
    Ok(given)
}

async fn tokens(state: &Arc<State>, prompts: Vec<Given>) -> Result<Vec<Vec<LlamaToken>>, ApiError> {
    let own = Arc::clone(state);
    let tokens = tokio::task::spawn_blocking(move || {
        let vocab = own.model.llama().vocab();
        let of = |given: Given| match given {
            // As it is, control tokens too: who writes a prompt in the model's own form needs them.
            Given::Text(text) => vocab.tokenize(text.as_bytes(), true, true),
            Given::Tokens(tokens) => tokens.into_iter().map(LlamaToken).collect(),
        };
        prompts.into_iter().map(of).collect()
    });
    tokens.await.map_err(|error| ApiError::internal(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn prompts_are_texts_or_tokens() {
        let text = |text: &str| Given::Text(text.to_owned());
        assert_eq!(prompts(&json!("a"), 2), Ok(vec![text("a")]));
        assert_eq!(prompts(&json!(["a", "b"]), 2), Ok(vec![text("a"), text("b")]));
        assert_eq!(prompts(&json!([1, 2]), 2), Ok(vec![Given::Tokens(vec![1, 2])]));
        assert_eq!(prompts(&json!([[1], [2]]), 2), Ok(vec![Given::Tokens(vec![1]), Given::Tokens(vec![2])]));
        for wrong in
            [json!(1), json!([]), json!([1, "a"]), json!([1.5]), json!([true]), json!(["a", "b", "c"]), json!([1e12])]
        {
            assert_eq!(prompts(&wrong, 2).unwrap_err().param.as_deref(), Some("prompt"), "{wrong}");
        }
    }
}
