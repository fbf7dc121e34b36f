use super::LearnError;
use crate::engine::{Model, Prompt, Session};

/// What a gate made of a prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateScore {
    /// In benign standard deviations, or as it was projected where the session ignores calibrations.
    pub score: f64,
    pub fired: bool,
}

/// What every gate of the session's guards makes of every prompt, `[gate][prompt]`. `step` is called after each prompt.
///
/// # Errors
/// A prompt that can't be read, or in which a gate reads nothing.
pub fn gate_scores(
    model: &Model,
    session: &mut Session<'_>,
    prompts: &[Prompt],
    step: &mut dyn FnMut(),
) -> Result<Vec<Vec<GateScore>>, LearnError> {
    let mut gates = vec![Vec::with_capacity(prompts.len()); session.gate_readings().len()];
    for (index, prompt) in prompts.iter().enumerate() {
        let at = |source| LearnError::Prompt { index, source };
        let readings = session.score(&model.tokens_read(None, prompt).map_err(at)?).map_err(at)?;
        for (gate, reading) in gates.iter_mut().zip(readings) {
            let score = reading.score.ok_or(LearnError::NothingRead { gate: reading.gate, index })?;
            gate.push(GateScore { score, fired: reading.fired });
        }
        step();
    }
    Ok(gates)
}
