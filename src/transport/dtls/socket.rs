//! A DTLS session over a peer's end of UDP: the handshake, and the socket after it.
//!
//! A device that has lost its state begins anew from the same address. Whether it is
//! the device shows only when its new handshake is done: until then both sessions hear
//! what comes, and a recorded ClientHello ends nothing. Then the socket tells its end,
//! and the new session waits in the [`Succession`] for whoever serves the peer.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::Sleep;
use tokio_util::task::AbortOnDropHandle;

use super::hello::ClientHello;
use super::{Gate, Look, Read, Session, WriteError};
use crate::admission::turns::Turn;
use crate::pace::{Pace, Stage};
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
    #[error("did not get on while others waited for a turn")]
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
    /// A handshake's signature is a heavy step on this thread.
    pub pace: Arc<Pace>,
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

    /// Does the handshake of a peer that has shown its address to the gate, as long as it
    /// is its turn; the datagram it did so with is the first that waits. Its time counts
    /// from `since`. Dropped half way the peer is forgotten.
    ///
    /// The socket hands on to `succession` when the device begins anew.
    pub async fn shake(
        self: Arc<Self>,
        mut udp: UdpSocket,
        turn: &Turn,
        since: Instant,
        succession: Succession,
    ) -> Result<DtlsSocket, HandshakeError> {
        let limit = self.limit;
        let handshake = async {
            let hello = poll_fn(|cx| with_scratch(|scratch| poll_datagram(&mut udp, cx, scratch)));
            let hello = hello.await?;
            let step = self.pace.step(Stage::Beginning).await;
            turn.moved(Instant::now());
            let session = self.accept(&hello)?;
            drop((step, hello));
            let mut socket = DtlsSocket::over(Some(udp), session, self.clone(), succession);
            let mut timer = None;
            poll_fn(|cx| socket.poll_handshake(cx, turn, &mut timer)).await?;
            Ok(socket)
        };
        let mut handshake = pin!(handshake);
        let handshake = poll_fn(|cx| match turn.poll_lost(cx) {
            Poll::Ready(()) => Poll::Ready(Err(HandshakeError::Silent)),
            Poll::Pending => handshake.as_mut().poll(cx),
        });
        // One that is late already costs no signature: no step comes at the first poll.
        match tokio::time::timeout_at((since + limit).into(), handshake).await {
            Ok(done) => done,
            Err(_) => Err(HandshakeError::Late(limit)),
        }
    }

    /// Begins the session of a peer that has shown its address with this datagram, with
    /// the newest certificates and keys. A heavy step: it makes the signature.
    fn accept(&self, datagram: &[u8]) -> Result<Box<Session>, HandshakeError> {
        let hello = ClientHello::parse(datagram);
        let session = hello.map(|hello| Session::accept(&self.context.get(), &hello, datagram));
        let taken = session.and_then(|session| session.ok().flatten());
        taken.ok_or_else(|| HandshakeError::Failed("the ClientHello is not acceptable".to_owned()))
    }
}

/// The next datagram of a peer.
fn poll_datagram(
    udp: &mut UdpSocket,
    cx: &mut Context<'_>,
    scratch: &mut [u8],
) -> Poll<io::Result<Bytes>> {
    let count = match ready!(udp.poll_receive(cx, scratch))? {
        Received::Bytes(count) => count,
        Received::End => 0,
    };
    let datagram = scratch.get(..count).unwrap_or_default();
    Poll::Ready(Ok(Bytes::copy_from_slice(datagram)))
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
struct Next {
    /// Of its ClientHello.
    random: [u8; 32],
    stage: NextStage,
    deadline: Pin<Box<Sleep>>,
    turn: Turn,
}

enum NextStage {
    /// It waits for its step on this thread, in a task of its own: a connection looks at
    /// its socket only while its handler has time.
    Waiting(AbortOnDropHandle<Result<Box<Session>, HandshakeError>>),
    Begun(Box<Session>),
}

impl std::fmt::Debug for Next {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Next").finish_non_exhaustive()
    }
}

impl Next {
    fn session(&mut self) -> Option<&mut Session> {
        match &mut self.stage {
            NextStage::Waiting(_) => None,
            NextStage::Begun(session) => Some(session),
        }
    }

    fn is_established(&self) -> bool {
        matches!(&self.stage, NextStage::Begun(session) if session.is_established())
    }

    /// Its session, once that is done.
    fn established(self) -> Option<Box<Session>> {
        match self.stage {
            NextStage::Begun(session) if session.is_established() => Some(session),
            _ => None,
        }
    }

    fn receive(&mut self, datagram: &[u8]) {
        let NextStage::Begun(session) = &mut self.stage else {
            // The device sends again what comes before it has an answer.
            return;
        };
        let before = session.stage();
        session.receive(datagram);
        if session.stage() != before {
            self.turn.moved(Instant::now());
        }
    }
}

impl DtlsSocket {
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
                    let before = self.session.stage();
                    self.session.receive(datagram);
                    // Only a whole message that was right counts.
                    if self.session.stage() != before {
                        turn.moved(Instant::now());
                    }
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
            let next = next.or_else(|| self.next.as_mut()?.session()?.next_datagram());
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
            next.receive(datagram);
        }
        self.session.receive(datagram);
        if !self.session.is_restart(datagram) {
            return;
        }
        let Some(random) = ClientHello::parse(datagram).map(|hello| hello.random) else {
            return;
        };
        if self.next.as_ref().is_some_and(|next| next.random == random) {
            return;
        }
        let Some(peer) = self.udp.as_ref().map(UdpSocket::peer_addr) else {
            return;
        };
        let now = Instant::now();
        match self.handshakes.gate().look(now, peer, datagram) {
            Look::Shown(_) => {}
            Look::Answer(answer) => {
                // Lost where something else waits: the device asks again.
                self.unsent.get_or_insert(answer);
                return;
            }
            Look::Ignored => return,
        }
        let Some(turn) = self.handshakes.restarts.begin(now) else {
            return;
        };
        let handshakes = self.handshakes.clone();
        let hello = Bytes::copy_from_slice(datagram);
        let begin = async move {
            let _step = handshakes.pace.step(Stage::Beginning).await;
            handshakes.accept(&hello)
        };
        self.next = Some(Box::new(Next {
            random,
            stage: NextStage::Waiting(AbortOnDropHandle::new(tokio::spawn(begin))),
            deadline: Box::pin(tokio::time::sleep(self.handshakes.limit)),
            turn,
        }));
    }

    /// Begins the session of a device that begins anew, when it is its turn here.
    fn poll_begin(&mut self, cx: &mut Context<'_>) {
        let Some(next) = &mut self.next else {
            return;
        };
        let NextStage::Waiting(session) = &mut next.stage else {
            return;
        };
        let Poll::Ready(accepted) = Pin::new(session).poll(cx) else {
            return;
        };
        let panicked = |error: tokio::task::JoinError| HandshakeError::Failed(error.to_string());
        match accepted.map_err(panicked).flatten() {
            Ok(session) => {
                next.turn.moved(Instant::now());
                next.stage = NextStage::Begun(session);
            }
            Err(error) => {
                self.handshakes.restarts.failed(&error);
                self.next = None;
            }
        }
    }

    /// Whether the device has begun anew, and shown that it is it.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(next) = &mut self.next else {
            return false;
        };
        if next.is_established() {
            return true;
        }
        let closed = next.session().filter(|session| session.is_closed());
        let error = if let Some(session) = closed {
            let reason = session.failure().unwrap_or("the device gave up");
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

impl Drop for DtlsSocket {
    fn drop(&mut self) {
        let next = self.next.take().and_then(|next| next.established());
        let (Some(session), Some(udp)) = (next, self.udp.take()) else {
            return;
        };
        let (handshakes, succession) = (self.handshakes.clone(), self.succession.clone());
        let socket = Self::over(Some(udp), session, handshakes, succession.clone());
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
            self.poll_begin(cx);
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
        if !next.is_some_and(|next| next.is_established()) {
            self.session.close();
        }
        self.poll_transmit(cx)
    }

    fn unacknowledged(&self) -> usize {
        0
    }

    fn abort(&mut self) {}
}
