//! One peer's session: records in, messages out, and the other way round.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use openssl::error::ErrorStack;
use openssl::ssl::{Error as SslError, ErrorCode, Ssl, SslStream};

use super::context::Context;
use super::hello::ClientHello;
use super::wire::Wire;
use super::{MAX_MESSAGE, ffi};

/// A peer that has shown that it receives at its address.
///
/// Its owner hands in what comes from the peer and sends what waits after each call;
/// it keeps the clock, and gives a handshake that does not end an end.
pub struct Session {
    stream: SslStream<Wire>,
    state: State,
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
        let mut session = Box::new(Self {
            stream: SslStream::new(ssl, wire)?,
            state: State::Handshake,
            max_message: context.max_message,
            random: hello.random,
            failure: None,
        });
        if !ffi::listen(&mut session.stream) {
            forget_errors();
            return Ok(None);
        }
        session.handshake();
        Ok(Some(session))
    }

    /// A datagram came from the peer. Messages in it are to be read before the next.
    /// What is no good is dropped; only the peer itself can end an established session.
    pub fn receive(&mut self, datagram: &[u8]) {
        match self.state {
            State::Handshake => {
                self.stream.get_mut().push(datagram);
                self.handshake();
            }
            State::Established => self.stream.get_mut().push(datagram),
            State::Ended | State::Closed => {}
        }
    }

    /// Whether this datagram begins another handshake than this session's: the device
    /// has lost its state. To be offered to the gate, with this session left as it is
    /// until the gate accepts the device (RFC 6347, 4.2.8).
    pub fn is_restart(&self, datagram: &[u8]) -> bool {
        ClientHello::parse(datagram).is_some_and(|hello| hello.random != self.random)
    }

    /// The next datagram to send.
    pub fn next_datagram(&mut self) -> Option<Bytes> {
        let wire = self.stream.get_mut();
        let datagram = wire.pop();
        if datagram.is_none() {
            wire.shrink();
        }
        datagram
    }

    /// Reads one message: one record of the peer, never joined and never split. A
    /// message that is longer than `buffer` is cut off; with `MAX_MESSAGE` bytes none
    /// is. There are no empty messages: OpenSSL drops records without data.
    pub fn read(&mut self, buffer: &mut [u8]) -> Read {
        if buffer.len() >= MAX_MESSAGE {
            return self.read_whole(buffer);
        }
        // OpenSSL would give the rest as the next message.
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
        loop {
            match self.state {
                State::Handshake => return Read::Pending,
                State::Established => {}
                State::Ended | State::Closed => return Read::Closed,
            }
            forget_errors();
            match self.stream.ssl_read(buffer) {
                Ok(count) => return Read::Data(count),
                Err(error) => match error.code() {
                    // A record that was dropped, and more may follow it.
                    ErrorCode::WANT_READ if self.stream.get_ref().has_incoming() => {}
                    ErrorCode::WANT_READ => {
                        self.shrink();
                        return Read::Pending;
                    }
                    ErrorCode::ZERO_RETURN => self.state = State::Ended,
                    _ => self.fail(&error),
                },
            }
        }
    }

    /// Sends a message as one record. An empty one is not sent: OpenSSL has no records
    /// without data.
    pub fn write(&mut self, message: &[u8]) -> Result<(), WriteError> {
        match self.state {
            State::Handshake => return Err(WriteError::NotEstablished),
            // After the peer's close_notify as well: it reads nothing more.
            State::Ended | State::Closed => return Err(WriteError::Closed),
            State::Established => {}
        }
        if message.len() > self.max_message {
            let limit = self.max_message;
            return Err(WriteError::TooLarge { limit });
        }
        if !self.stream.get_ref().has_room() {
            return Err(WriteError::Full);
        }
        forget_errors();
        match self.stream.ssl_write(message) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.fail(&error);
                Err(WriteError::Closed)
            }
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

    /// Why the session failed, for the log.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// How long until [`elapsed`](Self::elapsed) is to be called. `None` when nothing
    /// waits for an answer.
    pub fn deadline(&self) -> Option<Duration> {
        match self.state {
            State::Handshake => ffi::timeout(&self.stream),
            _ => None,
        }
    }

    /// The time has come: what the peer has not answered is sent again, after 1, 2, 4
    /// and more seconds. Does nothing when called early.
    pub fn elapsed(&mut self) {
        if self.state != State::Handshake {
            return;
        }
        forget_errors();
        if !ffi::handle_timeout(&mut self.stream) {
            self.failure = Some("the device does not answer".into());
            self.state = State::Ended;
        }
        forget_errors();
    }

    /// Tells the peer that nothing more comes, with a close_notify that waits to be
    /// sent. Nothing is read or written afterwards.
    pub fn close(&mut self) {
        let was = std::mem::replace(&mut self.state, State::Closed);
        let established = was == State::Established || was == State::Ended;
        if established && self.failure.is_none() {
            forget_errors();
            let _ = self.stream.shutdown();
            forget_errors();
        }
    }

    /// Who the peer has shown to be, once the session is established.
    pub fn peer(&self) -> Option<PeerIdentity> {
        let ssl = self.stream.ssl();
        ssl.is_init_finished().then(|| PeerIdentity {
            certificate: ssl
                .peer_certificate()
                .and_then(|certificate| certificate.to_der().ok())
                .map(Bytes::from),
            psk_identity: ssl.psk_identity().map(Bytes::copy_from_slice),
        })
    }

    /// The name of the cipher suite, for the log.
    pub fn cipher(&self) -> Option<&'static str> {
        self.stream
            .ssl()
            .current_cipher()
            .map(|cipher| cipher.name())
    }

    fn handshake(&mut self) {
        forget_errors();
        match self.stream.do_handshake() {
            Ok(()) => {
                self.state = State::Established;
                let cipher = self.cipher().unwrap_or_default();
                self.stream.get_mut().set_established(cipher);
            }
            Err(error) if error.code() == ErrorCode::WANT_READ => {}
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &SslError) {
        let reason = error
            .ssl_error()
            .and_then(|errors| errors.errors().first()?.reason())
            .map_or_else(|| error.to_string(), str::to_owned);
        self.failure = Some(reason.into());
        self.state = State::Ended;
    }

    fn shrink(&mut self) {
        self.stream.get_mut().shrink();
        ffi::free_buffers(&mut self.stream);
        forget_errors();
    }
}

/// Empties the thread's list of errors: what is left of one session would be taken
/// for a failure of the next.
fn forget_errors() {
    drop(ErrorStack::get());
}
