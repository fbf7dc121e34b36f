//! What gates read, when they fire, and what follows.

use super::*;
use pilotfish::engine::{Finish, GenerationOptions, Session, SessionOptions};
use pilotfish::program::GateDecision;

/// Two prompts that a gate of `aggregate` tells apart, and a threshold between them.
struct Told {
    hot: Script,
    cold: Script,
    threshold: f64,
}

/// A guard's first vector is what its gates read.
const PROBE: &str = "probe";

fn told(tiny: &Subject, layer: u32, aggregate: Aggregate) -> Told {
    let reads = tiny.policy().vector(PROBE, layer).gate(gate(PROBE, aggregate, NEVER, OnFire::Steer)).guard();
    let mut context = tiny.guarded(&reads, params());
    let answer = tiny.script().answer;
    let mut scored: Vec<(f64, Script)> = [PROMPT, "a song of the water bird"]
        .map(|text| {
            let prompt = tiny.tokens(text);
            context.clear();
            prefill(&mut context, ONLY, &prompt).unwrap();
            (score(&context, ONLY), Script { prompt, answer: answer.clone() })
        })
        .into();
    scored.sort_by(|a, b| a.0.total_cmp(&b.0));
    let [(low, cold), (high, hot)] = <[_; 2]>::try_from(scored).ok().unwrap();
    assert!(high - low > 1e-2, "{}: the prompts' scores are {low} and {high}", tiny.name());
    Told { hot, cold, threshold: (low + high) / 2.0 }
}

fn decision(context: &GuardedContext, sequence: SequenceId) -> Option<GateDecision> {
    context.gate_decisions(sequence)[0]
}

fn score(context: &GuardedContext, sequence: SequenceId) -> f64 {
    decision(context, sequence).unwrap().score.unwrap()
}

/// The scores that gates on every vector of `guard` must give, from a residual computed in `f64`.
fn expected_score(guard: &Guard, script: &Script, residual: &[Vec<f64>], aggregate: Aggregate) -> f64 {
    let direction = widened(&guard.vectors()[0].direction);
    let norm = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
    let project = |row: &Vec<f64>| row.iter().zip(&direction).map(|(x, v)| x * v / norm).sum::<f64>();
    // Position 0 is an attention sink, which no gate reads.
    let projections: Vec<f64> = residual[1..script.prompt.len()].iter().map(project).collect();
    let aggregate = match aggregate {
        Aggregate::Last => *projections.last().unwrap(),
        Aggregate::Mean => projections.iter().sum::<f64>() / projections.len() as f64,
        Aggregate::Max => projections.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    };
    (aggregate - BENIGN.0) / BENIGN.1
}

#[test]
fn scores_are_projections_in_benign_deviations() {
    let mut signs = [false; 2];
    for tiny in Tiny::all() {
        let script = tiny.script();
        // One token to read, whose projection may as well be negative.
        let short = Script { prompt: script.prompt[..2].to_vec(), answer: script.answer.clone() };
        for script in [script, short] {
            let reference = tiny.unguarded_reference(&script);
            for layer in 0..tiny.shape.n_layer {
                for aggregate in [Aggregate::Last, Aggregate::Mean, Aggregate::Max] {
                    if layer == tiny.last_layer() && aggregate != Aggregate::Last {
                        continue; // refused, see below
                    }
                    let reads = gate(PROBE, aggregate, NEVER, OnFire::Steer);
                    let guard = tiny.policy().vector(PROBE, layer).gate(reads).guard();
                    let mut context = tiny.guarded(&guard, params());
                    assert_eq!(decision(&context, ONLY), None, "before any prompt");
                    let (residuals, _) = script.run_captured(&tiny, &mut context);
                    let captured: Vec<_> = residuals[layer as usize].iter().map(|row| widened(row)).collect();
                    let what = format!("{}, layer {layer}, {aggregate:?}", tiny.name());
                    let found = score(&context, ONLY);
                    for (residual, tolerance) in [(&captured, 1e-5), (&reference.residuals[layer as usize], 1e-3)] {
                        let expected = expected_score(&guard, &script, residual, aggregate);
                        assert!((found - expected).abs() <= tolerance, "{what}: {found}, expected {expected}");
                    }
                    signs[usize::from(found * BENIGN.1 + BENIGN.0 > 0.0)] |= aggregate == Aggregate::Max;
                }
            }
        }
    }
    assert_eq!(signs, [true; 2], "projections of one sign only");
}

/// A guard reads what the model computed, not what its own interventions made of it.
#[test]
fn a_gate_reads_a_residual_before_it_is_patched_there() {
    for tiny in Tiny::all() {
        let script = tiny.script();
        let policy = || tiny.policy().vector(PROBE, 1).gate(gate(PROBE, Aggregate::Mean, NEVER, OnFire::Steer));
        let run = |guard: &Guard| {
            let mut context = tiny.guarded(guard, params());
            script.run(&mut context).unwrap();
            decision(&context, ONLY)
        };
        assert_eq!(run(&policy().guard()), run(&policy().intervene(ablate(PROBE, 7.0)).guard()), "{}", tiny.name());
    }
}

#[test]
fn a_gate_that_blocks_gives_no_logits_until_its_sequence_is_cleared() {
    for tiny in Tiny::all() {
        let told = told(&tiny, 1, Aggregate::Mean);
        let blocks = gate(PROBE, Aggregate::Mean, told.threshold, OnFire::Block);
        let guard = tiny.policy().vector(PROBE, 1).gate(blocks).guard();
        let mut context = tiny.guarded(&guard, params());
        let assert_blocked = |outcome: Result<Vec<f32>, ContextError>| {
            let Err(ContextError::Blocked { guard, sequence, gate, message }) = outcome else {
                panic!("{}: {outcome:?}", tiny.name());
            };
            assert_eq!((guard.as_str(), sequence, gate.as_str()), ("tested", ONLY, PROBE));
            assert_eq!(message.as_deref(), Some("not this"));
        };
        let (hot, cold) = (&told.hot, &told.cold);
        assert_blocked(prefill(&mut context, ONLY, &hot.prompt));
        assert_blocked(step(&mut context, ONLY, hot.prompt.len(), hot.answer[0]));
        // Another turn does not lift it either.
        context.begin_prompt(ONLY);
        let mut batch = GuardedBatch::new(64);
        batch.add_prompt(ONLY, TokenPosition(hot.prompt.len() as i32 + 1), &cold.prompt[1..]).unwrap();
        assert_blocked(context.decode(&mut batch).map(|()| Vec::new()));

        context.clear_sequence(ONLY).unwrap();
        assert_eq!(decision(&context, ONLY), None);
        prefill(&mut context, ONLY, &cold.prompt).unwrap();
        step(&mut context, ONLY, cold.prompt.len(), cold.answer[0]).unwrap();
        assert!(!decision(&context, ONLY).unwrap().fired);
        context.clear();
        assert_eq!(decision(&context, ONLY), None);
        assert_blocked(prefill(&mut context, ONLY, &hot.prompt));
    }
}

#[test]
fn a_gate_that_has_not_fired_reads_the_next_turn_anew() {
    let tiny = Tiny::new(Architecture::Llama);
    let told = told(&tiny, 1, Aggregate::Max);
    let guard = tiny.policy().vector(PROBE, 1).gate(gate(PROBE, Aggregate::Max, NEVER, OnFire::Block)).guard();
    let mut context = tiny.guarded(&guard, params());
    prefill(&mut context, ONLY, &told.hot.prompt).unwrap();
    let first = score(&context, ONLY);
    let mut turn = |begins: bool| {
        context.clear();
        prefill(&mut context, ONLY, &told.hot.prompt).unwrap();
        if begins {
            context.begin_prompt(ONLY);
            assert_eq!(decision(&context, ONLY), None);
        }
        let mut batch = GuardedBatch::new(64);
        batch.add_prompt(ONLY, TokenPosition(told.hot.prompt.len() as i32), &told.cold.prompt[1..]).unwrap();
        context.decode(&mut batch).unwrap();
        score(&context, ONLY)
    };
    // The largest projection of both turns, and of the second alone.
    assert!(turn(false) >= first);
    assert!(turn(true) < first);
}

#[test]
fn an_intervention_acts_only_where_its_gate_has_fired() {
    for tiny in Tiny::all() {
        let told = told(&tiny, 1, Aggregate::Mean);
        // At the gate's own layer and after it the prompt's last token is patched already; before it an intervention may only act on what
        // follows. No token before is patched anywhere, though later layers compute it after the decision.
        for layer in 0..tiny.shape.n_layer {
            let what = format!("{}, layer {layer}", tiny.name());
            let positions = if layer >= 1 { Positions::All } else { Positions::Generated };
            let gated = InterventionEntry { when: Some(PROBE.into()), positions, ..add("push") };
            let steers = gate(PROBE, Aggregate::Mean, told.threshold, OnFire::Steer);
            let guard = tiny.policy().vector(PROBE, 1).vector("push", layer).gate(steers).intervene(gated).guard();
            let mut context = tiny.guarded(&guard, params());

            let cold = told.cold.run(&mut context).unwrap();
            assert!(!decision(&context, ONLY).unwrap().fired, "{what}");
            assert!(bits(&cold) == bits(&told.cold.run_plain(&mut tiny.plain(params()))), "{what}: not fired");

            context.clear();
            let hot = told.hot.run(&mut context).unwrap();
            assert!(decision(&context, ONLY).unwrap().fired, "{what}");
            let open = |layer, kind| vec![kind == RowKind::Generated || kind == RowKind::PromptEnd && layer >= 1];
            let (expected, unguarded) = (tiny.reference(&guard, &told.hot, open), tiny.unguarded_reference(&told.hot));
            assert!(expected.logits.last() != unguarded.logits.last(), "{what}");
            for (position, (found, expected)) in hot.iter().zip(&expected.logits).enumerate() {
                let distance = distance(found, expected);
                assert!(distance <= TOLERANCE, "{what}, position {position}: off by {distance:.1e} of the norm");
            }
        }
    }
}

/// Prompts of two sequences in one batch, and then a token of each.
#[test]
fn sequences_of_one_batch_have_their_own_decisions() {
    for tiny in Tiny::all() {
        let told = told(&tiny, 1, Aggregate::Last);
        let gated = InterventionEntry { when: Some(PROBE.into()), positions: Positions::Generated, ..add("push") };
        let steers = gate(PROBE, Aggregate::Last, told.threshold, OnFire::Steer);
        let guard = tiny.policy().vector(PROBE, 1).vector("push", 2).gate(steers).intervene(gated).guard();
        let pair = |context: &mut GuardedContext, first: &Script, second: &Script| {
            let mut batch = GuardedBatch::new(128);
            let a = batch.add_prompt(ONLY, TokenPosition(0), &first.prompt).unwrap();
            let b = batch.add_prompt(OTHER, TokenPosition(0), &second.prompt).unwrap();
            context.decode(&mut batch).unwrap();
            let mut logits = vec![context.get_logits_ith(a).to_vec(), context.get_logits_ith(b).to_vec()];
            batch.clear();
            let at = |script: &Script| TokenPosition(script.prompt.len() as i32);
            let a = batch.add_generated(ONLY, at(first), first.answer[0]).unwrap();
            let b = batch.add_generated(OTHER, at(second), second.answer[0]).unwrap();
            context.decode(&mut batch).unwrap();
            logits.extend([context.get_logits_ith(a).to_vec(), context.get_logits_ith(b).to_vec()]);
            logits
        };
        let program = Arc::new(Program::observer(tiny.model.shape()));
        let mut unguarded =
            GuardedContext::new(tiny.model.llama(), backend().unwrap(), params_for_two(), program).unwrap();
        let mut context = tiny.guarded(&guard, params_for_two());
        for (first, second, hot) in [(&told.hot, &told.cold, 0), (&told.cold, &told.hot, 1)] {
            context.clear();
            unguarded.clear();
            let (guarded, plain) = (pair(&mut context, first, second), pair(&mut unguarded, first, second));
            let fired = [ONLY, OTHER].map(|sequence| decision(&context, sequence).unwrap().fired);
            assert_eq!(fired, [hot == 0, hot == 1], "{}", tiny.name());
            for (index, (guarded, plain)) in guarded.iter().zip(&plain).enumerate() {
                assert_eq!(guarded != plain, index % 2 == hot, "{}: logits {index}", tiny.name());
            }
        }
    }
}

#[test]
fn a_blocked_sequence_leaves_the_others_of_its_batch_their_logits() {
    let tiny = Tiny::new(Architecture::Llama);
    let told = told(&tiny, 1, Aggregate::Last);
    let guard =
        tiny.policy().vector(PROBE, 1).gate(gate(PROBE, Aggregate::Last, told.threshold, OnFire::Block)).guard();
    let mut context = tiny.guarded(&guard, params_for_two());
    let mut batch = GuardedBatch::new(128);
    let cold = batch.add_prompt(ONLY, TokenPosition(0), &told.cold.prompt).unwrap();
    batch.add_prompt(OTHER, TokenPosition(0), &told.hot.prompt).unwrap();
    let outcome = context.decode(&mut batch);
    assert!(matches!(outcome, Err(ContextError::Blocked { sequence: OTHER, .. })), "{outcome:?}");
    let logits = context.get_logits_ith(cold).to_vec();
    let expected = tiny.unguarded_reference(&told.cold);
    assert!(distance(&logits, &expected.logits[told.cold.prompt.len() - 1]) <= TOLERANCE);
    // Without the blocked one the other goes on.
    context.clear_sequence(OTHER).unwrap();
    step(&mut context, ONLY, told.cold.prompt.len(), told.cold.answer[0]).unwrap();
}

#[test]
fn a_prompt_with_nothing_to_read_fires() {
    let tiny = Tiny::new(Architecture::Llama);
    let guard = tiny.policy().vector(PROBE, 1).gate(gate(PROBE, Aggregate::Last, NEVER, OnFire::Block)).guard();
    let mut context = tiny.guarded(&guard, params());
    let outcome = prefill(&mut context, ONLY, &tiny.tokens("")[..1]);
    assert!(matches!(outcome, Err(ContextError::Blocked { .. })), "{outcome:?}");
    assert_eq!(decision(&context, ONLY), Some(GateDecision { score: None, fired: true }));
}

#[test]
fn a_session_ends_where_its_guard_blocks() {
    for tiny in Tiny::all() {
        let told = told(&tiny, 1, Aggregate::Last);
        let blocks = gate(PROBE, Aggregate::Last, told.threshold, OnFire::Block);
        let guard = tiny.policy().vector(PROBE, 1).gate(blocks).guard();
        let options = SessionOptions { n_ctx: 256, ..Default::default() };
        let mut session = Session::new(&tiny.model, &[&guard], options).unwrap();
        let generation = GenerationOptions { max_tokens: 5, temperature: 0.0, seed: 0, ignore_end: true };
        for (script, fires) in [(&told.hot, true), (&told.cold, false), (&told.hot, true)] {
            let generated = session.generate(&script.prompt, generation, |_| ()).unwrap();
            let expected = if fires { 0 } else { 5 };
            assert_eq!(generated.tokens.len(), expected, "{}", tiny.name());
            let blocked = matches!(&generated.finish, Finish::Blocked(message) if message.contains("not this"));
            assert_eq!(blocked, fires, "{}: {:?}", tiny.name(), generated.finish);
            assert_eq!(generated.gates[0].fired, fires);
            let readings = session.score(&script.prompt).unwrap();
            assert_eq!(readings, generated.gates);
        }
    }
}

/// There llama.cpp keeps only rows with logits, so the rest of the prompt can't be read.
#[test]
fn a_gate_over_the_whole_prompt_is_refused_at_the_last_layer() {
    let tiny = Tiny::all().next().unwrap();
    for (aggregate, refused) in [(Aggregate::Last, false), (Aggregate::Mean, true), (Aggregate::Max, true)] {
        let reads = gate(PROBE, aggregate, NEVER, OnFire::Steer);
        let guard = tiny.policy().vector(PROBE, tiny.last_layer()).gate(reads).guard();
        let shape = tiny.model.shape();
        let compiled = pilotfish::program::Program::compile(&guard, shape, pilotfish::program::Calibration::Required);
        assert_eq!(compiled.is_err(), refused, "{aggregate:?}");
        let _ = compiled.map_err(|error| assert!(error.to_string().contains("last"), "{error}"));
    }
}
