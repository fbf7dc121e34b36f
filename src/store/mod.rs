//! A directory of guards, and what of it is in force.
//!
//! In: a directory with a folder for each guard. Out: its guards as they are now, word when something in it changes, and what is counted of it. A guard that can't be read leaves the
//! one that was read before in its place. This room never changes a file, and knows no model.

mod directory;
mod metrics;
mod signature;
mod watch;

pub use directory::{Entry, GuardDirectory};
pub use metrics::{GateLabels, GuardMetrics};
pub use watch::{Waker, WatchOptions, Watcher, Woken};
