//! The guards of the directory, compiled for the models that the process has loaded.

use pilotfish::Guard;
use pilotfish::guard::ModelIdentity;
use pilotfish::program::{Calibration, ModelShape, Program, TokenBytes};
use pilotfish::store::{GuardDirectory, WatchOptions, Watcher};
use pilotfish::tensor::LayerIndex;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// A model of the process.
pub struct LoadedModel {
    pub identity: ModelIdentity,
    pub shape: ModelShape,
    pub quantization: String,
    /// What its tokens spell.
    pub vocabulary: TokenBytes,
    standing: Mutex<Standing>,
}

/// What is in force for a model.
#[derive(Clone)]
pub struct Standing {
    /// Of the guards that it was made of: it grows with each change.
    pub epoch: u64,
    /// What runs, or why nothing can.
    pub program: Result<Arc<Program>, Arc<str>>,
}

/// Watches a directory of guards, and keeps the programs of all loaded models.
pub struct Guards {
    state: Mutex<State>,
}

struct State {
    directory: GuardDirectory,
    epoch: u64,
    models: Vec<Weak<LoadedModel>>,
}

/// Nothing that these locks protect is left half done where one panics.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LoadedModel {
    pub fn standing(&self) -> Standing {
        lock(&self.standing).clone()
    }
}

impl Guards {
    /// Reads the guards of `directory`, and goes on watching it from a thread of its own.
    pub fn watch(directory: &Path, options: WatchOptions) -> Arc<Self> {
        // Before it is read, so that no change falls in between.
        let watcher = Watcher::new(directory, options);
        let mut directory = GuardDirectory::new(directory);
        directory.refresh(true);
        tell_problems(&directory);
        let guards = Arc::new(Self { state: Mutex::new(State { directory, epoch: 0, models: Vec::new() }) });
        let watched = Arc::downgrade(&guards);
        let look = move || {
            while let Some(woken) = watcher.wait() {
                let Some(guards) = watched.upgrade() else { return };
                guards.refresh(woken.all);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("pilotfish-guards".into()).spawn(look) {
            tracing::error!("guards are not reloaded: {error}");
        }
        guards
    }

    /// Takes note of a model, and compiles the guards that are for it.
    pub fn add(
        &self,
        identity: ModelIdentity,
        shape: ModelShape,
        quantization: String,
        vocabulary: TokenBytes,
    ) -> Arc<LoadedModel> {
        let mut state = lock(&self.state);
        let standing = Standing { epoch: state.epoch, program: Err("not compiled yet".into()) };
        let model = LoadedModel { identity, shape, quantization, vocabulary, standing: Mutex::new(standing) };
        let program = state.compile(&model);
        if let Err(problem) = &program {
            tracing::error!("{problem}");
        }
        lock(&model.standing).program = program;
        let model = Arc::new(model);
        state.models.retain(|known| known.strong_count() > 0);
        state.models.push(Arc::downgrade(&model));
        model
    }

    /// Layers whose residual any of the guards reads or patches, in order.
    pub fn layers(&self) -> Vec<LayerIndex> {
        let state = lock(&self.state);
        let layers = state.directory.guards().flat_map(|(_, guard)| guard.vectors().iter().map(|vector| vector.layer));
        layers.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Why the directory can't be read, where it never could be.
    pub fn unreadable(&self) -> Option<String> {
        let state = lock(&self.state);
        state.directory.problem().filter(|_| state.directory.entries().is_empty()).map(str::to_owned)
    }

    /// What is wrong with the directory, its guards, and what they are to guard.
    pub fn problems(&self) -> Vec<String> {
        let state = lock(&self.state);
        let models = state.models.iter().filter_map(Weak::upgrade);
        let unguarded = models.filter_map(|model| model.standing().program.err().map(|problem| problem.to_string()));
        problems(&state.directory).chain(unguarded).collect()
    }

    /// Looks at all of the directory now. Returns the epoch that is in force then.
    pub fn reload(&self) -> u64 {
        self.refresh(true);
        lock(&self.state).epoch
    }

    fn refresh(&self, all: bool) {
        let mut state = lock(&self.state);
        if !state.directory.refresh(all) {
            return;
        }
        tell_problems(&state.directory);
        state.epoch += 1;
        for model in state.models.iter().filter_map(Weak::upgrade) {
            let program = state.compile(&model);
            let mut standing = lock(&model.standing);
            match (&program, &standing.program) {
                (Err(problem), Ok(_)) => tracing::error!("the guards that were in force stay: {problem}"),
                (Err(problem), Err(_)) => {
                    tracing::error!("{problem}");
                    *standing = Standing { epoch: state.epoch, program };
                }
                (Ok(program), _) => {
                    tracing::info!("epoch {}: {}", state.epoch, listed(program));
                    *standing = Standing { epoch: state.epoch, program: Ok(Arc::clone(program)) };
                }
            }
        }
    }
}

fn tell_problems(directory: &GuardDirectory) {
    problems(directory).for_each(|problem| tracing::error!("{problem}"));
}

fn problems(directory: &GuardDirectory) -> impl Iterator<Item = String> {
    let of_entries = directory.entries().iter().filter_map(|(folder, entry)| {
        let problem = entry.problem.as_ref()?;
        let rest = if entry.guard.is_some() { "; the guard that was read before stays in force" } else { "" };
        Some(format!("guard `{folder}`: {problem}{rest}"))
    });
    directory.problem().map(str::to_owned).into_iter().chain(of_entries)
}

/// The names of a program's guards, for people.
pub fn listed(program: &Program) -> String {
    match program.name() {
        none if none.is_empty() => "no guard".to_owned(),
        names => format!("guarded by {names}"),
    }
}

impl State {
    fn compile(&self, model: &LoadedModel) -> Result<Arc<Program>, Arc<str>> {
        if let Some(unread) = self.directory.entries().iter().find(|(_, entry)| entry.guard.is_none()) {
            // It may be for this model, and what it would do nobody knows.
            return Err(format!("guard `{}` can't be read, and was never read before", unread.0).into());
        }
        if let Some(problem) = self.directory.problem().filter(|_| self.directory.entries().is_empty()) {
            return Err(problem.into());
        }
        let all: Vec<&Arc<Guard>> = self.directory.guards().map(|(_, guard)| guard).collect();
        let identity = &model.identity;
        let own: Vec<&Guard> = all.iter().map(|guard| guard.as_ref()).filter(|guard| guard.is_for(identity)).collect();
        if own.is_empty() && !all.is_empty() {
            let names: Vec<String> = all.iter().map(|guard| format!("`{}`", guard.name())).collect();
            let reason = format!(
                "no guard in `{}` is for the model that this app has loaded, `{}` {} {}: {} {} for others",
                self.directory.path().display(),
                identity.architecture,
                identity.fingerprint.short(),
                identity.name,
                names.join(", "),
                if names.len() == 1 { "is" } else { "are" },
            );
            return Err(reason.into());
        }
        for guard in own.iter().filter(|guard| !guard.target().adapters.is_empty()) {
            tracing::warn!(
                "guard `{}` is for a model with adapters, which an attached guard can't check",
                guard.name()
            );
        }
        let stacked = Program::stack_for(&own, &model.quantization, model.shape, Calibration::Required);
        let (program, uncalibrated) = stacked.map_err(|error| error.to_string())?;
        uncalibrated.warn();
        Ok(Arc::new(program))
    }
}
