use crate::store::WatchOptions;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// All that can be set. An unknown key is an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// A GGUF file, or the name of a descriptor.
    pub model: String,
    /// The directory of guards; none serves the model as it is.
    pub guards: Option<PathBuf>,
    pub listen: SocketAddr,
    /// A Unix socket to listen on as well.
    pub unix_socket: Option<PathBuf>,
    /// Its permissions, in octal: whoever may write to it may ask.
    pub unix_socket_mode: String,
    /// What makes it HTTPS.
    pub tls: Option<TlsConfig>,
    /// A file of keys ([`Keys`](super::Keys)). Without one anybody who reaches the server may do anything, so it then listens to this machine alone.
    pub keys: Option<PathBuf>,
    /// What `/v1/models` calls the model; its own name if not given.
    pub served_name: Option<String>,
    /// Layers on a GPU.
    pub gpu_layers: u32,
    pub limits: Limits,
    pub reload: ReloadConfig,
    pub audit: AuditConfig,
    pub telemetry: TelemetryConfig,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            model: String::new(),
            guards: None,
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080),
            unix_socket: None,
            unix_socket_mode: "600".into(),
            tls: None,
            keys: None,
            served_name: None,
            gpu_layers: 0,
            limits: Limits::default(),
            reload: ReloadConfig::default(),
            audit: AuditConfig::default(),
            telemetry: TelemetryConfig::default(),
        }
    }
}

/// `[tls]`. SIGHUP reads the files anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// PEM: the server's certificate, and those between it and its authority.
    pub certificate: PathBuf,
    /// PEM.
    pub key: PathBuf,
}

/// `[limits]`
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Requests that are answered at once.
    pub parallel: u32,
    /// Tokens that each has room for, prompt and answer.
    pub context: u32,
    /// Rows of a step.
    pub batch: u32,
    /// Requests that may wait; more are told to come again (429).
    pub queue: usize,
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Requests whose bodies are in memory at once; the others wait for it in their connections.
    pub bodies: usize,
    /// Seconds in which a request's head, and its body, must have come.
    pub read_seconds: u64,
    /// Seconds that a request may wait and be answered.
    pub request_seconds: u64,
    /// Choices that one request may ask for.
    pub choices: usize,
    /// Seconds that running requests are given at the end.
    pub drain_seconds: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            parallel: 4,
            context: 4096,
            batch: 512,
            queue: 64,
            body_bytes: 2 << 20,
            bodies: 64,
            read_seconds: 30,
            request_seconds: 600,
            choices: 8,
            drain_seconds: 30,
        }
    }
}

impl Limits {
    pub(super) fn read(&self) -> Duration {
        Duration::from_secs(self.read_seconds)
    }

    pub(super) fn request(&self) -> Duration {
        Duration::from_secs(self.request_seconds)
    }
}

/// `[reload]`
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReloadConfig {
    /// Milliseconds for which nothing must happen before a guard is read.
    pub debounce_ms: u64,
    /// Milliseconds after which it is read although something goes on happening.
    pub at_most_ms: u64,
    /// Milliseconds between two looks where the system tells nothing.
    pub poll_ms: u64,
}

impl Default for ReloadConfig {
    fn default() -> Self {
        let WatchOptions { debounce, at_most, poll } = WatchOptions::default();
        let [debounce_ms, at_most_ms, poll_ms] = [debounce, at_most, poll].map(|time| time.as_millis() as u64);
        Self { debounce_ms, at_most_ms, poll_ms }
    }
}

impl ReloadConfig {
    pub(super) fn options(self) -> WatchOptions {
        let Self { debounce_ms, at_most_ms, poll_ms } = self;
        let [debounce, at_most, poll] = [debounce_ms, at_most_ms, poll_ms.max(1)].map(Duration::from_millis);
        WatchOptions { debounce, at_most, poll }
    }
}

/// `[audit]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditConfig {
    /// The log's file; none keeps no log.
    pub path: Option<PathBuf>,
    /// Bytes at which a new file is begun.
    pub max_bytes: u64,
    /// Full files that are kept; 0 keeps all.
    pub keep: usize,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self { path: None, max_bytes: 64 << 20, keep: 0 }
    }
}

/// `[telemetry]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// An OpenTelemetry collector's address, to which answers go as spans (OTLP over HTTP): `http://127.0.0.1:4318`. Takes the feature `otel`.
    pub otlp: Option<String>,
}
