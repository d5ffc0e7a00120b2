//! TLS over TCP: the device's side of a handshake, and the socket after it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{Accept, TlsAcceptor};

use super::tcp::{HEAD, Stream};
use super::{Received, Socket};

/// A TLS connection.
pub struct TlsSocket {
    stream: TlsStream<Stream>,
    /// Bytes that were encrypted and may not be on their way yet.
    encrypted: usize,
}

/// A handshake. The caller limits the time; dropped half way the connection is gone.
pub struct Handshake(Accept<Stream>);

/// Bytes of a ClientHello that are waited for before anything is spent on it. Most are
/// shorter; of one that is longer, so much has come that the rest is on its way.
const MOST_OF_HELLO: usize = 1024;

/// The bytes of a device's first message, as far as they are to be waited for, by the
/// heads of its record and of the message in it (RFC 8446, 5.1 and 4). What is no TLS is
/// not waited for; a message that is cut within its head, as none is, for long.
pub fn first_message(head: [u8; HEAD]) -> usize {
    const HANDSHAKE: u8 = 22;
    let [kind, _, _, high, low, _, upper, middle, lower] = head;
    let record = u16::from_be_bytes([high, low]);
    match kind {
        HANDSHAKE if record < 4 => MOST_OF_HELLO,
        HANDSHAKE => {
            let message = u32::from_be_bytes([0, upper, middle, lower]) as usize;
            (HEAD + message).min(MOST_OF_HELLO)
        }
        _ => 0,
    }
}

impl Handshake {
    /// Begins when it is polled.
    pub fn new(stream: Stream, config: Arc<ServerConfig>) -> Self {
        Self(TlsAcceptor::from(config).accept(stream))
    }

    /// Bytes that were sent so far, until it is done: there is an answer only to a
    /// message that came whole.
    pub fn sent(&self) -> u64 {
        self.0.get_ref().map_or(0, Stream::sent)
    }
}

impl Future for Handshake {
    type Output = io::Result<TlsSocket>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<TlsSocket>> {
        let stream = ready!(Pin::new(&mut self.0).poll(cx))?;
        Poll::Ready(Ok(TlsSocket {
            stream,
            encrypted: 0,
        }))
    }
}

impl TlsSocket {
    /// The device's own certificate in DER, if it showed one.
    pub fn certificate(&self) -> Option<&[u8]> {
        let (_, connection) = self.stream.get_ref();
        Some(connection.peer_certificates()?.first()?)
    }
}

impl Socket for TlsSocket {
    const STREAM: bool = true;

    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<Received>> {
        let mut buffer = ReadBuf::new(buffer);
        match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer)) {
            Ok(()) => Poll::Ready(Ok(match buffer.filled().len() {
                0 => Received::End,
                count => Received::Bytes(count),
            })),
            // Many devices just close, without close_notify. What was cut off then, only
            // the device's protocol can tell, as over TCP.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Poll::Ready(Ok(Received::End))
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    /// Bytes count as taken when they have left, encrypted: else the last of them could
    /// stay behind with nobody who sends them on.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut stream = Pin::new(&mut self.stream);
        if self.encrypted == 0 {
            self.encrypted = ready!(stream.as_mut().poll_write_vectored(cx, chunks))?;
        }
        ready!(stream.poll_flush(cx))?;
        Poll::Ready(Ok(std::mem::take(&mut self.encrypted)))
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn unacknowledged(&self) -> usize {
        self.stream.get_ref().0.unacknowledged()
    }

    fn abort(&mut self) {
        self.stream.get_ref().0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_is_as_long_as_its_message_says() {
        assert_eq!(first_message([22, 3, 1, 0, 204, 1, 0, 0, 200]), 209);
        // In several records, or longer than is waited for.
        assert_eq!(first_message([22, 3, 1, 0, 50, 1, 0, 0, 200]), 209);
        let long = [22, 3, 1, 64, 0, 1, 255, 255, 255];
        assert_eq!(first_message(long), MOST_OF_HELLO);
        // A record that is over before it says anything.
        assert_eq!(first_message([22, 3, 1, 0, 1, 1, 22, 3, 1]), MOST_OF_HELLO);
        assert_eq!(first_message(*b"GET / HTT"), 0);
    }
}
