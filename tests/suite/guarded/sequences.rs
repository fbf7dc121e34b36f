//! Many sequences in one context: each by its own guards, gates and faults, as if it were alone.

use super::expected::assert_patched;
use super::*;
use pilotfish::hook::{ExecutorKind, HookFault};
use pilotfish::program::{Calibration, RowFault};

const LAYER: u32 = 1;

on_every_model!(
    a_mixed_batch_gives_each_sequence_what_it_has_alone,
    executors_agree_on_a_mixed_batch,
    a_swapped_program_is_for_sequences_to_come,
    a_patch_that_overflows_ends_its_sequence_alone,
);

pub(super) fn stacked(subject: &Subject, guards: &[&Guard]) -> Arc<Program> {
    Arc::new(Program::stack(guards, subject.model.shape(), Calibration::Required).unwrap())
}

fn params_for(n: u32, unified: bool, n_ubatch: u32) -> LlamaContextParams {
    params().with_n_ctx(NonZeroU32::new(128 * n)).with_n_seq_max(n).with_kv_unified(unified).with_n_ubatch(n_ubatch)
}

fn greedy(logits: &[f32]) -> LlamaToken {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
    LlamaToken(best as i32)
}

/// One request: what it asks, and the guards that it runs under.
#[derive(Clone)]
pub(super) struct Request {
    pub prompt: Vec<LlamaToken>,
    pub program: Arc<Program>,
    /// What the program is made of.
    guards: Vec<Guard>,
}

impl Request {
    fn new(subject: &Subject, prompt: Vec<LlamaToken>, guards: Vec<Guard>) -> Self {
        let program = stacked(subject, &guards.iter().collect::<Vec<_>>());
        Self { prompt, program, guards }
    }

    /// Another request of the same shape, under no guard.
    pub fn filler(&self, observer: &Arc<Program>) -> Self {
        let prompt = self.prompt.iter().rev().copied().collect();
        Self { prompt, program: Arc::clone(observer), guards: Vec::new() }
    }
}

/// What came of a request.
#[derive(Debug)]
struct Answer {
    tokens: Vec<LlamaToken>,
    /// Of each token.
    logits: Vec<Vec<f32>>,
    fired: Vec<bool>,
}

impl Answer {
    fn bits(&self) -> Vec<Vec<u32>> {
        bits(&self.logits)
    }

    /// The largest difference of two answers' logits.
    fn distance(&self, other: &Self) -> f64 {
        let each = self.logits.iter().zip(&other.logits).map(|(a, b)| distance(a, &widened(b)));
        each.fold(0.0, f64::max)
    }
}

const ANSWER_TOKENS: usize = 12;

fn answer(context: &mut GuardedContext, requests: &[Request], n_tokens: usize) -> Vec<Answer> {
    answer_as(context, requests, n_tokens, None)
}

/// Answers `requests` in one context, request `i` as sequence `i`, joining at step `i / 2` with its prompt in chunks of 7 tokens, so that
/// prompts and answers share batches: greedily, or in the words of `told`, whatever the model would say itself.
fn answer_as(
    context: &mut GuardedContext,
    requests: &[Request],
    n_tokens: usize,
    told: Option<&[Answer]>,
) -> Vec<Answer> {
    let mut answers: Vec<Vec<LlamaToken>> = requests.iter().map(|_| Vec::new()).collect();
    let mut logits: Vec<Vec<Vec<f32>>> = requests.iter().map(|_| Vec::new()).collect();
    let mut read = vec![0usize; requests.len()];
    for (index, request) in requests.iter().enumerate() {
        context.assign(SequenceId(index as i32), Arc::clone(&request.program));
    }
    let mut batch = GuardedBatch::new(128);
    for step in 0.. {
        batch.clear();
        let mut asked = Vec::new();
        for (index, request) in requests.iter().enumerate().filter(|(index, _)| step >= index / 2) {
            let (sequence, at) = (SequenceId(index as i32), TokenPosition(read[index] as i32));
            if let Some(token) = answers[index].last() {
                if answers[index].len() < n_tokens {
                    let token = told.map_or(*token, |told| told[index].tokens[answers[index].len() - 1]);
                    asked.push((index, batch.add_generated(sequence, at, token).unwrap()));
                    read[index] += 1;
                }
                continue;
            }
            let rest = &request.prompt[read[index]..];
            if rest.len() > 7 {
                batch.add_prompt_part(sequence, at, &rest[..7], &rest[7..]).unwrap();
                read[index] += 7;
            } else {
                asked.push((index, batch.add_prompt(sequence, at, rest).unwrap()));
                read[index] += rest.len();
            }
        }
        if batch.is_empty() {
            break;
        }
        context.decode(&mut batch).unwrap();
        for (index, row) in asked {
            answers[index].push(greedy(context.get_logits_ith(row)));
            logits[index].push(context.get_logits_ith(row).to_vec());
        }
    }
    let fired = |index: usize| {
        let decisions = context.gate_decisions(SequenceId(index as i32));
        decisions.iter().map(|decision| decision.unwrap().fired).collect()
    };
    let answers = answers.into_iter().zip(logits).enumerate();
    answers.map(|(index, (tokens, logits))| Answer { tokens, logits, fired: fired(index) }).collect()
}

/// Eight requests, every second of which opens its gate; strengths differ, and some run under two guards.
pub(super) fn requests(subject: &Subject) -> Vec<Request> {
    let texts = [
        PROMPT,
        "a song of the water bird",
        "the fish has a bird",
        "pilot fish swim in the sea and eat what the shark leaves",
        "in the sea",
        "things of the sea and the bird and the shark",
        "the guard has a song",
        "water and the bird in the water",
    ];
    texts
        .into_iter()
        .enumerate()
        .map(|(index, text)| {
            let opens = index % 2 == 0;
            let threshold = if opens { -NEVER } else { NEVER };
            let strength = 1.0 + index as f64 / 4.0;
            let first = subject
                .policy()
                .vector("g", LAYER)
                .vector("push", 2)
                .gate(gate("g", Aggregate::Mean, threshold, OnFire::Steer))
                .intervene(InterventionEntry { strength, when: Some("g".into()), ..add("push") })
                .guard();
            let policy = subject.policy().named("second").vector("a", 0).vector("b", 0).vector("t", LAYER);
            let second = policy
                .gate(token_gate("t", if opens { -NEVER } else { NEVER }, None))
                .intervene(InterventionEntry { when: Some("t".into()), ..ablate("t", strength) })
                .intervene(rotate("b", 15.0))
                .guard();
            let guards = if index % 3 == 0 { vec![first, second] } else { vec![first] };
            Request::new(subject, subject.tokens(text), guards)
        })
        .collect()
}

fn a_mixed_batch_gives_each_sequence_what_it_has_alone(subject: &Subject) {
    if subject.is_quantized() {
        return a_mixed_batch_gives_each_sequence_what_it_has_beside_others(subject);
    }
    let requests = requests(subject);
    let observer = subject.observer();
    let alone = |program: &Arc<Program>, prompt: &[LlamaToken]| {
        let mut context = subject.programmed(&observer, params_for(1, true, 128));
        let one = [Request { prompt: prompt.to_vec(), program: Arc::clone(program), guards: Vec::new() }];
        answer(&mut context, &one, ANSWER_TOKENS).pop().unwrap()
    };
    let expected: Vec<Answer> = requests.iter().map(|request| alone(&request.program, &request.prompt)).collect();
    // The guards matter, and half of the gates are open.
    for (index, (request, answer)) in requests.iter().zip(&expected).enumerate() {
        assert!(answer.fired.iter().all(|fired| *fired == (index % 2 == 0)), "{}: {index}", subject.name());
        if index % 2 == 0 {
            let changed = answer.distance(&alone(&observer, &request.prompt));
            assert!(changed > 100.0 * TOLERANCE, "{}: {index}: {changed:.1e}", subject.name());
        }
    }
    for (unified, n_ubatch) in settings() {
        let mut context = subject.programmed(&observer, params_for(8, unified, n_ubatch));
        let found = answer(&mut context, &requests, ANSWER_TOKENS);
        let what = format!("{}: unified {unified}, micro-batches of {n_ubatch}", subject.name());
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.tokens, expected.tokens, "{what}, sequence {index}");
            assert_eq!(found.fired, expected.fired, "{what}, sequence {index}");
            let off = found.distance(expected);
            assert!(off <= TOLERANCE, "{what}, sequence {index}: logits are off by {off:.1e} of the norm");
        }
    }
}

/// Kinds of KV cache, and sizes of micro-batches.
fn settings() -> impl Iterator<Item = (bool, u32)> {
    [true, false].into_iter().flat_map(|unified| [1, 2, 3, 8, 128].map(|n_ubatch| (unified, n_ubatch)))
}

/// llama.cpp computes a row of a quantized model by another kernel in a batch of another size, and what it then rounds to eight bits may fall to
/// the other side. So here a sequence runs "alone" in a batch of the same shape: the others read other text, as long as theirs, under no guard.
/// Then it has the same logits to the last bit.
fn a_mixed_batch_gives_each_sequence_what_it_has_beside_others(subject: &Subject) {
    const TOKENS: usize = 4;
    let requests = requests(subject);
    let observer = subject.observer();
    for (setting, (unified, n_ubatch)) in settings().enumerate() {
        let run = |requests: &[Request]| {
            let mut context = subject.programmed(&observer, params_for(8, unified, n_ubatch));
            answer(&mut context, requests, TOKENS)
        };
        let found = run(&requests);
        let what = format!("{}: unified {unified}, micro-batches of {n_ubatch}", subject.name());
        // Each beside those whose gates are as its own, and one of them, by turns, beside none.
        let with: [&dyn Fn(usize) -> bool; 3] =
            [&|index| index % 2 == 0, &|index| index % 2 == 1, &|index| index == setting % requests.len()];
        for is_with in with {
            let of =
                |(index, request)| if is_with(index) { Request::clone(request) } else { request.filler(&observer) };
            let expected = run(&requests.iter().enumerate().map(of).collect::<Vec<_>>());
            for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let what = format!("{what}, sequence {index}");
                assert_eq!(found.bits() == expected.bits(), is_with(index), "{what}: {:.1e}", found.distance(expected));
                if is_with(index) {
                    assert_eq!(found.tokens, expected.tokens, "{what}");
                    assert_eq!(found.fired, expected.fired, "{what}");
                    assert!(found.fired.iter().all(|fired| *fired == (index % 2 == 0)), "{what}");
                }
            }
        }
    }
}

/// On a device a patch rounds otherwise, which a quantized model makes much of: there each patched row is held against its interventions.
fn executors_agree_on_a_mixed_batch(subject: &Subject) {
    const TOKENS: usize = 3;
    let requests = requests(subject);
    for (unified, n_ubatch) in [(true, 128), (false, 3)] {
        let run = |kind: ExecutorKind, requests: &[Request], told: Option<&[Answer]>| {
            let mut context = subject.programmed(&subject.observer(), params_for(8, unified, n_ubatch));
            context.set_executor(kind);
            subject.capture(&mut context);
            let answers = answer_as(&mut context, requests, TOKENS, told);
            assert_eq!(context.executor(), kind, "{}", subject.name());
            (answers, subject.rows(&mut context))
        };
        let what = format!("{}: unified {unified}, micro-batches of {n_ubatch}", subject.name());
        let (host, host_rows) = run(ExecutorKind::Host, &requests, None);
        let (copy, copy_rows) = run(ExecutorKind::Copy, &requests, None);
        assert!(host_rows == copy_rows, "{what}");
        let (device, _) = run(ExecutorKind::Device, &requests, Some(&host));
        for (index, ((host, copy), device)) in host.iter().zip(&copy).zip(&device).enumerate() {
            let what = format!("{what}, sequence {index}");
            assert!(host.bits() == copy.bits() && host.fired == copy.fired, "{what}");
            assert_eq!(host.fired, device.fired, "{what}");
            let off = device.distance(host);
            assert!(subject.is_quantized() || off <= TOLERANCE, "{what}: logits are off by {off:.1e} of the norm");
            // Where nothing acts, nothing rounds; the second guard turns rows whatever its gate says.
            let acts = index % 2 == 0 || index % 3 == 0;
            assert!(acts || off == 0.0, "{what}: logits are off by {off:.1e} of the norm");
        }
        let until = |layer| {
            let early = |request: &Request| {
                let guards = request.guards.iter().map(|guard| subject.before(guard, layer)).collect();
                Request::new(subject, request.prompt.clone(), guards)
            };
            run(ExecutorKind::Device, &requests.iter().map(early).collect::<Vec<_>>(), Some(&host)).1
        };
        let guards = requests.iter().flat_map(|request| &request.guards);
        assert_patched(&what, &subject.layers_of(guards), until, |sequence, layer, position, row| {
            let request = &requests[sequence.0 as usize];
            let kind = match (position + 1).cmp(&request.prompt.len()) {
                std::cmp::Ordering::Less => RowKind::Prompt,
                std::cmp::Ordering::Equal => RowKind::PromptEnd,
                std::cmp::Ordering::Greater => RowKind::Generated,
            };
            for guard in &request.guards {
                // The second guard's gate is one of each token.
                let decided = guard.name() == "second" || kind != RowKind::Prompt;
                let (at, open) = (TokenPosition(position as i32), decided && sequence.0 % 2 == 0);
                reference::apply(guard, subject.layer(layer), at, kind, &[open], &|_| false, row);
            }
        });
    }
}

/// A live sequence finishes by the guards that it began with.
fn a_swapped_program_is_for_sequences_to_come(subject: &Subject) {
    let push = |strength| {
        let entry = InterventionEntry { strength, ..add("v") };
        stacked(subject, &[&subject.policy().vector("v", LAYER).intervene(entry).guard()])
    };
    let (old, new) = (push(1.0), push(-1.0));
    let script = subject.script();
    // In the same context as below: an attention over other cells rounds otherwise.
    let alone = |program: &Arc<Program>, sequence| {
        let mut context = subject.programmed(program, params_for_two().with_kv_unified(false));
        let prompt = prefill(&mut context, sequence, &script.prompt).unwrap();
        (prompt, step(&mut context, sequence, script.prompt.len(), script.answer[0]).unwrap())
    };
    let (by_old, by_new) = (alone(&old, ONLY), alone(&new, OTHER));
    assert!(by_old.1 != by_new.1);

    let mut context = subject.programmed(&old, params_for_two().with_kv_unified(false));
    assert!(prefill(&mut context, ONLY, &script.prompt).unwrap() == by_old.0);
    context.set_program(Arc::clone(&new));
    assert!(prefill(&mut context, OTHER, &script.prompt).unwrap() == by_new.0, "{}", subject.name());
    for (sequence, expected) in [(ONLY, &by_old.1), (OTHER, &by_new.1)] {
        let found = step(&mut context, sequence, script.prompt.len(), script.answer[0]).unwrap();
        assert!(found == *expected, "{}: sequence {sequence}", subject.name());
    }
    // The next that is called so starts anew.
    context.clear_sequence(ONLY).unwrap();
    assert!(prefill(&mut context, ONLY, &script.prompt).unwrap() == alone(&new, ONLY).0, "{}", subject.name());
}

/// Each of two additions fits in `f32`, both do not. That is found where it happens, also by a program's last hook point, so that neither a later
/// layer nor a cell of the KV cache has it: masked cells of another sequence, or of one that was here before, are multiplied by 0, which leaves
/// what is no number.
fn a_patch_that_overflows_ends_its_sequence_alone(subject: &Subject) {
    let strength = 3e38 / f64::from(subject.size(LAYER));
    let push = || InterventionEntry { strength, ..add("v") };
    let policy = subject.policy().vector("v", LAYER).intervene(push()).intervene(called("again", push()));
    let overflows = stacked(subject, &[&policy.guard()]);
    let requests = requests(subject);
    let spoilt = [SequenceId(0), SequenceId(2)];
    for (kind, unified, n_ubatch) in [
        (ExecutorKind::Host, false, 128),
        (ExecutorKind::Host, true, 3),
        (ExecutorKind::Copy, true, 128),
        (ExecutorKind::Device, true, 128),
        (ExecutorKind::Device, false, 3),
    ] {
        let what = format!("{}, {kind}, unified {unified}, micro-batches of {n_ubatch}", subject.name());
        let run = |spoilt: &[SequenceId]| {
            let mut context = subject.programmed(&subject.observer(), params_for(4, unified, n_ubatch));
            context.set_executor(kind);
            let mut batch = GuardedBatch::new(128);
            let mut last = Vec::new();
            for (sequence, request) in (0..4).map(SequenceId).zip(&requests) {
                let program = if spoilt.contains(&sequence) { &overflows } else { &request.program };
                context.assign(sequence, Arc::clone(program));
                last.push(batch.add_prompt(sequence, TokenPosition(0), &request.prompt).unwrap());
            }
            let ended = context.decode_each(&mut batch).unwrap();
            (ended, [1, 3].map(|sound| context.get_logits_ith(last[sound]).to_vec()), context)
        };
        let (none, expected, _) = run(&[]);
        assert!(none.is_empty(), "{what}: {none:?}");
        let (ended, found, mut context) = run(&spoilt);
        assert_eq!(ended.iter().map(|(sequence, _)| *sequence).collect::<Vec<_>>(), spoilt, "{what}: {ended:?}");
        for (_, error) in &ended {
            let ContextError::Fault { fault: HookFault::Row { layer, source }, .. } = error else {
                panic!("{what}: {error}")
            };
            assert_eq!(*layer, subject.layer(LAYER), "{what}");
            assert!(matches!(source, RowFault::NonFinite { .. }), "{what}: {source}");
        }
        // The same shapes, so the same bits.
        assert!(bits(&found) == bits(&expected), "{what}");
        // It stays ended, and what is started in its place is sound, though there are cells that it had and this one has not.
        let again = &requests[2].prompt[..2];
        assert!(context.ended(spoilt[1]).is_some() && context.ended(OTHER).is_none(), "{what}");
        assert!(step(&mut context, spoilt[1], requests[2].prompt.len(), again[0]).is_err(), "{what}");
        context.clear_sequence(spoilt[1]).unwrap();
        let logits = prefill(&mut context, spoilt[1], again).unwrap();
        let fresh = prefill(&mut subject.programmed(&subject.observer(), params()), ONLY, again).unwrap();
        let off = distance(&logits, &widened(&fresh));
        assert!(off <= subject.tolerance(), "{what}: off by {off:.1e} of the norm");
    }
}

#[test]
fn a_fault_of_one_sequence_ends_that_one_alone() {
    for architecture in Architecture::WITH_RESIDUAL {
        let (tiny, poisoned, other) = Tiny::poisoned(architecture);
        let pass = tiny.policy().vector("v", LAYER).intervene(add("v")).on_error(OnError::Pass).guard();
        let block = tiny.policy().named("strict").vector("v", LAYER).intervene(add("v")).guard();
        let start = tiny.tokens("")[0];
        for unified in [false, true] {
            let what = format!("{}, unified {unified}", tiny.name());
            let mut context = tiny.programmed(&stacked(&tiny, &[&block]), params_for(4, unified, 128));
            // Where the output's weights are the embeddings, the logit of the poisoned token is no number either.
            let others = |mut logits: Vec<f32>| {
                logits[poisoned.0 as usize] = 0.0;
                logits
            };
            let alone = others(prefill(&mut context, SequenceId(2), &[start, other, other]).unwrap());
            context.clear();
            context.assign(SequenceId(1), stacked(&tiny, &[&pass]));
            let mut batch = GuardedBatch::new(16);
            batch.add_prompt(SequenceId(0), TokenPosition(0), &[start, other, poisoned]).unwrap();
            batch.add_prompt(SequenceId(1), TokenPosition(0), &[start, poisoned]).unwrap();
            let sane = batch.add_prompt(SequenceId(2), TokenPosition(0), &[start, other, other]).unwrap();
            let ended = context.decode_each(&mut batch).unwrap();
            let [(SequenceId(0), ContextError::Fault { guard, fault })] = ended.as_slice() else {
                // In one KV stream llama.cpp's own attention multiplies other sequences' infinite values by 0, which is no number.
                assert!(unified, "{what}: {ended:?}");
                let not_finite = |(_, error): &(SequenceId, ContextError)| error.to_string().contains("not finite");
                assert!(!ended.is_empty() && ended.iter().all(not_finite), "{what}: {ended:?}");
                continue;
            };
            let not_finite = matches!(fault, HookFault::Row { source: RowFault::NonFinite { .. }, .. });
            assert!(guard == "strict" && not_finite, "{what}: {fault}");
            let off = distance(&others(context.get_logits_ith(sane).to_vec()), &widened(&alone));
            assert!(off <= TOLERANCE, "{what}: off by {off:.1e} of the norm");
            // It stays ended, and what is started in its place is sound.
            assert!(context.ended(SequenceId(0)).is_some() && context.ended(SequenceId(2)).is_none(), "{what}");
            context.clear_sequence(SequenceId(0)).unwrap();
            let again = others(prefill(&mut context, SequenceId(0), &[start, other, other]).unwrap());
            assert!(distance(&again, &widened(&alone)) <= TOLERANCE, "{what}");
        }
    }
}

/// llama.cpp leaves the values of cleared cells where they are and multiplies masked ones by 0: what is no number there would spoil whatever comes
/// to lie in the same stream, for good.
#[test]
fn a_fault_leaves_nothing_behind_in_the_cache() {
    for architecture in Architecture::WITH_RESIDUAL {
        let (tiny, poisoned, other) = Tiny::poisoned(architecture);
        // Late, so that layers before it have filled their cells.
        let guard = |on_error| {
            let policy = tiny.policy().vector("v", tiny.last_layer()).intervene(add("v"));
            stacked(&tiny, &[&policy.on_error(on_error).guard()])
        };
        let start = tiny.tokens("")[0];
        let (short, long) = (vec![start, other], [vec![start; 9], vec![poisoned]].concat());
        for (n_sequences, unified) in [(1, true), (1, false), (3, false)] {
            for on_error in [OnError::Block, OnError::Pass] {
                let what = format!("{}, {n_sequences} sequences, unified {unified}, {on_error:?}", tiny.name());
                let mut context = tiny.programmed(&guard(on_error), params_for(n_sequences, unified, 128));
                let last = SequenceId(n_sequences as i32 - 1);
                let others = (0..last.0).map(SequenceId);
                let logits = |context: &mut GuardedContext, sequence, prompt: &[LlamaToken]| {
                    let mut logits = prefill(context, sequence, prompt).unwrap();
                    // Where the output's weights are the embeddings, this one is no number either.
                    logits[poisoned.0 as usize] = 0.0;
                    logits
                };
                let expected: Vec<f32> = logits(&mut context, last, &short);
                for sequence in others.clone() {
                    logits(&mut context, sequence, &short);
                }
                context.clear_sequence(last).unwrap();
                let outcome = prefill(&mut context, last, &long);
                assert_eq!(outcome.is_err(), on_error == OnError::Block, "{what}");
                context.clear_sequence(last).unwrap();
                let found = logits(&mut context, last, &short);
                assert!(distance(&found, &widened(&expected)) <= TOLERANCE, "{what}");
                // The others have lost nothing.
                for sequence in others {
                    let more = step(&mut context, sequence, short.len(), other).unwrap();
                    assert!(more.iter().enumerate().all(|(t, x)| x.is_finite() || t == poisoned.0 as usize), "{what}");
                }
            }
        }
    }
}
