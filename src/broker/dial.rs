//! Connecting to the broker, and what can go wrong with a connection.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::wire::{Decoder, DisconnectNotice, Hello, Inbound, Protocol, Welcome, WireError};
use super::{Address, Options, Refusal};

/// A broker that takes none of our bytes, or answers no ping, for this long is
/// gone; with a shorter keep-alive, for as long as that. Also set as
/// `TCP_USER_TIMEOUT`, which finds a silent network.
pub(super) const STALL: Duration = Duration::from_secs(10);

/// See [`STALL`]. Who asks for a short keep-alive wants to know soon.
pub(super) fn stall_of(options: &Options) -> Duration {
    STALL.min(options.keep_alive)
}

/// Bytes the kernel takes ahead of the network (`TCP_NOTSENT_LOWAT`). On a slow link
/// it would take megabytes, behind which a ping waits until the broker seems dead.
/// What it does not take waits in the outbox, where it can be withdrawn.
const UNSENT: u32 = 256 * 1024;

/// After a link that lived for so long the pauses begin anew: a broker that takes us
/// and hangs up at once is not worth more than an attempt a second.
pub(super) const STEADY: Duration = Duration::from_secs(1);

/// How long a broker may take to close a connection that we have ended.
const FAREWELL: Duration = Duration::from_secs(1);

/// Anything MQTT can run over.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("no connection within {0:?}")]
    ConnectTimeout(Duration),
    #[error("no CONNACK within {0:?}")]
    HandshakeTimeout(Duration),
    #[error("{0}")]
    Wire(#[from] WireError),
    #[error("the TLS handshake failed: {}", crate::tls::explain(.0))]
    Tls(io::Error),
    #[error(
        "the broker hung up before its CONNACK: does it speak MQTT {0}? does it want {1} here?"
    )]
    NoWelcome(&'static str, &'static str),
    #[error("the broker refused the connection: {0}")]
    Refused(Refusal),
    #[error("the broker closed the connection")]
    Closed,
    #[error("the broker ended the connection: {}", .0.reason)]
    Ended(DisconnectNotice),
    #[error(
        "another client connected as {0}: does a second gateway run with the same node_name and client_id_prefix?"
    )]
    TakenOver(String),
    #[error(
        "the broker took {0} and soon closed the connection, several times in a row: does a second gateway run with the same node_name and client_id_prefix?"
    )]
    Contested(String),
    #[error("the broker still has the session that was ended")]
    NotWiped,
    #[error("the broker sent {0} out of place")]
    Unexpected(&'static str),
    #[error("the broker took no bytes for {0:?}")]
    WriteStalled(Duration),
    #[error("the broker answered no SUBSCRIBE for {STALL:?}")]
    Unanswered,
    #[error("the broker answered no ping for {0:?}")]
    PingTimeout(Duration),
}

impl LinkError {
    /// The likely reason for a broker to hang up upon a CONNECT.
    fn no_welcome(protocol: Protocol, address: &Address) -> Self {
        let wish = match address.tls {
            None => "TLS (mqtts://)",
            Some(_) => "a client certificate",
        };
        Self::NoWelcome(protocol.name(), wish)
    }

    /// Whether the broker hung up of its own accord, as it does upon a packet that
    /// it will not have.
    pub(super) fn is_the_brokers_will(&self) -> bool {
        self.is_without_a_word() || matches!(self, Self::Ended(_))
    }

    /// Whether the connection was closed or reset, for whatever reason.
    pub(super) fn is_without_a_word(&self) -> bool {
        match self {
            Self::Closed => true,
            Self::Io(error) => error.kind() == io::ErrorKind::ConnectionReset,
            _ => false,
        }
    }

    /// Whether another gateway has our session, or seems to.
    pub(super) fn is_anothers(&self) -> bool {
        matches!(self, Self::TakenOver(_) | Self::Contested(_))
    }

    /// Whether it is likely to end the same way next time.
    pub(super) fn is_a_rejection(&self) -> bool {
        self.is_anothers() || matches!(self, Self::Refused(_) | Self::Wire(WireError::Only311))
    }
}

/// Goes through the addresses: a pause comes after all of them have failed.
#[derive(Default)]
pub(super) struct Round {
    next: usize,
    /// One for each address that failed in this round.
    reasons: Vec<String>,
}

impl Round {
    pub(super) fn address<'a>(&self, addresses: &'a [Address]) -> Option<&'a Address> {
        addresses.get(self.next)
    }

    /// The address failed; what is wrong with all when that was the last. A link
    /// that was up ends the round too, and the next one begins with its address.
    pub(super) fn failed(
        &mut self,
        reason: String,
        was_up: bool,
        addresses: usize,
    ) -> Option<String> {
        if was_up {
            self.reasons.clear();
            return Some(reason);
        }
        self.next = (self.next + 1) % addresses.max(1);
        self.reasons.push(reason);
        (self.reasons.len() >= addresses).then(|| std::mem::take(&mut self.reasons).join("; "))
    }
}

/// Opens a connection, encrypted where that is configured.
pub(super) async fn connect(
    options: &Options,
    address: &Address,
) -> Result<Box<dyn Stream>, LinkError> {
    let limit = options.connect_timeout;
    let stall = stall_of(options);
    let dial = async {
        let tcp = TcpStream::connect((address.host.as_str(), address.port)).await?;
        tcp.set_nodelay(true)?;
        let socket = socket2::SockRef::from(&tcp);
        socket.set_tcp_user_timeout(Some(stall))?;
        socket.set_tcp_notsent_lowat(UNSENT)?;
        let Some(tls) = &address.tls else {
            return Ok::<Box<dyn Stream>, LinkError>(Box::new(tcp));
        };
        let name = tokio_rustls::rustls::pki_types::ServerName::try_from(address.host.clone())
            .map_err(io::Error::other)?;
        let encrypted = tls.connector().connect(name, tcp).await;
        Ok(Box::new(encrypted.map_err(LinkError::Tls)?) as Box<dyn Stream>)
    };
    timeout(limit, dial)
        .await
        .map_err(|_| LinkError::ConnectTimeout(limit))?
}

/// CONNECT and CONNACK, within the time for them. What comes behind the CONNACK
/// stays in `input`.
pub(super) async fn handshake(
    options: &Options,
    address: &Address,
    client_id: &str,
    clean_start: bool,
    stream: &mut Box<dyn Stream>,
    input: &mut BytesMut,
) -> Result<Welcome, LinkError> {
    let limit = options.connect_timeout;
    timeout(limit, shake(options, client_id, clean_start, stream, input))
        .await
        .map_err(|_| LinkError::HandshakeTimeout(limit))?
        .map_err(|error| match error {
            error if error.is_without_a_word() => LinkError::no_welcome(options.protocol, address),
            error => error,
        })
}

async fn shake(
    options: &Options,
    client_id: &str,
    clean_start: bool,
    stream: &mut Box<dyn Stream>,
    input: &mut BytesMut,
) -> Result<Welcome, LinkError> {
    let protocol = options.protocol;
    let seconds = |duration: Duration| u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
    let mut out = BytesMut::new();
    protocol.connect(
        &Hello {
            client_id,
            login: options
                .login
                .as_ref()
                .map(|login| (login.username.as_str(), login.password.as_str())),
            keep_alive: u16::try_from(options.keep_alive.as_secs()).unwrap_or(u16::MAX),
            clean_start,
            session_expiry: seconds(options.session_expiry),
            receive_maximum: options.receive_maximum,
            max_packet_size: options.max_packet_size,
            will: options.will.as_ref(),
        },
        &mut out,
    );
    stream.write_all(&out).await?;
    stream.flush().await?;
    let mut decoder = Decoder::new(protocol, options.max_packet_size);
    loop {
        if let Some(packet) = decoder.next(input)? {
            return match packet {
                Inbound::ConnAck(Err(refusal)) => Err(LinkError::Refused(refusal)),
                Inbound::ConnAck(Ok(welcome)) => Ok(welcome),
                Inbound::Disconnect(notice) => Err(LinkError::Ended(notice)),
                _ => Err(LinkError::Unexpected("a packet before its CONNACK")),
            };
        }
        if stream.read_buf(input).await? == 0 {
            return Err(LinkError::Closed);
        }
    }
}

/// Ends the session that the broker may keep under this client id. MQTT 3.1.1 has no
/// other way: a DISCONNECT leaves it, and `clean_session` in the CONNECT both ends
/// the old one and lets none begin.
pub(super) async fn wipe(
    options: &Options,
    address: &Address,
    client_id: &str,
) -> Result<(), LinkError> {
    let mut stream = connect(options, address).await?;
    let input = &mut BytesMut::new();
    handshake(options, address, client_id, true, &mut stream, input).await?;
    let mut out = BytesMut::new();
    options.protocol.disconnect(false, &mut out);
    stream.write_all(&out).await?;
    stream.shutdown().await?;
    // The broker closes the connection when it is done with it (MQTT 3.1.1, 3.14.4). The
    // next CONNECT must not come before: it could continue the session that is about to
    // go.
    let rest = async { while stream.read_buf(input).await.is_ok_and(|read| read > 0) {} };
    let _ = timeout(FAREWELL, rest).await;
    Ok(())
}
