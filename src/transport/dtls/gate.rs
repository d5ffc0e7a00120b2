//! What answers peers that are not known, and remembers nothing about them.

use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;
use openssl::error::ErrorStack;

use super::Error;
use super::context::Context;
use super::cookie::Secrets;
use super::hello::ClientHello;
use super::session::Session;

/// What became of a datagram from a peer that is not known.
#[derive(Debug)]
pub enum Offer {
    /// To be sent back: a request to show that the address is the peer's own. Never
    /// longer than the datagram.
    Answer(Bytes),
    /// The peer has shown it. What its handshake has to send waits in the session.
    Accepted(Box<Session>),
    /// No business of anybody.
    Ignored,
}

/// Answers peers that are not known. One for each shard; its cookies are its own.
#[derive(Debug)]
pub struct Gate {
    context: Context,
    secrets: Secrets,
}

impl Gate {
    /// A gate with secrets of its own.
    pub fn new(context: Context, now: Instant) -> Result<Self, Error> {
        let secrets = Secrets::new(now)?;
        Ok(Self { context, secrets })
    }

    /// New sessions are of this context from now on. Cookies stay good.
    pub fn replace_context(&mut self, context: Context) {
        self.context = context;
    }

    /// A datagram from a peer without session, or one that starts again:
    /// [`Session::is_restart`]. Costs some microseconds until the peer has shown its
    /// address, and about a millisecond for the one that brings the cookie: its
    /// signature is made here.
    pub fn offer(&mut self, now: Instant, peer: SocketAddr, datagram: &[u8]) -> Offer {
        let Some(hello) = ClientHello::parse(datagram) else {
            return Offer::Ignored;
        };
        // Fails only where OpenSSL has no memory: as good as a datagram lost.
        self.answer(now, peer, &hello, datagram)
            .unwrap_or(Offer::Ignored)
    }

    fn answer(
        &mut self,
        now: Instant,
        peer: SocketAddr,
        hello: &ClientHello<'_>,
        datagram: &[u8],
    ) -> Result<Offer, ErrorStack> {
        // OpenSSL goes on with message 1. A device that brings a cookie in message 0,
        // or one that has become too old, is asked again.
        if hello.message_number == 1 && self.secrets.verify(now, peer, hello)? {
            let session = Session::accept(&self.context, hello, datagram)?;
            return Ok(session.map_or(Offer::Ignored, Offer::Accepted));
        }
        let cookie = self.secrets.cookie(now, peer, hello)?;
        Ok(Offer::Answer(hello.verify_request(&cookie)))
    }
}
