use super::AuditError;
use super::chain::{ChainFault, Ends, ends, line_start, no_chain};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Moves the log's last bytes to a new file, which is on the disk before they leave the log.
pub(super) fn set_torn_aside(
    path: &Path,
    mut file: &File,
    torn: std::ops::Range<u64>,
    seq: u64,
) -> Result<(), AuditError> {
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
pub(super) struct Rotated {
    pub(super) first_seq: u64,
    pub(super) path: PathBuf,
}

impl Rotated {
    pub(super) fn ends(&self) -> Result<Ends, AuditError> {
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
pub(super) fn rotated_files(path: &Path) -> Result<Vec<Rotated>, AuditError> {
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
pub(super) struct Lock(File);

impl Drop for Lock {
    /// To close the file would not do: a child process that is just being started holds a copy until it runs its own program.
    fn drop(&mut self) {
        drop(self.0.unlock());
    }
}

pub(super) fn lock(path: &Path) -> Result<Lock, AuditError> {
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
pub(super) fn is_regular(path: &Path) -> Result<(), AuditError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err(AuditError::NotAFile { path: shown(path) }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(AuditError::io("examine", path)(error)),
    }
}

/// Created with mode 0600: what users ask is nobody else's business.
pub(super) fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600);
    options
}

/// A file that was created or renamed survives a power cut once its directory is synced. Only Unix can do so, and must.
pub(super) fn sync_directory(path: &Path) -> Result<(), AuditError> {
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
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}
