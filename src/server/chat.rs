//! `POST /v1/chat/completions`

use super::answer::{Answering, Shape};
use super::body::{Fields, asked, wrong_type};
use super::error::ApiError;
use super::parameters::{Parameters, toggled};
use super::state::State;
use crate::engine::ChatMessage;
use axum::body::Body;
use axum::extract;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use llama_cpp_2::token::LlamaToken;
use serde_json::Value;
use std::sync::Arc;

pub(super) async fn chat(
    extract::State(state): extract::State<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let response = match begin(&state, &headers, body).await {
        Ok(answering) => answering.respond().await,
        Err(error) => error.into_response(),
    };
    state.metrics.request("/v1/chat/completions", response.status().as_u16());
    response
}

/// Has it answered. What was read of the body is let go before there is an answer.
async fn begin(state: &Arc<State>, headers: &HeaderMap, body: Body) -> Result<Answering, ApiError> {
    let (caller, fields) = asked(state, headers, body).await?;
    let messages = messages(&fields)?;
    let parameters =
        Parameters { probabilities: Parameters::chat_probabilities(&fields)?, ..Parameters::read(state, &fields)? };
    let toggled = toggled(state, &fields, &caller).await?;
    let prompt = tokens(state, messages).await?;
    Answering::begin(state, Shape::Chat, caller, vec![prompt], &parameters, toggled)
}

/// The tokens of a conversation, found on a thread that may take its time.
pub(super) async fn tokens(state: &Arc<State>, messages: Vec<ChatMessage>) -> Result<Vec<LlamaToken>, ApiError> {
    let own = Arc::clone(state);
    let tokens = tokio::task::spawn_blocking(move || own.template.tokens(&own.model, &messages)).await;
    Ok(tokens.map_err(|error| ApiError::internal(error.to_string()))??)
}

/// The turns of a conversation.
///
/// # Errors
/// It has none, or one that is not text.
pub(super) fn messages(fields: &Fields) -> Result<Vec<ChatMessage>, ApiError> {
    let found = fields.required("messages")?;
    let Some(list) = found.as_array() else { return Err(wrong_type("messages", "an array", found)) };
    if list.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` is empty"));
    }
    list.iter().enumerate().map(|(n, message)| message_of(n, message)).collect()
}

/// Whose words a message can be.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

fn message_of(n: usize, message: &Value) -> Result<ChatMessage, ApiError> {
    let at = |field: &str| format!("messages[{n}].{field}");
    let Some(fields) = message.as_object() else {
        return Err(wrong_type(&format!("messages[{n}]"), "an object", message));
    };
    let role = match fields.get("role") {
        Some(Value::String(role)) => role,
        Some(other) => return Err(wrong_type(&at("role"), "a string", other)),
        None => return Err(ApiError::invalid(&at("role"), format!("`{}` is missing", at("role")))),
    };
    if !ROLES.contains(&role.as_str()) {
        return Err(ApiError::invalid(&at("role"), format!("`{role}` is none of the roles {}", ROLES.join(", "))));
    }
    let content = match fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) if parts.is_empty() => {
            return Err(ApiError::invalid(&at("content"), format!("`{}` is empty", at("content"))));
        }
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for part in parts {
                match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
                    (Some("text"), Some(part)) => text += part,
                    (Some(kind), _) if kind != "text" => {
                        return Err(ApiError::unsupported(
                            &at("content"),
                            format!("parts of type `{kind}` are not supported: this model reads text"),
                        ));
                    }
                    _ => return Err(wrong_type(&at("content"), "parts of type `text`", part)),
                }
            }
            text
        }
        Some(Value::Null) | None => String::new(),
        Some(other) => return Err(wrong_type(&at("content"), "a string or an array of parts", other)),
    };
    // What OpenAI calls `developer` every template calls `system`.
    let role = if role == "developer" { "system" } else { role };
    Ok(ChatMessage { role: role.to_owned(), content })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn messages_are_text_whole_or_in_parts() {
        let parts = json!([{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }]);
        let fields = Fields::of(json!({ "messages": [
            { "role": "developer", "content": "s" }, { "role": "user", "content": parts }, { "role": "assistant", "content": null },
        ] }));
        let found = messages(&fields).unwrap();
        let found: Vec<_> = found.iter().map(|message| (message.role.as_str(), message.content.as_str())).collect();
        assert_eq!(found, [("system", "s"), ("user", "ab"), ("assistant", "")]);
    }

    #[test]
    fn what_is_no_conversation_is_refused_by_the_field() {
        let cases = [
            (json!({}), "messages"),
            (json!({ "messages": [] }), "messages"),
            (json!({ "messages": "hi" }), "messages"),
            (json!({ "messages": ["hi"] }), "messages[0]"),
            (json!({ "messages": [{ "content": "hi" }] }), "messages[0].role"),
            (json!({ "messages": [{ "role": "nobody", "content": "hi" }] }), "messages[0].role"),
            (json!({ "messages": [{ "role": "user", "content": [] }] }), "messages[0].content"),
            (json!({ "messages": [{ "role": "user", "content": 3 }] }), "messages[0].content"),
            (json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }), "messages[0].content"),
        ];
        for (body, param) in cases {
            let error = messages(&Fields::of(body.clone())).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{body}");
        }
    }
}
