use super::activations::{ActivationReader, Activations};
use super::attach::{compile, probe_activations};
use super::model::{Model, beside, context_params};
use super::{EngineError, GuardOptions};
use crate::guard::Guard;
use crate::hook::GuardedContext;
use crate::program::Program;
use crate::tensor::LayerIndex;
use std::collections::HashMap;
use std::sync::Arc;

/// Compiles guards for one model time and again, beside whatever runs it: what a probe reads of the model is read once, and one small context serves all dry
/// runs.
pub struct GuardCompiler<'model> {
    model: &'model Model,
    proving_ground: GuardedContext<'model>,
    probes: HashMap<(String, LayerIndex), Arc<Activations>>,
}

/// Tokens that a dry run has room for: it takes one, and llama.cpp rounds up.
const ROOM: u32 = 32;

impl<'model> GuardCompiler<'model> {
    /// # Errors
    /// llama.cpp can't make a context.
    pub fn new(model: &'model Model) -> Result<Self, EngineError> {
        let observer = Arc::new(Program::observer(model.shape()));
        let proving_ground = model.weights().guarded(beside(context_params(ROOM, ROOM)), observer)?;
        Ok(Self { model, proving_ground, probes: HashMap::new() })
    }

    /// A program of `guards`, which act in this order, checked as [`program_for`](super::program_for) checks it, and proven by a dry run of one token: every hook
    /// point of it fires. With no guards it is one that changes nothing.
    ///
    /// # Errors
    /// Whichever of those fails.
    pub fn compile(&mut self, guards: &[&Guard]) -> Result<Arc<Program>, EngineError> {
        if guards.is_empty() {
            return Ok(Arc::new(Program::observer(self.model.shape())));
        }
        let (weights, probes) = (self.model.weights(), &mut self.probes);
        let program = compile(weights, self.model.identity(), guards, GuardOptions::default(), &mut |probe| {
            let key = (probe.prompt.clone(), probe.layer);
            if let Some(known) = probes.get(&key) {
                return Ok(Arc::clone(known));
            }
            let read = probe_activations(weights, &probe.prompt, probe.layer, ActivationReader::beside)?;
            probes.insert(key, Arc::clone(&read));
            Ok(read)
        })?;
        let program = Arc::new(program);
        self.proving_ground.prove(Arc::clone(&program))?;
        Ok(program)
    }
}
