use notify::{Config, RecommendedWatcher, RecursiveMode, Watcher as _};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// How changes are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchOptions {
    /// Time for which nothing must happen before files are taken to be whole: an editor writes several times, a copy comes file by file.
    pub debounce: Duration,
    /// Files that are written without a pause are looked at all the same after this.
    pub at_most: Duration,
    /// Files are looked at this often, whatever the system tells: network file systems and what links lead to tell nothing.
    pub poll: Duration,
}

impl Default for WatchOptions {
    fn default() -> Self {
        let [debounce, at_most, poll] = [50, 500, 2000].map(Duration::from_millis);
        Self { debounce, at_most, poll }
    }
}

/// Tells when a directory may have changed.
pub struct Watcher {
    events: Receiver<Word>,
    own: Sender<Word>,
    options: WatchOptions,
    /// Ends with this. `None` where the system can't watch, and only polling is left.
    _system: Option<RecommendedWatcher>,
}

/// What wakes a watcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Changed,
    /// To return, whatever the files do.
    Wake,
    /// To have all of them read.
    Look,
    End,
}

/// Wakes a [`Watcher`] from another thread.
#[derive(Debug, Clone)]
pub struct Waker(Sender<Word>);

impl Waker {
    /// Has it return.
    pub fn wake(&self) {
        let _ = self.0.send(Word::Wake);
    }

    /// Has all files read, changed or not.
    pub fn look(&self) {
        let _ = self.0.send(Word::Look);
    }

    /// Has it end.
    pub fn end(&self) {
        let _ = self.0.send(Word::End);
    }
}

impl Watcher {
    /// Watches `directory` and all below it. Where the system refuses, polling is what remains, and a warning says so.
    pub fn new(directory: &Path, options: WatchOptions) -> Self {
        let (own, events) = mpsc::channel();
        let sender = own.clone();
        let told = move |event: notify::Result<notify::Event>| {
            // Reading a file is an event too, and it is we who read.
            if event.as_ref().map_or(true, |event| !event.kind.is_access()) {
                let _ = sender.send(Word::Changed);
            }
        };
        let config = Config::default().with_follow_symlinks(true);
        let watch = |mut watcher: RecommendedWatcher| {
            watcher.watch(directory, RecursiveMode::Recursive)?;
            Ok(watcher)
        };
        let system = match RecommendedWatcher::new(told, config).and_then(watch) {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                let every = options.poll;
                tracing::warn!("`{}` is looked at every {every:?} only: {error}", directory.display());
                None
            }
        };
        Self { events, own, options, _system: system }
    }

    pub fn waker(&self) -> Waker {
        Waker(self.own.clone())
    }

    /// Waits until files may have changed and are quiet, or are to be looked at in any case. `None` at the end.
    pub fn wait(&self) -> Option<Woken> {
        let now = |all| Some(Woken { since: Instant::now(), all });
        let since = match self.events.recv_timeout(self.options.poll) {
            Ok(Word::End) | Err(RecvTimeoutError::Disconnected) => return None,
            Ok(Word::Look) => return now(true),
            Ok(Word::Wake) | Err(RecvTimeoutError::Timeout) => return now(false),
            Ok(Word::Changed) => Instant::now(),
        };
        loop {
            let left = (since + self.options.at_most).saturating_duration_since(Instant::now());
            match self.events.recv_timeout(self.options.debounce.min(left)) {
                Ok(Word::Changed) if !left.is_zero() => {}
                Ok(Word::End) | Err(RecvTimeoutError::Disconnected) => return None,
                Ok(word) => return Some(Woken { since, all: word == Word::Look }),
                Err(RecvTimeoutError::Timeout) => return Some(Woken { since, all: false }),
            }
        }
    }
}

/// Why files are to be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Woken {
    /// When the first word of it came.
    pub since: Instant,
    /// Whether all are to be read, whatever the system says of them.
    pub all: bool,
}
