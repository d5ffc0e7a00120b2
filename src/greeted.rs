//! A stream that tells when its peer has greeted, and how.
//!
//! The first thing that either side of HTTP/2 says is its SETTINGS, a server at the latest when
//! it has the client's (RFC 9113, 3.4). hyper does not wait for them and does not tell.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

/// What a client says before its SETTINGS, bytes.
pub(crate) const PREFACE: usize = 24;

/// The longest first frame that is looked at, bytes: room for some hundred settings.
const MOST: usize = 1024;

/// Of a frame, bytes (RFC 9113, 4.1).
const HEADER: usize = 9;

/// Types of frames, settings (RFC 9113, 6.5 and 6.5.2).
const SETTINGS: u8 = 4;
const MAX_CONCURRENT_STREAMS: u16 = 3;

/// What the first frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Greeting {
    /// Calls that may be under way at the peer, where it says so.
    pub max_concurrent_streams: Option<u32>,
}

impl Greeting {
    /// `None` while it is not whole. What is no SETTINGS says nothing: it is for others to judge.
    fn read(bytes: &[u8]) -> Option<Self> {
        let (header, rest) = bytes.split_first_chunk::<HEADER>()?;
        let [a, b, c, kind, ..] = *header;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        if kind != SETTINGS || length > MOST - HEADER {
            return Some(Self::default());
        }
        let settings = rest.get(..length)?.chunks_exact(6);
        let value = |setting: &[u8]| {
            let (id, value) = setting.split_first_chunk::<2>()?;
            let is_it = u16::from_be_bytes(*id) == MAX_CONCURRENT_STREAMS;
            is_it.then(|| value.try_into().ok().map(u32::from_be_bytes))?
        };
        Some(Self {
            max_concurrent_streams: settings.filter_map(value).next_back(),
        })
    }
}

/// See the module.
pub(crate) struct Greeted<S> {
    stream: S,
    /// Until it has come.
    heard: Option<oneshot::Sender<Greeting>>,
    /// Bytes that come before it.
    before: usize,
    seen: Vec<u8>,
}

impl<S> Greeted<S> {
    /// What is received resolves when the first frame has come, behind so many bytes.
    pub(crate) fn new(stream: S, before: usize) -> (Self, oneshot::Receiver<Greeting>) {
        let (sender, receiver) = oneshot::channel();
        let greeted = Self {
            stream,
            heard: Some(sender),
            before,
            seen: Vec::new(),
        };
        (greeted, receiver)
    }

    fn note(&mut self, bytes: &[u8]) {
        let skipped = self.before.min(bytes.len());
        self.before -= skipped;
        let room = MOST - self.seen.len();
        self.seen.extend(bytes.iter().skip(skipped).take(room));
        if let Some(greeting) = Greeting::read(&self.seen) {
            self.seen = Vec::new();
            if let Some(heard) = self.heard.take() {
                // Nobody may be waiting any more.
                let _ = heard.send(greeting);
            }
        }
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
            self.note(buffer.filled().get(before..).unwrap_or_default());
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn settings(all: &[(u16, u32)]) -> Vec<u8> {
        let mut frame = vec![
            0,
            0,
            u8::try_from(all.len() * 6).unwrap(),
            SETTINGS,
            0,
            0,
            0,
            0,
            0,
        ];
        for (id, value) in all {
            frame.extend(id.to_be_bytes());
            frame.extend(value.to_be_bytes());
        }
        frame
    }

    #[test]
    fn a_greeting_comes_whole_or_in_pieces() {
        let frame = settings(&[(4, 65_535), (MAX_CONCURRENT_STREAMS, 128)]);
        let mut bytes = vec![7; PREFACE];
        bytes.extend(&frame);
        for pieces in [1, 2, 5, bytes.len()] {
            let (mut greeted, mut heard) = Greeted::new((), PREFACE);
            for piece in bytes.chunks(pieces) {
                assert!(heard.try_recv().is_err());
                greeted.note(piece);
            }
            let limit = heard.try_recv().unwrap().max_concurrent_streams;
            assert_eq!(limit, Some(128), "in pieces of {pieces}");
        }
    }

    #[test]
    fn what_is_no_settings_says_nothing() {
        let none = Some(Greeting::default());
        assert_eq!(Greeting::read(&settings(&[])), none);
        assert_eq!(Greeting::read(&settings(&[(4, 1)])), none);
        assert_eq!(Greeting::read(b"HTTP/1.1 400"), none);
        assert_eq!(
            Greeting::read(&[255, 255, 255, SETTINGS, 0, 0, 0, 0, 0]),
            none
        );
        assert_eq!(Greeting::read(&settings(&[(3, 1)])[..10]), None);
    }
}
