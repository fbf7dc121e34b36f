//! What has become of the guards since the server began, the last of it.

use super::snapshot::{GuardState, Snapshot};
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

/// Entries that are kept.
const MOST: usize = 100;

#[derive(Debug, Default)]
pub(super) struct History(Mutex<VecDeque<Happened>>);

/// An entry.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Happened {
    /// What is in force since then.
    pub epoch: u64,
    /// Seconds since 1970.
    pub time: f64,
    pub event: Event,
    /// Of a change by an admin: whose key it was.
    pub key: Option<String>,
    /// Folders whose guards are others than before, have come or gone, or were changed.
    pub changed: Vec<String>,
    /// What is not in force, by folder, and why.
    pub problems: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Event {
    Start,
    /// The directory's guards are in force, those with problems apart.
    Reload,
    /// Nothing that is new could be taken.
    Refused,
    /// An admin's change.
    Change,
}

impl History {
    pub fn add(&self, happened: Happened) {
        let mut entries = self.0.lock().expect("nothing panics with it");
        entries.push_front(happened);
        entries.truncate(MOST);
    }

    /// The newest first.
    pub fn entries(&self) -> Vec<Happened> {
        self.0.lock().expect("nothing panics with it").iter().cloned().collect()
    }
}

impl Happened {
    pub fn started(snapshot: &Snapshot) -> Self {
        let all = snapshot.guards.iter().map(|state| state.folder.clone()).collect();
        Self { changed: all, ..Self::new(Event::Start, snapshot) }
    }

    pub fn reloaded(before: &Snapshot, after: &Snapshot) -> Self {
        Self { changed: changed(&before.guards, &after.guards), ..Self::new(Event::Reload, after) }
    }

    pub fn refused(snapshot: &Snapshot) -> Self {
        Self::new(Event::Refused, snapshot)
    }

    pub fn changed(snapshot: &Snapshot, guard: &str, key: Option<String>) -> Self {
        let folder = snapshot.guards.iter().find(|state| state.is_called(guard)).map(|state| state.folder.clone());
        Self { changed: folder.into_iter().collect(), key, ..Self::new(Event::Change, snapshot) }
    }

    fn new(event: Event, snapshot: &Snapshot) -> Self {
        let mut problems = snapshot.problems();
        if let Some(problem) = &snapshot.problem {
            problems.insert("*".to_owned(), problem.clone());
        }
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Self { epoch: snapshot.epoch, time, event, key: None, changed: Vec::new(), problems }
    }
}

/// Folders that hold another guard in one than in the other, in order.
fn changed(before: &[GuardState], after: &[GuardState]) -> Vec<String> {
    let of = |states: &[GuardState], folder: &str| {
        let state = states.iter().find(|state| state.folder == folder);
        state.and_then(|state| state.guard.as_ref()).map(Arc::as_ptr)
    };
    let mut folders: Vec<&String> = before.iter().chain(after).map(|state| &state.folder).collect();
    folders.sort_unstable();
    folders.dedup();
    folders.into_iter().filter(|folder| of(before, folder) != of(after, folder)).cloned().collect()
}
