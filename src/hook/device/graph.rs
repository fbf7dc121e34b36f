//! A program's hook point as ggml graphs.
//!
//! Precision: on GPUs a product of matrices rounds its inputs to ten bits (TF32 on CUDA; half precision on Metal and some Vulkan devices, where
//! values above 65504 overflow besides), whatever precision is asked for. Gates and patches of low rank go without: they are
//! made of element-wise products and sums over rows, in `f32`. A `switch` is too wide for that. There rows and matrices are scaled to be
//! about 1 before the product, so that nothing overflows.

use super::super::table::RawTensor;
use super::handles::{Backend, Buffer, Context};
use super::table::{DeviceTable, PREC_F32, RawGraph};
use crate::program::{HookPoint, LowRank, ON_AXIS, Op, Response, Rotate, Write};

type Tensor = *mut RawTensor;

/// Columns of a patch that go one by one.
const MAX_COLUMNS: usize = 32;
/// Rows up to which every GPU's product of a matrix and a few vectors is in `f32`: on CUDA three
/// (`ggml_cuda_should_use_mmvf`), on Vulkan and Metal eight.
const EXACT_ROWS: usize = 3;
/// Below what a row's mean square may be, so that a row of zeros divides by something.
const TINY: f32 = 1e-30;

/// What a hook point's graphs read besides the residual, on the device.
pub(super) struct Constants {
    /// `[n_readouts, width]`
    readouts: Option<Tensor>,
    patches: Vec<PatchConstants>,
    // Freed last to first made: tensors, then what they lie in.
    _context: Context,
    _buffer: Option<Buffer>,
}

enum PatchConstants {
    Columns {
        /// `[k, width]` both
        read: Option<Tensor>,
        write: Option<Tensor>,
        bias: Option<Tensor>,
    },
    Matrix(Matrix),
    Rotate {
        direction: Tensor,
    },
}

/// A patch with a product of matrices.
struct Matrix {
    /// `V`, each row divided by its largest value: `[k, width]`.
    read: Tensor,
    /// What the rows were divided by, `[k]`.
    read_scale: Tensor,
    /// `c`, `[k]`
    offset: Tensor,
    write: Option<MatrixWrite>,
    bias: Option<Tensor>,
}

struct MatrixWrite {
    /// `U`, each row divided by its largest value: `[width, k]`.
    rows: Tensor,
    /// What the rows were divided by, `[width]`.
    scale: Tensor,
}

/// Tensors to be, with their values.
struct Uploads<'a> {
    table: &'static DeviceTable,
    context: &'a Context,
    values: Vec<(Tensor, std::borrow::Cow<'a, [f32]>)>,
}

impl<'a> Uploads<'a> {
    /// `values` as rows of `width`; `None` where there are none.
    fn add(&mut self, values: impl Into<std::borrow::Cow<'a, [f32]>>, width: usize) -> Option<Tensor> {
        let values = values.into();
        let n_rows = values.len().checked_div(width).filter(|n_rows| *n_rows > 0)?;
        let tensor = self.context.tensor(width, n_rows);
        self.values.push((tensor, values));
        Some(tensor)
    }

    fn upload(self, backend: &Backend) -> Option<Option<Buffer>> {
        if self.values.is_empty() {
            return Some(None);
        }
        let buffer = self.context.allocate(backend)?;
        for (tensor, values) in &self.values {
            // SAFETY: `add` made the tensor for exactly these values, and it has memory now.
            unsafe { (self.table.write)(*tensor, values.as_ptr().cast(), 0, size_of_val(&**values)) }
        }
        Some(Some(buffer))
    }
}

/// Rows of `width`, each divided by its largest absolute value, and what they were divided by.
fn normalized(rows: impl Iterator<Item = Vec<f32>>) -> (Vec<f32>, Vec<f32>) {
    let (mut values, mut scales) = (Vec::new(), Vec::new());
    for row in rows {
        let largest = row.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let scale = if largest > 0.0 { largest } else { 1.0 };
        values.extend(row.iter().map(|value| value / scale));
        scales.push(scale);
    }
    (values, scales)
}

/// Why a point can't be put on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unfit {
    /// Its memory is full.
    Memory,
    /// It lacks an operation that a patch needs.
    Operation,
}

impl Constants {
    pub fn new(table: &'static DeviceTable, backend: &Backend, point: &HookPoint, width: usize) -> Result<Self, Unfit> {
        // At most six tensors a patch.
        let context = Context::new(table, 6 * point.patches.len() + 2, 0).ok_or(Unfit::Memory)?;
        let mut uploads = Uploads { table, context: &context, values: Vec::new() };
        let directions: Vec<f32> = point.readouts.iter().flat_map(|readout| &*readout.direction).copied().collect();
        let readouts = uploads.add(directions, width);
        let mut patches = Vec::with_capacity(point.patches.len());
        for patch in &point.patches {
            patches.push(match &patch.op {
                Op::LowRank(op) if op.rank() <= MAX_COLUMNS => PatchConstants::Columns {
                    read: uploads.add(&*op.read, width),
                    write: match &op.write {
                        Write::Columns(columns) if op.gain == 1.0 => uploads.add(&**columns, width),
                        Write::Columns(columns) => {
                            uploads.add(columns.iter().map(|value| op.gain * value).collect::<Vec<_>>(), width)
                        }
                        // Of a model that is not wider than that.
                        Write::Identity => uploads.add(diagonal(op.gain, width), width),
                    },
                    bias: op.bias.as_deref().and_then(|bias| uploads.add(bias, width)),
                },
                Op::LowRank(op) => {
                    PatchConstants::Matrix(Matrix::new(op, width, &mut uploads).ok_or(Unfit::Operation)?)
                }
                Op::Rotate(op) => {
                    PatchConstants::Rotate { direction: uploads.add(&*op.direction, width).ok_or(Unfit::Operation)? }
                }
            });
        }
        let buffer = uploads.upload(backend).ok_or(Unfit::Memory)?;
        Ok(Self { readouts, patches, _context: context, _buffer: buffer })
    }
}

fn diagonal(value: f32, width: usize) -> Vec<f32> {
    let mut matrix = vec![0.0; width * width];
    matrix.iter_mut().step_by(width + 1).for_each(|x| *x = value);
    matrix
}

impl Matrix {
    /// `None` where the columns' responses differ: the compiler makes no such patch of this rank.
    fn new<'a>(op: &'a LowRank, width: usize, uploads: &mut Uploads<'a>) -> Option<Self> {
        let k = op.rank();
        let first = op.response.first()?;
        if !matches!(first, Response::Identity | Response::Relu) || op.response.iter().any(|other| other != first) {
            return None;
        }
        let (read, read_scale) = normalized(op.read.chunks_exact(width).map(<[f32]>::to_vec));
        let write = match &op.write {
            Write::Identity => None,
            Write::Columns(columns) => {
                let row = |out: usize| (0..k).map(|column| columns[column * width + out]).collect();
                let (rows, scale) = normalized((0..width).map(row));
                Some(MatrixWrite { rows: uploads.add(rows, k)?, scale: uploads.add(scale, width)? })
            }
        };
        Some(Self {
            read: uploads.add(read, width)?,
            read_scale: uploads.add(read_scale, k)?,
            offset: uploads.add(&*op.offset, k)?,
            write,
            bias: op.bias.as_deref().and_then(|bias| uploads.add(bias, width)),
        })
    }
}

/// A graph on the residual, without memory for what it computes on the way.
pub(super) struct Graph {
    pub graph: *mut RawGraph,
    /// `[n_rows, n_readouts]`, of a graph that reads gates.
    pub scores: Option<Tensor>,
    /// `[n_rows]`: 0 where a row is finite, of a graph that checks rows.
    pub check: Option<Tensor>,
    /// `[n_patches, n_rows]`: 1 where a patch acts, of a graph that patches.
    pub mask: Option<Tensor>,
    // Tensors first, then what they lie in.
    _context: Context,
    _buffer: Option<Buffer>,
}

/// What a graph does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// Scores of the gates. They are not finite where a row is not.
    Read,
    /// Whether rows are finite.
    Check,
    /// The patches, then the check: no patch makes a row finite that was not, and one may overflow.
    Patch,
}

impl Graph {
    /// A graph on `residual` (`[n_rows, width]`), which keeps the address that it has now.
    ///
    /// # Safety
    /// `residual` must be a tensor with memory, of the table's llama.cpp, contiguous and of 32-bit floats.
    pub unsafe fn new(
        table: &'static DeviceTable,
        backend: &Backend,
        point: &HookPoint,
        constants: &Constants,
        residual: *const RawTensor,
        [n_rows, width]: [usize; 2],
        task: Task,
    ) -> Result<Self, Unfit> {
        let capacity = capacity(point);
        // The mask needs memory that lasts from run to run, so it has a context of its own, which it shares with the residual's leaf.
        let context = Context::new(table, capacity + 2, capacity).ok_or(Unfit::Memory)?;
        let x = context.tensor(width, n_rows);
        // SAFETY: the residual has memory at this address of this buffer, for as many values; `x` is new.
        unsafe {
            let (buffer, data) = (table.buffer_of(residual), (table.data)(residual));
            if (table.allocate)(buffer, x, data) != super::table::SUCCESS {
                return Err(Unfit::Memory);
            }
        }
        let (mut mask, mut buffer) = (None, None);
        if task == Task::Patch && !point.patches.is_empty() {
            mask = Some(context.tensor(n_rows, point.patches.len()));
            buffer = Some(context.allocate(backend).ok_or(Unfit::Memory)?);
        }
        let build = Build { table, context: &context, n_rows, width };
        // SAFETY: the context has room for the graph, and everything in it is made by `build`, in the same context.
        let graph = unsafe { (table.new_graph)(context.raw(), capacity, false) };
        let expand = |tensor: Tensor| {
            // SAFETY: as above.
            unsafe { (table.expand)(graph, tensor) }
        };
        let output = |tensor: Tensor| {
            // SAFETY: as above.
            unsafe { (table.set_output)(tensor) };
            expand(tensor);
            tensor
        };
        let scores = constants.readouts.filter(|_| task == Task::Read);
        let scores = scores.map(|readouts| output(build.scores(readouts, x, point.readouts.len())));
        let mut x = x;
        if let Some(mask) = mask {
            for (index, (patch, constants)) in point.patches.iter().zip(&constants.patches).enumerate() {
                let mask = build.view(mask, [1, n_rows], index * n_rows);
                x = build.patch(&patch.op, constants, x, mask);
            }
            expand(x);
        }
        let check = (task != Task::Read).then(|| output(build.sum_rows(build.scale(x, 0.0))));
        build.all_supported(graph, backend)?;
        Ok(Self { graph, scores, check, mask, _context: context, _buffer: buffer })
    }
}

/// Tensors that a graph of `point` may have: more than [`Build`] makes.
fn capacity(point: &HookPoint) -> usize {
    let rank = |op: &Op| match op {
        Op::LowRank(op) if op.rank() <= MAX_COLUMNS => op.rank(),
        Op::LowRank(_) | Op::Rotate(_) => 4,
    };
    let patches: usize = point.patches.iter().map(|patch| 32 + 16 * rank(&patch.op)).sum();
    32 + 4 * point.readouts.len() + patches
}

/// Makes nodes.
struct Build<'a> {
    table: &'static DeviceTable,
    context: &'a Context,
    n_rows: usize,
    width: usize,
}

// Every operand below was made in the same context or lies in the point's constants, and shapes fit as the comments say: ggml's conditions.
macro_rules! operations {
    ($($name:ident($($operand:ident),*);)*) => {$(
        fn $name(&self, $($operand: Tensor),*) -> Tensor {
            // SAFETY: see above.
            unsafe { (self.table.$name)(self.context.raw(), $($operand),*) }
        }
    )*};
}

impl Build<'_> {
    operations! {
        add(a, b);
        add_inplace(a, b);
        sub(a, b);
        mul(a, b);
        div(a, b);
        sum_rows(a);
        sqr(a);
        sqrt(a);
        abs(a);
        relu(a);
        step(a);
    }

    /// `s·a + b`
    fn affine(&self, a: Tensor, s: f32, b: f32) -> Tensor {
        // SAFETY: see above.
        unsafe { (self.table.scale_bias)(self.context.raw(), a, s, b) }
    }

    fn scale(&self, a: Tensor, s: f32) -> Tensor {
        self.affine(a, s, 0.0)
    }

    /// `n_rows` rows of `width` values of `a`, from value number `start` on.
    fn view(&self, a: Tensor, [width, n_rows]: [usize; 2], start: usize) -> Tensor {
        let (row, start) = (width * size_of::<f32>(), start * size_of::<f32>());
        // SAFETY: see above; the values lie in `a`.
        unsafe { (self.table.view_2d)(self.context.raw(), a, width as i64, n_rows as i64, row, start) }
    }

    /// `row` (`[width]`) for every row of `x`.
    fn rows_of(&self, row: Tensor, x: Tensor) -> Tensor {
        if self.n_rows == 1 {
            return row;
        }
        // SAFETY: see above.
        unsafe { (self.table.repeat)(self.context.raw(), row, x) }
    }

    /// `b·aᵀ` for `a` of `[m, k]` and `b` of `[n_rows, k]`.
    fn product(&self, a: Tensor, b: Tensor) -> Tensor {
        // SAFETY: see above.
        unsafe {
            let product = (self.table.mul_mat)(self.context.raw(), a, b);
            (self.table.mul_mat_set_prec)(product, PREC_F32);
            product
        }
    }

    /// `v·x` of every row: `[n_rows, 1]`.
    fn project(&self, v: Tensor, x: Tensor) -> Tensor {
        self.sum_rows(self.mul(x, v))
    }

    /// `[n_rows, n_readouts]`
    fn scores(&self, readouts: Tensor, x: Tensor, n_readouts: usize) -> Tensor {
        // CUDA's vector kernel wants rows of an even length.
        if self.n_rows <= EXACT_ROWS && self.width.is_multiple_of(2) {
            return self.product(readouts, x);
        }
        let score = |index: usize| self.project(self.view(readouts, [self.width, 1], index * self.width), x);
        (1..n_readouts).fold(score(0), |scores, index| {
            // SAFETY: see above; both have `n_rows` rows.
            unsafe { (self.table.concat)(self.context.raw(), scores, score(index), 0) }
        })
    }

    /// `x` after a patch that acts where `mask` (`[n_rows, 1]`) is 1, in place.
    fn patch(&self, op: &Op, constants: &PatchConstants, x: Tensor, mask: Tensor) -> Tensor {
        let change = match (op, constants) {
            (Op::LowRank(op), PatchConstants::Columns { read, write, bias }) => {
                self.columns(op, *read, *write, *bias, x, mask)
            }
            (Op::LowRank(op), PatchConstants::Matrix(matrix)) => Some(self.mul(self.matrix(op, matrix, x), mask)),
            (Op::Rotate(op), PatchConstants::Rotate { direction }) => Some(self.rotate(op, *direction, x, mask)),
            _ => unreachable!("a patch's constants are of its own kind"),
        };
        change.map_or(x, |change| self.add_inplace(x, change))
    }

    /// `mask ⊙ ((κ − 1)x + γU g(Vx + c) + b)`, column by column; `None` where that is nothing.
    fn columns(
        &self,
        op: &LowRank,
        read: Option<Tensor>,
        write: Option<Tensor>,
        bias: Option<Tensor>,
        x: Tensor,
        mask: Tensor,
    ) -> Option<Tensor> {
        let mut terms = Vec::with_capacity(op.rank() + 2);
        if op.keep != 1.0 {
            terms.push(self.mul(x, self.scale(mask, op.keep - 1.0)));
        }
        for (column, (offset, response)) in op.offset.iter().zip(&op.response).enumerate() {
            let (Some(read), Some(write)) = (read, write) else { break };
            let row = |matrix| self.view(matrix, [self.width, 1], column * self.width);
            let p = self.project(row(read), x);
            let shifted = || if *offset == 0.0 { p } else { self.affine(p, 1.0, *offset) };
            let g = match response {
                Response::Identity => shifted(),
                Response::Relu => self.relu(shifted()),
                Response::Clip { low, high } => {
                    // A value of its own: some ggml clamp in place.
                    let clipped = self.affine(p, 1.0, *offset);
                    // SAFETY: see above.
                    let clipped = unsafe { (self.table.clamp)(self.context.raw(), clipped, *low, *high) };
                    self.sub(clipped, shifted())
                }
            };
            terms.push(self.mul(self.rows_of(row(write), x), self.mul(g, mask)));
        }
        if let Some(bias) = bias {
            terms.push(self.mul(self.rows_of(bias, x), mask));
        }
        terms.into_iter().reduce(|sum, term| self.add(sum, term))
    }

    /// The root of each row's mean square, for rows of `width`: `[n_rows, 1]`.
    fn magnitude(&self, a: Tensor, width: usize) -> Tensor {
        self.sqrt(self.affine(self.sum_rows(self.sqr(a)), 1.0 / width as f32, TINY))
    }

    /// `b·(diag(scale)·a)ᵀ`, in `f32` as far as the device can.
    fn scaled_product(&self, a: Tensor, scale: Tensor, b: Tensor, k: usize) -> Tensor {
        if self.n_rows <= EXACT_ROWS {
            return self.mul(self.product(a, b), scale);
        }
        let magnitude = self.magnitude(b, k);
        self.mul(self.mul(self.product(a, self.div(b, magnitude)), scale), magnitude)
    }

    /// `(κ − 1)x + γU g(Vx + c) + b`
    fn matrix(&self, op: &LowRank, matrix: &Matrix, x: Tensor) -> Tensor {
        let p = self.scaled_product(matrix.read, matrix.read_scale, x, self.width);
        let p = self.add(p, matrix.offset);
        let g = if op.response.first() == Some(&Response::Relu) { self.relu(p) } else { p };
        let written = |write: &MatrixWrite| self.scaled_product(write.rows, write.scale, g, op.rank());
        let written = matrix.write.as_ref().map_or(g, written);
        let mut sum = if op.gain == 1.0 && matrix.write.is_some() { written } else { self.scale(written, op.gain) };
        if op.keep != 1.0 {
            sum = self.add(sum, self.scale(x, op.keep - 1.0));
        }
        matrix.bias.map_or(sum, |bias| self.add(sum, bias))
    }

    /// `mask ⊙ (x turned − x)`: see [`Rotate`]. Where there is a choice for a row, both are computed and one is taken 0 times.
    fn rotate(&self, op: &Rotate, direction: Tensor, x: Tensor, mask: Tensor) -> Tensor {
        let p = self.project(direction, x);
        let directions = self.rows_of(direction, x);
        // Of one row, `rows_of` gives the constant itself, and a product may not be written there: `mul` makes a new tensor.
        let r = self.sub(x, self.mul(directions, p));
        let rho = self.sqrt(self.sum_rows(self.sqr(r)));
        let turns = self.step(self.sub(rho, self.scale(self.abs(p), ON_AXIS)));
        let acts = self.mul(turns, mask);
        let across = self.sub(self.scale(rho, op.cos), self.scale(p, op.sin));
        let within = self.step(across);
        let norm = self.sqrt(self.add(self.sqr(p), self.sqr(rho)));
        let turned = self.add(self.scale(p, op.cos), self.scale(rho, op.sin));
        let at_the_end = self.mul(self.affine(within, -1.0, 1.0), self.scale(norm, 1f32.copysign(op.sin)));
        let along = self.add(self.mul(within, turned), at_the_end);
        // A row on the axis has no ρ to divide by, and stays.
        let divisor = self.add(rho, self.affine(turns, -1.0, 1.0));
        let stretch = self.affine(self.div(self.relu(across), divisor), 1.0, -1.0);
        let sideways = self.mul(r, self.mul(stretch, acts));
        self.add(sideways, self.mul(directions, self.mul(self.sub(along, p), acts)))
    }

    /// Whether the device has every operation of `graph`.
    fn all_supported(&self, graph: *mut RawGraph, backend: &Backend) -> Result<(), Unfit> {
        // SAFETY: the graph is complete, and its nodes are tensors of it.
        let supported = unsafe {
            (0..(self.table.n_nodes)(graph))
                .all(|index| (self.table.supports_op)(backend.raw(), (self.table.node)(graph, index)))
        };
        if supported { Ok(()) } else { Err(Unfit::Operation) }
    }
}
