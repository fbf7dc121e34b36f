use super::AuditError;
use super::chain::{Appended, ChainHash, Ends, MAX_LINE_BYTES, ends, line_start, no_chain};
use super::files::{
    Lock, Rotated, beside, is_regular, lock, private, rotated_files, set_torn_aside, shown, sync_directory,
};
use super::time::rfc3339;
use serde::Serialize;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// How large an audit log may grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AuditOptions {
    /// The log is rotated before a record that would make its file larger than this, in bytes. 0: never.
    pub max_bytes: u64,
    /// How many rotated files are kept; older ones are removed at a rotation. 0: all.
    pub keep: usize,
}

/// An audit log that this process alone writes.
///
/// After an error of its files it writes no more and answers every call with that error: a log that could have a gap is not continued
/// silently. Opening it again repairs what can be repaired.
#[derive(Debug)]
pub struct AuditLog {
    pub(super) path: PathBuf,
    options: AuditOptions,
    clock: fn() -> SystemTime,
    pub(super) file: File,
    pub(super) bytes: u64,
    /// Of the file's first record, be it written or yet to come.
    first_seq: u64,
    pub(super) last: Appended,
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

    pub(super) fn line(&self, record: &impl Serialize) -> Result<(Appended, Vec<u8>), AuditError> {
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

    pub(super) fn check(&self) -> Result<(), AuditError> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    fn fail_closed(&mut self, result: Result<(), AuditError>) -> Result<(), AuditError> {
        self.failure = result.as_ref().err().cloned();
        result
    }
}
