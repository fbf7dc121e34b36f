//! Interventions turned on and off while a sequence runs.

use super::patches::CASES;
use super::scheduler::{Calls, OPTIONS};
use super::sequences::stacked;
use super::*;
use crate::counting_allocator::allocations;
use pilotfish::engine::scheduler::{End, Request, SchedulerOptions, Toggle};
use pilotfish::engine::{EngineError, Session, SessionOptions};
use pilotfish::hook::ExecutorKind;
use pilotfish::program::{Setting, ToggleError};
use std::time::Instant;

on_every_model!(
    what_is_turned_on_is_what_is_loaded_and_what_is_off_is_nothing,
    a_toggle_is_for_the_next_token_and_nothing_before,
    each_sequence_has_its_own_toggles,
);

fn names(guard: &Guard) -> Vec<(String, f32)> {
    guard.interventions().iter().map(|of| (of.name.clone(), of.strength)).collect()
}

/// `guard` with each intervention at `factor` of its strength.
fn at(guard: &Guard, factor: f64) -> Guard {
    let scaled =
        |guard: Guard, (name, strength): &(String, f32)| guard.with_strength(name, factor * f64::from(*strength));
    names(guard).iter().fold(guard.clone(), |guard, of| scaled(guard, of).unwrap())
}

/// Of every kind of intervention, alone and fused with its neighbours, by every executor: on is the guard loaded at that strength, bit for bit,
/// and off is no guard.
fn what_is_turned_on_is_what_is_loaded_and_what_is_off_is_nothing(subject: &Subject) {
    let script = subject.script();
    let plain = bits(&script.run_plain(&mut subject.plain(params())));
    // A real model takes its time: what is fused and what is not.
    let cases = CASES.iter().filter(|case| !subject.is_quantized() || case.what.starts_with("everything"));
    for case in cases {
        let guard = (case.policy)(subject.policy()).guard();
        for kind in [ExecutorKind::Host, ExecutorKind::Device] {
            let what = format!("{}, {}, {kind}", subject.name(), case.what);
            let run = |context: &mut GuardedContext| {
                context.clear();
                bits(&script.run(context).unwrap())
            };
            let loaded = |guard: &Guard| {
                let mut context = subject.guarded(guard, params());
                context.set_executor(kind);
                run(&mut context)
            };
            let (full, half) = (loaded(&guard), loaded(&at(&guard, 0.5)));
            assert!(full != plain && half != plain && full != half, "{what}: the guard does something");
            let mut context = subject.guarded(&at(&guard, 0.0), params());
            context.set_executor(kind);
            let set = |context: &mut GuardedContext, setting: &dyn Fn(f32) -> Setting| {
                for (name, strength) in names(&guard) {
                    context.set_intervention(&name, setting(strength)).unwrap();
                }
            };
            assert!(run(&mut context) == plain, "{what}: loaded off");
            set(&mut context, &Setting::Strength);
            assert!(run(&mut context) == full, "{what}: on");
            set(&mut context, &|_| Setting::Off);
            assert!(run(&mut context) == plain, "{what}: off again");
            set(&mut context, &|strength| Setting::Strength(0.5 * strength));
            assert!(run(&mut context) == half, "{what}: half");
            let mut context = subject.guarded(&guard, params());
            context.set_executor(kind);
            set(&mut context, &|_| Setting::Off);
            assert!(run(&mut context) == plain, "{what}: off");
            set(&mut context, &|_| Setting::On);
            assert!(run(&mut context) == full, "{what}: on is the strength that was loaded");
        }
    }
}

/// A switch at two layers, and an `add` that a neighbour is fused with.
fn switched(subject: &Subject) -> Guard {
    let policy = subject.policy().vector("v", 1).vector("w", 1);
    let policy = policy.map("m", 1, MappingKind::Affine).map("n", 2, MappingKind::Autoencoder);
    let policy = policy.intervene(add("v")).intervene(ablate("w", 1.0));
    let policy = policy.intervene(called("base.1", switch("m"))).intervene(called("base.2", switch("n")));
    policy.guard()
}

/// Runs a script, with `before` told the context before each decode, by number.
fn run_told(
    script: &Script,
    context: &mut GuardedContext,
    before: impl Fn(&mut GuardedContext, usize),
) -> Vec<Vec<f32>> {
    let mut logits = Vec::new();
    for (index, rows) in script.decodes().into_iter().enumerate() {
        before(context, index);
        let mut batch = GuardedBatch::new(rows.len());
        for (token, row) in &rows {
            batch.add(*token, *row).unwrap();
        }
        context.decode(&mut batch).unwrap();
        logits.extend((0..rows.len()).map(|index| context.get_logits_ith(index as i32).to_vec()));
    }
    logits
}

fn a_toggle_is_for_the_next_token_and_nothing_before(subject: &Subject) {
    let (script, guard) = (subject.script(), switched(subject));
    let n_prompt = script.prompt.len();
    let group = |context: &mut GuardedContext, setting| context.set_intervention("base", setting).unwrap();
    let all_on = script.run(&mut subject.guarded(&guard, params())).unwrap();
    // Decode 0 is the prompt, decode `n` the answer's token `n`.
    let at_decode = 2;
    let found = run_told(&script, &mut subject.guarded(&guard, params()), |context, decode| {
        if decode == at_decode {
            group(context, Setting::Off);
        }
    });
    let first = n_prompt + at_decode - 1;
    assert!(bits(&found[..first]) == bits(&all_on[..first]), "{}: what came before is as it was", subject.name());
    let moved = distance(&found[first], &widened(&all_on[first]));
    assert!(moved > 10.0 * TOLERANCE, "{}: the next token is another by {moved:.1e}", subject.name());
    // What follows is that of a guard without the switch, given the cells that there are.
    let off = ["base.1", "base.2"].iter().fold(guard.clone(), |guard, name| guard.with_strength(name, 0.0).unwrap());
    if let Some(tiny) = subject.known() {
        let acting = |position: usize| if position < first { &guard } else { &off };
        let trace = ReferenceModel::new(tiny).run(&script.tokens(), |layer, position, row| {
            let (at, kind) = (TokenPosition(position as i32), script.kind(position));
            reference::apply(acting(position), subject.layer(layer), at, kind, &[], &|_| false, row);
        });
        for (position, (found, expected)) in found.iter().zip(&trace.logits).enumerate() {
            let off = distance(found, expected);
            assert!(off <= TOLERANCE, "{}, position {position}: off by {off:.1e}", subject.name());
        }
    }
    // On and off before any token has come is nothing.
    let twice = run_told(&script, &mut subject.guarded(&guard, params()), |context, decode| {
        if decode == at_decode {
            group(context, Setting::Off);
            group(context, Setting::On);
        }
    });
    assert!(bits(&twice) == bits(&all_on), "{}", subject.name());
}

fn each_sequence_has_its_own_toggles(subject: &Subject) {
    let guard = switched(subject);
    let off = ["base.1", "base.2"].iter().fold(guard.clone(), |guard, name| guard.with_strength(name, 0.0).unwrap());
    let script = subject.script();
    let mut context = subject.guarded(&guard, params_for_two());
    // The second begins so.
    context.set_intervention_of(OTHER, "base", Setting::Off).unwrap();
    let mut batch = GuardedBatch::new(128);
    let rows = [ONLY, OTHER].map(|sequence| batch.add_prompt(sequence, TokenPosition(0), &script.prompt).unwrap());
    context.decode(&mut batch).unwrap();
    let found = rows.map(|row| context.get_logits_ith(row).to_vec());
    for (found, guard) in found.iter().zip([&guard, &off]) {
        let expected = prefill(&mut subject.guarded(guard, params_for_two()), ONLY, &script.prompt).unwrap();
        let apart = distance(found, &widened(&expected));
        assert!(apart <= subject.tolerance(), "{}: off by {apart:.1e}", subject.name());
    }
    let apart = distance(&found[0], &widened(&found[1]));
    assert!(apart > subject.tolerance(), "{}: the two differ by {apart:.1e}", subject.name());
    // All of them: those that live and those to come.
    context.set_intervention("base", Setting::Off).unwrap();
    let strengths = |program: &Program| program.interventions().map(|(_, at)| at).collect::<Vec<_>>();
    for sequence in [ONLY, OTHER] {
        assert_eq!(strengths(context.program_of(sequence).unwrap()), [1.0, 1.0, 0.0, 0.0]);
    }
    assert_eq!(strengths(context.program()), [1.0, 1.0, 0.0, 0.0]);
    let wrong = context.set_intervention("bas", Setting::Off).unwrap_err();
    assert!(matches!(&wrong, ContextError::Toggle(ToggleError::Unknown { known, .. }) if known.len() == 4), "{wrong}");
}

#[test]
fn what_would_be_wrong_to_load_is_wrong_to_set() {
    let tiny = Tiny::new(Architecture::Llama);
    let policy = tiny.policy().vector("v", 0).map("m", 1, MappingKind::Affine);
    let off = InterventionEntry { strength: 0.0, ..called("second", switch("m")) };
    let guard = policy.intervene(add("v")).intervene(switch("m")).intervene(off).guard();
    let mut context = tiny.guarded(&guard, params());
    let before = Arc::clone(context.program());
    let error = context.set_intervention("second", Setting::On).unwrap_err();
    assert!(matches!(error, ContextError::Toggle(ToggleError::TwoSwitches { .. })), "{error}");
    let error = context.set_intervention("v", Setting::Strength(f32::INFINITY)).unwrap_err();
    assert!(matches!(error, ContextError::Toggle(ToggleError::Strength { .. })), "{error}");
    let error = context.set_intervention("v", Setting::Strength(f32::NAN)).unwrap_err();
    assert!(matches!(error, ContextError::Toggle(ToggleError::Strength { .. })), "{error}");
    assert!(Arc::ptr_eq(context.program(), &before), "nothing has changed");
    context.set_intervention("m", Setting::Off).unwrap();
    context.set_intervention("second", Setting::On).unwrap();
    let mut session = Session::new(&tiny.model, &[], SessionOptions::default()).unwrap();
    let error = session.set_intervention("v", Setting::Off).unwrap_err();
    assert!(matches!(error, EngineError::Context(ContextError::Toggle(ToggleError::Unknown { .. }))), "{error}");
}

/// In a stack interventions go by their guards' names too.
#[test]
fn a_stack_says_whose_intervention_it_is() {
    let tiny = Tiny::new(Architecture::Llama);
    let guards = ["a", "b"].map(|name| tiny.policy().named(name).vector("v", 1).intervene(add("v")).guard());
    let mut context = tiny.stacked(&[&guards[0], &guards[1]], params());
    assert!(context.set_intervention("v", Setting::Off).is_err());
    context.set_intervention("b/v", Setting::Off).unwrap();
    let script = tiny.script();
    let alone = script.run(&mut tiny.guarded(&guards[0], params())).unwrap();
    assert!(bits(&script.run(&mut context).unwrap()) == bits(&alone));
}

#[test]
fn cells_of_another_setting_are_not_used_again() {
    let tiny = Tiny::new(Architecture::Llama);
    let tokens = tiny.script().prompt;
    let n = tokens.len();
    let answers = InterventionEntry { positions: Positions::Generated, ..called("answers", add("w")) };
    let policy = tiny.policy().vector("v", 1).vector("w", 2).intervene(add("v")).intervene(answers);
    let guard = policy.guard();
    let read = || {
        let mut context = tiny.guarded(&guard, params_for_two());
        let mut batch = GuardedBatch::new(n);
        batch.add_prompt(ONLY, TokenPosition(0), &tokens).unwrap();
        context.decode(&mut batch).unwrap();
        context
    };
    let mut context = read();
    let loaded = Arc::clone(context.program());
    assert_eq!(context.reusable(ONLY, n), n - 1, "all but what an answer is predicted from");
    context.set_intervention("answers", Setting::Off).unwrap();
    assert_eq!(context.reusable(ONLY, n), n - 1, "what acts on answers has left the prompt as it was");
    context.set_intervention("v", Setting::Off).unwrap();
    assert_eq!(context.reusable(ONLY, n), 0);
    assert!(context.resume(ONLY, OTHER, 1).is_err());
    context.set_intervention("v", Setting::On).unwrap();
    context.set_intervention("answers", Setting::On).unwrap();
    assert!(Arc::ptr_eq(context.program(), &loaded), "who sets it back has the same program");
    // Set before the first token, nothing is lost.
    let mut context = read();
    context.clear_sequence(ONLY).unwrap();
    context.set_intervention("v", Setting::Off).unwrap();
    prefill(&mut context, ONLY, &tokens).unwrap();
    context.set_intervention("v", Setting::Off).unwrap();
    assert_eq!(context.reusable(ONLY, n), n - 1);
}

/// A request's own toggles, and those that come from outside at the same token.
#[test]
fn a_request_is_toggled_at_the_token_that_it_says() {
    let tiny = Tiny::new(Architecture::Llama);
    let program = stacked(&tiny, &[&switched(&tiny)]);
    let prompt = tiny.script().prompt;
    let toggle = |from_token, setting| Toggle { name: "base".into(), from_token, setting };
    let request = |toggles: &[Toggle]| Request { toggles: toggles.to_vec(), ..Request::new(prompt.clone(), 12) };
    // A step reads whole prompts.
    let options = SchedulerOptions { n_batch: 256, ..OPTIONS };
    let calls = || Calls::under(&tiny, &program, options);
    let by_request = |toggles: &[Toggle]| calls().answer(request(toggles)).text;
    let (on, off) = (by_request(&[]), by_request(&[toggle(1, Setting::Off)]));
    let midway = by_request(&[toggle(5, Setting::Off)]);
    assert!(on != off && on != midway && off != midway, "{on:?}, {off:?}, {midway:?}");
    assert_eq!(by_request(&[toggle(13, Setting::Off)]), on, "it never comes so far");
    let mut calls = calls();
    let [id, other] = [0, 1].map(|_| calls.scheduler.submit(request(&[])).unwrap());
    // The first step reads the prompts and gives the first tokens, each after it another.
    for _ in 0..4 {
        calls.step();
    }
    assert!(calls.scheduler.set_intervention_of(id, "base", Setting::Off).unwrap());
    calls.finish();
    assert_eq!((&calls.seen[&id].text, &calls.seen[&other].text), (&midway, &on));
    assert!(!calls.scheduler.set_intervention_of(id, "base", Setting::Off).unwrap(), "it has ended");
    // One that waits is set too.
    let id = calls.scheduler.submit(request(&[])).unwrap();
    calls.scheduler.set_intervention("base", Setting::Off).unwrap();
    calls.finish();
    assert_eq!(calls.seen[&id].text, off);
    assert!(matches!(calls.seen[&id].end(), End::Length | End::Stop));
    let unknown = Toggle { name: "whale".into(), ..toggle(9, Setting::Off) };
    assert!(calls.scheduler.submit(request(&[unknown])).is_err());
}

/// Also prints what a toggle takes of its own (`--nocapture`).
#[test]
fn toggles_leave_decodes_without_allocations() {
    let tiny = Tiny::new(Architecture::Llama);
    let guard = switched(&tiny);
    let mut context = tiny.guarded(&guard, params());
    let tokens = tiny.script().tokens();
    prefill(&mut context, ONLY, &tokens[..4]).unwrap();
    let mut batch = GuardedBatch::new(1);
    let (mut allocated, mut longest) = (0, std::time::Duration::ZERO);
    for (step, setting) in (0..60).zip([Setting::Off, Setting::On, Setting::Strength(0.5)].into_iter().cycle()) {
        let began = Instant::now();
        context.set_intervention("base", setting).unwrap();
        longest = longest.max(began.elapsed());
        batch.clear();
        batch.add_generated(ONLY, TokenPosition(4 + step), tokens[step as usize % tokens.len()]).unwrap();
        let before = allocations();
        context.decode(&mut batch).unwrap();
        allocated += if step == 0 { 0 } else { allocations() - before };
    }
    println!("the longest of 60 toggles took {longest:?}");
    assert_eq!(allocated, 0);
}
