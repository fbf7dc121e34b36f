//! Which row is which token, however llama.cpp cuts and orders a batch.

use super::*;
use pilotfish::program::GateDecision;

/// Gates of every kind, patches of every kind of position, and one patch behind a gate that fires.
fn busy_guard(tiny: &Subject) -> Guard {
    let last = tiny.last_layer();
    let vectors = tiny.policy().vector("last", 1).vector("mean", 0).vector("max", 2).vector("end", last);
    let gated = InterventionEntry { when: Some("mean".into()), positions: Positions::All, ..add("answer") };
    vectors
        .vector("all", 1)
        .vector("prompt", 0)
        .vector("answer", 2)
        .vector("finish", last)
        .gate(gate("last", Aggregate::Last, NEVER, OnFire::Block))
        .gate(gate("mean", Aggregate::Mean, -NEVER, OnFire::Steer))
        .gate(gate("max", Aggregate::Max, NEVER, OnFire::Block))
        .gate(gate("end", Aggregate::Last, NEVER, OnFire::Block))
        .intervene(ablate("all", 4.0))
        .intervene(InterventionEntry { positions: Positions::Prompt, ..add("prompt") })
        .intervene(gated)
        .intervene(InterventionEntry { positions: Positions::Generated, ..clamp("finish", 3.0, 4.0) })
        .guard()
}

/// A prompt longer than any micro-batch of these tests.
fn long_script(tiny: &Subject) -> Script {
    Script { prompt: tiny.tokens(&PROMPT.repeat(3)), ..tiny.script() }
}

/// What an app sees of a prompt and its answer.
#[derive(Debug)]
struct Seen {
    logits: Vec<Vec<f32>>,
    decisions: Vec<Option<GateDecision>>,
}

impl Seen {
    fn assert_same(&self, other: &Self, what: &str) {
        assert_eq!(self.logits.len(), other.logits.len(), "{what}");
        for (index, (a, b)) in self.logits.iter().zip(&other.logits).enumerate() {
            let distance = distance(a, &widened(b));
            assert!(distance <= TOLERANCE, "{what}: logits {index} are off by {distance:.1e} of their norm");
        }
        assert_eq!(self.decisions.len(), other.decisions.len(), "{what}");
        for (a, b) in self.decisions.iter().zip(&other.decisions).map(|(a, b)| (a.unwrap(), b.unwrap())) {
            assert_eq!(a.fired, b.fired, "{what}");
            let (a, b) = (a.score.unwrap(), b.score.unwrap());
            assert!((a - b).abs() <= 1e-4, "{what}: scores {a} and {b}");
        }
    }
}

/// Logits are asked for only where a token follows, as apps do. The prompt goes in decodes of up to `part` tokens.
fn see(context: &mut GuardedContext, script: &Script, part: usize) -> Seen {
    let mut logits = Vec::new();
    let n_parts = script.prompt.len().div_ceil(part);
    for (index, tokens) in script.prompt.chunks(part).enumerate() {
        let mut batch = GuardedBatch::new(part);
        let start = TokenPosition((index * part) as i32);
        if index + 1 < n_parts {
            batch.add_prompt_part(ONLY, start, tokens).unwrap();
            context.decode(&mut batch).unwrap();
        } else {
            let last = batch.add_prompt(ONLY, start, tokens).unwrap();
            context.decode(&mut batch).unwrap();
            logits.push(context.get_logits_ith(last).to_vec());
        }
    }
    for (offset, token) in script.answer.iter().enumerate() {
        logits.push(step(context, ONLY, script.prompt.len() + offset, *token).unwrap());
    }
    Seen { logits, decisions: context.gate_decisions(ONLY) }
}

#[test]
fn micro_batches_and_parts_of_a_prompt_change_nothing() {
    for tiny in Tiny::all() {
        let (guard, script) = (busy_guard(&tiny), long_script(&tiny));
        let n_tokens = script.prompt.len();
        let whole = see(&mut tiny.guarded(&guard, params()), &script, n_tokens);
        // Only `mean` fires, and at layer 0: before the intervention that waits for it.
        let open = |_, kind| vec![false, kind != RowKind::Prompt, false, false];
        let expected = tiny.reference(&guard, &script, open);
        for (found, expected) in whole.logits.iter().zip(&expected.logits[n_tokens - 1..]) {
            let distance = distance(found, expected);
            assert!(distance <= TOLERANCE, "{}: off by {distance:.1e} of the norm", tiny.name());
        }
        // In the last two, micro-batches end within a part and at its end.
        for (n_ubatch, part) in [(8, n_tokens), (7, n_tokens), (1, n_tokens), (128, 10), (4, 10), (5, 10)] {
            let mut context = tiny.guarded(&guard, params().with_n_ubatch(n_ubatch));
            assert_eq!(context.n_ubatch(), n_ubatch);
            let what = format!("{}: micro-batches of {n_ubatch}, parts of {part}", tiny.name());
            see(&mut context, &script, part).assert_same(&whole, &what);
        }
    }
}

/// Where there is no rotary embedding to tell them apart, nor positions to be read.
#[test]
fn micro_batches_of_a_model_without_rotary_embeddings_change_nothing() {
    let tiny = Tiny::new(Architecture::Gpt2);
    let script = long_script(&tiny);
    let last = tiny.last_layer();
    let steers = gate("end", Aggregate::Last, -NEVER, OnFire::Steer);
    let gated = InterventionEntry { when: Some("end".into()), positions: Positions::Generated, ..add("push") };
    let at_the_end = tiny.policy().vector("end", last).vector("push", last).gate(steers).intervene(gated).guard();
    let part = script.prompt.len();
    let unguarded = see(&mut tiny.observed(), &script, part);
    for (what, guard) in [("several layers", busy_guard(&tiny)), ("the last layer alone", at_the_end)] {
        let whole = see(&mut tiny.guarded(&guard, params()), &script, part);
        for (guarded, unguarded) in whole.logits.iter().zip(&unguarded.logits) {
            assert!(distance(guarded, &widened(unguarded)) > 100.0 * TOLERANCE, "{what}: nothing acts");
        }
        for (n_ubatch, part) in [(8, part), (7, part), (1, part), (128, 10), (4, 10)] {
            let mut context = tiny.guarded(&guard, params().with_n_ubatch(n_ubatch));
            see(&mut context, &script, part).assert_same(&whole, &format!("{what}, micro-batches of {n_ubatch}"));
        }
    }
}

/// The boundary of a micro-batch lies within a sequence, and the second sequence starts within one.
#[test]
fn micro_batches_may_hold_rows_of_several_sequences() {
    for tiny in Tiny::all() {
        let guard = busy_guard(&tiny);
        let (first, second) = (tiny.script(), long_script(&tiny));
        let alone = |script: &Script| see(&mut tiny.guarded(&guard, params()), script, script.prompt.len());
        let alone = [alone(&first), alone(&second)];
        for n_ubatch in [128, 8, 5] {
            let mut context = tiny.guarded(&guard, params_for_two().with_n_ubatch(n_ubatch));
            let mut batch = GuardedBatch::new(128);
            let mut last = [
                batch.add_prompt(ONLY, TokenPosition(0), &first.prompt).unwrap(),
                batch.add_prompt(OTHER, TokenPosition(0), &second.prompt).unwrap(),
            ];
            let mut logits = [Vec::new(), Vec::new()];
            for offset in 0..=first.answer.len() {
                context.decode(&mut batch).unwrap();
                for (logits, index) in logits.iter_mut().zip(last) {
                    logits.push(context.get_logits_ith(index).to_vec());
                }
                let Some(token) = first.answer.get(offset) else { break };
                batch.clear();
                let at = |script: &Script| TokenPosition((script.prompt.len() + offset) as i32);
                last = [
                    batch.add_generated(ONLY, at(&first), *token).unwrap(),
                    batch.add_generated(OTHER, at(&second), *token).unwrap(),
                ];
            }
            for ((sequence, logits), alone) in [ONLY, OTHER].into_iter().zip(logits).zip(&alone) {
                let decisions = context.gate_decisions(sequence);
                let what = format!("{}: sequence {sequence}, micro-batches of {n_ubatch}", tiny.name());
                Seen { logits, decisions }.assert_same(alone, &what);
            }
        }
    }
}

/// llama.cpp keeps only the rows with logits there.
#[test]
fn the_last_layer_is_a_hook_point_of_what_is_generated() {
    for tiny in Tiny::all() {
        let script = tiny.script();
        let last = tiny.last_layer();
        let policy = tiny.policy().vector("end", last).vector("push", last);
        let steers = gate("end", Aggregate::Last, -NEVER, OnFire::Steer);
        let gated = InterventionEntry { when: Some("end".into()), positions: Positions::Generated, ..add("push") };
        let guard = policy.gate(steers).intervene(gated).guard();
        for n_ubatch in [128, 4] {
            let mut context = tiny.guarded(&guard, params().with_n_ubatch(n_ubatch));
            context.capture([LayerIndex(last)]);
            let seen = see(&mut context, &script, script.prompt.len());
            let expected = tiny.reference(&guard, &script, |_, _| vec![true]);
            let unguarded = tiny.unguarded_reference(&script);
            let generated = script.prompt.len() - 1..;
            let rows = context.take_captured();
            let residual = &expected.residuals[last as usize][generated.clone()];
            assert_eq!(rows.len(), residual.len(), "{}: only rows with logits", tiny.name());
            for (row, expected) in rows.iter().zip(residual) {
                assert!(distance(&row.values, expected) <= TOLERANCE, "{}: {:?}", tiny.name(), row.row);
            }
            for (found, (expected, unguarded)) in
                seen.logits.iter().zip(expected.logits[generated.clone()].iter().zip(&unguarded.logits[generated]))
            {
                assert!(distance(found, expected) <= TOLERANCE, "{}", tiny.name());
                assert!(distance(found, unguarded) > 100.0 * TOLERANCE, "{}", tiny.name());
            }
        }
    }
}
