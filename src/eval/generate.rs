use super::EvalError;
use crate::engine::scheduler::{End, Event, Request, RequestId, SchedulerOptions, Toggle};
use crate::engine::{EngineError, Model, Prompt, Scheduler};
use crate::guard::Guard;
use crate::learn::Progress;
use llama_cpp_2::token::LlamaToken;
use std::collections::BTreeMap;

/// What a model said to a prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Generated {
    pub text: String,
    /// Whether a gate blocked it.
    pub blocked: bool,
    /// Whether any gate fired.
    pub fired: bool,
}

/// Prompts that are answered at once.
const PARALLEL: u32 = 8;

/// Greedy answers of up to `max_tokens` tokens to `prompts`, given as tokens with their template, under `guards` or none.
///
/// # Errors
/// A guard that is not for this model, or fails; a prompt that is empty.
pub fn generate(
    model: &Model,
    guards: &[&Guard],
    prompts: &[Vec<LlamaToken>],
    max_tokens: usize,
    progress: Progress<'_>,
) -> Result<Vec<Generated>, EvalError> {
    generate_set(model, guards, prompts, &[], max_tokens, progress)
}

/// As [`generate`], with interventions set on the way.
///
/// # Errors
/// As there, and an intervention that can't be set so.
pub fn generate_set(
    model: &Model,
    guards: &[&Guard],
    prompts: &[Vec<LlamaToken>],
    toggles: &[Toggle],
    max_tokens: usize,
    progress: Progress<'_>,
) -> Result<Vec<Generated>, EvalError> {
    let longest = prompts.iter().map(Vec::len).max().ok_or(EvalError::NoPrompts { what: "a generation" })?;
    let options = SchedulerOptions {
        n_sequences: PARALLEL.min(prompts.len() as u32),
        n_ctx: (longest + max_tokens + 1) as u32,
        queue: prompts.len(),
        // So that an answer does not depend on which prompts came before it.
        reuse_prefixes: false,
        ..Default::default()
    };
    let mut scheduler = Scheduler::guarded(model, guards, options)?;
    let mut index_of: BTreeMap<RequestId, usize> = BTreeMap::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let id = scheduler
            .submit(Request { toggles: toggles.to_vec(), ..Request::new(prompt.clone(), max_tokens) })
            .map_err(|source| EvalError::Prompt { index, source })?;
        index_of.insert(id, index);
    }
    let mut answers = vec![Generated::default(); prompts.len()];
    let (mut done, mut failed) = (0, None);
    while scheduler.step(|event| match event {
        Event::Text { request, text } => answers[index_of[&request]].text += &text,
        Event::Token { .. } => {}
        Event::Ended { request, summary } => {
            let answer = &mut answers[index_of[&request]];
            answer.fired = summary.gates.iter().any(|gate| gate.fired);
            match summary.end {
                End::Blocked(_) => answer.blocked = true,
                End::Failed(error) => failed = Some((index_of[&request], error.to_string())),
                _ => {}
            }
            done += 1;
            progress(done, prompts.len());
        }
    })? {
        if let Some((index, reason)) = failed.take() {
            return Err(EvalError::Unanswered { index, reason });
        }
    }
    match failed {
        Some((index, reason)) => Err(EvalError::Unanswered { index, reason }),
        None => Ok(answers),
    }
}

/// As [`generate`], of guards that do something only where a gate fires. `known` are answers under others that differ in what they do then: where no
/// gate fired there, they are the answers. Without them every prompt is answered.
pub fn generate_where_fired(
    model: &Model,
    guards: &[&Guard],
    prompts: &[Vec<LlamaToken>],
    known: Option<&[Generated]>,
    max_tokens: usize,
    progress: Progress<'_>,
) -> Result<Vec<Generated>, EvalError> {
    let Some(known) = known else { return generate(model, guards, prompts, max_tokens, progress) };
    let mut answers = known.to_vec();
    let again: Vec<usize> = (0..answers.len()).filter(|index| answers[*index].fired).collect();
    if !again.is_empty() {
        let asked: Vec<_> = again.iter().map(|index| prompts[*index].clone()).collect();
        let new = generate(model, guards, &asked, max_tokens, progress)?;
        again.into_iter().zip(new).for_each(|(index, answer)| answers[index] = answer);
    }
    progress(answers.len(), answers.len());
    Ok(answers)
}

/// Tokens of every prompt in the model's template, after a system prompt if there is one, with those of an answer that has begun.
///
/// # Errors
/// The template can't be applied.
pub fn tokens_of(model: &Model, system: Option<&str>, prompts: &[Prompt]) -> Result<Vec<Vec<LlamaToken>>, EvalError> {
    let tokens = |(index, prompt): (usize, &Prompt)| {
        model.tokens_read(system, prompt).map_err(|source: EngineError| EvalError::Prompt { index, source })
    };
    prompts.iter().enumerate().map(tokens).collect()
}
