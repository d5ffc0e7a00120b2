//! Answers that go out: those that are not gRPC's OK are counted here, whoever made them.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures_util::future::BoxFuture;
use tonic::body::Body;
use tonic::{Code, Status};

use crate::metrics::{ADAPTER_METHODS, AdapterMetrics};
use crate::proto::code_name;

type Answer = Result<http::Response<Body>, Infallible>;

/// An answer to one of the eight calls, or to another that is none.
pub(super) struct Counted {
    inner: BoxFuture<'static, Answer>,
    counts: Option<Counts>,
}

struct Counts {
    /// In [`ADAPTER_METHODS`], or beyond for what is no call.
    method: usize,
    began: Instant,
    metrics: Arc<AdapterMetrics>,
}

impl Counted {
    /// Of the standard services, which are not counted.
    pub fn not(inner: BoxFuture<'static, Answer>) -> Self {
        Self {
            inner,
            counts: None,
        }
    }

    /// Of the call with this path.
    pub fn new(
        path: &str,
        metrics: Arc<AdapterMetrics>,
    ) -> impl FnOnce(BoxFuture<'static, Answer>) -> Self + use<> {
        let name = path.rsplit('/').next().unwrap_or_default();
        let method = ADAPTER_METHODS.iter().position(|method| *method == name);
        let counts = Counts {
            method: method.unwrap_or(usize::MAX),
            began: Instant::now(),
            metrics,
        };
        move |inner| Self {
            inner,
            counts: Some(counts),
        }
    }
}

impl Future for Counted {
    type Output = Answer;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        let Ok(response) = ready!(self.inner.as_mut().poll(cx));
        // OK comes in the trailers, and was counted with its result code.
        if let Some(counts) = &self.counts
            && let Some(status) = Status::from_header_map(response.headers())
            && status.code() != Code::Ok
        {
            let code = code_name(status.code());
            counts
                .metrics
                .answered(counts.method, code, counts.began.elapsed());
            tracing::debug!(code, reason = status.message(), "a handler's call failed");
        }
        Poll::Ready(Ok(response))
    }
}
