//! `/health`, `/ready` and `/metrics`.

use super::error::ApiError;
use super::state::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, extract};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// 200 while the server can answer. `status` is `degraded` where what a guard's folder holds is not what is in force.
pub(super) async fn health(extract::State(state): extract::State<Arc<State>>) -> Response {
    let snapshot = state.keeper.current();
    let problems = snapshot.problems();
    let ending = state.ending.load(Ordering::Acquire);
    let whole = snapshot.is_whole();
    let status = if ending {
        "ending"
    } else if whole {
        "ok"
    } else {
        "degraded"
    };
    let body = json!({
        "status": status,
        "model": state.name,
        "epoch": snapshot.epoch,
        "guards": snapshot.acting().map(|guard| guard.name()).collect::<Vec<_>>(),
        "problems": problems,
        "problem": snapshot.problem,
        "uptime_seconds": state.started.elapsed().unwrap_or_default().as_secs(),
    });
    (if ending { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }, Json(body)).into_response()
}

/// 200 where a request would be taken now.
pub(super) async fn ready(extract::State(state): extract::State<Arc<State>>) -> Response {
    match state.admit(1) {
        Ok(_) => Json(json!({ "status": "ready" })).into_response(),
        Err(error) => ApiError { status: StatusCode::SERVICE_UNAVAILABLE, ..error }.into_response(),
    }
}

pub(super) async fn metrics(extract::State(state): extract::State<Arc<State>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], state.metrics.text()).into_response()
}
