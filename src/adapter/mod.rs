//! ConnectionAdapter: the gRPC edge. Each call becomes one command to the core.

mod answer;
mod body;
mod calls;
mod deadline;
pub mod socket;
mod standard;
pub mod tokens;

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::future::Either;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::Service;

use crate::connection::command::{Commands, Reach};
use crate::greeted::{Greeted, PREFACE};
use crate::metrics::AdapterMetrics;
use crate::numbers::fraction;
use crate::proto::connection_adapter_server::ConnectionAdapterServer;
use crate::reload::Current;
use crate::telemetry::Seldom;
use crate::tls;

use answer::Counted;
use body::Unread;
use calls::Calls;
use socket::{Peer, Stream};
use standard::{Standard, Which};
use tokens::{Doorkeeper, Tokens};

/// Flow-control window of a stream in bytes: one large Send must not wait for a round trip.
const STREAM_WINDOW: u32 = 1024 * 1024;

/// What each call that may be under way adds to the connection's window, in bytes.
///
/// h2 takes half of the window as the bound on what small requests cost, up to 255 each, that
/// have come and are not read yet, and closes the connection beyond: as many calls as may be
/// open may come in one burst.
const WINDOW_PER_CALL: u32 = 2 * 256;

/// The largest window of HTTP/2 (RFC 9113, 6.9.1).
const MAX_WINDOW: u32 = (1 << 31) - 1;

/// Longest TLS handshake of a handler, and then the longest wait for its first words of HTTP/2.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection is pinged this often; one that does not answer holds no place for ever.
const PING: Duration = Duration::from_secs(60);

/// How long calls under way have to end on a connection that is too old.
const AGE_GRACE: Duration = Duration::from_secs(30);

/// How handlers are served.
#[derive(Debug, Clone)]
pub struct Options {
    /// Largest request, bytes.
    pub max_message_size: usize,
    /// Calls that one connection may have under way.
    pub max_concurrent_streams: u32,
    /// How long a connection lasts, give or take a tenth.
    pub max_connection_age: Option<Duration>,
    /// Whether who calls acts only on the connections of the token's owner.
    pub isolate: bool,
    /// Whether the trace that a call is part of goes on with what it brings about.
    pub trace: bool,
}

/// Serves handlers' connections. Cheap to clone.
#[derive(Clone)]
pub struct Adapter {
    service: Guarded,
    options: Options,
    tls: Option<Arc<Current<ServerConfig>>>,
    metrics: Arc<AdapterMetrics>,
    /// For lines about handshakes, which anybody may bring about.
    complaints: Arc<Seldom>,
}

impl Adapter {
    /// Without `tls` connections are not encrypted, without `tokens` everybody may call.
    pub fn new(
        commands: Commands,
        options: Options,
        tls: Option<Arc<Current<ServerConfig>>>,
        tokens: Option<Arc<Current<Tokens>>>,
        metrics: AdapterMetrics,
    ) -> Result<Self, tonic_reflection::server::Error> {
        let isolate = options.isolate;
        let metrics = Arc::new(metrics);
        let calls = Calls {
            commands,
            // What came by without the doorkeeper's word reaches nothing.
            reach: if isolate { Reach::Nothing } else { Reach::All },
            metrics: metrics.clone(),
            trace: options.trace,
        };
        let service = Guarded {
            calls: ConnectionAdapterServer::new(calls)
                .max_decoding_message_size(options.max_message_size),
            door: Arc::new(Door {
                keeper: Doorkeeper {
                    tokens,
                    isolate,
                    refused: metrics.unauthenticated.clone(),
                    complaints: Seldom::default(),
                },
                standard: Standard::new(metrics.watches.clone())?,
                unread: Unread::new(options.max_message_size, metrics.unread.clone()),
                metrics: metrics.clone(),
            }),
        };
        Ok(Self {
            service,
            options,
            tls,
            metrics,
            complaints: Arc::default(),
        })
    }

    /// Tells those who ask for health whether the gateway serves.
    pub async fn tell_health(&self, serves: bool) {
        self.service.door.standard.tell(serves).await;
    }

    /// Keeps what is told of its health true: serving from `ready` until `draining`; after `stop`
    /// whoever watches it is let go.
    pub async fn keep_health(
        self,
        ready: impl Future<Output = ()>,
        draining: CancellationToken,
        stop: CancellationToken,
    ) {
        let standard = &self.service.door.standard;
        let is_ready = tokio::select! {
            biased;
            () = draining.cancelled() => false,
            () = ready => true,
        };
        if is_ready {
            standard.tell(true).await;
            draining.cancelled().await;
            standard.tell(false).await;
        }
        stop.cancelled().await;
        standard.end().await;
    }

    /// Serves one connection of a handler until it ends, or, once `stop` is cancelled or it
    /// is too old, until the calls in flight are answered.
    pub async fn serve(self, stream: Stream, peer: Peer, stop: CancellationToken) {
        self.metrics.connections.increment(1.0);
        let result = self.serve_stream(stream, peer, stop).await;
        self.metrics.connections.decrement(1.0);
        if let Err(error) = result {
            tracing::debug!(%peer, %error, "a handler's connection to the adapter ended");
        }
    }

    async fn serve_stream(
        &self,
        stream: Stream,
        peer: Peer,
        stop: CancellationToken,
    ) -> io::Result<()> {
        let stream = match stream {
            Stream::Tcp(stream) => socket::settle(stream)?,
            Stream::Unix(stream) => {
                return self
                    .serve_http(socket::settle_unix(stream)?, peer, stop)
                    .await;
            }
        };
        match &self.tls {
            None => self.serve_http(stream, peer, stop).await,
            Some(tls) => {
                let handshake = TlsAcceptor::from(tls.get()).accept(stream);
                let stream = timeout(HANDSHAKE_TIMEOUT, handshake)
                    .await
                    .map_err(io::Error::from)
                    .flatten()
                    .inspect_err(|error| self.complain(peer, error))?;
                self.serve_http(stream, peer, stop).await
            }
        }
    }

    /// Counts and tells it. A handler that does not get in is worth a line: nothing else tells why devices wait.
    fn complain(&self, peer: Peer, error: &io::Error) {
        self.metrics.handshake_failed.increment(1);
        // Who connects and hangs up looks whether the port is there, as balancers do all the time.
        if error.kind() != io::ErrorKind::UnexpectedEof
            && let Some(left_out) = self.complaints.tell(Instant::now())
        {
            let error = tls::explain(error);
            tracing::warn!(%peer, error, left_out, "a handler did not get in to the adapter: no TLS handshake, or no HTTP/2");
        }
    }

    async fn serve_http(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: Peer,
        stop: CancellationToken,
    ) -> io::Result<()> {
        let service = TowerToHyperService::new(self.service.clone());
        let streams = self.options.max_concurrent_streams;
        let window = streams.saturating_mul(WINDOW_PER_CALL);
        let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(PING)
            .keep_alive_timeout(HANDSHAKE_TIMEOUT)
            .max_concurrent_streams(streams)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(window.clamp(2 * STREAM_WINDOW, MAX_WINDOW));
        // A handler's library speaks at once, and answers pings.
        let (stream, greeted) = Greeted::new(stream, PREFACE);
        let silent = async {
            if timeout(HANDSHAKE_TIMEOUT, greeted).await.is_ok() {
                std::future::pending().await
            }
        };
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let too_old = match self.options.max_connection_age {
            Some(age) => Either::Left(tokio::time::sleep(about(age))),
            None => Either::Right(std::future::pending()),
        };
        tokio::select! {
            biased;
            result = connection.as_mut() => return result.map_err(io::Error::other),
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                return connection.await.map_err(io::Error::other);
            }
            () = silent => {
                let error = io::Error::new(io::ErrorKind::TimedOut, "no word of HTTP/2");
                self.complain(peer, &error);
                return Err(error);
            }
            () = too_old => connection.as_mut().graceful_shutdown(),
        }
        timeout(AGE_GRACE, connection)
            .await
            .map_err(io::Error::from)?
            .map_err(io::Error::other)
    }
}

/// Up to a tenth more or less, so that connections that began together do not end together (gRPC
/// proposal A9).
fn about(age: Duration) -> Duration {
    age.mul_f64(0.9 + fraction() / 5.0)
}

/// The calls, and reflection, behind the doorkeeper; health beside it. Cloned for each request.
#[derive(Clone)]
struct Guarded {
    calls: ConnectionAdapterServer<Calls>,
    door: Arc<Door>,
}

/// What a request meets before it is a call.
struct Door {
    keeper: Doorkeeper,
    standard: Standard,
    unread: Arc<Unread>,
    metrics: Arc<AdapterMetrics>,
}

impl Service<http::Request<Incoming>> for Guarded {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Counted;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Incoming>) -> Self::Future {
        let door = &*self.door;
        let mut request = door.unread.bounded(request);
        let standard = Which::of(request.uri().path());
        if standard == Some(Which::Health) {
            return Counted::not(door.standard.call(Which::Health, request));
        }
        let counted = Counted::new(request.uri().path(), door.metrics.clone());
        match door.keeper.admit(request.headers()) {
            Ok(_) if let Some(which) = standard => Counted::not(door.standard.call(which, request)),
            // What goes without saying is not carried along: it would be allocated.
            Ok(Reach::All) => counted(self.calls.call(request)),
            Ok(reach) => {
                request.extensions_mut().insert(reach);
                counted(self.calls.call(request))
            }
            Err(status) => counted(Box::pin(std::future::ready(Ok(status.into_http())))),
        }
    }
}
