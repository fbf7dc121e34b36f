use super::digest::{CopyError, copy};
use super::error::ModelError;
use super::pull::PullProgress;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body};

const TIMEOUT_CONNECT: Duration = Duration::from_secs(30);
/// With nothing heard for so long a connection counts as broken. The whole download may take as long as it takes.
const TIMEOUT_READ: Duration = Duration::from_secs(60);

/// A Hugging Face hub, or a mirror of one.
pub(super) struct HuggingFace {
    endpoint: String,
    token: Option<String>,
    agent: Agent,
}

impl HuggingFace {
    /// The hub of `HF_ENDPOINT`, with the token of `HF_TOKEN`.
    pub(super) fn from_env() -> Self {
        let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|endpoint| !endpoint.is_empty());
        let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty());
        Self::at(endpoint.as_deref().unwrap_or("https://huggingface.co"), token)
    }

    pub(super) fn at(endpoint: &str, token: Option<String>) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(TIMEOUT_CONNECT))
            .timeout_per_read(Some(TIMEOUT_READ))
            // The hub redirects to a storage host, which must not see the token; a renamed repository to itself.
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .build()
            .into();
        Self { endpoint: endpoint.trim_end_matches('/').to_owned(), token, agent }
    }

    /// Downloads a file of `bytes` bytes into `staging`, going on from what an earlier call left there.
    pub(super) fn fetch(
        &self,
        repo: &str,
        file: &str,
        revision: &str,
        bytes: u64,
        staging: &Path,
        progress: &dyn PullProgress,
    ) -> Result<PathBuf, ModelError> {
        let url = format!(
            "{}/{}/resolve/{}/{}",
            self.endpoint,
            percent_encoded(repo, true),
            percent_encoded(revision, false),
            percent_encoded(file, true)
        );
        let part = staging.join("download");
        let kept = Kept::read(&part, &url).filter(|kept| kept.bytes <= bytes);
        if kept.as_ref().is_some_and(|kept| kept.bytes == bytes) {
            return Ok(part);
        }
        let (mut response, from) = self.request(&url, kept.as_ref(), bytes)?;

        let mut target = if from > 0 {
            File::options().append(true).open(&part).map_err(ModelError::io("open", &part))?
        } else {
            if let Some(found) = content_length(&response)
                && found != bytes
            {
                return Err(ModelError::Size { what: format!("`{url}`"), expected: bytes, found });
            }
            // Emptied before the origin is recorded: no old bytes under a new origin.
            let target = File::create(&part).map_err(ModelError::io("create", &part))?;
            Origin { url: url.clone(), etag: strong_etag(&response) }.write(&part)?;
            target
        };
        let report = |copied| progress.report("downloading", from + copied, bytes);
        let broken_off = |cause: String| {
            let done = fs::metadata(&part).map_or(0, |metadata| metadata.len());
            ModelError::BrokenOff { url: url.clone(), done, expected: bytes, cause }
        };
        match copy(response.body_mut().as_reader(), &mut target, bytes - from, report) {
            Ok(copied) if from + copied == bytes => Ok(part),
            Ok(_) => Err(broken_off("the connection ended".to_owned())),
            Err(CopyError::Read(cause)) => Err(broken_off(cause.to_string())),
            Err(CopyError::Write(cause)) => Err(ModelError::io("write", &part)(cause)),
            Err(CopyError::TooLong) => Err(ModelError::TooLong { what: format!("`{url}`"), expected: bytes }),
        }
    }

    /// Asks for what is missing, or for the whole file where the server can't or won't go on from there. Returns the
    /// offset at which the response's body begins.
    fn request(&self, url: &str, kept: Option<&Kept>, bytes: u64) -> Result<(Response<Body>, u64), ModelError> {
        if let Some(kept) = kept {
            let response = self.get(url, Some(kept))?;
            match response.status() {
                StatusCode::PARTIAL_CONTENT if continues(&response, kept.bytes, bytes) => {
                    return Ok((response, kept.bytes));
                }
                StatusCode::OK => return Ok((response, 0)),
                StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {}
                status => return Err(ModelError::Status { url: url.to_owned(), status: status.as_u16() }),
            }
        }
        let response = self.get(url, None)?;
        match response.status() {
            StatusCode::OK => Ok((response, 0)),
            status => Err(ModelError::Status { url: url.to_owned(), status: status.as_u16() }),
        }
    }

    fn get(&self, url: &str, kept: Option<&Kept>) -> Result<Response<Body>, ModelError> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(kept) = kept {
            request = request.header(header::RANGE, format!("bytes={}-", kept.bytes));
            if let Some(etag) = &kept.etag {
                request = request.header(header::IF_RANGE, etag);
            }
        }
        request.call().map_err(|error| ModelError::Unreachable { url: url.to_owned(), cause: error.to_string() })
    }
}

/// Where the bytes of a half download came from, kept beside it.
#[derive(Serialize, Deserialize)]
struct Origin {
    url: String,
    etag: Option<String>,
}

impl Origin {
    fn path(part: &Path) -> PathBuf {
        part.with_extension("json")
    }

    fn write(&self, part: &Path) -> Result<(), ModelError> {
        let path = Self::path(part);
        serde_json::to_vec(self)
            .map_err(std::io::Error::from)
            .and_then(|json| fs::write(&path, json))
            .map_err(ModelError::io("write", &path))
    }
}

/// A half download that can be gone on with.
struct Kept {
    bytes: u64,
    etag: Option<String>,
}

impl Kept {
    fn read(part: &Path, url: &str) -> Option<Self> {
        let origin: Origin = serde_json::from_slice(&fs::read(Origin::path(part)).ok()?).ok()?;
        let bytes = fs::metadata(part).ok()?.len();
        (origin.url == url && bytes > 0).then_some(Self { bytes, etag: origin.etag })
    }
}

/// Whether a 206 is the rest of a file of `bytes` bytes, from offset `from` on.
fn continues(response: &Response<Body>, from: u64, bytes: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    range.is_some_and(|range| {
        range == format!("bytes {from}-{}/{bytes}", bytes - 1) || range == format!("bytes {from}-{}/*", bytes - 1)
    })
}

/// A weak ETag may be shared by files that differ in bytes, so it can't vouch for a range.
fn strong_etag(response: &Response<Body>) -> Option<String> {
    let etag = response.headers().get(header::ETAG)?.to_str().ok()?;
    etag.starts_with('"').then(|| etag.to_owned())
}

fn content_length(response: &Response<Body>) -> Option<u64> {
    response.headers().get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn percent_encoded(text: &str, keep_slashes: bool) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || (keep_slashes && byte == b'/') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
        encoded
    })
}
