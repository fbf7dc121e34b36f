//! What is shared of a prompt's beginning, in any order of requests under any program: each is answered as if it were read anew.

use super::scheduler::{Calls, OPTIONS, Seen};
use super::sequences::stacked;
use super::*;
use pilotfish::engine::scheduler::{End, Request, RequestId, SchedulerOptions, Toggle};
use pilotfish::program::Setting;

const WORDS: [&str; 10] = [" the", " sea", " fish", " shark", " and", " bird", " song", " eats", " x", " so"];

/// What patches may look for: words, and what lies over the edges of tokens.
const TEXTS: [&str; 8] = [" sea", "h sh", "d so", "x", "eats the", "a", "ea", "fish and the bird song"];

fn one_of<T: Clone>(rng: &mut ChaCha8Rng, of: &[T]) -> T {
    of[rng.random_range(0..of.len())].clone()
}

/// Gates of all kinds, and patches that may ask them.
fn any_program(tiny: &Subject, rng: &mut ChaCha8Rng) -> Arc<Program> {
    let policy = tiny.policy().vector("a", 0).vector("b", 1).vector("c", 2).vector("d", 3);
    let mut policy = policy.vector("u", 1).vector("v", 2).vector("w", 3);
    let is_block = |rng: &mut ChaCha8Rng| if rng.random_range(0..8) == 0 { OnFire::Block } else { OnFire::Steer };
    let threshold = |rng: &mut ChaCha8Rng| one_of(rng, &[-NEVER, -0.5, 0.0, 0.3, NEVER]);
    for (name, is_last) in [("a", false), ("c", false), ("d", true)] {
        let aggregate = one_of(rng, &[Aggregate::Last, Aggregate::Mean, Aggregate::Max]);
        let aggregate = if is_last { Aggregate::Last } else { aggregate };
        let (threshold, on_fire) = (threshold(rng), is_block(rng));
        policy = policy.gate(gate(name, aggregate, threshold, on_fire));
    }
    let opens = rng.random_range(-0.3..0.6);
    let release = one_of(rng, &[None, Some(opens - 0.4)]);
    let positions = one_of(rng, &[None, None, Some(Positions::Prompt), Some(Positions::Generated)]);
    let on_fire = is_block(rng);
    policy = policy.gate(GateEntry { positions, on_fire, ..token_gate("b", opens, release) });
    let early = ["", "", "a", "not a", "b", "not b", "a or b", "a and not b"];
    let late = [&early[..], &["c", "not c", "a and not c", "c or b", "not (a or c)"]].concat();
    let last = [&late[..], &["d", "not d", "b and d"]].concat();
    for (vector, rules) in [("u", &early[..]), ("v", &late), ("w", &last)] {
        if rng.random_range(0..3) == 0 {
            continue;
        }
        let rule = one_of(rng, rules);
        let when = (!rule.is_empty()).then(|| rule.to_owned());
        let text = || Positions::Matching(one_of(&mut rng.clone(), &TEXTS).into());
        let positions = [Positions::All, Positions::All, Positions::Prompt, Positions::Generated, text(), text()];
        let positions = one_of(rng, &positions);
        let first_position = rng.random_range(0..3) == 0;
        policy = policy.intervene(InterventionEntry { when, positions, first_position, ..add(vector) });
    }
    stacked(tiny, &[&policy.guard()])
}

/// A text that begins like one before it, is one before it, goes on from one, or is new.
fn any_prompt(tiny: &Subject, rng: &mut ChaCha8Rng, said: &[Vec<LlamaToken>]) -> Vec<LlamaToken> {
    let mut prompt = match said.len() {
        0 => Vec::new(),
        n => said[rng.random_range(0..n)].clone(),
    };
    match rng.random_range(0..8) {
        0 => prompt.clear(),
        1..=3 => prompt.truncate(rng.random_range(1..=prompt.len().max(1))),
        _ => {}
    }
    if prompt.is_empty() {
        prompt = tiny.tokens("");
        prompt.truncate(1);
    }
    let n_words = one_of(rng, &[0, 0, 1, 3, 8, 24]);
    prompt.extend((0..n_words).flat_map(|_| tiny.more_tokens(one_of(rng, &WORDS))));
    prompt.truncate(100);
    prompt
}

/// Interventions of `program` that are set on the way.
fn any_toggles(program: &Program, rng: &mut ChaCha8Rng) -> Vec<Toggle> {
    let names: Vec<String> = program.interventions().map(|(dial, _)| dial.name.clone()).collect();
    let n = if names.is_empty() { 0 } else { one_of(rng, &[0, 0, 0, 1, 1, 2]) };
    let mut toggle = |_| Toggle {
        name: one_of(rng, &names),
        from_token: one_of(rng, &[1, 1, 2, 5]),
        setting: one_of(rng, &[Setting::Off, Setting::Off, Setting::On, Setting::Strength(0.5)]),
    };
    (0..n).map(&mut toggle).collect()
}

/// What is answered otherwise than by a scheduler that reads all anew.
fn run(tiny: &Subject, seed: u64) -> Vec<String> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let rng = &mut rng;
    let programs: Vec<_> = (0..2).map(|_| any_program(tiny, rng)).collect();
    let options =
        SchedulerOptions { n_sequences: one_of(rng, &[1, 2, 3, 5]), n_batch: one_of(rng, &[1, 5, 16, 64]), ..OPTIONS };
    let mut calls = Calls::under(tiny, &programs[0], options);
    let mut anew =
        Calls::new(tiny, SchedulerOptions { n_sequences: 1, n_batch: 128, reuse_prefixes: false, ..OPTIONS });
    let mut current = 0;
    let (mut asked, mut said): (Vec<(RequestId, Request, Seen)>, Vec<_>) = (Vec::new(), Vec::new());
    let mut differs = Vec::new();
    for _ in 0..14 {
        let prompt = any_prompt(tiny, rng, &said);
        let max_tokens = one_of(rng, &[0, 1, 4, 9, 20]);
        if rng.random_range(0..8) == 0 {
            current = rng.random_range(0..2);
            calls.scheduler.set_program(Arc::clone(&programs[current])).unwrap();
        }
        let own = one_of(rng, &[None, Some(0), Some(0), Some(1)]);
        let under = Arc::clone(&programs[own.unwrap_or(current)]);
        let toggles = any_toggles(&under, rng);
        let request = Request { toggles, ..Request::new(prompt.clone(), max_tokens) };
        let expected = anew.answer(Request { program: Some(under), ..request.clone() });
        said.push([prompt, tiny.more_tokens(&expected.text)].concat());
        let request = Request { program: own.map(|own| Arc::clone(&programs[own])), ..request };
        let id = calls.scheduler.submit(request.clone()).unwrap();
        asked.push((id, request, expected));
        for _ in 0..one_of(rng, &[0, 0, 1, 2, 5, 40]) {
            calls.step();
        }
        if rng.random_range(0..10) == 0 {
            let id = asked[rng.random_range(0..asked.len())].0;
            calls.scheduler.cancel(id).unwrap();
        }
    }
    let mut n_steps = 0;
    while calls.step() {
        n_steps += 1;
        assert!(n_steps < 20_000, "it does not end");
    }
    assert_eq!(calls.scheduler.load(), (0, 0));
    for (index, (id, request, expected)) in asked.iter().enumerate() {
        // A cancelled one tells its caller, and nobody else.
        let Some(found) = calls.seen.get(id).filter(|seen| seen.summary.is_some()) else { continue };
        let reused = found.summary.as_ref().unwrap().reused_tokens;
        let what =
            format!("{} seed {seed} request {index} of {} tokens, {reused} shared", tiny.name(), request.prompt.len());
        let kind = |seen: &Seen| std::mem::discriminant(seen.end());
        if kind(found) != kind(expected) || found.text != expected.text {
            let told =
                |seen: &Seen| format!("{:?} {:?} {:?}", seen.text, seen.end(), seen.summary.as_ref().unwrap().gates);
            differs.push(format!("{what}: {} and {}", told(found), told(expected)));
        } else if !matches!(found.end(), End::Blocked(_)) {
            let gates = |seen: &Seen| seen.summary.as_ref().unwrap().gates.clone();
            for (found, expected) in gates(found).iter().zip(gates(expected)) {
                let near = match (found.score, expected.score) {
                    (Some(found), Some(expected)) => (found - expected).abs() <= 1e-2 * (1.0 + expected.abs()),
                    (found, expected) => found == expected,
                };
                if !near || found.fired != expected.fired {
                    differs.push(format!("{what}: {found:?} and {expected:?}"));
                }
            }
        }
    }
    differs
}

#[test]
fn any_requests_are_answered_as_if_read_anew() {
    let each = Tiny::all().zip(1..);
    let differs: Vec<String> = each.flat_map(|(tiny, seed)| run(&tiny, seed)).collect();
    assert!(differs.is_empty(), "{} differ:\n{}", differs.len(), differs.join("\n"));
}

/// A guard that lets faults pass leaves its request running, with what is no number in its cells: that is lent to nobody.
#[test]
fn cells_of_a_request_that_went_wrong_are_not_shared() {
    for architecture in Architecture::WITH_RESIDUAL {
        let (tiny, poisoned, other) = Tiny::poisoned(architecture);
        let policy = tiny.policy().vector("g", 0).gate(gate("g", Aggregate::Max, NEVER, OnFire::Steer));
        let program = stacked(&tiny, &[&policy.on_error(OnError::Pass).guard()]);
        let shared = [tiny.tokens("")[0]; 32];
        let asked = [&shared[..], &[other]].concat();
        for (to, unified) in [(ONLY, false), (OTHER, false), (ONLY, true)] {
            let what = format!("{}, sequence {to}, unified {unified}", tiny.name());
            let mut context = tiny.programmed(&program, params().with_n_seq_max(2).with_kv_unified(unified));
            let read = |context: &mut GuardedContext, sequence, at: usize, tokens: &[LlamaToken], ends: bool| {
                let mut batch = GuardedBatch::new(tokens.len());
                let start = TokenPosition(at as i32);
                if !ends {
                    batch.add_prompt_part(sequence, start, tokens, &[]).unwrap();
                    context.decode(&mut batch).unwrap();
                    return Vec::new();
                }
                let last = batch.add_prompt(sequence, start, tokens).unwrap();
                context.decode(&mut batch).unwrap();
                let mut logits = context.get_logits_ith(last).to_vec();
                // Where the output's weights are the embeddings, this one is no number either.
                logits[poisoned.0 as usize] = 0.0;
                logits
            };
            let expected = read(&mut context, to, 0, &asked, true);
            context.clear();
            read(&mut context, ONLY, 0, &shared, false);
            read(&mut context, ONLY, shared.len(), &[other, poisoned, other, other], true);
            let n = context.reusable(ONLY, shared.len());
            if n > 0 {
                context.resume(ONLY, to, n).unwrap();
            } else {
                context.clear_sequence(to).unwrap();
            }
            let found = read(&mut context, to, n, &asked[n..], true);
            let off = distance(&found, &widened(&expected));
            assert!(off <= TOLERANCE, "{what}: {n} tokens are shared, logits are off by {off:.1e}");
        }
    }
}
