//! A stream that tells when its peer has said something.
//!
//! The first thing that either side of HTTP/2 says is its SETTINGS, a server at the latest when
//! it has the client's (RFC 9113, 3.4). hyper does not wait for them and does not tell.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

/// See the module.
pub(crate) struct Greeted<S> {
    stream: S,
    /// Until enough has come.
    heard: Option<oneshot::Sender<()>>,
    /// Bytes that are still to come until then.
    missing: usize,
}

impl<S> Greeted<S> {
    /// What is received resolves when so many bytes have come.
    pub(crate) fn new(stream: S, bytes: usize) -> (Self, oneshot::Receiver<()>) {
        let (sender, receiver) = oneshot::channel();
        let greeted = Self {
            stream,
            heard: Some(sender),
            missing: bytes,
        };
        (greeted, receiver)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Greeted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if self.heard.is_some() {
            let came = buffer.filled().len() - before;
            self.missing = self.missing.saturating_sub(came);
            if self.missing == 0
                && let Some(heard) = self.heard.take()
            {
                // Nobody may be waiting any more.
                let _ = heard.send(());
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Greeted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
