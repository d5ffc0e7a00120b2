//! A peer's end.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::shared::Shared;
use super::table::{Flow, Peer};
use crate::transport::{Received, Socket};

/// What connects one peer: its queue, and the shard's socket to send through.
///
/// Dropping it forgets the peer at once. The next datagram from there is a stranger's.
pub struct UdpSocket {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    /// Whether its task waits until it can send.
    blocked: bool,
}

impl UdpSocket {
    pub(super) fn new(shared: Arc<Shared>, peer: Arc<Peer>) -> Self {
        Self {
            shared,
            peer,
            blocked: false,
        }
    }

    /// The device's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer.flow.peer
    }

    /// The address it reached, even where the listener is bound to all of them.
    pub fn local_addr(&self) -> SocketAddr {
        let mut address = self.shared.bound;
        if let Some(local) = self.peer.flow.local {
            address.set_ip(local);
        }
        address
    }

    /// Datagrams that wait.
    pub fn waiting(&self) -> usize {
        self.peer.lock().queue.datagrams()
    }
}

impl std::fmt::Debug for UdpSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UdpSocket")
            .field("peer", &self.peer_addr())
            .finish_non_exhaustive()
    }
}

impl Drop for UdpSocket {
    fn drop(&mut self) {
        if self.blocked {
            self.shared.unblock(&self.peer);
        }
        self.shared.leave(&self.peer);
    }
}

impl Socket for UdpSocket {
    const STREAM: bool = false;

    /// Gives one datagram, cut off where the buffer ends.
    ///
    /// # Errors
    /// `NotConnected` after the listener's end.
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<Received>> {
        self.shared.poll_pop(&self.peer, cx, buffer).map(|popped| {
            let count = popped.ok_or_else(ended)?;
            Ok(Received::Bytes(count))
        })
    }

    /// Sends the first chunk as one datagram, whole, also an empty one. One that cannot
    /// be sent is counted and dropped.
    ///
    /// # Errors
    /// `NotConnected` after the listener's end.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Some(datagram) = chunks.first() else {
            return Poll::Ready(Ok(0));
        };
        let Flow { peer, local } = self.peer.flow;
        if self.shared.send(peer, local, datagram).is_ok() {
            if std::mem::take(&mut self.blocked) {
                self.shared.unblock(&self.peer);
            }
            return Poll::Ready(Ok(datagram.len()));
        }
        self.blocked = true;
        self.shared.block(&self.peer, cx);
        // Looked at after the waker is there: nobody looks for wakers any more.
        if self.shared.is_closed() {
            return Poll::Ready(Err(ended()));
        }
        Poll::Pending
    }

    /// UDP has no end to tell.
    fn poll_finish(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Nothing is acknowledged with UDP.
    fn unacknowledged(&self) -> usize {
        0
    }

    /// What was sent is out of reach.
    fn abort(&mut self) {}
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the listener has ended")
}
