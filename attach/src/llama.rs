//! The functions of llama.cpp that are needed, as its headers declare them.

use pilotfish::guard::{Fingerprint, ModelIdentity, quantization_name};
use pilotfish::hook::{DeviceTable, GgmlTable, MissingSymbol, RawTensor};
use pilotfish::program::{ModelShape, TokenBytes};
use pilotfish::tensor::{HiddenSize, LayerIndex};
use std::ffi::{CStr, CString, c_char, c_int, c_void};

macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $($(#[$doc])*
        #[repr(C)]
        pub struct $name {
            opaque: [u8; 0],
        })*
    };
}

opaque! {
    /// `llama_context`
    Context;
    /// `llama_model`
    Model;
    /// `llama_vocab`
    Vocab;
    /// `llama_memory_i`: a context's KV cache
    Memory;
    /// `llama_batch_ext`
    BatchExt;
    /// `ggml_backend_sched`
    Scheduler;
    /// `ggml_cgraph`
    Graph;
    /// `ggml_backend`
    Backend;
    /// `ggml_backend_device`
    Device;
}

/// `llama_batch`, which apps fill in and pass by value: a part of llama.cpp's interface (`llama.h`).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Batch {
    pub n_tokens: i32,
    pub token: *const i32,
    pub embd: *const f32,
    pub pos: *const i32,
    pub n_seq_id: *const i32,
    pub seq_id: *const *const i32,
    /// Which tokens' logits are wanted; null for the last one's alone.
    pub logits: *const i8,
}

/// `llama_embd`, which apps pass by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Embedding {
    data: *const f32,
    n_rows: usize,
    n_embd: usize,
}

/// `ggml_backend_sched_eval_callback`
pub type EvalCallback = unsafe extern "C" fn(*mut RawTensor, bool, *mut c_void) -> bool;

macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// Functions of the llama.cpp that the process has loaded.
        pub struct Llama {
            $(pub $field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            /// Newer than the rest: how many tokens one sequence has room for.
            n_ctx_seq: Option<unsafe extern "C" fn(*const Context) -> u32>,
            /// Newer too: what a sampler on the device has chosen for a row.
            sampled_token: Option<unsafe extern "C" fn(*mut Context, i32) -> i32>,
            pub ggml: GgmlTable,
        }

        impl Llama {
            /// Takes the functions from `resolve`, which gives the address of a symbol or null.
            ///
            /// # Safety
            /// A non-null address that `resolve` gives for a name must be that function of llama.cpp's or ggml's C API, all of one copy, and stay loaded for
            /// as long as what is returned is used.
            ///
            /// # Errors
            /// The first function that `resolve` does not find.
            pub unsafe fn lookup(mut resolve: impl FnMut(&CStr) -> *const c_void) -> Result<Self, MissingSymbol> {
                $(let $field = {
                    let address = resolve($symbol);
                    if address.is_null() {
                        return Err(MissingSymbol { symbol: $symbol.to_string_lossy().into_owned() });
                    }
                    // SAFETY: not null; the caller guarantees that it is the function of that name, whose C signature this is.
                    unsafe { std::mem::transmute::<*const c_void, unsafe extern "C" fn($($argument),*) $(-> $result)?>(address) }
                };)*
                // SAFETY: as above; null is `None`.
                let n_ctx_seq = unsafe {
                    std::mem::transmute::<*const c_void, Option<unsafe extern "C" fn(*const Context) -> u32>>(resolve(c"llama_n_ctx_seq"))
                };
                // SAFETY: as above.
                let sampled_token = unsafe {
                    std::mem::transmute::<*const c_void, Option<unsafe extern "C" fn(*mut Context, i32) -> i32>>(resolve(c"llama_get_sampled_token_ith"))
                };
                // SAFETY: guaranteed by the caller.
                let ggml = unsafe { GgmlTable::lookup(&mut resolve)? };
                // SAFETY: as above. Without it a residual on a device goes by copy.
                let ggml = match unsafe { DeviceTable::lookup(&mut resolve) } {
                    Ok(device) => ggml.with_device(Box::leak(Box::new(device))),
                    Err(missing) => {
                        tracing::debug!("{missing}: residuals on a device go by copy");
                        ggml
                    }
                };
                Ok(Self { $($field,)* n_ctx_seq, sampled_token, ggml })
            }
        }
    };
}

functions! {
    decode = c"llama_decode": fn(*mut Context, Batch) -> i32;
    get_model = c"llama_get_model": fn(*const Context) -> *const Model;
    get_memory = c"llama_get_memory": fn(*const Context) -> *mut Memory;
    seq_pos_max = c"llama_memory_seq_pos_max": fn(*mut Memory, i32) -> i32;
    seq_cp = c"llama_memory_seq_cp": fn(*mut Memory, i32, i32, i32, i32);
    seq_add = c"llama_memory_seq_add": fn(*mut Memory, i32, i32, i32, i32);
    n_seq_max = c"llama_n_seq_max": fn(*const Context) -> u32;
    n_ctx = c"llama_n_ctx": fn(*const Context) -> u32;
    n_ubatch = c"llama_n_ubatch": fn(*const Context) -> u32;
    get_logits_ith = c"llama_get_logits_ith": fn(*mut Context, i32) -> *mut f32;
    get_vocab = c"llama_model_get_vocab": fn(*const Model) -> *const Vocab;
    n_embd = c"llama_model_n_embd": fn(*const Model) -> i32;
    n_layer = c"llama_model_n_layer": fn(*const Model) -> i32;
    model_size = c"llama_model_size": fn(*const Model) -> u64;
    meta_val_str = c"llama_model_meta_val_str": fn(*const Model, *const c_char, *mut c_char, usize) -> i32;
    n_tokens = c"llama_vocab_n_tokens": fn(*const Vocab) -> i32;
    token_text = c"llama_vocab_get_text": fn(*const Vocab, i32) -> *const c_char;
    token_attributes = c"llama_vocab_get_attr": fn(*const Vocab, i32) -> c_int;
    token_to_piece = c"llama_token_to_piece": fn(*const Vocab, i32, *mut c_char, i32, i32, bool) -> i32;
    tokenize = c"llama_tokenize": fn(*const Vocab, *const c_char, i32, *mut i32, i32, bool, bool) -> i32;
    vocab_eot = c"llama_vocab_eot": fn(*const Vocab) -> i32;
    vocab_eos = c"llama_vocab_eos": fn(*const Vocab) -> i32;
    set_eval_callback = c"ggml_backend_sched_set_eval_callback": fn(*mut Scheduler, Option<EvalCallback>, *mut c_void);
    name = c"ggml_get_name": fn(*const RawTensor) -> *const c_char;
    n_rows = c"ggml_nrows": fn(*const RawTensor) -> i64;
    n_bytes = c"ggml_nbytes": fn(*const RawTensor) -> usize;
    read = c"ggml_backend_tensor_get": fn(*const RawTensor, *mut c_void, usize, usize);
    memset = c"ggml_backend_tensor_memset": fn(*mut RawTensor, u8, usize, usize);
    synchronize = c"ggml_backend_sched_synchronize": fn(*mut Scheduler);
    n_backends = c"ggml_backend_sched_get_n_backends": fn(*mut Scheduler) -> c_int;
    backend = c"ggml_backend_sched_get_backend": fn(*mut Scheduler, c_int) -> *mut Backend;
    backend_device = c"ggml_backend_get_device": fn(*mut Backend) -> *mut Device;
    device_kind = c"ggml_backend_dev_type": fn(*mut Device) -> c_int;
    set_output = c"ggml_set_output": fn(*mut RawTensor);
    graph_n_nodes = c"ggml_graph_n_nodes": fn(*mut Graph) -> c_int;
    graph_node = c"ggml_graph_node": fn(*mut Graph, c_int) -> *mut RawTensor;
    graph_tensor = c"ggml_graph_get_tensor": fn(*const Graph, *const c_char) -> *mut RawTensor;
}

impl Llama {
    /// What `tensor` holds.
    ///
    /// # Safety
    /// `tensor` must be a tensor of this llama.cpp, in memory, that nothing computes meanwhile.
    pub unsafe fn contents(&self, tensor: *const RawTensor) -> Vec<u8> {
        // SAFETY: guaranteed by the caller; there is room for all of it.
        unsafe {
            let mut bytes = vec![0u8; (self.n_bytes)(tensor)];
            (self.read)(tensor, bytes.as_mut_ptr().cast(), 0, bytes.len());
            bytes
        }
    }

    /// Whether all that `scheduler` computes the CPU does.
    ///
    /// # Safety
    /// `scheduler` must be a living one of this llama.cpp.
    pub unsafe fn is_on_cpu(&self, scheduler: *mut Scheduler) -> bool {
        /// `GGML_BACKEND_DEVICE_TYPE_CPU`
        const CPU: c_int = 0;
        // SAFETY: guaranteed by the caller; indices run to the number of backends, and a backend has its device as long as it lives.
        unsafe {
            (0..(self.n_backends)(scheduler)).all(|index| {
                let device = (self.backend_device)((self.backend)(scheduler, index));
                !device.is_null() && (self.device_kind)(device) == CPU
            })
        }
    }

    /// Whether a sampler on the device has chosen the token of a row already.
    ///
    /// # Safety
    /// `context` must be a living context that has decoded a batch with such a row.
    pub unsafe fn is_sampled(&self, context: *mut Context, row: i32) -> bool {
        // SAFETY: guaranteed by the caller. Below 0 there is none.
        self.sampled_token.is_some_and(|sampled| unsafe { sampled(context, row) } >= 0)
    }

    /// Has `graph`, when it is given memory or that is planned, keep the residuals of `layers` to its end. Returns those that it has.
    ///
    /// # Safety
    /// `graph` must be a graph of this llama.cpp that is not in memory yet.
    pub unsafe fn keep_residuals(&self, graph: *const Graph, layers: &[LayerIndex]) -> Vec<LayerIndex> {
        let is_there = |layer: &LayerIndex| {
            let Ok(name) = CString::new(format!("l_out-{layer}")) else { return false };
            // SAFETY: guaranteed by the caller; the name ends in a NUL.
            unsafe {
                let residual = (self.graph_tensor)(graph, name.as_ptr());
                if !residual.is_null() {
                    (self.set_output)(residual);
                }
                !residual.is_null()
            }
        };
        layers.iter().copied().filter(is_there).collect()
    }

    /// How many KV streams the context has: as many as it takes to make its tokens of one sequence's.
    ///
    /// # Safety
    /// `context` must be a living context of this llama.cpp.
    pub unsafe fn n_streams(&self, context: *const Context) -> usize {
        let Some(n_ctx_seq) = self.n_ctx_seq else { return 1 };
        // SAFETY: guaranteed by the caller.
        let (all, one) = unsafe { ((self.n_ctx)(context), n_ctx_seq(context)) };
        (all.checked_div(one).unwrap_or(1) as usize).max(1)
    }

    /// Metadata of a model's GGUF.
    ///
    /// # Safety
    /// `model` must be a living model of this llama.cpp.
    pub unsafe fn metadata(&self, model: *const Model, key: &CStr) -> Option<String> {
        let mut value = vec![0u8; 256];
        // SAFETY: guaranteed by the caller; the buffer has the length that is told, into which llama.cpp writes a string with its NUL.
        let length = unsafe { (self.meta_val_str)(model, key.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        let length = usize::try_from(length).ok().filter(|length| *length < value.len())?;
        value.truncate(length);
        String::from_utf8(value).ok()
    }

    /// What a model is (see [`Fingerprint`]); `None` where its GGUF does not say its architecture.
    ///
    /// # Safety
    /// As of [`metadata`](Self::metadata).
    pub unsafe fn identity(&self, model: *const Model) -> Option<ModelIdentity> {
        // SAFETY: guaranteed by the caller; ids run to the number of tokens, and texts end in NULs and live as long as the model.
        unsafe {
            let architecture = self.metadata(model, c"general.architecture")?;
            let vocab = (self.get_vocab)(model);
            let token = |id| {
                let text = (self.token_text)(vocab, id);
                let text = if text.is_null() { &b""[..] } else { CStr::from_ptr(text).to_bytes() };
                (text, (self.token_attributes)(vocab, id) as u32)
            };
            let shape = self.shape(model);
            let n_tokens = (self.n_tokens)(vocab).max(0);
            let fingerprint =
                Fingerprint::compute(&architecture, shape.n_embd.0 as u32, shape.n_layer, (0..n_tokens).map(token));
            let name = self.metadata(model, c"general.name").unwrap_or_default();
            Some(ModelIdentity { name, architecture, fingerprint, adapters: Vec::new() })
        }
    }

    /// # Safety
    /// As of [`metadata`](Self::metadata).
    pub unsafe fn shape(&self, model: *const Model) -> ModelShape {
        // SAFETY: guaranteed by the caller.
        let (n_embd, n_layer) = unsafe { ((self.n_embd)(model), (self.n_layer)(model)) };
        ModelShape { n_embd: HiddenSize(n_embd.max(0) as usize), n_layer: n_layer.max(0) as u32 }
    }

    /// # Safety
    /// As of [`metadata`](Self::metadata).
    pub unsafe fn quantization(&self, model: *const Model) -> String {
        // SAFETY: guaranteed by the caller.
        unsafe { quantization_name(self.metadata(model, c"general.file_type").as_deref(), (self.model_size)(model)) }
    }

    /// What every token spells.
    ///
    /// # Safety
    /// As of [`metadata`](Self::metadata).
    pub unsafe fn token_bytes(&self, model: *const Model) -> TokenBytes {
        // SAFETY: guaranteed by the caller.
        let vocab = unsafe { (self.get_vocab)(model) };
        // SAFETY: as above.
        let n_tokens = unsafe { (self.n_tokens)(vocab) };
        let piece = |id: i32| {
            let mut bytes = vec![0u8; 32];
            loop {
                let room = bytes.len() as i32;
                // SAFETY: as above; the buffer has the length that is told.
                let n = unsafe { (self.token_to_piece)(vocab, id, bytes.as_mut_ptr().cast(), room, 0, true) };
                match usize::try_from(n) {
                    Ok(n) => {
                        bytes.truncate(n);
                        return bytes;
                    }
                    // Minus what it takes.
                    Err(_) if n > i32::MIN && -n > room => bytes.resize(-n as usize, 0),
                    Err(_) => return Vec::new(),
                }
            }
        };
        TokenBytes::new((0..n_tokens).map(piece))
    }

    /// The tokens of `text`, with nothing added.
    ///
    /// # Safety
    /// As of [`metadata`](Self::metadata).
    pub unsafe fn tokens(&self, model: *const Model, text: &str) -> Vec<i32> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.tokenized(model, text, false, false) }
    }

    /// The tokens of a prompt, with what the model has at its beginning: a template up to the text, the text, which is no control token whatever it spells, and
    /// the template's end.
    ///
    /// # Safety
    /// As of [`metadata`](Self::metadata).
    pub unsafe fn prompt_tokens(&self, model: *const Model, [before, text, after]: [&str; 3]) -> Vec<i32> {
        // SAFETY: guaranteed by the caller.
        unsafe {
            if before.is_empty() && after.is_empty() {
                return self.tokenized(model, text, true, false);
            }
            let mut tokens = self.tokenized(model, before, true, true);
            // A template that spells the token that the model begins with has it once all the same.
            let spelt = self.tokenized(model, before, false, true);
            if !spelt.is_empty() && tokens.first() == spelt.first() {
                tokens = spelt;
            }
            tokens.extend(self.tokenized(model, text, false, false));
            tokens.extend(self.tokenized(model, after, false, true));
            tokens
        }
    }

    /// # Safety
    /// As of [`metadata`](Self::metadata).
    unsafe fn tokenized(&self, model: *const Model, text: &str, is_first: bool, has_control: bool) -> Vec<i32> {
        let mut tokens = vec![0i32; text.len() + 2];
        let (Ok(length), Ok(room)) = (i32::try_from(text.len()), i32::try_from(tokens.len())) else {
            return Vec::new();
        };
        // SAFETY: guaranteed by the caller; text and buffer have the lengths that are told, and a text has at most as many tokens as bytes, and few more.
        let n = unsafe {
            (self.tokenize)(
                (self.get_vocab)(model),
                text.as_ptr().cast(),
                length,
                tokens.as_mut_ptr(),
                room,
                is_first,
                has_control,
            )
        };
        tokens.truncate(usize::try_from(n).unwrap_or(0));
        tokens
    }

    /// The token that ends an answer.
    ///
    /// # Safety
    /// As of [`metadata`](Self::metadata).
    pub unsafe fn end_of_answer(&self, model: *const Model) -> Option<i32> {
        // SAFETY: guaranteed by the caller.
        let ends = unsafe {
            let vocab = (self.get_vocab)(model);
            [(self.vocab_eot)(vocab), (self.vocab_eos)(vocab)]
        };
        ends.into_iter().find(|token| *token >= 0)
    }
}
