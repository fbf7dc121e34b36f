//! The record of what a guard decided: JSON lines that are only ever appended, each chained to the one before by its hash.
//!
//! A record enters and comes back acknowledged, with its sequence number and hash; what a record says is not known here.
//! A line is
//!
//! ```text
//! {"seq":7,"time":"2026-04-14T09:30:00.125Z","prev":"<64 hex>","record":{…},"hash":"<64 hex>"}
//! ```
//!
//! where `hash` is the SHA-256 of the line's bytes up to but not including `,"hash"`, and `prev` the `hash` of the line before, or
//! zeros for `seq` 1. Beside the log `PATH` are `PATH.N`, full files whose first record has `seq` N; `PATH.lock`, held by the process
//! that writes; and `PATH.torn-N`, what a crash left of the line that would have had `seq` N.
//!
//! [`verify`] finds any record that was edited, removed, inserted or moved. It can't find these, for there is no key in the chain:
//! - records removed from the end. Compare with a `seq` and hash that were noted elsewhere, as each [`Appended`] can be.
//! - whole files removed from the beginning, as rotation itself does. [`Verified::first_seq`] says where the log begins.
//! - a log that was written anew from some record on. A hash noted elsewhere finds this too.

mod chain;
mod files;
mod log;
#[cfg(test)]
mod tests;
mod time;
mod verify;
mod writer;

pub use chain::{Appended, ChainFault, ChainHash};
pub use log::{AuditLog, AuditOptions};
pub use verify::{Verified, verify};
pub use writer::{AuditWriter, Receipt};

use files::shown;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Why an audit log could not be opened, written or verified. Each is one line.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    #[error("cannot {action} `{path}`: {error}")]
    Io { action: &'static str, path: String, error: Arc<io::Error> },
    #[error("`{path}` is not a regular file, which an audit log has to be, and no link to one: name another path")]
    NotAFile { path: String },
    #[error("another process writes the audit log `{path}`: stop it, or name another path")]
    Locked { path: String },
    #[error(
        "the audit log can't go on from the {which} record of `{file}`: {fault}; keep its files for examination, elsewhere, to begin a new log"
    )]
    NoChain { file: String, which: &'static str, fault: ChainFault },
    #[error("the audit log can't be rotated: `{path}` is there already; move it elsewhere and open the log again")]
    RotatedExists { path: String },
    #[error("{file}:{line}: {fault}")]
    Broken {
        file: String,
        /// From 1.
        line: u64,
        fault: ChainFault,
    },
    #[error("the record can't be written as JSON: {reason}")]
    Record { reason: String },
    #[error("the record takes a line of {found} bytes, and {limit} are allowed: shorten it")]
    TooLarge { found: u64, limit: u64 },
    #[error("{capacity} records wait for the audit log already: try again later")]
    Full { capacity: usize },
    #[error("the audit log's writer has stopped: open the log again")]
    Stopped,
}

impl AuditError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { action, path: shown(path), error: Arc::new(error) }
    }
}
