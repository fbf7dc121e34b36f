//! The thread that keeps the guards: looks at their directory, compiles what is new, and says what is in force.

use super::error::ServerError;
use super::metrics::Metrics;
use super::snapshot::{GuardState, Snapshot, name_in};
use crate::engine::{EngineError, GuardCompiler, Model, Setting};
use crate::guard::Guard;
use crate::program::Program;
use crate::store::{GuardDirectory, Waker, WatchOptions, Watcher};
use arc_swap::ArcSwap;
use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::SystemTime;
use tokio::sync::oneshot;

/// What an admin asks of a guard.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Change {
    Enabled(bool),
    /// An intervention by its own name, or a group of them.
    Set {
        intervention: String,
        setting: Setting,
    },
    /// An intervention as its guard has it again.
    Reset {
        intervention: String,
    },
}

/// Why a change could not be made; nothing is changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChangeError {
    #[error("no guard is called `{0}`")]
    NoGuard(String),
    #[error("{0}")]
    Refused(String),
    #[error("the server ends")]
    Ends,
}

struct Asked {
    guard: String,
    changes: Vec<Change>,
    reply: oneshot::Sender<Result<Arc<Snapshot>, ChangeError>>,
}

/// The other threads' side of the keeper.
pub(super) struct Keeper {
    current: Arc<ArcSwap<Snapshot>>,
    asked: Arc<Mutex<VecDeque<Asked>>>,
    waker: Option<Waker>,
    thread: Option<JoinHandle<()>>,
}

/// Told of each snapshot but the first.
pub(super) type OnSnapshot = Box<dyn Fn(&Arc<Snapshot>) + Send>;

impl Keeper {
    /// Reads and compiles the guards of `directory`, and begins to watch them. Without one the model is served as it is.
    ///
    /// # Errors
    /// A guard can't be read or compiled: there is none to fall back on.
    pub fn start(
        model: Arc<Model>,
        directory: Option<GuardDirectory>,
        options: WatchOptions,
        metrics: Arc<Metrics>,
        on_snapshot: OnSnapshot,
    ) -> Result<Self, ServerError> {
        let asked: Arc<Mutex<VecDeque<Asked>>> = Arc::default();
        let watcher = directory.as_ref().map(|directory| Watcher::new(directory.path(), options));
        let waker = watcher.as_ref().map(Watcher::waker);
        let (started, wait) = mpsc::sync_channel(1);
        let room = Arc::clone(&asked);
        let thread = std::thread::Builder::new().name("guards".into()).spawn(move || {
            run(&model, directory, watcher.as_ref(), &room, &metrics, &on_snapshot, &started);
        })?;
        let current = wait.recv().map_err(|_| ServerError::Worker("it did not begin".into()))??;
        Ok(Self { current, asked, waker, thread: Some(thread) })
    }

    pub fn current(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Changes a guard for all, and returns what is in force then.
    pub async fn change(&self, guard: String, changes: Vec<Change>) -> Result<Arc<Snapshot>, ChangeError> {
        let Some(waker) = &self.waker else { return Err(ChangeError::NoGuard(guard)) };
        let (reply, answer) = oneshot::channel();
        self.asked.lock().expect("nothing panics with it").push_back(Asked { guard, changes, reply });
        waker.wake();
        answer.await.unwrap_or(Err(ChangeError::Ends))
    }

    /// Has the directory looked at now.
    pub fn look(&self) {
        if let Some(waker) = &self.waker {
            waker.look();
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(waker) = &self.waker {
            waker.end();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(
    model: &Model,
    directory: Option<GuardDirectory>,
    watcher: Option<&Watcher>,
    asked: &Mutex<VecDeque<Asked>>,
    metrics: &Metrics,
    on_snapshot: &OnSnapshot,
    started: &SyncSender<Result<Arc<ArcSwap<Snapshot>>, ServerError>>,
) {
    let (mut guards, first) = match begin(model, directory) {
        Ok(begun) => begun,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    metrics.epoch(first.epoch);
    let current = Arc::new(ArcSwap::from_pointee(first));
    if started.send(Ok(Arc::clone(&current))).is_err() {
        return;
    }
    let Some(watcher) = watcher else { return };
    while let Some(woken) = watcher.wait() {
        let publish = |snapshot: Snapshot| {
            let snapshot = Arc::new(snapshot);
            current.store(Arc::clone(&snapshot));
            metrics.epoch(snapshot.epoch);
            on_snapshot(&snapshot);
            snapshot
        };
        if guards.directory.refresh(woken.all) {
            let before = current.load().epoch;
            let snapshot = publish(guards.reloaded(&current.load()));
            let wrong = snapshot.guards.iter().filter_map(|state| Some((&state.folder, state.problem.as_ref()?)));
            for (folder, problem) in wrong {
                tracing::warn!(%folder, epoch = snapshot.epoch, "a guard is not reloaded: {problem}");
            }
            metrics.reloaded(snapshot.guards.iter().all(|state| state.problem.is_none()) && snapshot.problem.is_none());
            if snapshot.epoch != before {
                let after = woken.since.elapsed();
                tracing::info!(epoch = snapshot.epoch, ?after, "guards are reloaded");
            }
        }
        let next = || asked.lock().expect("nothing panics with it").pop_front();
        while let Some(Asked { guard, changes, reply }) = next() {
            let changed = guards.changed(&current.load(), &guard, &changes).map(&publish);
            let _ = reply.send(changed);
        }
    }
}

fn begin(model: &Model, directory: Option<GuardDirectory>) -> Result<(Guards<'_>, Snapshot), ServerError> {
    let mut compiler = GuardCompiler::new(model)?;
    let mut directory = directory.unwrap_or_else(|| GuardDirectory::new(std::path::Path::new("")));
    if !directory.path().as_os_str().is_empty() {
        directory.refresh(true);
    }
    if let Some(error) = ServerError::of_directory(&directory) {
        return Err(error);
    }
    let states: Vec<GuardState> = directory
        .guards()
        .map(|(folder, guard)| GuardState {
            folder: folder.to_owned(),
            guard: Some(Arc::clone(guard)),
            enabled: true,
            settings: BTreeMap::new(),
            problem: None,
        })
        .collect();
    for state in &states {
        if let Some(what) = state.guard.as_ref().and_then(|guard| guard.target().other_adapters(model.identity())) {
            tracing::warn!("guard `{}` {what}", state.folder);
        }
    }
    let acting: Vec<&Guard> = states.iter().filter_map(|state| state.guard.as_deref()).collect();
    let program = compiler.compile(&acting)?;
    let first = Snapshot { epoch: 1, since: SystemTime::now(), program, guards: states, problem: None };
    Ok((Guards { directory, compiler }, first))
}

struct Guards<'model> {
    directory: GuardDirectory,
    compiler: GuardCompiler<'model>,
}

impl Guards<'_> {
    /// What is in force now that the directory has changed. A guard that does not compile leaves the one before it in force.
    fn reloaded(&mut self, now: &Snapshot) -> Snapshot {
        let (mut states, replaced) = self.read(now);
        if acts_alike(&now.guards, &states) && replaced.iter().all(Option::is_none) {
            return self.unchanged(now, states, self.directory.problem().map(str::to_owned));
        }
        let mut program = self.program(&states);
        let unseen = states.iter().zip(&replaced).any(|(state, before)| before.is_some() && !state.enabled);
        if program.is_err() || unseen {
            // Most often all is sound; where it is not, or nothing of it was compiled, each is looked at by itself.
            self.mend(&mut states, replaced);
            if acts_alike(&now.guards, &states) {
                return self.unchanged(now, states, self.directory.problem().map(str::to_owned));
            }
            program = self.program(&states);
        }
        match program {
            Ok(program) => self.next(now, program, states),
            Err(error) => {
                // Together they are no program: what was in force stays so, whole.
                let mut kept = now.guards.clone();
                for state in &mut kept {
                    let new = states.iter().find(|new| new.folder == state.folder);
                    state.problem = new.and_then(|new| new.problem.clone());
                }
                self.unchanged(now, kept, Some(error.to_string()))
            }
        }
    }

    /// The directory's guards with what was set for them, and beside each what was in force in its place where that is another.
    fn read(&self, now: &Snapshot) -> (Vec<GuardState>, Vec<Option<Before>>) {
        let mut states = Vec::new();
        let mut replaced = Vec::new();
        for (folder, entry) in self.directory.entries() {
            let old = now.guards.iter().find(|state| state.folder == *folder);
            let (enabled, mut settings) =
                old.map_or((true, BTreeMap::new()), |old| (old.enabled, old.settings.clone()));
            let before = old.and_then(|old| old.guard.clone());
            let same = match (&before, &entry.guard) {
                (Some(before), Some(read)) => Arc::ptr_eq(before, read),
                (_, read) => read.is_none(),
            };
            let guard = if same { before.clone() } else { entry.guard.clone() };
            // What was set for an intervention that is gone is forgotten.
            let known = |name: &String| {
                let is_of = |other: &str| other == name || other.starts_with(&format!("{name}."));
                guard.iter().any(|guard| guard.interventions().iter().any(|of| is_of(&of.name)))
            };
            settings.retain(|name, _| known(name));
            let problem = entry.problem.as_ref().map(ToString::to_string);
            replaced.push((!same).then_some(before));
            states.push(GuardState { folder: folder.clone(), guard, enabled, settings, problem });
        }
        (states, replaced)
    }

    /// Puts back what was in force before a guard that does not compile.
    fn mend(&mut self, states: &mut [GuardState], replaced: Vec<Option<Before>>) {
        for (state, before) in states.iter_mut().zip(replaced) {
            let (Some(before), Some(guard)) = (before, &state.guard) else { continue };
            if let Err(error) = self.compiler.compile(&[guard]) {
                state.problem = Some(error.to_string());
                state.guard = before;
            }
        }
    }

    /// What is in force after an admin's changes to the guard `name`: its own name, or its folder's.
    fn changed(&mut self, now: &Snapshot, name: &str, changes: &[Change]) -> Result<Snapshot, ChangeError> {
        let mut states = now.guards.clone();
        let is_meant = |state: &&mut GuardState| {
            state.folder == name || state.guard.as_ref().is_some_and(|guard| guard.name() == name)
        };
        let state = states.iter_mut().find(is_meant).ok_or_else(|| ChangeError::NoGuard(name.to_owned()))?;
        for change in changes.iter().cloned() {
            match change {
                Change::Enabled(enabled) => state.enabled = enabled,
                Change::Set { intervention, setting } => {
                    state.settings.insert(intervention, setting);
                }
                Change::Reset { intervention } => {
                    state.settings.remove(&intervention);
                }
            }
        }
        let program = self.program(&states).map_err(|error| ChangeError::Refused(error.to_string()))?;
        Ok(self.next(now, program, states))
    }

    /// The program of what is enabled, at the strengths that are set.
    fn program(&mut self, states: &[GuardState]) -> Result<Arc<Program>, EngineError> {
        let acting = || states.iter().filter(|state| state.enabled).filter(|state| state.guard.is_some());
        let guards: Vec<&Guard> = acting().filter_map(|state| state.guard.as_deref()).collect();
        let mut program = self.compiler.compile(&guards)?;
        for state in acting() {
            let Some(guard) = &state.guard else { continue };
            for (name, setting) in &state.settings {
                let name = name_in(&program, guard.name(), name);
                program = Arc::new(program.with_setting(&name, *setting)?);
            }
        }
        Ok(program)
    }

    fn next(&self, now: &Snapshot, program: Arc<Program>, guards: Vec<GuardState>) -> Snapshot {
        let problem = self.directory.problem().map(str::to_owned);
        Snapshot { epoch: now.epoch + 1, since: SystemTime::now(), program, guards, problem }
    }

    /// The same in force, with what is to be told of it.
    fn unchanged(&self, now: &Snapshot, guards: Vec<GuardState>, problem: Option<String>) -> Snapshot {
        Snapshot { epoch: now.epoch, since: now.since, program: Arc::clone(&now.program), guards, problem }
    }
}

/// What was in force of a folder, if anything was.
type Before = Option<Arc<Guard>>;

/// Whether the same guards act in both, the very same and in one order.
fn acts_alike(some: &[GuardState], others: &[GuardState]) -> bool {
    let acting = |states: &[GuardState]| -> Vec<(String, *const Guard)> {
        let enabled = states.iter().filter(|state| state.enabled);
        enabled.filter_map(|state| Some((state.folder.clone(), Arc::as_ptr(state.guard.as_ref()?)))).collect()
    };
    acting(some) == acting(others)
}
