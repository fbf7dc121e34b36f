//! The reference executor: what a guard means, in `f64`, straight from its interventions and with none of the program's
//! compiled forms. Slow and plain; the tests hold every executor against it.

use super::RowKind;
use crate::guard::{Guard, InterventionKind, Positions, Truth};
use crate::tensor::{LayerIndex, TokenPosition};

/// Applies the interventions of `guard` at `layer` to one row `x` (`[width]`), with `gate_open[i]` for its gate `i`. `spells` tells
/// whether the row's token spells a part of a text in its prompt.
///
/// # Panics
/// If `x` has not the width of the guard's vectors at `layer`, or `gate_open` is shorter than the guard's gates.
pub fn apply(
    guard: &Guard,
    layer: LayerIndex,
    position: TokenPosition,
    kind: RowKind,
    gate_open: &[bool],
    spells: &dyn Fn(&str) -> bool,
    x: &mut [f64],
) {
    for intervention in guard.interventions() {
        let open = |gate: usize| Truth::from(gate_open[gate]);
        let acts = guard.layer_of(intervention) == layer
            && covers(&intervention.positions, kind, spells)
            && (intervention.first_position || !position.is_sink())
            && intervention.when.as_ref().is_none_or(|rule| rule.eval(&open) == Truth::True);
        if acts {
            apply_one(guard, intervention.kind, f64::from(intervention.strength), x);
        }
    }
}

fn covers(positions: &Positions, kind: RowKind, spells: &dyn Fn(&str) -> bool) -> bool {
    match positions {
        Positions::All => true,
        Positions::Prompt => kind != RowKind::Generated,
        Positions::Generated => kind != RowKind::Prompt,
        Positions::Matching(text) => kind != RowKind::Generated && spells(text),
    }
}

fn apply_one(guard: &Guard, kind: InterventionKind, strength: f64, x: &mut [f64]) {
    let vector = |index: usize| -> Vec<f64> {
        let vector = &guard.vectors()[index];
        assert_eq!(vector.direction.len(), x.len(), "vector `{}`", vector.name);
        vector.direction.iter().map(|x| f64::from(*x)).collect()
    };
    let unit = |index: usize| -> Vec<f64> {
        let v = vector(index);
        let norm = dot(&v, &v).sqrt();
        v.iter().map(|v| v / norm).collect()
    };
    let add = |x: &mut [f64], scale: f64, v: &[f64]| x.iter_mut().zip(v).for_each(|(x, v)| *x += scale * v);
    match kind {
        InterventionKind::Add { vector: index } => add(x, strength, &vector(index)),
        InterventionKind::Ablate { vector: index, mean } => {
            let v = unit(index);
            add(x, strength * (mean - dot(&v, x)), &v);
        }
        InterventionKind::Clamp { vector: index, low, high } => {
            let v = unit(index);
            let p = dot(&v, x);
            add(x, strength * (p.max(low).min(high) - p), &v);
        }
        InterventionKind::Rotate { vector: index, angle } => {
            let v = unit(index);
            let (p, norm) = (dot(&v, x), dot(x, x).sqrt());
            add(x, -p, &v);
            let rho = dot(x, x).sqrt();
            if rho <= 1e-9 * norm {
                add(x, p, &v);
                return;
            }
            let before = rho.atan2(p);
            let after = (before - (strength * angle).to_radians()).clamp(0.0, std::f64::consts::PI);
            x.iter_mut().zip(&v).for_each(|(x, v)| *x = norm * (after.cos() * v + after.sin() * *x / rho));
        }
        InterventionKind::Switch { map } => {
            let wanted = guard.switches()[map].map.apply(x);
            x.iter_mut().zip(wanted).for_each(|(x, wanted)| *x += strength * (wanted - *x));
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
