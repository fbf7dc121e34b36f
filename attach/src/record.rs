//! What an attached process writes down: counts for its metrics, and records for its audit log.

use crate::guards::{LoadedModel, lock};
use pilotfish::Program;
use pilotfish::attach::PID;
use pilotfish::attach::control::{AuditStatus, Counts, GateScore, InForce};
use pilotfish::audit::{AuditError, AuditLog, AuditOptions, AuditWriter, Receipt};
use pilotfish::hook::Ended;
use pilotfish::store::{GateLabels, GuardMetrics};
use pilotfish::tensor::SequenceId;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Records that may wait for the disk: the threads that decode wait for theirs.
const CAPACITY: usize = 256;

/// Counts and the audit log.
pub struct Record {
    registry: Registry,
    guards: GuardMetrics,
    decodes: Counter,
    prompts: Counter,
    decisions: Family<GateLabels, Counter>,
    /// Of all guards.
    n_blocked: Counter,
    refused: Counter,
    unguarded: Counter,
    audit: Option<Audit>,
}

/// The audit log, as its path has it, and its writer in this process.
struct Audit {
    path: PathBuf,
    opened: Mutex<Opened>,
}

struct Opened {
    pid: u32,
    path: PathBuf,
    /// Or why there is none.
    writer: Result<AuditWriter, String>,
}

/// A record that is not on the disk yet.
#[must_use = "what it is about must not go on before it is on the disk"]
pub struct Written(Option<Result<Receipt, String>>);

impl Record {
    /// Opens the audit log at `path`, if it is given; whether it could be opened is told to whoever writes.
    pub fn new(audit: Option<&Path>) -> Self {
        let mut registry = Registry::with_prefix("pilotfish");
        let guards = GuardMetrics::register(&mut registry, "Prompts");
        let decodes = Counter::default();
        registry.register("decodes", "Decodes that were guarded", decodes.clone());
        let prompts = Counter::default();
        registry.register("prompts", "Prompts that were read to their end", prompts.clone());
        let decisions = Family::<GateLabels, Counter>::default();
        registry.register("gate_decisions", "Prompts over which a gate has decided", decisions.clone());
        let refused = Counter::default();
        registry.register("refused_decodes", "Decodes that were refused", refused.clone());
        let unguarded = Counter::default();
        let help = "Decodes under no guard, or that could not be guarded or put on record, and ran all the same";
        registry.register("unguarded_decodes", help, unguarded.clone());
        let audit = audit.map(Audit::open);
        Self { registry, guards, decodes, prompts, decisions, n_blocked: Counter::default(), refused, unguarded, audit }
    }

    /// A guarded decode that has gone well.
    pub fn decoded(&self, prompt_tokens: usize, answer_tokens: usize) {
        self.decodes.inc();
        self.guards.prompt_tokens.inc_by(prompt_tokens as u64);
        self.guards.answer_tokens.inc_by(answer_tokens as u64);
    }

    /// What gates have decided over a prompt, and why all count as fired where they have not read the whole.
    pub fn prompt(&self, of: &Of<'_>, gates: &[GateScore], unread: Option<&str>) -> Written {
        self.prompts.inc();
        for GateScore { guard, gate, fired, .. } in gates {
            self.decisions.get_or_create(&GateLabels::new(guard, gate)).inc();
            if *fired {
                self.guards.fired(guard, gate);
            }
        }
        self.write(|| {
            let mut what = json!({ "gates": gates });
            if let Some(why) = unread {
                what["unread"] = why.into();
            }
            of.record("prompt", what)
        })
    }

    /// An answer that a guard has ended.
    pub fn ended(&self, of: &Of<'_>, ended: &Ended) -> Written {
        let how = match ended {
            Ended::Blocked { guard, gate, .. } => {
                self.n_blocked.inc();
                self.guards.blocked(guard);
                json!({ "end": "blocked", "guard": guard, "gate": of.program.own_name(guard, gate) })
            }
            Ended::Fault { guard, fault } => {
                self.guards.faults.inc();
                json!({ "end": "fault", "guard": guard, "fault": fault.to_string() })
            }
        };
        self.write(|| of.record("end", how))
    }

    /// A decode that could not be guarded, or put on record. Whether it `passes` all the same, and whether that is on record already.
    pub fn not_guarded(&self, reason: &str, passes: bool, is_told: bool) {
        if passes { &self.unguarded } else { &self.refused }.inc();
        if !is_told {
            let event = if passes { "unguarded" } else { "refused" };
            self.note(|| json!({ "event": event, "pid": std::process::id(), "reason": reason }));
        }
    }

    /// A decode under no guard, since there is none or all are turned off.
    pub fn passed(&self) {
        self.unguarded.inc();
    }

    /// What is in force at the start.
    pub fn started(&self, in_force: &InForce) {
        self.holds(in_force);
        self.note(|| json!({ "event": "start", "pid": std::process::id(), "in_force": in_force }));
    }

    /// What is in force from now on, after a look at the files that has come to something.
    pub fn reloaded(&self, in_force: &InForce) {
        let is_whole = self.holds(in_force) == 0;
        let outcome = self.guards.reloaded(is_whole);
        self.note(|| json!({ "event": "reload", "pid": std::process::id(), "outcome": outcome, "in_force": in_force }));
    }

    /// What is in force from now on, after a change to `guard`.
    pub fn changed(&self, guard: &str, in_force: &InForce) {
        self.holds(in_force);
        self.note(|| json!({ "event": "change", "pid": std::process::id(), "guard": guard, "in_force": in_force }));
    }

    /// Texts that were scored over the socket.
    pub fn scored(&self, epoch: u64, model: &str, gates: &[GateScore]) -> Written {
        self.write(
            || json!({ "event": "score", "pid": std::process::id(), "epoch": epoch, "model": model, "gates": gates }),
        )
    }

    /// Takes note of what is in force. Returns how much of it holds what is not.
    pub fn holds(&self, in_force: &InForce) -> usize {
        let acting = in_force.guards.iter().filter(|guard| guard.enabled);
        let acting = acting.filter_map(|guard| {
            let gates = guard.gates.iter().map(|gate| gate.name.as_str());
            Some((guard.name.as_deref()?, gates))
        });
        for (guard, gates) in acting.clone() {
            // What begins at 1 is an increase that nobody sees.
            gates.for_each(|gate| drop(self.decisions.get_or_create(&GateLabels::new(guard, gate))));
        }
        let problems = in_force.guards.iter().filter(|guard| guard.problem.is_some()).count();
        let problems = problems + usize::from(in_force.problem.is_some());
        self.guards.in_force(in_force.epoch, acting, problems);
        problems
    }

    pub fn counts(&self) -> Counts {
        Counts {
            decodes: self.decodes.get(),
            prompt_tokens: self.guards.prompt_tokens.get(),
            answer_tokens: self.guards.answer_tokens.get(),
            prompts: self.prompts.get(),
            blocked: self.n_blocked.get(),
            faults: self.guards.faults.get(),
            refused: self.refused.get(),
            unguarded: self.unguarded.get(),
        }
    }

    /// In Prometheus' (OpenMetrics') text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    pub fn audit_status(&self) -> Option<AuditStatus> {
        let audit = self.audit.as_ref()?;
        let opened = lock(&audit.opened);
        Some(AuditStatus { path: opened.path.display().to_string(), problem: opened.failure() })
    }

    /// Why nothing can be written to the audit log any more.
    pub fn failure(&self) -> Option<String> {
        lock(&self.audit.as_ref()?.opened).failure()
    }

    fn write(&self, record: impl FnOnce() -> Value) -> Written {
        Written(self.audit.as_ref().map(|audit| audit.write(record())))
    }

    /// Writes what nothing waits for: what it is about has happened.
    fn note(&self, record: impl FnOnce() -> Value) {
        if let Err(problem) = self.write(record).wait() {
            tracing::error!("{problem}");
        }
    }
}

/// What a record is about.
pub struct Of<'r> {
    pub sequence: SequenceId,
    /// Of the guards that the sequence runs under.
    pub epoch: u64,
    pub program: &'r Program,
    pub model: &'r LoadedModel,
}

impl Of<'_> {
    fn record(&self, event: &str, more: Value) -> Value {
        let guards = self.program.guards().iter();
        let guards: Vec<Value> =
            guards.map(|guard| json!({ "name": guard.name, "content": guard.content_hash.to_string() })).collect();
        let identity = &self.model.identity;
        let mut record = json!({
            "event": event,
            "pid": std::process::id(),
            "sequence": self.sequence.0,
            "epoch": self.epoch,
            "guards": guards,
            "model": {
                "name": identity.name,
                "fingerprint": identity.fingerprint.to_string(),
                "quantization": self.model.quantization,
            },
        });
        if let (Value::Object(record), Value::Object(more)) = (&mut record, more) {
            record.extend(more);
        }
        record
    }
}

impl Written {
    /// Waits until it is on the disk.
    ///
    /// # Errors
    /// It can't be written, in words.
    pub fn wait(self) -> Result<(), String> {
        match self.0 {
            None => Ok(()),
            Some(receipt) => receipt?.wait().map(drop).map_err(not_written),
        }
    }
}

fn not_written(error: AuditError) -> String {
    format!("the audit log can't be written: {error}")
}

impl Audit {
    fn open(path: &Path) -> Self {
        let opened = Opened::new(path);
        if let Err(problem) = &opened.writer {
            tracing::error!("{problem}");
        }
        Self { path: path.to_owned(), opened: Mutex::new(opened) }
    }

    fn write(&self, record: Value) -> Result<Receipt, String> {
        let mut opened = lock(&self.opened);
        if opened.pid != std::process::id() {
            // A child by `fork` has no thread that writes, and its parent goes on with the log.
            let own = Opened::of_child(&self.path);
            // To end the writer would be to wait for its thread.
            std::mem::forget(std::mem::replace(&mut *opened, own));
        }
        let writer = opened.writer.as_ref().map_err(Clone::clone)?;
        writer.record(record).map_err(not_written)
    }
}

impl Opened {
    fn failure(&self) -> Option<String> {
        match &self.writer {
            Ok(writer) => writer.failure().map(not_written),
            Err(problem) => Some(problem.clone()),
        }
    }

    fn new(path: &Path) -> Self {
        let pid = std::process::id();
        let path = PathBuf::from(path.to_string_lossy().replace(PID, &pid.to_string()));
        let opened = AuditLog::open(&path, AuditOptions::default()).and_then(|log| AuditWriter::start(log, CAPACITY));
        Self { pid, path, writer: opened.map_err(not_written) }
    }

    fn of_child(path: &Path) -> Self {
        if path.to_string_lossy().contains(PID) {
            return Self::new(path);
        }
        let problem = format!(
            "the audit log `{}` is written by the process that this one was forked from: give each its own, by `{PID}` in its name",
            path.display()
        );
        Self { pid: std::process::id(), path: path.to_owned(), writer: Err(problem) }
    }
}
