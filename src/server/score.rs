//! `POST /v1/guard/score`: what the gates make of texts, with no answer written.

use super::body::asked;
use super::chat;
use super::error::ApiError;
use super::report::{GateReport, gate_reports, guard_names};
use super::state::State;
use super::worker::{Reader, Told};
use crate::engine::scheduler::{End, Request, Streamed, Summary, TextStream};
use crate::engine::{ChatMessage, Model};
use axum::body::Body;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::{Json, extract};
use llama_cpp_2::token::LlamaToken;
use serde::Serialize;
use serde_json::json;
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
    /// The tokens one by one, where the request asks for `per_token`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pieces: Option<Vec<Piece>>,
}

/// A token that the gates read.
#[derive(Serialize)]
struct Piece {
    token: i32,
    /// What it spells; a character of several tokens is the last one's.
    text: String,
    /// What each gate, in the order of `gates`, read here.
    scores: Vec<Option<f64>>,
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
    let (caller, fields) = asked(state, headers, body).await?;
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
    let per_token = fields.bool("per_token")?.unwrap_or(false);
    let param = if fields.get("input").is_some() { "input" } else { "messages" };
    // What was read of the body is not needed any more.
    drop(fields);
    let snapshot = state.keeper.current();
    let _place = state.admit(conversations.len())?;
    let (sender, mut told) = mpsc::unbounded_channel();
    let mut prompts = Vec::with_capacity(conversations.len());
    for messages in conversations {
        let prompt = chat::tokens(state, messages).await?;
        let capacity = state.config.limits.context as usize;
        if prompt.len() > capacity {
            return Err(ApiError::context_length(param, prompt.len(), capacity));
        }
        prompts.push(prompt);
    }
    for (choice, prompt) in prompts.iter().cloned().enumerate() {
        let program = Some(Arc::clone(&snapshot.program));
        let request = Request { program, token_scores: per_token, ..Request::new(prompt, 0) };
        state.worker.answer(request, Reader { choice, given_up: Arc::default(), told: sender.clone() });
    }
    drop(sender);
    let mut summaries: Vec<Option<Summary>> = prompts.iter().map(|_| None).collect();
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
    let mut results = Vec::with_capacity(prompts.len());
    for (prompt, summary) in prompts.iter().zip(summaries) {
        let summary = summary.ok_or_else(|| ApiError::unavailable("the thread that runs the model has ended"))?;
        state.count(&caller, &summary);
        let gates = gate_reports(&snapshot, &summary);
        let flagged = gates.iter().any(|gate| gate.fired);
        let pieces = per_token.then(|| pieces(&state.model, prompt, &summary.token_scores));
        results.push(Score { flagged, gates, tokens: summary.prompt_tokens, pieces });
    }
    if let Some(audit) = &state.audit {
        let decided: Vec<_> = results.iter().map(|score| json!({ "gates": score.gates })).collect();
        let record = json!({
            "event": "score",
            "key": caller.name,
            "epoch": snapshot.epoch,
            "guards": guard_names(&snapshot),
            "texts": decided,
        });
        state.write_down(audit, record).await?;
    }
    Ok(Scores { object: "guard.score", model: state.name.clone(), epoch: snapshot.epoch, results })
}

/// The tokens of `prompt` with what the gates read at each, as far as they were read.
fn pieces(model: &Model, prompt: &[LlamaToken], scores: &[Vec<Option<f64>>]) -> Vec<Piece> {
    let vocab = model.llama().vocab();
    let mut text = TextStream::new(&[]);
    let piece = |(token, scores): (&LlamaToken, &Vec<Option<f64>>)| {
        let Streamed { text, .. } = text.push(&vocab.token_to_piece(*token, true, None));
        Piece { token: token.0, text, scores: scores.clone() }
    };
    let mut pieces: Vec<Piece> = prompt.iter().zip(scores).map(piece).collect();
    if let Some(last) = pieces.last_mut() {
        last.text += &text.finish();
    }
    pieces
}
