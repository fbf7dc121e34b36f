//! Many sequences in one context: each by its own guards, gates and faults, as if it were alone.

use super::*;
use pilotfish::hook::HookFault;
use pilotfish::program::{Calibration, RowFault};

const LAYER: u32 = 1;

pub(super) fn stacked(tiny: &Subject, guards: &[&Guard]) -> Arc<Program> {
    Arc::new(Program::stack(guards, tiny.model.shape(), Calibration::Required).unwrap())
}

fn shared_context<'t>(tiny: &'t Subject, program: &Arc<Program>, params: LlamaContextParams) -> GuardedContext<'t> {
    GuardedContext::new(tiny.model.llama(), backend().unwrap(), params, Arc::clone(program)).unwrap()
}

fn params_for(n: u32, unified: bool, n_ubatch: u32) -> LlamaContextParams {
    params().with_n_ctx(NonZeroU32::new(128 * n)).with_n_seq_max(n).with_kv_unified(unified).with_n_ubatch(n_ubatch)
}

fn greedy(logits: &[f32]) -> LlamaToken {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
    LlamaToken(best as i32)
}

/// One request: what it asks, and the guards that it runs under.
pub(super) struct Request {
    pub prompt: Vec<LlamaToken>,
    pub program: Arc<Program>,
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
    /// The largest difference of two answers' logits.
    fn distance(&self, other: &Self) -> f64 {
        let each = self.logits.iter().zip(&other.logits).map(|(a, b)| distance(a, &widened(b)));
        each.fold(0.0, f64::max)
    }
}

const ANSWER_TOKENS: usize = 12;

/// Answers `requests` greedily in one context, request `i` as sequence `i`, joining at step `i / 2` with its prompt in chunks of 7 tokens, so that
/// prompts and answers share batches.
fn answer(context: &mut GuardedContext, requests: &[Request]) -> Vec<Answer> {
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
                if answers[index].len() < ANSWER_TOKENS {
                    asked.push((index, batch.add_generated(sequence, at, *token).unwrap()));
                    read[index] += 1;
                }
                continue;
            }
            let rest = &request.prompt[read[index]..];
            if rest.len() > 7 {
                batch.add_prompt_part(sequence, at, &rest[..7]).unwrap();
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
pub(super) fn requests(tiny: &Subject) -> Vec<Request> {
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
            let first = tiny
                .policy()
                .vector("g", LAYER)
                .vector("push", 2)
                .gate(gate("g", Aggregate::Mean, threshold, OnFire::Steer))
                .intervene(InterventionEntry { strength, when: Some("g".into()), ..add("push") })
                .guard();
            let policy = tiny.policy().named("second").vector("a", 0).vector("b", 0).vector("t", LAYER);
            let second = policy
                .gate(token_gate("t", if opens { -NEVER } else { NEVER }, None))
                .intervene(InterventionEntry { when: Some("t".into()), ..ablate("t", strength) })
                .intervene(rotate("b", 15.0))
                .guard();
            let program = if index % 3 == 0 { stacked(tiny, &[&first, &second]) } else { stacked(tiny, &[&first]) };
            Request { prompt: tiny.tokens(text), program }
        })
        .collect()
}

#[test]
fn a_mixed_batch_gives_each_sequence_what_it_has_alone() {
    for tiny in Tiny::all() {
        let requests = requests(&tiny);
        let observer = Arc::new(Program::observer(tiny.model.shape()));
        let alone = |program: &Arc<Program>, prompt: &[LlamaToken]| {
            let mut context = shared_context(&tiny, &observer, params_for(1, true, 128));
            let one = [Request { prompt: prompt.to_vec(), program: Arc::clone(program) }];
            answer(&mut context, &one).pop().unwrap()
        };
        let expected: Vec<Answer> = requests.iter().map(|request| alone(&request.program, &request.prompt)).collect();
        // The guards matter, and half of the gates are open.
        for (index, (request, answer)) in requests.iter().zip(&expected).enumerate() {
            assert!(answer.fired.iter().all(|fired| *fired == (index % 2 == 0)), "{}: {index}", tiny.name());
            if index % 2 == 0 {
                let changed = answer.distance(&alone(&observer, &request.prompt));
                assert!(changed > 100.0 * TOLERANCE, "{}: {index}: {changed:.1e}", tiny.name());
            }
        }
        for unified in [true, false] {
            for n_ubatch in [1, 2, 3, 8, 32, 128] {
                let mut context = shared_context(&tiny, &observer, params_for(8, unified, n_ubatch));
                let found = answer(&mut context, &requests);
                let what = format!("{}: unified {unified}, micro-batches of {n_ubatch}", tiny.name());
                for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    assert_eq!(found.tokens, expected.tokens, "{what}, sequence {index}");
                    assert_eq!(found.fired, expected.fired, "{what}, sequence {index}");
                    let off = found.distance(expected);
                    assert!(off <= TOLERANCE, "{what}, sequence {index}: logits are off by {off:.1e} of the norm");
                }
            }
        }
    }
}

/// A live sequence finishes by the guards that it began with.
#[test]
fn a_swapped_program_is_for_sequences_to_come() {
    for tiny in Tiny::all() {
        let push = |strength| {
            let entry = InterventionEntry { strength, ..add("v") };
            stacked(&tiny, &[&tiny.policy().vector("v", LAYER).intervene(entry).guard()])
        };
        let (old, new) = (push(1.0), push(-1.0));
        let script = tiny.script();
        let alone = |program: &Arc<Program>| {
            let mut context = shared_context(&tiny, program, params());
            let prompt = prefill(&mut context, ONLY, &script.prompt).unwrap();
            (prompt, step(&mut context, ONLY, script.prompt.len(), script.answer[0]).unwrap())
        };
        let (by_old, by_new) = (alone(&old), alone(&new));
        assert!(by_old.1 != by_new.1);

        let mut context = shared_context(&tiny, &old, params_for_two());
        assert!(prefill(&mut context, ONLY, &script.prompt).unwrap() == by_old.0);
        context.set_program(Arc::clone(&new));
        let close = |a: &[f32], b: &[f32]| distance(a, &widened(b)) <= TOLERANCE;
        assert!(close(&prefill(&mut context, OTHER, &script.prompt).unwrap(), &by_new.0), "{}", tiny.name());
        for (sequence, expected) in [(ONLY, &by_old.1), (OTHER, &by_new.1)] {
            let found = step(&mut context, sequence, script.prompt.len(), script.answer[0]).unwrap();
            assert!(close(&found, expected), "{}: sequence {sequence}", tiny.name());
        }
        // The next that is called so starts anew.
        context.clear_sequence(ONLY).unwrap();
        assert!(close(&prefill(&mut context, ONLY, &script.prompt).unwrap(), &by_new.0), "{}", tiny.name());
    }
}

#[test]
fn a_fault_of_one_sequence_ends_that_one_alone() {
    for architecture in Architecture::WITH_RESIDUAL {
        let shape = TinyModel::new(architecture);
        let sound = Tiny::new(architecture);
        let (poisoned, other) = (sound.tokens(" shark")[1], sound.tokens(" sea")[1]);
        let mut weights = shape.weights();
        let embedding = weights.get_mut("token_embd.weight").unwrap();
        embedding.values[poisoned.0 as usize * embedding.shape[0]] = f32::INFINITY;
        let tiny = Tiny::with_weights(shape, &weights);
        let pass = tiny.policy().vector("v", LAYER).intervene(add("v")).on_error(OnError::Pass).guard();
        let block = tiny.policy().named("strict").vector("v", LAYER).intervene(add("v")).guard();
        let start = tiny.tokens("")[0];
        for unified in [false, true] {
            let what = format!("{}, unified {unified}", tiny.name());
            let mut context = shared_context(&tiny, &stacked(&tiny, &[&block]), params_for(4, unified, 128));
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
