use crate::guard::Guard;
use crate::program::{Changed, Program};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

/// The guards that are in force from one moment to another. Requests that come in this time are answered under it to their end.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// Counts up from 1.
    pub epoch: u64,
    pub since: SystemTime,
    pub program: Arc<Program>,
    /// Every folder of the directory, in the order in which the guards act.
    pub guards: Vec<GuardState>,
    /// What is wrong with all of it together.
    pub problem: Option<String>,
}

/// A guard, or what should be one.
#[derive(Debug, Clone)]
pub(super) struct GuardState {
    /// Its folder's name.
    pub folder: String,
    /// What is in force of it, or would be if it were enabled.
    pub guard: Option<Arc<Guard>>,
    /// What an admin has changed of it.
    pub changed: Changed,
    /// Why what the folder holds now is not in force.
    pub problem: Option<String>,
}

impl GuardState {
    /// Whether `name` is the guard's own or its folder's.
    pub fn is_called(&self, name: &str) -> bool {
        self.folder == name || self.guard.as_ref().is_some_and(|guard| guard.name() == name)
    }
}

impl Snapshot {
    /// Why what folders hold is not in force, by folder.
    pub fn problems(&self) -> BTreeMap<String, String> {
        let problem = |state: &GuardState| Some((state.folder.clone(), state.problem.clone()?));
        self.guards.iter().filter_map(problem).collect()
    }

    /// Whether all that the directory holds is in force, or would be if it were enabled.
    pub fn is_whole(&self) -> bool {
        self.problem.is_none() && self.guards.iter().all(|state| state.problem.is_none())
    }

    /// Guards that requests run under, in the program's order.
    pub fn acting(&self) -> impl Iterator<Item = &Arc<Guard>> {
        self.guards.iter().filter(|state| state.changed.enabled).filter_map(|state| state.guard.as_ref())
    }

    /// What the program calls a gate or an intervention of a guard.
    pub fn name_in_program(&self, guard: &str, name: &str) -> String {
        self.program.name_of(guard, name)
    }

    /// What the program calls the intervention that a request calls `name`: its own name where one guard alone has it, or `GUARD/NAME`, however many guards there
    /// are, so that a guard that comes breaks nobody's requests. What names none stays as it is.
    pub fn resolve(&self, name: &str) -> String {
        if self.program.has_intervention(name) {
            return name.to_owned();
        }
        let (of, own) = name.split_once('/').map_or((None, name), |(guard, own)| (Some(guard), own));
        let meant = self.acting().filter(|guard| of.is_none_or(|of| of == guard.name()));
        let mut named = meant
            .map(|guard| self.name_in_program(guard.name(), own))
            .filter(|name| self.program.has_intervention(name));
        match (named.next(), named.next()) {
            (Some(only), None) => only,
            _ => name.to_owned(),
        }
    }

    /// The guard and its own name of what the program calls `name`.
    pub fn split<'a>(&'a self, name: &'a str) -> (&'a str, &'a str) {
        match self.program.guards() {
            [only] => (&only.name, name),
            _ => name.split_once('/').unwrap_or(("", name)),
        }
    }
}
