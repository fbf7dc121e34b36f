//! The reference executor: what a guard means, in `f64`, straight from its interventions and with none of the program's
//! compiled forms. Slow and plain; the tests hold every executor against it.

use super::RowKind;
use crate::guard::{Guard, InterventionKind};
use crate::tensor::{LayerIndex, TokenPosition};

/// Applies the interventions of `guard` at `layer` to one row `x` (`[width]`), with `gate_open[i]` for its gate `i`.
///
/// # Panics
/// If `x` has not the width of the guard's vectors at `layer`, or `gate_open` is shorter than the guard's gates.
pub fn apply(
    guard: &Guard,
    layer: LayerIndex,
    position: TokenPosition,
    kind: RowKind,
    gate_open: &[bool],
    x: &mut [f64],
) {
    for intervention in guard.interventions() {
        let vector = &guard.vectors()[intervention.vector];
        let acts = vector.layer == layer
            && intervention.positions.cover(kind)
            && (intervention.first_position || !position.is_sink())
            && intervention.when.is_none_or(|gate| gate_open[gate]);
        if !acts {
            continue;
        }
        let strength = f64::from(intervention.strength);
        let v: Vec<f64> = vector.direction.iter().map(|x| f64::from(*x)).collect();
        assert_eq!(v.len(), x.len(), "vector `{}` at layer {layer}", vector.name);
        let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        let projection: f64 = v.iter().zip(x.iter()).map(|(v, x)| v / norm * x).sum();
        match intervention.kind {
            InterventionKind::Add => x.iter_mut().zip(&v).for_each(|(x, v)| *x += strength * v),
            InterventionKind::Ablate { mean } => {
                x.iter_mut().zip(&v).for_each(|(x, v)| *x -= strength * (projection - mean) * v / norm);
            }
            InterventionKind::Clamp { low, high } => {
                let wanted = projection.max(low).min(high);
                x.iter_mut().zip(&v).for_each(|(x, v)| *x += strength * (wanted - projection) * v / norm);
            }
        }
    }
}
