//! A channel to one handler address, kept connected by a task of its own.
//!
//! One HTTP/2 connection, no balancing: the calls of a connection stay on it, and
//! whether the handler is there is known without calling it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use socket2::TcpKeepalive;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tonic::body::Body;
use tonic::codegen::Service;

use crate::metrics::HandlerMetrics;

/// A handler whose machine has gone silent is given up after so long without an
/// acknowledgement of what was sent to it (`TCP_USER_TIMEOUT`). Less than the default
/// `request_timeout`: a broken network is an outage, which is borne, and not the
/// handler's fault.
const SILENCE: Duration = Duration::from_secs(4);

/// An idle channel is probed by TCP after so long, and as often again. HTTP/2 pings
/// would do it too, but gRPC's servers take offence at idle ones.
const PROBE: Duration = Duration::from_secs(10);

/// Flow-control window of the channel. Answers are empty: it is never the limit.
const WINDOW: u32 = 1024 * 1024;

/// First and longest pause before connecting again. Short, for devices wait.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Where a handler listens.
#[derive(Clone)]
pub struct Target {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Encrypts the channel.
    pub tls: Option<Arc<tokio_rustls::rustls::ClientConfig>>,
    /// Longest time for connecting, TLS included.
    pub connect_timeout: Duration,
}

impl Target {
    /// The origin of the requests' URIs.
    fn origin(&self) -> Result<Uri, http::Error> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let authority = if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        };
        Uri::builder()
            .scheme(scheme)
            .authority(authority)
            .path_and_query("/")
            .build()
    }
}

/// An open channel. Cheap to clone.
#[derive(Clone)]
pub struct Channel {
    sender: SendRequest<Body>,
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = tonic::Status;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.sender.poll_ready(cx).map_err(unavailable)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = self.sender.send_request(request);
        Box::pin(async move { answer.await.map_err(unavailable) })
    }
}

/// Whatever breaks below gRPC says nothing about the call.
fn unavailable(error: hyper::Error) -> tonic::Status {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    tonic::Status::unavailable(text)
}

/// See the module.
pub struct Link {
    target: Target,
    origin: Uri,
    channel: watch::Sender<Option<Channel>>,
    trouble: Mutex<String>,
    metrics: HandlerMetrics,
}

impl Link {
    /// A link that is down until [`Link::run`] has connected it.
    ///
    /// # Errors
    /// A host that cannot stand in a URI.
    pub fn new(target: Target, metrics: HandlerMetrics) -> Result<Arc<Self>, http::Error> {
        let origin = target.origin()?;
        Ok(Arc::new(Self {
            target,
            origin,
            channel: watch::Sender::new(None),
            trouble: Mutex::new("not connected yet".to_owned()),
            metrics,
        }))
    }

    /// The origin of the requests' URIs.
    pub(super) fn origin(&self) -> Uri {
        self.origin.clone()
    }

    /// The channel, if it is up.
    pub(super) fn channel(&self) -> Option<Channel> {
        self.channel.borrow().clone()
    }

    /// Whether the channel is up.
    pub fn is_up(&self) -> bool {
        self.channel.borrow().is_some()
    }

    /// Resolves when the channel is up. Cancel safe.
    pub(super) async fn up(&self) {
        // The sender lives as long as the link, so this cannot fail.
        let _ = self.channel.subscribe().wait_for(Option::is_some).await;
    }

    /// Why the channel is down.
    pub fn trouble(&self) -> String {
        self.trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Keeps the channel connected, for ever.
    pub async fn run(self: Arc<Self>) {
        let mut pause = PAUSES.0;
        loop {
            match self.connect().await {
                Ok((sender, connection)) => {
                    pause = PAUSES.0;
                    tracing::info!(handler = %self.origin, "handler channel is up");
                    self.metrics.channels_up.increment(1.0);
                    self.channel.send_replace(Some(Channel { sender }));
                    let error = match connection.await {
                        Ok(()) => "the handler closed the connection".to_owned(),
                        Err(error) => error.to_string(),
                    };
                    self.metrics.channels_up.decrement(1.0);
                    self.note(&error);
                    self.channel.send_replace(None);
                }
                Err(error) => self.note(&error.to_string()),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Logs a trouble once, however often it comes back.
    fn note(&self, error: &str) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_up() || *trouble != error {
            tracing::warn!(handler = %self.origin, error, "handler channel is down");
        }
        error.clone_into(&mut trouble);
    }

    async fn connect(
        &self,
    ) -> io::Result<(
        SendRequest<Body>,
        BoxFuture<'static, Result<(), hyper::Error>>,
    )> {
        let limit = self.target.connect_timeout;
        tokio::time::timeout(limit, self.dial())
            .await
            .unwrap_or_else(|_| {
                Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("no connection within {limit:?}"),
                ))
            })
    }

    async fn dial(
        &self,
    ) -> io::Result<(
        SendRequest<Body>,
        BoxFuture<'static, Result<(), hyper::Error>>,
    )> {
        let target = &self.target;
        let tcp = TcpStream::connect((target.host.as_str(), target.port)).await?;
        tcp.set_nodelay(true)?;
        let socket = socket2::SockRef::from(&tcp);
        socket.set_tcp_user_timeout(Some(SILENCE))?;
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(PROBE).with_interval(PROBE))?;
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW);
        match &target.tls {
            None => {
                let handshake = builder.handshake(TokioIo::new(tcp));
                let (sender, connection) = handshake.await.map_err(io::Error::other)?;
                Ok((sender, Box::pin(connection)))
            }
            Some(tls) => {
                let name =
                    tokio_rustls::rustls::pki_types::ServerName::try_from(target.host.clone())
                        .map_err(io::Error::other)?;
                let connector = tokio_rustls::TlsConnector::from(tls.clone());
                let stream = connector.connect(name, tcp).await?;
                let handshake = builder.handshake(TokioIo::new(stream));
                let (sender, connection) = handshake.await.map_err(io::Error::other)?;
                Ok((sender, Box::pin(connection)))
            }
        }
    }
}
