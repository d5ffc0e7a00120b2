//! The way to a handler's address: TCP or a Unix socket, TLS, HTTP/2.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use socket2::TcpKeepalive;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::body::Body;

use super::resolve::{Endpoint, Place, Target};
use crate::greeted::Greeted;
use crate::tls;

/// A handler whose machine has gone silent is given up after at most so long without an
/// acknowledgement of what was sent to it (`TCP_USER_TIMEOUT`). Sooner than `request_timeout`,
/// four fifths of it: a broken network is an outage, which is borne, and not the handler's fault.
const SILENCE: Duration = Duration::from_secs(4);

/// An idle channel is probed by TCP after so long, and as often again. HTTP/2 pings
/// would do it too, but gRPC's servers take offence at idle ones.
const PROBE: Duration = Duration::from_secs(10);

/// Flow-control windows in bytes. Answers are empty: they are never the limit.
///
/// Half of the channel's is also h2's bound on what small frames cost that have come and
/// are not read yet, 251 for an answer; beyond it the channel is closed. With this 66,000
/// answers may come in one burst, whatever `max_in_flight` is set to.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CHANNEL_WINDOW: u32 = 32 * 1024 * 1024;

/// HTTP/2 pings while calls are under way.
#[derive(Debug, Clone, Copy)]
pub struct Pings {
    /// Silence before one is sent.
    pub interval: Duration,
    /// Longest wait for its answer.
    pub timeout: Duration,
}

/// What is sent over a channel, the future that does it, which ends with the channel, and how
/// many calls the handler allows at a time, where it says so.
pub(super) type Dialled = (
    SendRequest<Body>,
    BoxFuture<'static, Result<(), hyper::Error>>,
    Option<u32>,
);

/// Connects, and waits for the handler's first word, within the target's
/// `connect_timeout`. The error's text stays the same for as long as the cause does.
pub(super) async fn dial(
    target: &Target,
    endpoint: &Endpoint,
    pings: Option<Pings>,
) -> Result<Dialled, String> {
    let limit = target.connect_timeout;
    let mut next = "connection";
    let dialled = timeout(limit, connect(target, endpoint, pings, &mut next)).await;
    match dialled {
        Ok(dialled) => dialled.map_err(|error| tls::explain(&error)),
        Err(_) => Err(format!("no {next} within {limit:?}")),
    }
}

/// `next` is what was waited for, if it did not come.
async fn connect(
    target: &Target,
    endpoint: &Endpoint,
    pings: Option<Pings>,
    next: &mut &'static str,
) -> io::Result<Dialled> {
    const GREETING: &str = "word of HTTP/2";
    let address = match endpoint {
        Endpoint::Unix(path) => {
            let stream = UnixStream::connect(path).await?;
            *next = GREETING;
            return speak(stream, pings, "is it a gRPC server?").await;
        }
        Endpoint::Tcp(address) => *address,
    };
    let tcp = tcp(address, SILENCE.min(target.request_timeout * 4 / 5)).await?;
    let (Some(tls), Place::Port { host, .. }) = (&target.tls, &target.place) else {
        *next = GREETING;
        return speak(tcp, pings, "does it want TLS (https://)?").await;
    };
    let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
    let connector = tls.connector();
    *next = "TLS handshake";
    let encrypted = connector.connect(name, tcp).await?;
    *next = GREETING;
    let hint = "does it refuse the gateway's certificate, or the lack of one?";
    speak(encrypted, pings, hint).await
}

async fn tcp(address: SocketAddr, silence: Duration) -> io::Result<TcpStream> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let socket = socket2::SockRef::from(&tcp);
    socket.set_tcp_user_timeout(Some(silence))?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(PROBE).with_interval(PROBE))?;
    Ok(tcp)
}

/// HTTP/2, from when the handler has said its first word: until then a server that is
/// there cannot be told from a system that accepts for one that is not, nor one that
/// takes us (TLS 1.3 refuses a client's certificate after the handshake) from one that
/// does not. `hint` says what a handler may want that hangs up without a word.
async fn speak<S>(stream: S, pings: Option<Pings>, hint: &str) -> io::Result<Dialled>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CHANNEL_WINDOW);
    if let Some(pings) = pings {
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(pings.interval)
            .keep_alive_timeout(pings.timeout)
            .keep_alive_while_idle(false);
    }
    let (stream, mut heard) = Greeted::new(stream, 0);
    let broken = |error: hyper::Error| io::Error::other(causes(&error));
    let handshake = builder.handshake(TokioIo::new(stream));
    let (sender, connection) = handshake.await.map_err(broken)?;
    let mut connection: BoxFuture<'static, _> = Box::pin(connection);
    tokio::select! {
        // First: it ends with a first word that is none of HTTP/2.
        biased;
        ended = &mut connection => Err(match ended {
            // A TLS alert says more than that nothing came.
            Err(error) if heard.try_recv().is_ok() || causes(&error).contains("alert") => broken(error),
            _ => io::Error::other(format!("the handler hung up without a word of HTTP/2: {hint}")),
        }),
        Ok(greeting) = &mut heard => Ok((sender, connection, greeting.max_concurrent_streams)),
    }
}

/// What an error of HTTP/2 says, with what is below it.
pub(super) fn causes(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
