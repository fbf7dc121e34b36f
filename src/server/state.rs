use super::config::ServerConfig;
use super::error::ApiError;
use super::keeper::Keeper;
use super::keys::{Caller, Keys};
use super::metrics::Metrics;
use super::telemetry::Telemetry;
use super::worker::WorkerHandle;
use crate::audit::AuditWriter;
use crate::engine::scheduler::Summary;
use crate::engine::{ChatTemplate, Forms, Model};
use arc_swap::ArcSwap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::Semaphore;

/// What every request can reach.
pub(super) struct State {
    pub config: ServerConfig,
    pub name: String,
    pub model: Arc<Model>,
    pub template: ChatTemplate,
    pub forms: Forms,
    pub keeper: Keeper,
    pub worker: WorkerHandle,
    pub keys: ArcSwap<Keys>,
    pub metrics: Arc<Metrics>,
    pub audit: Option<AuditWriter>,
    /// Whether a record could not be written: then none can be any more.
    pub audit_failed: AtomicBool,
    pub telemetry: Option<Telemetry>,
    pub started: SystemTime,
    /// Whether the model's thread has ended, or the server is about to.
    pub ending: AtomicBool,
    pub places: Arc<Places>,
    /// One for each body that may be in memory.
    pub bodies: Arc<Semaphore>,
}

/// Places for requests, running and waiting.
#[derive(Debug)]
pub(super) struct Places {
    taken: AtomicUsize,
    most: usize,
}

/// A request's place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Places>, usize);

impl Places {
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { taken: AtomicUsize::new(0), most })
    }

    /// `n` places together, if there are so many.
    ///
    /// # Errors
    /// There are not so many free, or there never are.
    pub fn take(self: &Arc<Self>, n: usize) -> Result<Place, ApiError> {
        if n > self.most {
            let message = format!("the request is {n} at once, and {} is the most that may run and wait", self.most);
            return Err(ApiError::body(message));
        }
        let enough = |taken: usize| taken.checked_add(n).filter(|sum| *sum <= self.most);
        match self.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, enough) {
            Ok(_) => Ok(Place(Arc::clone(self), n)),
            Err(taken) => Err(ApiError::busy(taken, Duration::from_secs(1))),
        }
    }

    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Acquire)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(self.1, Ordering::AcqRel);
    }
}

impl State {
    /// Places for a request with `n` choices.
    pub fn admit(&self, n: usize) -> Result<Place, ApiError> {
        if self.ending.load(Ordering::Acquire) {
            return Err(ApiError::unavailable("the server is about to end"));
        }
        if self.audit_failed.load(Ordering::Acquire) {
            return Err(ApiError::unavailable("the audit log can't be written: the server has to begin anew"));
        }
        self.places.take(n)
    }

    /// Counts the tokens of a request that has ended, for all and for its key.
    pub fn count(&self, caller: &Caller, summary: &Summary) {
        self.metrics.tokens(summary.prompt_tokens, summary.reused_tokens, summary.tokens);
        if let Some(meter) = &caller.meter {
            meter.tokens(summary.prompt_tokens + summary.tokens);
        }
    }

    /// Waits until `record` is on the disk.
    ///
    /// # Errors
    /// It can't be written: what should be on record must not happen then.
    pub async fn write_down(&self, audit: &AuditWriter, record: serde_json::Value) -> Result<(), ApiError> {
        let (sender, written) = tokio::sync::oneshot::channel();
        audit.record_then(record, move |outcome| {
            let _ = sender.send(outcome);
        });
        match written.await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => {
                self.audit_failed.store(true, Ordering::Release);
                tracing::error!("the audit log: {error}");
                Err(ApiError::unavailable("the audit log can't be written"))
            }
            Err(_) => Err(ApiError::unavailable("the audit log has ended")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_given_back() {
        let places = Places::new(3);
        let two = places.take(2).unwrap();
        assert_eq!(places.take(2).unwrap_err().status, 429);
        assert_eq!(places.take(4).unwrap_err().status, 400, "no time will make room for it");
        let one = places.take(1).unwrap();
        assert_eq!(places.taken(), 3);
        drop(two);
        assert!(places.take(2).is_ok());
        drop(one);
        assert_eq!(places.taken(), 0);
    }
}
