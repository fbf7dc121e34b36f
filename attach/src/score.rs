//! What gates make of a text, on a model that the app has loaded and in a context of its own: the app's contexts are not touched.

use crate::guarding::Guarding;
use crate::guards::LoadedModel;
use crate::llama::{Batch, Context, Llama, Model};
use crate::loaded;
use crate::preload::{Attached, Doing, while_doing};
use pilotfish::attach::control::{Score, TextForm};
use pilotfish::tensor::SequenceId;
use std::ffi::{CString, c_char, c_void};
use std::ptr::{null, null_mut};
use std::sync::{Arc, PoisonError, RwLock};

/// Held while a context of ours uses a model, which the app must not free meanwhile.
static IN_USE: RwLock<()> = RwLock::new(());

/// `llama_context_params`, whatever it is in this llama.cpp: larger than any has it. llama.cpp fills it in and takes it back, and nothing here looks into it.
#[repr(C)]
struct Parameters([u64; 64]);

/// `llama_chat_message`
#[repr(C)]
struct Message {
    role: *const c_char,
    content: *const c_char,
}

macro_rules! function {
    ($symbol:literal: $signature:ty) => {{
        let address = loaded::find($symbol);
        if address.is_null() {
            return Err(format!("this llama.cpp has no `{}`, so no text can be scored", $symbol.to_string_lossy()));
        }
        // SAFETY: not null; it is the function of that name, whose C signature this is.
        unsafe { std::mem::transmute::<*const c_void, $signature>(address) }
    }};
}

/// Runs `free`, which frees a model, once nothing here uses any.
pub fn while_unused<T>(free: impl FnOnce() -> T) -> T {
    let _unused = IN_USE.write().unwrap_or_else(PoisonError::into_inner);
    free()
}

/// Has the gates read `text`, as the first prompt of a sequence.
///
/// # Errors
/// In words: there is no such model, or several and none is named; it can't be guarded; the text is too long, or can't be put into the template.
pub fn score(attached: &'static Attached, text: &str, number: Option<usize>, form: TextForm) -> Result<Score, String> {
    let llama = attached.llama.as_ref().map_err(Clone::clone)?;
    let _in_use = IN_USE.read().unwrap_or_else(PoisonError::into_inner);
    let models = attached.models.guards().models();
    let model = match (number, models.as_slice()) {
        (_, []) => return Err("no model has decoded in this process yet: score once it has".to_owned()),
        (None, [only]) => only,
        (None, several) => {
            return Err(format!("{} models are loaded: name one by its number in the status, from 0", several.len()));
        }
        (Some(number), models) => models
            .get(number)
            .ok_or_else(|| format!("there is no model {number}: {} are loaded, numbered from 0", models.len()))?,
    };
    let raw_model = attached.models.address_of(model).ok_or("the model is not loaded any more")?;
    // SAFETY: the model is known, so it lives, and it can't be freed while `IN_USE` is held.
    unsafe { scored(attached, llama, model, raw_model, text, form) }
}

/// # Safety
/// `raw_model` must be a living model of `llama`, which is `model`, until this returns.
unsafe fn scored(
    attached: &'static Attached,
    llama: &'static Llama,
    model: &Arc<LoadedModel>,
    raw_model: *const Model,
    text: &str,
    form: TextForm,
) -> Result<Score, String> {
    // So that the log tells it from what the app decodes.
    let _span = tracing::info_span!("score").entered();
    let real = function!(c"llama_decode": unsafe extern "C" fn(*mut Context, Batch) -> i32);
    // SAFETY: guaranteed by the caller.
    let (tokens, own) = unsafe {
        let tokens = match form {
            TextForm::Plain => llama.prompt_tokens(raw_model, ["", text, ""]),
            TextForm::Templated => llama.prompt_tokens(raw_model, [text, "", ""]),
            TextForm::Chat => {
                let parts = chat_parts(raw_model, text)?;
                llama.prompt_tokens(raw_model, parts.each_ref().map(String::as_str))
            }
        };
        (tokens, OwnContext::new(raw_model)?)
    };
    // SAFETY: the context lives.
    let room = unsafe { (llama.n_ctx)(own.context) } as usize;
    if tokens.is_empty() {
        return Err("the text has no token".to_owned());
    }
    if tokens.len() > room {
        return Err(format!("the text is {} tokens, and there is room for {room}: score a shorter one", tokens.len()));
    }
    let batch = Batch {
        n_tokens: tokens.len() as i32,
        token: tokens.as_ptr(),
        embd: null(),
        pos: null(),
        n_seq_id: null(),
        seq_id: null(),
        logits: null(),
    };
    // SAFETY: the context lives as long as this, and is of the model; the batch's one array has its length, and the others are left to llama.cpp (llama.h).
    let (mut guarding, result) = unsafe {
        let mut guarding = Guarding::new(llama, raw_model, Arc::clone(model), false);
        let seat = guarding.seat();
        let result =
            guarding.decode(own.context, &batch, |_| while_doing(Doing::Decode(seat), || real(own.context, batch)));
        (guarding, result)
    };
    match result {
        Ok(0) => {}
        Ok(error) => return Err(format!("llama.cpp can't decode the text: it gives {error}")),
        Err(refusal) => return Err(refusal.to_string()),
    }
    let gates = guarding.decisions(SequenceId(0));
    // The context has a pointer to what guards it.
    drop(own);
    drop(guarding);
    let epoch = model.standing().epoch;
    let flagged = gates.iter().any(|gate| gate.fired);
    let name = model.identity.name.clone();
    attached.record.scored(epoch, &name, &gates).wait()?;
    Ok(Score { epoch, model: name, tokens: tokens.len(), flagged, gates })
}

/// A context with room for one prompt.
struct OwnContext {
    context: *mut Context,
    free: unsafe extern "C" fn(*mut Context),
}

impl OwnContext {
    /// # Safety
    /// `model` must be a living model that outlives this.
    unsafe fn new(model: *const Model) -> Result<Self, String> {
        // Both functions have `llama_context_params` by value, a struct of more than 16 bytes. The C ABIs of x86-64 (System V) and of aarch64 return such a struct
        // through a pointer to memory of the caller's, so there may be more of it; and take it as a copy in memory, on the stack behind no other argument or by
        // pointer, so what lies behind the part that llama.cpp knows changes nothing. Alignment is that of a pointer in both.
        if !cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            return Err("no text can be scored on this processor".to_owned());
        }
        let defaults = function!(c"llama_context_default_params": unsafe extern "C" fn() -> Parameters);
        let new = function!(c"llama_init_from_model": unsafe extern "C" fn(*const Model, Parameters) -> *mut Context);
        let set_threads = function!(c"llama_set_n_threads": unsafe extern "C" fn(*mut Context, i32, i32));
        let free = function!(c"llama_free": unsafe extern "C" fn(*mut Context));
        // What the app decodes meanwhile comes first.
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2)).min(4) as i32;
        // SAFETY: the model lives, by the caller; the parameters are llama.cpp's own, by the ABI as above.
        unsafe {
            let context = new(model, defaults());
            if context.is_null() {
                return Err("llama.cpp can't make a context: most often there is no memory for it".to_owned());
            }
            set_threads(context, threads, threads);
            Ok(Self { context, free })
        }
    }
}

impl Drop for OwnContext {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and freed here alone.
        unsafe { (self.free)(self.context) };
    }
}

/// The model's template around `text`, which a user says, and `text` in its midst: it is plain text, also where it spells a control token.
///
/// # Safety
/// `model` must be a living model.
unsafe fn chat_parts(model: *const Model, text: &str) -> Result<[String; 3], String> {
    let template_of =
        function!(c"llama_model_chat_template": unsafe extern "C" fn(*const Model, *const c_char) -> *const c_char);
    let apply = function!(c"llama_chat_apply_template": unsafe extern "C" fn(*const c_char, *const Message, usize, bool, *mut c_char, i32) -> i32);
    let content = CString::new(text).map_err(|_| "the text has a NUL, which no template takes".to_owned())?;
    // SAFETY: guaranteed by the caller; null is the default template.
    let template = unsafe { template_of(model, null()) };
    if template.is_null() {
        return Err(
            "the model has no chat template: score the text as it is, or a whole prompt (`--templated`)".to_owned()
        );
    }
    let message = Message { role: c"user".as_ptr(), content: content.as_ptr() };
    let mut whole: Vec<u8> = Vec::new();
    loop {
        let room = i32::try_from(whole.len()).map_err(|_| "the text is too long".to_owned())?;
        let buffer = if room == 0 { null_mut() } else { whole.as_mut_ptr().cast() };
        // SAFETY: strings end in NULs, there is one message, and the buffer has the length that is told.
        let n = unsafe { apply(template, &raw const message, 1, true, buffer, room) };
        let n = usize::try_from(n).map_err(|_| "llama.cpp's `llama_chat_apply_template` does not know the model's chat template: score the text as it is, or put it into the template yourself (`--templated`)".to_owned())?;
        if n <= whole.len() {
            whole.truncate(n);
            break;
        }
        whole.resize(n, 0);
    }
    let whole = String::from_utf8(whole).map_err(|_| "the model's chat template is not UTF-8".to_owned())?;
    // Templates trim.
    let text = text.trim();
    let (before, after) = whole
        .split_once(text)
        .filter(|_| !text.is_empty())
        .ok_or("the model's chat template does not say the text as it is")?;
    Ok([before.to_owned(), text.to_owned(), after.to_owned()])
}
