use super::descriptor::Descriptor;
use super::digest::Sha256Digest;
use super::error::ModelError;
use super::pull::PullProgress;
use etcetera::BaseStrategy;
use serde::{Deserialize, Serialize};
use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Where pulled files live: `DIRECTORY/NAME/FILE`, each with a marker beside it that says when it was last verified.
#[derive(Debug, Clone)]
pub struct ModelCache {
    directory: PathBuf,
}

impl ModelCache {
    /// The directory `PILOTFISH_MODELS`, or where that is not set `pilotfish/models` of the user's cache.
    pub fn from_env() -> Result<Self, ModelError> {
        const VARIABLE: &str = "PILOTFISH_MODELS";
        match std::env::var_os(VARIABLE) {
            Some(directory) => Ok(Self::at(directory)),
            None => match etcetera::choose_base_strategy() {
                Ok(base) => Ok(Self::at(base.cache_dir().join("pilotfish").join("models"))),
                Err(_) => Err(ModelError::NoCacheDirectory { variable: VARIABLE }),
            },
        }
    }

    /// A cache in that directory, which need not exist yet.
    pub fn at(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// Where the model's file belongs, whether or not it is there.
    pub fn path_of(&self, descriptor: &Descriptor) -> PathBuf {
        self.directory.join(&descriptor.name).join(&descriptor.file)
    }

    /// The model's file, if it is there and is the right one. Its sha256 is computed only when its size or time of
    /// modification is not that of the last verification.
    pub fn locate(&self, descriptor: &Descriptor) -> Option<PathBuf> {
        self.verified(descriptor, &()).unwrap_or_else(|error| {
            tracing::warn!(model = descriptor.name, %error, "the cached file is not usable");
            None
        })
    }

    /// As `locate`, and says what is wrong with a file that is there.
    pub(super) fn verified(
        &self,
        descriptor: &Descriptor,
        progress: &dyn PullProgress,
    ) -> Result<Option<PathBuf>, ModelError> {
        let path = self.path_of(descriptor);
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ModelError::io("examine", &path)(error)),
        };
        let marker = Marker::of(&metadata, descriptor.sha256);
        if marker.is_none() || marker != Marker::read(&path) {
            verify(descriptor, &path, progress)?;
            // As of before the hashing: a change during it is then seen the next time.
            if let Some(marker) = marker {
                marker.write(&path);
            }
        }
        Ok(Some(path))
    }

    /// Records that the file, verified before it was moved here, need not be hashed again.
    pub(super) fn mark_verified(&self, descriptor: &Descriptor) {
        let path = self.path_of(descriptor);
        let metadata = fs::metadata(&path).ok();
        if let Some(marker) = metadata.and_then(|metadata| Marker::of(&metadata, descriptor.sha256)) {
            marker.write(&path);
        }
    }
}

/// Checks size and sha256 of a file against the descriptor's.
pub(super) fn verify(descriptor: &Descriptor, path: &Path, progress: &dyn PullProgress) -> Result<(), ModelError> {
    let what = || "the file".to_owned();
    let bytes = fs::metadata(path).map_err(ModelError::io("examine", path))?.len();
    if bytes != descriptor.bytes {
        return Err(ModelError::Size { what: what(), expected: descriptor.bytes, found: bytes });
    }
    let found = Sha256Digest::of_file(path, |done| progress.report("verifying", done, bytes))?;
    if found != descriptor.sha256 {
        return Err(ModelError::Digest { what: what(), expected: descriptor.sha256, found });
    }
    Ok(())
}

/// What a file looked like when it was verified. It saves time and proves nothing: who can write it can write the model.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Marker {
    sha256: String,
    bytes: u64,
    modified_nanoseconds: u64,
}

impl Marker {
    fn of(metadata: &Metadata, sha256: Sha256Digest) -> Option<Self> {
        let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some(Self {
            sha256: sha256.to_string(),
            bytes: metadata.len(),
            modified_nanoseconds: modified.as_nanos().try_into().ok()?,
        })
    }

    fn read(model: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(marker_path(model)).ok()?).ok()
    }

    /// Best effort: in a cache that can't be written the file is verified at each use.
    fn write(&self, model: &Path) {
        let written =
            serde_json::to_vec(self).map_err(io::Error::from).and_then(|json| fs::write(marker_path(model), json));
        if let Err(error) = written {
            tracing::debug!(model = %model.display(), %error, "the verification could not be recorded");
        }
    }
}

fn marker_path(model: &Path) -> PathBuf {
    beside(model, ".verified")
}

/// `PATH` with a suffix to its file name.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::super::tests::tiny;
    use super::*;
    use std::cell::Cell;
    use std::fs::File;
    use std::time::{Duration, SystemTime};

    #[derive(Default)]
    struct Hashed(Cell<u32>);

    impl PullProgress for Hashed {
        fn report(&self, stage: &str, done: u64, total: u64) {
            self.0.set(self.0.get() + u32::from(stage == "verifying" && done == total));
        }
    }

    #[test]
    fn a_file_is_hashed_again_only_when_it_has_changed() {
        let directory = tempfile::tempdir().unwrap();
        let cache = ModelCache::at(directory.path());
        let descriptor = tiny(b"hello", vec![]);
        let path = cache.path_of(&descriptor);
        assert!(cache.locate(&descriptor).is_none());

        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"hello").unwrap();
        let hashed = Hashed::default();
        for _ in 0..3 {
            assert_eq!(cache.verified(&descriptor, &hashed).unwrap().as_deref(), Some(path.as_path()));
        }
        assert_eq!(hashed.0.get(), 1);

        let later = SystemTime::now() + Duration::from_secs(10);
        File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        cache.verified(&descriptor, &hashed).unwrap();
        assert_eq!(hashed.0.get(), 2);

        fs::write(&path, b"jello").unwrap();
        assert!(matches!(cache.verified(&descriptor, &hashed), Err(ModelError::Digest { .. })));
        assert!(cache.locate(&descriptor).is_none());
        fs::write(&path, b"hell").unwrap();
        assert!(matches!(cache.verified(&descriptor, &()), Err(ModelError::Size { expected: 5, found: 4, .. })));
    }

    #[test]
    fn a_marker_of_another_sha256_does_not_count() {
        let directory = tempfile::tempdir().unwrap();
        let cache = ModelCache::at(directory.path());
        let old = tiny(b"hello", vec![]);
        let path = cache.path_of(&old);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"hello").unwrap();
        cache.locate(&old).unwrap();
        assert!(cache.locate(&tiny(b"jello", vec![])).is_none());
    }
}
