use super::args::{RunArguments, ScoreArguments};
use super::models::load;
use super::table::table;
use super::{Outcome, guard, prompts};
use anyhow::Context;
use pilotfish::engine::{Finish, GateReading, Generation, GenerationOptions, Session, SessionOptions};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

#[derive(Serialize)]
struct GateJson {
    score: Option<f64>,
    fired: bool,
}

#[derive(Serialize)]
struct ScoreLine {
    index: usize,
    gates: BTreeMap<String, GateJson>,
}

#[derive(Serialize)]
struct RunLine {
    index: usize,
    text: String,
    finish: &'static str,
    /// Why the guard blocked.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    tokens: usize,
    gates: BTreeMap<String, GateJson>,
    decode_tok_s: Option<f64>,
    prefill_tok_s: f64,
}

pub fn score(arguments: ScoreArguments) -> anyhow::Result<Outcome> {
    let prompts = prompts::read(&arguments.prompts)?;
    let guards = guard::load_guards(&arguments.guards.folders)?;
    let model = load(&arguments.model)?;
    let mut session = Session::new(&model, &guards.iter().collect::<Vec<_>>(), SessionOptions::default())?;
    let mut out = std::io::stdout().lock();
    let mut rows = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let readings = session.score(&model.prompt_tokens(prompt)?).with_context(|| format!("prompt {index}"))?;
        if arguments.json {
            writeln!(out, "{}", serde_json::to_string(&ScoreLine { index, gates: gates_json(&readings) })?)?;
            continue;
        }
        rows.extend(readings.into_iter().map(|reading| score_row(prompt, reading)));
    }
    if !arguments.json {
        writeln!(out, "{}", table(SCORE_HEADER, rows))?;
    }
    Ok(Outcome::Done)
}

const SCORE_HEADER: [&str; 4] = ["prompt", "gate", "score", "decision"];

fn score_row(prompt: &str, reading: GateReading) -> [String; 4] {
    let score = reading.score.map_or("none".into(), |score| format!("{score:+.2}"));
    [prompt.to_owned(), reading.gate, score, if reading.fired { "fires".into() } else { "passes".into() }]
}

pub fn run(arguments: RunArguments) -> anyhow::Result<Outcome> {
    let prompts = match (&arguments.input.prompt, &arguments.input.prompts) {
        (Some(prompt), _) => vec![prompt.clone()],
        (None, Some(path)) => prompts::read(path)?,
        (None, None) => unreachable!("clap asks for one of them"),
    };
    let mut guards = guard::load_guards(&arguments.guards)?;
    guard::set_strengths(&mut guards, &arguments.strength)?;
    let model = load(&arguments.model)?;
    let options = SessionOptions { n_ctx: arguments.context, ..Default::default() };
    let mut session = Session::new(&model, &guards.iter().collect::<Vec<_>>(), options)?;
    let generation = GenerationOptions {
        max_tokens: arguments.max_tokens,
        temperature: arguments.temperature,
        seed: arguments.seed,
        ignore_end: false,
    };
    let mut out = std::io::stdout().lock();
    let mut outcome = Outcome::Done;
    for (index, prompt) in prompts.iter().enumerate() {
        let tokens = model.prompt_tokens(prompt)?;
        if arguments.json {
            let answer = session.generate(&tokens, generation, |_| ()).with_context(|| format!("prompt {index}"))?;
            if matches!(answer.finish, Finish::Blocked(_)) {
                outcome = Outcome::Blocked;
            }
            writeln!(out, "{}", serde_json::to_string(&run_line(index, answer))?)?;
            continue;
        }
        let mut broken = None;
        let answer = session.generate(&tokens, generation, |piece| {
            // Shown as it comes; what a terminal makes of half a character is mended by the other half.
            broken = broken.take().or(out.write_all(piece).and_then(|()| out.flush()).err());
        });
        if let Some(error) = broken {
            return Err(error.into());
        }
        let answer = answer.with_context(|| format!("prompt {index}"))?;
        if let Finish::Blocked(reason) = answer.finish {
            outcome = Outcome::Blocked;
            out.flush()?;
            eprintln!("blocked: {reason}");
        } else {
            writeln!(out)?;
        }
    }
    Ok(outcome)
}

fn run_line(index: usize, answer: Generation) -> RunLine {
    let decoded = answer.tokens.len().saturating_sub(1);
    let (finish, reason) = match answer.finish {
        Finish::Stop => ("stop", None),
        Finish::Length => ("length", None),
        Finish::Blocked(reason) => ("blocked", Some(reason)),
    };
    RunLine {
        index,
        text: answer.text,
        finish,
        reason,
        tokens: answer.tokens.len(),
        gates: gates_json(&answer.gates),
        decode_tok_s: (decoded > 0).then(|| per_second(decoded, answer.decode_time)),
        prefill_tok_s: per_second(answer.prompt_tokens, answer.prefill_time),
    }
}

fn gates_json(readings: &[GateReading]) -> BTreeMap<String, GateJson> {
    readings
        .iter()
        .map(|reading| (reading.gate.clone(), GateJson { score: reading.score, fired: reading.fired }))
        .collect()
}

fn per_second(tokens: usize, time: Duration) -> f64 {
    tokens as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE)
}
