//! One gRPC call: what goes out, how long its answer may take, what the answer was.
//!
//! A unary call and a client stream of one message are the same bytes on the wire,
//! so this speaks to `ConnectionUnaryHandler` and to `ConnectionHandler` alike.

use std::time::Duration;

use bytes::{BufMut, Bytes};
use http::uri::{InvalidUri, PathAndQuery};
use http::{HeaderMap, Uri};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, timeout_at};
use tonic::client::Grpc;
use tonic::codec::{Codec, EncodeBuf, Encoder};
use tonic::metadata::MetadataValue;
use tonic::{Request, Status};
use tonic_prost::ProstDecoder;

use super::link::{Channel, Link, not_sent};
use super::status::{Miss, is_answer, miss};
use super::{CallFailure, Caller, Event, unary};
use crate::metrics::METHODS;
use crate::proto;
use crate::trace::{self, Traceparent};

/// Most time for which a handler that waits for us is not blamed, in one callback.
pub(super) const MAX_WAIT: Duration = Duration::from_secs(120);

/// How calls are made.
#[derive(Debug, Clone)]
pub(super) struct Options {
    /// The gRPC service.
    pub(super) service: &'static str,
    /// Longest time for the answer to one.
    pub(super) request_timeout: Duration,
    /// Whether that is sent along.
    pub(super) grpc_timeout: bool,
    /// Whether calls carry a `traceparent`.
    pub(super) trace_context: bool,
}

/// See the module.
pub(super) struct Calls {
    options: Options,
    paths: [PathAndQuery; METHODS.len()],
}

/// Requests that are encoded already.
struct Encoded;

impl Codec for Encoded {
    type Encode = Bytes;
    type Decode = proto::EmptySuccess;
    type Encoder = Self;
    type Decoder = ProstDecoder<proto::EmptySuccess>;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::default()
    }
}

impl Encoder for Encoded {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

/// What a call is that found no answer.
pub(super) fn late(limit: Duration) -> CallFailure {
    CallFailure::Failed {
        code: "DEADLINE_EXCEEDED",
        message: format!("no answer within {limit:?}"),
    }
}

impl Calls {
    /// # Errors
    /// A service name that cannot stand in a path.
    pub(super) fn new(options: Options) -> Result<Self, InvalidUri> {
        let mut paths = [const { PathAndQuery::from_static("/") }; METHODS.len()];
        for (path, method) in paths.iter_mut().zip(METHODS) {
            *path = format!("/emqx.exproto.v1.{}/{method}", options.service).parse()?;
        }
        Ok(Self { options, paths })
    }

    /// Makes one call with many requests, encoded, which ends with their channel. It may
    /// take any time.
    pub(super) async fn stream(
        &self,
        link: &Link,
        method: usize,
        mut requests: UnboundedReceiver<Bytes>,
    ) -> Result<(), Status> {
        let Some(channel) = link.channel() else {
            return Err(not_sent(link.trouble()));
        };
        let Some(path) = self.paths.get(method).cloned() else {
            return Err(Status::internal("no such callback"));
        };
        let heard = channel.clone();
        let mut grpc = Grpc::with_origin(channel, link.origin());
        grpc.ready().await?;
        let requests = futures_util::stream::poll_fn(move |cx| requests.poll_recv(cx));
        let answer = grpc.client_streaming(Request::new(requests), path, Encoded);
        let result = answer.await;
        if is_answer(&result) {
            heard.answered();
        }
        result.map(|_| ())
    }

    /// One call, whose turn it is. Time that the handler spends waiting for us is not the
    /// handler's.
    pub(super) async fn one(
        &self,
        link: &Link,
        channel: Channel,
        caller: &Caller,
        event: &Event,
    ) -> Result<(), Miss> {
        let limit = self.options.request_timeout;
        let (started, waited) = (Instant::now(), caller.waited());
        let (heard, answers) = (channel.clone(), channel.answers());
        let mut deadline = started + limit;
        let mut call = std::pin::pin!(self.call(link, channel, caller, event));
        loop {
            match timeout_at(deadline, &mut call).await {
                Ok(Ok(())) => {
                    heard.answered();
                    return Ok(());
                }
                Ok(Err(status)) => {
                    let miss = miss(&status);
                    if miss.is_answer() {
                        heard.answered();
                    }
                    return Err(miss);
                }
                Err(_) => {
                    let wait = (caller.waited() - waited).min(MAX_WAIT);
                    let extended = started + limit + wait;
                    if extended <= Instant::now() {
                        if heard.answers() == answers {
                            link.doubt(&heard);
                        }
                        return Err(Miss::Refused(late(limit)));
                    }
                    deadline = extended;
                }
            }
        }
    }

    async fn call(
        &self,
        link: &Link,
        channel: Channel,
        caller: &Caller,
        event: &Event,
    ) -> Result<(), Status> {
        let conn = caller.conn.text();
        let method = event.method_index();
        let encoded = match event {
            Event::SocketCreated(conninfo) => unary::request(&proto::SocketCreatedRequest {
                conn,
                conninfo: Some(conninfo.clone()),
            }),
            Event::ReceivedBytes(bytes) => unary::request(&proto::ReceivedBytesRequest {
                conn,
                bytes: bytes.clone(),
            }),
            Event::ReceivedMessages(messages, _) => unary::messages(&conn, messages),
            Event::TimerTimeout => unary::request(&proto::TimerTimeoutRequest {
                conn,
                r#type: proto::TimerType::Keepalive.into(),
            }),
            Event::SocketClosed(reason) => unary::request(&proto::SocketClosedRequest {
                conn,
                reason: reason.clone(),
            }),
        };
        let Some(path) = self.paths.get(method).cloned() else {
            return Err(Status::internal("no such callback"));
        };
        let mut parts = link.origin().into_parts();
        parts.path_and_query = Some(path);
        let uri = Uri::from_parts(parts).map_err(|error| Status::internal(error.to_string()))?;
        unary::call(channel, uri, self.headers(event), encoded).await
    }

    /// What a call has beside gRPC's own headers.
    fn headers(&self, event: &Event) -> HeaderMap {
        let mut request = Request::new(());
        if self.options.grpc_timeout {
            request.set_timeout(self.options.request_timeout);
        }
        if self.options.trace_context
            && let Some(traceparent) = traceparent(event)
            && let Ok(value) = MetadataValue::try_from(traceparent.to_string())
        {
            tracing::debug!(callback = event.method(), %traceparent, "calling");
            request.metadata_mut().insert(trace::KEY, value);
        }
        request.into_parts().0.into_headers()
    }
}

/// A callback is part of the trace that brings it about, as it was said there: what the gateway does
/// in between is recorded nowhere. Any other begins one.
fn traceparent(event: &Event) -> Option<Traceparent> {
    match event {
        Event::ReceivedMessages(_, Some(trace)) => Some(*trace),
        _ => Traceparent::begin(),
    }
}
