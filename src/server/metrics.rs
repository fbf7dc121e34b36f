use super::snapshot::Snapshot;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::time::Duration;

/// What the server counts, as Prometheus reads it.
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    prompt_tokens: Counter,
    reused_tokens: Counter,
    answer_tokens: Counter,
    first_token: Histogram,
    duration: Histogram,
    running: Gauge,
    waiting: Gauge,
    epoch: Gauge,
    guards: Gauge,
    problems: Gauge,
    fired: Family<GateLabels, Counter>,
    blocked: Family<GuardLabels, Counter>,
    faults: Counter,
    reloads: Family<ReloadLabels, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    /// The HTTP status.
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GateLabels {
    guard: String,
    gate: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GuardLabels {
    guard: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReloadLabels {
    outcome: &'static str,
}

impl Metrics {
    pub fn new() -> Arc<Self> {
        let seconds = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
        let mut registry = Registry::with_prefix("pilotfish");
        let requests = Family::<RequestLabels, Counter>::default();
        registry.register("requests", "Requests that were answered, by HTTP status", requests.clone());
        let prompt_tokens = Counter::default();
        registry.register("prompt_tokens", "Tokens of prompts", prompt_tokens.clone());
        let reused_tokens = Counter::default();
        registry.register("reused_prompt_tokens", "Of these, tokens that had been read before", reused_tokens.clone());
        let answer_tokens = Counter::default();
        registry.register("answer_tokens", "Tokens of answers", answer_tokens.clone());
        let first_token = Histogram::new(seconds);
        registry.register("first_token_seconds", "Time from a request to its first token", first_token.clone());
        let duration = Histogram::new(seconds);
        registry.register("request_seconds", "Time from a request to its end", duration.clone());
        let running = Gauge::default();
        registry.register("requests_running", "Requests that are answered now", running.clone());
        let waiting = Gauge::default();
        registry.register("requests_waiting", "Requests that wait", waiting.clone());
        let epoch = Gauge::default();
        registry.register("epoch", "Number of the snapshot of guards that is in force", epoch.clone());
        let guards = Gauge::default();
        registry.register("guards", "Guards that are in force", guards.clone());
        let problems = Gauge::default();
        registry.register("problems", "Folders of guards that hold what is not in force", problems.clone());
        let fired = Family::<GateLabels, Counter>::default();
        registry.register("gate_fired", "Requests in which a gate fired", fired.clone());
        let blocked = Family::<GuardLabels, Counter>::default();
        registry.register("blocked", "Requests that a guard blocked", blocked.clone());
        let faults = Counter::default();
        registry.register("faults", "Requests that ended because a guard, or llama.cpp, failed", faults.clone());
        let reloads = Family::<ReloadLabels, Counter>::default();
        registry.register("reloads", "Changes of the guards' directory that were seen", reloads.clone());
        // What begins at 1 is an increase that nobody sees.
        for outcome in ["taken", "refused"] {
            drop(reloads.get_or_create(&ReloadLabels { outcome }));
        }
        Arc::new(Self {
            registry,
            requests,
            prompt_tokens,
            reused_tokens,
            answer_tokens,
            first_token,
            duration,
            running,
            waiting,
            epoch,
            guards,
            problems,
            fired,
            blocked,
            faults,
            reloads,
        })
    }

    /// In Prometheus' (OpenMetrics') text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    pub fn request(&self, route: &'static str, status: u16) {
        self.requests.get_or_create(&RequestLabels { route, status }).inc();
    }

    pub fn tokens(&self, prompt: usize, reused: usize, answer: usize) {
        self.prompt_tokens.inc_by(prompt as u64);
        self.reused_tokens.inc_by(reused as u64);
        self.answer_tokens.inc_by(answer as u64);
    }

    pub fn first_token(&self, after: Duration) {
        self.first_token.observe(after.as_secs_f64());
    }

    pub fn ended(&self, after: Duration) {
        self.duration.observe(after.as_secs_f64());
    }

    pub fn load(&self, running: usize, waiting: usize) {
        self.running.set(running as i64);
        self.waiting.set(waiting as i64);
    }

    /// What is in force from now on.
    pub fn snapshot(&self, snapshot: &Snapshot) {
        self.epoch.set(snapshot.epoch as i64);
        self.guards.set(snapshot.acting().count() as i64);
        self.problems.set((snapshot.problems().len() + usize::from(snapshot.problem.is_some())) as i64);
        for guard in snapshot.acting() {
            drop(self.blocked.get_or_create(&GuardLabels { guard: guard.name().to_owned() }));
            for gate in guard.gates() {
                let labels = GateLabels { guard: guard.name().to_owned(), gate: gate.name.clone() };
                drop(self.fired.get_or_create(&labels));
            }
        }
    }

    pub fn fired(&self, guard: &str, gate: &str) {
        self.fired.get_or_create(&GateLabels { guard: guard.to_owned(), gate: gate.to_owned() }).inc();
    }

    pub fn blocked(&self, guard: &str) {
        self.blocked.get_or_create(&GuardLabels { guard: guard.to_owned() }).inc();
    }

    pub fn fault(&self) {
        self.faults.inc();
    }

    pub fn reloaded(&self, whole: bool) {
        let outcome = if whole { "taken" } else { "refused" };
        self.reloads.get_or_create(&ReloadLabels { outcome }).inc();
    }
}
