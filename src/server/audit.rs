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

use serde::Serialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The longest line that is written or read, in bytes. It bounds the memory that a foreign file can take.
const MAX_LINE_BYTES: u64 = 16 << 20;

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

    fn of(bytes: &[u8]) -> Self {
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

/// How large an audit log may grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AuditOptions {
    /// The log is rotated before a record that would make its file larger than this, in bytes. 0: never.
    pub max_bytes: u64,
    /// How many rotated files are kept; older ones are removed at a rotation. 0: all.
    pub keep: usize,
}

/// A record's place in the log. To note it elsewhere is to find it out later if the log was shortened or written anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// From 1.
    pub seq: u64,
    pub hash: ChainHash,
}

impl Appended {
    const NONE: Self = Self { seq: 0, hash: ChainHash::ZERO };
}

/// An audit log that this process alone writes.
///
/// After an error of its files it writes no more and answers every call with that error: a log that could have a gap is not continued
/// silently. Opening it again repairs what can be repaired.
#[derive(Debug)]
pub struct AuditLog {
    path: PathBuf,
    options: AuditOptions,
    clock: fn() -> SystemTime,
    file: File,
    bytes: u64,
    /// Of the file's first record, be it written or yet to come.
    first_seq: u64,
    last: Appended,
    failure: Option<AuditError>,
    _lock: Lock,
}

impl AuditLog {
    /// Opens the log, or creates it with mode 0600, locks it, and checks the last record that it continues. A torn last line, which
    /// was never acknowledged, is moved to `PATH.torn-SEQ`.
    pub fn open(path: &Path, options: AuditOptions) -> Result<Self, AuditError> {
        Self::open_with_clock(path, options, SystemTime::now)
    }

    /// As `open`, with another clock for the records' `time`.
    pub fn open_with_clock(path: &Path, options: AuditOptions, clock: fn() -> SystemTime) -> Result<Self, AuditError> {
        let lock = lock(path)?;
        is_regular(path)?;
        let file = private(OpenOptions::new().read(true).append(true).create(true))
            .open(path)
            .map_err(AuditError::io("open", path))?;
        sync_directory(path)?;

        let before = match rotated_files(path)?.pop() {
            Some(rotated) => rotated.ends()?.last,
            None => Appended::NONE,
        };
        let bytes = file.metadata().map_err(AuditError::io("examine", path))?.len();
        let whole = line_start(&file, bytes).map_err(AuditError::io("read", path))?;
        let ends = ends(path, &file, whole)?;
        if let Some(Ends { first, .. }) = &ends {
            // Without rotated files there is nothing to hold the first record against, and `verify` judges it.
            if before != Appended::NONE {
                first.follows(before).map_err(|fault| no_chain(path, "first", fault))?;
            }
        }
        let last = ends.as_ref().map_or(before, |ends| ends.last);
        if whole < bytes {
            set_torn_aside(path, &file, whole..bytes, last.seq + 1)?;
        }
        let first_seq = ends.map_or(last.seq + 1, |ends| ends.first.seq);
        let path = path.to_owned();
        Ok(Self { path, options, clock, file, bytes: whole, first_seq, last, failure: None, _lock: lock })
    }

    /// Writes the record as one line. Once this returns the kernel has it, so that it survives the end of this process, however sudden;
    /// to survive a power cut it takes a `sync`.
    pub fn append(&mut self, record: &impl Serialize) -> Result<Appended, AuditError> {
        self.check()?;
        let (appended, line) = self.line(record)?;
        let written = self.write(&line);
        self.fail_closed(written)?;
        self.last = appended;
        Ok(appended)
    }

    /// Waits until everything that was appended is on the disk.
    pub fn sync(&mut self) -> Result<(), AuditError> {
        self.check()?;
        let synced = self.file.sync_data().map_err(AuditError::io("sync", &self.path));
        self.fail_closed(synced)
    }

    fn line(&self, record: &impl Serialize) -> Result<(Appended, Vec<u8>), AuditError> {
        let Appended { seq, hash: prev } = self.last;
        let (seq, time) = (seq + 1, rfc3339((self.clock)()));
        let mut line = format!(r#"{{"seq":{seq},"time":"{time}","prev":"{prev}","record":"#).into_bytes();
        serde_json::to_writer(&mut line, record).map_err(|error| AuditError::Record { reason: error.to_string() })?;
        let hash = ChainHash::of(&line);
        line.extend_from_slice(format!(",\"hash\":\"{hash}\"}}\n").as_bytes());
        let found = line.len() as u64;
        if found > MAX_LINE_BYTES {
            return Err(AuditError::TooLarge { found, limit: MAX_LINE_BYTES });
        }
        Ok((Appended { seq, hash }, line))
    }

    fn write(&mut self, line: &[u8]) -> Result<(), AuditError> {
        let length = line.len() as u64;
        if self.options.max_bytes > 0 && self.bytes > 0 && self.bytes + length > self.options.max_bytes {
            self.rotate()?;
        }
        self.file.write_all(line).map_err(AuditError::io("write", &self.path))?;
        self.bytes += length;
        Ok(())
    }

    fn rotate(&mut self) -> Result<(), AuditError> {
        self.file.sync_all().map_err(AuditError::io("sync", &self.path))?;
        let rotated = beside(&self.path, &format!(".{}", self.first_seq));
        // `rename` would replace it without a word.
        if fs::symlink_metadata(&rotated).is_ok() {
            return Err(AuditError::RotatedExists { path: shown(&rotated) });
        }
        fs::rename(&self.path, &rotated).map_err(AuditError::io("rename", &self.path))?;
        self.file = private(OpenOptions::new().read(true).append(true).create_new(true))
            .open(&self.path)
            .map_err(AuditError::io("create", &self.path))?;
        sync_directory(&self.path)?;
        self.bytes = 0;
        self.first_seq = self.last.seq + 1;
        self.remove_old()
    }

    fn remove_old(&self) -> Result<(), AuditError> {
        if self.options.keep == 0 {
            return Ok(());
        }
        let rotated = rotated_files(&self.path)?;
        // The oldest first, so that a crash in between leaves no gap.
        for Rotated { path, .. } in rotated.iter().take(rotated.len().saturating_sub(self.options.keep)) {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(AuditError::io("remove", path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), AuditError> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    fn fail_closed(&mut self, result: Result<(), AuditError>) -> Result<(), AuditError> {
        self.failure = result.as_ref().err().cloned();
        result
    }
}

/// What a whole log, with its rotated files, was found to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    pub records: u64,
    /// More than 1 where older files were removed. 0 in a log without records, as `last_seq`.
    pub first_seq: u64,
    pub last_seq: u64,
    /// Zeros in a log without records.
    pub last_hash: ChainHash,
    /// Files that were read.
    pub files: usize,
}

/// Checks every record of the log and its rotated files. The error names the first that does not fit.
///
/// The log may be written meanwhile. A last line that a crash tore is an error here until the log is opened for writing again.
pub fn verify(path: &Path) -> Result<Verified, AuditError> {
    /// A log whose old files are removed faster than they can be read would never be done.
    const MOST_ATTEMPTS: usize = 5;
    let mut files = Files::of(path)?;
    for _ in 1..MOST_ATTEMPTS {
        let (rotated, bytes) = (files.rotated.clone(), files.bytes);
        let verified = files.verify(path);
        if verified.is_ok() {
            return verified;
        }
        // What does not fit may be half a line, or a file that is being removed, seen under way.
        files = Files::of(path)?;
        if (&files.rotated, files.bytes) == (&rotated, bytes) {
            return verified;
        }
    }
    files.verify(path)
}

/// The files of a log at one moment between two rotations.
struct Files {
    rotated: Vec<Rotated>,
    /// None where a crash came between the renaming of a full file and the creation of the next.
    current: Option<File>,
    /// Of `current`.
    bytes: u64,
}

impl Files {
    fn of(path: &Path) -> Result<Self, AuditError> {
        let mut rotated = rotated_files(path)?;
        loop {
            is_regular(path)?;
            let current = match File::open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && !rotated.is_empty() => None,
                opened => Some(opened.map_err(AuditError::io("open", path))?),
            };
            let now = rotated_files(path)?;
            if now == rotated {
                let bytes = current.as_ref().map_or(Ok(0), |file| file.metadata().map(|metadata| metadata.len()));
                return Ok(Self { rotated, current, bytes: bytes.map_err(AuditError::io("examine", path))? });
            }
            rotated = now;
        }
    }

    fn verify(self, path: &Path) -> Result<Verified, AuditError> {
        let mut verified = Verified { records: 0, first_seq: 0, last_seq: 0, last_hash: ChainHash::ZERO, files: 0 };
        for Rotated { first_seq, path } in self.rotated {
            is_regular(&path)?;
            let file = File::open(&path).map_err(AuditError::io("open", &path))?;
            verify_file(&mut verified, &path, file, Some(first_seq))?;
        }
        if let Some(current) = self.current {
            verify_file(&mut verified, path, current, None)?;
        }
        Ok(verified)
    }
}

/// Goes on with one file, which for a rotated one begins at the `seq` in its name.
fn verify_file(verified: &mut Verified, path: &Path, file: File, named_seq: Option<u64>) -> Result<(), AuditError> {
    let mut file = BufReader::new(file);
    let mut line_number = 0;
    loop {
        line_number += 1;
        let broken = |fault| AuditError::Broken { file: shown(path), line: line_number, fault };
        let Some(line) = next_line(&mut file).map_err(AuditError::io("read", path))? else { break };
        let record = line.and_then(|line| Line::parse(&line)).map_err(broken)?;
        match named_seq.filter(|_| line_number == 1) {
            // Nothing is left of what the oldest file's first record was chained to.
            Some(named) if verified.files == 0 && named > 1 => {
                record.is_named(Some(named)).map_err(broken)?;
            }
            named => {
                record
                    .follows(Appended { seq: verified.last_seq, hash: verified.last_hash })
                    .and_then(|()| record.is_named(named))
                    .map_err(broken)?;
            }
        }
        if verified.records == 0 {
            verified.first_seq = record.seq;
        }
        verified.records += 1;
        verified.last_seq = record.seq;
        verified.last_hash = record.hash;
    }
    if named_seq.is_some() && line_number == 1 {
        return Err(AuditError::Broken { file: shown(path), line: 1, fault: ChainFault::Empty });
    }
    verified.files += 1;
    Ok(())
}

/// What a line says of its place in the chain. Its hash is that of its bytes.
#[derive(Debug, Clone, Copy)]
struct Line {
    seq: u64,
    prev: ChainHash,
    hash: ChainHash,
}

impl Line {
    /// Takes the line without its newline.
    fn parse(line: &[u8]) -> Result<Self, ChainFault> {
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

    fn follows(&self, before: Appended) -> Result<(), ChainFault> {
        let expected = before.seq + 1;
        if self.seq != expected {
            return Err(ChainFault::Seq { expected, found: self.seq });
        }
        if self.prev != before.hash {
            return Err(ChainFault::Prev { expected: before.hash, found: self.prev });
        }
        Ok(())
    }

    fn is_named(&self, named: Option<u64>) -> Result<(), ChainFault> {
        match named {
            Some(expected) if expected != self.seq => Err(ChainFault::Name { expected, found: self.seq }),
            _ => Ok(()),
        }
    }
}

/// The first record of a file and the place of its last.
#[derive(Debug, Clone, Copy)]
struct Ends {
    first: Line,
    last: Appended,
}

/// None for a file without records. `bytes` is where its last whole line ends.
fn ends(path: &Path, file: &File, bytes: u64) -> Result<Option<Ends>, AuditError> {
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

fn no_chain(path: &Path, which: &'static str, fault: ChainFault) -> AuditError {
    AuditError::NoChain { file: shown(path), which, fault }
}

/// The next line without its newline, or none at the end of the file.
fn next_line(file: &mut impl BufRead) -> io::Result<Option<Result<Vec<u8>, ChainFault>>> {
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
fn line_start(mut file: &File, mut end: u64) -> io::Result<u64> {
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

/// Moves the log's last bytes to a new file, which is on the disk before they leave the log.
fn set_torn_aside(path: &Path, mut file: &File, torn: std::ops::Range<u64>, seq: u64) -> Result<(), AuditError> {
    let mut attempt = 1;
    let (torn_path, mut torn_file) = loop {
        let again = if attempt == 1 { String::new() } else { format!(".{attempt}") };
        let torn_path = beside(path, &format!(".torn-{seq}{again}"));
        match private(OpenOptions::new().write(true).create_new(true)).open(&torn_path) {
            Ok(torn_file) => break (torn_path, torn_file),
            // The same line can be torn more than once.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => attempt += 1,
            Err(error) => return Err(AuditError::io("create", &torn_path)(error)),
        }
    };
    file.seek(SeekFrom::Start(torn.start)).map_err(AuditError::io("read", path))?;
    io::copy(&mut file.take(torn.end - torn.start), &mut torn_file)
        .and_then(|_| torn_file.sync_all())
        .map_err(AuditError::io("write", &torn_path))?;
    sync_directory(path)?;
    file.set_len(torn.start).and_then(|()| file.sync_all()).map_err(AuditError::io("shorten", path))
}

/// A full file of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rotated {
    first_seq: u64,
    path: PathBuf,
}

impl Rotated {
    fn ends(&self) -> Result<Ends, AuditError> {
        is_regular(&self.path)?;
        let file = File::open(&self.path).map_err(AuditError::io("open", &self.path))?;
        let bytes = file.metadata().map_err(AuditError::io("examine", &self.path))?.len();
        let whole = line_start(&file, bytes).map_err(AuditError::io("read", &self.path))?;
        if whole < bytes {
            return Err(no_chain(&self.path, "last", ChainFault::Torn));
        }
        let ends = ends(&self.path, &file, bytes)?.ok_or_else(|| no_chain(&self.path, "last", ChainFault::Empty))?;
        ends.first.is_named(Some(self.first_seq)).map_err(|fault| no_chain(&self.path, "first", fault))?;
        Ok(ends)
    }
}

/// The rotated files of the log, the oldest first.
fn rotated_files(path: &Path) -> Result<Vec<Rotated>, AuditError> {
    let directory = directory_of(path);
    let mut rotated = Vec::new();
    for entry in fs::read_dir(directory).map_err(AuditError::io("list", directory))? {
        let name = entry.map_err(AuditError::io("list", directory))?.file_name();
        let first_seq = path.file_name().and_then(|log| {
            let digits = name.as_encoded_bytes().strip_prefix(log.as_encoded_bytes())?.strip_prefix(b".")?;
            let digits = std::str::from_utf8(digits).ok()?;
            let is_number = digits.bytes().all(|digit| digit.is_ascii_digit()) && !digits.starts_with('0');
            digits.parse().ok().filter(|_| is_number)
        });
        if let Some(first_seq) = first_seq {
            rotated.push(Rotated { first_seq, path: directory.join(name) });
        }
    }
    rotated.sort_by_key(|file| file.first_seq);
    Ok(rotated)
}

/// `PATH.lock`, locked. It is a file of its own because rotation renames the log's.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    /// To close the file would not do: a child process that is just being started holds a copy until it runs its own program.
    fn drop(&mut self) {
        drop(self.0.unlock());
    }
}

fn lock(path: &Path) -> Result<Lock, AuditError> {
    let lock_path = beside(path, ".lock");
    is_regular(&lock_path)?;
    let file = private(OpenOptions::new().write(true).create(true))
        .open(&lock_path)
        .map_err(AuditError::io("open", &lock_path))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock(file)),
        Err(TryLockError::WouldBlock) => Err(AuditError::Locked { path: shown(path) }),
        Err(TryLockError::Error(error)) => Err(AuditError::io("lock", &lock_path)(error)),
    }
}

/// An error where there is something else than a file. A link would be renamed in place of the log; a pipe would block.
fn is_regular(path: &Path) -> Result<(), AuditError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err(AuditError::NotAFile { path: shown(path) }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(AuditError::io("examine", path)(error)),
    }
}

/// Created with mode 0600: what users ask is nobody else's business.
fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600);
    options
}

/// A file that was created or renamed survives a power cut once its directory is synced. Only Unix can do so, and must.
fn sync_directory(path: &Path) -> Result<(), AuditError> {
    #[cfg(unix)]
    {
        let directory = directory_of(path);
        File::open(directory).and_then(|open| open.sync_all()).map_err(AuditError::io("sync", directory))?;
    }
    Ok(())
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// `PATH` with a suffix to its file name.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// The time in UTC, to the millisecond, rounded down: `2026-04-14T09:30:00.125Z`. Times that do not fit in four digits of a year are
/// shown as the first or last that does.
fn rfc3339(time: SystemTime) -> String {
    const FIRST: i128 = -62_167_219_200_000;
    const LAST: i128 = 253_402_300_799_999;
    const DAY: i128 = 86_400_000;
    let nanoseconds = match time.duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_nanos() as i128,
        Err(before) => -(before.duration().as_nanos() as i128),
    };
    let milliseconds = nanoseconds.div_euclid(Duration::from_millis(1).as_nanos() as i128).clamp(FIRST, LAST);
    let (year, month, day) = civil_from_days(milliseconds.div_euclid(DAY) as i64);
    let of_day = milliseconds.rem_euclid(DAY);
    let (hour, minute, second) = (of_day / 3_600_000, of_day / 60_000 % 60, of_day / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", of_day % 1000)
}

/// Year, month from 1 and day from 1, in the proleptic Gregorian calendar, of a day counted from 1970-01-01.
///
/// The algorithm is `civil_from_days` of Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms". It counts from March, so that
/// the leap day is the last of its year, in eras of 400 years, which all have 146,097 days.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// A thread that owns a log, so that many others can write to it and share the wait for the disk.
///
/// A record is acknowledged once it is on the disk: the thread writes all that wait, syncs once, and answers them all. After an error
/// of the log's files each record is answered with that error. Dropping the writer writes what still waits, then ends the thread.
#[derive(Debug)]
pub struct AuditWriter {
    /// None only while it is dropped.
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    failure: Arc<OnceLock<AuditError>>,
    capacity: usize,
}

impl AuditWriter {
    /// `capacity` is how many records may wait, and how many are written between two syncs at most; it is at least 1.
    pub fn start(log: AuditLog, capacity: usize) -> Result<Self, AuditError> {
        let capacity = capacity.max(1);
        let (jobs, receiver) = mpsc::sync_channel(capacity);
        let failure = Arc::new(OnceLock::new());
        let path = log.path.clone();
        let thread = thread::Builder::new()
            .name("audit".to_owned())
            .spawn({
                let failure = Arc::clone(&failure);
                move || write_groups(log, &receiver, capacity, &failure)
            })
            .map_err(AuditError::io("start the writer of", &path))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), failure, capacity })
    }

    /// Hands the record over. While `capacity` records wait already, this blocks.
    pub fn record(&self, record: Value) -> Result<Receipt, AuditError> {
        let jobs = self.jobs()?;
        let (sender, answer) = mpsc::sync_channel(1);
        // A receipt that was dropped wants no answer.
        let job = Job { record, answer: Answer::new(move |result| drop(sender.send(result))) };
        jobs.send(job).map_err(|_| AuditError::Stopped)?;
        Ok(Receipt { answer })
    }

    /// Hands the record over without ever blocking, as async code needs it. `answer` is called exactly once, with an error such as
    /// `Full` before this returns, or else on the writer's thread, which it must not hold up.
    pub fn record_then(&self, record: Value, answer: impl FnOnce(Result<Appended, AuditError>) + Send + 'static) {
        let answer = Answer::new(answer);
        let jobs = match self.jobs() {
            Ok(jobs) => jobs,
            Err(error) => return answer.give(Err(error)),
        };
        if let Err(TrySendError::Full(job)) = jobs.try_send(Job { record, answer }) {
            job.answer.give(Err(AuditError::Full { capacity: self.capacity }));
        }
    }

    fn jobs(&self) -> Result<&SyncSender<Job>, AuditError> {
        match self.failure.get() {
            Some(failure) => Err(failure.clone()),
            None => self.jobs.as_ref().ok_or(AuditError::Stopped),
        }
    }
}

impl Drop for AuditWriter {
    fn drop(&mut self) {
        self.jobs = None;
        // An answer may hold the last reference to the writer, and then it is dropped on the thread itself.
        if let Some(thread) = self.thread.take().filter(|thread| thread.thread().id() != thread::current().id()) {
            // Each record that a panic left behind was answered with `Stopped`.
            drop(thread.join());
        }
    }
}

/// A record that was handed over and is not acknowledged yet.
#[derive(Debug)]
#[must_use = "the record is not acknowledged until its receipt says so"]
pub struct Receipt {
    answer: Receiver<Result<Appended, AuditError>>,
}

impl Receipt {
    /// Waits until the record is on the disk.
    pub fn wait(self) -> Result<Appended, AuditError> {
        self.answer.recv().unwrap_or(Err(AuditError::Stopped))
    }
}

#[derive(Debug)]
struct Job {
    record: Value,
    answer: Answer,
}

type OnAnswer = Box<dyn FnOnce(Result<Appended, AuditError>) + Send>;

/// Gives an answer exactly once: `Stopped` where it is dropped without one.
struct Answer(Option<OnAnswer>);

impl Answer {
    fn new(answer: impl FnOnce(Result<Appended, AuditError>) + Send + 'static) -> Self {
        Self(Some(Box::new(answer)))
    }

    fn give(mut self, result: Result<Appended, AuditError>) {
        self.call(result);
    }

    fn call(&mut self, result: Result<Appended, AuditError>) {
        if let Some(answer) = self.0.take() {
            // One caller's panic, which the panic hook has reported, must not end the log for the others.
            drop(catch_unwind(AssertUnwindSafe(|| answer(result))));
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.call(Err(AuditError::Stopped));
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answer")
    }
}

fn write_groups(mut log: AuditLog, jobs: &Receiver<Job>, capacity: usize, failure: &OnceLock<AuditError>) {
    while let Ok(first) = jobs.recv() {
        let group = std::iter::once(first).chain(jobs.try_iter().take(capacity - 1));
        let written: Vec<_> = group.map(|job| (log.append(&job.record), job.answer)).collect();
        let synced = if written.iter().any(|(appended, _)| appended.is_ok()) { log.sync() } else { Ok(()) };
        if let Err(error) = log.check() {
            // Before the answers: who has one finds the writer failed.
            failure.get_or_init(|| error);
        }
        for (appended, answer) in written {
            answer.give(appended.and_then(|appended| synced.clone().map(|()| appended)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::process::{Command, Stdio};
    use std::sync::mpsc::channel;
    use tempfile::{TempDir, tempdir};

    fn clock() -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(1_776_159_000_125)
    }

    fn open(path: &Path, max_bytes: u64, keep: usize) -> Result<AuditLog, AuditError> {
        AuditLog::open_with_clock(path, AuditOptions { max_bytes, keep }, clock)
    }

    /// Appends records numbered as their `seq`.
    fn append(log: &mut AuditLog, records: u64) {
        for _ in 0..records {
            let number = log.last.seq + 1;
            log.append(&json!({ "decision": "block", "number": number })).unwrap();
        }
    }

    /// A log of that many records, in files of three.
    fn rotated_log(records: u64) -> (TempDir, PathBuf) {
        let directory = tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        append(&mut open(&path, 800, 0).unwrap(), records);
        (directory, path)
    }

    fn names(directory: &TempDir) -> Vec<String> {
        let entries = fs::read_dir(directory.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_line_is_as_documented() {
        let directory = tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        let mut log = open(&path, 0, 0).unwrap();
        let first = log.append(&json!({ "text": "a\n\",\"hash\":\"" })).unwrap();
        let second = log.append(&json!({})).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let zeros = "0".repeat(64);
        let hashed = format!(
            r#"{{"seq":1,"time":"2026-04-14T09:30:00.125Z","prev":"{zeros}","record":{{"text":"a\n\",\"hash\":\""}}"#
        );
        assert_eq!(first, Appended { seq: 1, hash: ChainHash::of(hashed.as_bytes()) });
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], format!(r#"{hashed},"hash":"{}"}}"#, first.hash));
        let value: Value = serde_json::from_str(lines[1]).unwrap();
        assert_eq!(value["prev"], first.hash.to_string());
        assert_eq!(value["hash"], second.hash.to_string());
        assert_eq!(lines.len(), 2);
        assert!(text.ends_with('\n'));
    }

    #[test]
    fn a_chain_goes_on_when_it_is_opened_again_and_verifies() {
        let directory = tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        assert!(matches!(verify(&path), Err(AuditError::Io { .. })));
        drop(open(&path, 0, 0).unwrap());
        let empty = Verified { records: 0, first_seq: 0, last_seq: 0, last_hash: ChainHash::ZERO, files: 1 };
        assert_eq!(verify(&path).unwrap(), empty);
        for opened in 1..4 {
            let mut log = open(&path, 0, 0).unwrap();
            append(&mut log, 2);
            log.sync().unwrap();
            let last_hash = log.last.hash;
            let expected = Verified { records: 2 * opened, first_seq: 1, last_seq: 2 * opened, last_hash, files: 1 };
            assert_eq!(verify(&path).unwrap(), expected);
        }
    }

    #[cfg(unix)]
    #[test]
    fn files_are_private_and_neither_links_nor_devices() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let (directory, path) = rotated_log(4);
        for name in names(&directory) {
            let mode = fs::metadata(directory.path().join(&name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let link = directory.path().join("link");
        symlink(&path, &link).unwrap();
        for path in [&link, Path::new("/dev/null"), directory.path()] {
            assert!(matches!(is_regular(path), Err(AuditError::NotAFile { .. })));
        }
        assert!(matches!(open(&link, 0, 0), Err(AuditError::NotAFile { .. })));
        assert!(matches!(verify(&link), Err(AuditError::NotAFile { .. })));
    }

    #[test]
    fn rotation_keeps_the_chain_and_as_many_files_as_asked() {
        let (directory, path) = rotated_log(10);
        let expected = ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.4", "audit.jsonl.7", "audit.jsonl.lock"];
        assert_eq!(names(&directory), expected);
        let verified = verify(&path).unwrap();
        assert_eq!((verified.records, verified.first_seq, verified.last_seq, verified.files), (10, 1, 10, 4));
        for name in &expected[..4] {
            assert!(fs::metadata(directory.path().join(name)).unwrap().len() <= 800);
        }

        append(&mut open(&path, 800, 2).unwrap(), 3);
        assert_eq!(names(&directory), ["audit.jsonl", "audit.jsonl.10", "audit.jsonl.7", "audit.jsonl.lock"]);
        let verified = verify(&path).unwrap();
        assert_eq!((verified.records, verified.first_seq, verified.last_seq, verified.files), (7, 7, 13, 3));

        // A record that alone is too large has a file of its own.
        append(&mut open(&path, 1, 0).unwrap(), 2);
        let verified = verify(&path).unwrap();
        assert_eq!((verified.last_seq, verified.files), (15, 5));
    }

    #[test]
    fn a_rotation_that_a_crash_cut_short_is_completed() {
        let (directory, path) = rotated_log(3);
        fs::rename(&path, beside(&path, ".1")).unwrap();
        assert_eq!(verify(&path).unwrap().records, 3);
        append(&mut open(&path, 800, 0).unwrap(), 1);
        assert_eq!(verify(&path).unwrap().last_seq, 4);
        assert_eq!(names(&directory), ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.lock"]);
    }

    #[test]
    fn a_rotation_replaces_no_file() {
        let (_directory, path) = rotated_log(3);
        let mut log = open(&path, 800, 0).unwrap();
        fs::write(beside(&path, ".1"), "precious").unwrap();
        for _ in 0..2 {
            assert!(matches!(log.append(&json!({})), Err(AuditError::RotatedExists { .. })));
        }
        assert_eq!(fs::read(beside(&path, ".1")).unwrap(), b"precious");
    }

    #[test]
    fn the_log_has_one_writer() {
        let (_directory, path) = rotated_log(1);
        let mut log = open(&path, 800, 0).unwrap();
        assert!(matches!(open(&path, 800, 0), Err(AuditError::Locked { .. })));
        append(&mut log, 5);
        assert!(matches!(open(&path, 800, 0), Err(AuditError::Locked { .. })), "not after a rotation either");
        drop(log);
        open(&path, 800, 0).unwrap();
    }

    #[test]
    fn a_torn_last_line_is_set_aside_wherever_it_was_cut() {
        let (_whole, whole) = rotated_log(5);
        let (full, tail) = (fs::read(beside(&whole, ".1")).unwrap(), fs::read(&whole).unwrap());
        let directory = tempdir().unwrap();
        for cut in 0..=tail.len() {
            let path = directory.path().join(format!("{cut}.jsonl"));
            fs::write(beside(&path, ".1"), &full).unwrap();
            fs::write(&path, &tail[..cut]).unwrap();
            let lines = tail[..cut].iter().filter(|byte| **byte == b'\n').count();
            let torn = tail[..cut].rsplit(|byte| *byte == b'\n').next().unwrap();
            if !torn.is_empty() {
                let expected = format!("{}:{}: {}", shown(&path), lines + 1, ChainFault::Torn);
                assert_eq!(verify(&path).unwrap_err().to_string(), expected);
            }
            append(&mut open(&path, 0, 0).unwrap(), 1);
            let verified = verify(&path).unwrap();
            assert_eq!((verified.last_seq, verified.files), (3 + lines as u64 + 1, 2), "cut at {cut}");
            let aside = beside(&path, &format!(".torn-{}", 3 + lines + 1));
            assert_eq!(fs::read(&aside).unwrap_or_default(), torn, "cut at {cut}");
            assert_eq!(aside.exists(), !torn.is_empty());
        }
    }

    #[test]
    fn what_was_torn_before_is_not_replaced() {
        let (_directory, path) = rotated_log(2);
        for torn in ["first", "second"] {
            OpenOptions::new().append(true).open(&path).unwrap().write_all(torn.as_bytes()).unwrap();
            open(&path, 0, 0).unwrap();
        }
        assert_eq!(fs::read(beside(&path, ".torn-3")).unwrap(), b"first");
        assert_eq!(fs::read(beside(&path, ".torn-3.2")).unwrap(), b"second");
    }

    #[test]
    fn a_tail_that_is_no_chain_is_not_continued() {
        let (_directory, path) = rotated_log(5);
        let tail = fs::read_to_string(&path).unwrap();
        let refuses = |text: &str, expected_which: &str, expected_fault: ChainFault| {
            fs::write(&path, text).unwrap();
            match open(&path, 0, 0) {
                Err(AuditError::NoChain { which, fault, .. }) => {
                    assert_eq!((which, fault), (expected_which, expected_fault))
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(fs::read_to_string(&path).unwrap(), text, "it is left as it is");
        };
        refuses("\n", "last", ChainFault::Malformed);
        refuses(&format!("{tail}{{}}\n"), "last", ChainFault::Malformed);
        refuses(&tail.replace("\"number\":5", "\"number\":6"), "last", ChainFault::Edited);
        refuses(&tail.replace("\"number\":4", "\"number\":6"), "first", ChainFault::Edited);
        let second = tail.split_inclusive('\n').nth(1).unwrap();
        refuses(second, "first", ChainFault::Seq { expected: 4, found: 5 });
    }

    #[test]
    fn a_log_without_its_first_record_or_file_is_found_out() {
        let (_directory, path) = rotated_log(3);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.split_once('\n').unwrap().1).unwrap();
        let removed = ChainFault::Seq { expected: 1, found: 2 };
        assert!(matches!(verify(&path), Err(AuditError::Broken { line: 1, fault, .. }) if fault == removed));

        let (_directory, path) = rotated_log(9);
        fs::remove_file(beside(&path, ".4")).unwrap();
        let removed = ChainFault::Seq { expected: 4, found: 7 };
        assert!(matches!(verify(&path), Err(AuditError::Broken { line: 1, fault, .. }) if fault == removed));

        let (_directory, path) = rotated_log(9);
        fs::rename(beside(&path, ".4"), beside(&path, ".5")).unwrap();
        let renamed = ChainFault::Name { expected: 5, found: 4 };
        assert!(matches!(verify(&path), Err(AuditError::Broken { line: 1, fault, .. }) if fault == renamed));
    }

    #[test]
    fn a_record_forged_with_its_own_hash_breaks_the_chain_after_it() {
        let (_directory, path) = rotated_log(3);
        let text = fs::read_to_string(&path).unwrap();
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        let hashed = lines[1].split(",\"hash\"").next().unwrap().replace("block", "allow");
        lines[1] = format!(r#"{hashed},"hash":"{}"}}"#, ChainHash::of(hashed.as_bytes()));
        fs::write(&path, lines.join("\n") + "\n").unwrap();
        let error = verify(&path).unwrap_err();
        assert!(matches!(error, AuditError::Broken { line: 3, fault: ChainFault::Prev { .. }, .. }), "{error}");
    }

    #[derive(Debug, Clone)]
    enum Tampering {
        Byte(prop::sample::Index, u8),
        Remove(prop::sample::Index),
        Swap(prop::sample::Index, prop::sample::Index),
        Duplicate(prop::sample::Index, prop::sample::Index),
    }

    fn tampering() -> impl Strategy<Value = Tampering> {
        let index = any::<prop::sample::Index>;
        prop_oneof![
            4 => (index(), prop_oneof![1..=255_u8, Just(b'\n')]).prop_map(|(at, flip)| Tampering::Byte(at, flip)),
            1 => index().prop_map(Tampering::Remove),
            1 => (index(), index()).prop_map(|(one, other)| Tampering::Swap(one, other)),
            1 => (index(), index()).prop_map(|(from, to)| Tampering::Duplicate(from, to)),
        ]
    }

    /// Files of a log and their lines.
    type Lines = Vec<(PathBuf, Vec<Vec<u8>>)>;

    /// File and line of a line counted through all files.
    fn place(files: &Lines, mut index: usize) -> (usize, usize) {
        for (file, (_, lines)) in files.iter().enumerate() {
            if index < lines.len() {
                return (file, index);
            }
            index -= lines.len();
        }
        unreachable!()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn tampering_is_found_and_named(tampering in tampering()) {
            static LOG: OnceLock<Lines> = OnceLock::new();
            const RECORDS: usize = 11;
            let log = LOG.get_or_init(|| {
                let (directory, _) = rotated_log(RECORDS as u64);
                let lines = |name| {
                    let bytes = fs::read(directory.path().join(name)).unwrap();
                    bytes.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
                };
                ["audit.jsonl.1", "audit.jsonl.4", "audit.jsonl.7", "audit.jsonl"].map(|name| (PathBuf::from(name), lines(name))).to_vec()
            });
            let directory = tempdir().unwrap();
            let mut files: Lines =
                log.iter().map(|(name, lines)| (directory.path().join(name), lines.clone())).collect();
            let lines: Vec<Vec<u8>> = files.iter().flat_map(|(_, lines)| lines.clone()).collect();

            match tampering {
                Tampering::Byte(at, flip) => {
                    let mut at = at.index(lines.iter().map(Vec::len).sum());
                    let line = lines.iter().position(|line| {
                        let here = at < line.len();
                        at -= if here { 0 } else { line.len() };
                        here
                    });
                    let (file, line) = place(&files, line.unwrap());
                    let byte = &mut files[file].1[line][at];
                    // As a flip, or as the newline that splits the line.
                    *byte = if flip == b'\n' && *byte != b'\n' { b'\n' } else { *byte ^ flip };
                }
                // Without a hash noted elsewhere the last can't be missed.
                Tampering::Remove(at) => {
                    let (file, line) = place(&files, at.index(RECORDS - 1));
                    files[file].1.remove(line);
                }
                Tampering::Swap(one, other) => {
                    let (one, other) = (one.index(RECORDS), other.index(RECORDS));
                    prop_assume!(one != other);
                    let ((one_file, one_line), (other_file, other_line)) = (place(&files, one), place(&files, other));
                    files[one_file].1[one_line] = lines[other].clone();
                    files[other_file].1[other_line] = lines[one].clone();
                }
                Tampering::Duplicate(from, to) => {
                    let (file, line) = place(&files, to.index(RECORDS));
                    files[file].1.insert(line, lines[from.index(RECORDS)].clone());
                }
            }

            let mut expected = None;
            let mut whole = lines.iter();
            for (path, found) in &files {
                fs::write(path, found.concat()).unwrap();
                let same = found.iter().take_while(|line| whole.next() == Some(*line)).count();
                if expected.is_none() && same < found.len() {
                    expected = Some((shown(path), same as u64 + 1));
                }
            }
            let found = match verify(&directory.path().join("audit.jsonl")) {
                Err(AuditError::Broken { file, line, .. }) => Some((file, line)),
                _ => None,
            };
            prop_assert!(expected.is_some());
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn a_day_is_the_one_after_the_day_before(days in -719_528_i64..2_932_896) {
            let (year, month, day) = civil_from_days(days);
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = [31, 28 + i64::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month as usize - 1];
            let next = match (month, day) {
                (12, 31) => (year + 1, 1, 1),
                (_, day) if day == length => (year, month + 1, 1),
                _ => (year, month, day + 1),
            };
            prop_assert_eq!(civil_from_days(days + 1), next);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        #[test]
        fn any_record_survives(text in any::<String>(), number in any::<f64>()) {
            let directory = tempdir().unwrap();
            let path = directory.path().join("audit.jsonl");
            let mut log = open(&path, 0, 0).unwrap();
            for _ in 0..2 {
                log.append(&json!({ "text": text, "number": number })).unwrap();
            }
            prop_assert_eq!(verify(&path).unwrap().last_hash, log.last.hash);
            let line = fs::read_to_string(&path).unwrap().lines().last().unwrap().to_owned();
            let value: Value = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(&value["record"]["text"], &json!(text));
        }
    }

    #[test]
    fn times_are_rfc_3339() {
        let after = |milliseconds| rfc3339(UNIX_EPOCH + Duration::from_millis(milliseconds));
        assert_eq!(after(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(after(951_782_399_999), "2000-02-28T23:59:59.999Z");
        assert_eq!(after(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(after(1_709_251_199_000), "2024-02-29T23:59:59.000Z");
        assert_eq!(after(4_107_542_400_000), "2100-03-01T00:00:00.000Z");
        assert_eq!(after(253_402_300_799_999), "9999-12-31T23:59:59.999Z");
        assert_eq!(after(253_402_300_800_000), "9999-12-31T23:59:59.999Z");
        assert_eq!(rfc3339(UNIX_EPOCH - Duration::from_nanos(1)), "1969-12-31T23:59:59.999Z");
        assert_eq!(rfc3339(UNIX_EPOCH - Duration::from_secs(62_167_219_201)), "0000-01-01T00:00:00.000Z");
    }

    const KILLED_LOG: &str = "PILOTFISH_TEST_KILLED_AUDIT_LOG";

    /// Appends until it is killed, by the test below. Does nothing when it is run as a test.
    #[test]
    fn child_that_is_killed() {
        let Some(path) = std::env::var_os(KILLED_LOG) else { return };
        let mut log = open(path.as_ref(), 5_000, 0).unwrap();
        let text = "x".repeat(300);
        loop {
            let Appended { seq, hash } = log.append(&json!({ "text": text })).unwrap();
            // On a line of its own whatever the test harness prints. It fails, and ends the child, when the parent is gone.
            io::stdout().write_all(format!("\nack {seq} {hash}\n").as_bytes()).unwrap();
        }
    }

    #[cfg(unix)]
    #[test]
    fn no_acknowledged_record_is_lost_to_sigkill() {
        let (_directory, path) = rotated_log(0);
        let module = module_path!().split_once("::").unwrap().1;
        for round in 0..5 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", &format!("{module}::child_that_is_killed"), "--nocapture"])
                .env(KILLED_LOG, &path)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut acknowledged = Vec::new();
            for line in BufReader::new(child.stdout.take().unwrap()).lines() {
                let line = line.unwrap();
                if let Some((seq, hash)) = line.strip_prefix("ack ").and_then(|ack| ack.split_once(' ')) {
                    acknowledged.push((seq.to_owned(), hash.to_owned()));
                }
                if acknowledged.len() == 50 + 7 * round {
                    child.kill().unwrap();
                }
            }
            child.wait().unwrap();
            assert!(acknowledged.len() >= 50 + 7 * round);

            append(&mut open(&path, 5_000, 0).unwrap(), 1);
            verify(&path).unwrap();
            let mut files: Vec<_> = rotated_files(&path).unwrap().into_iter().map(|file| file.path).collect();
            files.push(path.clone());
            let text: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
            for (seq, hash) in acknowledged {
                let line = text.lines().nth(seq.parse::<usize>().unwrap() - 1).unwrap();
                assert!(line.starts_with(&format!("{{\"seq\":{seq},")) && line.contains(&hash));
            }
        }
    }

    #[test]
    fn the_log_is_verified_while_it_is_written_and_rotated() {
        let (_directory, path) = rotated_log(1);
        thread::scope(|scope| {
            let writing = scope.spawn(|| append(&mut open(&path, 8_000, 0).unwrap(), 2_000));
            while !writing.is_finished() {
                verify(&path).unwrap();
            }
        });
        assert_eq!(verify(&path).unwrap().records, 2_001);
    }

    #[test]
    fn eight_threads_share_a_writer() {
        let (_directory, path) = rotated_log(0);
        let writer = AuditWriter::start(open(&path, 10_000, 0).unwrap(), 16).unwrap();
        let mut seqs: Vec<u64> = thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|thread| {
                    let writer = &writer;
                    scope.spawn(move || {
                        let record = |number| writer.record(json!({ "thread": thread, "number": number })).unwrap();
                        (0..100).map(|number| record(number).wait().unwrap().seq).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        seqs.sort();
        assert_eq!(seqs, (1..=800).collect::<Vec<_>>());
        let verified = verify(&path).unwrap();
        assert_eq!((verified.records, verified.last_seq), (800, 800));
        assert!(verified.files > 1);
    }

    #[test]
    fn a_dropped_writer_writes_what_waits() {
        let (_directory, path) = rotated_log(0);
        let writer = AuditWriter::start(open(&path, 0, 0).unwrap(), 100).unwrap();
        let receipts: Vec<_> = (0..50).map(|number| writer.record(json!(number)).unwrap()).collect();
        drop(writer);
        assert_eq!(verify(&path).unwrap().records, 50);
        for (receipt, seq) in receipts.into_iter().zip(1..) {
            assert_eq!(receipt.wait().unwrap().seq, seq);
        }
        open(&path, 0, 0).unwrap();
    }

    #[test]
    fn answers_come_by_call_as_well_and_their_panics_harm_nobody() {
        let (_directory, path) = rotated_log(0);
        let writer = Arc::new(AuditWriter::start(open(&path, 0, 0).unwrap(), 2).unwrap());
        let (sender, answers) = channel();
        let (go, wait) = channel::<()>();
        let (at_work, started) = channel();
        writer.record_then(json!(1), move |_| {
            at_work.send(()).unwrap();
            wait.recv().unwrap();
            panic!("of the test");
        });
        started.recv().unwrap();
        for _ in 0..3 {
            let sender = sender.clone();
            writer.record_then(json!(2), move |result| sender.send(result).unwrap());
        }
        assert!(
            matches!(answers.recv().unwrap(), Err(AuditError::Full { capacity: 2 })),
            "while the thread is held up"
        );
        go.send(()).unwrap();
        assert_eq!(answers.recv().unwrap().unwrap().seq, 2);
        assert_eq!(answers.recv().unwrap().unwrap().seq, 3);

        // The last reference is dropped on the writer's own thread.
        let held = Arc::clone(&writer);
        let (go, wait) = channel::<()>();
        writer.record_then(json!(4), move |result| {
            wait.recv().unwrap();
            drop(held);
            sender.send(result).unwrap();
        });
        drop(writer);
        go.send(()).unwrap();
        assert_eq!(answers.recv().unwrap().unwrap().seq, 4);
    }

    #[test]
    fn a_record_that_is_none_fails_alone() {
        let (_directory, path) = rotated_log(0);
        let mut log = open(&path, 0, 0).unwrap();
        let no_key = std::collections::BTreeMap::from([((1, 2), 3)]);
        assert!(matches!(log.append(&no_key), Err(AuditError::Record { .. })));
        let text = "x".repeat(MAX_LINE_BYTES as usize);
        assert!(matches!(log.append(&text), Err(AuditError::TooLarge { .. })));
        let (longest, line) = log.line(&"").unwrap();
        assert_eq!(longest.seq, 1);
        log.append(&&text[line.len()..]).unwrap();
        assert_eq!(log.bytes, MAX_LINE_BYTES);
        assert_eq!(verify(&path).unwrap().records, 1);
        drop(log);
        open(&path, 0, 0).unwrap();
    }

    /// Its writes go to a device: `/dev/full` fails to write, `/dev/null` to sync.
    #[cfg(target_os = "linux")]
    fn failing_log(path: &Path, device: &str) -> AuditLog {
        let mut log = open(path, 0, 0).unwrap();
        log.file = OpenOptions::new().write(true).open(device).unwrap();
        log
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_log_that_failed_stays_failed() {
        let (_directory, path) = rotated_log(2);
        let mut log = failing_log(&path, "/dev/full");
        let error = log.append(&json!({})).unwrap_err();
        assert!(matches!(error, AuditError::Io { action: "write", .. }), "{error}");
        log.file = OpenOptions::new().append(true).open(&path).unwrap();
        assert_eq!(log.append(&json!({})).unwrap_err().to_string(), error.to_string());
        assert_eq!(log.sync().unwrap_err().to_string(), error.to_string());
        drop(log);
        append(&mut open(&path, 0, 0).unwrap(), 1);
        assert_eq!(verify(&path).unwrap().records, 3);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_writer_fails_closed_and_acknowledges_nothing_that_is_not_synced() {
        for (device, action) in [("/dev/full", "write"), ("/dev/null", "sync")] {
            let (_directory, path) = rotated_log(0);
            let writer = AuditWriter::start(failing_log(&path, device), 4).unwrap();
            let error = writer.record(json!({})).unwrap().wait().unwrap_err();
            assert!(matches!(error, AuditError::Io { action: found, .. } if found == action), "{error}");
            assert_eq!(writer.record(json!({})).unwrap_err().to_string(), error.to_string());
            let (sender, answer) = channel();
            writer.record_then(json!({}), move |result| sender.send(result).unwrap());
            assert_eq!(answer.recv().unwrap().unwrap_err().to_string(), error.to_string());
        }
    }
}
