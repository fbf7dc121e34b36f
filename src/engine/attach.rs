//! From a guard and a model to a context that is guarded: identity, compilation, probe, dry run.

use super::activations::{ActivationReader, Activations};
use super::model::Model;
use super::{EngineError, PromptTemplate, Weights, identity_of, quantization_of};
use crate::guard::{Guard, ModelIdentity, Probe};
use crate::hook::GuardedContext;
use crate::program::{Calibration, Program};
use crate::tensor::{self, LayerIndex};
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use std::sync::Arc;

/// How strictly a guard is held against the model.
#[derive(Debug, Clone, Copy)]
pub struct GuardOptions {
    pub calibration: Calibration,
    /// Whether to run the guard's probe on the model.
    pub probe: bool,
}

impl Default for GuardOptions {
    fn default() -> Self {
        Self { calibration: Calibration::Required, probe: true }
    }
}

/// A context of `model` under `guards`, which act in this order: one call for apps that link llama-cpp-2.
///
/// Checks that each guard is for this model (fingerprint, then its probe), compiles them, and proves by a dry run that every hook point fires.
///
/// # Errors
/// Whichever of those fails; no context is made then.
pub fn guard_context<'model>(
    model: &'model LlamaModel,
    backend: &LlamaBackend,
    params: LlamaContextParams,
    guards: &[&Guard],
) -> Result<GuardedContext<'model>, EngineError> {
    let program = program_for(Weights::of(model, backend), guards, GuardOptions::default())?;
    Ok(GuardedContext::new(model, backend, params, Arc::new(program))?)
}

/// Compiles `guards` into one program for a model, after checking that it is the one that each was made for. They act in this order (see
/// [`Program::stack`]).
///
/// # Errors
/// Another fingerprint, another answer to a probe, or guards that do not compile for this model.
pub fn program_for(weights: Weights<'_>, guards: &[&Guard], options: GuardOptions) -> Result<Program, EngineError> {
    let identity = identity_of("", weights.llama())?;
    compile(weights, &identity, guards, options, &mut |probe| {
        probe_activations(weights, &probe.prompt, probe.layer, ActivationReader::new)
    })
}

/// [`program_for`] a model of that identity, with the activations of a probe's prompt from `activations`.
pub(super) fn compile(
    weights: Weights<'_>,
    identity: &ModelIdentity,
    guards: &[&Guard],
    options: GuardOptions,
    activations: &mut dyn FnMut(&Probe) -> Result<Arc<Activations>, EngineError>,
) -> Result<Program, EngineError> {
    for guard in guards {
        if !guard.is_for(identity) {
            let target = guard.target();
            return Err(EngineError::OtherModel {
                guard: guard.name().into(),
                expected: format!("`{}` {}", target.architecture, target.fingerprint.short()),
                found: format!("`{}` {}", identity.architecture, identity.fingerprint.short()),
            });
        }
    }
    let quantization = quantization_of(weights.llama());
    let (program, uncalibrated) = Program::stack_for(guards, &quantization, weights.shape(), options.calibration)?;
    for guard in guards.iter().filter(|_| options.probe) {
        if let Some(probe) = &guard.target().probe {
            check_probe(guard, probe, &*activations(probe)?)?;
        }
    }
    // Of the right model only: what is another one has its error.
    if options.calibration == Calibration::Required {
        uncalibrated.warn();
    }
    Ok(program)
}

fn check_probe(guard: &Guard, probe: &Probe, activations: &Activations) -> Result<(), EngineError> {
    let vector =
        guard.vectors().iter().find(|vector| vector.name == probe.vector && vector.layer == probe.layer).ok_or_else(
            || EngineError::ProbeVector {
                guard: guard.name().into(),
                vector: probe.vector.clone(),
                layer: probe.layer,
            },
        )?;
    let found = probe_in(activations, &probe.prompt, &probe.vector, probe.layer, &vector.direction)?;
    let mismatch = |quantity, expected: f64, found: f64, margin: f64| {
        // A NaN is within no margin.
        if (found - expected).abs() <= margin {
            return Ok(());
        }
        Err(EngineError::Probe { guard: guard.name().into(), quantity, expected, found, margin })
    };
    mismatch("mean norm", probe.mean_norm, found.mean_norm, probe.tolerance * probe.mean_norm)?;
    let margin = probe.tolerance * probe.projection.abs().max(probe.spread);
    mismatch("projection", probe.projection, found.projection, margin)
}

/// [`measure_probe`] on a model that this room loaded.
///
/// # Errors
/// As there.
pub fn probe_of(
    model: &Model,
    prompt: &str,
    vector: &str,
    layer: LayerIndex,
    direction: &[f32],
) -> Result<Probe, EngineError> {
    measure_probe(model.weights(), prompt, vector, layer, direction)
}

/// Statistics of the residual of `prompt` (as plain text, no template) at `layer` over all tokens but the first: its mean norm, and the
/// mean and standard deviation of its projection on the unit vector of `direction` (`[n_embd]`).
///
/// # Errors
/// The prompt has fewer than three tokens, or the model can't run it.
pub fn measure_probe(
    weights: Weights<'_>,
    prompt: &str,
    vector: &str,
    layer: LayerIndex,
    direction: &[f32],
) -> Result<Probe, EngineError> {
    probe_in(&*probe_activations(weights, prompt, layer, ActivationReader::new)?, prompt, vector, layer, direction)
}

/// Makes a reader of layers, for so many tokens.
type MakeReader<'model> = fn(Weights<'model>, Vec<LayerIndex>, usize) -> Result<ActivationReader<'model>, EngineError>;

/// Residuals of `prompt` at `layer`, of all tokens but the first.
pub(super) fn probe_activations<'model>(
    weights: Weights<'model>,
    prompt: &str,
    layer: LayerIndex,
    reader: MakeReader<'model>,
) -> Result<Arc<Activations>, EngineError> {
    let tokens = PromptTemplate::Raw.tokens(weights.llama(), prompt)?;
    let mut reader = reader(weights, vec![layer], tokens.len())?;
    Ok(Arc::new(reader.every_token(&tokens)?))
}

fn probe_in(
    activations: &Activations,
    prompt: &str,
    vector: &str,
    layer: LayerIndex,
    direction: &[f32],
) -> Result<Probe, EngineError> {
    let unit = tensor::unit(direction).unwrap_or_default();
    let residual = activations.layer(layer);
    let projections: Vec<f64> = residual.rows().map(|row| f64::from(tensor::dot(row, &unit))).collect();
    let (projection, spread) = tensor::mean_and_deviation(&projections).ok_or(EngineError::EmptyPrompt)?;
    let mean_norm = residual.rows().map(tensor::norm).sum::<f64>() / residual.n_rows() as f64;
    Ok(Probe {
        prompt: prompt.to_owned(),
        vector: vector.to_owned(),
        layer,
        mean_norm,
        projection,
        spread,
        tolerance: PROBE_TOLERANCE,
    })
}

/// Room for quantization and kernels: between Q4 and Q8 files of one model residual norms differ by a few per cent.
const PROBE_TOLERANCE: f64 = 0.15;
