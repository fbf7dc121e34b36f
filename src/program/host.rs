//! The program on residual rows in host memory, in place and without allocating.

use super::{GateStates, HookPoint, PatchKind, Program, Row};
use crate::tensor::{ResidualMut, axpy, dot};

/// Why a row could not be guarded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RowFault {
    #[error("row {row} of the residual holds a value that is not finite")]
    NonFinite { row: usize },
    #[error("the residual has {found} values a row, the program was compiled for {expected}")]
    Width { expected: usize, found: usize },
    #[error("the residual has {found} rows, but {expected} rows are known")]
    Rows { expected: usize, found: usize },
}

impl Program {
    /// Reads the gates of `point` from `residual` (`[rows.len(), width]`), then patches it in place. Returns whether any row was patched.
    ///
    /// Projections accumulate in `f32` ([`dot`]), gate aggregates in `f64`.
    ///
    /// # Errors
    /// A shape that the program was not compiled for, or a value that is not finite in any row; the rows may then be patched in part.
    pub fn run(
        &self,
        point: &HookPoint,
        rows: &[Row],
        states: &mut GateStates,
        residual: &mut ResidualMut<'_>,
    ) -> Result<bool, RowFault> {
        if residual.width() != self.width.0 {
            return Err(RowFault::Width { expected: self.width.0, found: residual.width() });
        }
        if residual.n_rows() != rows.len() {
            return Err(RowFault::Rows { expected: rows.len(), found: residual.n_rows() });
        }
        let mut patched = false;
        for (index, row) in rows.iter().enumerate() {
            let values = residual.row_mut(index);
            if !all_finite(values) {
                return Err(RowFault::NonFinite { row: index });
            }
            for readout in &point.readouts {
                states.read(&self.gates, readout.gate, row, f64::from(dot(&readout.direction, values)));
            }
            for patch in &point.patches {
                let covered = patch.positions.cover(row.kind) && (patch.first_position || !row.position.is_sink());
                if !covered || patch.when.is_some_and(|gate| !states.is_open(gate, row)) {
                    continue;
                }
                match &patch.kind {
                    PatchKind::Shift(shift) => axpy(1.0, shift, values),
                    PatchKind::RankOne { direction, response } => {
                        axpy(response.at(dot(direction, values)), direction, values);
                    }
                }
                patched = true;
            }
        }
        Ok(patched)
    }
}

/// Whether no value is NaN or infinite: `x · 0` is 0 for a finite x and NaN for any other, so one sum tells.
fn all_finite(values: &[f32]) -> bool {
    const LANES: usize = 16;
    let (lanes, rest) = values.as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for chunk in lanes {
        for lane in 0..LANES {
            sums[lane] += chunk[lane] * 0.0;
        }
    }
    sums.iter().all(|sum| *sum == 0.0) && rest.iter().all(|x| x.is_finite())
}

#[cfg(test)]
mod tests {
    use super::all_finite;

    #[test]
    fn one_bad_value_anywhere_is_found() {
        for n in [1, 15, 16, 17, 64, 100] {
            let mut values = vec![1.0e38f32; n];
            assert!(all_finite(&values));
            for index in 0..n {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let good = std::mem::replace(&mut values[index], bad);
                    assert!(!all_finite(&values), "{bad} at {index} of {n}");
                    values[index] = good;
                }
            }
        }
    }
}
