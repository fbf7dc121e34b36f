use super::AuditError;
use super::chain::{Appended, ChainFault, ChainHash, Line, next_line};
use super::files::{Rotated, is_regular, rotated_files, shown};
use std::fs::File;
use std::io::{self, BufReader};
use std::path::Path;

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
