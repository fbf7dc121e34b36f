use super::{BenignProjection, LearnError, Progress, benign_projections};
use crate::engine::{EngineError, Model, Prompt, Session, SessionOptions};
use crate::guard::manifest::{InterventionEntry, InterventionName, VectorEntry};
use crate::guard::{Guard, InterventionKind, Manifest, StrengthUnit, compose_guard};
use crate::steering::{SteeringVector, VectorKind};
use crate::tensor::{LayerIndex, kl_divergence, log_softmax};
use llama_cpp_2::token::LlamaToken;

/// What adding a layer's vector did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SweptLayer {
    pub layer: LayerIndex,
    /// Standard deviation of benign projections along the vector: what the strength is in units of.
    pub deviation: f64,
    pub effect: f64,
    /// To the unguarded model.
    pub kl: f64,
}

/// A guard that adds `vector` to every token but the first, `strength` benign standard deviations of it.
///
/// # Errors
/// A vector that can't be a guard's, or numbers that do not fit.
pub fn adding(model: &Model, vector: &SteeringVector, strength: f64, deviation: f64) -> Result<Guard, LearnError> {
    let add = InterventionEntry {
        strength,
        unit: StrengthUnit::Deviation,
        deviation: Some(deviation),
        ..InterventionEntry::new(InterventionName::Add, "")
    };
    guard_along(model, vector.layer, vector.values.clone(), add)
}

/// A guard of one intervention, `entry`'s, along `direction` at `layer`, to be tried and never written: it has no gate and no probe.
///
/// # Errors
/// A direction that is not one of this model's, or an entry that can't be a guard's.
pub fn guard_along(
    model: &Model,
    layer: LayerIndex,
    direction: Vec<f32>,
    entry: InterventionEntry,
) -> Result<Guard, LearnError> {
    let name = "direction".to_owned();
    let vector = VectorEntry {
        name: name.clone(),
        layer: layer.into(),
        tensor: name.clone(),
        kind: VectorKind::Direction,
        mapping: None,
        method: None,
        mean_norm: None,
    };
    let manifest = Manifest {
        vectors: vec![vector],
        interventions: vec![InterventionEntry { vector: Some(name.clone()), ..entry }],
        ..Manifest::new("steering-sweep", model.identity())
    };
    Ok(compose_guard(&manifest, &[(name, direction)]).map_err(EngineError::from)?)
}

/// Adds each of `vectors` at its layer, `strength` standard deviations of the projections of `benign` prompts, and has `measure` say what that does
/// under the guard that it is given: the effect that is wanted, and the KL to the unguarded model. In the order of the vectors.
///
/// # Errors
/// The model's last layer, where projections can't be measured, and those of `measure`.
pub fn sweep(
    model: &Model,
    vectors: &[SteeringVector],
    strength: f64,
    benign: &[Prompt],
    mut measure: impl FnMut(&Guard) -> Result<(f64, f64), LearnError>,
    progress: Progress<'_>,
) -> Result<Vec<SweptLayer>, LearnError> {
    let mut swept = Vec::new();
    for (index, vector) in vectors.iter().enumerate() {
        let unit = adding(model, vector, 1.0, 1.0)?;
        let adds =
            |intervention: &crate::guard::Intervention| matches!(intervention.kind, InterventionKind::Add { .. });
        let projections = benign_projections(model, &unit, adds, benign, &mut |_, _| ())?;
        for BenignProjection { deviation, .. } in projections {
            let (effect, kl) = measure(&adding(model, vector, strength, deviation)?)?;
            swept.push(SweptLayer { layer: vector.layer, deviation, effect, kl });
        }
        progress(index + 1, vectors.len());
    }
    Ok(swept)
}

/// The layer with the greatest effect of those whose KL is at most `most`.
pub fn best_of_sweep(swept: &[SweptLayer], most: f64) -> Option<&SweptLayer> {
    swept.iter().filter(|layer| layer.kl <= most).max_by(|a, b| a.effect.total_cmp(&b.effect))
}

/// What a guard does to the first token of answers: how much likelier it makes some tokens after some prompts, and how far it moves all of them
/// after others.
pub struct FirstTokens<'a> {
    model: &'a Model,
    wanted: Vec<LlamaToken>,
    /// Prompts whose answers should begin so, with their logits unguarded.
    steered: Vec<(Vec<LlamaToken>, Vec<f32>)>,
    /// Prompts whose answers should not change.
    kept: Vec<(Vec<LlamaToken>, Vec<f32>)>,
}

impl<'a> FirstTokens<'a> {
    /// Each of `beginnings` counts with its first token.
    ///
    /// # Errors
    /// A beginning of no token, or a prompt that the model can't run.
    pub fn new(
        model: &'a Model,
        beginnings: &[String],
        steered: &[Prompt],
        kept: &[Prompt],
    ) -> Result<Self, LearnError> {
        let first = |text: &String| {
            let tokens = model.text_tokens(text);
            tokens.first().copied().ok_or(EngineError::EmptyPrompt)
        };
        let mut wanted = beginnings.iter().map(first).collect::<Result<Vec<_>, _>>()?;
        wanted.sort_unstable_by_key(|token| token.0);
        wanted.dedup();
        let mut session = Session::new(model, &[], SessionOptions::default())?;
        let mut read = |prompts: &[Prompt]| -> Result<Vec<_>, LearnError> {
            let one = |prompt: &Prompt| -> Result<_, LearnError> {
                let tokens = model.tokens_read(None, prompt)?;
                let last = session.prefill(&tokens)?;
                Ok((tokens, session.logits(last).to_vec()))
            };
            prompts.iter().map(one).collect()
        };
        let (steered, kept) = (read(steered)?, read(kept)?);
        Ok(Self { model, wanted, steered, kept })
    }

    /// Under `guard`: the mean change of the log-odds that the answer to a steered prompt begins with a wanted token, and the mean KL divergence
    /// of the distribution of the first token after a kept one from the unguarded model's, in nats.
    ///
    /// # Errors
    /// The guard fails.
    pub fn measure(&self, guard: &Guard) -> Result<(f64, f64), LearnError> {
        let mut session = Session::new(self.model, &[guard], SessionOptions::default())?;
        let (mut effect, mut kl) = (0.0, 0.0);
        for (prompt, plain) in &self.steered {
            let last = session.prefill(prompt)?;
            effect += self.log_odds(session.logits(last)) - self.log_odds(plain);
        }
        for (prompt, plain) in &self.kept {
            let last = session.prefill(prompt)?;
            kl += kl_divergence(plain, session.logits(last));
        }
        Ok((effect / self.steered.len().max(1) as f64, kl / self.kept.len().max(1) as f64))
    }

    /// That the next token is a wanted one. Of logarithms, so that what is nearly certain or nearly impossible keeps its digits.
    fn log_odds(&self, logits: &[f32]) -> f64 {
        let logs = log_softmax(logits);
        let sum = |wanted: bool| -> f64 {
            let of = logs.iter().enumerate().filter(|(token, _)| {
                self.wanted.binary_search_by_key(&(*token as i32), |token| token.0).is_ok() == wanted
            });
            of.map(|(_, log)| log.exp()).sum::<f64>()
        };
        sum(true).max(f64::MIN_POSITIVE).ln() - sum(false).max(f64::MIN_POSITIVE).ln()
    }
}
