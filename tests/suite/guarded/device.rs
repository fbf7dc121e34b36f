//! Programs as graphs on the residual's own device: a GPU where the build has one (`make test-vulkan`, `make test-cuda`), and the CPU, by the same
//! graphs, where it has none.

use super::patches::CASES;
use super::*;
use crate::raw_llama::linked_symbol;
use pilotfish::guard::Positions;
use pilotfish::hook::{DeviceTable, ExecutorKind, HookFault};
use pilotfish::program::{Calibration, GateDecision, RowFault};
use std::ffi::{CStr, c_void};

on_every_model!(placed: a_patch_on_a_device_is_as_exact_as_its_operation, what_does_not_act_changes_no_bit);

/// How far what a matrix product gives on a GPU may be from what it should be: it may round its inputs to ten bits there. So do llama.cpp's own,
/// which make more of any difference before them, and the guard's of a `switch`.
pub(super) const TOLERANCE_OF_PRODUCTS: f64 = if GPU { 2e-3 } else { TOLERANCE };

/// `guard` on the device where the model is.
fn guarded_there<'t>(tiny: &'t Subject, guard: &Guard) -> GuardedContext<'t> {
    let mut context = tiny.guarded(guard, params());
    there(&mut context);
    context
}

/// Takes the device's executor, and checks that residuals lie where they are thought to: that is what the default goes by.
fn there(context: &mut GuardedContext) {
    assert_eq!(context.executor(), if GPU { ExecutorKind::Device } else { ExecutorKind::Host });
    context.set_executor(ExecutorKind::Device);
}

fn copied<'t>(tiny: &'t Subject, guard: &Guard) -> GuardedContext<'t> {
    let mut context = tiny.guarded(guard, params());
    context.set_executor(ExecutorKind::Copy);
    context
}

fn close(what: &str, found: &[Vec<f32>], expected: &[Vec<f32>], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
        let distance = distance(found, &widened(expected));
        assert!(distance <= tolerance, "{what}, row {row}: off by {distance:.1e} of the norm");
    }
}

fn same_decisions(what: &str, found: &[Option<GateDecision>], expected: &[Option<GateDecision>], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let (found, expected) = (found.unwrap(), expected.unwrap());
        assert_eq!(found.fired, expected.fired, "{what}");
        let (found, expected) = (found.score.unwrap(), expected.score.unwrap());
        let apart = (found - expected).abs();
        assert!(apart <= 10.0 * tolerance * (1.0 + expected.abs()), "{what}: scores {found} and {expected}");
    }
}

/// What a script gives: residuals by layer, logits and decisions.
type Seen = (Vec<Vec<Vec<f32>>>, Vec<Vec<f32>>, Vec<Option<GateDecision>>);

/// By the device and by copy.
fn see_both(tiny: &Subject, guard: &Guard) -> [Seen; 2] {
    [(guarded_there(tiny, guard), ExecutorKind::Device), (copied(tiny, guard), ExecutorKind::Copy)].map(
        |(mut context, kind)| {
            let (residuals, logits) = tiny.script().run_captured(tiny, &mut context);
            assert_eq!(context.executor(), kind, "{}", tiny.name());
            (residuals, logits, context.gate_decisions(ONLY))
        },
    )
}

/// Gates of both scopes that read several directions, one that fires and one that does not, beside `policy`.
fn gated(policy: Policy<'_>) -> Guard {
    let policy = policy.vector("g0", 0).vector("g1", 1).vector("g2", 1).vector("g3", 1);
    let when = |name: &str, rule: &str| InterventionEntry {
        when: Some(rule.into()),
        positions: Positions::Generated,
        strength: 0.3,
        ..called(name, add("g0"))
    };
    policy
        .gate(gate("g0", Aggregate::Mean, -NEVER, OnFire::Steer))
        .gate(gate("g1", Aggregate::Max, NEVER, OnFire::Steer))
        .gate(gate("g2", Aggregate::Last, NEVER, OnFire::Block))
        .gate(token_gate("g3", 0.0, Some(-0.1)))
        .intervene(when("fired", "g0"))
        .intervene(InterventionEntry { vector: Some("g2".into()), ..when("not-fired", "g1") })
        .intervene(InterventionEntry { vector: Some("g3".into()), ..when("now-and-then", "g3 and not g1") })
        .guard()
}

#[test]
fn every_patch_on_a_device_agrees_with_the_same_by_copy() {
    for tiny in Tiny::all_placed() {
        for case in CASES {
            let what = format!("{}, {}", tiny.name(), case.what);
            let [device, copy] = see_both(&tiny, &gated((case.policy)(tiny.policy())));
            for (layer, (device, copy)) in device.0.iter().zip(&copy.0).enumerate() {
                close(&format!("{what}: layer {layer}"), device, copy, TOLERANCE_OF_PRODUCTS);
            }
            close(&format!("{what}: logits"), &device.1, &copy.1, 3.0 * TOLERANCE_OF_PRODUCTS);
            same_decisions(&what, &device.2, &copy.2, TOLERANCE_OF_PRODUCTS);
        }
    }
}

/// At the first hook point both start from the same residual.
fn a_patch_on_a_device_is_as_exact_as_its_operation(subject: &Subject) {
    let turned = |angle: f64| subject.policy().vector("v", 1).intervene(rotate("v", angle));
    let fused = || {
        let policy = subject.policy().vector("a", 1).vector("b", 1).vector("c", 1);
        policy.intervene(ablate("a", 2.0)).intervene(add("b")).intervene(clamp("c", -0.5, 0.5))
    };
    let own = [("to v", turned(180.0), 1), ("to -v", turned(-180.0), 1), ("fused", fused(), 1)];
    let cases = CASES.iter().map(|case| (case.what, (case.policy)(subject.policy()), case.first_point));
    for (what, policy, point) in own.into_iter().chain(cases) {
        let tolerance = if what.contains("switch") { TOLERANCE_OF_PRODUCTS } else { TOLERANCE / 10.0 };
        let [device, copy] = see_both(subject, &policy.guard());
        let what = format!("{}, {what}", subject.name());
        close(&what, &device.0[point as usize], &copy.0[point as usize], tolerance);
    }
}

fn what_does_not_act_changes_no_bit(subject: &Subject) {
    let script = subject.script();
    let policy = subject.policy().vector("g", 0).vector("v", 1).vector("w", 1);
    let when = |entry| InterventionEntry { when: Some("g".into()), ..entry };
    let policy = policy.gate(gate("g", Aggregate::Mean, NEVER, OnFire::Steer));
    let guard = policy.intervene(when(add("v"))).intervene(when(rotate("w", 30.0))).guard();
    // By copy, and not without a hook: what llama.cpp computes in one go rounds differently.
    let [device, copy] = [guarded_there(subject, &guard), copied(subject, &guard)]
        .map(|mut context| bits(&script.run(&mut context).unwrap()));
    assert!(device == copy, "{}", subject.name());
}

/// Prompts of many lengths, so that graphs come and go and their memory moves.
#[test]
fn batches_of_every_size_agree() {
    for tiny in Tiny::all_placed() {
        let guard = gated(tiny.policy().vector("v", 1).vector("w", 2).intervene(ablate("v", 1.0)).intervene(add("w")));
        let prompt: Vec<_> = tiny.script().tokens().into_iter().cycle().take(90).collect();
        let mut contexts = [guarded_there(&tiny, &guard), copied(&tiny, &guard)];
        for n_tokens in (2..20).chain([64, 3, 90, 70, 2]) {
            let [device, copy] = contexts.each_mut().map(|context| {
                context.clear();
                let prompt_logits = prefill(context, ONLY, &prompt[..n_tokens]).unwrap();
                let step_logits = step(context, ONLY, n_tokens, prompt[3]).unwrap();
                assert_eq!(context.gate_decisions(ONLY).len(), 4);
                vec![prompt_logits, step_logits]
            });
            close(&format!("{}: {n_tokens} tokens", tiny.name()), &device, &copy, 3.0 * TOLERANCE_OF_PRODUCTS);
        }
        assert_eq!(contexts.each_ref().map(|context| context.executor()), [ExecutorKind::Device, ExecutorKind::Copy]);
    }
}

pub(super) fn compiled(tiny: &Subject, guard: &Guard) -> Arc<Program> {
    Arc::new(Program::compile(guard, tiny.model.shape(), Calibration::Required).unwrap())
}

/// Decodes both prompts in one batch, then a token of each, with a program each; logits by sequence.
fn run_both(context: &mut GuardedContext, programs: [&Arc<Program>; 2], scripts: [&Script; 2]) -> Vec<Vec<f32>> {
    let sequences = [ONLY, OTHER];
    let mut batch = GuardedBatch::new(128);
    let mut last = Vec::new();
    for ((sequence, program), script) in sequences.into_iter().zip(programs).zip(scripts) {
        context.assign(sequence, Arc::clone(program));
        last.push(batch.add_prompt(sequence, TokenPosition(0), &script.prompt).unwrap());
    }
    context.decode(&mut batch).unwrap();
    let mut logits: Vec<Vec<f32>> = last.iter().map(|index| context.get_logits_ith(*index).to_vec()).collect();
    batch.clear();
    let step = |(sequence, script): (SequenceId, &Script)| {
        let position = TokenPosition(script.prompt.len() as i32);
        batch.add_generated(sequence, position, script.answer[0]).unwrap()
    };
    let last: Vec<i32> = sequences.into_iter().zip(scripts).map(step).collect();
    context.decode(&mut batch).unwrap();
    logits.extend(last.iter().map(|index| context.get_logits_ith(*index).to_vec()));
    logits
}

#[test]
fn sequences_of_one_batch_have_programs_of_their_own() {
    for tiny in Tiny::all_placed() {
        let first = compiled(&tiny, &gated(tiny.policy().vector("v", 1).intervene(ablate("v", 4.0))));
        let policy = tiny.policy().map("m", 2, MappingKind::Affine).vector("w", 1);
        let second = compiled(&tiny, &policy.intervene(rotate("w", 40.0)).intervene(switch("m")).guard());
        let scripts = [&tiny.script(), &Script { prompt: tiny.tokens("a song of the water bird"), ..tiny.script() }];
        let observer = Arc::new(Program::observer(tiny.model.shape()));
        let run = |kind: ExecutorKind, programs: [&Arc<Program>; 2]| {
            let params = params_for_two();
            let current = Arc::clone(&observer);
            let mut context = GuardedContext::new(tiny.model.llama(), backend().unwrap(), params, current).unwrap();
            context.set_executor(kind);
            let logits = run_both(&mut context, programs, scripts);
            let decisions = [ONLY, OTHER].map(|sequence| context.gate_decisions(sequence));
            (logits, decisions)
        };
        let programs = [&first, &second];
        let (device, copy) = (run(ExecutorKind::Device, programs), run(ExecutorKind::Copy, programs));
        close(&format!("{}: both", tiny.name()), &device.0, &copy.0, 3.0 * TOLERANCE_OF_PRODUCTS);
        for (device, copy) in device.1.iter().zip(&copy.1) {
            same_decisions(tiny.name(), device, copy, TOLERANCE_OF_PRODUCTS);
        }
        let swapped = run(ExecutorKind::Device, [&second, &first]);
        for (own, other) in device.0.iter().zip(&swapped.0) {
            assert!(
                distance(own, &widened(other)) > 10.0 * TOLERANCE_OF_PRODUCTS,
                "{}: the programs are one",
                tiny.name()
            );
        }
        // Nothing of the executor's keeps a program alive.
        assert_eq!([&first, &second].map(Arc::strong_count), [1, 1], "{}", tiny.name());
    }
}

/// Weights with which block 1 makes rows of `token`, and no others, infinite: the first value of a row is 0 up to there for every other, and
/// block 1 multiplies it with itself and with what does not fit.
fn poisoned_by(shape: &TinyModel, token: LlamaToken) -> Weights {
    let mut weights = shape.weights();
    let width = shape.n_embd as usize;
    let mut of = |name: &str| weights.remove_entry(name).unwrap();
    let (mut embedding, up, gate) = (of("token_embd.weight"), of("blk.1.ffn_up.weight"), of("blk.1.ffn_gate.weight"));
    for (index, row) in embedding.1.values.chunks_exact_mut(width).enumerate() {
        row[0] = if index == token.0 as usize { 1.0 } else { 0.0 };
    }
    let silent = ["blk.0.attn_output.weight", "blk.0.ffn_down.weight", "blk.1.attn_output.weight"].map(of);
    let silent = silent.into_iter().map(|(name, mut weight)| {
        let row = weight.shape[0];
        weight.values[..row].fill(0.0);
        (name, weight)
    });
    let loud = [up, gate].into_iter().map(|(name, mut weight)| {
        weight.values[0] = 1e30;
        (name, weight)
    });
    let changed: Vec<_> = silent.chain(loud).chain([embedding]).collect();
    weights.extend(changed);
    weights
}

/// With gates the scores tell, without them a sum over the row.
#[test]
fn a_row_that_is_not_finite_ends_its_sequence_alone() {
    for architecture in Architecture::WITH_RESIDUAL {
        let shape = TinyModel::new(architecture);
        let sound = Tiny::new(architecture);
        let (poisoned, other) = (sound.tokens(" shark")[1], sound.tokens(" sea")[1]);
        let weights = poisoned_by(&shape, poisoned);
        let tiny = Tiny::placed(shape, &weights);
        let start = tiny.tokens("")[0];
        let never = |layer| tiny.policy().vector("g", layer).gate(gate("g", Aggregate::Last, NEVER, OnFire::Block));
        let gated_add = InterventionEntry { when: Some("g".into()), ..add("v") };
        let guards = [
            ("a gate", never(1).guard()),
            ("a patch", tiny.policy().vector("v", 1).intervene(add("v")).guard()),
            ("a patch that does not act", never(0).vector("v", 1).intervene(gated_add).guard()),
        ];
        for (what, guard) in guards {
            let what = format!("{}, {what}", tiny.name());
            let program = compiled(&tiny, &guard);
            let run = |first: LlamaToken| {
                let (params, program) = (params_for_two(), Arc::clone(&program));
                let mut context = GuardedContext::new(tiny.model.llama(), backend().unwrap(), params, program).unwrap();
                there(&mut context);
                let mut batch = GuardedBatch::new(8);
                batch.add_prompt(ONLY, TokenPosition(0), &[start, other, first]).unwrap();
                let index = batch.add_prompt(OTHER, TokenPosition(0), &[start, other, other]).unwrap();
                let ended = context.decode_each(&mut batch).unwrap();
                assert_eq!(context.executor(), ExecutorKind::Device, "{what}");
                (ended, context.get_logits_ith(index).to_vec())
            };
            let (none, expected) = run(other);
            assert!(none.is_empty(), "{what}: {none:?}");
            let (ended, found) = run(poisoned);
            let [(sequence, ContextError::Fault { fault, .. })] = ended.as_slice() else { panic!("{what}: {ended:?}") };
            assert_eq!(*sequence, ONLY, "{what}");
            let HookFault::Row { layer, source: RowFault::NonFinite { position } } = fault else {
                panic!("{what}: {fault}")
            };
            assert_eq!((*layer, *position), (LayerIndex(1), 2), "{what}: {fault}");
            let distance = distance(&found, &widened(&expected));
            assert!(distance <= 3.0 * TOLERANCE_OF_PRODUCTS, "{what}: the other sequence is off by {distance:.1e}");
        }
    }
}

unsafe extern "C" fn nothing_is_supported(_: *const c_void, _: *const c_void) -> bool {
    false
}

/// The functions by name, as a library has them that is loaded beside a llama.cpp of someone else's.
#[test]
fn functions_that_are_looked_up_do_the_same() {
    let look_up = |replaced: &'static CStr| {
        // SAFETY: the functions of those names of the llama.cpp that runs the model, which is never unloaded, but for one, of the same
        // signature.
        let table = unsafe {
            DeviceTable::lookup(|name| {
                if name == replaced { nothing_is_supported as *const c_void } else { linked_symbol(name) }
            })
        };
        // Once a process.
        &*Box::leak(Box::new(table.unwrap()))
    };
    // SAFETY: as above.
    let by_name = unsafe { pilotfish::hook::GgmlTable::lookup(linked_symbol) }.unwrap();
    // The table, what is asked for, and what comes of it.
    let where_it_lies = if GPU { ExecutorKind::Device } else { ExecutorKind::Host };
    let cases = [
        (None, None, ExecutorKind::Copy),
        (Some(look_up(c"")), None, where_it_lies),
        (Some(look_up(c"")), Some(ExecutorKind::Device), ExecutorKind::Device),
        (Some(look_up(c"ggml_backend_supports_op")), Some(ExecutorKind::Device), ExecutorKind::Copy),
    ];
    for tiny in Tiny::all_placed() {
        let script = tiny.script();
        let policy = tiny.policy().vector("v", 1).vector("w", 2).intervene(ablate("v", 1.0));
        let program = compiled(&tiny, &gated(policy.intervene(rotate("w", 20.0))));
        let runs: Vec<_> = cases
            .iter()
            .map(|(device, asked, kind)| {
                let table = device.map_or(by_name, |device| by_name.with_device(device));
                let mut hooked = super::table::Hooked::new(&tiny, table, Arc::clone(&program), params());
                asked.iter().for_each(|asked| hooked.hook().set_executor_kind(*asked));
                let logits = hooked.run(&script);
                assert_eq!(hooked.hook().executor_kind(), *kind, "{}", tiny.name());
                logits
            })
            .collect();
        close(&format!("{}: where it lies", tiny.name()), &runs[1], &runs[0], 3.0 * TOLERANCE_OF_PRODUCTS);
        close(&format!("{}: on the device", tiny.name()), &runs[2], &runs[0], 3.0 * TOLERANCE_OF_PRODUCTS);
        assert!(bits(&runs[3]) == bits(&runs[0]), "{}: by copy", tiny.name());
    }
}

#[test]
fn a_device_function_that_is_missing_is_named() {
    for missing in DeviceTable::SYMBOLS {
        // SAFETY: as above.
        let found = unsafe {
            DeviceTable::lookup(|name| {
                if name.to_bytes() == missing.as_bytes() { std::ptr::null() } else { linked_symbol(name) }
            })
        };
        assert_eq!(found.err().map(|error| error.symbol).as_deref(), Some(*missing));
    }
}
