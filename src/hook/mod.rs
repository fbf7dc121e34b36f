//! The eval callback: finds the residual in llama.cpp's graph while it is computed, and runs a [`Program`](crate::program::Program) on it.
//!
//! In: a program, the rows of each batch, and the tensors that llama.cpp shows its callback. Out: patched residuals, gate
//! states and faults. This room decides nothing: what to patch is the program's business, what a fault means is said by the
//! guard. It and `attach/` are the only rooms with `unsafe`.
//!
//! How llama.cpp calls: the scheduler asks for every node of the graph (`ask`), computes up to each wanted one, synchronises
//! the backend, and shows it (`ggml_backend_sched_compute_splits`, ggml-backend.cpp). Answering "stop" there only ends the
//! current split and `llama_decode` still reports success, so a fault is latched in the [`Hook`], and whoever ran the decode
//! must look at the latch and discard the logits. [`GuardedContext`] does.
//!
//! Without the `engine` feature there is no [`GuardedContext`] and no linked function table: what remains holds no C++.

#[cfg(feature = "engine")]
mod adapters;
mod callback;
mod capture;
#[cfg(feature = "engine")]
mod context;
mod device;
mod executor;
#[cfg(feature = "engine")]
mod linked;
#[cfg(feature = "engine")]
mod params;
mod rows;
mod table;

#[cfg(feature = "engine")]
pub(crate) use adapters::Adapters;
pub use callback::Hook;
pub use capture::{Capture, CaptureRows, CapturedLayer, Replacement};
#[cfg(feature = "engine")]
pub use context::{BatchError, ContextError, GuardedBatch, GuardedContext};
pub use device::{DeviceExecutor, DeviceTable};
pub use executor::{AutoExecutor, CopyExecutor, Executor, ExecutorKind, HostExecutor};
#[cfg(feature = "engine")]
pub use params::EvalCallbackParams;
pub use rows::{BatchRow, Splitting};
pub use table::{GgmlTable, MissingSymbol, RawTensor, Tensor, TensorBytes};

use crate::program::RowFault;
use crate::tensor::LayerIndex;

/// What went wrong inside a decode. It is latched: until the latch is cleared nothing that the decode produced is to be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HookFault {
    #[error("the guard panicked at layer {layer:?}: {message}")]
    Panic { layer: Option<LayerIndex>, message: String },
    #[error("layer {layer}: {source}")]
    Row { layer: LayerIndex, source: RowFault },
    #[error("layer {layer}: the residual is not what a guard can patch: {reason}")]
    Residual { layer: LayerIndex, reason: String },
    #[error("hook point at layer {layer} did not fire: this model's graph has no residual `l_out-{layer}` to guard")]
    MissingHookPoint { layer: LayerIndex },
}

/// Why a sequence gets no more tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended {
    /// Its guards, by their names, failed, and say `block` of that.
    Fault { guard: String, fault: HookFault },
    /// A gate that blocks has fired.
    Blocked { guard: String, gate: String, message: Option<String> },
}

impl HookFault {
    /// The layer where it happened, where it happened at one.
    fn layer(&self) -> Option<LayerIndex> {
        match self {
            Self::Panic { layer, .. } => *layer,
            Self::Row { layer, .. } | Self::Residual { layer, .. } | Self::MissingHookPoint { layer } => Some(*layer),
        }
    }
}
