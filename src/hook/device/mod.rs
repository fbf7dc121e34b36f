//! Programs on residuals where they lie: by ggml graphs of the guard's own, on the backend of the residual's own device.
//!
//! Only scores of gates and masks of rows cross between device and host. The gates themselves, and which rows a patch acts on, are
//! [`Sequences`]' business as for every executor.
//!
//! The graphs run on a backend (a stream) made here for the residual's device: llama.cpp too makes one a context, and has synchronised its own
//! before it shows the tensor, and `ggml_backend_graph_compute` returns when ours is done. The residual is a leaf at its own address,
//! which the last node of a patch writes.
//!
//! A graph is one program's, and its failure ends the sequences of that program alone. Rows of others are as they were: the mask leaves them, and
//! ggml computes nodes in order and none after one that fails.

mod graph;
mod handles;
mod table;

pub use table::DeviceTable;

use super::executor::{CopyExecutor, Executor, ExecutorKind};
use super::table::Tensor;
use crate::program::{Group, Program, Row, RowFault, Sequences};
use crate::tensor::LayerIndex;
use graph::{Constants, Graph, Task, Unfit};
use handles::{Allocator, Backend};
use std::ops::Range;
use std::sync::{Arc, Weak};
use table::{DEVICE_CPU, DEVICE_META, RawBuffer, RawDevice, SUCCESS};

/// Graphs that are kept of one program's hook point: reading and patching, of a token and of a few sizes of prompt.
const MAX_GRAPHS: usize = 12;

/// Runs programs on the device where the residual lies, the CPU too; by copy where that device lacks an operation.
#[derive(Default)]
pub struct DeviceExecutor {
    devices: Vec<Device>,
    copy: CopyExecutor,
    copied: bool,
    jobs: Vec<Job>,
    failed: Vec<Range<usize>>,
}

/// One program's part in one run.
struct Job {
    program: Arc<Program>,
    /// `[n_rows, n_readouts]`
    scores: Vec<f32>,
    /// `[n_patches, n_rows]`: 1 where a patch acts.
    mask: Vec<f32>,
    /// `[n_rows]`: 0 where a row is finite. Empty where the scores tell, or nothing was checked.
    check: Vec<f32>,
    /// What kept a graph of it from being computed.
    fault: Option<RowFault>,
}

struct Device {
    raw: *mut RawDevice,
    points: Vec<Point>,
    arena: Arena,
    // Last: what lies on the device goes before it.
    backend: Backend,
}

/// Memory for what graphs compute on the way, one after the other in the same.
struct Arena {
    /// `None` after one has failed, until there is another.
    allocator: Option<Allocator>,
    /// Changes when the memory moves: graphs from before it point to where it was.
    generation: u64,
}

/// A program's hook point on a device.
struct Point {
    program: Weak<Program>,
    layer: LayerIndex,
    // Graphs read the constants.
    graphs: Vec<CachedGraph>,
    constants: Result<Constants, Unfit>,
}

/// What a graph was made for. An address may be another tensor's in the meantime: it is as good as the first, if it lies in the same buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    task: Task,
    n_rows: usize,
    buffer: *mut RawBuffer,
    data: usize,
}

struct CachedGraph {
    key: Key,
    /// Of the arena that it has its memory in.
    generation: Option<u64>,
    /// What its mask holds.
    mask: Vec<f32>,
    graph: Graph,
}

// SAFETY: the pointers in it belong to it (handles), or are devices, which ggml keeps for the life of the process. ggml lets a backend be used
// from any thread, one at a time, and all use is through `&mut self`. Addresses of residuals are compared before they are used.
unsafe impl Send for DeviceExecutor {}

impl std::fmt::Debug for DeviceExecutor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceExecutor")
            .field("devices", &self.devices.len())
            .field("copied", &self.copied)
            .finish_non_exhaustive()
    }
}

impl Executor for DeviceExecutor {
    fn kind(&self) -> ExecutorKind {
        if self.copied { ExecutorKind::Copy } else { ExecutorKind::Device }
    }

    fn run(
        &mut self,
        layer: LayerIndex,
        rows: &[Row],
        sequences: &mut Sequences,
        residual: &mut Tensor<'_>,
    ) -> Result<(), RowFault> {
        let width = residual.n_elements().checked_div(rows.len()).unwrap_or(0);
        self.find_jobs(layer, rows, width, sequences);
        let place = self.place(layer, [rows.len(), width], residual);
        self.copied = place.is_none();
        let outcome = match place {
            None => self.copy.run(layer, rows, sequences, residual),
            Some(place) => self.run_on(place, layer, rows, sequences, residual),
        };
        // A program that nothing else holds is not kept alive by what it did last.
        self.jobs.clear();
        outcome
    }
}

/// Where a residual lies.
#[derive(Clone, Copy)]
struct Place {
    table: &'static DeviceTable,
    /// Index into the executor's devices.
    device: usize,
    shape: [usize; 2],
}

impl DeviceExecutor {
    /// The programs of `rows` that have a hook point here, and a sequence that has not failed.
    fn find_jobs(&mut self, layer: LayerIndex, rows: &[Row], width: usize, sequences: &Sequences) {
        self.jobs.clear();
        for group in rows.chunk_by(|a, b| a.sequence == b.sequence) {
            let sequence = group[0].sequence;
            let program = sequences.program_of_rows(sequence).filter(|_| !sequences.has_failed(sequence));
            let Some(program) = program else { continue };
            // Another width is an error of the run, and no graph is made for it.
            if program.point(layer).is_none()
                || program.width().0 != width
                || self.jobs.iter().any(|job| Arc::ptr_eq(&job.program, program))
            {
                continue;
            }
            let program = Arc::clone(program);
            self.jobs.push(Job { program, scores: Vec::new(), mask: Vec::new(), check: Vec::new(), fault: None });
        }
    }

    /// The device of the residual, with all that the programs need put there; `None` where the residual must go by copy. Nothing is computed
    /// yet, so that there is still a choice.
    fn place(&mut self, layer: LayerIndex, shape: [usize; 2], residual: &Tensor<'_>) -> Option<Place> {
        let table = residual.table().device?;
        // SAFETY: the residual is valid while llama.cpp shows it.
        let device = unsafe { self.device_of(table, residual)? };
        let place = Place { table, device, shape };
        for index in 0..self.jobs.len() {
            let program = Arc::clone(&self.jobs[index].program);
            let point = program.point(layer)?;
            let tasks = [
                (Task::Read, !point.readouts.is_empty()),
                (Task::Check, point.readouts.is_empty()),
                (Task::Patch, !point.patches.is_empty()),
            ];
            for (task, _) in tasks.into_iter().filter(|(_, wanted)| *wanted) {
                if let Err(unfit) = self.devices[device].graph(place, &program, layer, residual, task) {
                    tracing::debug!(%layer, ?unfit, "the residual goes by copy");
                    return None;
                }
            }
        }
        Some(place)
    }

    /// Index of the device that the residual lies on, with a backend made for it.
    ///
    /// # Safety
    /// The residual must be valid.
    unsafe fn device_of(&mut self, table: &'static DeviceTable, residual: &Tensor<'_>) -> Option<usize> {
        // SAFETY: the caller guarantees that the residual is valid; the rest is what ggml says of its buffer.
        unsafe {
            let buffer = table.buffer_of(residual.raw());
            if buffer.is_null() {
                return None;
            }
            let buffer_type = (table.buffer_type)(buffer);
            // A GPU's backend may have made the host memory, for faster copies; its work is the CPU's.
            let raw = if (table.buffer_is_host)(buffer) {
                (table.device_by_type)(DEVICE_CPU)
            } else {
                (table.type_device)(buffer_type)
            };
            if raw.is_null() || (table.device_type)(raw) == DEVICE_META {
                return None;
            }
            let known = self.devices.iter().position(|device| device.raw == raw);
            let index = match known {
                Some(index) => index,
                None => {
                    self.devices.push(Device::new(table, raw)?);
                    self.devices.len() - 1
                }
            };
            (table.supports_type)(self.devices[index].backend.raw(), buffer_type).then_some(index)
        }
    }

    fn run_on(
        &mut self,
        place: Place,
        layer: LayerIndex,
        rows: &[Row],
        sequences: &mut Sequences,
        residual: &mut Tensor<'_>,
    ) -> Result<(), RowFault> {
        let Self { devices, jobs, failed, .. } = self;
        let device = &mut devices[place.device];
        let n_rows = rows.len();
        for job in &mut *jobs {
            let Some(point) = job.program.point(layer) else { continue };
            job.mask.resize(point.patches.len() * n_rows, 0.0);
            if !point.readouts.is_empty() {
                device.run(place, job, layer, residual, Task::Read);
            }
        }
        failed.clear();
        let width = place.shape[1];
        sequences.each_group(layer, rows, width, failed, |sequences, group| {
            jobs.iter_mut().filter(|job| Arc::ptr_eq(&job.program, group.program)).try_for_each(|job| {
                job.sound()?;
                job.read(sequences, &group)?;
                job.decide(sequences, &group, n_rows);
                Ok(())
            })
        })?;
        let mut told = false;
        for job in &mut *jobs {
            let Some(point) = job.program.point(layer) else { continue };
            let is_last = job.program.points().last().is_some_and(|last| last.layer == layer);
            if job.mask.contains(&1.0) {
                device.run(place, job, layer, residual, Task::Patch);
            } else if point.readouts.is_empty() && is_last {
                device.run(place, job, layer, residual, Task::Check);
            }
            told |= job.fault.is_some() || !job.check.is_empty();
        }
        if told {
            sequences.each_group(layer, rows, width, failed, |_, group| {
                let mut jobs = jobs.iter().filter(|job| Arc::ptr_eq(&job.program, group.program));
                jobs.try_for_each(|job| job.sound().and_then(|()| job.checked(&group)))
            })?;
        }
        for range in failed.drain(..) {
            // SAFETY: the hook checked the shape, the rows lie in it, and llama.cpp waits for the callback.
            unsafe { residual.zero(range.start * width..range.end * width) };
        }
        Ok(())
    }
}

impl Job {
    /// A graph that failed has read nothing and checked nothing, and its patches may be there in part.
    fn sound(&self) -> Result<(), RowFault> {
        self.fault.clone().map_or(Ok(()), Err)
    }

    /// Gives the gates of a group of rows their scores.
    fn read(&self, sequences: &mut Sequences, group: &Group<'_>) -> Result<(), RowFault> {
        let readouts = &group.point.readouts;
        if readouts.is_empty() {
            return Ok(());
        }
        let scores = self.scores.chunks_exact(readouts.len()).skip(group.range.start);
        for (row, scores) in group.rows.iter().zip(scores) {
            // One value that is not finite makes every sum over its row so, whatever it is multiplied with.
            if !scores.iter().all(|score| score.is_finite()) {
                return Err(RowFault::NonFinite { position: row.position.0 });
            }
            for (readout, score) in readouts.iter().zip(scores) {
                sequences.read(row, readout.gate, *score);
            }
        }
        Ok(())
    }

    /// Which rows of a group each patch acts on.
    fn decide(&mut self, sequences: &Sequences, group: &Group<'_>, n_rows: usize) {
        for (patch, mask) in group.point.patches.iter().zip(self.mask.chunks_exact_mut(n_rows)) {
            let mask = &mut mask[group.range.clone()];
            sequences.each_acting(&patch.condition, group.rows, |acting| mask[acting].fill(1.0));
        }
    }

    fn checked(&self, group: &Group<'_>) -> Result<(), RowFault> {
        let check = self.check.iter().skip(group.range.start);
        let faulty = group.rows.iter().zip(check).find(|(_, check)| !check.is_finite());
        faulty.map_or(Ok(()), |(row, _)| Err(RowFault::NonFinite { position: row.position.0 }))
    }
}

impl Device {
    /// # Safety
    /// `raw` must be a device of the table's llama.cpp.
    unsafe fn new(table: &'static DeviceTable, raw: *mut RawDevice) -> Option<Self> {
        // SAFETY: guaranteed by the caller.
        let backend = unsafe { Backend::new(table, raw)? };
        let allocator = Some(Allocator::new(table, &backend)?);
        Some(Self { raw, points: Vec::new(), arena: Arena { allocator, generation: 0 }, backend })
    }

    /// The graph for `task`, made if there is none yet: its indices among the points and their graphs.
    fn graph(
        &mut self,
        place: Place,
        program: &Arc<Program>,
        layer: LayerIndex,
        residual: &Tensor<'_>,
        task: Task,
    ) -> Result<[usize; 2], Unfit> {
        let Place { table, shape, .. } = place;
        let of_program =
            |point: &Point| std::ptr::eq(point.program.as_ptr(), Arc::as_ptr(program)) && point.layer == layer;
        let hook_point = program.point(layer).ok_or(Unfit::Operation)?;
        let index = match self.points.iter().position(of_program) {
            Some(index) => index,
            None => {
                self.points.retain(|point| point.program.strong_count() > 0);
                let constants = Constants::new(table, &self.backend, hook_point, shape[1]);
                if let Err(unfit) = &constants {
                    tracing::warn!(%layer, ?unfit, "the guard can't be put on the device: residuals go by copy");
                }
                let program = Arc::downgrade(program);
                self.points.push(Point { program, layer, graphs: Vec::new(), constants });
                self.points.len() - 1
            }
        };
        let point = &mut self.points[index];
        let constants = point.constants.as_ref().map_err(|unfit| *unfit)?;
        // SAFETY: the residual is valid while llama.cpp shows it, and has memory: `device_of` found its buffer.
        let key = unsafe {
            let data = (table.data)(residual.raw()) as usize;
            Key { task, n_rows: shape[0], buffer: table.buffer_of(residual.raw()), data }
        };
        // A graph whose memory has moved can't be given other memory.
        let generation = self.arena.generation;
        point.graphs.retain(|cached| cached.generation.is_none_or(|of_memory| of_memory == generation));
        if let Some(found) = point.graphs.iter().position(|cached| cached.key == key) {
            // The last used are last.
            point.graphs[found..].rotate_left(1);
            return Ok([index, point.graphs.len() - 1]);
        }
        // SAFETY: as above, and the hook checked its shape.
        let graph = unsafe { Graph::new(table, &self.backend, hook_point, constants, residual.raw(), shape, task) };
        let graph = match graph {
            Ok(graph) => graph,
            Err(unfit) => {
                // A device that lacks an operation lacks it for any number of rows.
                if unfit == Unfit::Operation {
                    tracing::warn!(%layer, "the device lacks an operation that the guard needs: residuals go by copy");
                    point.graphs.clear();
                    point.constants = Err(unfit);
                }
                return Err(unfit);
            }
        };
        if point.graphs.len() >= MAX_GRAPHS {
            point.graphs.remove(0);
        }
        point.graphs.push(CachedGraph { key, generation: None, mask: Vec::new(), graph });
        Ok([index, point.graphs.len() - 1])
    }

    /// Runs the graph of `job` for `task` and takes what it gives, or notes in the job what went wrong.
    fn run(&mut self, place: Place, job: &mut Job, layer: LayerIndex, residual: &Tensor<'_>, task: Task) {
        if let Err(fault) = self.compute(place, job, layer, residual, task) {
            tracing::warn!(%layer, %fault, "the guard's graph was not computed");
            job.fault = Some(fault);
        }
    }

    fn compute(
        &mut self,
        place: Place,
        job: &mut Job,
        layer: LayerIndex,
        residual: &Tensor<'_>,
        task: Task,
    ) -> Result<(), RowFault> {
        let table = place.table;
        let failed = |reason: String| RowFault::Device { reason };
        let [point, graph] = self
            .graph(place, &job.program, layer, residual, task)
            .map_err(|unfit| failed(format!("its graph can't be made ({unfit:?})")))?;
        let cached = &mut self.points[point].graphs[graph];
        if cached.generation.is_none() {
            cached.generation = Some(self.arena.hold(table, &self.backend, &cached.graph).ok_or_else(|| {
                failed("it has no memory left for the guard's intermediate values: put fewer layers on it".into())
            })?);
        }
        let n_rows = place.shape[0];
        if let Some(mask) = cached.graph.mask
            && cached.mask != job.mask
        {
            // SAFETY: the mask has `n_patches` rows of `n_rows` values, as the job's has (`run_on`), in memory of its own.
            unsafe { (table.write)(mask, job.mask.as_ptr().cast(), 0, size_of_val(&*job.mask)) };
            cached.mask.clone_from(&job.mask);
        }
        // SAFETY: the graph has memory (`hold`), its constants live in the same point, and the residual is where it was made for (`Key`).
        let status = unsafe { (table.compute)(self.backend.raw(), cached.graph.graph) };
        if status != SUCCESS {
            // Metal's backend computes nothing more after a failure, of which it tells with the next graph only (`ggml_metal_synchronize`). Other
            // programs' graphs, and later ones, get a new one.
            // SAFETY: the device is one of the table's llama.cpp, since `self` was made for it.
            if let Some(renewed) = unsafe { Self::new(table, self.raw) } {
                *self = renewed;
            }
            return Err(failed(format!("computing the guard's graph ended with ggml's status {status}")));
        }
        let n_readouts = job.program.point(layer).map_or(0, |point| point.readouts.len());
        let outputs = [(cached.graph.scores, &mut job.scores, n_readouts), (cached.graph.check, &mut job.check, 1)];
        for (tensor, values, width) in outputs {
            if let Some(tensor) = tensor {
                values.resize(n_rows * width, 0.0);
                // SAFETY: the output has exactly this shape (`Graph`), and is computed.
                unsafe { (table.read)(tensor, values.as_mut_ptr().cast(), 0, size_of_val(&**values)) };
            }
        }
        Ok(())
    }
}

impl Arena {
    /// Gives `graph` memory, until the generation that is returned ends.
    fn hold(&mut self, table: &'static DeviceTable, backend: &Backend, graph: &Graph) -> Option<u64> {
        let allocator = match &mut self.allocator {
            Some(allocator) => allocator,
            none => none.insert(Allocator::new(table, backend)?),
        };
        let before = allocator.size();
        // SAFETY: allocator and graph are valid, and nothing is being computed.
        if unsafe { !(table.allocator_allocate)(allocator.raw(), graph.graph) } {
            // It has laid the graph out in memory that it did not get. Asked again, it would take that for done and write through a null pointer
            // (`ggml_gallocr_needs_realloc`).
            self.allocator = None;
            self.generation += 1;
            return None;
        }
        let size = allocator.size();
        // SAFETY: the backend is valid.
        let max_size = unsafe { (table.backend_max_size)(backend.raw()) };
        // It only ever grows, and in one piece as long as a piece may be so large. In several it may have moved at any time.
        if size != before || size > max_size {
            self.generation += 1;
        }
        Some(self.generation)
    }
}
