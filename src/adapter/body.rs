//! Requests that come in: what is not whole yet takes memory, and must not for ever.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use metrics::Counter;
use tokio::time::{Sleep, sleep};
use tonic::Status;

/// How long a request may take from its header to its end.
const PATIENCE: Duration = Duration::from_secs(30);

/// The least that requests which are not whole may have in memory, all together, in bytes: far
/// more than handlers have under way, for nearly every request comes in one piece.
const LEAST: usize = 64 * 1024 * 1024;

/// Requests of the largest size that may be coming in at once.
const LARGEST: usize = 16;

/// Bytes of requests that are not whole yet, of all handlers.
pub(super) struct Unread {
    bytes: AtomicUsize,
    most: usize,
    /// Requests that were too many, or too slow.
    refused: Counter,
}

impl Unread {
    /// `max_message_size` in bytes.
    pub fn new(max_message_size: usize, refused: Counter) -> Arc<Self> {
        Arc::new(Self {
            bytes: AtomicUsize::new(0),
            most: max_message_size.saturating_mul(LARGEST).max(LEAST),
            refused,
        })
    }

    /// The same request, within the bounds.
    pub fn bounded(self: &Arc<Self>, request: http::Request<Incoming>) -> http::Request<Bounded> {
        request.map(|inner| Bounded {
            inner,
            counted: 0,
            unread: self.clone(),
            over: None,
        })
    }
}

/// A request that comes in; dropped when it is whole.
pub(super) struct Bounded {
    inner: Incoming,
    counted: usize,
    unread: Arc<Unread>,
    /// When it has to be whole; begun when something is missing.
    over: Option<Pin<Box<Sleep>>>,
}

impl Body for Bounded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                this.counted += length;
                let before = this.unread.bytes.fetch_add(length, Ordering::Relaxed);
                if before + length > this.unread.most {
                    this.unread.refused.increment(1);
                    let text = "too many requests are coming in and are not whole yet";
                    return Poll::Ready(Some(Err(Status::resource_exhausted(text))));
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                Poll::Ready(Some(Err(Status::from_error(error.into()))))
            }
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                let over = this.over.get_or_insert_with(|| Box::pin(sleep(PATIENCE)));
                if over.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                this.unread.refused.increment(1);
                let text = format!("the request was not whole within {PATIENCE:?}");
                Poll::Ready(Some(Err(Status::deadline_exceeded(text))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Bounded {
    fn drop(&mut self) {
        self.unread.bytes.fetch_sub(self.counted, Ordering::Relaxed);
    }
}
