//! A token costs no memory: what the hook needs it has from the first tokens on.

use super::*;
use crate::counting_allocator::allocations;

on_every_model!(steps_of_many_sequences_allocate_nothing);

/// Gates of both scopes, patches of every kind, a rule.
fn everything(subject: &Subject) -> Guard {
    let policy = subject.policy().vector("g", 0).vector("t", 1).vector("v", 1);
    let policy = policy.vector("last", subject.last_layer());
    let policy = policy.map("m", 1, MappingKind::Affine).map("n", 2, MappingKind::Autoencoder);
    let rule = InterventionEntry { when: Some("g and not t or t".into()), ..called("back", ablate("v", 0.1)) };
    policy
        .gate(gate("g", Aggregate::Mean, -NEVER, OnFire::Steer))
        .gate(token_gate("t", 0.5, Some(-0.5)))
        .gate(gate("last", Aggregate::Last, NEVER, OnFire::Block))
        .intervene(InterventionEntry { strength: 0.01, ..add("v") })
        .intervene(clamp("last", -3.0, 3.0))
        .intervene(InterventionEntry { positions: Positions::Matching("eats thi".into()), ..called("text", add("v")) })
        .intervene(InterventionEntry { strength: 0.1, ..rotate("t", 10.0) })
        .intervene(InterventionEntry { strength: 0.01, ..switch("m") })
        .intervene(InterventionEntry { strength: 0.01, ..switch("n") })
        .intervene(rule)
        .guard()
}

/// Decodes `n_steps` tokens of each of `n_sequences` at once and gives the allocations of all steps but the first.
fn allocations_of(subject: &Subject, guard: &Guard, n_sequences: i32, n_steps: usize) -> u64 {
    let n_ctx = n_sequences as u32 * (n_steps as u32 + 16);
    let params = params().with_n_ctx(NonZeroU32::new(n_ctx)).with_n_seq_max(n_sequences as u32).with_kv_unified(true);
    let mut context = subject.guarded(guard, params);
    let tokens = subject.script().tokens();
    let mut batch = GuardedBatch::new(16);
    for sequence in (0..n_sequences).map(SequenceId) {
        batch.clear();
        batch.add_prompt(sequence, TokenPosition(0), &tokens[..4]).unwrap();
        context.decode(&mut batch).unwrap();
    }
    let mut allocated = 0;
    for step in 0..=n_steps {
        batch.clear();
        for sequence in 0..n_sequences {
            let token = tokens[(step + sequence as usize) % tokens.len()];
            batch.add_generated(SequenceId(sequence), TokenPosition(4 + step as i32), token).unwrap();
        }
        let before = allocations();
        context.decode(&mut batch).unwrap();
        allocated += if step == 0 { 0 } else { allocations() - before };
    }
    allocated
}

#[test]
fn ten_thousand_steps_allocate_nothing() {
    let tiny = Tiny::new(Architecture::Llama);
    let before = allocations();
    drop(std::hint::black_box(vec![0u8; 64]));
    assert_eq!(allocations() - before, 1, "the counter counts");
    assert_eq!(allocations_of(&tiny, &everything(&tiny), 1, 10_000), 0);
}

fn steps_of_many_sequences_allocate_nothing(subject: &Subject) {
    // A real model's steps take their time.
    let n_steps = if subject.known().is_some() { [400, 100] } else { [200, 30] };
    for (n_sequences, n_steps) in [1, 8].into_iter().zip(n_steps) {
        let allocated = allocations_of(subject, &everything(subject), n_sequences, n_steps);
        assert_eq!(allocated, 0, "{}: {n_sequences} sequences", subject.name());
    }
}
