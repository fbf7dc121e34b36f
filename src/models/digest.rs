use super::error::ModelError;
use sha2::{Digest, Sha256};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::str::FromStr;

/// Bytes moved or hashed between two reports of progress.
const CHUNK: usize = 256 * 1024;

/// A sha256, written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sha256Digest([u8; 32]);

impl Sha256Digest {
    /// Hashes the file, reporting the bytes read so far.
    pub(super) fn of_file(path: &Path, mut on_bytes: impl FnMut(u64)) -> Result<Self, ModelError> {
        let file = File::open(path).map_err(ModelError::io("open", path))?;
        let mut hasher = Sha256::new();
        copy(file, HashWriter(&mut hasher), u64::MAX, &mut on_bytes)
            .map_err(|error| ModelError::io("read", path)(error.into()))?;
        Ok(Self(hasher.finalize().into()))
    }
}

impl FromStr for Sha256Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut bytes = [0; 32];
        if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(format!("a sha256 is 64 hexadecimal digits, found `{text}`"));
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|error| error.to_string())?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Which end of a copy failed: a source that breaks off is tried again, a full disk is not.
#[derive(Debug)]
pub(super) enum CopyError {
    Read(io::Error),
    Write(io::Error),
    /// The reader holds more than the limit.
    TooLong,
}

impl From<CopyError> for io::Error {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Read(error) | CopyError::Write(error) => error,
            CopyError::TooLong => io::ErrorKind::FileTooLarge.into(),
        }
    }
}

/// Copies at most `limit` bytes, reporting how many were copied so far; returns the count.
pub(super) fn copy(
    mut reader: impl Read,
    mut writer: impl Write,
    limit: u64,
    mut on_bytes: impl FnMut(u64),
) -> Result<u64, CopyError> {
    let mut buffer = vec![0; CHUNK];
    let mut copied = 0;
    loop {
        let count = match reader.read(&mut buffer) {
            Ok(0) => return Ok(copied),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CopyError::Read(error)),
        };
        if count as u64 > limit - copied {
            return Err(CopyError::TooLong);
        }
        writer.write_all(&buffer[..count]).map_err(CopyError::Write)?;
        copied += count as u64;
        on_bytes(copied);
    }
}
