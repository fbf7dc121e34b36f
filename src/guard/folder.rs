//! Where a guard's files are: in a folder, or in memory.

use super::error::{GuardError, shown};
use super::{Digest, MANIFEST_FILE, MAPPING_SUFFIX, MAPPINGS_FOLDER, MAX_MANIFEST_BYTES, MAX_TENSOR_BYTES};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Mapping files by their sha256: what errors call each, and its bytes.
pub(super) type MappingFiles<'a> = BTreeMap<Digest, (String, Cow<'a, [u8]>)>;

/// What a manifest's other files are read from.
pub(super) trait Files {
    /// The tensor file of that bare name.
    fn tensors(&self, name: &str) -> Result<Cow<'_, [u8]>, GuardError>;
    /// Those mapping files whose sha256 is wanted, as far as there are any.
    fn mappings(&self, wanted: &BTreeSet<Digest>) -> Result<MappingFiles<'_>, GuardError>;
    /// Where mappings were looked for.
    fn searched(&self) -> String;
}

/// Tensors and mappings that are at hand.
pub(super) struct InMemory<'a> {
    pub tensors: &'a [u8],
    pub mappings: &'a [&'a [u8]],
}

impl Files for InMemory<'_> {
    fn tensors(&self, _name: &str) -> Result<Cow<'_, [u8]>, GuardError> {
        Ok(Cow::Borrowed(self.tensors))
    }

    fn mappings(&self, wanted: &BTreeSet<Digest>) -> Result<MappingFiles<'_>, GuardError> {
        let found = self.mappings.iter().enumerate().filter_map(|(index, bytes)| {
            let digest = Digest::of(bytes);
            wanted.contains(&digest).then(|| (digest, (format!("mapping {index}"), Cow::Borrowed(*bytes))))
        });
        Ok(found.collect())
    }

    fn searched(&self) -> String {
        format!("the {} mappings given", self.mappings.len())
    }
}

/// A guard's folder.
pub(super) struct Folder {
    directory: PathBuf,
    shared_mappings: PathBuf,
}

impl Folder {
    pub(super) fn new(directory: &Path) -> Self {
        let parent = match (directory.parent(), directory.file_name()) {
            (Some(parent), Some(_)) => parent.to_owned(),
            _ => directory.join(".."),
        };
        Self { directory: directory.to_owned(), shared_mappings: parent.join(MAPPINGS_FOLDER) }
    }

    /// What errors call its file `name`.
    pub(super) fn label(&self, name: &str) -> String {
        shown(&self.directory.join(name).to_string_lossy())
    }

    pub(super) fn manifest(&self) -> Result<Vec<u8>, GuardError> {
        self.read_inside(MANIFEST_FILE, MAX_MANIFEST_BYTES)
    }

    /// Reads a file of the folder that links, if it is one, to a file of the folder.
    fn read_inside(&self, name: &str, limit: u64) -> Result<Vec<u8>, GuardError> {
        let path = self.directory.join(name);
        let resolved = fs::canonicalize(&path).map_err(GuardError::io("read", &path))?;
        let directory = fs::canonicalize(&self.directory).map_err(GuardError::io("read", &self.directory))?;
        if !resolved.starts_with(directory) {
            return Err(GuardError::OutsideFolder { path: shown(&path.to_string_lossy()) });
        }
        read(&path, limit)
    }
}

impl Files for Folder {
    fn tensors(&self, name: &str) -> Result<Cow<'_, [u8]>, GuardError> {
        self.read_inside(name, MAX_TENSOR_BYTES).map(Cow::Owned)
    }

    /// A mapping is known by its content alone, so in the shared folder a link to anywhere will do.
    fn mappings(&self, wanted: &BTreeSet<Digest>) -> Result<MappingFiles<'_>, GuardError> {
        let mut found = BTreeMap::new();
        for (directory, own) in [(&self.directory, true), (&self.shared_mappings, false)] {
            for name in mapping_names(directory)? {
                if found.len() == wanted.len() {
                    return Ok(found);
                }
                let path = directory.join(&name);
                let bytes = if own { self.read_inside(&name, MAX_TENSOR_BYTES) } else { read(&path, MAX_TENSOR_BYTES) };
                // A file that can't be read may be the wanted one or any other: then the search goes on without it.
                let Ok(bytes) = bytes else { continue };
                let digest = Digest::of(&bytes);
                if wanted.contains(&digest) {
                    found.insert(digest, (shown(&path.to_string_lossy()), Cow::Owned(bytes)));
                }
            }
        }
        Ok(found)
    }

    fn searched(&self) -> String {
        let shown = |path: &Path| format!("`{}`", shown(&path.to_string_lossy()));
        format!("{} or {}", shown(&self.directory), shown(&self.shared_mappings))
    }
}

/// Names of mapping files in `directory`, in order; none where there is no such folder.
fn mapping_names(directory: &Path) -> Result<Vec<String>, GuardError> {
    // `Path::new("")` is the working directory everywhere but here.
    let listed = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let entries = match fs::read_dir(listed) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(GuardError::io("read", directory)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(GuardError::io("read", directory))?.file_name();
        names.extend(name.into_string().ok().filter(|name| name.ends_with(MAPPING_SUFFIX)));
    }
    names.sort();
    Ok(names)
}

/// Reads a regular file of at most `limit` bytes. A pipe or a device is refused before it is opened: opening one can block for ever.
fn read(path: &Path, limit: u64) -> Result<Vec<u8>, GuardError> {
    let shown = || shown(&path.to_string_lossy());
    let metadata = fs::metadata(path).map_err(GuardError::io("read", path))?;
    if !metadata.is_file() {
        return Err(GuardError::OutsideFolder { path: shown() });
    }
    if metadata.len() > limit {
        return Err(GuardError::TooLarge { file: shown(), limit });
    }
    let file = File::open(path).map_err(GuardError::io("read", path))?;
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    file.take(limit + 1).read_to_end(&mut bytes).map_err(GuardError::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(GuardError::TooLarge { file: shown(), limit });
    }
    Ok(bytes)
}
