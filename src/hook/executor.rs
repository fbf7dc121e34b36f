//! Where a program runs: on the residual in host memory, on its own device, or on a copy of it.

use super::device::DeviceExecutor;
use super::table::{Tensor, TensorBytes};
use crate::program::{Row, RowFault, Scratch, Sequences};
use crate::tensor::{LayerIndex, ResidualMut};
use std::fmt;

/// Runs a program at one hook point.
///
/// The hook calls it inside the eval callback: llama.cpp has computed the residual, synchronised the backend, and waits.
pub trait Executor: Send {
    /// How the last residual was reached.
    fn kind(&self) -> ExecutorKind;

    /// Reads the gates of `layer` from `residual` and patches it, each row by the program of its sequence. `rows` names the rows, in order.
    ///
    /// What goes wrong with one sequence is latched in `sequences`.
    ///
    /// # Errors
    /// Whatever keeps all rows from being guarded.
    fn run(
        &mut self,
        layer: LayerIndex,
        rows: &[Row],
        sequences: &mut Sequences,
        residual: &mut Tensor<'_>,
    ) -> Result<(), RowFault>;
}

/// How a residual is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecutorKind {
    /// In place, in host memory.
    Host,
    /// By copy to the host and back.
    Copy,
    /// By a graph on the device that it lies on.
    Device,
}

impl fmt::Display for ExecutorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::Copy => "copy",
            Self::Device => "device",
        })
    }
}

/// Patches in place where the residual lies in host memory, and on its own device where it does not: the default.
#[derive(Debug, Default)]
pub struct AutoExecutor {
    host: HostExecutor,
    device: DeviceExecutor,
    on_device: bool,
}

impl Executor for AutoExecutor {
    fn kind(&self) -> ExecutorKind {
        if self.on_device { self.device.kind() } else { self.host.kind() }
    }

    fn run(
        &mut self,
        layer: LayerIndex,
        rows: &[Row],
        sequences: &mut Sequences,
        residual: &mut Tensor<'_>,
    ) -> Result<(), RowFault> {
        // SAFETY: the hook checks the shape before it calls an executor; the bytes are not kept.
        self.on_device = matches!(unsafe { residual.bytes() }, TensorBytes::Device);
        let executor: &mut dyn Executor = if self.on_device { &mut self.device } else { &mut self.host };
        executor.run(layer, rows, sequences, residual)
    }
}

/// Patches in place where the residual lies in host memory, and by copy where it does not.
#[derive(Debug, Default)]
pub struct HostExecutor {
    copy: CopyExecutor,
    copied: bool,
    scratch: Scratch,
}

impl Executor for HostExecutor {
    fn kind(&self) -> ExecutorKind {
        if self.copied { ExecutorKind::Copy } else { ExecutorKind::Host }
    }

    fn run(
        &mut self,
        layer: LayerIndex,
        rows: &[Row],
        sequences: &mut Sequences,
        residual: &mut Tensor<'_>,
    ) -> Result<(), RowFault> {
        // SAFETY: the hook checks the shape before it calls an executor, and llama.cpp waits for the callback.
        let bytes = unsafe { residual.bytes() };
        self.copied = matches!(bytes, TensorBytes::Device);
        match bytes {
            TensorBytes::Host(values) => {
                sequences.run(layer, rows, &mut view(rows, values)?, &mut self.scratch)?;
                Ok(())
            }
            TensorBytes::Device => self.copy.run(layer, rows, sequences, residual),
        }
    }
}

/// Patches a copy and writes it back if a row changed. Works wherever the residual lies.
#[derive(Debug, Default)]
pub struct CopyExecutor {
    values: Vec<f32>,
    scratch: Scratch,
}

impl Executor for CopyExecutor {
    fn kind(&self) -> ExecutorKind {
        ExecutorKind::Copy
    }

    fn run(
        &mut self,
        layer: LayerIndex,
        rows: &[Row],
        sequences: &mut Sequences,
        residual: &mut Tensor<'_>,
    ) -> Result<(), RowFault> {
        self.values.resize(residual.n_elements(), 0.0);
        // SAFETY: the hook checks the shape before it calls an executor.
        unsafe { residual.read(&mut self.values) };
        if sequences.run(layer, rows, &mut view(rows, &mut self.values)?, &mut self.scratch)? {
            // SAFETY: as above, and llama.cpp waits for the callback.
            unsafe { residual.write(&self.values) };
        }
        Ok(())
    }
}

fn view<'a>(rows: &[Row], values: &'a mut [f32]) -> Result<ResidualMut<'a>, RowFault> {
    let found = values.len();
    // The hook knows that it is a whole number of rows, and gives a name to each.
    let width = found.checked_div(rows.len()).unwrap_or(0);
    ResidualMut::new(values, width).map_err(|_| RowFault::Rows { expected: rows.len(), found })
}
