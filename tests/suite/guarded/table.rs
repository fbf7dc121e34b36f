//! The hook on a context of the app's own, with ggml's functions linked or looked up by name, and its program swapped.

use super::*;
use crate::raw_llama::linked_symbol;
use pilotfish::guard::Positions;
use pilotfish::hook::{
    Capture, CaptureRows, CapturedLayer, EvalCallbackParams, ExecutorKind, GgmlTable, Hook, HookFault, MissingSymbol,
    Splitting,
};
use pilotfish::program::{Calibration, GateDecision};

on_every_model!(
    a_table_that_is_looked_up_does_what_the_linked_one_does,
    a_program_is_swapped_between_decodes,
    gates_count_as_fired_where_rows_cannot_be_told,
    a_hook_that_does_not_know_tokens_takes_all_of_a_prompt_for_a_text,
);

/// A context with a hook that the app keeps.
pub(super) struct Hooked<'m> {
    // Dropped first: llama.cpp may call the hook until its context is freed.
    context: LlamaContext<'m>,
    hook: OwnedHook,
    splitting: Splitting,
}

struct OwnedHook(*mut Hook);

impl Drop for OwnedHook {
    fn drop(&mut self) {
        // SAFETY: it comes from a box in `Hooked::new`, and the context that points to it is gone.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

impl<'m> Hooked<'m> {
    pub fn new(subject: &'m Subject, table: GgmlTable, program: Arc<Program>, params: LlamaContextParams) -> Self {
        let hook = OwnedHook(Box::into_raw(Box::new(Hook::new(table, program))));
        // SAFETY: the hook is freed after the context, and nothing uses it during a decode.
        let params = unsafe { params.with_eval_hook(hook.0) };
        let n_streams = params.n_streams();
        let context = subject.plain(params);
        let splitting = Splitting { n_streams, n_ubatch: context.n_ubatch() as usize };
        Self { context, hook, splitting }
    }

    pub fn hook(&mut self) -> &mut Hook {
        // SAFETY: it lives as long as `self`, and llama.cpp uses it only during a decode.
        unsafe { &mut *self.hook.0 }
    }

    /// Logits of the last of `rows`.
    fn decode(&mut self, rows: &[(LlamaToken, BatchRow)]) -> Result<Vec<f32>, HookFault> {
        let (outcome, mut logits) = self.decode_each(rows);
        outcome.map(|()| logits.pop().unwrap())
    }

    /// What went wrong first, and the logits of every row that asks for them, whatever went wrong.
    pub fn decode_each(&mut self, rows: &[(LlamaToken, BatchRow)]) -> (Result<(), HookFault>, Vec<Vec<f32>>) {
        let mut batch = LlamaBatch::new(rows.len(), 1);
        for (token, row) in rows {
            batch.add(*token, row.position.0, &[row.sequence.0], row.output).unwrap();
        }
        let rows: Vec<BatchRow> = rows.iter().map(|(_, row)| *row).collect();
        let splitting = self.splitting;
        self.hook().begin(&rows, &[], splitting);
        self.context.decode(&mut batch).unwrap();
        let outcome = self.hook().finish();
        let outputs = (0..rows.len()).filter(|index| rows[*index].output);
        (outcome, outputs.map(|index| self.context.get_logits_ith(index as i32).to_vec()).collect())
    }

    /// Removes `sequence` from the KV cache, and forgets what is known of it.
    pub fn forget(&mut self, sequence: SequenceId) {
        self.context.clear_kv_cache_seq(Some(sequence.0 as u32), None, None).unwrap();
        self.hook().clear(sequence);
    }

    /// Logits of the prompt's last token and of the answer's tokens, as apps ask for them.
    pub fn run(&mut self, script: &Script) -> Vec<Vec<f32>> {
        let last = script.prompt.len() - 1;
        let as_apps_do = |(index, mut rows): (usize, Vec<(LlamaToken, BatchRow)>)| {
            if index == 0 {
                rows[..last].iter_mut().for_each(|(_, row)| row.output = false);
            }
            self.decode(&rows).unwrap()
        };
        script.decodes().into_iter().enumerate().map(as_apps_do).collect()
    }
}

fn compiled(subject: &Subject, guard: &Guard) -> Arc<Program> {
    Arc::new(Program::compile(guard, subject.model.shape(), Calibration::Required).unwrap())
}

fn decisions(hook: &Hook) -> Vec<Option<GateDecision>> {
    (0..hook.program().gates().len()).map(|gate| hook.sequences().decision(ONLY, gate)).collect()
}

fn captured(layers: Vec<CapturedLayer>) -> Vec<Vec<f32>> {
    layers.iter().flat_map(|layer| layer.each().map(|(_, values)| values.to_vec())).collect()
}

/// Where no patch can act it is no matter when residuals are read, of which who runs the hook may make use.
#[test]
fn a_decode_that_only_reads_is_told() {
    let tiny = Tiny::new(Architecture::Llama);
    let gated = |threshold, on_fire, positions: Option<Positions>| {
        let policy = tiny.policy().vector("g", 0).vector("v", 1).gate(gate("g", Aggregate::Last, threshold, on_fire));
        let acts = |positions| InterventionEntry { when: Some("g".into()), positions, ..add("v") };
        positions.into_iter().fold(policy, |policy, positions| policy.intervene(acts(positions))).guard()
    };
    let on_fire = OnFire::Steer;
    // A guard, whether it only reads in a prompt, and in an answer.
    let cases = [
        ("a gate that blocks", gated(NEVER, OnFire::Block, None), true, true),
        ("a gate that stays shut", gated(NEVER, on_fire, Some(Positions::Generated)), false, true),
        ("a gate that opens", gated(-NEVER, on_fire, Some(Positions::Generated)), false, false),
        ("a gate that opens for prompts", gated(-NEVER, on_fire, Some(Positions::Prompt)), false, true),
        ("no gate", tiny.policy().vector("v", 1).intervene(add("v")).guard(), false, false),
    ];
    let script = tiny.script();
    for (what, guard, in_prompt, in_answer) in cases {
        let mut hooked = Hooked::new(&tiny, GgmlTable::linked(), compiled(&tiny, &guard), params());
        for (index, rows) in script.decodes().into_iter().enumerate() {
            let expected = if index == 0 { in_prompt } else { in_answer };
            hooked.decode(&rows).unwrap();
            assert_eq!(hooked.hook().only_reads(), expected, "{what}, decode {index}");
        }
    }
}

fn a_table_that_is_looked_up_does_what_the_linked_one_does(subject: &Subject) {
    // SAFETY: `linked_symbol` gives the functions of those names of the llama.cpp that runs the model, which is never unloaded.
    let looked_up = unsafe { GgmlTable::lookup(linked_symbol) }.unwrap();
    let script = subject.script();
    let last = subject.last_layer();
    let steers = |vector: &str| gate(vector, Aggregate::Last, -NEVER, OnFire::Steer);
    let gated = |vector: &str, gate: &str| InterventionEntry {
        when: Some(gate.into()),
        positions: Positions::Generated,
        ..add(vector)
    };
    let everywhere = subject.policy().vector("g", 0).vector("v", 1).vector("w", last);
    let at_the_end = subject.policy().vector("g", last).vector("w", last);
    let guards = [
        ("several layers", everywhere.gate(steers("g")).intervene(ablate("v", 4.0)).intervene(gated("w", "g")).guard()),
        ("the last layer alone", at_the_end.gate(steers("g")).intervene(gated("w", "g")).guard()),
    ];
    let plain = script.run_plain(&mut subject.plain(params()));
    for (what, guard) in guards {
        for n_ubatch in [128, 4] {
            let what = format!("{}, {what}, micro-batches of {n_ubatch}", subject.name());
            let run = |table| {
                let params = params().with_n_ubatch(n_ubatch);
                let mut hooked = Hooked::new(subject, table, compiled(subject, &guard), params);
                hooked.hook().set_capture(Some(Capture::new([subject.layer(last)], CaptureRows::All)));
                let logits = hooked.run(&script);
                let rows = captured(hooked.hook().take_captured());
                (logits, rows, decisions(hooked.hook()), hooked.hook().executor_kind())
            };
            let (linked, looked_up) = (run(GgmlTable::linked()), run(looked_up));
            assert_eq!((linked.3, looked_up.3), (ExecutorKind::Host, ExecutorKind::Copy), "{what}");
            assert_eq!(linked.2, looked_up.2, "{what}: gates");
            assert!(bits(&linked.1) == bits(&looked_up.1), "{what}: residuals");
            assert!(bits(&linked.0) == bits(&looked_up.0), "{what}: logits");
            assert!(looked_up.0.last() != plain.last(), "{what}: nothing was patched");
        }
    }
}

#[test]
fn a_function_that_is_missing_is_named() {
    let mut wanted = Vec::new();
    // SAFETY: as above.
    let all = unsafe {
        GgmlTable::lookup(|name| {
            wanted.push(name.to_owned());
            linked_symbol(name)
        })
    };
    assert!(all.is_ok() && wanted.len() == 8, "{wanted:?}");
    for missing in wanted {
        // SAFETY: as above.
        let found = unsafe {
            GgmlTable::lookup(|name| if name == missing.as_c_str() { std::ptr::null() } else { linked_symbol(name) })
        };
        let symbol = missing.into_string().unwrap();
        assert_eq!(found.err(), Some(MissingSymbol { symbol }));
    }
}

/// The callback is fixed when a context is made; what lies behind it is not.
fn a_program_is_swapped_between_decodes(subject: &Subject) {
    let script = subject.script();
    let blocks = |layer| subject.policy().vector("g", layer).gate(gate("g", Aggregate::Mean, NEVER, OnFire::Block));
    let guards = [
        blocks(0).vector("v", 1).intervene(add("v")).guard(),
        blocks(2).vector("v", 3).vector("w", 0).intervene(ablate("v", 4.0)).intervene(add("w")).guard(),
    ];
    let own = |guard: &Guard| {
        let mut hooked = Hooked::new(subject, GgmlTable::linked(), compiled(subject, guard), params());
        let logits = hooked.run(&script);
        (logits, decisions(hooked.hook()))
    };
    let expected = guards.each_ref().map(own);
    assert!(bits(&expected[0].0) != bits(&expected[1].0));

    let observer = subject.observer();
    let mut hooked = Hooked::new(subject, GgmlTable::linked(), observer, params());
    let plain = hooked.run(&script);
    for swap in [0, 1, 0] {
        hooked.context.clear_kv_cache();
        // A live sequence would keep the program that it has.
        hooked.hook().clear(ONLY);
        hooked.hook().set_program(compiled(subject, &guards[swap]));
        assert_eq!(decisions(hooked.hook()), [None], "{}: gates are the program's own", subject.name());
        assert!(bits(&hooked.run(&script)) == bits(&expected[swap].0), "{}: guard {swap}", subject.name());
        assert_eq!(decisions(hooked.hook()), expected[swap].1, "{}: guard {swap}", subject.name());
    }
    hooked.context.clear_kv_cache();
    hooked.hook().clear(ONLY);
    hooked.hook().set_program(subject.observer());
    assert!(bits(&hooked.run(&script)) == bits(&plain), "{}", subject.name());
}

/// A table that is looked up can't read positions: in what order llama.cpp takes rows of several streams is then unknown.
fn gates_count_as_fired_where_rows_cannot_be_told(subject: &Subject) {
    // SAFETY: as in the test above.
    let looked_up = unsafe { GgmlTable::lookup(linked_symbol) }.unwrap();
    let gated = InterventionEntry { when: Some("g".into()), positions: Positions::Generated, ..add("push") };
    let policy = subject.policy().vector("g", 1).vector("push", 2);
    let guard = policy.gate(gate("g", Aggregate::Last, NEVER, OnFire::Steer)).intervene(gated).guard();
    let params = || params().with_n_seq_max(2).with_kv_unified(false);
    let script = subject.script();
    let rows = |sequence: SequenceId| {
        let prompt = script.decodes().swap_remove(0).into_iter();
        prompt.map(move |(token, row)| (token, BatchRow { sequence, ..row })).collect::<Vec<_>>()
    };
    let both = [rows(OTHER), rows(ONLY)].concat();
    let fired = |hook: &Hook| [ONLY, OTHER].map(|sequence| hook.sequences().decision(sequence, 0).unwrap().fired);

    let mut told = Hooked::new(subject, GgmlTable::linked(), compiled(subject, &guard), params());
    let expected = told.decode(&both).unwrap();
    assert_eq!(fired(told.hook()), [false, false], "{}", subject.name());

    let mut hooked = Hooked::new(subject, looked_up, compiled(subject, &guard), params());
    // One sequence at a time is certain.
    let alone = hooked.decode(&rows(ONLY)).unwrap();
    assert!(!hooked.hook().sequences().decision(ONLY, 0).unwrap().fired, "{}", subject.name());
    assert!(distance(&alone, &widened(&expected)) <= subject.tolerance(), "{}", subject.name());
    hooked.context.clear_kv_cache();
    hooked.hook().clear_all();
    let steered = hooked.decode(&both).unwrap();
    assert_eq!(fired(hooked.hook()), [true, true], "{}", subject.name());
    let changed = distance(&steered, &widened(&alone));
    assert!(changed > 2.0 * subject.tolerance(), "{}: logits change by {changed:.1e}", subject.name());
}

/// A residual that is not what it was when the guard was loaded, by what ggml says of it.
mod shapes {
    use super::*;
    use llama_cpp_sys_2 as sys;
    use std::cell::Cell;
    use std::ffi::c_void;

    const LAYER: u32 = 1;

    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Lie {
        Strided,
        Halves,
        Wide,
        OneRowMore,
    }

    thread_local! {
        static LIE: Cell<Option<Lie>> = const { Cell::new(None) };
    }

    /// The lie that is told of this tensor.
    fn told(tensor: *const c_void) -> Option<Lie> {
        // SAFETY: the hook asks of tensors that llama.cpp shows it.
        let name = unsafe { std::ffi::CStr::from_ptr(sys::ggml_get_name(tensor.cast())) };
        LIE.get().filter(|_| name.to_str() == Ok(&format!("l_out-{LAYER}")))
    }

    // SAFETY (of all four): as of `told`.
    unsafe extern "C" fn is_contiguous(tensor: *const c_void) -> bool {
        told(tensor) != Some(Lie::Strided) && unsafe { sys::ggml_is_contiguous(tensor.cast()) }
    }

    unsafe extern "C" fn n_bytes(tensor: *const c_void) -> usize {
        let n_bytes = unsafe { sys::ggml_nbytes(tensor.cast()) };
        match told(tensor) {
            Some(Lie::Halves) => n_bytes / 2,
            Some(Lie::Wide) => n_bytes * 2,
            Some(Lie::OneRowMore) => 4 * n_elements_of(tensor) as usize,
            _ => n_bytes,
        }
    }

    unsafe extern "C" fn n_elements(tensor: *const c_void) -> i64 {
        n_elements_of(tensor)
    }

    fn n_elements_of(tensor: *const c_void) -> i64 {
        // SAFETY: as of `told`.
        let (n, rows) = unsafe { (sys::ggml_nelements(tensor.cast()), sys::ggml_nrows(tensor.cast())) };
        match told(tensor) {
            Some(Lie::Wide) => 2 * n,
            Some(Lie::OneRowMore) => n / rows * (rows + 1),
            _ => n,
        }
    }

    unsafe extern "C" fn n_rows(tensor: *const c_void) -> i64 {
        let rows = unsafe { sys::ggml_nrows(tensor.cast()) };
        if told(tensor) == Some(Lie::OneRowMore) { rows + 1 } else { rows }
    }

    fn lying_table() -> GgmlTable {
        // SAFETY: functions of those signatures, which say what ggml's own say unless they lie.
        let table = unsafe {
            GgmlTable::lookup(|name| match name.to_bytes() {
                b"ggml_is_contiguous" => is_contiguous as *const c_void,
                b"ggml_nbytes" => n_bytes as *const c_void,
                b"ggml_nelements" => n_elements as *const c_void,
                b"ggml_nrows" => n_rows as *const c_void,
                _ => linked_symbol(name),
            })
        };
        table.unwrap()
    }

    #[test]
    fn a_residual_of_another_shape_ends_those_that_are_guarded_there() {
        for tiny in Tiny::all() {
            let guard = |layer| compiled(&tiny, &tiny.policy().vector("v", layer).intervene(add("v")).guard());
            let params = || params_for_two();
            let script = tiny.script();
            let rows = |sequence: SequenceId| {
                let prompt = script.decodes().swap_remove(0).into_iter();
                prompt.map(move |(token, row)| (token, BatchRow { sequence, ..row })).collect::<Vec<_>>()
            };
            let both = [rows(ONLY), rows(OTHER)].concat();
            let observer = Arc::new(Program::observer(tiny.model.shape()));
            let hooked = || {
                let mut hooked = Hooked::new(&tiny, lying_table(), Arc::clone(&observer), params());
                hooked.hook().assign(ONLY, guard(LAYER));
                hooked.hook().assign(OTHER, guard(LAYER + 1));
                hooked
            };
            let expected = hooked().decode(&both).unwrap();
            for lie in [Lie::Strided, Lie::Halves, Lie::Wide, Lie::OneRowMore] {
                let what = format!("{}: {lie:?}", tiny.name());
                let mut hooked = hooked();
                LIE.set(Some(lie));
                let (outcome, logits) = hooked.decode_each(&both);
                LIE.set(None);
                let Err(HookFault::Residual { layer: LayerIndex(LAYER), .. }) = &outcome else {
                    panic!("{what}: {outcome:?}")
                };
                assert_eq!(hooked.hook().fault_of(ONLY), outcome.as_ref().err(), "{what}");
                assert_eq!(hooked.hook().fault_of(OTHER), None, "{what}");
                assert!(
                    bits(&logits[logits.len() - 1..]) == bits(std::slice::from_ref(&expected)),
                    "{what}: the other's"
                );
                // What is started in its place is guarded as ever.
                hooked.context.clear_kv_cache();
                hooked.hook().clear_all();
                hooked.hook().assign(ONLY, guard(LAYER));
                hooked.hook().assign(OTHER, guard(LAYER + 1));
                assert!(bits(&[hooked.decode(&both).unwrap()]) == bits(std::slice::from_ref(&expected)), "{what}");
            }
        }
    }
}

/// A guard errs towards acting.
fn a_hook_that_does_not_know_tokens_takes_all_of_a_prompt_for_a_text(subject: &Subject) {
    let script = subject.script();
    let run = |positions| {
        let policy = subject.policy().vector("v", 1).intervene(InterventionEntry { positions, ..add("v") });
        let program = compiled(subject, &policy.guard());
        Hooked::new(subject, GgmlTable::linked(), program, params()).run(&script)
    };
    let text = Positions::Matching("this text is nowhere".into());
    assert!(bits(&run(text)) == bits(&run(Positions::Prompt)), "{}", subject.name());
    assert!(bits(&run(Positions::Prompt)) != bits(&run(Positions::All)), "{}", subject.name());
}
