//! A token costs no memory: what the hook needs it has from the first tokens on.

use super::*;
use crate::counting_allocator::allocations;

/// Gates of both scopes, patches of every kind, a rule.
fn everything(tiny: &Subject) -> Guard {
    let policy = tiny.policy().vector("g", 0).vector("t", 1).vector("v", 1).vector("last", tiny.last_layer());
    let policy = policy.map("m", 1, MappingKind::Affine).map("n", 2, MappingKind::Autoencoder);
    let rule = InterventionEntry { when: Some("g and not t or t".into()), ..called("back", ablate("v", 0.1)) };
    policy
        .gate(gate("g", Aggregate::Mean, -NEVER, OnFire::Steer))
        .gate(token_gate("t", 0.5, Some(-0.5)))
        .gate(gate("last", Aggregate::Last, NEVER, OnFire::Block))
        .intervene(InterventionEntry { strength: 0.01, ..add("v") })
        .intervene(clamp("last", -3.0, 3.0))
        .intervene(InterventionEntry { strength: 0.1, ..rotate("t", 10.0) })
        .intervene(InterventionEntry { strength: 0.01, ..switch("m") })
        .intervene(InterventionEntry { strength: 0.01, ..switch("n") })
        .intervene(rule)
        .guard()
}

/// Decodes `n_steps` tokens of each of `n_sequences` at once and gives the allocations of all steps but the first.
fn allocations_of(tiny: &Subject, guard: &Guard, n_sequences: i32, n_steps: usize) -> u64 {
    let n_ctx = n_sequences as u32 * (n_steps as u32 + 16);
    let params = params().with_n_ctx(NonZeroU32::new(n_ctx)).with_n_seq_max(n_sequences as u32).with_kv_unified(true);
    let mut context = tiny.guarded(guard, params);
    let tokens = tiny.script().tokens();
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

#[test]
fn steps_of_many_sequences_allocate_nothing() {
    for tiny in Tiny::all() {
        assert_eq!(allocations_of(&tiny, &everything(&tiny), 8, 100), 0, "{}", tiny.name());
    }
}
