//! The thread that runs the model: it owns the scheduler, and everybody else sends it requests.

use super::metrics::Metrics;
use crate::engine::scheduler::{Event, Request, RequestId, SchedulerOptions, Summary, TokenProbability};
use crate::engine::{EngineError, Model, Scheduler};
use crate::program::Program;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender, TryRecvError};
use std::thread::JoinHandle;
use tokio::sync::mpsc::UnboundedSender;

/// What becomes of a request, in order. As many as it has tokens, so that a slow reader holds no more than its own answer.
#[derive(Debug)]
pub(super) enum Told {
    Text(String),
    Token {
        token: TokenProbability,
        instead: Vec<TokenProbability>,
    },
    /// The last of them.
    Ended(Summary),
    /// It was not taken; the last and only one.
    Refused(EngineError),
}

enum Command {
    Answer {
        request: Box<Request>,
        reader: Reader,
    },
    /// For requests to come that bring none; what is kept under others is dropped.
    Program(Arc<Program>),
    End,
}

pub(super) struct Worker {
    commands: Sender<Command>,
    thread: Option<JoinHandle<Result<(), EngineError>>>,
}

/// Who hears of a request: several may hear by one channel, each with a number.
#[derive(Debug)]
pub(super) struct Reader {
    pub choice: usize,
    /// Set by who wants no more of it, and is still told how it ended.
    pub given_up: Arc<AtomicBool>,
    pub told: UnboundedSender<(usize, Told)>,
}

impl Reader {
    fn tell(&self, told: Told) {
        // Whoever has gone is found at the next step.
        let _ = self.told.send((self.choice, told));
    }
}

/// Sends to the worker, from any thread.
#[derive(Clone)]
pub(super) struct WorkerHandle(Sender<Command>);

impl WorkerHandle {
    /// Has `request` answered. Nothing is heard where the worker has ended.
    pub fn answer(&self, request: Request, reader: Reader) {
        let _ = self.0.send(Command::Answer { request: Box::new(request), reader });
    }

    pub fn set_program(&self, program: Arc<Program>) {
        let _ = self.0.send(Command::Program(program));
    }
}

impl Worker {
    /// Starts the thread. `on_end` is called in it when it ends, whyever.
    ///
    /// # Errors
    /// llama.cpp can't make the context.
    pub fn start(
        model: Arc<Model>,
        program: Arc<Program>,
        options: SchedulerOptions,
        metrics: Arc<Metrics>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Result<Self, EngineError> {
        let (commands, received) = mpsc::channel();
        let (started, wait) = mpsc::sync_channel(1);
        let spawned = std::thread::Builder::new().name("model".into()).spawn(move || {
            let _on_end = OnDrop(Some(on_end));
            run(&model, program, options, &received, &metrics, &started)
        });
        let thread = spawned.map_err(|error| EngineError::Backend(error.to_string()))?;
        match wait.recv() {
            Ok(()) => Ok(Self { commands, thread: Some(thread) }),
            Err(_) => Err(ended(thread)),
        }
    }

    pub fn handle(&self) -> WorkerHandle {
        WorkerHandle(self.commands.clone())
    }

    /// Ends the thread, whatever it is at, and says what went wrong in it.
    pub fn end(mut self) -> Result<(), EngineError> {
        let _ = self.commands.send(Command::End);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().unwrap_or_else(|panic| Err(panicked(&*panic)))
    }
}

fn ended(thread: JoinHandle<Result<(), EngineError>>) -> EngineError {
    match thread.join() {
        Ok(Err(error)) => error,
        Ok(Ok(())) => EngineError::Backend("the thread that runs the model ended at once".into()),
        Err(panic) => panicked(&*panic),
    }
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> EngineError {
    let words = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    EngineError::Backend(format!("the thread that runs the model panicked: {}", words.unwrap_or("no words")))
}

struct OnDrop<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        if let Some(end) = self.0.take() {
            end();
        }
    }
}

fn run(
    model: &Model,
    program: Arc<Program>,
    options: SchedulerOptions,
    commands: &Receiver<Command>,
    metrics: &Metrics,
    started: &SyncSender<()>,
) -> Result<(), EngineError> {
    let mut scheduler = Scheduler::new(model, program, options)?;
    if started.send(()).is_err() {
        return Ok(());
    }
    let mut readers: HashMap<RequestId, Reader> = HashMap::new();
    let mut busy = false;
    loop {
        // With nothing to do it sleeps until there is.
        let mut next = if busy { commands.try_recv() } else { commands.recv().map_err(|_| TryRecvError::Disconnected) };
        loop {
            match next {
                Ok(Command::Answer { request, reader }) => match scheduler.submit(*request) {
                    Ok(id) => {
                        readers.insert(id, reader);
                    }
                    Err(error) => {
                        reader.tell(Told::Refused(error));
                    }
                },
                Ok(Command::Program(program)) => scheduler.set_program(program)?,
                Ok(Command::End) | Err(TryRecvError::Disconnected) => return Ok(()),
                Err(TryRecvError::Empty) => break,
            }
            next = commands.try_recv();
        }
        // Whoever has gone wants no answer.
        let is_gone = |reader: &Reader| reader.told.is_closed() || reader.given_up.load(Ordering::Acquire);
        let gone: Vec<RequestId> = readers.iter().filter(|(_, reader)| is_gone(reader)).map(|(id, _)| *id).collect();
        for id in gone {
            let summary = scheduler.cancel(id)?;
            if let (Some(reader), Some(summary)) = (readers.remove(&id), summary) {
                reader.tell(Told::Ended(summary));
            }
        }
        busy = scheduler.step(|event| match event {
            Event::Text { request, text } => {
                if let Some(reader) = readers.get(&request) {
                    reader.tell(Told::Text(text));
                }
            }
            Event::Token { request, token, instead } => {
                if let Some(reader) = readers.get(&request) {
                    reader.tell(Told::Token { token, instead });
                }
            }
            Event::Ended { request, summary } => {
                if let Some(reader) = readers.remove(&request) {
                    reader.tell(Told::Ended(summary));
                }
            }
        })?;
        let (running, waiting) = scheduler.load();
        metrics.load(running, waiting);
    }
}
