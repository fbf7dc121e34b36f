use super::snapshot::Snapshot;
use crate::store::GuardMetrics;
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
    reused_tokens: Counter,
    first_token: Histogram,
    duration: Histogram,
    running: Gauge,
    waiting: Gauge,
    /// What is counted of guards.
    pub guards: GuardMetrics,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    /// The HTTP status.
    status: u16,
}

impl Metrics {
    pub fn new() -> Arc<Self> {
        let seconds = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
        let mut registry = Registry::with_prefix("pilotfish");
        let requests = Family::<RequestLabels, Counter>::default();
        registry.register("requests", "Requests that were answered, by HTTP status", requests.clone());
        let reused_tokens = Counter::default();
        registry.register("reused_prompt_tokens", "Tokens of prompts that had been read before", reused_tokens.clone());
        let first_token = Histogram::new(seconds);
        registry.register("first_token_seconds", "Time from a request to its first token", first_token.clone());
        let duration = Histogram::new(seconds);
        registry.register("request_seconds", "Time from a request to its end", duration.clone());
        let running = Gauge::default();
        registry.register("requests_running", "Requests that are answered now", running.clone());
        let waiting = Gauge::default();
        registry.register("requests_waiting", "Requests that wait", waiting.clone());
        let guards = GuardMetrics::register(&mut registry, "Requests");
        Arc::new(Self { registry, requests, reused_tokens, first_token, duration, running, waiting, guards })
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
        self.guards.prompt_tokens.inc_by(prompt as u64);
        self.reused_tokens.inc_by(reused as u64);
        self.guards.answer_tokens.inc_by(answer as u64);
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
        let n_problems = snapshot.problems().len() + usize::from(snapshot.problem.is_some());
        let guards = snapshot.acting().map(|guard| (guard.name(), guard.gates().iter().map(|gate| gate.name.as_str())));
        self.guards.in_force(snapshot.epoch, guards, n_problems);
    }
}
