//! `/v1/models`

use super::error::ApiError;
use super::state::State;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::{Json, extract};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

pub(super) async fn list(extract::State(state): extract::State<Arc<State>>, headers: HeaderMap) -> Response {
    match state.keys.load().caller(&headers) {
        Ok(_) => Json(json!({ "object": "list", "data": [model(&state)] })).into_response(),
        Err(error) => error.into_response(),
    }
}

pub(super) async fn one(
    extract::State(state): extract::State<Arc<State>>,
    name: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Response {
    let Ok(Path(name)) = name else { return ApiError::not_found("the name is not UTF-8").into_response() };
    match state.keys.load().caller(&headers) {
        Ok(_) if name == state.name => Json(model(&state)).into_response(),
        Ok(_) => ApiError::not_found(format!("no model is called `{name}`; there is `{}`", state.name)).into_response(),
        Err(error) => error.into_response(),
    }
}

fn model(state: &State) -> Value {
    let identity = state.model.identity();
    let created = state.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    json!({
        "id": state.name,
        "object": "model",
        "created": created,
        "owned_by": "pilotfish",
        "meta": {
            "architecture": identity.architecture,
            "fingerprint": identity.fingerprint.to_string(),
            "context": state.config.limits.context,
            "n_vocab": state.model.llama().n_vocab(),
        },
    })
}
