//! Programs on residual rows in host memory, in place; decoding allocates nothing once the buffers have grown.

use super::{Condition, HookPoint, LowRank, Op, Patch, Program, Rotate, Row, Sequences, Write};
use crate::guard::OnError;
use crate::tensor::{LayerIndex, ResidualMut, all_finite, axpy, axpy4, dot};
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

/// Rows that are patched together: as many as stay in the cache while a wide patch passes by.
const BLOCK_ROWS: usize = 32;

/// Columns of `U` that are added to one row before the next: as many as stay in the cache.
const TILE_COLUMNS: usize = 64;

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
            sequences.read_group(group.point, group.rows, residual.rows_mut(group.range))
        });
        if outcome.is_ok() {
            changed |= self.patch(layer, rows, residual, scratch, &mut failed);
        }
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

    /// Calls `act` with each run of neighbouring rows that a patch with this condition, of the program of all of them, acts on.
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

    /// Reads the gates of a hook point for rows of one sequence, or of none, `[rows.len(), width]`.
    fn read_group(&mut self, point: &HookPoint, rows: &[Row], values: &[f32]) -> Result<(), RowFault> {
        for (row, values) in rows.iter().zip(values.chunks_exact(values.len() / rows.len())) {
            if !all_finite(values) {
                return Err(RowFault::NonFinite { position: row.position.0 });
            }
            for readout in &point.readouts {
                self.read(row, readout.gate, dot(&readout.direction, values));
            }
        }
        Ok(())
    }

    /// Patches rows, those of several sequences together where they run one program: a wide patch is then read from memory once for all of them.
    /// Returns whether any row was changed. Faults are latched as in [`each_group`](Self::each_group).
    fn patch(
        &mut self,
        layer: LayerIndex,
        rows: &[Row],
        residual: &mut ResidualMut<'_>,
        scratch: &mut Scratch,
        failed: &mut Vec<Range<usize>>,
    ) -> bool {
        let width = residual.width();
        let mut changed = false;
        let mut next = 0;
        while next < rows.len() {
            let start = next;
            let Some(program) = self.patching(&rows[start], layer).map(Arc::clone) else {
                next += 1;
                continue;
            };
            let same = |row: &&Row| {
                // Most often: a prompt.
                row.sequence == rows[start].sequence
                    || self.patching(row, layer).is_some_and(|other| Arc::ptr_eq(other, &program))
            };
            next += rows[start..].iter().take_while(same).count();
            let (rows, values) = (&rows[start..next], residual.rows_mut(start..next));
            let patches = program.point(layer).map(|point| &*point.patches).unwrap_or_default();
            let outcome = catch_unwind(AssertUnwindSafe(|| self.patch_group(patches, rows, values, width, scratch)));
            let panic = match outcome {
                Ok(false) => continue,
                Ok(true) => None,
                Err(payload) => Some(RowFault::Panic { message: panic_message(&*payload) }),
            };
            changed = true;
            let mut first = 0;
            for group in rows.chunk_by(|a, b| a.sequence == b.sequence) {
                let own = first..first + group.len();
                first = own.end;
                // A patch may overflow. What is found of it here reaches no later layer, and no cell of the KV cache.
                let overflow = || {
                    let values = values[own.start * width..own.end * width].chunks_exact(width);
                    let (row, _) = group.iter().zip(values).find(|(_, values)| !all_finite(values))?;
                    Some(RowFault::NonFinite { position: row.position.0 })
                };
                if let Some(fault) = panic.clone().or_else(overflow) {
                    self.fail(group[0].sequence, layer, &fault);
                    if program.on_error() == OnError::Block {
                        failed.push(start + own.start..start + own.end);
                    }
                }
            }
        }
        changed
    }

    /// The program that patches `row` at `layer`, if one does.
    fn patching(&self, row: &Row, layer: LayerIndex) -> Option<&Arc<Program>> {
        let program = self.program_of_rows(row.sequence).filter(|_| !self.has_failed(row.sequence))?;
        let patches = !program.point(layer)?.patches.is_empty();
        patches.then_some(program)
    }

    /// Runs `patches` on rows of sequences whose program they are of. Returns whether one acted.
    fn patch_group(
        &self,
        patches: &[Patch],
        rows: &[Row],
        values: &mut [f32],
        width: usize,
        scratch: &mut Scratch,
    ) -> bool {
        let mut patched = false;
        for Patch { op, condition } in patches {
            self.each_acting(condition, rows, |acting| {
                op.apply(&mut values[acting.start * width..acting.end * width], width, scratch);
                patched = true;
            });
        }
        patched
    }
}

/// What a panic said.
pub fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
}

impl Op {
    /// Patches `rows`, `[n, width]`.
    fn apply(&self, rows: &mut [f32], width: usize, scratch: &mut Scratch) {
        match self {
            Self::LowRank(op) => {
                let blocks = rows.chunks_mut(BLOCK_ROWS * width);
                blocks.for_each(|rows| op.apply_rows(rows, width, &mut scratch.projections));
            }
            Self::Rotate(op) => rows.chunks_exact_mut(width).for_each(|row| op.apply_row(row)),
        }
    }
}

impl LowRank {
    /// Patches rows, `[n, width]`, each to the same bits as alone: every column is read once, for all of them.
    fn apply_rows(&self, rows: &mut [f32], width: usize, projections: &mut Vec<f32>) {
        let rank = self.rank();
        projections.resize(rows.len() / width * rank, 0.0);
        self.project(rows, width, projections);
        if self.keep != 1.0 {
            rows.iter_mut().for_each(|x| *x *= self.keep);
        }
        if self.gain != 1.0 {
            projections.iter_mut().for_each(|p| *p *= self.gain);
        }
        match &self.write {
            Write::Columns(columns) => {
                for (tile, columns) in columns.chunks(TILE_COLUMNS * width).enumerate() {
                    let first = tile * TILE_COLUMNS;
                    let of_tile = first..first + columns.len() / width;
                    for (x, p) in rows.chunks_exact_mut(width).zip(projections.chunks_exact(rank)) {
                        add_columns(&p[of_tile.clone()], columns, x);
                    }
                }
            }
            Write::Identity => rows.iter_mut().zip(&*projections).for_each(|(x, p)| *x += p),
        }
        if let Some(bias) = &self.bias {
            rows.chunks_exact_mut(width).for_each(|row| axpy(1.0, bias, row));
        }
    }

    /// `g(Vx + c)` of each of `rows`, `[n, rank]`.
    fn project(&self, rows: &[f32], width: usize, projections: &mut [f32]) {
        let rank = self.rank();
        for (column, v) in self.read.chunks_exact(width).enumerate() {
            let (response, offset) = (self.response[column], self.offset[column]);
            for (row, x) in rows.chunks_exact(width).enumerate() {
                projections[row * rank + column] = response.at(dot(v, x) + offset);
            }
        }
    }
}

/// `x += Σ pᵢ uᵢ` over `columns`, `[p.len(), width]`, in their order. About half of an autoencoder's hidden units are off, and their columns are
/// not read.
fn add_columns(p: &[f32], columns: &[f32], x: &mut [f32]) {
    let width = x.len();
    let mut on = p.iter().copied().zip(columns.chunks_exact(width)).filter(|(p, _)| *p != 0.0);
    loop {
        match [on.next(), on.next(), on.next(), on.next()] {
            [Some((p0, u0)), Some((p1, u1)), Some((p2, u2)), Some((p3, u3))] => {
                axpy4([p0, p1, p2, p3], [u0, u1, u2, u3], x);
            }
            rest => {
                rest.into_iter().flatten().for_each(|(p, u)| axpy(p, u, x));
                return;
            }
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
    use crate::guard::Digest;
    use crate::program::{Condition, GuardInfo, Positions, Program, Response, RowKind};
    use crate::tensor::{HiddenSize, SequenceId, TokenPosition};

    const LAYER: LayerIndex = LayerIndex(3);
    const WIDTH: usize = 4;

    /// Adds 1 to each of `n` values.
    fn adds_one(on_error: OnError, n: usize) -> Arc<Program> {
        let (read, offset, response) = (Arc::default(), Box::default(), Box::default());
        let (write, bias) = (Write::Columns(Arc::default()), Some(vec![1.0; n].into()));
        let op = LowRank { keep: 1.0, read, offset, response, gain: 1.0, write, bias };
        let condition = Condition { positions: Positions::All, when: None, first_position: true };
        let patches = vec![Patch { op: Op::LowRank(op), condition }];
        let guard = GuardInfo { name: "g".into(), content_hash: Digest::of(b""), on_error, message: None };
        Arc::new(Program {
            guards: vec![guard],
            width: HiddenSize(WIDTH),
            gates: Vec::new(),
            points: vec![HookPoint { layer: LAYER, readouts: Vec::new(), patches }],
            texts: Vec::new(),
            dials: Arc::new([]),
            strengths: Vec::new(),
        })
    }

    fn rows(sequences: &[i32]) -> Vec<Row> {
        let row = |(index, sequence): (usize, &i32)| Row {
            sequence: Some(SequenceId(*sequence)),
            position: TokenPosition(index as i32),
            kind: RowKind::Generated,
            index,
            matched: 0,
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

    /// A patch of several columns that reads, answers and writes.
    fn low_rank(write: Write, keep: f32) -> LowRank {
        let values = |n: usize, by: f32| (0..n).map(|i| (i as f32 * by).sin()).collect::<Box<[f32]>>();
        let gain = if keep == 1.0 { 1.0 } else { 0.6 };
        let rank = if let Write::Columns(columns) = &write { columns.len() / WIDTH } else { WIDTH };
        let responses = [Response::Relu, Response::Identity, Response::Clip { low: -0.2, high: 0.3 }];
        LowRank {
            keep,
            read: values(rank * WIDTH, 0.7).into(),
            offset: values(rank, 0.3),
            response: responses.into_iter().cycle().take(rank).collect(),
            gain,
            write,
            bias: Some(values(WIDTH, 1.1)),
        }
    }

    #[test]
    fn rows_of_many_sequences_have_the_same_bits_together_and_alone() {
        let columns = (0..3 * WIDTH).map(|i| (i as f32 * 0.9).cos()).collect();
        let wide = (0..71 * WIDTH).map(|i| (i as f32 * 0.9).cos()).collect();
        let columns = [(columns, 1.0), (wide, 0.4)].map(|(columns, keep)| low_rank(Write::Columns(columns), keep));
        for op in columns.into_iter().chain([low_rank(Write::Identity, 0.4)]) {
            let mut program = Program::clone(&adds_one(OnError::Block, WIDTH));
            program.points[0].patches[0].op = Op::LowRank(op);
            let program = Arc::new(program);
            let rows = rows(&[0, 1, 1, 2]);
            let before: Vec<f32> = (0..rows.len() * WIDTH).map(|i| (i as f32 * 0.31).sin()).collect();
            let run = |rows: &[Row], values: &[f32]| {
                let mut sequences = Sequences::new(Arc::clone(&program));
                sequences.begin(rows.iter().filter_map(|row| Some((row.sequence?, row.position, row.kind))));
                sequences.begin_rows(rows.len());
                let mut values = values.to_vec();
                let mut residual = ResidualMut::new(&mut values, WIDTH).unwrap();
                assert!(sequences.run(LAYER, rows, &mut residual, &mut Scratch::default()).unwrap());
                values
            };
            let alone = rows.iter().zip(before.chunks_exact(WIDTH));
            let alone: Vec<f32> = alone.flat_map(|(row, values)| run(std::slice::from_ref(row), values)).collect();
            assert!(alone != before && run(&rows, &before) == alone);
        }
    }

    #[test]
    fn a_patch_that_overflows_ends_its_sequence_there() {
        let mut program = Program::clone(&adds_one(OnError::Block, WIDTH));
        let Op::LowRank(op) = &mut program.points[0].patches[0].op else { unreachable!() };
        op.bias = Some(vec![f32::MAX; WIDTH].into());
        let mut sequences = Sequences::new(Arc::new(program));
        let values = run(&mut sequences, f32::MAX);
        assert_eq!(sequences.fault(SequenceId(1)).unwrap().1, RowFault::NonFinite { position: 2 });
        assert!(values[WIDTH..3 * WIDTH].iter().all(|x| *x == 0.0), "{values:?}");
        assert!(values[..WIDTH].iter().chain(&values[3 * WIDTH..]).all(|x| *x == f32::MAX), "{values:?}");
        assert!([0, 2].iter().all(|sequence| sequences.fault(SequenceId(*sequence)).is_none()));
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
