//! Everything with sockets.

pub mod body;
mod generate;
mod guard;
mod inform;
mod stored;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::{get, post};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;

use crate::error::ApiError;
use crate::options::{Options, OptionsError};
use crate::request::Api;
use crate::server::Server;
use crate::tls::{self, TlsError};
use crate::trace::Trace;
use crate::wiring::Wiring;

/// Why the server cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Options that cannot be followed.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// A certificate that cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address is taken, or not this machine's.
    #[error("listening at {address}: {error}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        error: io::Error,
    },
    /// The trace's file cannot be written.
    #[error("opening the trace: {0}")]
    Trace(io::Error),
    /// The system gave no threads or no socket.
    #[error("starting the server: {0}")]
    Start(#[from] io::Error),
}

/// Asks a server to stop; clones ask the same one.
#[derive(Clone)]
pub struct Shutdown {
    sender: watch::Sender<bool>,
}

impl Shutdown {
    /// One that was not asked yet.
    #[expect(clippy::new_without_default, reason = "a default that nothing is connected to would mislead")]
    pub fn new() -> Shutdown {
        Shutdown { sender: watch::Sender::new(false) }
    }

    /// Asks. From any thread.
    pub fn trigger(&self) {
        self.sender.send_replace(true);
    }

    /// Whether somebody has asked.
    pub fn is_triggered(&self) -> bool {
        *self.sender.borrow()
    }

    async fn wait(&self) {
        // The sender is here, so this ends only when somebody asks.
        let _ = self.sender.subscribe().wait_for(|is_asked| *is_asked).await;
    }
}

/// Takes the address that the options name, and reads the files that they name, so that what is wrong with either is known before a
/// model is loaded.
///
/// # Errors
/// [`Error::Options`], [`Error::Tls`], [`Error::Bind`].
pub fn bind(options: &Options) -> Result<TcpListener, Error> {
    options.validate()?;
    options.key()?;
    if let (Some(certificate), Some(key)) = (&options.tls_certificate, &options.tls_key) {
        tls::acceptor(certificate, key)?;
    }
    let address = SocketAddr::new(options.host, options.port);
    TcpListener::bind(address).map_err(|error| Error::Bind { address, error })
}

/// Serves until `shutdown` is triggered. Then the engine is asked to stop, requests get what there is to tell, and connections
/// are closed. Has threads of its own; the calling one waits.
///
/// # Errors
/// [`Error`]: nothing was served.
pub fn serve(wiring: Wiring, options: Options, listener: TcpListener, shutdown: &Shutdown) -> Result<(), Error> {
    options.validate()?;
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() && options.key()?.is_none() {
        return Err(OptionsError::OpenToAll(address.ip()).into());
    }
    let tls = match (&options.tls_certificate, &options.tls_key) {
        (Some(certificate), Some(key)) => Some(tls::acceptor(certificate, key)?),
        _ => None,
    };
    let trace = options.trace.as_deref().map(Trace::open).transpose().map_err(Error::Trace)?;
    let server = Arc::new(Server::new(wiring, options, address.ip().is_loopback(), trace)?);
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().thread_name("infall-http").enable_all().build()?;
    let result = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        accept(&server, &listener, tls, shutdown).await;
        Ok(())
    });
    // Preparations that nobody waits for any more must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// Takes connections until the server is to stop, and waits for them to end.
async fn accept(
    server: &Arc<Server>,
    listener: &tokio::net::TcpListener,
    tls: Option<TlsAcceptor>,
    shutdown: &Shutdown,
) {
    let routes = routes(server.clone());
    let connections = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(server.options.limits.connections));
    loop {
        let next = async {
            // Nobody closes the semaphore.
            let permit = room.clone().acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let (permit, socket) = tokio::select! {
            next = next => match next {
                (permit, Ok((socket, _))) => (permit, socket),
                (_, Err(error)) => {
                    // Too many open files, most likely: others have to end first.
                    tracing::warn!(%error, "taking a connection failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = shutdown.wait() => break,
        };
        let (server, routes, tls, watcher) = (server.clone(), routes.clone(), tls.clone(), connections.watcher());
        tokio::spawn(async move {
            connection(&server, routes, tls, socket, watcher).await;
            drop(permit);
        });
    }
    server.wiring.engine.stop();
    let limit = Duration::from_secs(server.options.limits.shutdown_s);
    if tokio::time::timeout(limit, connections.shutdown()).await.is_err() {
        tracing::warn!("some requests did not end in time and were cut off");
    }
}

/// One connection, from its first byte to its last.
async fn connection(
    server: &Server,
    routes: Router,
    tls: Option<TlsAcceptor>,
    socket: TcpStream,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let limits = &server.options.limits;
    // Only latency is at stake.
    let _ = socket.set_nodelay(true);
    let mut socket = TimeoutStream::new(socket);
    socket.set_write_timeout(Some(Duration::from_secs(limits.write_s)));
    let socket = Box::pin(socket);
    let socket: Pin<Box<dyn Socket>> = match tls {
        None => socket,
        Some(tls) => {
            let greeting = tokio::time::timeout(Duration::from_secs(limits.header_s), tls.accept(socket));
            let Ok(Ok(stream)) = greeting.await else { return };
            Box::pin(stream)
        }
    };
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(limits.header_s))
        .max_buf_size(limits.header_bytes)
        .serve_connection(TokioIo::new(socket), TowerToHyperService::new(routes));
    // What a client does wrong here was answered, or there is nobody left to answer.
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Something to read from and write to.
trait Socket: AsyncRead + AsyncWrite + Send {}

impl<S: AsyncRead + AsyncWrite + Send> Socket for S {}

/// All that is served.
fn routes(server: Arc<Server>) -> Router {
    let generating = Api::ALL.into_iter().fold(Router::new(), |router, api| {
        router.route(api.path(), post(move |state, request| generate::generate(api, state, request)))
    });
    generating
        .route("/v1/messages/count_tokens", post(generate::count_messages))
        .route("/v1/responses/input_tokens", post(generate::count_responses))
        .route("/v1/responses/{id}", get(stored::get).delete(stored::delete))
        .route("/v1/models", get(inform::models))
        .route("/v1/models/{id}", get(inform::model))
        .route("/health", get(inform::health))
        .route("/metrics", get(inform::metrics))
        .route("/props", get(inform::props))
        .route("/openapi.json", get(inform::openapi))
        .route("/", get(inform::page))
        .route("/app.js", get(inform::script))
        .route("/style.css", get(inform::style))
        .fallback(inform::not_found)
        .method_not_allowed_fallback(inform::method_not_allowed)
        .layer(axum::middleware::from_fn_with_state(server.clone(), guard::guard))
        .with_state(server)
}

/// An answer of JSON.
fn json(status: u16, body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The id that a path ends with.
type Id = Result<Path<String>, PathRejection>;

/// The id, if it is text.
fn id(id: Id) -> Result<String, ApiError> {
    let message = "the id in the path is not UTF-8: write it as it was told";
    id.map(|Path(id)| id).map_err(|_| ApiError::new(400, message))
}

/// An answer that is an error, in the shape that clients of `path` expect.
fn error(path: &str, error: &ApiError) -> Response {
    let is_anthropic = path == "/v1/messages" || path.starts_with("/v1/messages/");
    let mut response = json(error.status, &error.body(is_anthropic));
    let headers = response.headers_mut();
    match error.status {
        401 => headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")),
        429 | 503 => headers.insert(header::RETRY_AFTER, HeaderValue::from_static("5")),
        _ => None,
    };
    response
}
