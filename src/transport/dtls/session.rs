//! One peer's session: records in, messages out, and the other way round.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use openssl::error::ErrorStack;
use openssl::ssl::{Error as SslError, ErrorCode, Ssl, SslRef, SslStream};

use super::context::Context;
use super::hello::ClientHello;
use super::record::{ALERT, APPLICATION_DATA, HANDSHAKE, Records};
use super::wire::{self, Wire};
use super::{MAX_MESSAGE, ffi};

// Alerts (RFC 5246, 7.2).
const WARNING: u8 = 1;
const FATAL: u8 = 2;
const CLOSE_NOTIFY: u8 = 0;

/// The message that ends a handshake (RFC 5246, 7.4).
const FINISHED: u8 = 20;

/// A peer that has shown that it receives at its address.
///
/// Its owner hands in what comes from the peer and sends what waits after each call;
/// it keeps the clock, and gives a handshake that does not end an end.
///
/// OpenSSL does the handshake and is gone when that is done (see `record.rs`).
pub struct Session {
    state: State,
    /// While OpenSSL is at work the datagrams are in its hands.
    handshake: Option<Box<SslStream<Wire>>>,
    wire: Wire,
    records: Option<Box<Records>>,
    /// Our last flight, until the device has shown that it has it: what the handshake
    /// would send again.
    last_flight: Vec<Bytes>,
    peer: Option<PeerIdentity>,
    cipher: Option<&'static str>,
    max_message: usize,
    /// Of the ClientHello it began with.
    random: [u8; 32],
    failure: Option<Box<str>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Handshake,
    Established,
    /// The peer sends nothing more, or nothing can be sent or read.
    Ended,
    Closed,
}

/// What reading gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// One message, so many bytes at the start of the buffer.
    Data(usize),
    /// Nothing more until the next datagram.
    Pending,
    /// The peer has closed, or the session failed: [`Session::failure`].
    Closed,
}

/// Why a message was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The handshake is not done.
    #[error("the handshake is not done")]
    NotEstablished,
    /// One message is one record, and that has a bound.
    #[error("a message of more than {limit} bytes")]
    TooLarge {
        /// In bytes.
        limit: usize,
    },
    /// Too many datagrams wait to be sent.
    #[error("too many datagrams wait to be sent")]
    Full,
    /// The session has ended.
    #[error("the session has ended")]
    Closed,
}

/// Who the peer has shown to be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerIdentity {
    /// Its certificate in DER, verified.
    pub certificate: Option<Bytes>,
    /// The identity whose pre-shared key it has.
    pub psk_identity: Option<Bytes>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("state", &self.state)
            .field("failure", &self.failure)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Takes the datagram with the ClientHello whose cookie was found good. `None`
    /// when OpenSSL does not take it.
    pub(super) fn accept(
        context: &Context,
        hello: &ClientHello<'_>,
        datagram: &[u8],
    ) -> Result<Option<Box<Self>>, ErrorStack> {
        let mut ssl = Ssl::new(&context.ssl)?;
        ssl.set_accept_state();
        ssl.set_mtu(context.mtu.into())?;
        let mut wire = Wire::default();
        wire.push(datagram);
        let mut stream = Box::new(SslStream::new(ssl, wire)?);
        if !ffi::listen(&mut stream) {
            forget_errors();
            return Ok(None);
        }
        let mut session = Box::new(Self {
            state: State::Handshake,
            handshake: Some(stream),
            wire: Wire::default(),
            records: None,
            last_flight: Vec::new(),
            peer: None,
            cipher: None,
            max_message: context.max_message,
            random: hello.random,
            failure: None,
        });
        session.advance();
        Ok(Some(session))
    }

    /// A datagram came from the peer. Messages in it are to be read before the next.
    /// What is no good is dropped; only the peer itself can end an established session.
    pub fn receive(&mut self, datagram: &[u8]) {
        match self.state {
            State::Handshake => {
                self.wire().push(datagram);
                self.advance();
            }
            State::Established => self.wire.push(datagram),
            State::Ended | State::Closed => {}
        }
    }

    /// Whether this datagram begins another handshake than this session's: the device
    /// has lost its state. To be offered to the gate. When the gate accepts, both
    /// sessions are to be kept, and every datagram handed to both, until the new one is
    /// established: a ClientHello that somebody recorded opens the gate as long as its
    /// cookie is good, and must not end this session (RFC 6347, 4.2.8). Either drops
    /// what is the other's.
    pub fn is_restart(&self, datagram: &[u8]) -> bool {
        ClientHello::parse(datagram).is_some_and(|hello| hello.random != self.random)
    }

    /// The next datagram to send.
    pub fn next_datagram(&mut self) -> Option<Bytes> {
        let wire = self.wire();
        let datagram = wire.pop();
        if datagram.is_none() {
            wire.shrink();
        }
        datagram
    }

    /// Reads one message: one record of the peer, never joined and never split, also
    /// an empty one. A message that is longer than `buffer` is cut off; with
    /// `MAX_MESSAGE` bytes none is.
    pub fn read(&mut self, buffer: &mut [u8]) -> Read {
        if buffer.len() >= MAX_MESSAGE {
            return self.read_whole(buffer);
        }
        let mut whole = [0; MAX_MESSAGE];
        match self.read_whole(&mut whole) {
            Read::Data(count) => {
                let count = count.min(buffer.len());
                let (start, _) = buffer.split_at_mut(count);
                start.copy_from_slice(whole.split_at(count).0);
                Read::Data(count)
            }
            other => other,
        }
    }

    fn read_whole(&mut self, buffer: &mut [u8]) -> Read {
        let records = match (self.state, &mut self.records) {
            (State::Handshake, _) => return Read::Pending,
            (State::Established, Some(records)) => records,
            _ => return Read::Closed,
        };
        while let Some(record) = self.wire.next_record() {
            let Some((kind, length)) = records.open(record, buffer) else {
                forget_errors();
                continue;
            };
            match (kind, buffer.get(..length).unwrap_or_default()) {
                (APPLICATION_DATA, _) => {
                    self.last_flight = Vec::new();
                    return Read::Data(length);
                }
                (HANDSHAKE, [FINISHED, ..]) => {
                    for datagram in &self.last_flight {
                        self.wire.send(datagram.clone());
                    }
                }
                (ALERT, [_, CLOSE_NOTIFY]) => {
                    self.state = State::Ended;
                    return Read::Closed;
                }
                (ALERT, [FATAL, description]) => {
                    self.failure = Some(format!("the device's alert {description}").into());
                    self.state = State::Ended;
                    return Read::Closed;
                }
                // Other warnings, and a handshake: there is no second one.
                _ => {}
            }
        }
        self.wire.shrink();
        Read::Pending
    }

    /// Sends a message as one record, also an empty one.
    pub fn write(&mut self, message: &[u8]) -> Result<(), WriteError> {
        let records = match (self.state, &mut self.records) {
            (State::Handshake, _) => return Err(WriteError::NotEstablished),
            (State::Established, Some(records)) => records,
            // After the peer's close_notify as well: it reads nothing more.
            _ => return Err(WriteError::Closed),
        };
        if message.len() > self.max_message {
            let limit = self.max_message;
            return Err(WriteError::TooLarge { limit });
        }
        if !self.wire.has_room() {
            return Err(WriteError::Full);
        }
        match records.seal(APPLICATION_DATA, message) {
            Ok(record) => {
                self.wire.send(record.into());
                Ok(())
            }
            // All numbers are used up, or there is no memory.
            Err(_) => Err(WriteError::Closed),
        }
    }

    /// Whether the handshake is done and the session has not ended.
    pub fn is_established(&self) -> bool {
        self.state == State::Established
    }

    /// Whether the session has ended: by the peer, by [`close`](Self::close), or by a
    /// failure. What waits is still to be sent.
    pub fn is_closed(&self) -> bool {
        matches!(self.state, State::Ended | State::Closed)
    }

    /// How far the handshake is: another number after each message of it that came whole
    /// and was right, and no number twice.
    pub fn stage(&self) -> i32 {
        match (self.state, self.handshake.as_deref()) {
            (State::Handshake, Some(stream)) => ffi::stage(stream),
            _ => -1,
        }
    }

    /// Why the session failed, for the log.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// How long until [`elapsed`](Self::elapsed) is to be called. `None` when nothing
    /// waits for an answer.
    pub fn deadline(&self) -> Option<Duration> {
        ffi::timeout(self.handshake.as_deref()?)
    }

    /// The time has come: what the peer has not answered is sent again, after 1, 2, 4
    /// and more seconds. Does nothing when called early.
    pub fn elapsed(&mut self) {
        let Some(stream) = &mut self.handshake else {
            return;
        };
        forget_errors();
        let on = ffi::handle_timeout(stream);
        forget_errors();
        if !on {
            self.end("the device does not answer".into());
        }
    }

    /// Tells the peer that nothing more comes, with a close_notify that waits to be
    /// sent. Nothing is read or written afterwards.
    pub fn close(&mut self) {
        if self.state == State::Closed {
            return;
        }
        if self.failure.is_none()
            && let Some(records) = &mut self.records
            && let Ok(record) = records.seal(ALERT, &[WARNING, CLOSE_NOTIFY])
        {
            self.wire.send(record.into());
        }
        self.stop();
        self.state = State::Closed;
    }

    /// Who the peer has shown to be, once the session is established.
    pub fn peer(&self) -> Option<&PeerIdentity> {
        self.peer.as_ref()
    }

    /// The name of the cipher suite, once the session is established.
    pub fn cipher(&self) -> Option<&'static str> {
        self.cipher
    }

    fn wire(&mut self) -> &mut Wire {
        match &mut self.handshake {
            Some(stream) => stream.get_mut(),
            None => &mut self.wire,
        }
    }

    /// Goes on with the handshake.
    fn advance(&mut self) {
        let Some(stream) = &mut self.handshake else {
            return;
        };
        forget_errors();
        let waiting = stream.get_ref().outgoing().len();
        match stream.do_handshake() {
            Ok(()) => self.take_over(waiting),
            Err(error) if error.code() == ErrorCode::WANT_READ => {}
            Err(error) => self.end(reason(&error)),
        }
    }

    /// The handshake is done; the flight that did it starts at `waiting`.
    fn take_over(&mut self, waiting: usize) {
        let Some(stream) = &mut self.handshake else {
            return;
        };
        let flight = stream.get_ref().outgoing().iter().skip(waiting);
        let flight: Vec<Bytes> = flight.cloned().collect();
        let ssl = stream.ssl();
        // A number is never used twice: not without our Finished to count from.
        let Some(next_number) = wire::next_number(&flight) else {
            return self.end("too much waits to be sent".into());
        };
        let Ok(Some(records)) = Records::take_over(ssl, next_number) else {
            forget_errors();
            return self.end("the cipher cannot be used".into());
        };
        self.records = Some(Box::new(records));
        self.last_flight = flight;
        self.peer = Some(identity(ssl));
        self.cipher = ssl.current_cipher().map(|cipher| cipher.name());
        self.max_message = self.max_message.min(ffi::max_fragment(stream));
        self.stop();
        self.state = State::Established;
    }

    fn end(&mut self, failure: Box<str>) {
        self.failure = Some(failure);
        self.stop();
        self.state = State::Ended;
    }

    /// Lets go of OpenSSL and keeps what waits.
    fn stop(&mut self) {
        if let Some(mut stream) = self.handshake.take() {
            self.wire = std::mem::take(stream.get_mut());
        }
    }
}

fn identity(ssl: &SslRef) -> PeerIdentity {
    PeerIdentity {
        certificate: ssl
            .peer_certificate()
            .and_then(|certificate| certificate.to_der().ok())
            .map(Bytes::from),
        psk_identity: ssl.psk_identity().map(Bytes::copy_from_slice),
    }
}

fn reason(error: &SslError) -> Box<str> {
    error
        .ssl_error()
        .and_then(|errors| errors.errors().first()?.reason())
        .map_or_else(|| error.to_string().into(), Into::into)
}

/// Empties the thread's list of errors: what is left of one session would be taken
/// for a failure of the next.
fn forget_errors() {
    drop(ErrorStack::get());
}
