//! What gates read, when they fire, and what follows.

use super::*;
use pilotfish::engine::{Session, SessionOptions};
use pilotfish::program::GateDecision;

on_every_model!(
    scores_are_projections_in_benign_deviations,
    a_gate_reads_a_residual_before_it_is_patched_there,
    a_gate_that_blocks_gives_no_logits_until_its_sequence_is_cleared,
    an_intervention_acts_only_where_its_gate_has_fired,
    sequences_of_one_batch_have_their_own_decisions,
    a_blocked_sequence_leaves_the_others_of_its_batch_their_logits,
    a_prompt_with_nothing_to_read_fires,
    a_session_scores_prompts_that_its_guard_blocks,
    a_gate_over_the_whole_prompt_is_refused_at_the_last_layer,
);

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

/// The score that gate number `gate` must give, from a residual computed in `f64`.
fn expected_score(guard: &Guard, gate: usize, script: &Script, residual: &[Vec<f64>], aggregate: Aggregate) -> f64 {
    let direction = widened(&guard.gates()[gate].direction);
    let norm = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
    let project = |row: &Vec<f64>| row.iter().zip(&direction).map(|(x, v)| x * v / norm).sum::<f64>();
    // Position 0 is an attention sink, which no gate reads.
    let projections: Vec<f64> = residual[1..script.prompt.len()].iter().map(project).collect();
    let aggregate = match aggregate {
        Aggregate::Last => *projections.last().unwrap(),
        Aggregate::Mean => projections.iter().sum::<f64>() / projections.len() as f64,
        Aggregate::Max => projections.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    };
    let calibration = guard.gates()[gate].calibration.unwrap();
    (aggregate - calibration.mean) / calibration.deviation
}

fn scores_are_projections_in_benign_deviations(subject: &Subject) {
    let script = subject.script();
    // One token to read, whose projection is negative along a direction or against it.
    let short = Script { prompt: script.prompt[..2].to_vec(), answer: script.answer.clone() };
    for script in [script, short] {
        let reference = subject.unguarded(&script);
        for layer in 0..LAYERS {
            for aggregate in [Aggregate::Last, Aggregate::Mean, Aggregate::Max] {
                if layer == subject.last_layer() && aggregate != Aggregate::Last {
                    continue; // refused, see below
                }
                let reads = |vector| gate(vector, aggregate, NEVER, OnFire::Steer);
                let policy = subject.policy().vector(PROBE, layer).opposite("against", PROBE);
                let guard = policy.gate(reads(PROBE)).gate(reads("against")).guard();
                let mut context = subject.guarded(&guard, params());
                assert_eq!(decision(&context, ONLY), None, "before any prompt");
                let (residuals, _) = script.run_captured(subject, &mut context);
                let captured: Vec<_> = residuals[layer as usize].iter().map(|row| widened(row)).collect();
                for (index, decision) in context.gate_decisions(ONLY).into_iter().enumerate() {
                    let what = format!("{}, layer {layer}, {aggregate:?}, gate {index}", subject.name());
                    let found = decision.unwrap().score.unwrap();
                    for (residual, tolerance) in [(&captured, 1e-5), (&reference.residuals[layer as usize], 1e-3)] {
                        let expected = expected_score(&guard, index, &script, residual, aggregate);
                        assert!((found - expected).abs() <= tolerance, "{what}: {found}, expected {expected}");
                    }
                }
            }
        }
    }
}

/// A guard reads what the model computed, not what its own interventions made of it.
fn a_gate_reads_a_residual_before_it_is_patched_there(subject: &Subject) {
    let script = subject.script();
    let policy = || subject.policy().vector(PROBE, 1).gate(gate(PROBE, Aggregate::Mean, NEVER, OnFire::Steer));
    let run = |guard: &Guard| {
        let mut context = subject.guarded(guard, params());
        script.run(&mut context).unwrap();
        decision(&context, ONLY)
    };
    assert_eq!(run(&policy().guard()), run(&policy().intervene(ablate(PROBE, 7.0)).guard()), "{}", subject.name());
}

fn a_gate_that_blocks_gives_no_logits_until_its_sequence_is_cleared(subject: &Subject) {
    let told = told(subject, 1, Aggregate::Mean);
    let blocks = gate(PROBE, Aggregate::Mean, told.threshold, OnFire::Block);
    let guard = subject.policy().vector(PROBE, 1).gate(blocks).guard();
    let mut context = subject.guarded(&guard, params());
    let assert_blocked = |outcome: Result<Vec<f32>, ContextError>| {
        let Err(ContextError::Blocked { guard, sequence, gate, message }) = outcome else {
            panic!("{}: {outcome:?}", subject.name());
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

fn an_intervention_acts_only_where_its_gate_has_fired(subject: &Subject) {
    let told = told(subject, 1, Aggregate::Mean);
    let unguarded = subject.unguarded(&told.hot);
    // At the gate's own layer and after it the prompt's last token is patched already; before it an intervention may only act on what
    // follows. No token before is patched anywhere, though later layers compute it after the decision.
    for layer in 0..LAYERS {
        let what = format!("{}, layer {layer}", subject.name());
        let positions = if layer >= 1 { Positions::All } else { Positions::Generated };
        let gated = InterventionEntry { when: Some(PROBE.into()), positions, ..add("push") };
        let steers = gate(PROBE, Aggregate::Mean, told.threshold, OnFire::Steer);
        let guard = subject.policy().vector(PROBE, 1).vector("push", layer).gate(steers).intervene(gated).guard();
        let mut context = subject.guarded(&guard, params());

        let cold = told.cold.run(&mut context).unwrap();
        assert!(!decision(&context, ONLY).unwrap().fired, "{what}");
        assert!(bits(&cold) == bits(&told.cold.run_plain(&mut subject.plain(params()))), "{what}: not fired");

        context.clear();
        let hot = told.hot.run_captured(subject, &mut context);
        assert!(decision(&context, ONLY).unwrap().fired, "{what}");
        let open = |_: &Guard, layer, position| {
            let kind = told.hot.kind(position);
            vec![kind == RowKind::Generated || kind == RowKind::PromptEnd && layer >= 1]
        };
        subject.expected(&[&guard], &told.hot, open).assert_is(&what, &hot);
        let changed = distance(hot.1.last().unwrap(), unguarded.logits.last().unwrap());
        assert!(changed > 100.0 * TOLERANCE, "{what}: logits change by {changed:.1e}");
    }
}

/// Prompts of two sequences in one batch, and then a token of each.
fn sequences_of_one_batch_have_their_own_decisions(subject: &Subject) {
    let told = told(subject, 1, Aggregate::Last);
    let gated = InterventionEntry { when: Some(PROBE.into()), positions: Positions::Generated, ..add("push") };
    let steers = gate(PROBE, Aggregate::Last, told.threshold, OnFire::Steer);
    let guard = subject.policy().vector(PROBE, 1).vector("push", 2).gate(steers).intervene(gated).guard();
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
    let mut unguarded = subject.programmed(&subject.observer(), params_for_two());
    let mut context = subject.guarded(&guard, params_for_two());
    for (first, second, hot) in [(&told.hot, &told.cold, 0), (&told.cold, &told.hot, 1)] {
        context.clear();
        unguarded.clear();
        let (guarded, plain) = (pair(&mut context, first, second), pair(&mut unguarded, first, second));
        let fired = [ONLY, OTHER].map(|sequence| decision(&context, sequence).unwrap().fired);
        assert_eq!(fired, [hot == 0, hot == 1], "{}", subject.name());
        for (index, (guarded, plain)) in guarded.iter().zip(&plain).enumerate() {
            assert_eq!(guarded != plain, index % 2 == hot, "{}: logits {index}", subject.name());
        }
    }
}

fn a_blocked_sequence_leaves_the_others_of_its_batch_their_logits(subject: &Subject) {
    let told = told(subject, 1, Aggregate::Last);
    let guard =
        subject.policy().vector(PROBE, 1).gate(gate(PROBE, Aggregate::Last, told.threshold, OnFire::Block)).guard();
    let mut context = subject.guarded(&guard, params_for_two());
    let mut batch = GuardedBatch::new(128);
    let cold = batch.add_prompt(ONLY, TokenPosition(0), &told.cold.prompt).unwrap();
    batch.add_prompt(OTHER, TokenPosition(0), &told.hot.prompt).unwrap();
    let outcome = context.decode(&mut batch);
    assert!(matches!(outcome, Err(ContextError::Blocked { sequence: OTHER, .. })), "{outcome:?}");
    let mut unguarded = subject.programmed(&subject.observer(), params_for_two());
    unguarded.decode(&mut batch).unwrap();
    assert!(context.get_logits_ith(cold) == unguarded.get_logits_ith(cold), "{}", subject.name());
    // Without the blocked one the other goes on.
    context.clear_sequence(OTHER).unwrap();
    step(&mut context, ONLY, told.cold.prompt.len(), told.cold.answer[0]).unwrap();
}

fn a_prompt_with_nothing_to_read_fires(subject: &Subject) {
    let guard = subject.policy().vector(PROBE, 1).gate(gate(PROBE, Aggregate::Last, NEVER, OnFire::Block)).guard();
    let mut context = subject.guarded(&guard, params());
    let outcome = prefill(&mut context, ONLY, &subject.script().prompt[..1]);
    assert!(matches!(outcome, Err(ContextError::Blocked { .. })), "{outcome:?}");
    assert_eq!(decision(&context, ONLY), Some(GateDecision { score: None, fired: true }));
}

fn a_session_scores_prompts_that_its_guard_blocks(subject: &Subject) {
    let told = told(subject, 1, Aggregate::Last);
    let blocks = gate(PROBE, Aggregate::Last, told.threshold, OnFire::Block);
    let guard = subject.policy().vector(PROBE, 1).gate(blocks).guard();
    let options = SessionOptions { n_ctx: 256, ..Default::default() };
    let mut session = Session::new(&subject.model, &[&guard], options).unwrap();
    for (script, fires) in [(&told.hot, true), (&told.cold, false), (&told.hot, true)] {
        let outcome = session.prefill(&script.prompt);
        let blocked = outcome.err().is_some_and(|error| error.to_string().contains("not this"));
        assert_eq!(blocked, fires, "{}", subject.name());
        assert_eq!(session.score(&script.prompt).unwrap()[0].fired, fires, "{}", subject.name());
    }
}

/// There llama.cpp keeps only rows with logits, so the rest of the prompt can't be read.
fn a_gate_over_the_whole_prompt_is_refused_at_the_last_layer(subject: &Subject) {
    for (aggregate, refused) in [(Aggregate::Last, false), (Aggregate::Mean, true), (Aggregate::Max, true)] {
        let reads = gate(PROBE, aggregate, NEVER, OnFire::Steer);
        let guard = subject.policy().vector(PROBE, subject.last_layer()).gate(reads).guard();
        let shape = subject.model.shape();
        let compiled = pilotfish::program::Program::compile(&guard, shape, pilotfish::program::Calibration::Required);
        assert_eq!(compiled.is_err(), refused, "{aggregate:?}");
        let _ = compiled.map_err(|error| assert!(error.to_string().contains("last"), "{error}"));
    }
}
