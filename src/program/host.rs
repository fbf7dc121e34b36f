//! Programs on residual rows in host memory, in place; decoding allocates nothing once the buffers have grown.

use super::{Condition, HookPoint, LowRank, Op, Patch, Program, Rotate, Row, Sequences, Write};
use crate::guard::OnError;
use crate::tensor::{LayerIndex, ResidualMut, all_finite, axpy, dot};
use nalgebra::{DMatrixView, DMatrixViewMut, Dyn};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Why rows could not be guarded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RowFault {
    #[error("the residual at position {position} holds a value that is not finite")]
    NonFinite { position: i32 },
    #[error("the residual has {found} values a row, the program was compiled for {expected}")]
    Width { expected: usize, found: usize },
    #[error("the residual has {found} rows, but {expected} rows are known")]
    Rows { expected: usize, found: usize },
    #[error("it is uncertain which rows are whose, and the batch's sequences have different programs")]
    Uncertain,
    #[error("the guard panicked: {message}")]
    Panic { message: String },
    #[error("the device failed: {reason}")]
    Device { reason: String },
}

/// Buffers that runs use again.
#[derive(Debug, Default)]
pub struct Scratch {
    projections: Vec<f32>,
    failed: Vec<Range<usize>>,
}

/// Neighbouring rows of one sequence, or of none, and what is to happen to them at a hook point.
pub(crate) struct Group<'a> {
    pub program: &'a Arc<Program>,
    pub point: &'a HookPoint,
    pub rows: &'a [Row],
    /// Where they are in the residual.
    pub range: Range<usize>,
}

/// Rows and columns from which a matrix product is worth its packing.
const GEMM_ROWS: usize = 4;
const GEMM_RANK: usize = 16;

impl Sequences {
    /// Reads the gates of `layer` from `residual` (`[rows.len(), width]`), then patches it in place, each row by its sequence's program. Returns
    /// whether any row was changed.
    ///
    /// Projections accumulate in `f32` ([`dot`]), gate aggregates in `f64`. What goes wrong with one sequence's rows, a panic too, is
    /// latched for that sequence; its rows become zero, so that they spoil nobody else's attention, and the other rows are guarded.
    ///
    /// # Errors
    /// A shape that makes no sense for any row. Some rows may then be patched.
    pub fn run(
        &mut self,
        layer: LayerIndex,
        rows: &[Row],
        residual: &mut ResidualMut<'_>,
        scratch: &mut Scratch,
    ) -> Result<bool, RowFault> {
        if residual.n_rows() != rows.len() {
            return Err(RowFault::Rows { expected: rows.len(), found: residual.n_rows() });
        }
        let width = residual.width();
        let mut changed = false;
        let mut failed = std::mem::take(&mut scratch.failed);
        failed.clear();
        let outcome = self.each_group(layer, rows, width, &mut failed, |sequences, group| {
            let values = residual.rows_mut(group.range);
            changed |= sequences.run_group(group.point, group.rows, values, scratch)?;
            Ok(())
        });
        for range in failed.drain(..) {
            residual.rows_mut(range).fill(0.0);
            changed = true;
        }
        scratch.failed = failed;
        outcome.map(|()| changed)
    }

    /// Calls `work` for every group of neighbouring rows of one sequence (or of none) that is to be guarded at `layer`: what each executor
    /// goes by.
    ///
    /// What goes wrong in `work`, a panic too, is latched for the group's sequence. Ranges of rows that must become zero for it are added to
    /// `failed`.
    ///
    /// # Errors
    /// The residual's `width` is not that of a program. Groups before may have been worked on.
    pub(crate) fn each_group(
        &mut self,
        layer: LayerIndex,
        rows: &[Row],
        width: usize,
        failed: &mut Vec<Range<usize>>,
        mut work: impl FnMut(&mut Self, Group<'_>) -> Result<(), RowFault>,
    ) -> Result<(), RowFault> {
        let mut start = 0;
        for group in rows.chunk_by(|a, b| a.sequence == b.sequence) {
            let range = start..start + group.len();
            start = range.end;
            let sequence = group[0].sequence;
            let Some(program) = self.program_of_rows(sequence).map(Arc::clone) else {
                self.fail(sequence, layer, &RowFault::Uncertain);
                continue;
            };
            let Some(point) = program.point(layer).filter(|_| !self.has_failed(sequence)) else { continue };
            if width != program.width.0 {
                return Err(RowFault::Width { expected: program.width.0, found: width });
            }
            let group = Group { program: &program, point, rows: group, range: range.clone() };
            let fault = match catch_unwind(AssertUnwindSafe(|| work(self, group))) {
                Ok(Ok(())) => continue,
                Ok(Err(fault)) => fault,
                Err(payload) => RowFault::Panic { message: panic_message(&*payload) },
            };
            self.fail(sequence, layer, &fault);
            if program.on_error() == OnError::Block {
                failed.push(range);
            }
        }
        Ok(())
    }

    /// Calls `act` with each run of neighbouring rows of one sequence that a patch with this condition acts on.
    pub(crate) fn each_acting(&self, condition: &Condition, rows: &[Row], mut act: impl FnMut(Range<usize>)) {
        let mut start = 0;
        while start < rows.len() {
            let n = rows[start..].iter().take_while(|row| self.acts(condition, row)).count();
            if n > 0 {
                act(start..start + n);
            }
            // The row that ended the run does not act.
            start += n + 1;
        }
    }

    /// [`run`](Self::run) for rows of one sequence, or of none.
    fn run_group(
        &mut self,
        point: &HookPoint,
        rows: &[Row],
        values: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<bool, RowFault> {
        let width = values.len() / rows.len();
        for (row, values) in rows.iter().zip(values.chunks_exact(width)) {
            if !all_finite(values) {
                return Err(RowFault::NonFinite { position: row.position.0 });
            }
            for readout in &point.readouts {
                self.read(row, readout.gate, dot(&readout.direction, values));
            }
        }
        let mut patched = false;
        for Patch { op, condition } in &point.patches {
            self.each_acting(condition, rows, |acting| {
                op.apply(&mut values[acting.start * width..acting.end * width], width, scratch);
                patched = true;
            });
        }
        // A patch may overflow. What is found of it here reaches no later layer, and no cell of the KV cache.
        if patched && let Some(row) = rows.iter().zip(values.chunks_exact(width)).find(|(_, row)| !all_finite(row)) {
            return Err(RowFault::NonFinite { position: row.0.position.0 });
        }
        Ok(patched)
    }
}

/// What a panic said.
pub(crate) fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
}

impl Op {
    /// Patches `rows`, `[n, width]`.
    fn apply(&self, rows: &mut [f32], width: usize, scratch: &mut Scratch) {
        match self {
            Self::LowRank(op) if op.rank() >= GEMM_RANK && rows.len() / width >= GEMM_ROWS => {
                op.apply_together(rows, width, &mut scratch.projections);
            }
            Self::LowRank(op) => {
                rows.chunks_exact_mut(width).for_each(|row| op.apply_row(row, &mut scratch.projections));
            }
            Self::Rotate(op) => rows.chunks_exact_mut(width).for_each(|row| op.apply_row(row)),
        }
    }
}

impl LowRank {
    fn apply_row(&self, x: &mut [f32], projections: &mut Vec<f32>) {
        projections.clear();
        let columns = self.read.chunks_exact(x.len()).zip(self.offset.iter().zip(&self.response));
        projections.extend(columns.map(|(v, (offset, response))| response.at(dot(v, x) + offset)));
        if self.keep != 1.0 {
            x.iter_mut().for_each(|x| *x *= self.keep);
        }
        match &self.write {
            Write::Columns(columns) => {
                for (u, p) in columns.chunks_exact(x.len()).zip(&*projections) {
                    // About half of an autoencoder's hidden units are off.
                    if *p != 0.0 {
                        axpy(*p, u, x);
                    }
                }
            }
            Write::Scaled(scale) => axpy(*scale, projections, x),
        }
        if let Some(bias) = &self.bias {
            axpy(1.0, bias, x);
        }
    }

    /// [`apply_row`](Self::apply_row) of many rows as two matrix products.
    fn apply_together(&self, rows: &mut [f32], width: usize, projections: &mut Vec<f32>) {
        let (n, rank) = (rows.len() / width, self.rank());
        projections.resize(n * rank, 0.0);
        let (rows_n, width_n, rank_n) = (Dyn(n), Dyn(width), Dyn(rank));
        {
            let read = DMatrixView::from_slice_with_strides_generic(&self.read, rank_n, width_n, width_n, Dyn(1));
            let x = DMatrixView::from_slice_generic(rows, width_n, rows_n);
            let mut p = DMatrixViewMut::from_slice_generic(projections, rank_n, rows_n);
            p.gemm(1.0, &read, &x, 0.0);
        }
        for row in projections.chunks_exact_mut(rank) {
            for (p, (offset, response)) in row.iter_mut().zip(self.offset.iter().zip(&self.response)) {
                *p = response.at(*p + offset);
            }
        }
        match &self.write {
            Write::Columns(columns) => {
                let write = DMatrixView::from_slice_generic(columns, width_n, rank_n);
                let p = DMatrixView::from_slice_generic(projections, rank_n, rows_n);
                DMatrixViewMut::from_slice_generic(rows, width_n, rows_n).gemm(1.0, &write, &p, self.keep);
            }
            Write::Scaled(scale) => {
                rows.iter_mut().zip(&*projections).for_each(|(x, p)| *x = self.keep * *x + scale * p);
            }
        }
        if let Some(bias) = &self.bias {
            rows.chunks_exact_mut(width).for_each(|row| axpy(1.0, bias, row));
        }
    }
}

impl Rotate {
    fn apply_row(&self, x: &mut [f32]) {
        let v = &*self.direction;
        let p = dot(v, x);
        axpy(-p, v, x);
        let rho = dot(x, x).sqrt();
        if rho <= super::ON_AXIS * p.abs() {
            axpy(p, v, x);
            return;
        }
        let (along, across) = self.turned(p, rho);
        let scale = across / rho;
        x.iter_mut().zip(v).for_each(|(x, v)| *x = scale * *x + along * v);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::{Digest, Positions};
    use crate::program::{Condition, GuardInfo, Program, RowKind};
    use crate::tensor::{HiddenSize, SequenceId, TokenPosition};

    const LAYER: LayerIndex = LayerIndex(3);
    const WIDTH: usize = 4;

    /// Adds 1 to each of `n` values.
    fn adds_one(on_error: OnError, n: usize) -> Arc<Program> {
        let (read, offset, response) = (Box::default(), Box::default(), Box::default());
        let (write, bias) = (Write::Columns(Box::default()), Some(vec![1.0; n].into()));
        let op = LowRank { keep: 1.0, read, offset, response, write, bias };
        let condition = Condition { positions: Positions::All, when: None, first_position: true };
        let patches = vec![Patch { op: Op::LowRank(op), condition }];
        let guard = GuardInfo { name: "g".into(), content_hash: Digest::of(b""), on_error, message: None };
        Arc::new(Program {
            guards: vec![guard],
            width: HiddenSize(WIDTH),
            gates: Vec::new(),
            points: vec![HookPoint { layer: LAYER, readouts: Vec::new(), patches }],
        })
    }

    fn rows(sequences: &[i32]) -> Vec<Row> {
        let row = |(index, sequence): (usize, &i32)| Row {
            sequence: Some(SequenceId(*sequence)),
            position: TokenPosition(index as i32),
            kind: RowKind::Generated,
            index,
        };
        sequences.iter().enumerate().map(row).collect()
    }

    /// Runs rows of zeros, row 2 with `at_two` in its first value.
    fn run(sequences: &mut Sequences, at_two: f32) -> Vec<f32> {
        let rows = rows(&[0, 1, 1, 2]);
        sequences.begin(rows.iter().filter_map(|row| Some((row.sequence?, row.position, row.kind))));
        sequences.begin_rows(rows.len());
        let mut values = vec![0.0; rows.len() * WIDTH];
        values[2 * WIDTH] = at_two;
        let mut residual = ResidualMut::new(&mut values, WIDTH).unwrap();
        assert!(sequences.run(LAYER, &rows, &mut residual, &mut Scratch::default()).unwrap());
        values
    }

    #[test]
    fn a_panic_ends_the_sequence_that_it_came_of() {
        for on_error in [OnError::Block, OnError::Pass] {
            let mut sequences = Sequences::new(adds_one(OnError::Block, WIDTH));
            // A value more than a row has, which no compiled program adds.
            sequences.assign(SequenceId(1), adds_one(on_error, WIDTH + 1));
            let values = run(&mut sequences, 0.0);
            assert!(values[..WIDTH].iter().chain(&values[3 * WIDTH..]).all(|x| *x == 1.0), "{values:?}");
            let (layer, fault) = sequences.fault(SequenceId(1)).unwrap();
            assert!(*layer == LAYER && matches!(fault, RowFault::Panic { .. }), "{fault}");
            assert!([0, 2].iter().all(|sequence| sequences.fault(SequenceId(*sequence)).is_none()));
        }
    }

    #[test]
    fn a_row_that_is_not_finite_ends_its_sequence_and_spoils_no_other() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut sequences = Sequences::new(adds_one(OnError::Block, WIDTH));
            let values = run(&mut sequences, bad);
            assert!(values[WIDTH..3 * WIDTH].iter().all(|x| *x == 0.0), "{values:?}");
            assert!(values[..WIDTH].iter().chain(&values[3 * WIDTH..]).all(|x| *x == 1.0), "{values:?}");
            let fault = &sequences.fault(SequenceId(1)).unwrap().1;
            assert_eq!(*fault, RowFault::NonFinite { position: 2 });
            // It stays so until it is cleared.
            assert!(run(&mut sequences, 0.0)[WIDTH..2 * WIDTH].iter().all(|x| *x == 0.0));
            sequences.clear(SequenceId(1));
            assert!(run(&mut sequences, 0.0).iter().all(|x| *x == 1.0));
        }
    }
}
