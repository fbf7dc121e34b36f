//! From prompts to answers in OpenAI's shapes, whole or piece by piece.

use super::error::ApiError;
use super::keys::Caller;
use super::parameters::{Parameters, Toggled};
use super::report::{ChoiceReport, GuardReport, guard_names};
use super::snapshot::Snapshot;
use super::state::{Place, State};
use super::telemetry::Answered;
use super::worker::{Reader, Told};
use crate::engine::scheduler::{End, Summary, TokenProbability};
use crate::program::Program;
use axum::Json;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use llama_cpp_2::token::LlamaToken;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

/// Which of OpenAI's shapes an answer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Chat,
    Completion,
}

/// A request that is being answered.
pub(super) struct Answering {
    state: Arc<State>,
    shape: Shape,
    id: String,
    created: u64,
    caller: Caller,
    snapshot: Arc<Snapshot>,
    /// The snapshot's, as the request has set it.
    program: Arc<Program>,
    stream: bool,
    stream_usage: bool,
    began: Instant,
    /// From then on, the first of any choice.
    first_token: Option<Duration>,
    told: mpsc::UnboundedReceiver<(usize, Told)>,
    /// Set where nobody wants it any more.
    given_up: Arc<AtomicBool>,
    /// Whether it is counted and on record.
    finished: bool,
    choices: Vec<Choice>,
    /// Taken until the answer is done with.
    _place: Place,
}

/// One of the answers.
#[derive(Default)]
struct Choice {
    text: String,
    /// Tokens whose text has not been shown yet, or of the whole answer.
    tokens: Vec<(TokenProbability, Vec<TokenProbability>)>,
    wants_tokens: bool,
    /// Characters of text before `tokens`.
    offset: usize,
    summary: Option<Summary>,
}

/// How long the end of what nobody wants is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

impl Answering {
    /// Has each of `prompts` answered as often as the parameters say.
    ///
    /// # Errors
    /// A prompt is too long, or there is no place.
    pub fn begin(
        state: &Arc<State>,
        shape: Shape,
        caller: Caller,
        prompts: Vec<Vec<LlamaToken>>,
        parameters: &Parameters,
        toggled: Toggled,
    ) -> Result<Self, ApiError> {
        let Toggled { snapshot, toggles, program } = toggled;
        let capacity = state.config.limits.context as usize;
        if let Some(prompt) = prompts.iter().find(|prompt| prompt.len() >= capacity) {
            let param = if shape == Shape::Chat { "messages" } else { "prompt" };
            return Err(ApiError::context_length(param, prompt.len(), capacity));
        }
        // Before a stream begins, which can't be a 400 any more.
        prompts.iter().try_for_each(|prompt| state.model.check_tokens(prompt))?;
        let n = prompts.len() * parameters.choices;
        let place = state.admit(n)?;
        let (sender, told) = mpsc::unbounded_channel();
        let given_up = Arc::default();
        let mut choices = Vec::with_capacity(n);
        for prompt in prompts {
            for choice in 0..parameters.choices {
                let request =
                    parameters.request(prompt.clone(), choice, Arc::clone(&snapshot.program), toggles.clone());
                state.worker.answer(
                    request,
                    Reader { choice: choices.len(), given_up: Arc::clone(&given_up), told: sender.clone() },
                );
                choices.push(Choice { wants_tokens: parameters.probabilities.is_some(), ..Default::default() });
            }
        }
        let prefix = if shape == Shape::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:024x}", rand::random::<u128>() >> 32);
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Ok(Self {
            state: Arc::clone(state),
            shape,
            id,
            created,
            caller,
            snapshot,
            program,
            stream: parameters.stream,
            stream_usage: parameters.stream_usage,
            began: Instant::now(),
            first_token: None,
            told,
            given_up,
            finished: false,
            choices,
            _place: place,
        })
    }

    /// The answer as it is asked for: when all of it is there, or as it comes.
    pub async fn respond(self) -> Response {
        if self.stream { self.stream() } else { self.whole().await }
    }

    /// The next word of any choice; its number, and whether it shows something new.
    async fn next(&mut self) -> Result<Option<usize>, ApiError> {
        let deadline = self.began + self.state.config.limits.request();
        let next = tokio::time::timeout_at(deadline.into(), self.told.recv()).await;
        let next = next.map_err(|_| ApiError::timeout("the answer did not come in time"))?;
        let (index, told) = next.ok_or_else(|| ApiError::unavailable("the thread that runs the model has ended"))?;
        let choice = &mut self.choices[index];
        let is_first = choice.text.is_empty() && choice.offset == 0 && choice.tokens.is_empty();
        match told {
            Told::Text(text) => {
                if is_first {
                    let after = self.began.elapsed();
                    self.first_token.get_or_insert(after);
                    self.state.metrics.first_token(after);
                }
                choice.text += &text;
            }
            Told::Token { token, instead } => {
                choice.tokens.push((token, instead));
                return Ok(None);
            }
            Told::Refused(error) => return Err(error.into()),
            Told::Ended(summary) => {
                let failed = match &summary.end {
                    End::Failed(error) => {
                        self.state.metrics.guards.faults.inc();
                        Some(ApiError::internal(format!("the answer had to be ended: {error}")))
                    }
                    // What it asks for leaves nothing to be said.
                    End::OutOfForm(reason) => Some(ApiError::body(format!("the answer can't go on: {reason}"))),
                    _ => None,
                };
                choice.summary = Some(summary);
                if let Some(error) = failed {
                    return Err(error);
                }
            }
        }
        Ok(Some(index))
    }

    fn is_done(&self) -> bool {
        self.choices.iter().all(|choice| choice.summary.is_some())
    }

    /// Waits for all of it. What nobody waits for any more is ended, and on record.
    async fn whole(mut self) -> Response {
        // In a task of its own: this one ends where its client hangs up.
        let (mut sender, response) = oneshot::channel();
        tokio::spawn(async move {
            if let Some(response) = self.answered(&mut sender).await {
                let _ = sender.send(response);
            }
        });
        response.await.unwrap_or_else(|_| ApiError::internal("the answer has come to nothing").into_response())
    }

    /// `None` where nobody waits for it.
    async fn answered(&mut self, sender: &mut oneshot::Sender<Response>) -> Option<Response> {
        while !self.is_done() {
            let next = tokio::select! {
                next = self.next() => next,
                () = sender.closed() => {
                    self.abandon(&self.cut_off()).await;
                    return None;
                }
            };
            if let Err(error) = next {
                self.abandon(&error).await;
                return Some((self.first_headers(), error).into_response());
            }
        }
        if let Err(error) = self.finish(None).await {
            return Some((self.first_headers(), error).into_response());
        }
        let report = self.report();
        let choices: Vec<Value> = (0..self.choices.len()).map(|index| self.choice(index)).collect();
        let object = match self.shape {
            Shape::Chat => "chat.completion",
            Shape::Completion => "text_completion",
        };
        let body = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.state.name,
            "choices": choices,
            "usage": self.usage(),
            "guard": report,
        });
        Some((self.headers(&report), Json(body)).into_response())
    }

    /// Why nobody waits for it.
    fn cut_off(&self) -> ApiError {
        let ends = self.state.ending.load(Ordering::Acquire);
        ApiError::timeout(if ends { "the server ended" } else { "the client hung up" })
    }

    /// Has what is left of it ended, and writes down what there was and why it ended.
    async fn abandon(&mut self, why: &ApiError) {
        self.given_up.store(true, Ordering::Release);
        let left = async {
            while !self.is_done() {
                let Some((index, told)) = self.told.recv().await else { break };
                match told {
                    Told::Ended(summary) => self.choices[index].summary = Some(summary),
                    // There is nothing to be told of it.
                    Told::Refused(_) => break,
                    Told::Text(_) | Told::Token { .. } => {}
                }
            }
        };
        // The next step ends it; one that never comes is not waited for.
        let _ = tokio::time::timeout(PATIENCE, left).await;
        self.finish(Some(why)).await.ok();
    }

    /// Tells of it as it comes, by server-sent events.
    fn stream(mut self) -> Response {
        // A reader that stops reading stops this; the answer goes on to its end, and what is left waits in the worker's channel.
        let (sender, receiver) = mpsc::channel::<Result<Event, Infallible>>(16);
        let headers = self.first_headers();
        tokio::spawn(async move {
            let deadline = self.began + self.state.config.limits.request();
            // Nothing is to be said to whoever does not read.
            let told = tokio::time::timeout_at(deadline.into(), self.pieces(&sender)).await;
            if !self.finished {
                let why = if told.is_ok() { self.cut_off() } else { ApiError::timeout("the client did not read") };
                self.abandon(&why).await;
            }
        });
        (headers, Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default())).into_response()
    }

    /// `None` where the reader has gone.
    async fn pieces(&mut self, sender: &mpsc::Sender<Result<Event, Infallible>>) -> Option<()> {
        if self.shape == Shape::Chat {
            for index in 0..self.choices.len() {
                let delta = json!({ "role": "assistant", "content": "" });
                let choice = json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null });
                self.send(sender, vec![choice], json!({})).await?;
            }
        }
        while !self.is_done() {
            let next = tokio::select! {
                next = self.next() => next,
                () = sender.closed() => return None,
            };
            match next {
                Ok(Some(index)) => {
                    if self.choices[index].summary.is_none() {
                        let piece = self.piece(index);
                        self.send(sender, vec![piece], json!({})).await?;
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    self.abandon(&error).await;
                    let _ = sender.send(Ok(Event::default().data(error.json()))).await;
                    return None;
                }
            }
        }
        if let Err(error) = self.finish(None).await {
            let _ = sender.send(Ok(Event::default().data(error.json()))).await;
            return None;
        }
        let report = self.report();
        for index in 0..self.choices.len() {
            let piece = self.last_piece(index);
            self.send(sender, vec![piece], json!({ "guard": report })).await?;
        }
        if self.stream_usage {
            self.send(sender, Vec::new(), json!({ "usage": self.usage() })).await?;
        }
        sender.send(Ok(Event::default().data("[DONE]"))).await.ok()
    }

    async fn send(
        &self,
        sender: &mpsc::Sender<Result<Event, Infallible>>,
        choices: Vec<Value>,
        more: Value,
    ) -> Option<()> {
        let object = match self.shape {
            Shape::Chat => "chat.completion.chunk",
            Shape::Completion => "text_completion",
        };
        let mut chunk = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.state.name,
            "choices": choices,
        });
        if let (Value::Object(chunk), Value::Object(more)) = (&mut chunk, more) {
            chunk.extend(more);
        }
        sender.send(Ok(Event::default().data(chunk.to_string()))).await.ok()
    }

    /// What has come of a choice since the last piece.
    fn piece(&mut self, index: usize) -> Value {
        let choice = &mut self.choices[index];
        let text = std::mem::take(&mut choice.text);
        let tokens = std::mem::take(&mut choice.tokens);
        let probabilities = choice.wants_tokens.then(|| probabilities(self.shape, &tokens, choice.offset));
        choice.offset += text.chars().count();
        match self.shape {
            Shape::Chat => {
                json!({ "index": index, "delta": { "content": text }, "logprobs": probabilities, "finish_reason": null })
            }
            Shape::Completion => {
                json!({ "index": index, "text": text, "logprobs": probabilities, "finish_reason": null })
            }
        }
    }

    fn last_piece(&mut self, index: usize) -> Value {
        let mut piece = self.piece(index);
        let choice = &self.choices[index];
        let report = self.choice_report(choice);
        piece["finish_reason"] = finish_reason(choice).into();
        piece["guard"] = json!(report);
        if self.shape == Shape::Chat {
            let delta = piece["delta"].as_object_mut().expect("it is one of a chat");
            if delta["content"] == "" {
                delta.remove("content");
            }
            if let Some(refusal) = report.refusal() {
                delta.insert("refusal".into(), refusal.into());
            }
        }
        piece
    }

    /// A whole choice.
    fn choice(&self, index: usize) -> Value {
        let choice = &self.choices[index];
        let report = self.choice_report(choice);
        let probabilities = choice.wants_tokens.then(|| probabilities(self.shape, &choice.tokens, 0));
        let finish_reason = finish_reason(choice);
        match self.shape {
            Shape::Chat => {
                let message = json!({ "role": "assistant", "content": choice.text, "refusal": report.refusal() });
                json!({ "index": index, "message": message, "logprobs": probabilities, "finish_reason": finish_reason, "guard": report })
            }
            Shape::Completion => {
                json!({ "index": index, "text": choice.text, "logprobs": probabilities, "finish_reason": finish_reason, "guard": report })
            }
        }
    }

    fn choice_report(&self, choice: &Choice) -> ChoiceReport {
        choice.summary.as_ref().map(|summary| ChoiceReport::new(&self.snapshot, summary)).unwrap_or_default()
    }

    fn report(&self) -> GuardReport {
        let summaries = self.choices.iter().filter_map(|choice| choice.summary.as_ref());
        GuardReport::new(&self.snapshot, &self.program, summaries)
    }

    /// What is known before there is an answer.
    fn first_headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::from_iter([(EPOCH, HeaderValue::from(self.snapshot.epoch))]);
        if let Ok(id) = HeaderValue::from_str(&self.id) {
            headers.insert(REQUEST, id);
        }
        headers
    }

    fn headers(&self, report: &GuardReport) -> HeaderMap {
        let mut headers = self.first_headers();
        if let Ok(acted) = HeaderValue::from_str(&report.acted.join(", ")) {
            headers.insert(ACTED, acted);
        }
        headers.insert(BLOCKED_HEADER, HeaderValue::from_static(if report.blocked { "true" } else { "false" }));
        headers
    }

    fn usage(&self) -> Value {
        let of = |count: fn(&Summary) -> usize| -> usize {
            self.choices.iter().filter_map(|choice| choice.summary.as_ref()).map(count).sum()
        };
        let (prompt, answer) = (of(|summary| summary.prompt_tokens), of(|summary| summary.tokens));
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": { "cached_tokens": of(|summary| summary.reused_tokens) },
        })
    }

    /// Has it sent to the collector, where there is one.
    fn trace(&self, error: Option<&ApiError>) {
        let Some(telemetry) = &self.state.telemetry else { return };
        telemetry.answered(&Answered {
            operation: match self.shape {
                Shape::Chat => "chat",
                Shape::Completion => "text_completion",
            },
            model: &self.state.name,
            id: &self.id,
            traceparent: self.caller.traceparent.as_deref(),
            key: self.caller.name.as_deref(),
            began: SystemTime::now() - self.began.elapsed(),
            first_token: self.first_token,
            epoch: self.snapshot.epoch,
            acted: &self.report().acted,
            choices: self.choices.iter().map(|choice| (finish_reason(choice), choice.summary.as_ref())).collect(),
            error: error.map(|error| error.message.as_str()),
        });
    }

    /// Counts what there was, and has it written down for good, before anybody is told the end.
    ///
    /// # Errors
    /// The audit log can't be written: what is not on record is not to be given out.
    async fn finish(&mut self, error: Option<&ApiError>) -> Result<(), ApiError> {
        self.finished = true;
        let metrics = &self.state.metrics;
        metrics.ended(self.began.elapsed());
        for summary in self.choices.iter().filter_map(|choice| choice.summary.as_ref()) {
            self.state.count(&self.caller, summary);
            for gate in summary.gates.iter().filter(|gate| gate.fired) {
                let (guard, name) = self.snapshot.split(&gate.gate);
                metrics.guards.fired(guard, name);
            }
            if let End::Blocked(block) = &summary.end {
                metrics.guards.blocked(&block.guard);
            }
        }
        self.trace(error);
        let Some(audit) = &self.state.audit else { return Ok(()) };
        let choices: Vec<Value> = self
            .choices
            .iter()
            .map(|choice| {
                let report = self.choice_report(choice);
                let tokens = choice.summary.as_ref().map(|summary| (summary.prompt_tokens, summary.tokens));
                json!({
                    "finish_reason": choice.summary.as_ref().map(|_| finish_reason(choice)),
                    "prompt_tokens": tokens.map(|tokens| tokens.0),
                    "answer_tokens": tokens.map(|tokens| tokens.1),
                    "gates": report.gates,
                    "blocked_by": report.blocked_by,
                })
            })
            .collect();
        let record = json!({
            "event": "answer",
            "id": self.id,
            "key": self.caller.name,
            "epoch": self.snapshot.epoch,
            "guards": guard_names(&self.snapshot),
            "choices": choices,
            "error": error.map(|error| &error.message),
        });
        self.state.write_down(audit, record).await
    }
}

fn finish_reason(choice: &Choice) -> &'static str {
    match choice.summary.as_ref().map(|summary| &summary.end) {
        Some(End::Stop | End::StopString(_)) => "stop",
        Some(End::Blocked(_)) => "content_filter",
        Some(End::Cancelled) => "cancelled",
        _ => "length",
    }
}

/// `logprobs` of tokens; a completion's also say at which character of the answer each begins, from `offset` on.
fn probabilities(shape: Shape, tokens: &[(TokenProbability, Vec<TokenProbability>)], offset: usize) -> Value {
    let text = |token: &TokenProbability| String::from_utf8_lossy(&token.bytes).into_owned();
    match shape {
        Shape::Chat => {
            let one = |token: &TokenProbability| json!({ "token": text(token), "logprob": token.log_probability, "bytes": token.bytes });
            let entry = |(token, instead): &(TokenProbability, Vec<TokenProbability>)| {
                let mut entry = one(token);
                entry["top_logprobs"] = instead.iter().map(one).collect();
                entry
            };
            json!({ "content": tokens.iter().map(entry).collect::<Vec<_>>(), "refusal": null })
        }
        Shape::Completion => {
            let mut offsets = Vec::with_capacity(tokens.len());
            let mut at = offset;
            for (token, _) in tokens {
                offsets.push(at);
                // A character counts where it begins: its other bytes begin with the bits 10.
                at += token.bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count();
            }
            let likeliest = |instead: &[TokenProbability]| -> Value {
                instead
                    .iter()
                    .map(|token| (text(token), json!(token.log_probability)))
                    .collect::<serde_json::Map<_, _>>()
                    .into()
            };
            json!({
                "tokens": tokens.iter().map(|(token, _)| text(token)).collect::<Vec<_>>(),
                "token_logprobs": tokens.iter().map(|(token, _)| token.log_probability).collect::<Vec<_>>(),
                "top_logprobs": tokens.iter().map(|(_, instead)| likeliest(instead)).collect::<Vec<_>>(),
                "text_offset": offsets,
            })
        }
    }
}

const REQUEST: HeaderName = HeaderName::from_static("x-request-id");
const EPOCH: HeaderName = HeaderName::from_static("x-pilotfish-epoch");
const ACTED: HeaderName = HeaderName::from_static("x-pilotfish-acted");
const BLOCKED_HEADER: HeaderName = HeaderName::from_static("x-pilotfish-blocked");
