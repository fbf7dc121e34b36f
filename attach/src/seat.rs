//! What llama.cpp's eval callback has of one context: the hook, the app's own callback, and how its graphs are read.

use crate::llama::{EvalCallback, Graph, Llama, Scheduler};
use pilotfish::hook::{Hook, RawTensor};
use pilotfish::tensor::LayerIndex;
use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::Once;

/// What llama.cpp's user data points to.
pub struct Seat {
    hook: Hook,
    llama: &'static Llama,
    /// The app's own callback.
    app: Option<(EvalCallback, *mut c_void)>,
    /// Who wants to see the node that was asked about last.
    app_wants: bool,
    hook_wants: bool,
    scheduler: *mut Scheduler,
    /// Whether the scheduler has our callback; with no guard, or with one that only reads, it has the app's own.
    installed: bool,
    /// Nodes that were asked about in the running decode.
    n_nodes: usize,
    /// Whether the running decode only reads residuals, so that its graphs need not stop for it.
    only_reads: bool,
    /// What is known of the decode that runs.
    announced: Announced,
    /// Whether the app has set our callback itself, where nothing else sees its decodes.
    is_linked: bool,
    /// Whether something was decoded that was not announced.
    was_passed: bool,
    /// Whether the app has been told of it.
    was_told: bool,
    /// Rows of logits that the running decode computes.
    n_logits: i64,
    /// Rows of the batch that is decoded.
    n_rows: usize,
    /// Layers whose residuals a graph was told to keep, by graph.
    kept: HashMap<usize, Vec<LayerIndex>>,
    /// Whether it has been seen that it does, for batches of one row and of several.
    proven: [Option<bool>; 2],
    /// While that is tried out: residuals and what they held.
    samples: Option<Vec<(*mut RawTensor, Vec<u8>)>>,
    /// Nodes of the running graph that are to be shown when it is done.
    to_show: Vec<*mut RawTensor>,
}

/// What is known of a decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Announced {
    Nothing,
    /// Nothing guards it.
    Unguarded,
    Guarded,
}

/// What a decode was.
pub struct Ran {
    pub is_guarded: bool,
    /// Whether the app was to set our callback.
    pub is_linked: bool,
    /// Nodes that were asked about.
    pub n_nodes: usize,
    /// Rows of logits that were computed.
    pub n_logits: i64,
}

/// The callback that llama.cpp gets: the hook's, and then the app's own, which sees what the hook has patched.
///
/// # Safety
/// `user_data` must be a [`Seat`] that nothing else uses while llama.cpp decodes, and `tensor` a tensor of its llama.cpp.
pub unsafe extern "C" fn callback(tensor: *mut RawTensor, ask: bool, user_data: *mut c_void) -> bool {
    // SAFETY: guaranteed by the caller.
    let Some(seat) = (unsafe { user_data.cast::<Seat>().as_mut() }) else {
        // Of whom it is cannot be known, so that its graphs are not computed: each node is asked for, and stops them.
        static TOLD: Once = Once::new();
        TOLD.call_once(|| {
            tracing::error!(
                "`cb_eval` is pilotfish's, and `cb_eval_user_data` is null: the context is not guarded, and its logits mean nothing"
            );
        });
        return ask;
    };
    let hook = (&raw mut seat.hook).cast::<c_void>();
    // SAFETY: the app's callback gets what it would get from llama.cpp, with its own user data.
    let app = |seat: &Seat| seat.app.is_some_and(|(callback, data)| unsafe { callback(tensor, ask, data) });
    if seat.announced != Announced::Guarded {
        if ask {
            seat.was_passed |= seat.announced == Announced::Nothing;
            // SAFETY: the tensor is of this llama.cpp.
            seat.hook_wants =
                seat.is_linked && seat.announced == Announced::Nothing && unsafe { seat.is_logits(tensor) };
            seat.app_wants = app(seat);
            return seat.hook_wants || seat.app_wants;
        }
        if seat.hook_wants {
            // SAFETY: as above; it has just been computed.
            unsafe { seat.mute(tensor) };
        }
        return !seat.app_wants || app(seat);
    }
    if ask {
        // SAFETY: the hook serves this context alone, and the tensor is of its llama.cpp.
        seat.hook_wants = unsafe { Hook::callback(tensor, true, hook) };
        seat.app_wants = app(seat);
        // SAFETY: as above.
        unsafe { seat.note(tensor) };
        return seat.hook_wants || seat.app_wants;
    }
    // SAFETY: as above.
    let goes_on = !seat.hook_wants || unsafe { Hook::callback(tensor, false, hook) };
    if let (true, Some(samples)) = (seat.hook_wants, &mut seat.samples) {
        // SAFETY: the callback's tensor has just been computed.
        samples.push((tensor, unsafe { seat.llama.contents(tensor) }));
    }
    (!seat.app_wants || app(seat)) && goes_on
}

impl Seat {
    pub fn new(hook: Hook, llama: &'static Llama, is_linked: bool) -> Self {
        Self {
            hook,
            llama,
            app: None,
            app_wants: false,
            hook_wants: false,
            scheduler: null_mut(),
            installed: true,
            n_nodes: 0,
            only_reads: false,
            announced: Announced::Nothing,
            is_linked,
            was_passed: false,
            was_told: false,
            n_logits: 0,
            n_rows: 0,
            kept: HashMap::new(),
            proven: [None; 2],
            samples: None,
            to_show: Vec::new(),
        }
    }

    pub fn hook(&mut self) -> &mut Hook {
        &mut self.hook
    }

    /// Whether something was decoded since the last call that was not announced.
    pub fn take_passed(&mut self) -> bool {
        std::mem::take(&mut self.was_passed)
    }

    /// Announces a decode of `n_rows` rows, which the hook has begun, or (`None`) one that nothing guards.
    ///
    /// # Safety
    /// `seat` must be that of the context that is to decode, which does not yet.
    pub unsafe fn begin(seat: NonNull<Self>, n_rows: Option<usize>) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let this = &mut *seat.as_ptr();
            (this.n_nodes, this.n_logits, this.n_rows) = (0, 0, n_rows.unwrap_or(0));
            this.only_reads = n_rows.is_some() && this.hook.only_reads();
            this.announced = if n_rows.is_some() { Announced::Guarded } else { Announced::Unguarded };
            let ours = n_rows.is_some() && !this.only_reads;
            Self::install(seat, ours);
        }
    }

    /// Ends the decode that was announced last.
    pub fn end(&mut self) -> Ran {
        let announced = std::mem::replace(&mut self.announced, Announced::Nothing);
        Ran {
            is_guarded: announced == Announced::Guarded,
            is_linked: self.is_linked,
            n_nodes: self.n_nodes,
            n_logits: self.n_logits,
        }
    }

    /// # Safety
    /// `tensor` must be a tensor of this llama.cpp.
    unsafe fn is_logits(&self, tensor: *mut RawTensor) -> bool {
        // SAFETY: guaranteed by the caller; names end in NULs.
        unsafe { CStr::from_ptr((self.llama.name)(tensor)) == c"result_output" }
    }

    /// Takes note of a node that is about to be computed.
    ///
    /// # Safety
    /// As of [`is_logits`](Self::is_logits).
    unsafe fn note(&mut self, node: *mut RawTensor) {
        self.n_nodes += 1;
        // SAFETY: guaranteed by the caller.
        unsafe {
            if self.is_logits(node) {
                self.n_logits += (self.llama.n_rows)(node);
            }
        }
    }

    /// Takes every meaning from the logits of a decode that was not announced, which no guard has read.
    ///
    /// # Safety
    /// `tensor` must be a tensor of this llama.cpp, in memory, that nothing computes meanwhile.
    unsafe fn mute(&mut self, tensor: *mut RawTensor) {
        // SAFETY: guaranteed by the caller.
        unsafe { (self.llama.memset)(tensor, 0, 0, (self.llama.n_bytes)(tensor)) };
        // Whatever is done with the log: an app that is made so answers nothing.
        if !std::mem::replace(&mut self.was_told, true) {
            eprintln!(
                "pilotfish: a decode was not announced, and its logits are all 0: decode by `pilotfish_context_decode`, or call `pilotfish_context_begin` before `llama_decode`"
            );
        }
    }

    /// Has the app's own callback run beside ours.
    pub fn set_app_callback(&mut self, callback: Option<EvalCallback>, data: *mut c_void) {
        self.app = callback.map(|callback| (callback, data));
    }

    /// Takes the callback that llama.cpp sets for the context that decodes, and sets ours in its place.
    ///
    /// # Safety
    /// `seat` must be that of the context that decodes, and `scheduler` its.
    pub unsafe fn set_callback(
        seat: NonNull<Self>,
        scheduler: *mut Scheduler,
        callback: Option<EvalCallback>,
        data: *mut c_void,
    ) {
        // SAFETY: guaranteed by the caller: llama.cpp is between two nodes.
        unsafe {
            let this = &mut *seat.as_ptr();
            this.set_app_callback(callback, data);
            this.scheduler = scheduler;
            let installed = this.installed;
            Self::install(seat, installed);
        }
    }

    /// Takes note that a graph, when it was given memory, was told to keep the residuals of `layers`.
    ///
    /// # Safety
    /// `seat` must be that of the context that decodes.
    pub unsafe fn kept(seat: NonNull<Self>, graph: *mut Graph, layers: Vec<LayerIndex>) {
        // SAFETY: guaranteed by the caller: nothing computes.
        unsafe { (*seat.as_ptr()).kept.insert(graph as usize, layers) };
    }

    /// Has a graph computed by `compute`, and reads what guards read: as it goes, by the callback, or, where they do nothing but read, when it is done, so
    /// that it need not stop. Whether residuals are then still what they were is tried out first, by reading them both ways.
    ///
    /// # Safety
    /// `seat` must be that of the context that decodes, `graph` its, with memory and with its inputs set, and `scheduler` what it is computed by.
    pub unsafe fn compute(
        seat: NonNull<Self>,
        scheduler: *mut Scheduler,
        graph: *mut Graph,
        compute: impl FnOnce() -> c_int,
    ) -> c_int {
        // SAFETY: guaranteed by the caller; until `compute` is called, and when the scheduler is synchronised, nothing computes. No reference to the seat is
        // held while it does.
        unsafe {
            let this = seat.as_ptr();
            if !(*this).only_reads {
                return compute();
            }
            let kept = (*this).kept.get(&(graph as usize));
            let keeps = |layer: &LayerIndex| kept.is_some_and(|kept| kept.contains(layer));
            // An app's own callback may have the computing end anywhere: what is in memory behind that is not this graph's.
            let all_kept = (*this).app.is_none() && (*this).hook.wanted().iter().all(keeps);
            let of = usize::from((*this).n_rows > 1);
            match (*this).proven[of] {
                Some(true) if all_kept => {}
                None if all_kept => {
                    (*this).samples = Some(Vec::new());
                    Self::install(seat, true);
                    let status = compute();
                    ((*this).llama.synchronize)(scheduler);
                    let samples = (*this).samples.take().unwrap_or_default();
                    let same = samples.iter().all(|(node, bytes)| (*this).llama.contents(*node) == *bytes);
                    tracing::debug!("residuals of {} layers are kept to the end of a graph: {same}", samples.len());
                    (*this).proven[of] = Some(same && !samples.is_empty());
                    return status;
                }
                _ => {
                    Self::install(seat, true);
                    return compute();
                }
            }
            // An earlier graph of this decode may have needed it.
            Self::install(seat, false);
            let hook = (&raw mut (*this).hook).cast::<c_void>();
            (*this).to_show.clear();
            for index in 0..((*this).llama.graph_n_nodes)(graph) {
                let node = ((*this).llama.graph_node)(graph, index);
                if Hook::callback(node, true, hook) {
                    (*this).to_show.push(node);
                }
                (*this).note(node);
            }
            let status = compute();
            if status == 0 {
                ((*this).llama.synchronize)(scheduler);
                for index in 0..(*this).to_show.len() {
                    Hook::callback((&(*this).to_show)[index], false, hook);
                }
            }
            status
        }
    }

    /// Says that a scheduler is about to be freed: an app may make its context anew from within.
    ///
    /// # Safety
    /// No decode of the context may be computing a node.
    pub unsafe fn forget_scheduler(seat: NonNull<Self>, scheduler: *mut Scheduler) {
        // SAFETY: guaranteed by the caller.
        let this = unsafe { &mut *seat.as_ptr() };
        if this.scheduler == scheduler {
            this.scheduler = null_mut();
            this.kept.clear();
            this.proven = [None; 2];
        }
    }

    /// Gives the scheduler, once it is known, our callback or the app's own.
    ///
    /// # Safety
    /// No decode of the context may be computing a node.
    unsafe fn install(seat: NonNull<Self>, ours: bool) {
        // SAFETY: guaranteed by the caller; the seat outlives the scheduler's use of it, and the callback has the type that is asked for.
        unsafe {
            let this = &mut *seat.as_ptr();
            this.installed = ours;
            if this.scheduler.is_null() {
                return;
            }
            let set = this.llama.set_eval_callback;
            match (ours, this.app) {
                (true, _) => set(this.scheduler, Some(callback), seat.as_ptr().cast()),
                (false, Some((app, data))) => set(this.scheduler, Some(app), data),
                (false, None) => set(this.scheduler, None, null_mut()),
            }
        }
    }
}
