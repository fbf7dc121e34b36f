use super::AuditError;
use super::files::shown;
use serde::de::IgnoredAny;
use sha2::{Digest, Sha256};
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// The longest line that is written or read, in bytes. It bounds the memory that a foreign file can take.
pub(super) const MAX_LINE_BYTES: u64 = 16 << 20;

/// Why a record does not fit where it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainFault {
    #[error("the file has no record")]
    Empty,
    #[error("the line does not end, so its writing was cut off")]
    Torn,
    #[error("the line is not an audit record")]
    Malformed,
    #[error("the record was edited: its hash is not that of its bytes")]
    Edited,
    #[error("expected seq {expected}, found {found}: a record was removed, inserted or moved")]
    Seq { expected: u64, found: u64 },
    #[error("`prev` is {found}, but the hash of the record before is {expected}")]
    Prev { expected: ChainHash, found: ChainHash },
    #[error("the file's name says that it begins at seq {expected}, found {found}")]
    Name { expected: u64, found: u64 },
}

/// The SHA-256 of a record, written as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChainHash([u8; 32]);

impl ChainHash {
    /// What the first record of a log is chained to.
    pub const ZERO: Self = Self([0; 32]);

    const DIGITS: usize = 64;

    pub(super) fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    fn parse(digits: &[u8]) -> Option<Self> {
        if digits.len() != Self::DIGITS {
            return None;
        }
        let nibble = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for ChainHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChainHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A record's place in the log. To note it elsewhere is to find it out later if the log was shortened or written anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// From 1.
    pub seq: u64,
    pub hash: ChainHash,
}

impl Appended {
    pub(super) const NONE: Self = Self { seq: 0, hash: ChainHash::ZERO };
}

/// What a line says of its place in the chain. Its hash is that of its bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Line {
    pub(super) seq: u64,
    pub(super) prev: ChainHash,
    pub(super) hash: ChainHash,
}

impl Line {
    /// Takes the line without its newline.
    pub(super) fn parse(line: &[u8]) -> Result<Self, ChainFault> {
        let (hashed, line) = Self::fields(line).ok_or(ChainFault::Malformed)?;
        if ChainHash::of(hashed) == line.hash { Ok(line) } else { Err(ChainFault::Edited) }
    }

    /// The bytes that are hashed, and the line as it says it is. There is one spelling of each field, so the record's own text, which
    /// may hold any of the keys, can't be taken for one.
    fn fields(line: &[u8]) -> Option<(&[u8], Self)> {
        const TIME: &[u8] = b"0000-00-00T00:00:00.000Z";
        const HASH: &[u8] = br#","hash":""#;
        const END: &[u8] = br#""}"#;
        let hashed = line.len().checked_sub(HASH.len() + ChainHash::DIGITS + END.len())?;
        let (hashed, rest) = line.split_at(hashed);
        let hash = ChainHash::parse(rest.strip_prefix(HASH)?.strip_suffix(END)?)?;

        let rest = hashed.strip_prefix(br#"{"seq":"#)?;
        let (seq, rest) = rest.split_at(rest.iter().take_while(|byte| byte.is_ascii_digit()).count());
        let seq: u64 = std::str::from_utf8(seq).ok().filter(|digits| !digits.starts_with('0'))?.parse().ok()?;
        seq.checked_add(1)?;
        let (time, rest) = rest.strip_prefix(br#","time":""#)?.split_at_checked(TIME.len())?;
        let has_form = |(found, form): (&u8, &u8)| if *form == b'0' { found.is_ascii_digit() } else { found == form };
        let is_time = time.iter().zip(TIME).all(has_form);
        let (prev, rest) = rest.strip_prefix(br#"","prev":""#)?.split_at_checked(ChainHash::DIGITS)?;
        let prev = ChainHash::parse(prev)?;
        let record = rest.strip_prefix(br#"","record":"#)?;
        serde_json::from_slice::<IgnoredAny>(record).ok().filter(|_| is_time)?;
        Some((hashed, Self { seq, prev, hash }))
    }

    pub(super) fn follows(&self, before: Appended) -> Result<(), ChainFault> {
        let expected = before.seq + 1;
        if self.seq != expected {
            return Err(ChainFault::Seq { expected, found: self.seq });
        }
        if self.prev != before.hash {
            return Err(ChainFault::Prev { expected: before.hash, found: self.prev });
        }
        Ok(())
    }

    pub(super) fn is_named(&self, named: Option<u64>) -> Result<(), ChainFault> {
        match named {
            Some(expected) if expected != self.seq => Err(ChainFault::Name { expected, found: self.seq }),
            _ => Ok(()),
        }
    }
}

/// The first record of a file and the place of its last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub(super) first: Line,
    pub(super) last: Appended,
}

/// None for a file without records. `bytes` is where its last whole line ends.
pub(super) fn ends(path: &Path, file: &File, bytes: u64) -> Result<Option<Ends>, AuditError> {
    let unreadable = |error| AuditError::io("read", path)(error);
    let Some(before_newline) = bytes.checked_sub(1) else { return Ok(None) };
    let line_at = |start: u64, which| {
        let mut file = file;
        file.seek(SeekFrom::Start(start)).map_err(unreadable)?;
        // A line that grew too long to have been written here is malformed, so it need not be read.
        let line = next_line(&mut BufReader::new(file)).map_err(unreadable)?.unwrap_or(Err(ChainFault::Empty));
        line.and_then(|line| Line::parse(&line)).map_err(|fault| no_chain(path, which, fault))
    };
    let last = line_at(line_start(file, before_newline).map_err(unreadable)?, "last")?;
    let first = line_at(0, "first")?;
    Ok(Some(Ends { first, last: Appended { seq: last.seq, hash: last.hash } }))
}

pub(super) fn no_chain(path: &Path, which: &'static str, fault: ChainFault) -> AuditError {
    AuditError::NoChain { file: shown(path), which, fault }
}

/// The next line without its newline, or none at the end of the file.
pub(super) fn next_line(file: &mut impl BufRead) -> io::Result<Option<Result<Vec<u8>, ChainFault>>> {
    let mut line = Vec::new();
    let read = file.take(MAX_LINE_BYTES).read_until(b'\n', &mut line)? as u64;
    Ok(match (line.pop(), read) {
        (None, _) => None,
        (Some(b'\n'), _) => Some(Ok(line)),
        (Some(_), MAX_LINE_BYTES) => Some(Err(ChainFault::Malformed)),
        (Some(_), _) => Some(Err(ChainFault::Torn)),
    })
}

/// Where the line begins that ends at `end`: after the last newline before it.
pub(super) fn line_start(mut file: &File, mut end: u64) -> io::Result<u64> {
    let mut chunk = [0; 4096];
    while end > 0 {
        let length = end.min(chunk.len() as u64);
        let chunk = &mut chunk[..length as usize];
        file.seek(SeekFrom::Start(end - length))?;
        file.read_exact(chunk)?;
        if let Some(newline) = chunk.iter().rposition(|byte| *byte == b'\n') {
            return Ok(end - length + newline as u64 + 1);
        }
        end -= length;
    }
    Ok(0)
}
