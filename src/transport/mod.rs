//! What carries a device's bytes, behind one trait.
//!
//! A transport accepts peers and yields a [`Socket`] for each; it knows nothing of
//! connections, and owns no task but UDP's receiving one. The task of a connection drives its socket by
//! polling, so that nothing is held for an idle device but the socket itself.

pub mod dtls;
pub(crate) mod hot;
pub mod proxy_protocol;
pub mod scratch;
pub mod tcp;
pub mod tls;
pub mod udp;

use std::io;
use std::net::SocketAddr;
use std::task::{Context, Poll};

pub use crate::config::Kind;
use crate::proto;
use crate::tls::Subject;

/// Who connected, and where.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// The kind of transport.
    pub kind: Kind,
    /// The device's address.
    pub peer: SocketAddr,
    /// The address it reached.
    pub local: SocketAddr,
    /// Whose certificate it showed, if it did and the listener asked for one.
    pub certificate: Option<Subject>,
}

impl PeerInfo {
    /// As the handler is told.
    pub fn to_proto(&self) -> proto::ConnInfo {
        let address = |address: SocketAddr| proto::Address {
            // A dual-stack socket sees IPv4 peers as ::ffff:a.b.c.d.
            host: address.ip().to_canonical().to_string(),
            port: address.port().into(),
        };
        proto::ConnInfo {
            socktype: match self.kind {
                Kind::Tcp => proto::SocketType::Tcp.into(),
                Kind::Ssl => proto::SocketType::Ssl.into(),
                Kind::Udp => proto::SocketType::Udp.into(),
                Kind::Dtls => proto::SocketType::Dtls.into(),
            },
            peername: Some(address(self.peer)),
            sockname: Some(address(self.local)),
            peercert: self
                .certificate
                .as_ref()
                .map(|subject| proto::CertificateInfo {
                    cn: subject.cn.clone(),
                    dn: subject.dn.clone(),
                }),
        }
    }
}

/// What receiving gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// So many bytes were put at the start of the buffer. A stream gives at least
    /// one, a datagram may be empty.
    Bytes(usize),
    /// The peer sends nothing more.
    End,
}

/// One device's end of a transport.
///
/// All methods poll: they return `Pending` and wake the task, and never block.
pub trait Socket: Send + Unpin + 'static {
    /// Whether bytes are a stream, which may be joined and split, or datagrams.
    const STREAM: bool;

    /// Receives into `buffer` what has come. An error ends the socket.
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<Received>>;

    /// Sends from the start of `chunks` and says how many bytes were taken.
    ///
    /// With datagrams the first chunk is one, also an empty one, and is taken whole or
    /// not at all; the others are left alone.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>>;

    /// Tells the peer that nothing more will be sent, once all that was sent is on
    /// its way.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Bytes that were sent and that the peer has not acknowledged.
    fn unacknowledged(&self) -> usize;

    /// Makes the coming drop throw away what the peer has not taken yet.
    fn abort(&mut self);
}
