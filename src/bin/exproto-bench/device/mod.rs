//! Devices: each a connection to the gateway and a task.
//!
//! A device says hello, waits for the handler's answer, and then writes what is due of
//! its lane and reports what comes. It reads while it waits for room to write: a
//! gateway that waits for the device to read would otherwise never read itself.

mod datagram;
mod dtls;
mod stream;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use exproto_sidecar::tls::{self, Identity};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::failure::Failure;
use crate::frame::{self, Frame, Head, Kind, RunId, Wishes};
use crate::lanes::Lanes;
use crate::options::{Options, Transport};

/// How devices connect.
pub struct Dialer {
    gateway: SocketAddr,
    way: Way,
    sources: Vec<IpAddr>,
    payload: usize,
    timeout: Duration,
}

enum Way {
    Tcp,
    Ssl(TlsConnector, ServerName<'static>),
    Udp,
    Dtls(dtls::Client),
}

/// Why a device is not connected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("no connection within {0:?}")]
    Slow(Duration),
    #[error("connected, but no answer to the first frame within {0:?}")]
    NoWelcome(Duration),
    #[error("no answer within {0:?}, and over UDP nothing tells whether anybody is there")]
    Silent(Duration),
    #[error("the gateway closed the connection before the handler had answered")]
    Closed,
    #[error("the handler could not set it up: {0}")]
    Failed(String),
    #[error("not the bench's protocol: {0}")]
    Frame(#[from] frame::Error),
}

impl Error {
    /// Whether the gateway was there and hung up.
    pub fn is_turned_away(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        match self {
            Self::Closed => true,
            Self::Io(error) => matches!(
                error.kind(),
                BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof
            ),
            _ => false,
        }
    }
}

/// A device that was told apart from the others.
pub struct Device {
    pub number: u32,
    pub wishes: Wishes,
    pub lanes: Arc<Lanes>,
    /// Told when the device is ready, or why it is not.
    pub ready: oneshot::Sender<Result<(), Error>>,
}

/// How to connect, from the options; what takes longer than `timeout` has failed.
///
/// # Errors
/// Files that cannot be read, and a gateway that has no address.
pub async fn dialer(options: &Options, timeout: Duration) -> Result<Dialer, Failure> {
    let wrong = |error: String| Failure::Usage(error);
    let way = match options.transport {
        Transport::Tcp => Way::Tcp,
        Transport::Udp => Way::Udp,
        Transport::Dtls => Way::Dtls(dtls::Client::new(options).map_err(wrong)?),
        Transport::Ssl => {
            let identity = options.cert.clone().zip(options.key.clone());
            let identity = identity.map(|(certfile, keyfile)| Identity { certfile, keyfile });
            let verify = options.ca.is_some();
            let config = tls::client(options.ca.as_deref(), identity.as_ref(), verify, &[])
                .map_err(|error| wrong(error.to_string()))?;
            let name = ServerName::try_from(options.server_name().to_owned())
                .map_err(|error| wrong(format!("--server-name: {error}")))?;
            Way::Ssl(TlsConnector::from(config), name)
        }
    };
    let found = tokio::net::lookup_host(&options.gateway).await;
    let mut found =
        found.map_err(|error| wrong(format!("--gateway {}: {error}", options.gateway)))?;
    let gateway = found
        .next()
        .ok_or_else(|| wrong(format!("--gateway {} has no address", options.gateway)))?;
    Ok(Dialer {
        gateway,
        way,
        sources: options.source.clone(),
        payload: options.payload,
        timeout,
    })
}

impl Dialer {
    /// Runs a device until its task is aborted or the gateway closes it.
    pub async fn run(self: Arc<Self>, device: Device) {
        let lanes = device.lanes.clone();
        let number = device.number;
        let from = self.source(number);
        let opened = match &self.way {
            Way::Tcp => match self.within(self.tcp(from)).await {
                Ok(stream) => {
                    let (reader, writer) = stream.into_split();
                    return stream::run(reader, writer, device, &self).await;
                }
                Err(error) => Err(error),
            },
            Way::Ssl(connector, name) => {
                let connecting = async {
                    let stream = self.tcp(from).await?;
                    connector.connect(name.clone(), stream).await
                };
                match self.within(connecting).await {
                    Ok(stream) => {
                        let (reader, writer) = tokio::io::split(stream);
                        return stream::run(reader, writer, device, &self).await;
                    }
                    Err(error) => Err(error),
                }
            }
            Way::Udp => self.within(self.udp(from)).await.map(datagram::Link::Plain),
            Way::Dtls(client) => {
                let connecting = async { client.connect(self.udp(from).await?).await };
                self.within(connecting).await.map(datagram::Link::Dtls)
            }
        };
        match opened {
            Ok(link) => datagram::run(link, device, &self).await,
            Err(error) => {
                lanes.stats.refused.add(1);
                let _ = device.ready.send(Err(error));
            }
        }
    }

    /// Every device has its address, in turn.
    fn source(&self, number: u32) -> Option<IpAddr> {
        let number = usize::try_from(number).ok()?;
        let turn = number.checked_rem(self.sources.len())?;
        self.sources.get(turn).copied()
    }

    async fn within<T>(&self, opening: impl Future<Output = io::Result<T>>) -> Result<T, Error> {
        match tokio::time::timeout(self.timeout, opening).await {
            Ok(result) => Ok(result?),
            Err(_) => Err(Error::Slow(self.timeout)),
        }
    }

    async fn tcp(&self, from: Option<IpAddr>) -> io::Result<TcpStream> {
        let socket = match self.gateway {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        if let Some(from) = from {
            socket.bind(SocketAddr::new(from, 0))?;
        }
        let stream = socket.connect(self.gateway).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn udp(&self, from: Option<IpAddr>) -> io::Result<UdpSocket> {
        let any = || match self.gateway {
            SocketAddr::V4(_) => IpAddr::from([0; 4]),
            SocketAddr::V6(_) => IpAddr::from([0; 16]),
        };
        let socket = UdpSocket::bind(SocketAddr::new(from.unwrap_or_else(any), 0)).await?;
        socket.connect(self.gateway).await?;
        Ok(socket)
    }
}

impl Device {
    /// The first frame.
    fn hello(&self, out: &mut BytesMut) {
        let head = Head {
            kind: Kind::Hello,
            run: self.lanes.run(),
            device: self.number,
            sequence: 0,
            time: self.lanes.now(),
        };
        frame::write(head, self.wishes.to_text().as_bytes(), out);
    }
}

/// Whether this frame is the handler's answer to a hello.
fn welcome(frame: &Frame, run: RunId, number: u32) -> Result<bool, Error> {
    let ours = frame.head.run == run && frame.head.device == number;
    match frame.head.kind {
        Kind::Welcome if ours => Ok(true),
        Kind::Failed if ours => Err(Error::Failed(
            String::from_utf8_lossy(frame.rest()).into_owned(),
        )),
        _ => Ok(false),
    }
}
