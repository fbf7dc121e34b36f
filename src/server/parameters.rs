//! What a request says of how it is to be answered, in OpenAI's words and llama.cpp's.

use super::body::{Fields, wrong_type};
use super::error::ApiError;
use super::keeper::{ChangeError, LeftOut};
use super::keys::{Caller, Role};
use super::snapshot::Snapshot;
use super::state::State;
use crate::engine::scheduler::{Form, Request, Toggle};
use crate::engine::{EngineError, Sampling, Setting};
use crate::program::Program;
use llama_cpp_2::token::LlamaToken;
use serde_json::Value;
use std::sync::Arc;

/// How to answer.
#[derive(Debug, Clone)]
pub(super) struct Parameters {
    /// Of the first choice; the others have seeds of their own that follow from it.
    pub sampling: Sampling,
    /// `None` goes on while there is room.
    pub max_tokens: Option<usize>,
    pub stop: Vec<String>,
    pub choices: usize,
    pub stream: bool,
    /// Whether a stream's last piece is to bring the counts of tokens.
    pub stream_usage: bool,
    pub probabilities: Option<usize>,
    /// What `response_format` asks for.
    pub form: Option<Box<dyn Form>>,
}

/// Stop strings that a request may have.
const MOST_STOPS: usize = 16;
/// Likeliest tokens that a request may ask to see.
const MOST_PROBABILITIES: i64 = 20;

impl Parameters {
    /// Reads what `/v1/chat/completions` and `/v1/completions` have in common.
    pub fn read(state: &State, fields: &Fields) -> Result<Self, ApiError> {
        let n_vocab = state.model.llama().n_vocab();
        let float = |value: Option<f64>, default: f32| value.map_or(default, |value| value as f32);
        let seed = match fields.integer("seed", i64::MIN, i64::MAX)? {
            // llama.cpp takes 32 bits; those above count too.
            Some(seed) => (seed ^ (seed >> 32)) as u32,
            None => rand::random(),
        };
        let sampling = Sampling {
            logit_bias: logit_bias(fields, n_vocab)?,
            penalty_last_n: -1,
            repeat_penalty: float(fields.number("repeat_penalty", 0.01, 10.0)?, 1.0),
            frequency_penalty: float(fields.number("frequency_penalty", -2.0, 2.0)?, 0.0),
            presence_penalty: float(fields.number("presence_penalty", -2.0, 2.0)?, 0.0),
            top_k: fields.integer("top_k", 0, i64::from(i32::MAX))?.unwrap_or(0) as u32,
            top_p: float(fields.number("top_p", 0.0, 1.0)?, 1.0),
            min_p: float(fields.number("min_p", 0.0, 1.0)?, 0.0),
            temperature: float(fields.number("temperature", 0.0, 2.0)?, 1.0),
            seed,
        };
        // The newer name counts where both are given.
        let most = i64::from(i32::MAX);
        let older = fields.integer("max_tokens", 0, most)?;
        let max_tokens = fields.integer("max_completion_tokens", 0, most)?.or(older).map(|n| n as usize);
        let choices = fields.integer("n", 1, state.config.limits.choices as i64)?.unwrap_or(1) as usize;
        let stream = fields.bool("stream")?.unwrap_or(false);
        let stream_usage = match fields.object("stream_options")? {
            None => false,
            Some(options) => match options.get("include_usage") {
                None | Some(Value::Null) => false,
                Some(Value::Bool(asked)) => *asked,
                Some(other) => return Err(wrong_type("stream_options.include_usage", "a boolean", other)),
            },
        };
        refuse_what_is_not_done(fields)?;
        let stop = fields.texts("stop", MOST_STOPS)?;
        Ok(Self {
            sampling,
            max_tokens,
            stop,
            choices,
            stream,
            stream_usage,
            probabilities: None,
            form: form(state, fields)?,
        })
    }

    /// `logprobs` as chats have it: whether, and `top_logprobs`.
    pub fn chat_probabilities(fields: &Fields) -> Result<Option<usize>, ApiError> {
        let top = fields.integer("top_logprobs", 0, MOST_PROBABILITIES)?;
        match (fields.bool("logprobs")?, top) {
            (Some(true), top) => Ok(Some(top.unwrap_or(0) as usize)),
            (_, Some(_)) => Err(ApiError::invalid("top_logprobs", "`top_logprobs` is given without `logprobs`: true")),
            _ => Ok(None),
        }
    }

    /// `logprobs` as completions have it: how many.
    pub fn completion_probabilities(fields: &Fields) -> Result<Option<usize>, ApiError> {
        Ok(fields.integer("logprobs", 0, MOST_PROBABILITIES)?.map(|n| n as usize))
    }

    /// A request for choice `choice` of `prompt`, which is to be run under `program`.
    pub fn request(
        &self,
        prompt: Vec<LlamaToken>,
        choice: usize,
        program: Arc<Program>,
        toggles: Vec<Toggle>,
    ) -> Request {
        // Far from the seeds of others, which people count up.
        let seed = self.sampling.seed ^ (choice as u32).wrapping_mul(0x9E37_79B9);
        let sampling = Sampling { seed, ..self.sampling.clone() };
        Request {
            sampling,
            stop: self.stop.clone(),
            program: Some(program),
            toggles,
            probabilities: self.probabilities,
            form: self.form.clone(),
            ..Request::new(prompt, self.max_tokens.unwrap_or(usize::MAX))
        }
    }
}

/// What would be silently wrong if it were ignored.
fn refuse_what_is_not_done(fields: &Fields) -> Result<(), ApiError> {
    let lists = [("tools", "tools"), ("functions", "functions"), ("modalities", "modalities")];
    for (name, what) in lists {
        let Some(value) = fields.get(name) else { continue };
        let list = value.as_array().ok_or_else(|| wrong_type(name, "an array", value))?;
        let is_done = list.is_empty() || (name == "modalities" && *list == ["text"]);
        if !is_done {
            return Err(ApiError::unsupported(name, format!("{what} are not supported")));
        }
    }
    Ok(())
}

/// The form of `response_format`: `{"type": "json_object"}`, or `{"type": "json_schema", "json_schema": {"schema": …}}`.
fn form(state: &State, fields: &Fields) -> Result<Option<Box<dyn Form>>, ApiError> {
    const NAME: &str = "response_format";
    let Some(asked) = fields.object(NAME)? else { return Ok(None) };
    let refused = |error: EngineError| ApiError::invalid(NAME, error.to_string());
    match asked.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => state.forms.json_object().map(Some).map_err(refused),
        Some("json_schema") => {
            let schema = asked.get("json_schema").and_then(|form| form.get("schema"));
            let schema = schema.filter(|schema| schema.is_object());
            let schema = schema.ok_or_else(|| {
                ApiError::invalid(NAME, "`response_format.json_schema.schema` is missing, or no object")
            })?;
            state.forms.json_schema(schema.clone()).map(Some).map_err(refused)
        }
        _ => Err(ApiError::invalid(NAME, "`response_format.type` is none of `text`, `json_object` and `json_schema`")),
    }
}

fn logit_bias(fields: &Fields, n_vocab: i32) -> Result<Vec<(LlamaToken, f32)>, ApiError> {
    let Some(biases) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let bias = |(token, bias): (&String, &Value)| {
        let token: i32 = token.parse().ok().filter(|token| (0..n_vocab).contains(token)).ok_or_else(|| {
            ApiError::invalid(
                "logit_bias",
                format!("`logit_bias`: `{token}` is no token; they are numbers from 0 to {}", n_vocab - 1),
            )
        })?;
        let bias = bias.as_f64().ok_or_else(|| wrong_type("logit_bias", "numbers", bias))?;
        if !(-100.0..=100.0).contains(&bias) {
            return Err(ApiError::invalid("logit_bias", format!("`logit_bias`: {bias} is not from -100 to 100")));
        }
        // OpenAI's -100 is a ban.
        Ok((LlamaToken(token), if bias <= -100.0 { f32::NEG_INFINITY } else { bias as f32 }))
    };
    biases.iter().map(bias).collect()
}

/// The guards that a request is answered under.
#[derive(Debug)]
pub(super) struct Toggled {
    /// What was in force when it came, without the guards that it leaves out.
    pub snapshot: Arc<Snapshot>,
    pub toggles: Vec<Toggle>,
    /// What the snapshot's program becomes by them.
    pub program: Arc<Program>,
}

/// What a request's `guard` object makes of the guards that are in force:
/// `{"disable": true | ["GUARD"], "interventions": {"NAME": "on" | "off" | STRENGTH}}`, NAME as the server's guards have it, with several guards `GUARD/NAME`.
///
/// # Errors
/// It is of another form, names what there is not, or loosens what its key may not.
pub(super) async fn toggled(state: &State, fields: &Fields, caller: &Caller) -> Result<Toggled, ApiError> {
    let snapshot = state.keeper.current();
    let Some(guard) = fields.object("guard")? else {
        return Ok(Toggled { program: Arc::clone(&snapshot.program), snapshot, toggles: Vec::new() });
    };
    if let Some(unknown) = guard.keys().find(|key| !["disable", "interventions"].contains(&key.as_str())) {
        return Err(ApiError::invalid(
            "guard",
            format!("`guard` has `{unknown}`, and only `disable` and `interventions` are known"),
        ));
    }
    let snapshot = match left_out(guard.get("disable"))? {
        None => snapshot,
        Some(_) if caller.role < Role::Trusted => {
            return Err(ApiError::forbidden("this key may not leave out guards: it may set what is stronger"));
        }
        Some(left_out) => {
            let part = state.keeper.without(snapshot, left_out).await;
            part.map_err(|error| match error {
                ChangeError::Ends => ApiError::unavailable(error.to_string()),
                _ => ApiError::invalid("guard.disable", error.to_string()),
            })?
        }
    };
    let mut toggled = Toggled { program: Arc::clone(&snapshot.program), snapshot, toggles: Vec::new() };
    let settings = match guard.get("interventions") {
        None | Some(Value::Null) => return Ok(toggled),
        Some(Value::Object(settings)) => settings,
        Some(other) => return Err(wrong_type("guard.interventions", "an object", other)),
    };
    for (name, value) in settings {
        let setting = setting("guard.interventions", value)?;
        let name = toggled.snapshot.resolve(name);
        let changed = toggled.program.with_setting(&name, setting);
        let changed = changed.map_err(|error| ApiError::invalid("guard.interventions", error.to_string()))?;
        if caller.role < Role::Trusted && loosens(&toggled.snapshot.program, &changed) {
            return Err(ApiError::forbidden(format!(
                "this key may not loosen `{name}`: it may set what is stronger than what is in force"
            )));
        }
        toggled.toggles.push(Toggle { name, from_token: 1, setting });
        toggled.program = Arc::new(changed);
    }
    Ok(toggled)
}

/// `true` or the names of guards; `None` leaves out none.
fn left_out(disable: Option<&Value>) -> Result<Option<LeftOut>, ApiError> {
    const NAME: &str = "guard.disable";
    let wrong = |found: &Value| wrong_type(NAME, "`true` or an array of guards' names", found);
    match disable {
        None | Some(Value::Null | Value::Bool(false)) => Ok(None),
        Some(Value::Bool(true)) => Ok(Some(LeftOut::All)),
        Some(Value::Array(names)) if names.is_empty() => Ok(None),
        Some(Value::Array(names)) => {
            let name = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(|| wrong(value));
            names.iter().map(name).collect::<Result<_, _>>().map(|names| Some(LeftOut::Some(names)))
        }
        Some(other) => Err(wrong(other)),
    }
}

/// `"on"`, `"off"` or a strength.
pub(super) fn setting(param: &str, value: &Value) -> Result<Setting, ApiError> {
    let parsed = match value {
        Value::String(text) => text.parse().ok(),
        Value::Bool(on) => Some(if *on { Setting::On } else { Setting::Off }),
        Value::Number(number) => number.as_f64().map(|number| Setting::Strength(number as f32)),
        _ => None,
    };
    let finite = |setting: &Setting| !matches!(setting, Setting::Strength(strength) if !strength.is_finite());
    parsed.filter(finite).ok_or_else(|| wrong_type(param, "`on`, `off` or a strength", value))
}

/// Whether any intervention acts less in `changed` than in `now`, or the other way.
fn loosens(now: &Program, changed: &Program) -> bool {
    let weaker = |(now, then): (f32, f32)| then.abs() < now.abs() || now * then < 0.0;
    let strengths = now.interventions().zip(changed.interventions()).map(|((_, now), (_, then))| (now, then));
    strengths.into_iter().any(weaker)
}
