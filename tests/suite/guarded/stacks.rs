//! Gates of each token, rules over gates, and several guards at once.

use super::*;
use pilotfish::guard::Rule;
use pilotfish::program::{Calibration, CompileError, ToggleError};

on_every_model!(
    a_token_gate_opens_and_closes_as_the_reference_says,
    a_token_gate_reads_the_positions_that_it_says,
    a_token_gate_that_blocks_ends_the_sequence_in_the_middle_of_its_answer,
    a_rule_acts_where_its_gates_say,
    guards_of_a_stack_act_in_the_order_given,
);

/// The score of a row at the layer of `guard`'s gate number `gate`, by `f64`.
fn score(guard: &Guard, gate: usize, row: &[f64]) -> f64 {
    let gate = &guard.gates()[gate];
    let (mut along, mut square) = (0.0, 0.0);
    for (v, x) in gate.direction.iter().zip(row) {
        along += f64::from(*v) * x;
        square += f64::from(*v) * f64::from(*v);
    }
    let calibration = gate.calibration.unwrap();
    (along / square.sqrt() - calibration.mean) / calibration.deviation
}

/// Scores of every token of `script` but the first, at `layer`, with no guard.
fn scores(subject: &Subject, guard: &Guard, script: &Script, layer: u32) -> Vec<f64> {
    let trace = subject.unguarded(script);
    trace.residuals[layer as usize][1..].iter().map(|row| score(guard, 0, row)).collect()
}

fn a_token_gate_opens_and_closes_as_the_reference_says(subject: &Subject) {
    let script = subject.script();
    let policy = |threshold, release| {
        let gated = InterventionEntry { when: Some("t".into()), ..add("push") };
        let gate = token_gate("t", threshold, release);
        subject.policy().vector("t", 1).vector("push", 2).gate(gate).intervene(gated).guard()
    };
    let read = scores(subject, &policy(0.0, None), &script, 1);
    let mut sorted = read.clone();
    sorted.sort_by(f64::total_cmp);
    let between = |share: f64| {
        let index = (sorted.len() as f64 * share) as usize;
        (sorted[index - 1] + sorted[index]) / 2.0
    };
    let (threshold, release) = (between(0.7), between(0.3));
    let mut runs = Vec::new();
    for release in [None, Some(release)] {
        let guard = policy(threshold, release);
        // Positions at which the gate is open.
        let mut open = vec![false];
        for score in &read {
            let stays = open[open.len() - 1] && *score >= release.unwrap_or(threshold);
            open.push(stays || *score >= threshold);
        }
        let what = format!("{}, release {release:?}, open {open:?}", subject.name());
        assert!(open.contains(&true) && open[1..].contains(&false), "{what}");
        let mut context = subject.guarded(&guard, params());
        let found = script.run_captured(subject, &mut context);
        subject.expected(&[&guard], &script, |_, _, position| vec![open[position]]).assert_is(&what, &found);
        // What is told of it is the highest score, and that it was open.
        let decision = context.gate_decisions(ONLY)[0].unwrap();
        assert!(decision.fired && (decision.score.unwrap() - sorted[sorted.len() - 1]).abs() < 1e-3, "{what}");
        runs.push(open);
    }
    assert_ne!(runs[0], runs[1], "{}: the release makes a difference", subject.name());
}

fn a_token_gate_reads_the_positions_that_it_says(subject: &Subject) {
    let script = subject.script();
    for (positions, range) in [
        (Positions::All, 1..script.tokens().len()),
        (Positions::Prompt, 1..script.prompt.len()),
        (Positions::Generated, script.prompt.len() - 1..script.tokens().len()),
    ] {
        let entry = GateEntry { positions: Some(positions.clone()), ..token_gate("t", NEVER, None) };
        let guard = subject.policy().vector("t", 1).gate(entry).guard();
        let mut context = subject.guarded(&guard, params());
        script.run(&mut context).unwrap();
        let scores = scores(subject, &guard, &script, 1);
        let highest = scores[range.start - 1..range.end - 1].iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let found = context.gate_decisions(ONLY)[0].unwrap();
        assert!((found.score.unwrap() - highest).abs() < 1e-3 && !found.fired, "{positions:?}: {found:?}, {highest}");
    }
}

fn a_token_gate_that_blocks_ends_the_sequence_in_the_middle_of_its_answer(subject: &Subject) {
    let script = subject.script();
    let policy = |vector, threshold| {
        let entry = GateEntry {
            positions: Some(Positions::Generated),
            on_fire: OnFire::Block,
            ..token_gate(vector, threshold, None)
        };
        subject.policy().vector("t", 1).opposite("against", "t").gate(entry).guard()
    };
    // The first token whose score is above all before it, along a direction or against it.
    let rising = |vector| {
        let answer = scores(subject, &policy(vector, NEVER), &script, 1).split_off(script.prompt.len() - 2);
        let at = (1..answer.len()).find(|at| answer[..*at].iter().all(|score| *score < answer[*at]))?;
        let before = answer[..at].iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Some((at, policy(vector, (before + answer[at]) / 2.0)))
    };
    let (at, guard) = rising("t").or_else(|| rising("against")).unwrap();
    let mut context = subject.guarded(&guard, params());
    prefill(&mut context, ONLY, &script.prompt).unwrap();
    for (offset, token) in script.answer.iter().enumerate().take(at) {
        let outcome = step(&mut context, ONLY, script.prompt.len() + offset, *token);
        assert_eq!(outcome.is_err(), offset + 1 == at, "token {offset}: {outcome:?}");
        if let Err(error) = outcome {
            assert!(matches!(error, ContextError::Blocked { .. }), "{error}");
        }
    }
}

fn a_rule_acts_where_its_gates_say(subject: &Subject) {
    let script = subject.script();
    let plain = subject.unguarded(&script);
    for (rule, table) in [
        ("a and b", [false, false, false, true]),
        ("a or b", [false, true, true, true]),
        ("a and not b", [false, false, true, false]),
        ("not (a or b)", [true, false, false, false]),
        ("not a and not b or a and b", [true, false, false, true]),
    ] {
        for (index, acts) in table.into_iter().enumerate() {
            let fires = |bit: usize| if index & bit > 0 { -NEVER } else { NEVER };
            let gated = InterventionEntry { when: Some(rule.into()), ..add("push") };
            let guard = subject
                .policy()
                .vector("a", 0)
                .vector("b", 1)
                .vector("push", 1)
                .gate(gate("a", Aggregate::Last, fires(2), OnFire::Steer))
                .gate(gate("b", Aggregate::Mean, fires(1), OnFire::Steer))
                .intervene(gated)
                .guard();
            let found = script.run_captured(subject, &mut subject.guarded(&guard, params()));
            // Until its gates have decided a rule does not act, whatever it is of them.
            let gates = vec![fires(2) < 0.0, fires(1) < 0.0];
            let open = |guard: &Guard, _, position| match script.kind(position) {
                RowKind::Prompt => dormant(&guard.interventions()[0].when),
                _ => gates.clone(),
            };
            let what = format!("{}: `{rule}` of {gates:?}", subject.name());
            subject.expected(&[&guard], &script, open).assert_is(&what, &found);
            let changed = distance(found.1.last().unwrap(), plain.logits.last().unwrap());
            assert_eq!(changed > 100.0 * TOLERANCE, acts, "{what}: logits change by {changed:.1e}");
        }
    }
}

/// Gates for which the rule does not act.
fn dormant(rule: &Option<Rule>) -> Vec<bool> {
    let acts = |gates: &Vec<bool>| {
        let gate = |index: usize| pilotfish::guard::Truth::from(gates[index]);
        rule.as_ref().unwrap().eval(&gate) == pilotfish::guard::Truth::True
    };
    let all = [[false, false], [false, true], [true, false], [true, true]];
    all.into_iter().map(Vec::from).find(|gates| !acts(gates)).unwrap()
}

fn guards_of_a_stack_act_in_the_order_given(subject: &Subject) {
    let script = subject.script();
    let first = subject.policy().named("first").vector("v", 1).vector("w", 2).intervene(add("v")).guard();
    let entry = InterventionEntry { when: Some("g".into()), ..called("back", ablate("v", 3.0)) };
    let second = subject.policy().named("second").vector("v", 1).vector("g", 1);
    let second = second.gate(gate("g", Aggregate::Mean, -NEVER, OnFire::Steer)).intervene(entry).guard();
    for order in [[&first, &second], [&second, &first]] {
        let mut context = subject.stacked(&order, params());
        let names: Vec<_> = context.program().gates().iter().map(|gate| gate.name.as_str()).collect();
        assert_eq!(names, ["second/g"]);
        assert_eq!(context.program().name(), format!("{} + {}", order[0].name(), order[1].name()));
        let found = script.run_captured(subject, &mut context);
        let open = |guard: &Guard, _, position| vec![script.kind(position) != RowKind::Prompt; guard.gates().len()];
        subject.expected(&order, &script, open).assert_is(subject.name(), &found);
    }
}

#[test]
fn what_contradicts_itself_does_not_compile() {
    let tiny = Tiny::new(Architecture::Llama);
    let compiled = |guards: &[&Guard]| Program::stack(guards, tiny.model.shape(), Calibration::Required);
    let gated = |positions| InterventionEntry { when: Some("g".into()), positions, ..add("v") };
    let early = |entry: GateEntry, positions| {
        tiny.policy().vector("g", 2).vector("v", 1).gate(entry).intervene(gated(positions)).guard()
    };
    let of_prompt = || gate("g", Aggregate::Mean, 0.0, OnFire::Steer);
    let of_token = || token_gate("g", 0.0, None);
    for guard in [
        early(of_prompt(), Positions::All),
        early(of_prompt(), Positions::Prompt),
        early(of_token(), Positions::All),
        early(of_token(), Positions::Generated),
    ] {
        let error = compiled(&[&guard]).unwrap_err();
        let what = "intervention `v` acts at layer 1, before gate `g` is read at layer 2";
        assert!(matches!(error, CompileError::BeforeGate { .. }) && error.to_string().contains(what), "{error}");
    }
    // By then the prompt has been read.
    compiled(&[&early(of_prompt(), Positions::Generated)]).unwrap();

    let policy = || tiny.policy().map("m", 1, MappingKind::Affine).map("n", 1, MappingKind::Autoencoder);
    let error = compiled(&[&policy().intervene(switch("m")).intervene(switch("n")).guard()]).unwrap_err();
    let [one, other] = ["m", "n"].map(|name| {
        let kind = if name == "m" { MappingKind::Affine } else { MappingKind::Autoencoder };
        tiny.policy().named(name).map(name, 1, kind).intervene(switch(name)).guard()
    });
    let stack = compiled(&[&one, &other]).unwrap_err();
    for error in [error, stack] {
        let two_switches =
            matches!(error, CompileError::Strengths(ToggleError::TwoSwitches { layer: LayerIndex(1), .. }));
        assert!(two_switches, "{error}");
    }
    let error = compiled(&[&one, &one]).unwrap_err();
    assert!(matches!(error, CompileError::SameGuard { .. }), "{error}");
    // One text counts once, whoever looks for it.
    let looking = |name: &str, n: usize| {
        let mut policy = tiny.policy().named(name).vector("v", 1);
        for index in 0..2 * n {
            let positions = Positions::Matching(format!("text {}", index / 2));
            policy = policy.intervene(InterventionEntry { positions, ..called(&format!("add-{index}"), add("v")) });
        }
        policy.guard()
    };
    let both = compiled(&[&looking("first", 64), &looking("second", 3)]).unwrap();
    assert_eq!((both.texts().len(), &*both.texts()[63]), (64, &b"text 63"[..]));
    let error = compiled(&[&looking("first", 65)]).unwrap_err();
    assert!(error.to_string().contains("64 different texts"), "{error}");
    // At the last layer llama.cpp has only tokens with logits, so a gate on each token would miss some.
    let last = tiny.last_layer();
    let guard = tiny.policy().vector("g", last).gate(of_token()).guard();
    let error = compiled(&[&guard]).unwrap_err();
    assert!(matches!(error, CompileError::LastLayer { .. }), "{error}");
}
