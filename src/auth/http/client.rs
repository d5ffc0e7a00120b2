//! A client of HTTP/1.1: connections kept for the next request, TLS, everything bounded.
//!
//! A service may close a kept connection just when a request comes (RFC 9112, 9.3.1). Where nothing
//! of an answer was there yet, the request is made once more, over a connection of its own: nobody is
//! to be refused for it. Such a service may have seen the first request all the same.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::codegen::Service;

use crate::tls::Renewed;

/// A connection that is not used for so long is closed: before most servers close it.
const IDLE: Duration = Duration::from_secs(30);

/// How a service is reached.
#[derive(Clone)]
pub struct Options {
    /// For https.
    pub tls: Option<Arc<Renewed>>,
    /// The longest that connecting takes.
    pub connect_timeout: Duration,
    /// The longest that a request takes, waiting for its turn included.
    pub request_timeout: Duration,
    /// Requests at a time.
    pub pool_size: usize,
    /// Bytes of an answer.
    pub max_body: usize,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options").finish_non_exhaustive()
    }
}

/// What a service answered.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

/// Why there is no answer. Says nothing of what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It took too long.
    #[error("no answer within {0:?}")]
    Late(Duration),
    /// What was filled in makes no request.
    #[error("the request cannot be made: {0}")]
    Request(&'static str),
    /// The connection could not be made or broke.
    #[error("{0}")]
    Broken(String),
    /// The answer is too large.
    #[error("the answer has more than {0} bytes")]
    TooLarge(usize),
}

/// See the module.
pub struct HttpClient {
    client: Client<Connector, Full<Bytes>>,
    /// Keeps no connections.
    fresh: Client<Connector, Full<Bytes>>,
    turns: Semaphore,
    options: Options,
}

impl HttpClient {
    /// Connects with the first request.
    pub fn new(options: Options) -> Self {
        let connector = Connector {
            tls: options.tls.clone(),
            timeout: options.connect_timeout,
        };
        let client = |kept| {
            Client::builder(TokioExecutor::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(IDLE)
                .pool_max_idle_per_host(kept)
                .build(connector.clone())
        };
        Self {
            client: client(options.pool_size),
            fresh: client(0),
            turns: Semaphore::new(options.pool_size.min(Semaphore::MAX_PERMITS)),
            options,
        }
    }

    /// One request. Redirections are not followed. Cancel safe.
    pub async fn ask(
        &self,
        method: Method,
        uri: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Answer, Error> {
        let uri: Uri = uri.parse().map_err(|_| Error::Request("its URL is none"))?;
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        let limit = self.options.request_timeout;
        tokio::time::timeout(limit, self.send(request))
            .await
            .unwrap_or(Err(Error::Late(limit)))
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Answer, Error> {
        let closed = |_| Error::Broken("the gateway stops".to_owned());
        let _turn = self.turns.acquire().await.map_err(closed)?;
        let answer = match self.client.request(request.clone()).await {
            Err(error) if was_kept_too_long(&error) => self.fresh.request(request).await,
            answer => answer,
        };
        let (head, body) = answer.map_err(|error| broken(&error))?.into_parts();
        let body = Limited::new(body, self.options.max_body).collect().await;
        let body = body.map_err(
            |error| match error.is::<http_body_util::LengthLimitError>() {
                true => Error::TooLarge(self.options.max_body),
                false => Error::Broken(chain(&*error)),
            },
        )?;
        Ok(Answer {
            status: head.status,
            headers: head.headers,
            body: body.to_bytes(),
        })
    }
}

/// Whether the connection had answered earlier requests, and nothing of this one's answer came.
fn was_kept_too_long(error: &ClientError) -> bool {
    let mut extras = http::Extensions::new();
    if let Some(connected) = error.connect_info() {
        connected.get_extras(&mut extras);
    }
    extras
        .get::<Arc<Progress>>()
        .is_some_and(|progress| progress.is_asked_again())
}

fn broken(error: &ClientError) -> Error {
    Error::Broken(chain(error))
}

/// An error with its causes: the outer ones say little.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let part = inner.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        cause = inner.source();
    }
    text
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Opens connections.
#[derive(Clone)]
struct Connector {
    tls: Option<Arc<Renewed>>,
    timeout: Duration,
}

/// How far a connection is: it is asked, answers, is asked again...
#[derive(Debug, Default)]
struct Progress(AtomicU8);

impl Progress {
    /// Heard of since it was asked.
    const HEARD: u8 = 1;
    /// Asked again, and nothing was heard since.
    const AGAIN: u8 = 2;

    fn heard(&self) {
        self.0.store(Self::HEARD, Ordering::Relaxed);
    }

    fn asked(&self) {
        if self.0.load(Ordering::Relaxed) == Self::HEARD {
            self.0.store(Self::AGAIN, Ordering::Relaxed);
        }
    }

    fn is_asked_again(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::AGAIN
    }
}

/// An open connection.
struct Open {
    stream: Box<dyn Stream>,
    progress: Arc<Progress>,
}

impl Connector {
    async fn open(self, uri: Uri) -> io::Result<TokioIo<Open>> {
        let host = uri.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let is_tls = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let tcp = TcpStream::connect((host, port)).await?;
        tcp.set_nodelay(true)?;
        let stream: Box<dyn Stream> = match self.tls.filter(|_| is_tls) {
            None => Box::new(tcp),
            Some(tls) => {
                let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
                Box::new(tls.connector().connect(name, tcp).await?)
            }
        };
        Ok(TokioIo::new(Open {
            stream,
            progress: Arc::default(),
        }))
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Open>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<TokioIo<Open>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (connector, limit) = (self.clone(), self.timeout);
        Box::pin(async move {
            tokio::time::timeout(limit, connector.open(uri))
                .await
                .unwrap_or_else(|_| {
                    let text = format!("no connection within {limit:?}");
                    Err(io::Error::new(io::ErrorKind::TimedOut, text))
                })
        })
    }
}

impl Connection for Open {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.progress.clone())
    }
}

impl AsyncRead for Open {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.progress.heard();
        }
        read
    }
}

impl AsyncWrite for Open {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.progress.asked();
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
