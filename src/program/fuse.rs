//! Neighbouring patches with the same condition as one: one pass over the row, and on a device one operation in place of several.
//!
//! With `A: x → x + U_A g(V_A x + c_A) + b_A` before `B`, what `B` reads is `V_B A(x) + c_B`. Where the columns of `A` that `B` sees are linear
//! this is affine in `x`, so `B` can read `x` itself: `V_B + (V_B U_A) V_A`, `c_B + V_B U_A c_A + V_B b_A`. Two `ablate`s on directions that are
//! not orthogonal fuse so, exactly; a `clamp` fuses with what comes after it only if that does not see the clamp's direction.

use super::{LowRank, Op, Patch, Response, Write};

/// Columns that a fused patch may have: past that a matrix product wins nothing, and a `switch` stays by itself.
const MAX_RANK: usize = 32;

/// Fuses neighbours where that changes nothing but rounding.
pub(super) fn fuse(patches: Vec<Patch>, width: usize) -> Vec<Patch> {
    let mut fused: Vec<Patch> = Vec::with_capacity(patches.len());
    for patch in patches {
        if let Some(last) = fused.last_mut()
            && last.condition == patch.condition
            && let (Op::LowRank(first), Op::LowRank(second)) = (&last.op, &patch.op)
            && let Some(both) = composed(first, second, width)
        {
            last.op = Op::LowRank(both);
        } else {
            fused.push(patch);
        }
    }
    fused
}

/// `second` after `first` as one, or `None` where there is no such form.
fn composed(first: &LowRank, second: &LowRank, width: usize) -> Option<LowRank> {
    let (Write::Columns(first_write), Write::Columns(second_write)) = (&first.write, &second.write) else {
        return None;
    };
    let plain = |op: &LowRank| op.keep == 1.0 && op.gain == 1.0;
    if !plain(first) || !plain(second) || first.rank() + second.rank() > MAX_RANK {
        return None;
    }
    let mut read = first.read.to_vec();
    let mut offset = first.offset.to_vec();
    for (v, c) in second.read.chunks_exact(width).zip(&second.offset) {
        let mut row: Vec<f64> = v.iter().map(|v| f64::from(*v)).collect();
        let mut constant = f64::from(*c) + first.bias.as_deref().map_or(0.0, |bias| dot(v, bias));
        let columns = first_write.chunks_exact(width).zip(first.read.chunks_exact(width));
        for ((u, read), (offset, response)) in columns.zip(first.offset.iter().zip(&first.response)) {
            let seen = dot(v, u);
            // Of unit vectors, and of what is written along one: below single precision.
            if seen.abs() <= 1e-7 * dot(u, u).sqrt() * dot(v, v).sqrt() {
                continue;
            }
            if *response != Response::Identity {
                return None;
            }
            row.iter_mut().zip(read).for_each(|(row, read)| *row += seen * f64::from(*read));
            constant += seen * f64::from(*offset);
        }
        read.extend(row.iter().map(|x| *x as f32));
        offset.push(constant as f32);
    }
    let bias = match (&first.bias, &second.bias) {
        (Some(a), Some(b)) => Some(a.iter().zip(b).map(|(a, b)| a + b).collect()),
        (one, other) => one.clone().or_else(|| other.clone()),
    };
    let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
    let sane = finite(&read) && finite(&offset) && bias.as_deref().is_none_or(finite);
    sane.then(|| LowRank {
        keep: 1.0,
        read: read.into(),
        offset: offset.into(),
        response: [&*first.response, &second.response].concat().into(),
        gain: 1.0,
        write: Write::Columns([&**first_write, second_write].concat().into()),
        bias,
    })
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
