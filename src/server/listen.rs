//! From a configuration to a server that listens, until it is told to end.

use super::body::refuse;
use super::config::{ServerConfig, TlsConfig};
use super::error::{ApiError, ServerError};
use super::keeper::Keeper;
use super::keys::Keys;
use super::metrics::Metrics;
use super::state::{Places, State};
use super::telemetry::Telemetry;
use super::worker::Worker;
use super::{chat, completion, dashboard, guards, health, model_list, score};
use crate::audit::{AuditError, AuditLog, AuditOptions, AuditWriter};
use crate::engine::scheduler::SchedulerOptions;
use crate::engine::{ChatTemplate, Forms, Model};
use crate::store::GuardDirectory;
use arc_swap::ArcSwap;
use axum::body::Body;
use axum::http::StatusCode;
use axum::routing::{get, patch, post};
use axum::{Router, extract};
use axum_server::tls_rustls::RustlsConfig;
use axum_server::{Control, Handle, Server};
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

/// A server that is about to serve.
pub struct Serving {
    /// Where it listens: the port is the one that the system gave, if it was asked for any.
    pub address: SocketAddr,
    /// Whether it speaks HTTPS.
    pub tls: bool,
    /// Guards that are in force.
    pub guards: Vec<String>,
}

/// Serves `model` until SIGTERM or SIGINT, or until it can't any more. `on_ready` is told when requests are taken.
///
/// # Errors
/// What is configured can't be: an address, keys, a guard that does not load. Or the thread that runs the model has failed.
pub fn serve(config: ServerConfig, model: Model, on_ready: impl FnOnce(&Serving)) -> Result<(), ServerError> {
    let keys = config.keys.as_deref().map_or_else(|| Ok(Keys::none()), Keys::load)?;
    if keys.is_none() && !config.listen.ip().is_loopback() {
        return Err(ServerError::NoKeys { address: config.listen.to_string() });
    }
    // As many connections as the system allows, and not the few that a shell begins with.
    #[cfg(unix)]
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        tracing::warn!("the limit of open files stays as it is: {error}");
    }
    let listen = |source| ServerError::Listen { address: config.listen.to_string(), source };
    let listener = bind(config.listen).map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let audit = open_audit(&config)?;
    let telemetry = config.telemetry.otlp.as_deref().map(Telemetry::start).transpose()?;

    let (model, metrics) = (Arc::new(model), Metrics::new());
    let (template, forms) = (ChatTemplate::of(&model)?, Forms::of(&model)?);
    let directory = config.guards.as_deref().map(GuardDirectory::new);
    let limits = config.limits;
    let options = SchedulerOptions {
        n_sequences: limits.parallel,
        n_ctx: limits.context,
        n_batch: limits.batch,
        // Who may wait is decided at the door.
        queue: usize::MAX,
        reuse_prefixes: true,
    };
    let ended = Arc::new(Notify::new());
    let on_end = {
        let ended = Arc::clone(&ended);
        move || ended.notify_one()
    };
    // The keeper compiles first: with a guard that is not for this model there is no server.
    let handle_slot: Arc<std::sync::OnceLock<super::worker::WorkerHandle>> = Arc::default();
    let told = Arc::clone(&handle_slot);
    let on_snapshot = Box::new(move |snapshot: &Arc<super::snapshot::Snapshot>| {
        if let Some(worker) = told.get() {
            worker.set_program(Arc::clone(&snapshot.program));
        }
    });
    let keeper =
        Keeper::start(Arc::clone(&model), directory, config.reload.options(), Arc::clone(&metrics), on_snapshot)?;
    if let Some(path) = config.guards.as_deref().filter(|_| keeper.current().acting().next().is_none()) {
        tracing::warn!("`{}` holds no guard: the model is served as it is", path.display());
    }
    let program = Arc::clone(&keeper.current().program);
    let worker = Worker::start(Arc::clone(&model), program, options, Arc::clone(&metrics), on_end)?;
    let _ = handle_slot.set(worker.handle());
    // What was published in between.
    worker.handle().set_program(Arc::clone(&keeper.current().program));

    let serving = Serving {
        address,
        tls: config.tls.is_some(),
        guards: keeper.current().acting().map(|guard| guard.name().to_owned()).collect(),
    };
    let places = Places::new(limits.queue.saturating_add(limits.parallel as usize));
    let name = config.served_name.clone().unwrap_or_else(|| model.identity().name.clone());
    let state = Arc::new(State {
        name,
        template,
        forms,
        keeper,
        worker: worker.handle(),
        keys: ArcSwap::from_pointee(keys),
        metrics,
        audit,
        audit_failed: AtomicBool::new(false),
        telemetry,
        started: SystemTime::now(),
        ending: AtomicBool::new(false),
        places,
        bodies: Arc::new(Semaphore::new(limits.bodies.clamp(1, Semaphore::MAX_PERMITS))),
        model,
        config,
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("http").build()?;
    let served = runtime.block_on(run(Arc::clone(&state), listener, &ended, || on_ready(&serving)));
    // Tasks that still wait for the model are not waited for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    let worked = worker.end();
    served?;
    Ok(worked?)
}

/// As the standard library binds, with room for many who come at once: of more than there is room for each waits a second before it knocks again.
fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    #[cfg(unix)]
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Connections that may wait to be taken; the system may allow fewer.
const BACKLOG: i32 = 4096;

fn open_audit(config: &ServerConfig) -> Result<Option<AuditWriter>, AuditError> {
    let Some(path) = &config.audit.path else { return Ok(None) };
    let options = AuditOptions { max_bytes: config.audit.max_bytes, keep: config.audit.keep };
    Ok(Some(AuditWriter::start(AuditLog::open(path, options)?, RECORDS)?))
}

/// Records that may wait to be written.
const RECORDS: usize = 1024;

fn router(state: Arc<State>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completion::completion))
        .route("/v1/models", get(model_list::list))
        .route("/v1/models/{name}", get(model_list::one))
        .route("/v1/guard/score", post(score::score))
        .route("/v1/guards", get(guards::list))
        .route("/v1/guard/history", get(guards::history))
        .route("/v1/guards/{name}", patch(guards::change))
        .route("/", get(dashboard::page))
        .route("/dashboard/app.js", get(dashboard::script))
        .route("/dashboard/style.css", get(dashboard::style))
        .route("/openapi.json", get(dashboard::openapi))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/metrics", get(health::metrics))
        .fallback(no_address)
        .method_not_allowed_fallback(no_method)
        .with_state(state)
}

async fn no_address(extract::State(state): extract::State<Arc<State>>, body: Body) -> ApiError {
    refuse(&state, body, ApiError::not_found("there is nothing at this address")).await
}

async fn no_method(extract::State(state): extract::State<Arc<State>>, body: Body) -> ApiError {
    let error = ApiError::not_found("this address does not take this method");
    refuse(&state, body, ApiError { status: StatusCode::METHOD_NOT_ALLOWED, ..error }).await
}

async fn run(
    state: Arc<State>,
    listener: TcpListener,
    ended: &Notify,
    on_ready: impl FnOnce(),
) -> Result<(), ServerError> {
    let control = Control::new();
    let app = router(Arc::clone(&state)).into_make_service();
    let mut servers = JoinSet::new();
    let tls = tls(&state.config).await?;
    match &tls {
        None => {
            let server = bounded(axum_server::from_tcp(listener)?, &state);
            servers.spawn(server.handle(Handle::with_control(control.clone())).serve(app.clone()));
        }
        Some(tls) => {
            let server = bounded(axum_server::from_tcp_rustls(listener, tls.clone())?, &state);
            servers.spawn(server.handle(Handle::with_control(control.clone())).serve(app.clone()));
        }
    }
    #[cfg(unix)]
    let _socket = match &state.config.unix_socket {
        None => None,
        Some(path) => {
            let (listener, socket) = unix::listen(path, &state.config.unix_socket_mode)?;
            let server = bounded(axum_server::from_unix(listener)?, &state);
            servers.spawn(server.handle(Handle::with_control(control.clone())).serve(app));
            Some(socket)
        }
    };
    if let Some(audit) = &state.audit {
        let snapshot = state.keeper.current();
        let guards = guards::snapshot_json(&snapshot)["data"].take();
        let record = json!({ "event": "start", "epoch": snapshot.epoch, "guards": guards });
        let written = state.write_down(audit, record).await;
        written.map_err(|error| ServerError::System(std::io::Error::other(error.message)))?;
    }
    // Whoever is told that it is ready may send one.
    let signals = Signals::take();
    on_ready();
    let failed = tokio::select! {
        () = signals.end(&state, tls.as_ref()) => false,
        () = ended.notified() => true,
    };
    state.ending.store(true, Ordering::Release);
    let drain = Duration::from_secs(if failed { 1 } else { state.config.limits.drain_seconds });
    tracing::info!("ending: {} requests are given {drain:?}", state.places.taken());
    control.graceful_shutdown(Some(drain));
    while let Some(served) = servers.join_next().await {
        served.map_err(|error| ServerError::Worker(error.to_string()))??;
    }
    // Requests whose connections were cut are on record too before this ends.
    let written = async {
        while state.places.taken() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let written = tokio::time::timeout(Duration::from_secs(if failed { 1 } else { 10 }), written).await;
    if written.is_err() {
        tracing::warn!("{} requests are not on record: they did not end", state.places.taken());
    }
    Ok(())
}

/// A server that waits for no head of a request longer than it may take. Between requests a connection may be quiet for as long.
fn bounded<A: axum_server::Address, T>(server: Server<A, T>, state: &State) -> Server<A, T> {
    let read = state.config.limits.read();
    let mut server = server.http1_only().first_request_timeout(read);
    server.http_builder().http1().header_read_timeout(read);
    server
}

async fn tls(config: &ServerConfig) -> Result<Option<RustlsConfig>, ServerError> {
    let Some(TlsConfig { certificate, key }) = &config.tls else { return Ok(None) };
    let unusable =
        |error: std::io::Error| ServerError::Tls { certificate: certificate.clone(), reason: error.to_string() };
    let tls = RustlsConfig::from_pem_file(certificate, key).await.map_err(unusable)?;
    offer_http1(&tls);
    Ok(Some(tls))
}

/// Offers the one protocol that is spoken here, and not HTTP/2, which clients would take.
fn offer_http1(tls: &RustlsConfig) {
    let mut config = (*tls.get_inner()).clone();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    tls.reload_from_config(Arc::new(config));
}

/// Reads the keys and the certificate anew. What can't be read leaves the old ones in use.
#[cfg(unix)]
async fn renew(state: &State, tls: Option<&RustlsConfig>) {
    if let Some(path) = &state.config.keys {
        match Keys::load(path) {
            Ok(mut keys) => {
                keys.go_on_from(&state.keys.load());
                state.keys.store(Arc::new(keys));
            }
            Err(error) => tracing::warn!("the keys stay as they were: {error}"),
        }
    }
    let (Some(TlsConfig { certificate, key }), Some(tls)) = (&state.config.tls, tls) else { return };
    // Read beside the one in use, which is never without what is set on it.
    match RustlsConfig::from_pem_file(certificate, key).await {
        Ok(read) => {
            offer_http1(&read);
            tls.reload_from_config(read.get_inner());
        }
        Err(error) => tracing::warn!("the certificate `{}` is not renewed: {error}", certificate.display()),
    }
}

#[cfg(unix)]
mod unix {
    use super::ServerError;
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::{Path, PathBuf};

    /// The socket's file, removed at the end.
    pub struct Socket(PathBuf);

    impl Drop for Socket {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    /// Listens on `path`, with the permissions `mode`, in octal. A socket that nobody listens on any more is removed first.
    pub fn listen(path: &Path, mode: &str) -> Result<(UnixListener, Socket), ServerError> {
        let problem =
            |reason: &dyn std::fmt::Display| ServerError::Socket { path: path.to_owned(), reason: reason.to_string() };
        let octal = u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o777);
        let mode =
            octal.ok_or_else(|| problem(&format!("`unix_socket_mode` is `{mode}`, where 600 or 660 is meant")))?;
        if let Ok(metadata) = fs::symlink_metadata(path) {
            if !metadata.file_type().is_socket() {
                return Err(problem(&"there is something else of this name"));
            }
            if UnixStream::connect(path).is_ok() {
                return Err(problem(&"another process listens there"));
            }
            fs::remove_file(path).map_err(|error| problem(&error))?;
        }
        let listener = UnixListener::bind(path).map_err(|error| problem(&error))?;
        let socket = Socket(path.to_owned());
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|error| problem(&error))?;
        Ok((listener, socket))
    }
}

/// What the system asks for: to end, or (SIGHUP) that the guards be looked at, the keys and the certificate.
#[cfg(unix)]
struct Signals {
    end: Option<tokio::signal::unix::Signal>,
    interrupt: Option<tokio::signal::unix::Signal>,
    look: Option<tokio::signal::unix::Signal>,
}

#[cfg(unix)]
impl Signals {
    /// Takes signals from now on: before it, each of them ends the process at once.
    fn take() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        let [end, interrupt, look] =
            [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(|kind| signal(kind).ok());
        Self { end, interrupt, look }
    }

    /// Waits for one to end, and does what the others ask for.
    async fn end(mut self, state: &State, tls: Option<&RustlsConfig>) {
        async fn next(signal: &mut Option<tokio::signal::unix::Signal>) {
            match signal {
                Some(signal) => {
                    signal.recv().await;
                }
                None => std::future::pending().await,
            }
        }
        loop {
            tokio::select! {
                () = next(&mut self.end) => return,
                () = next(&mut self.interrupt) => return,
                () = next(&mut self.look) => {
                    state.keeper.look();
                    renew(state, tls).await;
                }
            }
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn take() -> Self {
        Self
    }

    async fn end(self, _: &State, _: Option<&RustlsConfig>) {
        let _ = tokio::signal::ctrl_c().await;
    }
}
