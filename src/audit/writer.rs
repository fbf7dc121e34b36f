use super::AuditError;
use super::chain::Appended;
use super::log::AuditLog;
use serde_json::Value;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

/// A thread that owns a log, so that many others can write to it and share the wait for the disk.
///
/// A record is acknowledged once it is on the disk: the thread writes all that wait, syncs once, and answers them all. After an error
/// of the log's files each record is answered with that error. Dropping the writer writes what still waits, then ends the thread.
#[derive(Debug)]
pub struct AuditWriter {
    /// None only while it is dropped.
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    failure: Arc<OnceLock<AuditError>>,
    capacity: usize,
}

impl AuditWriter {
    /// `capacity` is how many records may wait, and how many are written between two syncs at most; it is at least 1.
    pub fn start(log: AuditLog, capacity: usize) -> Result<Self, AuditError> {
        let capacity = capacity.max(1);
        let (jobs, receiver) = mpsc::sync_channel(capacity);
        let failure = Arc::new(OnceLock::new());
        let path = log.path.clone();
        let thread = thread::Builder::new()
            .name("audit".to_owned())
            .spawn({
                let failure = Arc::clone(&failure);
                move || write_groups(log, &receiver, capacity, &failure)
            })
            .map_err(AuditError::io("start the writer of", &path))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), failure, capacity })
    }

    /// Hands the record over. While `capacity` records wait already, this blocks.
    pub fn record(&self, record: Value) -> Result<Receipt, AuditError> {
        let jobs = self.jobs()?;
        let (sender, answer) = mpsc::sync_channel(1);
        // A receipt that was dropped wants no answer.
        let job = Job { record, answer: Answer::new(move |result| drop(sender.send(result))) };
        jobs.send(job).map_err(|_| AuditError::Stopped)?;
        Ok(Receipt { answer })
    }

    /// Hands the record over without ever blocking, as async code needs it. `answer` is called exactly once, with an error such as
    /// `Full` before this returns, or else on the writer's thread, which it must not hold up.
    pub fn record_then(&self, record: Value, answer: impl FnOnce(Result<Appended, AuditError>) + Send + 'static) {
        let answer = Answer::new(answer);
        let jobs = match self.jobs() {
            Ok(jobs) => jobs,
            Err(error) => return answer.give(Err(error)),
        };
        if let Err(TrySendError::Full(job)) = jobs.try_send(Job { record, answer }) {
            job.answer.give(Err(AuditError::Full { capacity: self.capacity }));
        }
    }

    /// Why it writes no more.
    pub fn failure(&self) -> Option<AuditError> {
        self.failure.get().cloned()
    }

    fn jobs(&self) -> Result<&SyncSender<Job>, AuditError> {
        match self.failure.get() {
            Some(failure) => Err(failure.clone()),
            None => self.jobs.as_ref().ok_or(AuditError::Stopped),
        }
    }
}

impl Drop for AuditWriter {
    fn drop(&mut self) {
        self.jobs = None;
        // An answer may hold the last reference to the writer, and then it is dropped on the thread itself.
        if let Some(thread) = self.thread.take().filter(|thread| thread.thread().id() != thread::current().id()) {
            // Each record that a panic left behind was answered with `Stopped`.
            drop(thread.join());
        }
    }
}

/// A record that was handed over and is not acknowledged yet.
#[derive(Debug)]
#[must_use = "the record is not acknowledged until its receipt says so"]
pub struct Receipt {
    answer: Receiver<Result<Appended, AuditError>>,
}

impl Receipt {
    /// Waits until the record is on the disk.
    pub fn wait(self) -> Result<Appended, AuditError> {
        self.answer.recv().unwrap_or(Err(AuditError::Stopped))
    }
}

#[derive(Debug)]
struct Job {
    record: Value,
    answer: Answer,
}

type OnAnswer = Box<dyn FnOnce(Result<Appended, AuditError>) + Send>;

/// Gives an answer exactly once: `Stopped` where it is dropped without one.
struct Answer(Option<OnAnswer>);

impl Answer {
    fn new(answer: impl FnOnce(Result<Appended, AuditError>) + Send + 'static) -> Self {
        Self(Some(Box::new(answer)))
    }

    fn give(mut self, result: Result<Appended, AuditError>) {
        self.call(result);
    }

    fn call(&mut self, result: Result<Appended, AuditError>) {
        if let Some(answer) = self.0.take() {
            // One caller's panic, which the panic hook has reported, must not end the log for the others.
            drop(catch_unwind(AssertUnwindSafe(|| answer(result))));
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.call(Err(AuditError::Stopped));
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answer")
    }
}

fn write_groups(mut log: AuditLog, jobs: &Receiver<Job>, capacity: usize, failure: &OnceLock<AuditError>) {
    while let Ok(first) = jobs.recv() {
        let group = std::iter::once(first).chain(jobs.try_iter().take(capacity - 1));
        let written: Vec<_> = group.map(|job| (log.append(&job.record), job.answer)).collect();
        let synced = if written.iter().any(|(appended, _)| appended.is_ok()) { log.sync() } else { Ok(()) };
        if let Err(error) = log.check() {
            // Before the answers: who has one finds the writer failed.
            failure.get_or_init(|| error);
        }
        for (appended, answer) in written {
            answer.give(appended.and_then(|appended| synced.clone().map(|()| appended)));
        }
    }
}
