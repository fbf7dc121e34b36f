//! The C interface: what `include/pilotfish.h` declares, which is made from this file. An app that links the library calls these; nothing else is to.
//!
//! Every entry is a boundary that no panic passes, and gives a numbered result; what went wrong is told by `pilotfish_last_error`. Numbers are never given twice.

#![allow(non_camel_case_types)]

use crate::guarding::{Guarding, Refusal};
use crate::guards::{ChangeError, Guards, lock};
use crate::llama::{Batch as llama_batch, Context as llama_context, Llama, Model as llama_model};
use crate::loaded;
use crate::models::Models;
use crate::record::Record;
use crate::seat::callback;
use crate::{begin_log, boundary};
use pilotfish::hook::{Ended, MissingSymbol, RawTensor as ggml_tensor};
use pilotfish::program::{Change, Setting, ToggleError, panic_message};
use pilotfish::store::WatchOptions;
use pilotfish::tensor::SequenceId;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};

/// The version of this interface. It grows by functions; where one changes or goes, this number does.
pub const PILOTFISH_ABI_VERSION: u32 = 1;

/// How a call went. `pilotfish_last_error` says more of what is not `OK`.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum pilotfish_result {
    Ok = 0,
    /// A pointer that may not be null is, a text is not UTF-8, or a value is out of range.
    InvalidArgument = 1,
    /// llama.cpp's functions are not found in the process, or this llama.cpp does not do what is relied upon.
    UnknownLlama = 2,
    /// The directory of guards can't be read, or no guard in it can guard this model.
    NoGuard = 3,
    /// There is nothing of that name or number.
    NotFound = 4,
    /// A setting that can't be.
    Refused = 5,
    /// `llama_decode` gave an error of its own.
    DecodeFailed = 6,
    /// A batch is begun, decoded and ended, one at a time.
    OutOfOrder = 7,
    /// Another thread is in a call with this context.
    Busy = 8,
    /// A guard has ended an answer, and the logits could not be made to say so: they must not be used.
    NoLogits = 9,
    /// A fault of this library's own.
    Panic = 10,
    /// The audit log can't be written: what was decoded must not be used.
    NotOnRecord = 11,
}

/// A directory of guards, watched. Any thread may use it, several at once.
pub struct pilotfish_guards {
    models: Models,
    llama: &'static Llama,
    record: OnceLock<Arc<Record>>,
}

/// What guards one context of llama.cpp. One thread at a time, as for the context itself.
pub struct pilotfish_context {
    /// What llama.cpp gets as user data.
    seat: *mut c_void,
    inner: Mutex<Inner>,
}

struct Inner {
    guarding: Guarding,
    /// Texts that the app was given last.
    texts: Vec<CString>,
}

/// What a gate has decided of a sequence's prompt. Texts are valid until the next call with the same context.
#[repr(C)]
pub struct pilotfish_gate {
    /// The guard's name.
    pub guard: *const c_char,
    /// The gate's name.
    pub gate: *const c_char,
    /// Whether the prompt has been read to its end, and the rest says something.
    pub decided: bool,
    pub fired: bool,
    /// Whether there is a score: there is none where it could not be told what the gate has read, and it has fired then.
    pub has_score: bool,
    /// What is held against the gate's threshold.
    pub score: f64,
}

/// Why a sequence is to get no more tokens.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum pilotfish_end_reason {
    /// It goes on.
    None = 0,
    /// A gate that blocks has fired.
    Blocked = 1,
    /// A guard failed.
    Fault = 2,
}

/// That a guard has ended a sequence. Texts are valid until the next call with the same context; those that say nothing are empty.
#[repr(C)]
pub struct pilotfish_end {
    pub reason: pilotfish_end_reason,
    /// The guard's name, or those of several.
    pub guard: *const c_char,
    /// The gate that has fired.
    pub gate: *const c_char,
    /// What the guard has to say to the user, or what went wrong.
    pub message: *const c_char,
}

/// The address of the function `name` of llama.cpp or ggml, or null; `data` is what was given with the resolver.
pub type pilotfish_resolver = Option<unsafe extern "C" fn(name: *const c_char, data: *mut c_void) -> *const c_void>;

/// `ggml_backend_sched_eval_callback`
pub type pilotfish_callback =
    Option<unsafe extern "C" fn(tensor: *mut ggml_tensor, ask: bool, user_data: *mut c_void) -> bool>;

struct Failure(pilotfish_result, String);

impl Failure {
    fn of(result: pilotfish_result, why: impl Into<String>) -> Self {
        Self(result, why.into())
    }

    /// An argument that may not be null is.
    fn null(what: &str) -> Self {
        Self::of(pilotfish_result::InvalidArgument, format!("`{what}` is null"))
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let result = match refusal {
            Refusal::NoProgram(_) => pilotfish_result::NoGuard,
            Refusal::Unknown(_) => pilotfish_result::UnknownLlama,
            Refusal::NoLogits => pilotfish_result::NoLogits,
            Refusal::OtherContext | Refusal::OtherModel | Refusal::NotAttached | Refusal::NoSequence(..) => {
                pilotfish_result::InvalidArgument
            }
            Refusal::NotOnRecord(_) => pilotfish_result::NotOnRecord,
            Refusal::OutOfOrder(_) => pilotfish_result::OutOfOrder,
        };
        Self(result, refusal.to_string())
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// A text of C's, without the zeros that it can't hold.
fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).unwrap_or_default()
}

/// Runs `body`, and keeps what went wrong for `pilotfish_last_error`. No panic goes further.
fn entry(body: impl FnOnce() -> Result<(), Failure>) -> pilotfish_result {
    let outcome = catch_unwind(AssertUnwindSafe(body));
    let Failure(result, why) = match outcome {
        Ok(Ok(())) => return pilotfish_result::Ok,
        Ok(Err(failure)) => failure,
        Err(payload) => {
            Failure::of(pilotfish_result::Panic, format!("pilotfish panicked: {}", panic_message(&*payload)))
        }
    };
    // A thread that ends may have no place for it any more.
    let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = c_text(&why));
    result
}

/// # Safety
/// `text` must be null or end in a NUL, and live as long as what is returned is used.
unsafe fn text<'t>(text: *const c_char, what: &str) -> Result<&'t str, Failure> {
    if text.is_null() {
        return Err(Failure::null(what));
    }
    // SAFETY: not null, and guaranteed by the caller.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| Failure::of(pilotfish_result::InvalidArgument, format!("`{what}` is not UTF-8")))
}

/// # Safety
/// `pointer` must be null or valid for as long as what is returned is used.
unsafe fn given<'p, T>(pointer: *const T, what: &str) -> Result<&'p T, Failure> {
    // SAFETY: guaranteed by the caller.
    unsafe { pointer.as_ref() }.ok_or_else(|| Failure::null(what))
}

/// # Safety
/// `place` must be null or valid to be written.
unsafe fn write<T>(place: *mut T, what: &str, value: impl FnOnce() -> Result<T, Failure>) -> Result<(), Failure> {
    if place.is_null() {
        return Err(Failure::null(what));
    }
    let value = value()?;
    // SAFETY: not null, and guaranteed by the caller.
    unsafe { place.write(value) };
    Ok(())
}

/// Runs `body` with what guards a context.
///
/// # Safety
/// `context` must be null or of `pilotfish_context_new` and not freed.
unsafe fn with(
    context: *const pilotfish_context,
    body: impl FnOnce(&mut Inner) -> Result<(), Failure>,
) -> pilotfish_result {
    entry(|| {
        // SAFETY: guaranteed by the caller.
        let context = unsafe { given(context, "context")? };
        let mut inner = match context.inner.try_lock() {
            Ok(inner) => inner,
            // Whatever panicked has told of it: a batch that it left begun is told to be ended.
            Err(TryLockError::Poisoned(inner)) => inner.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let why = "another thread is in a call with this context, which is for one thread at a time";
                return Err(Failure::of(pilotfish_result::Busy, why));
            }
        };
        body(&mut inner)
    })
}

impl Inner {
    /// What guards the context, where llama.cpp does not use it.
    fn idle(&mut self) -> Result<&mut Guarding, Failure> {
        if self.guarding.is_decoding() {
            let why = "a batch has begun and not ended: call `pilotfish_context_end` first";
            return Err(Failure::of(pilotfish_result::OutOfOrder, why));
        }
        Ok(&mut self.guarding)
    }

    /// Keeps texts for the app.
    fn keep<const N: usize>(&mut self, texts: [&str; N]) -> [*const c_char; N] {
        self.texts = texts.into_iter().map(c_text).collect();
        let mut kept = self.texts.iter().map(|text| text.as_ptr());
        [(); N].map(|()| kept.next().unwrap_or(null()))
    }
}

/// The version of Pilotfish, such as `0.1.0`.
#[unsafe(no_mangle)]
pub extern "C" fn pilotfish_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"",
    };
    VERSION.as_ptr()
}

/// `PILOTFISH_ABI_VERSION` of the library that is loaded, to be compared with that of the header.
#[unsafe(no_mangle)]
pub extern "C" fn pilotfish_abi_version() -> u32 {
    PILOTFISH_ABI_VERSION
}

/// What went wrong in the last call of this thread that gave another result than `OK`. Never null; valid until the next call of this thread that fails.
#[unsafe(no_mangle)]
pub extern "C" fn pilotfish_last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Reads the guards of a directory, which has a folder for each, and goes on watching it: what changes there is for prompts to come. llama.cpp's functions are
/// looked up in what the process has loaded; an app that has llama.cpp linked in must export them (`-rdynamic`), or use `pilotfish_guards_open_with`.
///
/// The log, which says what goes wrong behind an app's back, goes to standard error, where the environment variable `PILOTFISH_LOG` asks for one (`pilotfish=info,pilotfish_attach=debug`).
///
/// Errors: `UNKNOWN_LLAMA`; `NO_GUARD` where the directory can't be read. A guard that can't be read is told of by `pilotfish_guards_problems`, and when a model
/// is to be guarded.
///
/// # Safety
/// `directory` must end in a NUL; `guards` is where the result goes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_guards_open(
    directory: *const c_char,
    guards: *mut *mut pilotfish_guards,
) -> pilotfish_result {
    entry(|| {
        static LLAMA: OnceLock<Llama> = OnceLock::new();
        static FOUND: Mutex<()> = Mutex::new(());
        let llama = || {
            // One that is not found may be loaded later.
            let _one_at_a_time = lock(&FOUND);
            if let Some(llama) = LLAMA.get() {
                return Ok(llama);
            }
            // SAFETY: what is found by these names in a process that runs llama.cpp is llama.cpp's.
            let found = unsafe { Llama::lookup(loaded::find)? };
            Ok(LLAMA.get_or_init(|| found))
        };
        // SAFETY: guaranteed by the caller.
        unsafe { open(directory, guards, llama) }
    })
}

/// As `pilotfish_guards_open`, with llama.cpp's functions from `resolve`, which is called with their names before this returns, on this thread.
///
/// # Safety
/// As there. What `resolve` gives must be null or that function, all of one copy of llama.cpp, which stays loaded for as long as the process runs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_guards_open_with(
    directory: *const c_char,
    resolve: pilotfish_resolver,
    data: *mut c_void,
    guards: *mut *mut pilotfish_guards,
) -> pilotfish_result {
    entry(|| {
        let Some(resolve) = resolve else {
            return Err(Failure::null("resolve"));
        };
        let llama = || {
            // SAFETY: guaranteed by the caller.
            let found = unsafe { Llama::lookup(|name: &CStr| resolve(name.as_ptr(), data))? };
            // Contexts may outlive what is opened here; an app opens few.
            Ok(&*Box::leak(Box::new(found)))
        };
        // SAFETY: guaranteed by the caller.
        unsafe { open(directory, guards, llama) }
    })
}

/// # Safety
/// As of `pilotfish_guards_open`.
unsafe fn open(
    directory: *const c_char,
    guards: *mut *mut pilotfish_guards,
    llama: impl FnOnce() -> Result<&'static Llama, MissingSymbol>,
) -> Result<(), Failure> {
    begin_log(None);
    // A thread watches the directory from now on.
    loaded::keep(pilotfish_guards_open as *const c_void);
    // SAFETY: guaranteed by the caller.
    unsafe {
        let directory = text(directory, "directory")?;
        write(guards, "guards", || {
            let llama = llama().map_err(|missing| Failure::of(pilotfish_result::UnknownLlama, missing.to_string()))?;
            let watched = Guards::watch(Path::new(directory), WatchOptions::default());
            if let Some(problem) = watched.unreadable() {
                return Err(Failure::of(pilotfish_result::NoGuard, problem));
            }
            Ok(Box::into_raw(Box::new(pilotfish_guards {
                models: Models::new(watched),
                llama,
                record: OnceLock::new(),
            })))
        })
    }
}

/// Lets go of a directory of guards; null is let pass. Contexts that it guards stay guarded by what is in force.
///
/// # Safety
/// `guards` must be null or of `pilotfish_guards_open`, not freed before, and in no other call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_guards_free(guards: *mut pilotfish_guards) {
    let _ = entry(|| {
        if !guards.is_null() {
            // SAFETY: guaranteed by the caller.
            drop(unsafe { Box::from_raw(guards) });
        }
        Ok(())
    });
}

/// Looks at the directory now, before it is noticed that it has changed. `epoch`, unless it is null, becomes the number of what is in force, which grows with each
/// change.
///
/// # Safety
/// `guards` must be of `pilotfish_guards_open`; `epoch` null or where the result goes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_guards_reload(guards: *const pilotfish_guards, epoch: *mut u64) -> pilotfish_result {
    entry(|| {
        // SAFETY: guaranteed by the caller.
        let now = unsafe { given(guards, "guards")? }.models.guards().reload();
        if !epoch.is_null() {
            // SAFETY: as above.
            unsafe { epoch.write(now) };
        }
        Ok(())
    })
}

/// Writes an audit log to the file `path`, as `pilotfish attach --audit` does, of the contexts that are made from now on: `pilotfish audit FILE` checks it. A decode
/// that can't be put on record gives `NOT_ON_RECORD`.
///
/// Errors: `NOT_ON_RECORD` where the file can't be written; `REFUSED` where there is an audit log already.
///
/// # Safety
/// `guards` must be of `pilotfish_guards_open`; `path` ends in a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_guards_audit(
    guards: *const pilotfish_guards,
    path: *const c_char,
) -> pilotfish_result {
    entry(|| {
        // SAFETY: guaranteed by the caller.
        let (guards, path) = unsafe { (given(guards, "guards")?, text(path, "path")?) };
        let taken = || Failure::of(pilotfish_result::Refused, "these guards have an audit log already");
        if guards.record.get().is_some() {
            return Err(taken());
        }
        let record = Arc::new(Record::new(Some(Path::new(path))));
        if let Some(problem) = record.failure() {
            return Err(Failure::of(pilotfish_result::NotOnRecord, problem));
        }
        guards.record.set(Arc::clone(&record)).map_err(|_| taken())?;
        guards.models.guards().tell(record);
        Ok(())
    })
}

/// Turns a guard on or off, for prompts to come; its folder's name is taken too. It stays so when the guard is reloaded.
///
/// Errors: `NOT_FOUND`; `REFUSED` where a loaded model can't be guarded so.
///
/// # Safety
/// `guards` must be of `pilotfish_guards_open`; texts end in NULs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_guards_enable(
    guards: *const pilotfish_guards,
    guard: *const c_char,
    enabled: bool,
) -> pilotfish_result {
    // SAFETY: guaranteed by the caller.
    entry(|| unsafe { change(guards, guard, Change::Enabled(enabled)) })
}

/// Sets an intervention of a guard, for prompts to come: the one called `intervention`, or all whose names go on from it with a dot. `setting` is `on`, `off` or a
/// strength; null for what the guard's file says. It stays so when the guard is reloaded.
///
/// Errors: `NOT_FOUND` where there is no such guard; `REFUSED` where it has no such intervention, or a loaded model can't be guarded so.
///
/// # Safety
/// As of `pilotfish_guards_enable`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_guards_set(
    guards: *const pilotfish_guards,
    guard: *const c_char,
    intervention: *const c_char,
    setting: *const c_char,
) -> pilotfish_result {
    entry(|| {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let intervention = text(intervention, "intervention")?.to_owned();
            let asked = match setting.is_null() {
                true => Change::Reset { intervention },
                false => Change::Set { intervention, setting: self::setting(setting)? },
            };
            change(guards, guard, asked)
        }
    })
}

/// # Safety
/// As of `pilotfish_guards_enable`.
unsafe fn change(guards: *const pilotfish_guards, guard: *const c_char, change: Change) -> Result<(), Failure> {
    // SAFETY: guaranteed by the caller.
    let (guards, guard) = unsafe { (given(guards, "guards")?, text(guard, "guard")?) };
    let changed = guards.models.guards().change(guard, &[change]);
    changed.map(drop).map_err(|error| {
        let result = match error {
            ChangeError::NoGuard { .. } => pilotfish_result::NotFound,
            _ => pilotfish_result::Refused,
        };
        Failure::of(result, error.to_string())
    })
}

/// What is wrong with the directory, its guards, and what they are to guard: a line each, as many as fit in `size` bytes with a NUL behind them. Gives how many bytes
/// all of it takes with its NUL; 1 where nothing is wrong, 0 where it can't be told.
///
/// # Safety
/// `guards` must be of `pilotfish_guards_open`, and `buffer` null or have room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_guards_problems(
    guards: *const pilotfish_guards,
    buffer: *mut c_char,
    size: usize,
) -> usize {
    let mut needed = 0;
    let _ = entry(|| {
        // SAFETY: guaranteed by the caller.
        let problems = c_text(&unsafe { given(guards, "guards")? }.models.guards().problems().join("\n"));
        let bytes = problems.as_bytes();
        needed = bytes.len() + 1;
        if let (false, Some(room)) = (buffer.is_null(), size.checked_sub(1)) {
            let n = room.min(bytes.len());
            // SAFETY: `buffer` has room for `size` bytes, of which these are the first and the NUL behind them.
            unsafe {
                buffer.copy_from_nonoverlapping(bytes.as_ptr().cast(), n);
                buffer.add(n).write(0);
            }
        }
        Ok(())
    });
    needed
}

/// Prepares to guard a context of `model` that is to be made. Set `pilotfish_eval_callback` as `cb_eval` of its parameters and `pilotfish_context_user_data` as
/// `cb_eval_user_data` (`PILOTFISH_ATTACH` does both), make the context, and decode by `pilotfish_context_decode`, or with `pilotfish_context_begin` before and
/// `pilotfish_context_end` behind each `llama_decode`. What is decoded otherwise gets logits that are all 0.
///
/// Errors: `NO_GUARD` where the directory has guards and none of them is for this model, or one was never readable; `UNKNOWN_LLAMA`.
///
/// # Safety
/// `guards` must be of `pilotfish_guards_open`, `model` a model of llama.cpp that lives as long as the context; `context` is where the result goes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_new(
    guards: *const pilotfish_guards,
    model: *const llama_model,
    context: *mut *mut pilotfish_context,
) -> pilotfish_result {
    entry(|| {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let guards = given(guards, "guards")?;
            given(model, "model")?;
            write(context, "context", || {
                let loaded = guards.models.of(guards.llama, model)?;
                if let Err(problem) = loaded.standing().program {
                    return Err(Refusal::NoProgram(problem).into());
                }
                let mut guarding = Guarding::new(guards.llama, model, loaded, true);
                if let Some(record) = guards.record.get() {
                    guarding.tell(Arc::clone(record));
                }
                let seat = guarding.seat().as_ptr().cast();
                let inner = Mutex::new(Inner { guarding, texts: Vec::new() });
                Ok(Box::into_raw(Box::new(pilotfish_context { seat, inner })))
            })
        }
    })
}

/// Frees what guards a context of llama.cpp, after that context has been freed; null is let pass.
///
/// # Safety
/// `context` must be null or of `pilotfish_context_new`, not freed before, in no other call, and llama.cpp must not use its callback any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_free(context: *mut pilotfish_context) {
    let _ = entry(|| {
        if !context.is_null() {
            // SAFETY: guaranteed by the caller.
            drop(unsafe { Box::from_raw(context) });
        }
        Ok(())
    });
}

/// `cb_eval` of a guarded context's parameters.
///
/// # Safety
/// It is for llama.cpp alone to call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_eval_callback(tensor: *mut ggml_tensor, ask: bool, user_data: *mut c_void) -> bool {
    // A panic here has nobody to be told to: the graph stops, and its logits are not to be used.
    // SAFETY: llama.cpp gives the user data that the app has set, and a tensor of its own.
    boundary(false, || unsafe { callback(tensor, ask, user_data) })
}

/// `cb_eval_user_data` of a guarded context's parameters: null where `context` is. With null, logits mean nothing, though `llama_decode` gives 0.
///
/// # Safety
/// `context` must be null or of `pilotfish_context_new`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_user_data(context: *const pilotfish_context) -> *mut c_void {
    // SAFETY: guaranteed by the caller.
    unsafe { context.as_ref() }.map_or(null_mut(), |context| context.seat)
}

/// Has an eval callback of the app's own run behind the guards: it sees what they have patched. Null for none.
///
/// # Safety
/// `context` must be of `pilotfish_context_new`; `callback` must be one that llama.cpp could call with `user_data`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_set_callback(
    context: *const pilotfish_context,
    callback: pilotfish_callback,
    user_data: *mut c_void,
) -> pilotfish_result {
    // SAFETY: guaranteed by the caller.
    unsafe {
        with(context, |inner| {
            // SAFETY: nothing decodes, and the seat lives as long as the guarding.
            (*inner.idle()?.seat().as_ptr()).set_app_callback(callback, user_data);
            Ok(())
        })
    }
}

/// Has llama.cpp decode `batch` under the guards: `pilotfish_context_begin`, `llama_decode` and `pilotfish_context_end`. `llama_result`, unless it is null, becomes
/// what `llama_decode` gave.
///
/// Where a gate that blocks has fired, or a guard failed, the logits leave no token but those of the guard's message, one after another, and then the one that ends
/// an answer: an app that just goes on says that. `pilotfish_context_ended` tells.
///
/// Errors: `DECODE_FAILED`, where `llama_decode` gave anything but 0 (1: no room for the batch; nothing was decoded then, and it may be tried again); any other:
/// what was decoded must not be used.
///
/// # Safety
/// As of `pilotfish_context_begin`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_decode(
    context: *const pilotfish_context,
    llama: *mut llama_context,
    batch: *const llama_batch,
    llama_result: *mut i32,
) -> pilotfish_result {
    // SAFETY: guaranteed by the caller.
    unsafe {
        with(context, |inner| {
            let batch = *given(batch, "batch")?;
            given(llama, "llama")?;
            let mut ran = None;
            // SAFETY: guaranteed by the caller.
            let outcome =
                inner.guarding.decode(llama, &batch, |functions| *ran.insert((functions.decode)(llama, batch)));
            if let (Some(ran), false) = (ran, llama_result.is_null()) {
                llama_result.write(ran);
            }
            match outcome? {
                0 => Ok(()),
                failed => Err(decode_failed(failed)),
            }
        })
    }
}

fn decode_failed(result: i32) -> Failure {
    let why = if result == 1 { ": it has no room for the batch" } else { "" };
    Failure::of(pilotfish_result::DecodeFailed, format!("`llama_decode` gave {result}{why}"))
}

/// Tells of a batch that the app is about to decode by `llama_decode`. A decode that no guard was told of gets logits that are all 0.
///
/// Which rows are of a prompt and which of an answer follows from positions, and from which tokens' logits are asked for (docs/attach.md), unless
/// `pilotfish_context_begin_prompt` says it. The batch must be decoded as it is. Where a sampler on the device chooses tokens (`llama_set_sampler`), an answer can't be
/// ended, and `pilotfish_context_end` gives `NO_LOGITS`.
///
/// Errors: the batch must not be decoded.
///
/// # Safety
/// `context` must be of `pilotfish_context_new`, `llama` the context that was made with its callback, always the same, and `batch` valid as `llama_decode` would have it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_begin(
    context: *const pilotfish_context,
    llama: *mut llama_context,
    batch: *const llama_batch,
) -> pilotfish_result {
    // SAFETY: guaranteed by the caller.
    unsafe {
        with(context, |inner| {
            given(llama, "llama")?;
            Ok(inner.guarding.begin(llama, given(batch, "batch")?)?)
        })
    }
}

/// Says that the batch of `pilotfish_context_begin` has been decoded, and that `llama_decode` gave `llama_result`. See `pilotfish_context_decode`.
///
/// Errors: what was decoded must not be used.
///
/// # Safety
/// `context` must be of `pilotfish_context_new`, and its context of llama.cpp live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_end(
    context: *const pilotfish_context,
    llama_result: i32,
) -> pilotfish_result {
    // SAFETY: guaranteed by the caller.
    unsafe {
        with(context, |inner| {
            inner.guarding.end(llama_result)?;
            if llama_result == 0 { Ok(()) } else { Err(decode_failed(llama_result)) }
        })
    }
}

/// Copies cells by `llama_memory_seq_cp`, and takes note of it: positions from `first` to before `end` of the sequence `from` (below 0: all) to `to`, which should be
/// empty. To one that is not, or from another position than the first, is what no gate has read the whole of: all of its gates count as fired.
///
/// Errors: `OUT_OF_ORDER` where nothing was decoded yet, `INVALID_ARGUMENT` where the context has no such sequence.
///
/// # Safety
/// `context` must be of `pilotfish_context_new`, and its context of llama.cpp live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_copy_cells(
    context: *const pilotfish_context,
    from: i32,
    to: i32,
    first: i32,
    end: i32,
) -> pilotfish_result {
    // SAFETY: guaranteed by the caller.
    unsafe { with(context, |inner| Ok(inner.idle()?.copy_cells(SequenceId(from), SequenceId(to), first, end)?)) }
}

/// Changes positions by `llama_memory_seq_add`, and takes note of it: those of a sequence from `first` to before `end` (below 0: all) by `by`.
///
/// Errors: as of `pilotfish_context_copy_cells`.
///
/// # Safety
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_shift_cells(
    context: *const pilotfish_context,
    sequence: i32,
    first: i32,
    end: i32,
    by: i32,
) -> pilotfish_result {
    // SAFETY: guaranteed by the caller.
    unsafe { with(context, |inner| Ok(inner.idle()?.shift_cells(SequenceId(sequence), first, end, by)?)) }
}

/// Says that the rows of a sequence that come next are another prompt's (a further turn of a talk), up to the last one of a batch whose logits are asked for: ask for
/// those of the prompt's last token alone, or call this before each batch of it. Without it that follows from positions and logits, and a turn of
/// at most 65 tokens of which each has its logits asked for, or that comes token by token, is taken for more of the answer, which gates of prompts don't read.
///
/// # Safety
/// `context` must be of `pilotfish_context_new`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_begin_prompt(
    context: *const pilotfish_context,
    sequence: i32,
) -> pilotfish_result {
    // SAFETY: guaranteed by the caller.
    unsafe {
        with(context, |inner| {
            inner.idle()?.begin_prompt(SequenceId(sequence));
            Ok(())
        })
    }
}

/// Says that cells of a sequence (below 0: of all) were filled from elsewhere, as by `llama_state_seq_set_data`: no guard has read them, and every gate counts as
/// fired.
///
/// # Safety
/// `context` must be of `pilotfish_context_new`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_loaded(
    context: *const pilotfish_context,
    sequence: i32,
) -> pilotfish_result {
    // SAFETY: guaranteed by the caller.
    unsafe {
        with(context, |inner| {
            inner.idle()?.loaded((sequence >= 0).then_some(SequenceId(sequence)));
            Ok(())
        })
    }
}

/// How many gates read the prompts of a sequence; 0 where nothing of it was decoded.
///
/// # Safety
/// `context` must be of `pilotfish_context_new`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_n_gates(context: *const pilotfish_context, sequence: i32) -> usize {
    let mut n = 0;
    // SAFETY: guaranteed by the caller.
    let _ = unsafe {
        with(context, |inner| {
            let sequences = inner.idle()?.hook().sequences();
            n = sequences.program(SequenceId(sequence)).map_or(0, |program| program.gates().len());
            Ok(())
        })
    };
    n
}

/// What the gate of number `index`, from 0, has decided of the prompt of a sequence. A decode answers for the gates whose prompts end in it.
///
/// Errors: `NOT_FOUND`.
///
/// # Safety
/// `context` must be of `pilotfish_context_new`; `gate` is where the result goes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_gate(
    context: *const pilotfish_context,
    sequence: i32,
    index: usize,
    gate: *mut pilotfish_gate,
) -> pilotfish_result {
    // SAFETY: guaranteed by the caller.
    unsafe {
        with(context, |inner| {
            write(gate, "gate", || {
                let sequences = inner.idle()?.hook().sequences();
                let program = sequences.program(SequenceId(sequence));
                let Some((program, found)) = program.and_then(|program| Some((program, program.gates().get(index)?)))
                else {
                    let why = format!("sequence {sequence} has no gate of number {index}");
                    return Err(Failure::of(pilotfish_result::NotFound, why));
                };
                let decision = sequences.decision(SequenceId(sequence), index);
                let score = decision.and_then(|decision| decision.score);
                let (guard, name) = (program.guards()[found.guard].name.clone(), found.name.clone());
                let [guard, gate] = inner.keep([guard.as_str(), name.as_str()]);
                Ok(pilotfish_gate {
                    guard,
                    gate,
                    decided: decision.is_some(),
                    fired: decision.is_some_and(|decision| decision.fired),
                    has_score: score.is_some(),
                    score: score.unwrap_or(0.0),
                })
            })
        })
    }
}

/// Whether a guard has ended a sequence, and why.
///
/// # Safety
/// `context` must be of `pilotfish_context_new`; `end` is where the result goes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_ended(
    context: *const pilotfish_context,
    sequence: i32,
    end: *mut pilotfish_end,
) -> pilotfish_result {
    // SAFETY: guaranteed by the caller.
    unsafe {
        with(context, |inner| {
            write(end, "end", || {
                let (reason, texts) = match inner.idle()?.hook().ended(SequenceId(sequence)) {
                    None => (pilotfish_end_reason::None, Default::default()),
                    Some(Ended::Blocked { guard, gate, message }) => {
                        let message = message.unwrap_or_else(|| pilotfish::guard::BLOCKED.to_owned());
                        (pilotfish_end_reason::Blocked, [guard, gate, message])
                    }
                    Some(Ended::Fault { guard, fault }) => {
                        (pilotfish_end_reason::Fault, [guard, String::new(), fault.to_string()])
                    }
                };
                let [guard, gate, message] = inner.keep(texts.each_ref().map(String::as_str));
                Ok(pilotfish_end { reason, guard, gate, message })
            })
        })
    }
}

/// Sets an intervention of the guards that a sequence runs under, from its next token on: the one called `intervention` (`GUARD/INTERVENTION` where there are
/// several guards), or all whose names go on from it with a dot. `setting` is `on`, `off` or a strength, as on the command line. Other sequences, and the prompts to
/// come, keep theirs.
///
/// Errors: `NOT_FOUND` where nothing of the sequence was decoded or no intervention has this name, `REFUSED` for a setting that can't be.
///
/// # Safety
/// `context` must be of `pilotfish_context_new`; texts end in NULs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pilotfish_context_set(
    context: *const pilotfish_context,
    sequence: i32,
    intervention: *const c_char,
    setting: *const c_char,
) -> pilotfish_result {
    // SAFETY: guaranteed by the caller.
    unsafe {
        with(context, |inner| {
            let (name, setting) = (text(intervention, "intervention")?, self::setting(setting)?);
            let hook = inner.idle()?.hook();
            let Some(program) = hook.sequences().program(SequenceId(sequence)).cloned() else {
                let why = format!("nothing of sequence {sequence} was decoded");
                return Err(Failure::of(pilotfish_result::NotFound, why));
            };
            let turned = hook.variant(&program, name, setting).map_err(|error| {
                let unknown = matches!(error, ToggleError::Unknown { .. });
                let result = if unknown { pilotfish_result::NotFound } else { pilotfish_result::Refused };
                Failure::of(result, error.to_string())
            })?;
            hook.turn(SequenceId(sequence), turned);
            Ok(())
        })
    }
}

/// # Safety
/// `setting` must be null or end in a NUL.
unsafe fn setting(setting: *const c_char) -> Result<Setting, Failure> {
    // SAFETY: guaranteed by the caller.
    let setting = unsafe { text(setting, "setting")? };
    setting.parse().map_err(|problem: String| Failure::of(pilotfish_result::Refused, problem))
}
