//! A fault is never "safe": what a decode produced is not given out, unless the guard says `pass`.

use super::*;
use pilotfish::engine::ActivationReader;
use pilotfish::hook::{Executor, ExecutorKind, HookFault, Tensor};
use pilotfish::program::{Row, RowFault, Sequences};

/// An executor that fails its own way.
struct Failing(fn() -> RowFault);

impl Executor for Failing {
    fn kind(&self) -> ExecutorKind {
        ExecutorKind::Host
    }

    fn run(&mut self, _: LayerIndex, _: &[Row], _: &mut Sequences, _: &mut Tensor<'_>) -> Result<(), RowFault> {
        Err((self.0)())
    }
}

const LAYER: u32 = 1;

on_every_model!(
    an_executor_that_fails_blocks_that_decode_and_no_other,
    an_executor_that_fails_leaves_the_model_unguarded_where_the_guard_says_pass,
    what_llama_cpp_refuses_is_no_fault_of_the_guard,
);

/// Ways to fail, and what is latched of each.
fn failures(subject: &Subject) -> [(fn() -> RowFault, HookFault); 2] {
    let layer = subject.layer(LAYER);
    let width = RowFault::Width { expected: 1, found: 2 };
    [
        (|| RowFault::Width { expected: 1, found: 2 }, HookFault::Row { layer, source: width }),
        (|| panic!("as it must"), HookFault::Panic { layer: Some(layer), message: "as it must".into() }),
    ]
}

fn adds(subject: &Subject, on_error: OnError) -> Guard {
    subject.policy().vector("v", LAYER).intervene(add("v")).on_error(on_error).guard()
}

fn an_executor_that_fails_blocks_that_decode_and_no_other(subject: &Subject) {
    let script = subject.script();
    let guard = adds(subject, OnError::Block);
    let good = script.run(&mut subject.guarded(&guard, params())).unwrap();
    for (fail, expected) in failures(subject) {
        let mut context = subject.guarded(&guard, params());
        context.set_custom_executor(Box::new(Failing(fail)));
        let outcome = prefill(&mut context, ONLY, &script.prompt);
        let Err(ContextError::Fault { guard, fault }) = outcome else { panic!("{}: {outcome:?}", subject.name()) };
        assert_eq!((guard.as_str(), &fault), ("tested", &expected), "{}", subject.name());

        context.set_executor(ExecutorKind::Host);
        context.clear();
        assert!(bits(&script.run(&mut context).unwrap()) == bits(&good), "{}: after {fault}", subject.name());
    }
}

fn an_executor_that_fails_leaves_the_model_unguarded_where_the_guard_says_pass(subject: &Subject) {
    let script = subject.script();
    let guard = adds(subject, OnError::Pass);
    let plain = script.run_plain(&mut subject.plain(params()));
    for (fail, expected) in failures(subject) {
        let mut context = subject.guarded(&guard, params());
        context.set_custom_executor(Box::new(Failing(fail)));
        let passed = script.run(&mut context).unwrap();
        assert!(bits(&passed) == bits(&plain), "{}: {expected}", subject.name());
        // The guard is on again with the next decode.
        context.set_executor(ExecutorKind::Host);
        context.clear();
        assert!(bits(&script.run(&mut context).unwrap()) != bits(&plain), "{}: after {expected}", subject.name());
    }
}

/// One token's embedding is infinite: whatever reads or patches its residual says so, and prompts without it are answered.
#[test]
fn a_residual_that_is_not_finite_is_a_fault() {
    for architecture in Architecture::WITH_RESIDUAL {
        let (tiny, poisoned, other) = Tiny::poisoned(architecture);
        let reads = |on_error| {
            let policy = tiny.policy().vector("g", LAYER).gate(gate("g", Aggregate::Last, NEVER, OnFire::Block));
            policy.on_error(on_error).guard()
        };
        let start = tiny.tokens("")[0];
        for guard in [reads(OnError::Block), adds(&tiny, OnError::Block)] {
            let mut context = tiny.guarded(&guard, params());
            prefill(&mut context, ONLY, &[start, other, other]).unwrap();
            context.clear();
            let outcome = prefill(&mut context, ONLY, &[start, other, poisoned]);
            let Err(ContextError::Fault { fault, .. }) = outcome else { panic!("{}: {outcome:?}", tiny.name()) };
            // Attention may have carried it to other rows.
            let not_finite = |fault| matches!(fault, HookFault::Row { source: RowFault::NonFinite { .. }, .. });
            assert!(not_finite(fault.clone()), "{}: {fault}", tiny.name());
            context.clear();
            prefill(&mut context, ONLY, &[start, other, other]).unwrap();
        }
        let mut context = tiny.guarded(&reads(OnError::Pass), params());
        prefill(&mut context, ONLY, &[start, other, poisoned]).unwrap();
    }
}

#[test]
fn a_model_that_is_never_finite_is_refused_at_once() {
    for architecture in Architecture::WITH_RESIDUAL {
        let shape = TinyModel::new(architecture);
        let mut weights = shape.weights();
        weights.get_mut("blk.1.ffn_norm.weight").unwrap().values[0] = f32::NAN;
        let tiny = Tiny::with_weights(shape, &weights);
        let refused = guard_context(tiny.model.llama(), backend().unwrap(), params(), &[&adds(&tiny, OnError::Pass)]);
        let error = refused.err().expect("its dry run fails").to_string();
        assert!(error.contains("layer 1") && error.contains("not finite"), "{}: {error}", tiny.name());
    }
}

/// Whatever the guard says of errors: a guard that can't act is never made.
#[test]
fn a_model_without_the_residual_is_refused_by_name_of_the_layer() {
    let shape = TinyModel::without_residual_names();
    let weights = shape.weights();
    let tiny = Tiny::with_weights(shape, &weights);
    let missing = |error: ContextError| {
        let ContextError::Fault { fault, .. } = error else { panic!("{error}") };
        assert_eq!(fault, HookFault::MissingHookPoint { layer: LayerIndex(LAYER) });
        assert!(fault.to_string().contains("`l_out-1`"), "{fault}");
    };
    for on_error in [OnError::Block, OnError::Pass] {
        let guard = adds(&tiny, on_error);
        let shape = tiny.model.shape();
        let program = Program::compile(&guard, shape, pilotfish::program::Calibration::Required).unwrap();
        let made = GuardedContext::new(tiny.model.llama(), backend().unwrap(), params(), Arc::new(program));
        missing(made.err().expect("it has no hook point"));
    }
    let mut reader = ActivationReader::of(&tiny.model, vec![LayerIndex(LAYER)], 16).unwrap();
    let Err(pilotfish::engine::EngineError::Context(error)) = reader.every_token(&tiny.script().prompt[..4]) else {
        panic!("activations that are not there were read");
    };
    missing(error);
}

fn what_llama_cpp_refuses_is_no_fault_of_the_guard(subject: &Subject) {
    let mut context = subject.guarded(&adds(subject, OnError::Block), params());
    let token = subject.script().answer[0];
    step(&mut context, ONLY, 0, token).unwrap();
    // The same position again.
    let outcome = step(&mut context, ONLY, 0, token);
    assert!(matches!(outcome, Err(ContextError::Decode(_))), "{outcome:?}");
    step(&mut context, ONLY, 1, token).unwrap();
}

#[test]
fn a_batch_takes_no_more_than_it_has_room_for() {
    use pilotfish::hook::BatchError;
    let tokens = [LlamaToken(5); 3];
    let mut batch = GuardedBatch::new(4);
    batch.add_prompt(ONLY, TokenPosition(0), &tokens).unwrap();
    let full = BatchError::Full { capacity: 4, wanted: 6 };
    assert_eq!(batch.add_prompt(ONLY, TokenPosition(3), &tokens), Err(full));
    assert_eq!(batch.len(), 3, "a part of the prompt was added");
    assert_eq!(batch.add_generated(ONLY, TokenPosition(3), tokens[0]), Ok(3));
    let full = BatchError::Full { capacity: 4, wanted: 5 };
    assert_eq!(batch.add_generated(ONLY, TokenPosition(4), tokens[0]), Err(full));
    batch.clear();
    let far = BatchError::Position { sequence: ONLY, start: i32::MAX, count: 3 };
    assert_eq!(batch.add_prompt(ONLY, TokenPosition(i32::MAX), &tokens), Err(far));
}
