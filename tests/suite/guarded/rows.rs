//! Which row is which token, however llama.cpp cuts and orders a batch.

use super::expected::assert_patched;
use super::*;
use pilotfish::hook::CapturedLayer;
use pilotfish::program::GateDecision;

on_every_model!(
    micro_batches_and_parts_of_a_prompt_change_nothing,
    micro_batches_may_hold_rows_of_several_sequences,
    the_last_layer_is_a_hook_point_of_what_is_generated,
);

/// Gates of every kind, patches of every kind of position, and one patch behind a gate that fires.
fn busy_guard(subject: &Subject) -> Guard {
    let last = subject.last_layer();
    let vectors = subject.policy().vector("last", 1).vector("mean", 0).vector("max", 2).vector("end", last);
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
fn long_script(subject: &Subject) -> Script {
    let mut prompt = subject.tokens(&PROMPT.repeat(3));
    if subject.is_quantized() {
        prompt.truncate(24);
    }
    Script { prompt, ..subject.script() }
}

/// What an app sees of a prompt and its answer.
#[derive(Debug)]
struct Seen {
    logits: Vec<Vec<f32>>,
    decisions: Vec<Option<GateDecision>>,
}

impl Seen {
    /// Logits and scores within `tolerance`, and the same decisions.
    fn assert_same(&self, other: &Self, tolerance: f64, what: &str) {
        assert_eq!(self.logits.len(), other.logits.len(), "{what}");
        for (index, (a, b)) in self.logits.iter().zip(&other.logits).enumerate() {
            let distance = distance(a, &widened(b));
            assert!(distance <= tolerance, "{what}: logits {index} are off by {distance:.1e} of their norm");
        }
        assert_eq!(self.decisions.len(), other.decisions.len(), "{what}");
        for (a, b) in self.decisions.iter().zip(&other.decisions).map(|(a, b)| (a.unwrap(), b.unwrap())) {
            assert_eq!(a.fired, b.fired, "{what}");
            let (a, b) = (a.score.unwrap(), b.score.unwrap());
            assert!((a - b).abs() <= tolerance, "{what}: scores {a} and {b}");
        }
    }
}

/// Which gates of the busy guard are open: only `mean` fires, at layer 0, before the intervention that waits for it.
fn open_of_busy(kind: RowKind) -> Vec<bool> {
    vec![false, kind != RowKind::Prompt, false, false]
}

/// Checks every patched row of `see`, however llama.cpp has cut it.
fn assert_patched_rows(
    subject: &Subject,
    what: &str,
    (guard, script): (&Guard, &Script),
    (n_ubatch, part): (u32, usize),
    open: impl Fn(RowKind) -> Vec<bool>,
) {
    let run = |layer| {
        let mut context = subject.guarded(&subject.before(guard, layer), params().with_n_ubatch(n_ubatch));
        subject.capture(&mut context);
        see(&mut context, script, part);
        subject.rows(&mut context)
    };
    assert_patched(what, &subject.layers_of([guard]), run, |_, layer, position, row| {
        let (at, kind) = (TokenPosition(position as i32), script.kind(position));
        reference::apply(guard, subject.layer(layer), at, kind, &open(kind), &|_| false, row);
    });
}

/// Logits are asked for only where a token follows, as apps do. The prompt goes in decodes of up to `part` tokens.
fn see(context: &mut GuardedContext, script: &Script, part: usize) -> Seen {
    let mut logits = Vec::new();
    let n_parts = script.prompt.len().div_ceil(part);
    for (index, tokens) in script.prompt.chunks(part).enumerate() {
        let mut batch = GuardedBatch::new(part);
        let start = TokenPosition((index * part) as i32);
        if index + 1 < n_parts {
            batch.add_prompt_part(ONLY, start, tokens, &script.prompt[(index + 1) * part..]).unwrap();
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

fn micro_batches_and_parts_of_a_prompt_change_nothing(subject: &Subject) {
    let (guard, script) = (busy_guard(subject), long_script(subject));
    let n_tokens = script.prompt.len();
    let whole = see(&mut subject.guarded(&guard, params()), &script, n_tokens);
    if subject.known().is_some() {
        let open = |_: &Guard, _, position| open_of_busy(script.kind(position));
        let expected = subject.expected(&[&guard], &script, open).logits.unwrap();
        for (found, expected) in whole.logits.iter().zip(&expected[n_tokens - 1..]) {
            let distance = distance(found, expected);
            assert!(distance <= TOLERANCE, "{}: off by {distance:.1e} of the norm", subject.name());
        }
    }
    let unguarded = see(&mut subject.observed(), &script, n_tokens);
    for (guarded, unguarded) in whole.logits.iter().zip(&unguarded.logits) {
        let changed = distance(guarded, &widened(unguarded));
        assert!(changed > 100.0 * TOLERANCE, "{}: logits change by {changed:.1e}", subject.name());
    }
    // In the last two, micro-batches end within a part and at its end.
    for (n_ubatch, part) in [(8, n_tokens), (7, n_tokens), (1, n_tokens), (128, 10), (4, 10), (5, 10)] {
        let mut context = subject.guarded(&guard, params().with_n_ubatch(n_ubatch));
        assert_eq!(context.n_ubatch(), n_ubatch);
        let what = format!("{}: micro-batches of {n_ubatch}, parts of {part}", subject.name());
        see(&mut context, &script, part).assert_same(&whole, subject.tolerance(), &what);
        assert_patched_rows(subject, &what, (&guard, &script), (n_ubatch, part), open_of_busy);
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
            let what = format!("{what}, micro-batches of {n_ubatch}");
            let mut context = tiny.guarded(&guard, params().with_n_ubatch(n_ubatch));
            see(&mut context, &script, part).assert_same(&whole, TOLERANCE, &what);
        }
    }
}

/// The boundary of a micro-batch lies within a sequence, and the second sequence starts within one.
fn micro_batches_may_hold_rows_of_several_sequences(subject: &Subject) {
    let guard = busy_guard(subject);
    let scripts = [subject.script(), long_script(subject)];
    let alone =
        scripts.each_ref().map(|script| see(&mut subject.guarded(&guard, params()), script, script.prompt.len()));
    for n_ubatch in [128, 8, 5] {
        let params = || params_for_two().with_n_ubatch(n_ubatch);
        let mut context = subject.guarded(&guard, params());
        for ((sequence, logits), alone) in [ONLY, OTHER].into_iter().zip(see_both(&mut context, &scripts)).zip(&alone) {
            let decisions = context.gate_decisions(sequence);
            let what = format!("{}: sequence {sequence}, micro-batches of {n_ubatch}", subject.name());
            Seen { logits, decisions }.assert_same(alone, subject.tolerance(), &what);
        }
        let run = |layer| {
            let mut context = subject.guarded(&subject.before(&guard, layer), params());
            subject.capture(&mut context);
            see_both(&mut context, &scripts);
            subject.rows(&mut context)
        };
        let what = format!("{}: micro-batches of {n_ubatch}", subject.name());
        assert_patched(&what, &subject.layers_of([&guard]), run, |sequence, layer, position, row| {
            let (at, kind) = (TokenPosition(position as i32), scripts[sequence.0 as usize].kind(position));
            reference::apply(&guard, subject.layer(layer), at, kind, &open_of_busy(kind), &|_| false, row);
        });
    }
}

/// Decodes both prompts in one batch, then the first one's answer for both; logits by sequence.
fn see_both(context: &mut GuardedContext, scripts: &[Script; 2]) -> [Vec<Vec<f32>>; 2] {
    let mut batch = GuardedBatch::new(128);
    let mut last = [
        batch.add_prompt(ONLY, TokenPosition(0), &scripts[0].prompt).unwrap(),
        batch.add_prompt(OTHER, TokenPosition(0), &scripts[1].prompt).unwrap(),
    ];
    let mut logits = [Vec::new(), Vec::new()];
    for offset in 0.. {
        context.decode(&mut batch).unwrap();
        for (logits, index) in logits.iter_mut().zip(last) {
            logits.push(context.get_logits_ith(index).to_vec());
        }
        let Some(token) = scripts[0].answer.get(offset) else { break };
        batch.clear();
        let at = |script: &Script| TokenPosition((script.prompt.len() + offset) as i32);
        last = [
            batch.add_generated(ONLY, at(&scripts[0]), *token).unwrap(),
            batch.add_generated(OTHER, at(&scripts[1]), *token).unwrap(),
        ];
    }
    logits
}

/// llama.cpp keeps only the rows with logits there.
fn the_last_layer_is_a_hook_point_of_what_is_generated(subject: &Subject) {
    let script = subject.script();
    let last = subject.last_layer();
    let policy = subject.policy().vector("end", last).vector("push", last);
    let steers = gate("end", Aggregate::Last, -NEVER, OnFire::Steer);
    let gated = InterventionEntry { when: Some("end".into()), positions: Positions::Generated, ..add("push") };
    let guard = policy.gate(steers).intervene(gated).guard();
    let generated = script.prompt.len() - 1..;
    for n_ubatch in [128, 4] {
        let what = format!("{}: micro-batches of {n_ubatch}", subject.name());
        let part = script.prompt.len();
        assert_patched_rows(subject, &what, (&guard, &script), (n_ubatch, part), |_| vec![true]);
        let mut context = subject.guarded(&guard, params().with_n_ubatch(n_ubatch));
        context.capture([subject.layer(last)]);
        let seen = see(&mut context, &script, part);
        let captured = context.take_captured();
        let rows: Vec<_> = captured.iter().flat_map(CapturedLayer::each).collect();
        assert_eq!(rows.len(), seen.logits.len(), "{what}: only rows with logits");
        // Batches of the same shapes: there is no other difference.
        let unguarded =
            see(&mut subject.programmed(&subject.observer(), params().with_n_ubatch(n_ubatch)), &script, part);
        for (found, unguarded) in seen.logits.iter().zip(&unguarded.logits) {
            let changed = distance(found, &widened(unguarded));
            assert!(changed > 100.0 * TOLERANCE, "{what}: logits change by {changed:.1e}");
        }
        if subject.known().is_none() {
            continue;
        }
        let expected = subject.expected(&[&guard], &script, |_, _, _| vec![true]);
        for (row, expected) in rows.iter().zip(&expected.residuals[&last][generated.clone()]) {
            assert!(distance(row.1, expected) <= TOLERANCE, "{what}: {:?}", row.0);
        }
        for (found, expected) in seen.logits.iter().zip(&expected.logits.unwrap()[generated.clone()]) {
            assert!(distance(found, expected) <= TOLERANCE, "{what}");
        }
    }
}
