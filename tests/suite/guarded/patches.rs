//! Interventions against the reference, and executors against each other.

use super::expected::Expected;
use super::*;
use pilotfish::hook::ExecutorKind;

/// A guard, and the rows that it changes at its first hook point.
pub(super) struct Case {
    pub what: &'static str,
    pub policy: fn(Policy<'_>) -> Policy<'_>,
    pub first_point: u32,
    changes: fn(RowKind, usize) -> bool,
}

pub(super) const CASES: &[Case] = &[
    Case {
        what: "add",
        policy: |policy| policy.vector("v", 1).intervene(add("v")),
        first_point: 1,
        changes: |_, position| position > 0,
    },
    Case {
        what: "add at a strength, with the first position",
        policy: |policy| {
            policy.vector("v", 0).intervene(InterventionEntry { strength: -1.75, first_position: true, ..add("v") })
        },
        first_point: 0,
        changes: |_, _| true,
    },
    Case {
        what: "ablate to a mean",
        policy: |policy| policy.vector("v", 1).intervene(ablate("v", 3.5)),
        first_point: 1,
        changes: |_, position| position > 0,
    },
    Case {
        what: "ablate in part",
        policy: |policy| policy.vector("v", 2).intervene(InterventionEntry { strength: 0.5, ..ablate("v", -4.0) }),
        first_point: 2,
        changes: |_, position| position > 0,
    },
    Case {
        what: "clamp from below",
        policy: |policy| policy.vector("v", 1).intervene(clamp("v", 6.0, 9.0)),
        first_point: 1,
        changes: |_, position| position > 0,
    },
    Case {
        what: "clamp from above",
        policy: |policy| policy.vector("v", 1).intervene(clamp("v", -9.0, -6.0)),
        first_point: 1,
        changes: |_, position| position > 0,
    },
    Case {
        what: "the prompt only",
        policy: |policy| {
            policy.vector("v", 1).intervene(InterventionEntry { positions: Positions::Prompt, ..add("v") })
        },
        first_point: 1,
        changes: |kind, position| position > 0 && kind != RowKind::Generated,
    },
    Case {
        what: "what is generated only, from the prompt's last token on",
        policy: |policy| {
            policy.vector("v", 1).intervene(InterventionEntry { positions: Positions::Generated, ..ablate("v", 4.0) })
        },
        first_point: 1,
        changes: |kind, _| kind != RowKind::Prompt,
    },
    Case {
        what: "the tokens of a text only",
        policy: |policy| {
            let positions = Positions::Matching(policy.subject.text_of(&policy.subject.script().prompt[3..5]));
            policy.vector("v", 1).intervene(InterventionEntry { positions, ..add("v") })
        },
        first_point: 1,
        changes: |_, position| (3..5).contains(&position),
    },
    Case {
        what: "two hook points, and two interventions in order at one of them",
        policy: |policy| {
            let policy = policy.vector("first", 0).vector("second", 2).vector("third", 2);
            policy.intervene(ablate("first", 2.5)).intervene(add("second")).intervene(clamp("third", 2.0, 3.0))
        },
        first_point: 0,
        changes: |_, position| position > 0,
    },
    Case {
        what: "one vector added and then ablated",
        policy: |policy| {
            let named = InterventionEntry { name: Some("back".into()), ..ablate("v", -9.0) };
            policy.vector("v", 1).intervene(add("v")).intervene(named)
        },
        first_point: 1,
        changes: |_, position| position > 0,
    },
    Case {
        what: "rotate towards",
        policy: |policy| policy.vector("v", 1).intervene(rotate("v", 35.0)),
        first_point: 1,
        changes: |_, position| position > 0,
    },
    Case {
        what: "rotate away, in part, with the first position",
        policy: |policy| {
            let entry = InterventionEntry { strength: 0.5, first_position: true, ..rotate("v", -80.0) };
            policy.vector("v", 0).intervene(entry)
        },
        first_point: 0,
        changes: |_, _| true,
    },
    Case {
        what: "rotate as far as it goes",
        policy: |policy| policy.vector("v", 1).intervene(rotate("v", 180.0)),
        first_point: 1,
        changes: |_, position| position > 0,
    },
    Case {
        what: "switch by an affine map",
        policy: |policy| policy.map("m", 1, MappingKind::Affine).intervene(switch("m")),
        first_point: 1,
        changes: |_, position| position > 0,
    },
    Case {
        what: "switch by an autoencoder",
        policy: |policy| policy.map("m", 2, MappingKind::Autoencoder).intervene(switch("m")),
        first_point: 2,
        changes: |_, position| position > 0,
    },
    Case {
        what: "switch by an autoencoder in part, of the answer only",
        policy: |policy| {
            let entry = InterventionEntry { strength: 0.3, positions: Positions::Generated, ..switch("m") };
            policy.map("m", 0, MappingKind::Autoencoder).intervene(entry)
        },
        first_point: 0,
        changes: |kind, _| kind != RowKind::Prompt,
    },
    Case {
        what: "linear neighbours that see each other, in one",
        policy: |policy| {
            let policy = policy.vector("a", 1).vector("b", 1).vector("c", 1);
            let policy = policy.intervene(ablate("a", 2.0)).intervene(add("b")).intervene(ablate("c", -3.0));
            let half = InterventionEntry { strength: 0.5, ..ablate("a", 1.0) };
            policy.intervene(called("again", half)).intervene(called("hold", clamp("b", 4.0, 5.0)))
        },
        first_point: 1,
        changes: |_, position| position > 0,
    },
    Case {
        what: "everything at one hook point, and two switches at two",
        policy: |policy| {
            let policy = policy.vector("a", 1).vector("b", 1).map("m", 1, MappingKind::Affine);
            let policy =
                policy.map("n", 2, MappingKind::Autoencoder).intervene(rotate("a", 20.0)).intervene(switch("m"));
            let policy =
                policy.intervene(called("hold", clamp("a", 1.0, 2.0))).intervene(add("b")).intervene(switch("n"));
            policy.intervene(called("back", ablate("b", 0.0)))
        },
        first_point: 1,
        changes: |_, position| position > 0,
    },
];

on_every_model!(
    a_patched_run_agrees_with_the_reference,
    a_guard_of_strength_0_changes_no_bit_of_the_logits,
    an_intervention_can_be_switched_off_by_its_strength,
    every_executor_gives_the_same_bits,
);

#[test]
fn the_reference_is_what_llama_cpp_computes_unguarded() {
    for tiny in Tiny::all() {
        let script = tiny.script();
        let expected = tiny.expected(&[], &script, |_, _, _| Vec::new());
        assert_eq!(expected.residuals.len(), LAYERS as usize);
        let found = script.run_captured(&tiny, &mut tiny.observed());
        expected.assert_is(&format!("{} unguarded", tiny.name()), &found);
    }
}

fn a_patched_run_agrees_with_the_reference(subject: &Subject) {
    let script = subject.script();
    let unguarded = subject.unguarded(&script);
    for case in CASES {
        let what = format!("{}, {}", subject.name(), case.what);
        let guard = (case.policy)(subject.policy()).guard();
        let expected = subject.expected(&[&guard], &script, |_, _, _| Vec::new());
        assert_changes(&what, case, &script, &unguarded, &expected);
        let found = script.run_captured(subject, &mut subject.guarded(&guard, params()));
        expected.assert_is(&what, &found);
        // What is patched goes on to the logits.
        let last = distance(found.1.last().unwrap(), unguarded.logits.last().unwrap());
        assert_eq!(last > 100.0 * TOLERANCE, (case.changes)(RowKind::PromptEnd, 3), "{what}: logits: {last:.1e}");
    }
}

/// The case changes the rows that it says it does, and no other, so that agreement means something.
fn assert_changes(what: &str, case: &Case, script: &Script, unguarded: &Trace, guarded: &Expected) {
    let (before, after) = (&unguarded.residuals[case.first_point as usize], &guarded.residuals[&case.first_point]);
    let mut largest = 0.0f64;
    for (position, (before, after)) in before.iter().zip(after).enumerate() {
        assert_eq!(before != after, (case.changes)(script.kind(position), position), "{what}: position {position}");
        let after: Vec<f32> = after.iter().map(|x| *x as f32).collect();
        largest = largest.max(distance(&after, before));
    }
    assert!(largest > 1000.0 * TOLERANCE, "{what}: residuals change by {largest:.1e} of their norm");
}

/// Also: a guard that only reads.
fn a_guard_of_strength_0_changes_no_bit_of_the_logits(subject: &Subject) {
    let off = |entry: InterventionEntry| InterventionEntry { strength: 0.0, first_position: true, ..entry };
    let script = subject.script();
    let vectors = || subject.policy().vector("v", 1).vector("w", 2).vector("g", 0).vector("last", subject.last_layer());
    let idle =
        || vectors().intervene(off(add("v"))).intervene(off(ablate("w", 5.0))).intervene(off(clamp("g", 5.0, 6.0)));
    let plain = script.run_plain(&mut subject.plain(params()));
    let fires = || gate("g", Aggregate::Max, -NEVER, OnFire::Steer);
    let reads = || gate("last", Aggregate::Last, NEVER, OnFire::Block);
    let when_fired = || InterventionEntry { when: Some("g".into()), name: Some("gated".into()), ..off(add("v")) };
    let policies = [
        ("strength 0", idle(), 0),
        ("a gate alone", vectors().gate(fires()).gate(reads()), 2),
        ("strength 0 behind a gate that fires", idle().gate(fires()).intervene(when_fired()), 1),
    ];
    for (what, policy, n_points) in policies {
        let what = format!("{}, {what}", subject.name());
        let mut context = subject.guarded(&policy.guard(), params());
        // Adding nothing would mostly leave the bits alone too; an intervention that is off is not even a hook point.
        assert_eq!(context.program().points().len(), n_points, "{what}");
        assert!(context.program().points().iter().all(|point| point.patches.is_empty()), "{what}");
        let guarded = script.run(&mut context).unwrap();
        assert!(bits(&guarded) == bits(&plain), "{what}");
    }
    let on = vectors().intervene(add("v")).guard();
    assert!(bits(&script.run(&mut subject.guarded(&on, params())).unwrap()) != bits(&plain), "{}", subject.name());
}

fn an_intervention_can_be_switched_off_by_its_strength(subject: &Subject) {
    let script = subject.script();
    let on = subject.policy().vector("v", 1).intervene(add("v")).guard();
    let off = on.with_strength("v", 0.0).unwrap();
    let plain = script.run_plain(&mut subject.plain(params()));
    assert!(bits(&script.run(&mut subject.guarded(&off, params())).unwrap()) == bits(&plain), "{}", subject.name());
}

fn every_executor_gives_the_same_bits(subject: &Subject) {
    let script = subject.script();
    for case in CASES {
        let what = format!("{}, {}", subject.name(), case.what);
        let policy = (case.policy)(subject.policy()).vector("g", 1);
        let guard = policy.gate(gate("g", Aggregate::Mean, NEVER, OnFire::Steer)).guard();
        let run = |kind: ExecutorKind| {
            let mut context = subject.guarded(&guard, params());
            context.set_executor(kind);
            let (residuals, logits) = script.run_captured(subject, &mut context);
            // A host executor that had to copy says so.
            assert_eq!(context.executor(), kind, "{what}");
            (residuals.concat(), logits, context.gate_decisions(ONLY))
        };
        let (host, copy) = (run(ExecutorKind::Host), run(ExecutorKind::Copy));
        assert!(bits(&host.0) == bits(&copy.0), "{what}: residuals");
        assert!(bits(&host.1) == bits(&copy.1), "{what}: logits");
        assert_eq!(host.2, copy.2, "{what}: gates");
    }
}
