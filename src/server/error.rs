use crate::audit::AuditError;
use crate::engine::EngineError;
use crate::store::GuardDirectory;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;

/// Why a server can't begin, or has to end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    #[error("can't listen on `{address}`")]
    Listen { address: String, source: std::io::Error },
    #[error("can't listen on `{}`: {reason}", .path.display())]
    Socket { path: PathBuf, reason: String },
    #[error("the certificate `{}` and its key can't be used: {reason}", .certificate.display())]
    Tls { certificate: PathBuf, reason: String },
    #[error(
        "`{address}` can be reached from other machines, and there are no keys: set `keys` to a file of keys, or listen on 127.0.0.1"
    )]
    NoKeys { address: String },
    #[error("guard folder `{}`: {problem}", .folder.display())]
    Guard { folder: PathBuf, problem: String },
    #[error("{0}")]
    Directory(String),
    #[error("spans can't be sent to `{collector}`: {reason}")]
    Telemetry { collector: String, reason: String },
    #[error("the keys in `{}` can't be used: {problem}", .path.display())]
    Keys { path: PathBuf, problem: String },
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Audit(#[from] AuditError),
    #[error("can't run: {0}")]
    System(#[from] std::io::Error),
    #[error("the thread that runs the model has ended: {0}")]
    Worker(String),
}

impl ServerError {
    /// What is wrong with a directory at the start, when there is nothing older to fall back on.
    pub(super) fn of_directory(directory: &GuardDirectory) -> Option<Self> {
        if let Some(problem) = directory.problem() {
            return Some(Self::Directory(problem.to_owned()));
        }
        directory.entries().iter().find_map(|(name, entry)| {
            let problem = entry.problem.as_ref()?.to_string();
            Some(Self::Guard { folder: directory.path().join(name), problem })
        })
    }
}

/// An answer that is an error, in OpenAI's shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ApiError {
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    pub code: Option<&'static str>,
    /// The field of the request that is wrong.
    pub param: Option<String>,
    pub message: String,
    pub retry_after: Option<Duration>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, kind, code, param: None, message: message.into(), retry_after: None }
    }

    /// 400, of the field `param`.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some("invalid_value"), message);
        Self { param: Some(param.to_owned()), ..error }
    }

    /// 400: the field `param` asks for what this server does not do.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::invalid(param, message) }
    }

    /// 400: the body as a whole.
    pub fn body(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some("invalid_body"), message)
    }

    pub fn too_large(limit: usize) -> Self {
        let message = format!("the request's body is larger than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", Some("body_too_large"), message)
    }

    pub fn context_length(param: &str, found: usize, capacity: usize) -> Self {
        let message =
            format!("the prompt has {found} tokens, and there is room for {capacity} with the answer: shorten it");
        Self { code: Some("context_length_exceeded"), ..Self::invalid(param, message) }
    }

    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", Some("invalid_api_key"), message)
    }

    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", Some("forbidden"), message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("not_found"), message)
    }

    /// 429: more is asked at once than may wait.
    pub fn busy(waiting: usize, retry_after: Duration) -> Self {
        let message = format!("{waiting} requests wait already: try again later");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full"), message);
        Self { retry_after: Some(retry_after), ..error }
    }

    /// 429: a key has asked for more than it may.
    pub fn rate_limited(message: impl Into<String>, retry_after: Duration) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("rate_limit_exceeded"), message);
        Self { retry_after: Some(retry_after), ..error }
    }

    /// 503: it can't answer now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("unavailable"), message);
        Self { retry_after: Some(Duration::from_secs(1)), ..error }
    }

    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "server_error", Some("timeout"), message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some("internal_error"), message)
    }

    /// As the body has it.
    pub fn json(&self) -> String {
        let Self { message, kind, param, code, .. } = self;
        let error = Inner { message, r#type: kind, param: param.as_deref(), code: *code };
        serde_json::to_string(&Envelope { error }).unwrap_or_default()
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::PromptTooLong { found, capacity } => Self::context_length("prompt", found, capacity),
            EngineError::EmptyPrompt => Self::invalid("prompt", error.to_string()),
            EngineError::Template { .. } => Self::invalid("messages", error.to_string()),
            EngineError::NoToken { .. } => Self::invalid("prompt", error.to_string()),
            EngineError::QueueFull { capacity } => Self::busy(capacity, Duration::from_secs(1)),
            EngineError::Context(crate::hook::ContextError::Toggle(_)) => Self::invalid("guard", error.to_string()),
            _ => Self::internal(error.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body: serde_json::Value = serde_json::from_str(&self.json()).unwrap_or_default();
        let mut response = (self.status, Json(body)).into_response();
        if let Some(after) = self.retry_after {
            // Who comes back earlier is refused again.
            let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::PAYLOAD_TOO_LARGE {
            // What is still to come is not read.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
