use super::signature::Signature;
use crate::guard::{Guard, GuardError, MANIFEST_FILE, MAPPINGS_FOLDER};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The guards of a directory: each of its folders that holds a manifest, in the order of their names. What begins with a dot is none (Kubernetes keeps what it
/// mounts in such folders, and links to them).
#[derive(Debug)]
pub struct GuardDirectory {
    path: PathBuf,
    entries: BTreeMap<String, Entry>,
    mappings: Signature,
    problem: Option<String>,
}

/// A folder of the directory.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What is in force: of a folder that can't be read any more, what was read last. `None` where nothing ever could be.
    pub guard: Option<Arc<Guard>>,
    /// Why what the folder holds now is not in force.
    pub problem: Option<Arc<GuardError>>,
    signature: Signature,
}

impl GuardDirectory {
    /// The directory `path`, of which nothing is read yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), entries: BTreeMap::new(), mappings: Signature::default(), problem: None }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Folders by their names.
    pub fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// Why the directory could not be listed when it was last looked at; its guards stay then.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Guards that are in force, in order, with the names of their folders.
    pub fn guards(&self) -> impl Iterator<Item = (&str, &Arc<Guard>)> {
        self.entries.iter().filter_map(|(name, entry)| entry.guard.as_ref().map(|guard| (name.as_str(), guard)))
    }

    /// Reads what has changed since the last time, or `all` of it. Returns whether what is in force has, or what is wrong.
    ///
    /// A folder that is gone takes its guard with it; one whose manifest is gone does not, as in the middle of being written.
    pub fn refresh(&mut self, all: bool) -> bool {
        let folders = match self.folders() {
            Ok(folders) => folders,
            Err(problem) => {
                let is_new = self.problem.as_deref() != Some(&problem);
                self.problem = Some(problem);
                return is_new;
            }
        };
        let mut changed = self.problem.take().is_some();
        // Any of its mappings may be a guard's.
        let mappings = Signature::of(&self.path.join(MAPPINGS_FOLDER)).unwrap_or_default();
        let all = all || mappings != self.mappings;
        self.mappings = mappings;
        let before = self.entries.len();
        self.entries.retain(|name, _| folders.contains_key(name));
        changed |= before != self.entries.len();
        for (name, folder) in folders {
            let Ok(signature) = Signature::of(&folder) else { continue };
            let known = self.entries.get(&name);
            if known.is_some_and(|entry| entry.signature == signature && !all) {
                continue;
            }
            if known.is_none() && !folder.join(MANIFEST_FILE).exists() {
                continue;
            }
            changed |= self.read(name, &folder, signature);
        }
        changed
    }

    /// Reads one folder. Returns whether anything came of it.
    fn read(&mut self, name: String, folder: &Path, signature: Signature) -> bool {
        let read = Guard::load(folder);
        let known = self.entries.get(&name);
        let in_force = known.and_then(|entry| entry.guard.clone());
        let entry = match read {
            // The very same, so that nothing is compiled anew.
            Ok(guard) => match in_force.filter(|old| **old == guard) {
                Some(old) => Entry { guard: Some(old), problem: None, signature },
                None => Entry { guard: Some(Arc::new(guard)), problem: None, signature },
            },
            Err(error) => Entry { guard: in_force, problem: Some(Arc::new(error)), signature },
        };
        let same_guard = match (known.and_then(|known| known.guard.as_ref()), &entry.guard) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        let told = |entry: &Entry| entry.problem.as_ref().map(ToString::to_string);
        let changed = !same_guard || known.and_then(told) != told(&entry);
        self.entries.insert(name, entry);
        changed
    }

    /// Folders that may hold guards, by name.
    fn folders(&self) -> Result<BTreeMap<String, PathBuf>, String> {
        let shown = self.path.display();
        let unreadable = |error: std::io::Error| format!("can't read `{shown}`: {error}");
        if self.path.join(MANIFEST_FILE).exists() {
            // Else there would be no guard in it, and nothing said.
            return Err(format!("`{shown}` is a guard's own folder: name the directory that it lies in"));
        }
        let mut folders = BTreeMap::new();
        for entry in fs::read_dir(&self.path).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !name.starts_with('.') && name != MAPPINGS_FOLDER && entry.path().is_dir() {
                folders.insert(name, entry.path());
            }
        }
        Ok(folders)
    }
}
