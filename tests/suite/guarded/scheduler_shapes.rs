//! The scheduler on any model, quantized ones too, which compute a row by another kernel in a batch of another size: two runs are compared whose
//! batches have the same shapes.

use super::scheduler::{Calls, OPTIONS, Seen, prefixes};
use super::sequences::{requests, stacked};
use super::*;
use pilotfish::engine::Sampling;
use pilotfish::engine::scheduler::{End, Request, SchedulerOptions};

on_every_model!(
    requests_are_answered_as_beside_others,
    one_that_is_blocked_or_fails_leaves_the_others,
    a_swapped_program_is_for_requests_to_come,
    a_conversation_is_answered_as_if_read_anew,
);

/// A request whose answer has `n_tokens` tokens, whatever they are.
fn request(subject: &Subject, prompt: Vec<LlamaToken>, n_tokens: usize, program: &Arc<Program>) -> Request {
    let vocab = subject.model.llama().vocab();
    let ends = (0..subject.model.llama().n_vocab()).map(LlamaToken).filter(|token| vocab.is_eog(*token));
    let sampling = Sampling { logit_bias: ends.map(|token| (token, -1e9)).collect(), ..Default::default() };
    Request { program: Some(Arc::clone(program)), sampling, ..Request::new(prompt, n_tokens) }
}

/// Answers `requests`, a step between two that are submitted.
fn answer(subject: &Subject, requests: &[Request], options: SchedulerOptions) -> Vec<Seen> {
    let mut calls = Calls::new(subject, options);
    let submit = |request: &Request| {
        let id = calls.scheduler.submit(request.clone()).unwrap();
        calls.step();
        id
    };
    let ids: Vec<_> = requests.iter().map(submit).collect();
    calls.finish();
    ids.iter().map(|id| calls.seen.remove(id).unwrap()).collect()
}

/// Each request has the same answer when the others read other text, as long as theirs, under no guard.
fn requests_are_answered_as_beside_others(subject: &Subject) {
    let observer = subject.observer();
    let asked = requests(subject);
    let n_tokens = |index| 2 + index % 3;
    for (n_sequences, n_batch) in [(3, 5), (8, 9)] {
        let options = SchedulerOptions { n_sequences, n_batch, reuse_prefixes: false, ..OPTIONS };
        let run = |is_own: &dyn Fn(usize) -> bool| {
            let each = asked.iter().enumerate().map(|(index, asked)| {
                let asked = if is_own(index) { asked.clone() } else { asked.filler(&observer) };
                request(subject, asked.prompt, n_tokens(index), &asked.program)
            });
            answer(subject, &each.collect::<Vec<_>>(), options)
        };
        let found = run(&|_| true);
        for half in [0, 1] {
            let expected = run(&|index| index % 2 == half);
            for index in (half..asked.len()).step_by(2) {
                let what = format!("{}: {n_sequences} at once, {n_batch} rows: request {index}", subject.name());
                assert_eq!(found[index].told(), expected[index].told(), "{what}");
                assert!(matches!(found[index].end(), End::Length), "{what}: {:?}", found[index]);
                assert_eq!(found[index].summary.as_ref().unwrap().tokens, n_tokens(index), "{what}");
            }
        }
    }
}

fn one_that_is_blocked_or_fails_leaves_the_others(subject: &Subject) {
    let observer = subject.observer();
    let gated = |on_fire| {
        let policy = subject.policy().vector("g", 1).gate(gate("g", Aggregate::Last, -NEVER, on_fire));
        stacked(subject, &[&policy.guard()])
    };
    // Each fits in `f32`, both do not.
    let push = || InterventionEntry { strength: 3e38 / f64::from(subject.size(1)), ..add("v") };
    let overflows = subject.policy().vector("v", 1).intervene(push()).intervene(called("again", push()));
    let prompt = subject.script().prompt;
    let sane = || request(subject, prompt.clone(), 5, &observer);
    // One that is asked for no token leaves where the others are ended.
    let leaves = || Request { max_tokens: 0, ..sane() };
    let under = |program: &Arc<Program>| Request { program: Some(Arc::clone(program)), ..sane() };
    let spoilt = [under(&gated(OnFire::Block)), under(&stacked(subject, &[&overflows.guard()]))];
    let [blocked, failed] = spoilt;
    // As many as there are sequences, then as many more in their places.
    let options = SchedulerOptions { n_sequences: 4, reuse_prefixes: false, ..OPTIONS };
    let requests = [sane(), blocked, failed, under(&gated(OnFire::Steer)), sane(), sane()];
    let expected = answer(subject, &[sane(), leaves(), leaves(), sane(), sane(), sane()], options);
    let found = answer(subject, &requests, options);
    for index in [0, 3, 4, 5] {
        assert_eq!(found[index].text, expected[index].text, "{}: request {index}", subject.name());
        assert!(matches!(found[index].end(), End::Length), "{}: {:?}", subject.name(), found[index]);
    }
    assert!(found[3].summary.as_ref().unwrap().gates[0].fired);
    assert!(matches!(found[1].end(), End::Blocked(block) if block.to_string().contains("not this")), "{:?}", found[1]);
    assert!(matches!(found[2].end(), End::Failed(ContextError::Fault { .. })), "{:?}", found[2]);
    assert!(found[1].text.is_empty() && found[2].text.is_empty());
}

fn a_swapped_program_is_for_requests_to_come(subject: &Subject) {
    let program = |name, strength| {
        let entry = InterventionEntry { strength, ..add("v") };
        let policy = subject.policy().vector("v", 1).vector(name, 0).intervene(entry);
        stacked(subject, &[&policy.gate(gate(name, Aggregate::Last, NEVER, OnFire::Steer)).guard()])
    };
    let (old, new) = (program("old", 3.0), program("new", -3.0));
    let options = SchedulerOptions { reuse_prefixes: false, ..OPTIONS };
    let run = |swap: bool| {
        let own = |program| Request {
            program: (!swap).then(|| Arc::clone(program)),
            ..request(subject, subject.script().prompt, 5, program)
        };
        let mut calls = Calls::under(subject, &old, options);
        let first = calls.scheduler.submit(own(&old)).unwrap();
        calls.step();
        // One that waits when the program is swapped keeps the one it was submitted under.
        let waits = calls.scheduler.submit(own(&old)).unwrap();
        if swap {
            calls.scheduler.set_program(Arc::clone(&new)).unwrap();
        }
        let second = calls.scheduler.submit(own(&new)).unwrap();
        calls.finish();
        [first, waits, second].map(|id| calls.seen.remove(&id).unwrap())
    };
    let (found, expected) = (run(true), run(false));
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found.told(), expected.told(), "{}", subject.name());
    }
    let by = found.each_ref().map(|seen| seen.summary.as_ref().unwrap().gates[0].gate.as_str());
    assert_eq!(by, ["old", "old", "new"], "{}", subject.name());
}

/// One token a batch, so that what is read again has the shape of what was read before.
fn a_conversation_is_answered_as_if_read_anew(subject: &Subject) {
    for (what, policy, reuse) in prefixes::CASES {
        if subject.is_quantized() && !["gates that read", "an addition everywhere", "a gate that opens"].contains(what)
        {
            continue;
        }
        let what = format!("{}: {what}", subject.name());
        let program = stacked(subject, &[&policy(subject.policy()).guard()]);
        let options = |reuse_prefixes| SchedulerOptions { n_sequences: 1, n_batch: 1, reuse_prefixes, ..OPTIONS };
        let mut with = Calls::new(subject, options(true));
        let mut said: Vec<LlamaToken> = Vec::new();
        let mut before = 0;
        for (turn, text) in prefixes::TURNS.into_iter().enumerate() {
            let what = format!("{what}, turn {turn}");
            said.extend(if said.is_empty() { subject.tokens(text) } else { subject.more_tokens(text) });
            let asked = request(subject, said.clone(), 5, &program);
            let anew = Calls::new(subject, options(false)).answer(asked.clone());
            let seen = with.answer(asked);
            assert_eq!(seen.told(), anew.told(), "{what}");
            for (found, expected) in prefixes::scores(&seen).iter().zip(prefixes::scores(&anew)) {
                let apart = (found - expected).abs();
                assert!(apart <= 1e-2 * (1.0 + expected.abs()), "{what}: {found} and {expected}");
            }
            let reused = seen.summary.as_ref().unwrap().reused_tokens;
            match reuse {
                _ if turn == 0 => assert_eq!(reused, 0, "{what}"),
                // The last token of the turn before was its prompt's end.
                prefixes::Reuse::Prompt => assert_eq!(reused, before - 1, "{what}"),
                prefixes::Reuse::All => assert!(reused >= before, "{what}: {reused}"),
            }
            before = said.len();
            said.extend(subject.more_tokens(&seen.text));
        }
    }
}
