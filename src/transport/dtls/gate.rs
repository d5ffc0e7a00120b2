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

/// What a datagram from a peer that is not known is.
#[derive(Debug)]
pub enum Look<'a> {
    /// To be sent back; see [`Offer::Answer`].
    Answer(Bytes),
    /// The peer has shown its address, and may be let in.
    Shown(Shown<'a>),
    /// No business of anybody.
    Ignored,
}

/// A ClientHello whose cookie is good, and the datagram that it is in.
#[derive(Debug)]
pub struct Shown<'a> {
    hello: ClientHello<'a>,
    datagram: &'a [u8],
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
    /// [`Session::is_restart`]. Costs some microseconds.
    pub fn look<'a>(&mut self, now: Instant, peer: SocketAddr, datagram: &'a [u8]) -> Look<'a> {
        let Some(hello) = ClientHello::parse(datagram) else {
            return Look::Ignored;
        };
        // Fails only where OpenSSL has no memory: as good as a datagram lost.
        match self.answer(now, peer, &hello) {
            Ok(None) => Look::Shown(Shown { hello, datagram }),
            Ok(Some(answer)) => Look::Answer(answer),
            Err(_) => Look::Ignored,
        }
    }

    /// What the device is to be asked; `None` when its cookie is good.
    fn answer(
        &mut self,
        now: Instant,
        peer: SocketAddr,
        hello: &ClientHello<'_>,
    ) -> Result<Option<Bytes>, ErrorStack> {
        // OpenSSL goes on with message 1. A device that brings a cookie in message 0,
        // or one that has become too old, is asked again.
        if hello.message_number == 1 && self.secrets.verify(now, peer, hello)? {
            return Ok(None);
        }
        let cookie = self.secrets.cookie(now, peer, hello)?;
        Ok(Some(hello.verify_request(&cookie)))
    }

    /// Begins the session of a peer that has shown its address; `None` when OpenSSL does
    /// not take what it says. Costs about a millisecond: the signature is made here.
    pub fn accept(&self, shown: &Shown<'_>) -> Option<Box<Session>> {
        Session::accept(&self.context, &shown.hello, shown.datagram)
            .ok()
            .flatten()
    }

    /// [`look`](Self::look), and [`accept`](Self::accept) whoever has shown its address.
    pub fn offer(&mut self, now: Instant, peer: SocketAddr, datagram: &[u8]) -> Offer {
        match self.look(now, peer, datagram) {
            Look::Answer(answer) => Offer::Answer(answer),
            Look::Ignored => Offer::Ignored,
            Look::Shown(shown) => self.accept(&shown).map_or(Offer::Ignored, Offer::Accepted),
        }
    }
}
