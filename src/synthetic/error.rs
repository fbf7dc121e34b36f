use super::Architecture;
use std::io;
use std::path::PathBuf;

/// Why a synthetic model can't be described or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SyntheticError {
    #[error("no {what} is called `{found}`; known are {known}")]
    Name { what: &'static str, found: String, known: String },
    #[error("{what} is {found}, expected {least} to {most}")]
    Size { what: &'static str, found: u32, least: u32, most: u32 },
    #[error("{heads} attention heads are no multiple of {kv_heads} heads of keys and values")]
    Heads { heads: u32, kv_heads: u32 },
    #[error("a head width of {found} is odd, and rotary embeddings turn pairs of values")]
    OddHead { found: u32 },
    #[error(
        "`{architecture}` has heads that fill the width exactly: {heads} heads of {head_width} do not make a width of {width}"
    )]
    HeadWidth { architecture: Architecture, width: u32, heads: u32, head_width: u32 },
    #[error("`{architecture}` has no layers that see a sliding window")]
    Sliding { architecture: Architecture },
    #[error(
        "tensor `{tensor}` has rows of {found} values, which `{quantization}` can't hold: expected a multiple of its block of {block}"
    )]
    Block { tensor: String, found: u32, quantization: &'static str, block: u32 },
    #[error("`{}` is a directory, expected the name of a file", path.display())]
    Directory { path: PathBuf },
    #[error("`{}` is being written by another process", path.display())]
    Busy { path: PathBuf },
    #[error("no space left for `{}`: the model needs {needed} bytes, and {written} could be written", path.display())]
    NoSpace { path: PathBuf, needed: u64, written: u64 },
    #[error("cannot {action} `{}`: {cause}", path.display())]
    Io { action: &'static str, path: PathBuf, cause: io::Error },
}
