//! The guards of the directory, compiled for the models that the process has loaded.

use crate::record::Record;
use pilotfish::Guard;
use pilotfish::attach::control::{GateStatus, GuardStatus, InForce, InterventionStatus, ModelStatus};
use pilotfish::guard::{ModelIdentity, OnFire};
use pilotfish::program::{Calibration, Change, Changed, ModelShape, Program, TokenBytes};
use pilotfish::store::{Entry, GuardDirectory, WatchOptions, Watcher};
use pilotfish::tensor::LayerIndex;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

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
    /// Who is told of what is in force.
    record: OnceLock<Arc<Record>>,
}

struct State {
    directory: GuardDirectory,
    /// What was changed of guards, by their folders.
    changed: BTreeMap<String, Changed>,
    epoch: u64,
    models: Vec<Weak<LoadedModel>>,
}

/// Why a guard could not be changed; nothing is changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    #[error("no guard is called `{guard}`; there {}", listed_names(.known))]
    NoGuard { guard: String, known: Vec<String> },
    #[error("several guards are called `{guard}`: name one by its folder; there {}", listed_names(.folders))]
    Several { guard: String, folders: Vec<String> },
    #[error("guard `{guard}`: {reason}")]
    Refused { guard: String, reason: String },
}

fn listed_names(names: &[String]) -> String {
    if names.is_empty() { "are none".to_owned() } else { format!("are `{}`", names.join("`, `")) }
}

/// Nothing that these locks protect is left half done where one panics.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LoadedModel {
    pub fn standing(&self) -> Standing {
        lock(&self.standing).clone()
    }

    fn status(&self) -> ModelStatus {
        let ModelIdentity { name, architecture, fingerprint, .. } = &self.identity;
        let program = self.standing().program;
        let names = |program: &Arc<Program>| program.guards().iter().map(|guard| guard.name.clone()).collect();
        ModelStatus {
            name: name.clone(),
            architecture: architecture.clone(),
            fingerprint: fingerprint.to_string(),
            quantization: self.quantization.clone(),
            guards: program.as_ref().map(names).unwrap_or_default(),
            problem: program.err().map(|problem| problem.to_string()),
        }
    }
}

fn guard_status(folder: &str, entry: &Entry, changed: &Changed) -> GuardStatus {
    let guard = entry.guard.as_deref();
    let gates = guard.into_iter().flat_map(|guard| {
        guard.gates().iter().map(|gate| GateStatus {
            name: gate.name.clone(),
            layer: guard.vectors()[gate.vector].layer.0,
            on_fire: match gate.on_fire {
                OnFire::Block => "block".to_owned(),
                OnFire::Steer => "steer".to_owned(),
            },
        })
    });
    let interventions = guard.into_iter().flat_map(|guard| {
        guard.interventions().iter().zip(changed.strengths(guard)).map(|(intervention, strength)| InterventionStatus {
            name: intervention.name.clone(),
            kind: intervention.kind.name().to_owned(),
            layer: guard.layer_of(intervention).0,
            strength,
            strength_of_guard: intervention.strength,
        })
    });
    GuardStatus {
        folder: folder.to_owned(),
        name: guard.map(|guard| guard.name().to_owned()),
        content: guard.map(|guard| guard.content_hash().to_string()),
        enabled: changed.enabled,
        problem: entry.problem.as_ref().map(ToString::to_string),
        gates: gates.collect(),
        interventions: interventions.collect(),
        settings: changed.settings.clone(),
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
        let guards = Arc::new(Self {
            record: OnceLock::new(),
            state: Mutex::new(State { directory, changed: BTreeMap::new(), epoch: 0, models: Vec::new() }),
        });
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
        let program = state.compile(&model, &state.changed);
        match &program {
            Ok(program) => tell_standing(&model, state.epoch, program, None),
            Err(problem) => tracing::error!("{problem}"),
        }
        lock(&model.standing).program = program;
        let model = Arc::new(model);
        state.models.retain(|known| known.strong_count() > 0);
        state.models.push(Arc::downgrade(&model));
        model
    }

    /// Models that are loaded, in the order of the status.
    pub fn models(&self) -> Vec<Arc<LoadedModel>> {
        lock(&self.state).models.iter().filter_map(Weak::upgrade).collect()
    }

    /// Layers whose residual any of the guards reads or patches, in order.
    pub fn layers(&self) -> Vec<LayerIndex> {
        let state = lock(&self.state);
        let layers = state.directory.guards().flat_map(|(_, guard)| guard.vectors().iter().map(|vector| vector.layer));
        layers.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Why the directory can't be read, where it never could be.
    pub fn unreadable(&self) -> Option<String> {
        lock(&self.state).unreadable().map(str::to_owned)
    }

    /// What is wrong with the directory, its guards, and what they are to guard.
    pub fn problems(&self) -> Vec<String> {
        let state = lock(&self.state);
        let models = state.models.iter().filter_map(Weak::upgrade);
        let unguarded = models.filter_map(|model| model.standing().program.err().map(|problem| problem.to_string()));
        problems(&state.directory).chain(unguarded).collect()
    }

    /// Changes the guard of that name, or of the folder of that name, for prompts to come. Returns the epoch from which on it is so.
    ///
    /// A guard that no model is loaded for is only looked at: whether a model can be run so is found out when one comes.
    ///
    /// # Errors
    /// There is no such guard or intervention, or a loaded model's guards can't be compiled so.
    pub fn change(&self, guard: &str, changes: &[Change]) -> Result<u64, ChangeError> {
        let mut state = lock(&self.state);
        let folder = state.folder_called(guard)?;
        let refused = |reason: String| ChangeError::Refused { guard: guard.to_owned(), reason };
        let meant = state.directory.entries().get(&folder).and_then(|entry| entry.guard.clone());
        let mut changed = state.changed.clone();
        let of_it = changed.entry(folder).or_default();
        of_it.take(meant.as_deref(), changes).map_err(|error| refused(error.to_string()))?;
        let models: Vec<Arc<LoadedModel>> = state.models.iter().filter_map(Weak::upgrade).collect();
        let sets = changes.iter().any(|change| matches!(change, Change::Set { .. }));
        if let (Some(meant), true) = (&meant, sets) {
            // By itself, too: while it is disabled, or others keep the model from running, it would be found out only later.
            for model in models.iter().filter(|model| meant.is_for(&model.identity)) {
                compile_for(model, &[(meant, of_it)]).map_err(refused)?;
            }
        }
        let programs: Vec<_> = models.iter().map(|model| state.compile(model, &changed)).collect();
        for (model, program) in models.iter().zip(&programs) {
            // What could not run before is no worse off.
            if let (Err(reason), Ok(_)) = (program, model.standing().program) {
                return Err(refused(reason.to_string()));
            }
        }
        changed.retain(|_, changed| !changed.is_nothing());
        state.changed = changed;
        state.epoch += 1;
        for (model, program) in models.iter().zip(programs) {
            if let Ok(program) = &program {
                tell_standing(model, state.epoch, program, Some(guard));
            }
            *lock(&model.standing) = Standing { epoch: state.epoch, program };
        }
        let in_force = state.in_force();
        drop(state);
        if let Some(record) = self.record.get() {
            record.changed(guard, &in_force);
        }
        Ok(in_force.epoch)
    }

    /// Has `record` told of what is in force, from now on.
    pub fn tell(&self, record: Arc<Record>) {
        record.started(&self.status());
        let _ = self.record.set(record);
    }

    /// Reads all files of the directory now. Returns the epoch that is in force then.
    pub fn reload(&self) -> u64 {
        self.refresh(true);
        lock(&self.state).epoch
    }

    /// What is in force, and what is not and why.
    pub fn status(&self) -> InForce {
        lock(&self.state).in_force()
    }

    fn refresh(&self, all: bool) {
        let mut state = lock(&self.state);
        if !state.directory.refresh(all) {
            return;
        }
        tell_problems(&state.directory);
        state.forget_gone();
        state.epoch += 1;
        for model in state.models.iter().filter_map(Weak::upgrade) {
            let program = state.compile(&model, &state.changed);
            let mut standing = lock(&model.standing);
            match (&program, &standing.program) {
                (Err(problem), Ok(_)) => tracing::error!("the guards that were in force stay: {problem}"),
                (Err(problem), Err(_)) => {
                    tracing::error!("{problem}");
                    *standing = Standing { epoch: state.epoch, program };
                }
                (Ok(program), _) => {
                    tell_standing(&model, state.epoch, program, None);
                    *standing = Standing { epoch: state.epoch, program: Ok(Arc::clone(program)) };
                }
            }
        }
        let in_force = state.in_force();
        drop(state);
        if let Some(record) = self.record.get() {
            record.reloaded(&in_force);
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

/// Tells what is in force for a model from now on, and which guard was changed for that, if one was.
fn tell_standing(model: &LoadedModel, epoch: u64, program: &Program, changed: Option<&str>) {
    let model = &model.identity.name;
    let why = changed.map_or_else(String::new, |guard| format!(", as `{guard}` was changed"));
    match program.name() {
        none if none.is_empty() => tracing::warn!(model, "NOT GUARDED: epoch {epoch}: no guard is in force{why}"),
        names => tracing::info!(model, "epoch {epoch}: guarded by {names}{why}"),
    }
}

impl State {
    /// Why the directory can't be read, where it never could be.
    fn unreadable(&self) -> Option<&str> {
        self.directory.problem().filter(|_| self.directory.entries().is_empty())
    }

    /// The folder that `name` is of, or whose guard is called so.
    fn folder_called(&self, name: &str) -> Result<String, ChangeError> {
        if self.directory.entries().contains_key(name) {
            return Ok(name.to_owned());
        }
        let called = self.directory.guards().filter(|(_, guard)| guard.name() == name);
        let mut folders: Vec<String> = called.map(|(folder, _)| folder.to_owned()).collect();
        match (folders.pop(), folders.is_empty()) {
            (Some(only), true) => Ok(only),
            (Some(last), false) => {
                folders.push(last);
                Err(ChangeError::Several { guard: name.to_owned(), folders })
            }
            (None, _) => {
                let known = self.directory.entries().iter().map(|(folder, entry)| {
                    entry.guard.as_ref().map_or_else(|| folder.clone(), |guard| guard.name().to_owned())
                });
                Err(ChangeError::NoGuard { guard: name.to_owned(), known: known.collect() })
            }
        }
    }

    fn in_force(&self) -> InForce {
        let none = Changed::default();
        let guards = self.directory.entries().iter();
        let guards =
            guards.map(|(folder, entry)| guard_status(folder, entry, self.changed.get(folder).unwrap_or(&none)));
        InForce {
            epoch: self.epoch,
            directory: self.directory.path().display().to_string(),
            problem: self.directory.problem().map(str::to_owned),
            guards: guards.collect(),
            models: self.models.iter().filter_map(Weak::upgrade).map(|model| model.status()).collect(),
        }
    }

    /// Forgets what was changed of folders and interventions that are not there any more.
    fn forget_gone(&mut self) {
        let entries = self.directory.entries();
        self.changed.retain(|folder, changed| {
            let Some(entry) = entries.get(folder) else { return false };
            changed.forget_gone(entry.guard.as_deref());
            !changed.is_nothing()
        });
    }

    fn compile(&self, model: &LoadedModel, changed: &BTreeMap<String, Changed>) -> Result<Arc<Program>, Arc<str>> {
        let is_enabled = |folder: &str| changed.get(folder).is_none_or(|changed| changed.enabled);
        let unread =
            self.directory.entries().iter().find(|(folder, entry)| entry.guard.is_none() && is_enabled(folder));
        if let Some((folder, entry)) = unread {
            // It may be for this model, and what it would do nobody knows.
            let why = entry.problem.as_ref().map_or_else(|| "it can't be read".to_owned(), ToString::to_string);
            return Err(format!("guard `{folder}` was never read before: {why}").into());
        }
        if let Some(problem) = self.unreadable() {
            return Err(problem.into());
        }
        let all: Vec<&Arc<Guard>> = self.directory.guards().map(|(_, guard)| guard).collect();
        let identity = &model.identity;
        if !all.is_empty() && !all.iter().any(|guard| guard.is_for(identity)) {
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
        let none = Changed::default();
        let own: Vec<(&Guard, &Changed)> = self
            .directory
            .guards()
            .filter(|(folder, guard)| guard.is_for(identity) && is_enabled(folder))
            .map(|(folder, guard)| (guard.as_ref(), changed.get(folder).unwrap_or(&none)))
            .collect();
        for (guard, _) in own.iter().filter(|(guard, _)| !guard.target().adapters.is_empty()) {
            tracing::warn!(
                "guard `{}` is for a model with adapters, which an attached guard can't check",
                guard.name()
            );
        }
        Ok(Arc::new(compile_for(model, &own)?))
    }
}

/// The program of `guards` for a model, each as it was changed.
fn compile_for(model: &LoadedModel, guards: &[(&Guard, &Changed)]) -> Result<Program, String> {
    let stack: Vec<&Guard> = guards.iter().map(|(guard, _)| *guard).collect();
    let stacked = Program::stack_for(&stack, &model.quantization, model.shape, Calibration::Required);
    let (program, uncalibrated) = stacked.map_err(|error| error.to_string())?;
    uncalibrated.warn();
    let changed = |program, (guard, changed): &(&Guard, &Changed)| changed.apply(guard.name(), program);
    guards.iter().try_fold(program, changed).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use pilotfish::program::Setting;
    use pilotfish::tensor::HiddenSize;
    use tempfile::TempDir;

    /// Where guards of this repository are copied to.
    fn directory(names: &[&str]) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        for name in names {
            copy(name, &directory.path().join(name));
        }
        directory
    }

    fn copy(name: &str, to: &Path) {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guards").join(name);
        std::fs::create_dir(to).unwrap();
        for file in std::fs::read_dir(from).unwrap().map(Result::unwrap).filter(|file| file.path().is_file()) {
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }

    fn watch(directory: &TempDir) -> Arc<Guards> {
        // Nothing is looked at but when a test says so.
        let never = std::time::Duration::from_secs(3600);
        Guards::watch(directory.path(), WatchOptions { debounce: never, at_most: never, poll: never })
    }

    /// SmolLM2-135M, by what guards for it say.
    fn model(guards: &Guards) -> Arc<LoadedModel> {
        let refusal = Guard::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../guards/refusal-smollm2")).unwrap();
        let target = refusal.target();
        let identity = ModelIdentity {
            name: "SmolLM2".into(),
            architecture: target.architecture.clone(),
            fingerprint: target.fingerprint,
            adapters: Vec::new(),
        };
        let shape = ModelShape { n_embd: HiddenSize(576), n_layer: 30 };
        guards.add(identity, shape, "Q4_1".into(), TokenBytes::new(std::iter::empty::<Vec<u8>>()))
    }

    fn names(model: &LoadedModel) -> Vec<String> {
        let program = model.standing().program.unwrap();
        program.guards().iter().map(|guard| guard.name.clone()).collect()
    }

    fn strengths(model: &LoadedModel) -> Vec<f32> {
        model.standing().program.unwrap().interventions().map(|(_, strength)| strength).collect()
    }

    fn set(intervention: &str, setting: Setting) -> Change {
        Change::Set { intervention: intervention.to_owned(), setting }
    }

    const GATE: &str = "harm-gate-gemma3-to-smollm2";
    const REFUSAL: &str = "refusal-smollm2";

    #[test]
    fn a_change_is_for_the_models_and_survives_a_reload() {
        let directory = directory(&[GATE, REFUSAL]);
        let guards = watch(&directory);
        let model = model(&guards);
        let status = guards.status();
        let intervention = status.guards[1].interventions[0].clone();
        let (folder, name) = (&status.guards[1].folder, status.guards[1].name.clone().unwrap());
        assert_eq!((folder.as_str(), status.models[0].guards.len()), (REFUSAL, 2));
        let both = names(&model);
        // By its folder, and by its own name.
        assert_eq!(guards.change(REFUSAL, &[set(&intervention.name, Setting::Strength(0.5))]), Ok(1));
        assert_eq!(guards.change(GATE, &[Change::Enabled(false)]), Ok(2));
        assert_eq!(model.standing().epoch, 2);
        assert_eq!((names(&model), strengths(&model)[0]), (vec![name.clone()], 0.5));
        // A reload that finds nothing new, one that finds another description, and one of a model that comes later.
        assert_eq!(guards.reload(), 2);
        let manifest = directory.path().join(REFUSAL).join("guard.toml");
        let text = std::fs::read_to_string(&manifest).unwrap();
        std::fs::write(&manifest, text.replace("Refuses harmful requests", "Refuses")).unwrap();
        assert_eq!(guards.reload(), 3);
        assert_eq!((names(&model), strengths(&model)[0]), (vec![name.clone()], 0.5));
        assert_eq!(strengths(&super::tests::model(&guards))[0], 0.5);
        let status = guards.status();
        assert_eq!(status.guards[1].interventions[0].strength, 0.5);
        assert!(!status.guards[0].enabled && status.guards[1].enabled);
        // As the files have it again.
        guards.change(&name, &[Change::Reset { intervention: intervention.name }]).unwrap();
        guards.change(GATE, &[Change::Enabled(true)]).unwrap();
        assert_eq!((names(&model), strengths(&model)[0]), (both, intervention.strength_of_guard));
        // With its folder goes what was set for it.
        guards.change(GATE, &[Change::Enabled(false)]).unwrap();
        std::fs::remove_dir_all(directory.path().join(GATE)).unwrap();
        guards.reload();
        copy(GATE, &directory.path().join(GATE));
        guards.reload();
        assert_eq!(names(&model).len(), 2);
    }

    #[test]
    fn a_model_whose_guards_are_all_off_is_not_one_that_none_is_for() {
        let directory = directory(&[REFUSAL]);
        let guards = watch(&directory);
        let model = model(&guards);
        guards.change(REFUSAL, &[Change::Enabled(false)]).unwrap();
        assert!(names(&model).is_empty());
        // One that nobody can read keeps everything from decoding, unless it is off.
        std::fs::create_dir(directory.path().join("broken")).unwrap();
        std::fs::write(directory.path().join("broken/guard.toml"), "name = 3").unwrap();
        guards.reload();
        let later = super::tests::model(&guards);
        assert!(later.standing().program.unwrap_err().contains("`broken`"));
        guards.change("broken", &[Change::Enabled(false)]).unwrap();
        assert!(names(&later).is_empty());
    }

    #[test]
    fn what_can_not_be_is_refused_and_changes_nothing() {
        let directory = directory(&[REFUSAL]);
        copy(REFUSAL, &directory.path().join("twin"));
        let guards = watch(&directory);
        let before = guards.status();
        let (name, intervention) =
            (before.guards[0].name.clone().unwrap(), before.guards[0].interventions[0].name.clone());
        let reason = |guard: &str, change: Change| guards.change(guard, &[change]).unwrap_err().to_string();
        assert!(reason("nobody", Change::Enabled(true)).contains("no guard is called `nobody`; there are `refusal`"));
        assert!(
            reason(&name, Change::Enabled(false))
                .contains("name one by its folder; there are `refusal-smollm2`, `twin`")
        );
        assert!(reason(REFUSAL, set("nothing", Setting::Off)).contains("no intervention is called `nothing`"));
        assert_eq!(guards.status(), before);
        // Two of one name are no program: turning either off makes one, and turning it on again is refused.
        let model = model(&guards);
        assert!(model.standing().program.is_err());
        guards.change("twin", &[Change::Enabled(false)]).unwrap();
        assert_eq!(names(&model), [name]);
        assert!(!reason("twin", Change::Enabled(true)).is_empty());
        // What can't be while it is on is refused while it is off.
        let too_much = set(&intervention, Setting::Strength(f32::MAX));
        for guard in [REFUSAL, "twin"] {
            assert!(reason(guard, too_much.clone()).contains("can't have the strength"), "{guard}");
        }
        assert_eq!((model.standing().epoch, guards.status().epoch), (1, 1));
    }
}
