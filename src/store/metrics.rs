use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// What is counted of guards wherever they run, as Prometheus reads it: the server and attached processes have it under the same names.
pub struct GuardMetrics {
    pub prompt_tokens: Counter,
    pub answer_tokens: Counter,
    pub faults: Counter,
    fired: Family<GateLabels, Counter>,
    blocked: Family<GuardLabels, Counter>,
    reloads: Family<ReloadLabels, Counter>,
    epoch: Gauge,
    guards: Gauge,
    problems: Gauge,
}

/// A gate, by its guard's name and its own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct GateLabels {
    pub guard: String,
    pub gate: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GuardLabels {
    guard: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReloadLabels {
    outcome: &'static str,
}

impl GateLabels {
    pub fn new(guard: &str, gate: &str) -> Self {
        Self { guard: guard.to_owned(), gate: gate.to_owned() }
    }
}

impl GuardMetrics {
    /// Puts them into `registry`. What is guarded and counted are `units`, as `Requests`.
    pub fn register(registry: &mut Registry, units: &str) -> Self {
        let metrics = Self {
            prompt_tokens: Counter::default(),
            answer_tokens: Counter::default(),
            faults: Counter::default(),
            fired: Family::default(),
            blocked: Family::default(),
            reloads: Family::default(),
            epoch: Gauge::default(),
            guards: Gauge::default(),
            problems: Gauge::default(),
        };
        registry.register("prompt_tokens", "Tokens of prompts", metrics.prompt_tokens.clone());
        registry.register("answer_tokens", "Tokens of answers", metrics.answer_tokens.clone());
        registry.register(
            "faults",
            format!("{units} whose answer ended because a guard, or llama.cpp, failed"),
            metrics.faults.clone(),
        );
        registry.register("gate_fired", format!("{units} in which a gate fired"), metrics.fired.clone());
        registry.register("blocked", format!("{units} that a guard blocked"), metrics.blocked.clone());
        registry.register("reloads", "Changes of the guards' directory that were seen", metrics.reloads.clone());
        registry.register("epoch", "Number of the state of guards that is in force", metrics.epoch.clone());
        registry.register("guards", "Guards that are in force", metrics.guards.clone());
        registry.register("problems", "Folders of guards that hold what is not in force", metrics.problems.clone());
        // What begins at 1 is an increase that nobody sees.
        for outcome in ["taken", "refused"] {
            drop(metrics.reloads.get_or_create(&ReloadLabels { outcome }));
        }
        metrics
    }

    /// What is in force from now on: names of guards, each with those of its gates, and how many folders hold what is not.
    pub fn in_force<'g, Gates: IntoIterator<Item = &'g str>>(
        &self,
        epoch: u64,
        guards: impl IntoIterator<Item = (&'g str, Gates)>,
        n_problems: usize,
    ) {
        let mut n_guards = 0;
        for (guard, gates) in guards {
            n_guards += 1;
            drop(self.blocked.get_or_create(&GuardLabels { guard: guard.to_owned() }));
            for gate in gates {
                drop(self.fired.get_or_create(&GateLabels::new(guard, gate)));
            }
        }
        self.epoch.set(epoch as i64);
        self.guards.set(n_guards);
        self.problems.set(n_problems as i64);
    }

    pub fn fired(&self, guard: &str, gate: &str) {
        self.fired.get_or_create(&GateLabels::new(guard, gate)).inc();
    }

    pub fn blocked(&self, guard: &str) {
        self.blocked.get_or_create(&GuardLabels { guard: guard.to_owned() }).inc();
    }

    /// A change of the directory, and whether all of it is in force. Returns what that is called.
    pub fn reloaded(&self, whole: bool) -> &'static str {
        let outcome = if whole { "taken" } else { "refused" };
        self.reloads.get_or_create(&ReloadLabels { outcome }).inc();
        outcome
    }
}
