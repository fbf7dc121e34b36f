//! An OpenAI-compatible server whose guards reload while it serves.
//!
//! In: a loaded model, a directory of guards, HTTP requests. Out: answers in OpenAI's shapes, each under one snapshot of the guards and with what they did. One
//! thread runs the model (`worker`), one keeps the guards (`keeper`), and the rest is axum on tokio. This room computes nothing that a guard is about.

mod answer;
mod body;
mod chat;
mod completion;
mod config;
mod dashboard;
mod error;
mod guards;
mod health;
mod history;
mod keeper;
mod keys;
mod listen;
mod metrics;
mod model_list;
mod parameters;
mod rate;
mod report;
mod score;
mod snapshot;
mod state;
mod telemetry;
mod worker;

pub use config::{AuditConfig, Limits, ReloadConfig, ServerConfig, TelemetryConfig, TlsConfig};
pub use error::ServerError;
pub use keys::{Key, Keys, Role};
pub use listen::{Serving, serve};
