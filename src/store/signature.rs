use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// What tells a folder's files apart from what they were, without reading them: of each its size, when it was written, and what the system says of it besides.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Signature(BTreeMap<PathBuf, (u64, Option<SystemTime>, Identity)>);

impl Signature {
    /// Of the files in `folder` itself. Links are followed, so that what they lead to counts.
    pub(super) fn of(folder: &Path) -> io::Result<Self> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            // Gone since, or a link to nowhere: there is nothing to be read.
            let Ok(metadata) = fs::metadata(&path) else { continue };
            if metadata.is_file() {
                files.insert(path, (metadata.len(), metadata.modified().ok(), identity(&metadata)));
            }
        }
        Ok(Self(files))
    }
}

/// Which file it is, and when anything of it changed: a time of writing can be set back, this one can't.
type Identity = (u64, i64, i64);

#[cfg(unix)]
fn identity(metadata: &fs::Metadata) -> Identity {
    use std::os::unix::fs::MetadataExt;
    (metadata.ino(), metadata.ctime(), metadata.ctime_nsec())
}

#[cfg(not(unix))]
fn identity(_: &fs::Metadata) -> Identity {
    (0, 0, 0)
}
