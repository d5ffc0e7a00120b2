//! A DTLS session over a peer's end of UDP: the handshake, and the socket after it.
//!
//! A device that has lost its state begins anew from the same address. Whether it is
//! the device shows only when its new handshake is done: until then both sessions hear
//! what comes, and a recorded ClientHello ends nothing. Then the socket tells its end,
//! and the new session waits in the [`Succession`] for whoever serves the peer.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::Sleep;

use super::{Gate, Look, Read, Session, Shown, WriteError};
use crate::admission::turns::Turn;
use crate::reload::Current;
use crate::telemetry::Seldom;
use crate::transport::scratch::with_scratch;
use crate::transport::udp::UdpSocket;
use crate::transport::{Received, Socket};

/// Whether a device that is there may begin anew: the listener's rules.
pub trait Restarts: Send + Sync {
    /// A turn for its handshake; `None`, counted, when there is none for now.
    fn begin(&self, now: Instant) -> Option<Turn>;

    /// Counts a handshake that came to nothing, by its reason.
    fn failed(&self, error: &HandshakeError);
}

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// It has given way to somebody else's.
    #[error("silent while others waited for a turn")]
    Silent,
    /// The time is over.
    #[error("not done within {0:?}")]
    Late(Duration),
    /// Something else, for the log.
    #[error("{0}")]
    Failed(String),
}

impl HandshakeError {
    /// The `reason` under which it is counted.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Silent => "handshake_silent",
            Self::Late(_) | Self::Failed(_) => "handshake_failed",
        }
    }
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// What the handshakes of a listener on one shard share.
pub struct Handshakes {
    /// Knows which devices have shown their address.
    pub gate: Mutex<Gate>,
    /// Certificates and keys; replaced when their files change.
    pub context: Arc<Current<super::Context>>,
    /// For lines about what a device was not sent.
    pub complaints: Seldom,
    /// Asked when a device begins anew.
    pub restarts: Box<dyn Restarts>,
    /// The longest that one may take.
    pub limit: Duration,
}

impl std::fmt::Debug for Handshakes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handshakes").finish_non_exhaustive()
    }
}

impl Handshakes {
    /// The gate.
    pub fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the session of a peer that has shown its address, with the newest
    /// certificates and keys.
    pub fn accept(&self, gate: &mut Gate, shown: &Shown<'_>) -> Option<Box<Session>> {
        // Another handle to the same, where it is the same.
        gate.replace_context((*self.context.get()).clone());
        gate.accept(shown)
    }
}

/// Where a device that has begun anew goes on.
#[derive(Debug, Clone, Default)]
pub struct Succession(Arc<Mutex<Option<DtlsSocket>>>);

impl Succession {
    /// The socket of the new session, after the last one was dropped.
    pub fn take(&self) -> Option<DtlsSocket> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A device over DTLS. Dropping it forgets the peer, without a word to it.
#[derive(Debug)]
pub struct DtlsSocket {
    /// `None` only once it has been handed on.
    udp: Option<UdpSocket>,
    session: Box<Session>,
    handshakes: Arc<Handshakes>,
    next: Option<Box<Next>>,
    succession: Succession,
    /// A datagram that the socket did not take yet.
    unsent: Option<Bytes>,
    /// Whether the message in hand is in the session already.
    written: bool,
}

/// The handshake of a device that begins anew.
#[derive(Debug)]
struct Next {
    session: Box<Session>,
    deadline: Pin<Box<Sleep>>,
    turn: Turn,
}

impl DtlsSocket {
    /// A session whose gate has accepted the peer; the datagram it did so upon is the
    /// first that waits, and is known.
    pub fn new(udp: UdpSocket, session: Box<Session>, handshakes: Arc<Handshakes>) -> Self {
        Self::over(Some(udp), session, handshakes, Succession::default())
    }

    fn over(
        udp: Option<UdpSocket>,
        session: Box<Session>,
        handshakes: Arc<Handshakes>,
        succession: Succession,
    ) -> Self {
        Self {
            udp,
            session,
            handshakes,
            next: None,
            succession,
            unsent: None,
            written: false,
        }
    }

    /// Where the peer goes on when it begins anew.
    pub fn succession(&self) -> Succession {
        self.succession.clone()
    }

    /// Does the rest of the handshake, as long as it is its turn. Dropped half way the
    /// peer is forgotten.
    pub async fn handshake(&mut self, turn: &mut Turn) -> Result<(), HandshakeError> {
        let limit = self.handshakes.limit;
        let handshake = async {
            // The first datagram is known to the session.
            poll_fn(|cx| with_scratch(|scratch| self.udp()?.poll_receive(cx, scratch))).await?;
            let mut timer: Option<Pin<Box<Sleep>>> = None;
            poll_fn(|cx| match turn.poll_lost(cx) {
                Poll::Ready(()) => Poll::Ready(Err(HandshakeError::Silent)),
                Poll::Pending => self.poll_handshake(cx, turn, &mut timer),
            })
            .await
        };
        match tokio::time::timeout(limit, handshake).await {
            Ok(done) => done,
            Err(_) => Err(HandshakeError::Late(limit)),
        }
    }

    fn poll_handshake(
        &mut self,
        cx: &mut Context<'_>,
        turn: &Turn,
        timer: &mut Option<Pin<Box<Sleep>>>,
    ) -> Poll<Result<(), HandshakeError>> {
        loop {
            let sent = self.poll_transmit(cx)?;
            if self.session.is_established() {
                return Poll::Ready(Ok(()));
            }
            if self.session.is_closed() {
                let reason = self.session.failure().unwrap_or("the device gave up");
                return Poll::Ready(Err(HandshakeError::Failed(reason.to_owned())));
            }
            let received = with_scratch(|scratch| {
                let received = ready!(self.udp()?.poll_receive(cx, scratch));
                if let Received::Bytes(count) = received? {
                    let datagram = scratch.get(..count).unwrap_or_default();
                    turn.heard(count, Instant::now());
                    self.session.receive(datagram);
                }
                Poll::Ready(io::Result::Ok(()))
            });
            match received {
                Poll::Ready(Ok(())) => continue,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                Poll::Pending => {}
            }
            // What is not on its way yet needs no second time.
            ready!(sent);
            let Some(left) = self.session.deadline() else {
                return Poll::Pending;
            };
            let at = tokio::time::Instant::now() + left;
            let timer = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
            timer.as_mut().reset(at);
            ready!(timer.as_mut().poll(cx));
            self.session.elapsed();
        }
    }

    /// The device's address and the one it reached.
    pub fn addresses(&self) -> Option<(std::net::SocketAddr, std::net::SocketAddr)> {
        let udp = self.udp.as_ref()?;
        Some((udp.peer_addr(), udp.local_addr()))
    }

    /// The certificate that the device has shown, in DER.
    pub fn certificate(&self) -> Option<&Bytes> {
        self.session.peer()?.certificate.as_ref()
    }

    fn udp(&mut self) -> io::Result<&mut UdpSocket> {
        let handed_on = || io::Error::from(io::ErrorKind::NotConnected);
        self.udp.as_mut().ok_or_else(handed_on)
    }

    /// Sends all that the sessions have to send.
    fn poll_transmit(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let next = self.unsent.take();
            let next = next.or_else(|| self.session.next_datagram());
            let next = next.or_else(|| self.next.as_mut()?.session.next_datagram());
            let Some(datagram) = next else {
                return Poll::Ready(Ok(()));
            };
            match self.udp()?.poll_send(cx, &[IoSlice::new(&datagram)]) {
                Poll::Ready(result) => result.map(|_| ())?,
                Poll::Pending => {
                    self.unsent = Some(datagram);
                    return Poll::Pending;
                }
            }
        }
    }

    /// A datagram came: for the session, for the one that may follow it, or to begin
    /// that one.
    fn take(&mut self, datagram: &[u8]) {
        if let Some(next) = &mut self.next {
            if is_handshake(datagram) {
                next.turn.heard(datagram.len(), Instant::now());
            }
            next.session.receive(datagram);
        }
        self.session.receive(datagram);
        let is_new = |session: &Session| session.is_restart(datagram);
        let knows = self
            .next
            .as_ref()
            .is_some_and(|next| !is_new(&next.session));
        if knows || !is_new(&self.session) {
            return;
        }
        let Some(peer) = self.udp.as_ref().map(UdpSocket::peer_addr) else {
            return;
        };
        let mut gate = self.handshakes.gate();
        let shown = match gate.look(Instant::now(), peer, datagram) {
            Look::Shown(shown) => shown,
            Look::Answer(answer) => {
                // Lost where something else waits: the device asks again.
                self.unsent.get_or_insert(answer);
                return;
            }
            Look::Ignored => return,
        };
        let Some(turn) = self.handshakes.restarts.begin(Instant::now()) else {
            return;
        };
        let accepted = self.handshakes.accept(&mut gate, &shown);
        self.next = accepted.map(|session| {
            Box::new(Next {
                session,
                deadline: Box::pin(tokio::time::sleep(self.handshakes.limit)),
                turn,
            })
        });
    }

    /// Whether the device has begun anew, and shown that it is it.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(next) = &mut self.next else {
            return false;
        };
        if next.session.is_established() {
            return true;
        }
        let error = if next.session.is_closed() {
            let reason = next.session.failure().unwrap_or("the device gave up");
            HandshakeError::Failed(reason.to_owned())
        } else if next.turn.poll_lost(cx).is_ready() {
            HandshakeError::Silent
        } else if next.deadline.as_mut().poll(cx).is_ready() {
            HandshakeError::Late(self.handshakes.limit)
        } else {
            return false;
        };
        self.handshakes.restarts.failed(&error);
        self.next = None;
        false
    }
}

/// Whether a datagram begins with a record that is not a message of a session that is
/// there (RFC 6347, 4.3.1).
fn is_handshake(datagram: &[u8]) -> bool {
    const APPLICATION_DATA: u8 = 23;
    datagram
        .first()
        .is_some_and(|kind| *kind != APPLICATION_DATA)
}

impl Drop for DtlsSocket {
    fn drop(&mut self) {
        let next = self.next.take().filter(|n| n.session.is_established());
        let (Some(next), Some(udp)) = (next, self.udp.take()) else {
            return;
        };
        let (handshakes, succession) = (self.handshakes.clone(), self.succession.clone());
        let socket = Self::over(Some(udp), next.session, handshakes, succession.clone());
        let place = succession.0.lock();
        *place.unwrap_or_else(PoisonError::into_inner) = Some(socket);
    }
}

impl Socket for DtlsSocket {
    const STREAM: bool = false;

    /// Gives one message. What the session answers meanwhile is sent here too.
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<Received>> {
        loop {
            match self.session.read(buffer) {
                Read::Data(count) => return Poll::Ready(Ok(Received::Bytes(count))),
                Read::Closed => {
                    return Poll::Ready(match self.session.failure() {
                        None => Ok(Received::End),
                        Some(reason) => Err(io::Error::other(reason.to_owned())),
                    });
                }
                Read::Pending => {}
            }
            // Not waited for: what may come is worth more.
            let _ = self.poll_transmit(cx)?;
            if self.poll_next(cx) {
                return Poll::Ready(Ok(Received::End));
            }
            // The buffer serves both: what is in it is copied by the session.
            match ready!(self.udp()?.poll_receive(cx, buffer))? {
                Received::Bytes(count) => self.take(buffer.get(..count).unwrap_or_default()),
                Received::End => return Poll::Ready(Ok(Received::End)),
            }
        }
    }

    /// Sends the first chunk as one record. One that is too large for a record is
    /// dropped and logged.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Some(message) = chunks.first() else {
            return Poll::Ready(Ok(0));
        };
        while !self.written {
            match self.session.write(message) {
                Ok(()) => self.written = true,
                Err(WriteError::Full) => ready!(self.poll_transmit(cx))?,
                Err(error @ WriteError::TooLarge { .. }) => {
                    let (addresses, bytes) = (self.addresses(), message.len());
                    if let Some(left_out) = self.handshakes.complaints.tell(Instant::now()) {
                        tracing::warn!(?addresses, bytes, %error, left_out, "not sent to the device");
                    }
                    return Poll::Ready(Ok(message.len()));
                }
                Err(error) => return Poll::Ready(Err(io::Error::other(error.to_string()))),
            }
        }
        ready!(self.poll_transmit(cx))?;
        self.written = false;
        Poll::Ready(Ok(message.len()))
    }

    /// Sends a close_notify, unless the device has begun anew: it knows no more of the
    /// session that ends.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let next = self.next.as_ref();
        if !next.is_some_and(|next| next.session.is_established()) {
            self.session.close();
        }
        self.poll_transmit(cx)
    }

    fn unacknowledged(&self) -> usize {
        0
    }

    fn abort(&mut self) {}
}
