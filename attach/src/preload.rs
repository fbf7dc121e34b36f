//! The functions whose place this library takes when it is preloaded: an app that calls one of them by its name calls it here.
//!
//! `libllama` sets its eval callback and computes its graphs by functions of `libggml-base`, through the dynamic linker like any app, which is how these are seen.

use crate::batch;
use crate::guarding::{Guarding, Refusal};
use crate::guards::{Guards, lock};
use crate::llama::{Batch, BatchExt, Context, Embedding, EvalCallback, Graph, Llama, Memory, Model, Scheduler};
use crate::models::Models;
use crate::record::Record;
use crate::score::while_unused;
use crate::seat::Seat;
use crate::{begin_log, boundary, control, loaded};
use pilotfish::attach::{Fail, Policy};
use pilotfish::store::WatchOptions;
use pilotfish::tensor::{LayerIndex, SequenceId};
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// What `llama_decode` gives where a guard can't attach: a fatal error, in its terms.
const REFUSED: i32 = -3;
/// `GGML_STATUS_FAILED`
const STATUS_FAILED: c_int = -1;

/// The guards of this process, and its contexts.
pub struct Attached {
    pub policy: Policy,
    /// What is wrong with what the environment asks for, so that nothing decodes.
    pub problem: Option<String>,
    pub models: Models,
    pub record: Arc<Record>,
    pub llama: Result<Llama, String>,
    contexts: Mutex<HashMap<usize, Arc<Mutex<Slot>>>>,
}

/// A context of the app's.
struct Slot {
    guarding: Option<Guarding>,
    /// Why it could not be guarded the last time, so that it is said once.
    told: Option<Refusal>,
}

/// What llama.cpp does on this thread.
#[derive(Clone, Copy)]
pub enum Doing {
    Nothing,
    Decode(NonNull<Seat>),
    /// Something that is let pass.
    Unguarded,
}

thread_local! {
    static DOING: Cell<Doing> = const { Cell::new(Doing::Nothing) };
}

/// Calls `run` while this thread does `what`.
pub fn while_doing<T>(what: Doing, run: impl FnOnce() -> T) -> T {
    /// Put back even where a panic passes.
    struct Before(Doing);
    impl Drop for Before {
        fn drop(&mut self) {
            DOING.set(self.0);
        }
    }
    let _before = Before(DOING.replace(what));
    run()
}

static ATTACHED: OnceLock<Option<Attached>> = OnceLock::new();

/// What the environment asks for; `None` where it asks for nothing, and everything is passed on.
pub fn attached() -> Option<&'static Attached> {
    ATTACHED.get_or_init(attach).as_ref()
}

fn attach() -> Option<Attached> {
    let policy = Policy::from_environment(|name| std::env::var_os(name));
    let wanted = !matches!(policy, Ok(None));
    if wanted {
        begin_log(Some("pilotfish=info,pilotfish_attach=info,off"));
    }
    let (policy, problem) = match policy {
        Ok(policy) => (policy?, None),
        Err(problem) => {
            tracing::error!("{problem}");
            // It is wanted and can't be: nothing decodes.
            (Policy::default(), Some(problem))
        }
    };
    // SAFETY: what is found by these names in a process that runs llama.cpp is llama.cpp's.
    let llama = unsafe { Llama::lookup(loaded::find) }.map_err(|missing| missing.to_string());
    if let Err(problem) = &llama {
        tracing::error!("{problem}");
    }
    let guards = Guards::watch(&policy.guards, WatchOptions::default());
    let record = Arc::new(Record::new(policy.audit.as_deref()));
    guards.tell(Arc::clone(&record));
    control::listen(&policy.control);
    let models = Models::new(guards);
    Some(Attached { policy, problem, models, record, llama, contexts: Mutex::default() })
}

/// The function whose place one of ours has taken.
macro_rules! real {
    ($symbol:literal: $signature:ty) => {{
        static REAL: OnceLock<Option<$signature>> = OnceLock::new();
        *REAL.get_or_init(|| {
            // SAFETY: null is `None`; else it is the function of that name, whose C signature this is.
            unsafe { std::mem::transmute::<*const c_void, Option<$signature>>(loaded::find($symbol)) }
        })
    }};
}

impl Attached {
    /// Contexts that have decoded.
    pub fn n_contexts(&self) -> usize {
        lock(&self.contexts).len()
    }

    fn slot(&self, context: *mut Context) -> Arc<Mutex<Slot>> {
        let empty = || Arc::new(Mutex::new(Slot { guarding: None, told: None }));
        Arc::clone(lock(&self.contexts).entry(context as usize).or_insert_with(empty))
    }

    /// # Safety
    /// `context` must be a living context, and `batch` valid as llama.cpp would have it.
    unsafe fn decode(&'static self, context: *mut Context, batch: &Batch, real: impl Fn() -> i32) -> i32 {
        let slot = self.slot(context);
        let mut slot = lock(&slot);
        let mut ran = None;
        // SAFETY: guaranteed by the caller.
        let outcome = unsafe { self.guarded(&mut slot, context, batch, &mut ran, &real) };
        let refusal = match outcome {
            Ok(result) => return result,
            Err(refusal) => refusal,
        };
        let passes = self.policy.fail == Fail::Open && refusal != Refusal::NoLogits;
        let is_told = slot.told.as_ref() == Some(&refusal);
        self.record.not_guarded(&refusal.to_string(), passes, is_told);
        if !is_told {
            match &refusal {
                refusal if !passes => tracing::error!("decoding is refused: {refusal}"),
                Refusal::NotOnRecord(_) => tracing::warn!("NOT ON RECORD: {refusal}"),
                refusal => tracing::warn!("NOT GUARDED: {refusal}"),
            }
            slot.told = Some(refusal);
        }
        match ran {
            _ if !passes => REFUSED,
            Some(result) => result,
            None => while_doing(Doing::Unguarded, real),
        }
    }

    /// # Safety
    /// As of [`decode`](Self::decode).
    unsafe fn guarded(
        &'static self,
        slot: &mut Slot,
        context: *mut Context,
        batch: &Batch,
        ran: &mut Option<i32>,
        real: &impl Fn() -> i32,
    ) -> Result<i32, Refusal> {
        if let Some(problem) = &self.problem {
            return Err(Refusal::NoProgram(problem.as_str().into()));
        }
        let llama = self.llama.as_ref().map_err(|problem| Refusal::NoProgram(problem.as_str().into()))?;
        let guarding = match &mut slot.guarding {
            Some(guarding) => guarding,
            // SAFETY: guaranteed by the caller.
            none => unsafe {
                if loaded::copies(c"llama_decode") > 1 {
                    return Err(Refusal::Unknown(
                        "the process has loaded more than one copy of it, whose contexts can't be told apart",
                    ));
                }
                let raw_model = (llama.get_model)(context);
                let model = self.models.of(llama, raw_model)?;
                let mut guarding = Guarding::new(llama, raw_model, model, false);
                guarding.tell(Arc::clone(&self.record));
                none.insert(guarding)
            },
        };
        let seat = guarding.seat();
        let run = |_: &Llama| *ran.insert(while_doing(Doing::Decode(seat), real));
        // SAFETY: guaranteed by the caller.
        unsafe { guarding.decode(context, batch, run) }
    }

    /// The context whose memory this is.
    fn context_of(&self, memory: *mut Memory) -> Option<Arc<Mutex<Slot>>> {
        let llama = self.llama.as_ref().ok()?;
        let contexts = lock(&self.contexts);
        // SAFETY: contexts are forgotten when they are freed.
        let is_its = |context: &usize| unsafe { (llama.get_memory)(*context as *const Context) } == memory;
        contexts.iter().find(|(context, _)| is_its(context)).map(|(_, slot)| Arc::clone(slot))
    }

    fn known(&self, context: *mut Context) -> Option<Arc<Mutex<Slot>>> {
        lock(&self.contexts).get(&(context as usize)).map(Arc::clone)
    }
}

/// Tells what guards a context of what the app does with it, if anything guards it.
fn tell(slot: Option<Arc<Mutex<Slot>>>, what: impl FnOnce(&mut Guarding)) {
    if let Some(slot) = slot
        && let Some(guarding) = &mut lock(&slot).guarding
    {
        what(guarding);
    }
}

/// Our function in the place of llama.cpp's `name`.
pub fn taken(name: &CStr) -> Option<*const c_void> {
    macro_rules! own {
        ($($function:ident),*) => {
            match name.to_bytes() {
                $(bytes if bytes == stringify!($function).as_bytes() => Some($function as *const c_void),)*
                _ => None,
            }
        };
    }
    own!(
        llama_decode,
        llama_encode,
        llama_process,
        llama_batch_ext_init,
        llama_batch_ext_free,
        llama_batch_ext_clear,
        llama_batch_ext_add,
        llama_batch_ext_add_token,
        llama_batch_ext_add_embd,
        llama_batch_ext_add_seq,
        llama_batch_ext_set_pos,
        llama_batch_ext_set_output_embd,
        llama_batch_ext_set_output_logits,
        llama_free,
        llama_model_free,
        llama_free_model,
        llama_set_sampler,
        llama_memory_seq_cp,
        llama_memory_seq_add,
        llama_state_set_data,
        llama_state_seq_set_data,
        llama_state_seq_set_data_ext,
        llama_state_seq_load_file,
        llama_state_load_file
    )
}

/// # Safety
/// As llama.cpp's function of this name has it; so of all the others.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llama_decode(context: *mut Context, batch: Batch) -> i32 {
    boundary(REFUSED, || {
        let Some(real) = real!(c"llama_decode": unsafe extern "C" fn(*mut Context, Batch) -> i32) else {
            return REFUSED;
        };
        // SAFETY: the caller calls it so.
        let real = || unsafe { real(context, batch) };
        match attached() {
            // SAFETY: as above.
            Some(attached) => unsafe { attached.decode(context, &batch, real) },
            None => real(),
        }
    })
}

/// Encoders predict nothing: they are let pass.
///
/// # Safety
/// As of llama.cpp's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llama_encode(context: *mut Context, batch: Batch) -> i32 {
    boundary(REFUSED, || {
        let Some(real) = real!(c"llama_encode": unsafe extern "C" fn(*mut Context, Batch) -> i32) else {
            return REFUSED;
        };
        // SAFETY: the caller calls it so.
        while_doing(Doing::Unguarded, || unsafe { real(context, batch) })
    })
}

/// `LLAMA_PROCESS_TYPE_DECODE`
const PROCESS_DECODE: c_int = 1;

/// What newer apps decode by, llama.cpp's own server among them. A batch whose making was not seen is decoded in nobody's name, and its graph refused.
///
/// # Safety
/// As of llama.cpp's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llama_process(context: *mut Context, kind: c_int, batch: *mut BatchExt) -> i32 {
    boundary(REFUSED, || {
        let real = real!(c"llama_process": unsafe extern "C" fn(*mut Context, c_int, *mut BatchExt) -> i32);
        let Some(real) = real else { return REFUSED };
        // SAFETY: the caller calls it so.
        let real = || unsafe { real(context, kind, batch) };
        let Some(attached) = attached() else { return real() };
        if kind != PROCESS_DECODE {
            return while_doing(Doing::Unguarded, real);
        }
        match batch::read(batch.cast()) {
            // SAFETY: as above; the batch's arrays live until it is decoded.
            Some(written) => unsafe { attached.decode(context, &written.batch(), real) },
            None => real(),
        }
    })
}

/// Functions that fill in an extended batch: what llama.cpp did is noted.
macro_rules! fills_batch {
    ($($name:ident = $symbol:literal: fn($($argument:ident: $type:ty),*) -> $result:ty, $failed:expr, $noted:expr;)*) => {
        $(
            /// # Safety
            /// As of llama.cpp's.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(batch: *mut BatchExt, $($argument: $type),*) -> $result {
                boundary($failed, || {
                    let real = real!($symbol: unsafe extern "C" fn(*mut BatchExt, $($type),*) -> $result);
                    // SAFETY: the caller calls it so.
                    let result = real.map_or($failed, |real| unsafe { real(batch, $($argument),*) });
                    let note: fn(*const c_void, $result, $($type),*) = $noted;
                    note(batch.cast(), result, $($argument),*);
                    result
                })
            }
        )*
    };
}

fills_batch! {
    llama_batch_ext_clear = c"llama_batch_ext_clear": fn() -> (), (), |batch, ()| batch::empty(batch);
    llama_batch_ext_add = c"llama_batch_ext_add": fn(sequence: i32) -> i32, -1,
        |batch, index, sequence| batch::note(batch, |written| written.add(index, sequence, None));
    llama_batch_ext_add_token = c"llama_batch_ext_add_token": fn(sequence: i32, token: i32) -> i32, -1,
        |batch, index, sequence, token| batch::note(batch, |written| written.add(index, sequence, Some(token)));
    llama_batch_ext_add_embd = c"llama_batch_ext_add_embd": fn(sequence: i32, embedding: Embedding) -> i32, -1,
        |batch, index, sequence, _| batch::note(batch, |written| written.add(index, sequence, None));
    llama_batch_ext_add_seq = c"llama_batch_ext_add_seq": fn(index: i32, sequence: i32) -> bool, false,
        |batch, done, index, sequence| if done { batch::note(batch, |written| written.add_sequence(index, sequence)) };
    llama_batch_ext_set_output_embd = c"llama_batch_ext_set_output_embd": fn(index: i32, output: bool) -> bool, false,
        |batch, done, index, output| if done { batch::note(batch, |written| written.set_output(index, output)) };
    llama_batch_ext_set_output_logits = c"llama_batch_ext_set_output_logits": fn(index: i32, output: bool) -> bool, false,
        |batch, done, index, output| if done { batch::note(batch, |written| written.set_output(index, output)) };
    llama_batch_ext_set_pos = c"llama_batch_ext_set_pos": fn(index: i32, position: *const i32) -> bool, false,
        |batch, done, index, position| if done {
            // SAFETY: llama.cpp has taken it, so that there is one at least.
            let position = unsafe { *position };
            batch::note(batch, |written| written.set_position(index, position));
        };
}

/// # Safety
/// As of llama.cpp's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llama_batch_ext_init(context: *mut Context) -> *mut BatchExt {
    boundary(null_mut(), || {
        let real = real!(c"llama_batch_ext_init": unsafe extern "C" fn(*mut Context) -> *mut BatchExt);
        // SAFETY: the caller calls it so.
        let made = real.map_or(null_mut(), |real| unsafe { real(context) });
        if !made.is_null() && attached().is_some() {
            batch::empty(made.cast());
        }
        made
    })
}

/// # Safety
/// As of llama.cpp's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llama_batch_ext_free(batch: *mut BatchExt) {
    boundary((), || {
        // Before it is: another may be made where it was.
        batch::forget(batch.cast());
        if let Some(real) = real!(c"llama_batch_ext_free": unsafe extern "C" fn(*mut BatchExt)) {
            // SAFETY: the caller calls it so.
            unsafe { real(batch) };
        }
    });
}

/// # Safety
/// As of llama.cpp's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llama_free(context: *mut Context) {
    boundary((), || {
        if let Some(real) = real!(c"llama_free": unsafe extern "C" fn(*mut Context)) {
            let slot = attached().and_then(|attached| lock(&attached.contexts).remove(&(context as usize)));
            // SAFETY: the caller calls it so.
            unsafe { real(context) };
            // Behind it: the context had a pointer to what is dropped here.
            drop(slot);
        }
    });
}

/// # Safety
/// As of llama.cpp's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llama_model_free(model: *mut Model) {
    boundary((), || {
        // SAFETY: the caller calls it so.
        unsafe { free_model(model) }
    });
}

/// An older name of [`llama_model_free`].
///
/// # Safety
/// As of llama.cpp's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llama_free_model(model: *mut Model) {
    boundary((), || {
        // SAFETY: the caller calls it so.
        unsafe { free_model(model) }
    });
}

/// # Safety
/// As of llama.cpp's.
unsafe fn free_model(model: *mut Model) {
    // Never the older name, which calls this one, and would come by here again.
    let Some(real) = real!(c"llama_model_free": unsafe extern "C" fn(*mut Model)) else { return };
    while_unused(|| {
        // One that was never decoded is no reason to begin.
        if let Some(Some(attached)) = ATTACHED.get() {
            attached.models.forget(model);
        }
        // SAFETY: guaranteed by the caller; no text is being scored.
        unsafe { real(model) };
    });
}

/// A sampler on the device chooses tokens from logits that nobody else sees, so that no answer could be ended: the app is told that there is none, and samples itself.
///
/// # Safety
/// As of llama.cpp's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llama_set_sampler(context: *mut Context, sequence: i32, sampler: *mut c_void) -> bool {
    boundary(false, || {
        if attached().is_some() && !sampler.is_null() {
            return false;
        }
        match real!(c"llama_set_sampler": unsafe extern "C" fn(*mut Context, i32, *mut c_void) -> bool) {
            // SAFETY: the caller calls it so.
            Some(real) => unsafe { real(context, sequence, sampler) },
            None => false,
        }
    })
}

/// # Safety
/// As of llama.cpp's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llama_memory_seq_cp(memory: *mut Memory, from: i32, to: i32, first: i32, end: i32) {
    boundary((), || {
        let slot = attached().and_then(|attached| attached.context_of(memory));
        // SAFETY: the app copies cells of a context, which lives.
        let is_empty = |guarding: &Guarding| unsafe { guarding.is_empty(SequenceId(to)) };
        let was_empty = slot.as_ref().is_some_and(|slot| lock(slot).guarding.as_ref().is_some_and(is_empty));
        if let Some(real) = real!(c"llama_memory_seq_cp": unsafe extern "C" fn(*mut Memory, i32, i32, i32, i32)) {
            // SAFETY: the caller calls it so.
            unsafe { real(memory, from, to, first, end) };
        }
        tell(slot, |guarding| guarding.copied(SequenceId(from), SequenceId(to), first, was_empty));
    });
}

/// # Safety
/// As of llama.cpp's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llama_memory_seq_add(memory: *mut Memory, sequence: i32, first: i32, end: i32, by: i32) {
    boundary((), || {
        if let Some(real) = real!(c"llama_memory_seq_add": unsafe extern "C" fn(*mut Memory, i32, i32, i32, i32)) {
            // SAFETY: the caller calls it so.
            unsafe { real(memory, sequence, first, end, by) };
        }
        let slot = attached().and_then(|attached| attached.context_of(memory));
        tell(slot, |guarding| guarding.shifted(SequenceId(sequence), first, by));
    });
}

/// Functions that fill cells from elsewhere: what is there then no guard has read.
macro_rules! loads_state {
    ($($name:ident = $symbol:literal: fn($($argument:ident: $type:ty),*), $sequence:expr;)*) => {
        $(
            /// # Safety
            /// As of llama.cpp's.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(context: *mut Context, $($argument: $type),*) -> usize {
                boundary(0, || {
                    let real = real!($symbol: unsafe extern "C" fn(*mut Context, $($type),*) -> usize);
                    // SAFETY: the caller calls it so.
                    let result = real.map_or(0, |real| unsafe { real(context, $($argument),*) });
                    let sequence: Option<i32> = $sequence;
                    let slot = attached().and_then(|attached| attached.known(context));
                    tell(slot, |guarding| guarding.loaded(sequence.map(SequenceId)));
                    result
                })
            }
        )*
    };
}

loads_state! {
    llama_state_set_data = c"llama_state_set_data": fn(data: *const u8, size: usize), None;
    llama_state_seq_set_data = c"llama_state_seq_set_data": fn(data: *const u8, size: usize, sequence: i32), Some(sequence);
    llama_state_seq_set_data_ext = c"llama_state_seq_set_data_ext": fn(data: *const u8, size: usize, sequence: i32, flags: u32), Some(sequence);
    llama_state_seq_load_file = c"llama_state_seq_load_file": fn(path: *const c_char, sequence: i32, tokens: *mut i32, room: usize, n_tokens: *mut usize), Some(sequence);
}

/// # Safety
/// As of llama.cpp's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llama_state_load_file(
    context: *mut Context,
    path: *const c_char,
    tokens: *mut i32,
    room: usize,
    n_tokens: *mut usize,
) -> bool {
    boundary(false, || {
        let real = real!(c"llama_state_load_file": unsafe extern "C" fn(*mut Context, *const c_char, *mut i32, usize, *mut usize) -> bool);
        // SAFETY: the caller calls it so.
        let result = real.is_some_and(|real| unsafe { real(context, path, tokens, room, n_tokens) });
        let slot = attached().and_then(|attached| attached.known(context));
        tell(slot, |guarding| guarding.loaded(None));
        result
    })
}

/// llama.cpp sets its callback here, whenever it makes a graph anew.
///
/// # Safety
/// As of ggml's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggml_backend_sched_set_eval_callback(
    scheduler: *mut Scheduler,
    callback: Option<EvalCallback>,
    data: *mut c_void,
) {
    boundary((), || match DOING.get() {
        // SAFETY: it is the context that decodes on this thread whose scheduler this is.
        Doing::Decode(seat) => unsafe { Seat::set_callback(seat, scheduler, callback, data) },
        Doing::Nothing | Doing::Unguarded => {
            let real = real!(c"ggml_backend_sched_set_eval_callback": unsafe extern "C" fn(*mut Scheduler, Option<EvalCallback>, *mut c_void));
            if let Some(real) = real {
                // SAFETY: the caller calls it so.
                unsafe { real(scheduler, callback, data) }
            }
        }
    });
}

/// # Safety
/// As of ggml's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggml_backend_sched_free(scheduler: *mut Scheduler) {
    boundary((), || {
        lock(&PLANS).remove(&(scheduler as usize));
        match DOING.get() {
            // SAFETY: the context that decodes on this thread has made itself another.
            Doing::Decode(seat) => unsafe { Seat::forget_scheduler(seat, scheduler) },
            Doing::Nothing | Doing::Unguarded => {
                let contexts = attached().map(|attached| lock(&attached.contexts).values().map(Arc::clone).collect());
                let contexts: Vec<Arc<Mutex<Slot>>> = contexts.unwrap_or_default();
                // One that decodes on another thread is not freed meanwhile.
                for slot in contexts.iter().filter_map(|slot| slot.try_lock().ok()) {
                    if let Some(guarding) = &slot.guarding {
                        // SAFETY: it does not decode, since its lock is here.
                        unsafe { Seat::forget_scheduler(guarding.seat(), scheduler) };
                    }
                }
            }
        }
        if let Some(real) = real!(c"ggml_backend_sched_free": unsafe extern "C" fn(*mut Scheduler)) {
            // SAFETY: the caller calls it so.
            unsafe { real(scheduler) };
        }
    });
}

/// # Safety
/// As of ggml's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggml_backend_sched_graph_compute_async(scheduler: *mut Scheduler, graph: *mut Graph) -> c_int {
    boundary(STATUS_FAILED, || {
        let real =
            real!(c"ggml_backend_sched_graph_compute_async": unsafe extern "C" fn(*mut Scheduler, *mut Graph) -> c_int);
        let Some(real) = real else { return STATUS_FAILED };
        // SAFETY: the caller calls it so.
        let compute = || unsafe { real(scheduler, graph) };
        match DOING.get() {
            // SAFETY: it is the context that decodes on this thread whose graph this is.
            Doing::Decode(seat) => unsafe { Seat::compute(seat, scheduler, graph, compute) },
            // SAFETY: the caller gives a graph.
            Doing::Nothing if unsafe { is_unseen_decode(graph) } => STATUS_FAILED,
            Doing::Nothing | Doing::Unguarded => compute(),
        }
    })
}

/// What a scheduler has planned: the layers whose residuals its memory has room for to the end of a graph.
static PLANS: Mutex<BTreeMap<usize, Vec<LayerIndex>>> = Mutex::new(BTreeMap::new());

/// Has a graph by which a scheduler plans its memory keep what guards read.
///
/// # Safety
/// As of ggml's functions that plan.
unsafe fn plan(scheduler: *mut Scheduler, graph: *mut Graph) {
    let Some(attached) = attached() else { return };
    let Ok(llama) = &attached.llama else { return };
    // On Vulkan answers are others when a graph goes on past a residual that it is to keep.
    // SAFETY: the caller gives its scheduler.
    let layers = if unsafe { llama.is_on_cpu(scheduler) } { attached.models.guards().layers() } else { Vec::new() };
    // SAFETY: the caller gives a graph that is not in memory.
    let kept = unsafe { llama.keep_residuals(graph, &layers) };
    lock(&PLANS).insert(scheduler as usize, kept);
}

/// # Safety
/// As of ggml's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggml_backend_sched_reserve(scheduler: *mut Scheduler, graph: *mut Graph) -> bool {
    boundary(false, || {
        let real = real!(c"ggml_backend_sched_reserve": unsafe extern "C" fn(*mut Scheduler, *mut Graph) -> bool);
        // SAFETY: the caller calls it so.
        unsafe {
            plan(scheduler, graph);
            real.is_some_and(|real| real(scheduler, graph))
        }
    })
}

/// # Safety
/// As of ggml's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggml_backend_sched_reserve_size(
    scheduler: *mut Scheduler,
    graph: *mut Graph,
    sizes: *mut usize,
) {
    boundary((), || {
        let real =
            real!(c"ggml_backend_sched_reserve_size": unsafe extern "C" fn(*mut Scheduler, *mut Graph, *mut usize));
        // SAFETY: the caller calls it so.
        unsafe {
            plan(scheduler, graph);
            if let Some(real) = real {
                real(scheduler, graph, sizes);
            }
        }
    });
}

/// # Safety
/// As of ggml's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggml_backend_sched_alloc_graph(scheduler: *mut Scheduler, graph: *mut Graph) -> bool {
    boundary(false, || {
        let planned = lock(&PLANS).get(&(scheduler as usize)).cloned();
        let llama = attached().and_then(|attached| attached.llama.as_ref().ok());
        if let Some((llama, planned)) = llama.zip(planned) {
            // Every graph of the scheduler's: it may plan anew by any.
            // SAFETY: the caller gives a graph that is not in memory.
            let kept = unsafe { llama.keep_residuals(graph, &planned) };
            if let Doing::Decode(seat) = DOING.get() {
                // SAFETY: it is the context that decodes on this thread whose graph this is.
                unsafe { Seat::kept(seat, graph, kept) };
            }
        }
        let real = real!(c"ggml_backend_sched_alloc_graph": unsafe extern "C" fn(*mut Scheduler, *mut Graph) -> bool);
        // SAFETY: the caller calls it so.
        real.is_some_and(|real| unsafe { real(scheduler, graph) })
    })
}

/// Whether a graph that nothing here has announced is that of a language model, and is not to be computed.
///
/// # Safety
/// `graph` must be a graph of ggml's.
unsafe fn is_unseen_decode(graph: *const Graph) -> bool {
    let Some(attached) = attached() else { return false };
    let Ok(llama) = &attached.llama else { return false };
    // SAFETY: guaranteed by the caller; names end in NULs.
    let has = |name: &CStr| unsafe { !(llama.graph_tensor)(graph, name.as_ptr()).is_null() };
    if !has(c"inp_tokens") || !has(c"l_out-0") {
        return false;
    }
    let is_refused = attached.policy.fail == Fail::Closed;
    static TOLD: AtomicBool = AtomicBool::new(false);
    if !TOLD.swap(true, Ordering::Relaxed) {
        let what = if is_refused { "decoding is refused" } else { "NOT GUARDED" };
        let how = "the app decodes by a way that pilotfish can't see, past `llama_decode`";
        tracing::error!("{what}: {how}");
        attached.record.not_guarded(how, !is_refused, false);
    }
    is_refused
}
