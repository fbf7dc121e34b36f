use super::args::{RunArguments, ScoreArguments};
use super::models::load;
use super::table::table;
use super::{Outcome, guard, prompts};
use anyhow::{Context, bail};
use pilotfish::engine::scheduler::{End, Event, Request, RequestId, SchedulerOptions, Summary, Toggle};
use pilotfish::engine::{GateReading, Prompt, Sampling, Scheduler, Session, SessionOptions};
use pilotfish::program::Setting;
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
    guard::warn_of_adapters(&model, &guards);
    let mut session = Session::new(&model, &guards.iter().collect::<Vec<_>>(), SessionOptions::default())?;
    let mut out = std::io::stdout().lock();
    let mut rows = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let readings = session.score(&model.tokens_read(None, prompt)?).with_context(|| format!("prompt {index}"))?;
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

fn score_row(prompt: &Prompt, reading: GateReading) -> [String; 4] {
    let score = reading.score.map_or("none".into(), |score| format!("{score:+.2}"));
    [prompt.to_string(), reading.gate, score, if reading.fired { "fires".into() } else { "passes".into() }]
}

pub fn run(arguments: RunArguments) -> anyhow::Result<Outcome> {
    let prompts = match (&arguments.input.prompt, &arguments.input.prompts) {
        (Some(prompt), _) => vec![prompt.as_str().into()],
        (None, Some(path)) => prompts::read(path)?,
        (None, None) => unreachable!("clap asks for one of them"),
    };
    let mut guards = guard::load_guards(&arguments.guards)?;
    guard::set_strengths(&mut guards, &arguments.strength)?;
    let model = load(&arguments.model)?;
    guard::warn_of_adapters(&model, &guards);
    let parallel = arguments.parallel.get();
    let options = SchedulerOptions {
        n_sequences: parallel,
        n_ctx: arguments.context,
        // One after the other, every prompt is read the same way however many there are, so that scores are the same to the last bit.
        reuse_prefixes: parallel > 1,
        ..Default::default()
    };
    let mut scheduler = Scheduler::guarded(&model, &guards.iter().collect::<Vec<_>>(), options)?;
    let sampling = Sampling { temperature: arguments.temperature, seed: arguments.seed, ..Default::default() };
    let begins_off = |name: &String| Toggle { name: name.clone(), from_token: 1, setting: Setting::Off };
    let toggles: Vec<Toggle> =
        arguments.off.iter().map(begins_off).chain(arguments.toggle.into_iter().map(|of| of.0)).collect();
    let mut answers = Answers { json: arguments.json, ..Default::default() };
    let mut submitted = 0;
    let mut refused = None;
    loop {
        // No sooner than it can run: what is wrong with a prompt is told after the answers before it.
        let can_run = |(running, waiting)| running + waiting < parallel as usize;
        while refused.is_none() && submitted < prompts.len() && can_run(scheduler.load()) {
            let request = model.tokens_read(None, &prompts[submitted]).map(|tokens| Request {
                sampling: sampling.clone(),
                stop: arguments.stop.clone(),
                toggles: toggles.clone(),
                ..Request::new(tokens, arguments.max_tokens)
            });
            match request.and_then(|request| scheduler.submit(request)) {
                Ok(id) => {
                    answers.indices.insert(id, submitted);
                    submitted += 1;
                }
                Err(error) => refused = Some(error),
            }
        }
        let mut outcome = Ok(());
        let busy = scheduler.step(|event| {
            if outcome.is_ok() {
                outcome = answers.take(event);
            }
        })?;
        outcome?;
        match refused.take_if(|_| !busy) {
            Some(error) => return Err(error).with_context(|| format!("prompt {submitted}")),
            None if !busy && submitted == prompts.len() => return Ok(answers.outcome),
            None => {}
        }
    }
}

/// Prints answers in the order of their prompts, the first that is not done as it comes.
#[derive(Default)]
struct Answers {
    json: bool,
    indices: BTreeMap<RequestId, usize>,
    /// Prompts whose answers are printed.
    printed: usize,
    /// Text that is not printed yet, and what came of the prompt.
    pending: BTreeMap<usize, (String, Option<Summary>)>,
    outcome: Outcome,
}

impl Answers {
    fn take(&mut self, event: Event) -> anyhow::Result<()> {
        let (Event::Text { request, .. } | Event::Token { request, .. } | Event::Ended { request, .. }) = &event;
        let index = self.indices[request];
        let answer = self.pending.entry(index).or_default();
        match event {
            Event::Text { text, .. } => answer.0 += &text,
            Event::Token { .. } => {}
            Event::Ended { summary, .. } => answer.1 = Some(summary),
        }
        let mut out = std::io::stdout().lock();
        while let Some((text, summary)) = self.pending.get_mut(&self.printed) {
            if !self.json {
                out.write_all(std::mem::take(text).as_bytes())?;
                out.flush()?;
            }
            let Some(summary) = summary.take() else { break };
            let text = std::mem::take(text);
            self.pending.remove(&self.printed);
            let index = self.printed;
            self.printed += 1;
            let line = run_line(index, text, summary)?;
            if line.reason.is_some() {
                self.outcome = Outcome::Blocked;
            }
            match &line.reason {
                _ if self.json => writeln!(out, "{}", serde_json::to_string(&line)?)?,
                Some(reason) => eprintln!("blocked: {reason}"),
                None => writeln!(out)?,
            }
        }
        Ok(())
    }
}

fn run_line(index: usize, text: String, summary: Summary) -> anyhow::Result<RunLine> {
    let (finish, reason) = match summary.end {
        End::Stop | End::StopString(_) => ("stop", None),
        End::Length | End::ContextFull => ("length", None),
        End::Blocked(block) => ("blocked", Some(block.to_string())),
        End::OutOfForm(reason) => bail!("prompt {index}: {reason}"),
        End::Failed(error) => return Err(error).with_context(|| format!("prompt {index}")),
        End::Cancelled => bail!("prompt {index} was cancelled"),
    };
    let decoded = summary.tokens.saturating_sub(1);
    Ok(RunLine {
        index,
        text,
        finish,
        reason,
        tokens: summary.tokens,
        gates: gates_json(&summary.gates),
        decode_tok_s: (decoded > 0).then(|| per_second(decoded, summary.decode_time)),
        prefill_tok_s: per_second(summary.prompt_tokens - summary.reused_tokens, summary.prefill_time),
    })
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
