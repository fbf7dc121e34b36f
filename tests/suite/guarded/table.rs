//! The hook on a context of the app's own, with ggml's functions linked or looked up by name, and its program swapped.

use super::*;
use crate::raw_llama::linked_symbol;
use pilotfish::guard::Positions;
use pilotfish::hook::{
    Capture, CapturedRow, EvalCallbackParams, ExecutorKind, GgmlTable, Hook, HookFault, MissingSymbol, Splitting,
};
use pilotfish::program::{Calibration, GateDecision};

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
    pub fn new(tiny: &'m Tiny, table: GgmlTable, program: Arc<Program>, params: LlamaContextParams) -> Self {
        let hook = OwnedHook(Box::into_raw(Box::new(Hook::new(table, program))));
        // SAFETY: the hook is freed after the context, and nothing uses it during a decode.
        let params = unsafe { params.with_eval_hook(hook.0) };
        let n_streams = params.n_streams();
        let context = tiny.plain(params);
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

fn compiled(tiny: &Tiny, guard: &Guard) -> Arc<Program> {
    Arc::new(Program::compile(guard, tiny.model.shape(), Calibration::Required).unwrap())
}

fn decisions(hook: &Hook) -> Vec<Option<GateDecision>> {
    (0..hook.program().gates().len()).map(|gate| hook.sequences().decision(ONLY, gate)).collect()
}

fn captured(rows: Vec<CapturedRow>) -> Vec<Vec<f32>> {
    rows.into_iter().map(|row| row.values).collect()
}

#[test]
fn a_table_that_is_looked_up_does_what_the_linked_one_does() {
    // SAFETY: `linked_symbol` gives the functions of those names of the llama.cpp that runs the model, which is never unloaded.
    let looked_up = unsafe { GgmlTable::lookup(linked_symbol) }.unwrap();
    for tiny in Tiny::all() {
        let script = tiny.script();
        let last = tiny.last_layer();
        let steers = |vector: &str| gate(vector, Aggregate::Last, -NEVER, OnFire::Steer);
        let gated = |vector: &str, gate: &str| InterventionEntry {
            when: Some(gate.into()),
            positions: Positions::Generated,
            ..add(vector)
        };
        let everywhere = tiny.policy().vector("g", 0).vector("v", 1).vector("w", last);
        let at_the_end = tiny.policy().vector("g", last).vector("w", last);
        let guards = [
            (
                "several layers",
                everywhere.gate(steers("g")).intervene(ablate("v", 4.0)).intervene(gated("w", "g")).guard(),
            ),
            ("the last layer alone", at_the_end.gate(steers("g")).intervene(gated("w", "g")).guard()),
        ];
        let plain = script.run_plain(&mut tiny.plain(params()));
        for (what, guard) in guards {
            for n_ubatch in [128, 4] {
                let what = format!("{}, {what}, micro-batches of {n_ubatch}", tiny.name());
                let run = |table| {
                    let params = params().with_n_ubatch(n_ubatch);
                    let mut hooked = Hooked::new(&tiny, table, compiled(&tiny, &guard), params);
                    hooked.hook().set_capture(Some(Capture::new([LayerIndex(last)])));
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
#[test]
fn a_program_is_swapped_between_decodes() {
    for tiny in Tiny::all() {
        let script = tiny.script();
        let blocks = |layer| tiny.policy().vector("g", layer).gate(gate("g", Aggregate::Mean, NEVER, OnFire::Block));
        let guards = [
            blocks(0).vector("v", 1).intervene(add("v")).guard(),
            blocks(2).vector("v", 3).vector("w", 0).intervene(ablate("v", 4.0)).intervene(add("w")).guard(),
        ];
        let own = |guard: &Guard| {
            let mut hooked = Hooked::new(&tiny, GgmlTable::linked(), compiled(&tiny, guard), params());
            let logits = hooked.run(&script);
            (logits, decisions(hooked.hook()))
        };
        let expected = guards.each_ref().map(own);
        assert!(bits(&expected[0].0) != bits(&expected[1].0));

        let observer = Arc::new(Program::observer(tiny.model.shape()));
        let mut hooked = Hooked::new(&tiny, GgmlTable::linked(), observer, params());
        let plain = hooked.run(&script);
        for swap in [0, 1, 0] {
            hooked.context.clear_kv_cache();
            // A live sequence would keep the program that it has.
            hooked.hook().clear(ONLY);
            hooked.hook().set_program(compiled(&tiny, &guards[swap]));
            assert_eq!(decisions(hooked.hook()), [None], "{}: gates are the program's own", tiny.name());
            assert!(bits(&hooked.run(&script)) == bits(&expected[swap].0), "{}: guard {swap}", tiny.name());
            assert_eq!(decisions(hooked.hook()), expected[swap].1, "{}: guard {swap}", tiny.name());
        }
        hooked.context.clear_kv_cache();
        hooked.hook().clear(ONLY);
        hooked.hook().set_program(Arc::new(Program::observer(tiny.model.shape())));
        assert!(bits(&hooked.run(&script)) == bits(&plain), "{}", tiny.name());
    }
}

/// A table that is looked up can't read positions: in what order llama.cpp takes rows of several streams is then unknown.
#[test]
fn gates_count_as_fired_where_rows_cannot_be_told() {
    // SAFETY: as in the test above.
    let looked_up = unsafe { GgmlTable::lookup(linked_symbol) }.unwrap();
    for tiny in Tiny::all() {
        let gated = InterventionEntry { when: Some("g".into()), positions: Positions::Generated, ..add("push") };
        let policy = tiny.policy().vector("g", 1).vector("push", 2);
        let guard = policy.gate(gate("g", Aggregate::Last, NEVER, OnFire::Steer)).intervene(gated).guard();
        let params = || params().with_n_seq_max(2).with_kv_unified(false);
        let script = tiny.script();
        let rows = |sequence: SequenceId| {
            let prompt = script.decodes().swap_remove(0).into_iter();
            prompt.map(move |(token, row)| (token, BatchRow { sequence, ..row })).collect::<Vec<_>>()
        };
        let both = [rows(OTHER), rows(ONLY)].concat();
        let fired = |hook: &Hook| [ONLY, OTHER].map(|sequence| hook.sequences().decision(sequence, 0).unwrap().fired);

        let mut told = Hooked::new(&tiny, GgmlTable::linked(), compiled(&tiny, &guard), params());
        let expected = told.decode(&both).unwrap();
        assert_eq!(fired(told.hook()), [false, false], "{}", tiny.name());

        let mut hooked = Hooked::new(&tiny, looked_up, compiled(&tiny, &guard), params());
        // One sequence at a time is certain.
        let alone = hooked.decode(&rows(ONLY)).unwrap();
        assert!(!hooked.hook().sequences().decision(ONLY, 0).unwrap().fired, "{}", tiny.name());
        assert!(distance(&alone, &widened(&expected)) <= TOLERANCE, "{}", tiny.name());
        hooked.context.clear_kv_cache();
        hooked.hook().clear_all();
        let steered = hooked.decode(&both).unwrap();
        assert_eq!(fired(hooked.hook()), [true, true], "{}", tiny.name());
        assert!(distance(&steered, &widened(&alone)) > 100.0 * TOLERANCE, "{}: nothing acts", tiny.name());
    }
}
