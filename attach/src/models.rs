//! The models that the process has loaded, each read once.

use crate::guarding::Refusal;
use crate::guards::{Guards, LoadedModel, lock};
use crate::llama::{Llama, Model};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

pub struct Models {
    guards: Arc<Guards>,
    /// By their addresses. One that no context is guarded for any more may have been freed, and another lie there now.
    known: Mutex<HashMap<usize, Weak<LoadedModel>>>,
}

impl Models {
    pub fn new(guards: Arc<Guards>) -> Self {
        Self { guards, known: Mutex::default() }
    }

    pub fn guards(&self) -> &Arc<Guards> {
        &self.guards
    }

    /// What `model` is, and what guards it.
    ///
    /// # Safety
    /// `model` must be a living model of `llama`.
    ///
    /// # Errors
    /// It does not say what it is.
    pub unsafe fn of(&self, llama: &Llama, model: *const Model) -> Result<Arc<LoadedModel>, Refusal> {
        let known = lock(&self.known).get(&(model as usize)).and_then(Weak::upgrade);
        // Another may lie where one was freed that something still keeps.
        // SAFETY: guaranteed by the caller.
        let is_it = |known: &Arc<LoadedModel>| unsafe {
            known.shape == llama.shape(model) && known.quantization == llama.quantization(model)
        };
        if let Some(known) = known.filter(is_it) {
            return Ok(known);
        }
        // SAFETY: guaranteed by the caller.
        let loaded = unsafe {
            let identity = llama.identity(model).ok_or(Refusal::Unknown("its model has no `general.architecture`"))?;
            self.guards.add(identity, llama.shape(model), llama.quantization(model), llama.token_bytes(model))
        };
        lock(&self.known).insert(model as usize, Arc::downgrade(&loaded));
        Ok(loaded)
    }

    /// Where a model lies, while it is loaded.
    pub fn address_of(&self, model: &Arc<LoadedModel>) -> Option<*const Model> {
        let known = lock(&self.known);
        let (address, _) = known.iter().find(|(_, known)| known.as_ptr() == Arc::as_ptr(model))?;
        Some(*address as *const Model)
    }

    /// Says that a model is about to be freed.
    pub fn forget(&self, model: *const Model) {
        lock(&self.known).remove(&(model as usize));
    }
}
