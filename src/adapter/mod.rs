//! ConnectionAdapter: the gRPC edge. Each call becomes one command to the core.

mod calls;
mod standard;
pub mod tokens;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::TcpKeepalive;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::Service;

use crate::connection::command::{Commands, Reach};
use crate::metrics::AdapterMetrics;
use crate::proto::connection_adapter_server::ConnectionAdapterServer;
use crate::reload::Current;

use calls::Calls;
use standard::{Standard, Which};
use tokens::{Doorkeeper, Tokens};

/// Calls that one handler connection may have open. A call waits for the broker or
/// for a slow device; calls beyond wait at the handler, so it must be far more than
/// the devices that can be slow at once.
const MAX_STREAMS: u32 = 65_536;

/// Flow-control windows in bytes: one large Send must not wait for a round trip.
///
/// h2 takes half of the connection's as the bound on what small requests cost, up to 255
/// each, that have come and are not read yet, and closes the connection beyond: as many
/// calls as may be open may come in one burst.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 2 * 256 * MAX_STREAMS;

/// Longest TLS handshake of a handler.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A handler's machine that has gone silent is given up after so long without an
/// acknowledgement of what was sent to it (`TCP_USER_TIMEOUT`), and probed after so
/// long without a word.
const SILENCE: Duration = Duration::from_secs(20);

/// Serves handlers' connections. Cheap to clone.
#[derive(Clone)]
pub struct Adapter {
    service: Guarded,
    tls: Option<Arc<ServerConfig>>,
    metrics: AdapterMetrics,
}

impl Adapter {
    /// `max_message_size` in bytes bounds a request. Without `tokens` everybody may call;
    /// with `isolate` whoever calls acts only on the connections of the token's owner.
    pub fn new(
        commands: Commands,
        max_message_size: usize,
        tls: Option<Arc<ServerConfig>>,
        tokens: Option<Arc<Current<Tokens>>>,
        isolate: bool,
        metrics: AdapterMetrics,
    ) -> Result<Self, tonic_reflection::server::Error> {
        let calls = Calls {
            commands,
            // What came by without the doorkeeper's word reaches nothing.
            reach: if isolate { Reach::Nothing } else { Reach::All },
            metrics: metrics.clone(),
        };
        let service = Guarded {
            calls: ConnectionAdapterServer::new(calls).max_decoding_message_size(max_message_size),
            doorkeeper: Doorkeeper {
                tokens,
                isolate,
                refused: metrics.unauthenticated.clone(),
            },
            standard: Standard::new()?,
        };
        Ok(Self {
            service,
            tls,
            metrics,
        })
    }

    /// Tells those who ask for health whether the gateway serves.
    pub async fn tell_health(&self, serves: bool) {
        self.service.standard.tell(serves).await;
    }

    /// Keeps what is told of its health true: serving from `ready` until `draining`; after `stop`
    /// whoever watches it is let go.
    pub async fn keep_health(
        self,
        ready: impl Future<Output = ()>,
        draining: CancellationToken,
        stop: CancellationToken,
    ) {
        let standard = self.service.standard;
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

    /// Serves one connection of a handler until it ends, or, once `stop` is
    /// cancelled, until the calls in flight are answered.
    pub async fn serve(
        self,
        stream: std::net::TcpStream,
        peer: SocketAddr,
        stop: CancellationToken,
    ) {
        self.metrics.connections.increment(1.0);
        let result = self.serve_stream(stream, stop).await;
        self.metrics.connections.decrement(1.0);
        if let Err(error) = result {
            tracing::debug!(%peer, %error, "a handler's connection to the adapter ended");
        }
    }

    async fn serve_stream(
        &self,
        stream: std::net::TcpStream,
        stop: CancellationToken,
    ) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let socket = socket2::SockRef::from(&stream);
        socket.set_tcp_user_timeout(Some(SILENCE))?;
        socket.set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(SILENCE)
                .with_interval(SILENCE),
        )?;
        let stream = tokio::net::TcpStream::from_std(stream)?;
        match &self.tls {
            None => self.serve_http(stream, stop).await,
            Some(tls) => {
                let handshake = TlsAcceptor::from(tls.clone()).accept(stream);
                let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake)
                    .await
                    .map_err(io::Error::from)
                    .flatten()
                    .inspect_err(|_| self.metrics.handshake_failed.increment(1))?;
                self.serve_http(stream, stop).await
            }
        }
    }

    async fn serve_http(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        stop: CancellationToken,
    ) -> io::Result<()> {
        let service = TowerToHyperService::new(self.service.clone());
        let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            biased;
            result = connection.as_mut() => return result.map_err(io::Error::other),
            () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        connection.await.map_err(io::Error::other)
    }
}

/// The calls, and reflection, behind the doorkeeper; health beside it.
#[derive(Clone)]
struct Guarded {
    calls: ConnectionAdapterServer<Calls>,
    doorkeeper: Doorkeeper,
    standard: Standard,
}

impl Service<http::Request<Incoming>> for Guarded {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Incoming>) -> Self::Future {
        let standard = Which::of(request.uri().path());
        if standard == Some(Which::Health) {
            return self.standard.call(Which::Health, request);
        }
        match self.doorkeeper.admit(request.headers()) {
            Ok(_) if let Some(which) = standard => self.standard.call(which, request),
            // What goes without saying is not carried along: it would be allocated.
            Ok(Reach::All) => self.calls.call(request),
            Ok(reach) => {
                request.extensions_mut().insert(reach);
                self.calls.call(request)
            }
            Err(status) => Box::pin(std::future::ready(Ok(status.into_http()))),
        }
    }
}
