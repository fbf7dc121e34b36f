//! Setting `cb_eval` on a `LlamaContextParams`, which llama-cpp-2 has no setter for.

use super::{Hook, RawTensor};
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_sys_2 as sys;
use std::ffi::c_void;

// llama-cpp-2's LlamaContextParams has one field, the raw parameters. Equal size and alignment mean that the field fills the struct.
const _: () = assert!(
    size_of::<LlamaContextParams>() == size_of::<sys::llama_context_params>()
        && align_of::<LlamaContextParams>() == align_of::<sys::llama_context_params>(),
    "llama-cpp-2's LlamaContextParams is no longer the bare llama_context_params"
);

/// For apps that keep their own `LlamaContext`. [`GuardedContext`](super::GuardedContext) needs none of this.
pub trait EvalCallbackParams: Sized {
    /// Makes every context created with these parameters call `hook`.
    ///
    /// # Safety
    /// `hook` must stay valid, at its address, until every context made with these parameters is freed, and nothing may use it while
    /// one of them decodes. It must not serve two contexts that decode at the same time.
    #[must_use]
    unsafe fn with_eval_hook(self, hook: *mut Hook) -> Self;

    /// Number of KV streams that a context with these parameters has.
    fn n_streams(&self) -> usize;
}

impl EvalCallbackParams for LlamaContextParams {
    unsafe fn with_eval_hook(mut self, hook: *mut Hook) -> Self {
        let raw = raw_mut(&mut self);
        raw.cb_eval = Some(callback);
        raw.cb_eval_user_data = hook.cast();
        self
    }

    fn n_streams(&self) -> usize {
        let raw = raw(self);
        if raw.kv_unified { 1 } else { raw.n_seq_max.max(1) as usize }
    }
}

fn raw(params: &LlamaContextParams) -> &sys::llama_context_params {
    // SAFETY: the assertion above; llama-cpp-2 is pinned exactly, and its struct's one field is of this type.
    unsafe { &*std::ptr::from_ref(params).cast() }
}

fn raw_mut(params: &mut LlamaContextParams) -> &mut sys::llama_context_params {
    // SAFETY: as in `raw`.
    unsafe { &mut *std::ptr::from_mut(params).cast() }
}

unsafe extern "C" fn callback(tensor: *mut sys::ggml_tensor, ask: bool, user_data: *mut c_void) -> bool {
    // SAFETY: llama.cpp passes one of its tensors, and the user data that `with_eval_hook` set.
    unsafe { Hook::callback(tensor.cast::<RawTensor>(), ask, user_data) }
}
