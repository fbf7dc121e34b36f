//! `POST /v1/guard/score`: what the gates make of texts, with no answer written.

use super::answer::{GateReport, gate_reports};
use super::body::asked;
use super::chat;
use super::error::ApiError;
use super::state::State;
use super::worker::{Reader, Told};
use crate::engine::ChatMessage;
use crate::engine::scheduler::{End, Request, Summary};
use axum::body::Body;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::{Json, extract};
use serde::Serialize;
use std::sync::Arc;
use tokio::sync::mpsc;

#[derive(Serialize)]
struct Scores {
    object: &'static str,
    model: String,
    epoch: u64,
    results: Vec<Score>,
}

#[derive(Serialize)]
struct Score {
    /// Whether any gate fired.
    flagged: bool,
    gates: Vec<GateReport>,
    tokens: usize,
}

/// Texts that one request may bring.
const MOST: usize = 64;

pub(super) async fn score(
    extract::State(state): extract::State<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let response = scores(&state, &headers, body).await.map(|scores| Json(scores).into_response());
    let response = response.unwrap_or_else(ApiError::into_response);
    state.metrics.request("/v1/guard/score", response.status().as_u16());
    response
}

async fn scores(state: &Arc<State>, headers: &HeaderMap, body: Body) -> Result<Scores, ApiError> {
    let (_, fields) = asked(state, headers, body).await?;
    let conversations = match (fields.get("messages"), fields.get("input")) {
        (Some(_), None) => vec![chat::messages(&fields)?],
        (None, Some(_)) => {
            let user = |content| vec![ChatMessage { role: "user".into(), content }];
            fields.texts("input", MOST)?.into_iter().map(user).collect()
        }
        (Some(_), Some(_)) => return Err(ApiError::invalid("input", "give `input` or `messages`, not both")),
        (None, None) => return Err(ApiError::invalid("input", "`input` is missing: a text or several, or `messages`")),
    };
    if conversations.is_empty() {
        return Err(ApiError::invalid("input", "`input` is empty"));
    }
    let snapshot = state.keeper.current();
    let _place = state.admit(conversations.len())?;
    let (sender, mut told) = mpsc::unbounded_channel();
    let n = conversations.len();
    for (choice, messages) in conversations.into_iter().enumerate() {
        let prompt = chat::tokens(state, messages).await?;
        let request = Request { program: Some(Arc::clone(&snapshot.program)), ..Request::new(prompt, 0) };
        state.worker.answer(request, Reader { choice, given_up: Arc::default(), told: sender.clone() });
    }
    drop(sender);
    let mut summaries: Vec<Option<Summary>> = (0..n).map(|_| None).collect();
    let read = async {
        while let Some((index, told)) = told.recv().await {
            match told {
                Told::Ended(Summary { end: End::Failed(error), .. }) => {
                    return Err(ApiError::internal(error.to_string()));
                }
                Told::Ended(summary) => summaries[index] = Some(summary),
                Told::Refused(error) => return Err(error.into()),
                Told::Text(_) | Told::Token { .. } => {}
            }
        }
        Ok(())
    };
    let read = tokio::time::timeout(state.config.limits.request(), read).await;
    read.map_err(|_| ApiError::timeout("the texts were not read in time"))??;
    let results = summaries.into_iter().map(|summary| {
        let summary = summary.ok_or_else(|| ApiError::unavailable("the thread that runs the model has ended"))?;
        let gates = gate_reports(&snapshot, &summary);
        Ok(Score { flagged: gates.iter().any(|gate| gate.fired), gates, tokens: summary.prompt_tokens })
    });
    let results = results.collect::<Result<_, ApiError>>()?;
    Ok(Scores { object: "guard.score", model: state.name.clone(), epoch: snapshot.epoch, results })
}
