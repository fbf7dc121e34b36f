use crate::engine::{EngineError, Model, Session, SessionOptions};
use crate::eval::EvalError;
use crate::eval::surprise::log_likelihood;
use crate::guard::Guard;
use crate::hook::ContextError;
use crate::learn::Progress;
use serde::Deserialize;

/// A question with one right answer among several.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    pub question: String,
    pub options: Vec<String>,
    /// Index of the right one.
    pub answer: usize,
}

/// Plain questions of everyday knowledge, written for this project: what a guard must not make a model forget.
const QUESTIONS: &str = include_str!("../data/questions.jsonl");

/// The project's own questions.
///
/// # Panics
/// Never: the file is part of the program, and a test reads it.
pub fn questions() -> Vec<Question> {
    QUESTIONS.lines().map(|line| serde_json::from_str(line).expect("a question a line")).collect()
}

/// What became of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answered {
    /// The right option was the likeliest.
    pub right: bool,
    /// A gate fired on the question.
    pub fired: bool,
}

/// Whether the model, under `guard` or none and after `system` or nothing, finds the right option of every question likeliest: the one with the
/// highest log-likelihood a byte as the answer (the length-normalised accuracy of Gao et al., lm-evaluation-harness). A question that the guard blocks is
/// not answered right.
///
/// # Errors
/// The guard is not for this model, or fails.
pub fn answered(
    model: &Model,
    guard: Option<&Guard>,
    system: Option<&str>,
    questions: &[Question],
    progress: Progress<'_>,
) -> Result<Vec<Answered>, EvalError> {
    let mut session = Session::new(model, guard.as_slice(), SessionOptions { n_ctx: 512, ..Default::default() })?;
    let mut all = Vec::with_capacity(questions.len());
    for (index, Question { question, options, answer }) in questions.iter().enumerate() {
        let prompt = model.tokens_read(system, &question.as_str().into())?;
        let mut scores = Vec::with_capacity(options.len());
        for option in options {
            let tokens = model.answer_tokens(question, option)?;
            match log_likelihood(&mut session, &prompt, &tokens) {
                Ok(likelihood) => scores.push(likelihood / option.len() as f64),
                Err(EngineError::Context(ContextError::Blocked { .. })) => break,
                Err(source) => return Err(EvalError::Prompt { index, source }),
            }
        }
        let best = (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        let right = scores.len() == options.len() && best == Some(*answer);
        all.push(Answered { right, fired: session.gate_readings().iter().any(|gate| gate.fired) });
        progress(index + 1, questions.len());
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Right answers are at every place alike, so that no habit of the model's earns anything.
    #[test]
    fn the_questions_are_sound() {
        let all = questions();
        assert!((60..=100).contains(&all.len()), "{}", all.len());
        let mut places = [0usize; 4];
        for Question { question, options, answer } in &all {
            assert_eq!(options.len(), 4, "{question}");
            assert!(question.ends_with('?'), "{question}");
            let distinct: std::collections::BTreeSet<&String> = options.iter().collect();
            assert!(distinct.len() == 4 && options.iter().all(|option| !option.trim().is_empty()), "{question}");
            places[*answer] += 1;
        }
        assert!(places.iter().all(|n| n.abs_diff(all.len() / 4) <= 1), "{places:?}");
        let distinct: std::collections::BTreeSet<_> = all.iter().map(|question| &question.question).collect();
        assert_eq!(distinct.len(), all.len());
    }
}
