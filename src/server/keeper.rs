//! The thread that keeps the guards: looks at their directory, compiles what is new, and says what is in force.

use super::error::ServerError;
use super::history::{Happened, History};
use super::metrics::Metrics;
use super::snapshot::{GuardState, Snapshot};
use crate::engine::{EngineError, GuardCompiler, Model};
use crate::guard::Guard;
use crate::program::{Change, Changed, Program};
use crate::store::{GuardDirectory, Waker, WatchOptions, Watcher};
use arc_swap::ArcSwap;
use std::collections::{BTreeSet, VecDeque};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};
use tokio::sync::oneshot;

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
    what: Question,
    reply: oneshot::Sender<Result<Arc<Snapshot>, ChangeError>>,
}

enum Question {
    /// What is to be in force from now on.
    Change { guard: String, changes: Vec<Change>, key: Option<String> },
    /// What `of` is without some of its guards, for a single request.
    Without { of: Arc<Snapshot>, left_out: LeftOut },
}

/// Guards that don't act for a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum LeftOut {
    All,
    /// By their own names, or their folders'.
    Some(BTreeSet<String>),
}

/// The other threads' side of the keeper.
pub(super) struct Keeper {
    current: Arc<ArcSwap<Snapshot>>,
    history: Arc<History>,
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
        let history: Arc<History> = Arc::default();
        let told = Listeners { metrics, history: Arc::clone(&history), on_snapshot };
        let room = Arc::clone(&asked);
        let thread = std::thread::Builder::new().name("guards".into()).spawn(move || {
            run(&model, directory, watcher.as_ref(), &room, &told, &started);
        })?;
        let current = wait.recv().map_err(|_| ServerError::Worker("it did not begin".into()))??;
        Ok(Self { current, history, asked, waker, thread: Some(thread) })
    }

    pub fn current(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    pub fn history(&self) -> &History {
        &self.history
    }

    /// Changes a guard for all, as `key` asks, and returns what is in force then.
    pub async fn change(
        &self,
        guard: String,
        changes: Vec<Change>,
        key: Option<String>,
    ) -> Result<Arc<Snapshot>, ChangeError> {
        if self.waker.is_none() {
            return Err(ChangeError::NoGuard(guard));
        }
        self.ask(Question::Change { guard, changes, key }).await
    }

    /// The snapshot `of` without some of its guards: of the same epoch, and the very same for all who ask for it.
    pub async fn without(&self, of: Arc<Snapshot>, left_out: LeftOut) -> Result<Arc<Snapshot>, ChangeError> {
        match (&self.waker, left_out) {
            (None, LeftOut::All) => Ok(of),
            (None, LeftOut::Some(names)) => {
                names.into_iter().next().map_or(Ok(of), |name| Err(ChangeError::NoGuard(name)))
            }
            (Some(_), left_out) => self.ask(Question::Without { of, left_out }).await,
        }
    }

    async fn ask(&self, what: Question) -> Result<Arc<Snapshot>, ChangeError> {
        let (reply, answer) = oneshot::channel();
        self.asked.lock().expect("nothing panics with it").push_back(Asked { what, reply });
        if let Some(waker) = &self.waker {
            waker.wake();
        }
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

/// Who is told of what is in force.
struct Listeners {
    metrics: Arc<Metrics>,
    history: Arc<History>,
    on_snapshot: OnSnapshot,
}

impl Listeners {
    fn published(&self, snapshot: &Arc<Snapshot>) {
        self.metrics.snapshot(snapshot);
        (self.on_snapshot)(snapshot);
    }

    /// A look at the directory that has come to something.
    fn looked(&self, before: &Snapshot, after: &Snapshot, took: Duration) {
        let wrong = after.guards.iter().filter_map(|state| Some((&state.folder, state.problem.as_ref()?)));
        for (folder, problem) in wrong {
            tracing::warn!(%folder, epoch = after.epoch, "a guard is not reloaded: {problem}");
        }
        let whole = after.is_whole();
        self.metrics.guards.reloaded(whole);
        if after.epoch != before.epoch {
            tracing::info!(epoch = after.epoch, after = ?took, "guards are reloaded");
        }
        self.history.add(match (after.epoch != before.epoch, whole) {
            (true, _) => Happened::reloaded(before, after),
            (false, false) => Happened::refused(after),
            // The folders hold what is in force again.
            (false, true) => Happened::reloaded(after, after),
        });
    }
}

fn run(
    model: &Model,
    directory: Option<GuardDirectory>,
    watcher: Option<&Watcher>,
    asked: &Mutex<VecDeque<Asked>>,
    told: &Listeners,
    started: &SyncSender<Result<Arc<ArcSwap<Snapshot>>, ServerError>>,
) {
    let (mut guards, first) = match begin(model, directory) {
        Ok(begun) => begun,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    told.metrics.snapshot(&first);
    told.history.add(Happened::started(&first));
    let current = Arc::new(ArcSwap::from_pointee(first));
    if started.send(Ok(Arc::clone(&current))).is_err() {
        return;
    }
    let Some(watcher) = watcher else { return };
    while let Some(woken) = watcher.wait() {
        let publish = |snapshot: Snapshot| {
            let snapshot = Arc::new(snapshot);
            current.store(Arc::clone(&snapshot));
            told.published(&snapshot);
            snapshot
        };
        if guards.directory.refresh(woken.all) {
            let before = current.load_full();
            let after = publish(guards.reloaded(&before));
            told.looked(&before, &after, woken.since.elapsed());
        }
        let next = || asked.lock().expect("nothing panics with it").pop_front();
        while let Some(Asked { what, reply }) = next() {
            let answer = match what {
                Question::Change { guard, changes, key } => {
                    guards.changed(&current.load(), &guard, &changes).map(&publish).inspect(|snapshot| {
                        told.history.add(Happened::changed(snapshot, &guard, key));
                    })
                }
                Question::Without { of, left_out } => guards.without(of, &left_out),
            };
            let _ = reply.send(answer);
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
            changed: Changed::default(),
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
    Ok((Guards { directory, compiler, partial: Vec::new() }, first))
}

struct Guards<'model> {
    directory: GuardDirectory,
    compiler: GuardCompiler<'model>,
    /// Snapshots without some of their guards, each beside the one that it is of, the last ones last.
    partial: Vec<(Arc<Snapshot>, Arc<Snapshot>)>,
}

/// Such snapshots that are kept: whoever asks for one again shares what was read under it.
const MOST_PARTIAL: usize = 8;

impl Guards<'_> {
    /// What is in force now that the directory has changed. A guard that does not compile leaves the one before it in force.
    fn reloaded(&mut self, now: &Snapshot) -> Snapshot {
        let (mut states, replaced) = self.read(now);
        if acts_alike(&now.guards, &states) && replaced.iter().all(Option::is_none) {
            return self.unchanged(now, states, self.directory.problem().map(str::to_owned));
        }
        let mut program = self.program(&states);
        let unseen = states.iter().zip(&replaced).any(|(state, before)| before.is_some() && !state.changed.enabled);
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
            let mut changed = old.map_or_else(Changed::default, |old| old.changed.clone());
            let before = old.and_then(|old| old.guard.clone());
            let same = match (&before, &entry.guard) {
                (Some(before), Some(read)) => Arc::ptr_eq(before, read),
                (_, read) => read.is_none(),
            };
            let guard = if same { before.clone() } else { entry.guard.clone() };
            changed.forget_gone(guard.as_deref());
            let problem = entry.problem.as_ref().map(ToString::to_string);
            replaced.push((!same).then_some(before));
            states.push(GuardState { folder: folder.clone(), guard, changed, problem });
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
        let meant = states.iter_mut().find(|state| state.is_called(name));
        let state = meant.ok_or_else(|| ChangeError::NoGuard(name.to_owned()))?;
        let guard = state.guard.as_deref();
        let taken = state.changed.take(guard, changes);
        taken.map_err(|error| ChangeError::Refused(format!("guard `{name}`: {error}")))?;
        let refused = |error: EngineError| ChangeError::Refused(error.to_string());
        let sets = changes.iter().any(|change| matches!(change, Change::Set { .. }));
        if sets && !state.changed.enabled {
            // What can't be while it is enabled is not to be found out then.
            let mut alone = state.clone();
            alone.changed.enabled = true;
            self.program(&[alone]).map_err(refused)?;
        }
        let program = self.program(&states).map_err(refused)?;
        Ok(self.next(now, program, states))
    }

    /// `of` without some of its guards.
    fn without(&mut self, of: Arc<Snapshot>, left_out: &LeftOut) -> Result<Arc<Snapshot>, ChangeError> {
        let mut states = of.guards.clone();
        match left_out {
            LeftOut::All => states.iter_mut().for_each(|state| state.changed.enabled = false),
            LeftOut::Some(names) => {
                for name in names {
                    let state = states.iter_mut().find(|state| state.is_called(name));
                    state.ok_or_else(|| ChangeError::NoGuard(name.clone()))?.changed.enabled = false;
                }
            }
        }
        if acts_alike(&of.guards, &states) {
            return Ok(of);
        }
        let is_it = |(whole, part): &&(Arc<Snapshot>, Arc<Snapshot>)| {
            Arc::ptr_eq(whole, &of) && acts_alike(&part.guards, &states)
        };
        if let Some((_, part)) = self.partial.iter().find(is_it) {
            return Ok(Arc::clone(part));
        }
        let program = self.program(&states).map_err(|error| ChangeError::Refused(error.to_string()))?;
        let part = Snapshot { program, guards: states, problem: of.problem.clone(), ..*of };
        let part = Arc::new(part);
        self.partial.push((of, Arc::clone(&part)));
        let n_old = self.partial.len().saturating_sub(MOST_PARTIAL);
        self.partial.drain(..n_old);
        Ok(part)
    }

    /// The program of what is enabled, at the strengths that are set.
    fn program(&mut self, states: &[GuardState]) -> Result<Arc<Program>, EngineError> {
        let acting = || states.iter().filter(|state| state.changed.enabled).filter(|state| state.guard.is_some());
        let guards: Vec<&Guard> = acting().filter_map(|state| state.guard.as_deref()).collect();
        let mut program = self.compiler.compile(&guards)?;
        for state in acting() {
            let Some(guard) = &state.guard else { continue };
            if !state.changed.settings.is_empty() {
                program = Arc::new(state.changed.apply(guard.name(), Arc::unwrap_or_clone(program))?);
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
        let enabled = states.iter().filter(|state| state.changed.enabled);
        enabled.filter_map(|state| Some((state.folder.clone(), Arc::as_ptr(state.guard.as_ref()?)))).collect()
    };
    acting(some) == acting(others)
}
