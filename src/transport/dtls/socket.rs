//! A DTLS session over a peer's end of UDP: the handshake, and the socket after it.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use tokio::time::Sleep;

use super::{Gate, Look, Read, Session, WriteError};
use crate::transport::scratch::with_scratch;
use crate::transport::udp::UdpSocket;
use crate::transport::{Received, Socket};

/// A device over DTLS. Dropping it forgets the peer, without a word to it.
pub struct DtlsSocket {
    udp: UdpSocket,
    session: Box<Session>,
    /// For a device that begins anew from the same address.
    gate: Arc<Mutex<Gate>>,
    /// A datagram that the socket did not take yet.
    unsent: Option<Bytes>,
    /// Whether the message in hand is in the session already.
    written: bool,
}

impl DtlsSocket {
    /// A session whose gate has accepted the peer; the datagram it did so upon is the
    /// first that waits, and is known.
    pub fn new(udp: UdpSocket, session: Box<Session>, gate: Arc<Mutex<Gate>>) -> Self {
        Self {
            udp,
            session,
            gate,
            unsent: None,
            written: false,
        }
    }

    /// Does the rest of the handshake. The caller limits the time; dropped half way
    /// the peer is forgotten.
    ///
    /// # Errors
    /// The reason, for the log.
    pub async fn handshake(&mut self) -> Result<(), String> {
        // Known to the session.
        poll_fn(|cx| with_scratch(|scratch| self.udp.poll_receive(cx, scratch)))
            .await
            .map_err(|error| error.to_string())?;
        let mut timer: Option<Pin<Box<Sleep>>> = None;
        poll_fn(|cx| self.poll_handshake(cx, &mut timer)).await
    }

    fn poll_handshake(
        &mut self,
        cx: &mut Context<'_>,
        timer: &mut Option<Pin<Box<Sleep>>>,
    ) -> Poll<Result<(), String>> {
        loop {
            let sent = self.poll_transmit(cx).map_err(|error| error.to_string())?;
            if self.session.is_established() {
                return Poll::Ready(Ok(()));
            }
            if self.session.is_closed() {
                let reason = self.session.failure().unwrap_or("the device gave up");
                return Poll::Ready(Err(reason.to_owned()));
            }
            let received = with_scratch(|scratch| match self.udp.poll_receive(cx, scratch) {
                Poll::Ready(Ok(Received::Bytes(count))) => {
                    self.session
                        .receive(scratch.get(..count).unwrap_or_default());
                    Poll::Ready(Ok(()))
                }
                Poll::Ready(Ok(Received::End)) => Poll::Ready(Ok(())),
                Poll::Ready(Err(error)) => Poll::Ready(Err(error.to_string())),
                Poll::Pending => Poll::Pending,
            });
            if received?.is_ready() {
                continue;
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

    /// The certificate that the device has shown, in DER.
    pub fn certificate(&self) -> Option<Bytes> {
        self.session.peer()?.certificate.clone()
    }

    /// Sends all that the session has to send.
    fn poll_transmit(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let next = self.unsent.take();
            let Some(datagram) = next.or_else(|| self.session.next_datagram()) else {
                return Poll::Ready(Ok(()));
            };
            match self.udp.poll_send(cx, &[IoSlice::new(&datagram)]) {
                Poll::Ready(result) => result.map(|_| ())?,
                Poll::Pending => {
                    self.unsent = Some(datagram);
                    return Poll::Pending;
                }
            }
        }
    }

    /// A datagram came. True when the device has begun anew, and shown that it is it:
    /// this session is over, and the device's next attempt makes another.
    fn take(&mut self, datagram: &[u8]) -> bool {
        if !self.session.is_restart(datagram) {
            self.session.receive(datagram);
            return false;
        }
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        match gate.look(Instant::now(), self.udp.peer_addr(), datagram) {
            Look::Shown(_) => true,
            Look::Answer(answer) => {
                // Lost where the socket is full: the device asks again.
                self.unsent.get_or_insert(answer);
                false
            }
            Look::Ignored => false,
        }
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
            // Not waited for: more may come that is worth more.
            let _ = self.poll_transmit(cx)?;
            // The buffer serves both: what is in it is copied by the session.
            let count = match ready!(self.udp.poll_receive(cx, buffer))? {
                Received::Bytes(count) => count,
                Received::End => return Poll::Ready(Ok(Received::End)),
            };
            if self.take(buffer.get(..count).unwrap_or_default()) {
                return Poll::Ready(Ok(Received::End));
            }
        }
    }

    /// Sends the first chunk as one record. One that is too large for a record, and an
    /// empty one, which DTLS cannot tell from none, are dropped and logged.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Some(message) = chunks.first() else {
            return Poll::Ready(Ok(0));
        };
        loop {
            if !self.written {
                match self.session.write(message) {
                    Ok(()) => self.written = true,
                    Err(WriteError::Full) => {
                        ready!(self.poll_transmit(cx))?;
                        continue;
                    }
                    Err(error @ WriteError::TooLarge { .. }) => {
                        tracing::warn!(bytes = message.len(), %error, "not sent to the device");
                        return Poll::Ready(Ok(message.len()));
                    }
                    Err(error) => return Poll::Ready(Err(io::Error::other(error.to_string()))),
                }
            }
            ready!(self.poll_transmit(cx))?;
            self.written = false;
            return Poll::Ready(Ok(message.len()));
        }
    }

    /// Sends a close_notify.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.session.close();
        self.poll_transmit(cx)
    }

    fn unacknowledged(&self) -> usize {
        0
    }

    fn abort(&mut self) {}
}
