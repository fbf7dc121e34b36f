//! The socket of an attached process: a line of JSON in, a line of JSON out (`pilotfish::attach::control`).
//!
//! A thread of its own takes connections, and one for each answers it; none of them holds a lock that a decode waits for while it reads or writes.

use crate::preload::{Attached, attached};
use crate::score::score;
use pilotfish::attach::control::{Answer, Asked, MAX_LINE_BYTES, Outcome, Request, Status, VERSION};
use pilotfish::attach::{Control, sockets};
use pilotfish::program::Change;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Connections that are answered at once; more are told to come again.
const MOST: usize = 8;
/// What a client has for a line, and for taking its answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The listener's file, for a child by `fork` to close; below 0 where there is none.
static LISTENER: AtomicI32 = AtomicI32::new(-1);
/// The socket and the process that made it, which alone removes it.
static SOCKET: OnceLock<(u32, PathBuf)> = OnceLock::new();

/// Begins to listen where `control` says, on a thread of its own. Without a socket the app is guarded all the same, and the log says why there is none.
pub fn listen(control: &Control) {
    let bound = match control {
        Control::Off => return,
        Control::Found => found(),
        Control::At(path) => bind(path).map_err(|problem| format!("`{}`: {problem}", path.display())),
    };
    let begun = bound.and_then(|(listener, path)| {
        LISTENER.store(listener.as_raw_fd(), Ordering::Release);
        let _ = SOCKET.set((std::process::id(), path));
        // SAFETY: both are functions of this library, which stays loaded, that call nothing but what may be called there.
        unsafe {
            libc::atexit(remove);
            libc::pthread_atfork(None, None, Some(close_in_child));
        }
        let thread = std::thread::Builder::new().name("pilotfish-control".into());
        thread.spawn(move || accept(&listener)).map_err(|error| error.to_string())
    });
    if let Err(problem) = begun {
        tracing::error!("`pilotfish ctl` can't reach this process: {problem}");
    }
}

/// Binds to the socket that `pilotfish ctl` looks for.
fn found() -> Result<(UnixListener, PathBuf), String> {
    // SAFETY: it has no conditions.
    let user = unsafe { libc::geteuid() };
    let folder = sockets::folder(user);
    sockets::make_private(&folder, user).map_err(|problem| format!("`{}`: {problem}", folder.display()))?;
    sockets::remove_stale(&folder);
    let path = sockets::socket_of(&folder, std::process::id());
    bind(&path).map_err(|problem| format!("`{}`: {problem}", path.display()))
}

fn bind(path: &Path) -> Result<(UnixListener, PathBuf), String> {
    if let Ok(metadata) = fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err("it is there, and no socket: name another path".to_owned());
        }
        if !sockets::is_silent(path) {
            return Err(
                "another process listens there: name another path, or none, so that each has its own".to_owned()
            );
        }
        fs::remove_file(path)
            .map_err(|error| format!("it was left by a process that is gone, and can't be removed: {error}"))?;
    }
    let bound = |path: &Path| {
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        // An app may change its folder.
        Ok((listener, path.canonicalize()?))
    };
    bound(path).map_err(|error: io::Error| error.to_string())
}

/// Removes the socket at the process's end.
extern "C" fn remove() {
    let of_this = SOCKET.get().filter(|(pid, _)| *pid == std::process::id());
    if let Some((_, path)) = of_this {
        let _ = fs::remove_file(path);
    }
}

/// A child by `fork` has a copy of the listener and no thread that answers: clients would wait for it once its parent is gone.
unsafe extern "C" fn close_in_child() {
    let listener = LISTENER.swap(-1, Ordering::AcqRel);
    if listener >= 0 {
        // SAFETY: the file is the listener's, whose owner is a thread that is not there in this process.
        unsafe { libc::close(listener) };
    }
}

/// Takes no signal on this thread: the app's are for its own. Where a write to a socket whose client has hung up sends one, it would end
/// the app; like that it is an error alone. (Rust 1.95 asks for none by itself, and older ones that this builds with need not.)
fn block_signals() {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is filled before it is used.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), std::ptr::null_mut());
    }
}

fn accept(listener: &UnixListener) {
    block_signals();
    let Some(attached) = attached() else { return };
    let running = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => {
                // Most often the app has no more files; it may have again.
                tracing::debug!("`pilotfish ctl` can't be answered: {error}");
                std::thread::sleep(Duration::from_millis(200));
                continue;
            }
        };
        if !is_own(&stream) {
            continue;
        }
        if running.fetch_add(1, Ordering::AcqRel) >= MOST {
            running.fetch_sub(1, Ordering::AcqRel);
            let busy = Outcome::Error(format!("{MOST} clients are being answered: try again later"));
            let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
            let _ = say(&stream, busy);
            continue;
        }
        let place = Place(Arc::clone(&running));
        let thread = std::thread::Builder::new().name("pilotfish-client".into());
        // Where no thread can be made, the client sees its connection end.
        let _ = thread.spawn(move || {
            let _place = place;
            block_signals();
            if let Err(error) = converse(attached, &stream) {
                tracing::debug!("a client of the socket is left: {error}");
            }
        });
    }
}

/// One of the connections that are answered at once, until it is dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Whether the process at the other end is of this one's user, or of root: a socket's mode is set only after it is made.
fn is_own(stream: &UnixStream) -> bool {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `peer` has the size that is told.
    let asked = unsafe {
        let (peer, size) = ((&raw mut peer).cast(), &raw mut size);
        libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, peer, size)
    };
    // SAFETY: it has no conditions.
    asked == 0 && (peer.uid == 0 || peer.uid == unsafe { libc::geteuid() })
}

/// Answers the lines of one client, until it hangs up.
fn converse(attached: &'static Attached, stream: &UnixStream) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut rest = Vec::new();
    loop {
        let line = match line(stream, &mut rest)? {
            Line::Whole(line) => line,
            Line::End => return Ok(()),
            Line::TooLong => {
                let most = format!("a request is a line of at most {MAX_LINE_BYTES} bytes");
                return say(stream, Outcome::Error(most));
            }
        };
        let outcome = match asked(&line) {
            Ok(request) => answer(attached, request).unwrap_or_else(Outcome::Error),
            Err(problem) => Outcome::Error(problem),
        };
        say(stream, outcome)?;
    }
}

enum Line {
    Whole(Vec<u8>),
    TooLong,
    End,
}

/// The next line, for which the client has its time; `rest` is what was read behind the one before.
fn line(mut stream: &UnixStream, rest: &mut Vec<u8>) -> io::Result<Line> {
    let until = Instant::now() + PATIENCE;
    let mut part = [0; 4096];
    loop {
        if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let behind = rest.split_off(end + 1);
            let mut line = std::mem::replace(rest, behind);
            line.pop();
            return Ok(Line::Whole(line));
        }
        if rest.len() as u64 >= MAX_LINE_BYTES {
            return Ok(Line::TooLong);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part) {
            Ok(0) => return Ok(Line::End),
            Ok(n) => rest.extend_from_slice(&part[..n]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn say(mut stream: &UnixStream, answer: Outcome) -> io::Result<()> {
    let mut line = serde_json::to_vec(&Answer { version: VERSION, answer })?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// The request that `line` is.
fn asked(line: &[u8]) -> Result<Request, String> {
    let value: serde_json::Value =
        serde_json::from_slice(line).map_err(|error| format!("the request is no JSON: {error}"))?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {}
        Some(version) => {
            return Err(format!(
                "the request is of version {version}, and this process knows {VERSION}: use a `pilotfish` of its version, {}",
                env!("CARGO_PKG_VERSION")
            ));
        }
        None => return Err(format!("the request has no `version`: this process knows {VERSION}")),
    }
    let Asked { request, .. } =
        serde_json::from_value(value).map_err(|error| format!("the request is wrong: {error}"))?;
    Ok(request)
}

fn answer(attached: &'static Attached, request: Request) -> Result<Outcome, String> {
    match request {
        Request::Status => Ok(Outcome::Status(Box::new(status(attached)))),
        Request::Toggle { guard, enabled, interventions } => {
            let set = interventions.into_iter().map(|(intervention, setting)| match setting {
                Some(setting) => Change::Set { intervention, setting },
                None => Change::Reset { intervention },
            });
            let changes: Vec<Change> = enabled.map(Change::Enabled).into_iter().chain(set).collect();
            if changes.is_empty() {
                return Err("nothing is to be changed: give `enabled` or `interventions`".to_owned());
            }
            attached.models.guards().change(&guard, &changes).map_err(|error| error.to_string())?;
            Ok(Outcome::InForce(attached.models.guards().status()))
        }
        Request::Reload => {
            attached.models.guards().reload();
            Ok(Outcome::InForce(attached.models.guards().status()))
        }
        Request::Score { text, model, form } => score(attached, &text, model, form).map(Outcome::Score),
        Request::Metrics => Ok(Outcome::Metrics(attached.record.text())),
    }
}

fn status(attached: &Attached) -> Status {
    let command = fs::read("/proc/self/cmdline").unwrap_or_default();
    let command = command.split(|byte| *byte == 0).filter(|argument| !argument.is_empty());
    Status {
        library: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        command: command.map(|argument| String::from_utf8_lossy(argument).into_owned()).collect(),
        problem: attached.problem.clone().or_else(|| attached.llama.as_ref().err().cloned()),
        fail: attached.policy.fail,
        in_force: attached.models.guards().status(),
        contexts: attached.n_contexts(),
        counts: attached.record.counts(),
        audit: attached.record.audit_status(),
    }
}
